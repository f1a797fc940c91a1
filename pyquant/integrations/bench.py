"""What ``pyquant bench`` does: time the 4-bit linear layer on a user's shapes, and choose tiles of the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.checkpoint import local_folder
from pyquant.integrations.events import Clock, OnEvent
from pyquant.nn.linear import QLinear
from pyquant.nn.swap import matches
from pyquant.ops import linear_w4a16
from pyquant.ops._registry import kernels, unavailable

TUNED_SHAPES = 3  # of a model, most frequent first: each tile is compiled and timed at each of them


def linear_shapes(path: str, exclude: Sequence[str] = ("lm_head",)) -> list[tuple[int, int]]:
    """The distinct ``(N, K)`` of a model's linear layers, from its config alone, most frequent first."""
    config = AutoConfig.from_pretrained(local_folder(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts: dict[tuple[int, int], int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not matches(name, exclude):
            shape = (module.out_features, module.in_features)
            counts[shape] = counts.get(shape, 0) + 1
    return sorted(counts, key=counts.get, reverse=True)


def find_shapes(path: str | None, given: Sequence[str]) -> list[tuple[int, int]]:
    """``(N, K)`` of the shapes typed as ``NxK``, or else of a model's layers.

    Raises:
        ValueError: neither a model nor a shape, or a shape that is no ``NxK``.
    """
    shapes = []
    for text in given:
        n, by, k = text.lower().partition("x")
        if not (by and n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise ValueError(f"--shape {text!r} is not NxK, as in 4096x14336 (output by input features)")
        shapes.append((int(n), int(k)))
    if not shapes and path is None:
        raise ValueError("bench needs a model folder, or --shape NxK (output by input features)")
    return shapes or linear_shapes(path)


def bench(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int] = (1, 16, 256),
    group_size: int = 128,
    on_event: OnEvent | None = None,
) -> list[dict[str, Any]]:
    """Time ``linear_w4a16`` against torch's bf16 linear, on the present GPU.

    Weights are rotated through 256 MB, so that they come from memory as they do in a model; CUDA graphs, median of 5.

    Args:
        shapes: ``(N, K)``, output and input features.
        tokens: rows of x.
        group_size: of the 4-bit weight; per channel where K is no multiple of it.
        on_event: told how far it is.

    Returns:
        rows ``{"N", "K", "M", "us", "bf16_us", "speedup"}``.

    Raises:
        ValueError: no GPU.
    """
    _need_gpu()
    rows = []
    work = [(n, k, m) for n, k in shapes for m in tokens]
    with Clock(on_event)("bench") as tick:
        for i, (n, k, m) in enumerate(work):
            group = group_size if k % group_size == 0 else -1
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(_copies(2 * n * k))]
            layer = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
            layer.weight.data = dense[0]
            q = QLinear.from_linear(layer, QuantSpec(4, group, True))
            packed = [q.qweight.clone() for _ in range(_copies(n * k // 2))]
            us = median_us([partial(linear_w4a16, x, w, q.scale, None, None, n, group) for w in packed])
            bf16 = median_us([partial(nn.functional.linear, x, w) for w in dense])
            rows.append({"N": n, "K": k, "M": m, "us": us, "bf16_us": bf16, "speedup": bf16 / us})
            tick(i + 1, len(work), f"{n}x{k}, {m} tokens")
    return rows


def tune(
    shapes: Sequence[tuple[int, int]],
    group_size: int = 128,
    on_event: OnEvent | None = None,
    timer: Any = None,
    device: str = "cuda",
) -> tuple[list[dict[str, Any]], Path]:
    """Time a few tiles of the Triton kernels on the present GPU and keep the fastest for GPUs of its name.

    They are used where Triton serves ``linear_w4a16`` (no CUDA extension, or ``PYQUANT_BACKEND=triton``) and for the gradient
    of up to 64 tokens. The choice is made in bf16.

    Args:
        shapes: ``(N, K)``; the first three are timed.
        group_size: of the 4-bit weight; per channel where K is no multiple of it.
        on_event: told how far it is.
        timer: microseconds a call of a list of calls, instead of this module's.
        device: other than ``cuda`` only where Triton interprets.

    Returns:
        what was measured, as :func:`pyquant.kernels.tune.tune` says it, and the file that holds the choice.

    Raises:
        ValueError: no GPU, or no Triton.
    """
    if device == "cuda":
        _need_gpu()
    if why := unavailable("triton", device):
        raise ValueError(f"bench --tune chooses tiles of the Triton kernels, and {why}")
    tiles, work = kernels("tiles"), kernels("tune")
    at, on_gpu = torch.device(device), device == "cuda"
    kind, name = tiles.gpu(torch.device("cuda", torch.cuda.current_device()) if on_gpu else at)
    # Triton's interpreter knows no bf16, and there is nothing to keep cold
    dtype, cold = (torch.bfloat16, 256_000_000) if on_gpu else (torch.float16, 0)
    measure = work.measurer(timer or median_us, at, dtype, group_size, kind, cold)
    with Clock(on_event)("tune") as tick:
        rows, report = work.tune(measure, list(shapes)[:TUNED_SHAPES], kind, tick)
    return report, tiles.save(name, rows, version("triton"))


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise ValueError("bench times GPU kernels and torch sees no GPU here (pyquant doctor says why)")


def _copies(size: int) -> int:
    return max(1, min(64, -(-256_000_000 // size)))


def median_us(calls: list[Any], rounds: int = 5) -> float:
    """Microseconds a call, the calls captured one after another in a CUDA graph."""
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        repeat = max(1, 32 // len(calls))
        with torch.cuda.graph(graph):
            for _ in range(repeat):
                for call in calls:
                    call()
        times = []
        for _ in range(rounds + 1):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end) / (repeat * len(calls)))
    return float(Tensor(times[1:]).median())  # the first replay warms up
