"""``pyquant analyze --errors``: error curves of hosts of weight-activation quantization, bare and with BiSup's parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.checkpoint import local_folder
from pyquant.integrations.data import load_text, windows
from pyquant.integrations.errors import error_curves, write_error_pages
from pyquant.integrations.events import Clock, OnEvent
from pyquant.integrations.machine import pick_device
from pyquant.integrations.transformers import load_causal_lm
from pyquant.recipes.bisup import PARTS, BiSup, bisup


def analyze_errors(
    model: str,
    calibration: str,
    out: Path,
    spec: QuantSpec,
    hosts: Sequence[str] = ("rtn", "quarot"),
    act_bits: int = 4,
    kv_bits: int | None = None,
    steps: int = 60,
    batch_size: int = 4,
    seq_len: int = 256,
    calibration_windows: int = 64,
    probe_windows: int = 16,
    device: str = "auto",
    seed: int = 0,
    command: str = "",
    on_event: OnEvent | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Quantize a model by each host, bare and with the vertical parts, and measure how errors grow.

    Args:
        model, calibration: folder of a full-precision model, and text; the windows measured on come after those trained on.
        out: folder; created.
        spec, act_bits, kv_bits: bits and groups of weights, of inputs (the same groups), and of K and V (None: act_bits).
        hosts: of :mod:`pyquant.recipes.bisup`.
        steps, batch_size, seq_len, calibration_windows, seed: of the training.
        probe_windows: measured on.
        device: ``auto``, ``cpu`` or ``cuda``; arithmetic is fp32.
        command, on_event: for the page; receives progress.

    Returns:
        model -> curve -> a value after each block, also in ``errors.json``, ``errors.svg`` and ``report.html``.

    Raises:
        FileNotFoundError, ValueError: the request cannot be met; nothing was computed.
    """
    clock, where, folder = Clock(on_event), pick_device(device), local_folder(model)
    common: dict[str, Any] = {"act_bits": act_bits, "batch_size": batch_size, "seed": seed}
    arms = {host: BiSup(host=host, parts=(), **common) for host in hosts}
    if steps:
        arms |= {f"{host} + BiSup": BiSup(host=host, parts=PARTS, steps=steps, **common) for host in hosts}
    text = load_text(calibration)
    with clock("load the model"):
        net, tokenizer = load_causal_lm(folder, dtype="auto", device="cpu")
        net = net.to(where, torch.float32).eval()
    context = getattr(net.config, "max_position_embeddings", None)
    if context and seq_len > context:
        raise ValueError(f"seq_len={seq_len} is longer than the model's context of {context} tokens")
    tokens = windows(tokenizer, text, seq_len, calibration_windows + probe_windows, calibration)
    if len(tokens) < calibration_windows + probe_windows:
        raise ValueError(
            f"{calibration} has {len(tokens)} windows of {seq_len} tokens; {calibration_windows} for training and "
            f"{probe_windows} to measure on are needed"
        )
    bits = act_bits if kv_bits is None else kv_bits
    curves = {}
    for name, how in arms.items():
        with clock(f"quantize, {name}") as stage:
            made = bisup(net, tokens[:calibration_windows], spec, how, on_progress=stage)
        with clock(f"measure, {name}"):
            curves[name] = error_curves(
                net,
                made.reference,
                made.model,
                tokens[calibration_windows:],
                bits,
                spec.group_size,
                how.host == "quarot",
            )
    facts = {
        "spec": str(spec), "act_bits": act_bits, "kv_bits": bits, "steps": steps, "seq_len": seq_len, "seed": seed,
        "calibration_windows": calibration_windows, "probe_windows": probe_windows,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_error_pages(curves, out, Path(model).name, facts, command)
    return curves
