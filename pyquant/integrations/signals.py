"""What ``pyquant analyze`` runs: signals of a model in full precision, quantized, and over trainings of it, arm by arm.

Arms share everything but what they are about: the same probe windows, and in training the same batches, rates and loss.
``fp`` and ``ptq`` are measured as they are; ``fp, trained`` (the control), ``kd-qat`` and ``kd-qat, frozen ...`` after
training, during which the squared gradient norm of every projection is recorded at each step. The probe's loss is the
cross entropy alone, since the distillation loss of full precision against itself is 0 and has no gradient to compare
with; training uses the recipe's loss. The reference of ratios, cosines and SNR is always the untrained full-precision
model on the same windows.

The loop of training is a plain one, without checkpoints of its own: a finished arm of a seed is a row of ``rows.json``,
and a run that was stopped goes on after the last row.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from pyquant.analysis.signal import compare, gradients, projections, watch
from pyquant.analysis.verdict import CLAIMED, geometric, spike
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.checkpoint import local_folder
from pyquant.integrations.commands import load_any
from pyquant.integrations.data import load_text, windows
from pyquant.integrations.events import Clock, OnEvent
from pyquant.integrations.files import write_atomic
from pyquant.integrations.machine import pick_device, versions
from pyquant.integrations.transformers import load_causal_lm
from pyquant.integrations.work import checkpoint_digest, tensor_digest
from pyquant.nn.swap import matches
from pyquant.recipes.kd_qat import KDLoss, freeze, kd_loss, parameter_groups, prepare

TASK = KDLoss(kl=0.0, ce=1.0)  # the loss of the probe


@dataclass(frozen=True)
class SignalConfig:
    """An analysis.

    Args:
        model, calibration: folder of a full-precision model, and text for probe and training.
        bits, group_size, symmetric, rule: of the quantized arms; the paper's are 4 bits per channel.
        steps: of training; 0 measures ``fp`` and ``ptq`` (and checkpoints) only.
        batch_size, seq_len: windows of a batch and tokens of a window, of probe and training.
        probe_batches: batches that are measured on.
        lr, scale_lr, warmup_steps, max_grad_norm: of training, AdamW with a cosine to 0.
        loss: of training.
        seeds: each draws its own windows.
        freezes: patterns of projections frozen in an arm each; the default is ov-freeze.
        checkpoints: name -> folder of a trained model of the same architecture, full precision or quantized, measured as it
            is, once a seed.
        exclude: layers that are not quantized.
        device: ``auto``, ``cpu`` or ``cuda``; arithmetic is fp32.

    Raises:
        ValueError: for values that cannot be.
    """

    model: str
    calibration: str
    bits: int = 4
    group_size: int = -1
    symmetric: bool = True
    rule: str = "mse"
    steps: int = 60
    batch_size: int = 4
    seq_len: int = 256
    probe_batches: int = 4
    lr: float = 1e-4
    scale_lr: float = 1e-4
    warmup_steps: int = 5
    max_grad_norm: float = 1.0
    loss: KDLoss = field(default_factory=KDLoss)
    seeds: int = 3
    freezes: tuple[tuple[str, ...], ...] = (CLAIMED,)
    checkpoints: dict[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ("lm_head",)
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batch_size", "probe_batches", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("steps", "lr", "scale_lr", "warmup_steps", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2")
        if clash := set(self.checkpoints) & set(self.arms()):
            raise ValueError(f"a checkpoint is called {clash.pop()!r}, which is the name of an arm")

    def arms(self) -> list[str]:
        """Names of the arms without those of checkpoints, in order."""
        trained = ["fp, trained", "kd-qat", *(f"kd-qat, frozen {','.join(patterns)}" for patterns in self.freezes)]
        return ["fp", "ptq", *(trained if self.steps else [])]


def analyze(config: SignalConfig, out: Path, on_event: OnEvent | None = None) -> dict[str, Any]:
    """Run what ``out/rows.json`` has no row of yet.

    Args:
        config: the analysis.
        out: folder; created.
        on_event: receives progress.

    Returns:
        ``{"meta", "rows"}``, also in the file: a row an arm and seed, ``{"arm", "seed", "seconds", "loss": {"kl", "ce"} on
        the probe, "layers": [rows of compare() with "mean", "variance", "snr_db"], "spikes": {name: largest over median
        squared norm}, "curves": {kind: squared norm at each step, geometric mean over blocks}, "losses": [of each step]}``.

    Raises:
        FileNotFoundError, ValueError: the request cannot be met, or ``rows.json`` is of another run (what differs is named);
            nothing was computed.
    """
    clock = Clock(on_event)
    text = load_text(config.calibration)
    device, folder = pick_device(config.device), local_folder(config.model)
    spec = QuantSpec(config.bits, config.group_size, config.symmetric)
    with clock("load the model"):
        model, tokenizer = load_causal_lm(folder, dtype="auto", device="cpu")
        model = model.to(device, torch.float32).eval()
        others = {name: local_folder(path) for name, path in config.checkpoints.items()}
    context = getattr(model.config, "max_position_embeddings", None)
    if context and config.seq_len > context:
        raise ValueError(f"seq_len={config.seq_len} is longer than the model's context of {context} tokens")
    places = projections(model)
    for pattern in (p for patterns in config.freezes for p in patterns if config.steps):
        if not any(matches(name, [pattern]) for name in places):
            raise ValueError(f"freeze={pattern!r} matches none of the {len(places)} projections")
    tokens = windows(tokenizer, text, config.seq_len, source=config.calibration)
    need = config.batch_size * (config.probe_batches + config.steps)
    if len(tokens) < need:
        raise ValueError(
            f"{config.calibration} has {len(tokens)} windows of {config.seq_len} tokens; batch_size={config.batch_size} x "
            f"(probe_batches={config.probe_batches} + steps={config.steps}) needs {need}"
        )
    settings = {k: v for k, v in asdict(config).items() if k not in ("model", "calibration", "seeds", "checkpoints")}
    meta = {
        **json.loads(json.dumps(settings)),
        "spec": str(spec),
        "model": checkpoint_digest(folder),
        "text": tensor_digest(tokens),
        "versions": versions(device),
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out / "rows.json"
    held = _held(file, meta)
    for seed in range(config.seeds):
        todo = [arm for arm in [*config.arms(), *others] if not _has(held, arm, seed)]
        if not todo:
            continue
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:need]
        drawn = tokens[order].split(config.batch_size)
        probe, train = drawn[: config.probe_batches], drawn[config.probe_batches :]
        with clock(f"seed {seed}: full precision"):
            full = gradients(model, model, probe, _task)
        for arm in todo:
            began = time.monotonic()
            row: dict[str, Any] = {"arm": arm, "seed": seed, "spikes": {}, "curves": {}, "losses": []}
            with clock(f"seed {seed}: {arm}") as tick:
                if arm == "fp":
                    student = model
                elif arm in others:
                    student = load_any(str(others[arm]), device, "float32")[0]
                else:
                    student = copy.deepcopy(model)
                    row |= _make(arm, student, model, train, config, spec, seed, places, tick)
                found, signals = full if arm == "fp" else gradients(student, model, probe, _task)
                row["layers"] = [{**r, **signals[r["name"]]} for r in compare(found, full[0], places)]
                row["loss"] = _losses(student, model, probe)
            row["seconds"] = round(time.monotonic() - began, 1)
            held["rows"].append(_rounded(row))
            write_atomic(file, json.dumps(held, indent=1) + "\n")
            del student, found
    return held


def _make(
    arm: str,
    student: nn.Module,
    teacher: nn.Module,
    train: Sequence[Tensor],
    config: SignalConfig,
    spec: QuantSpec,
    seed: int,
    places: dict[str, tuple[int, str]],
    tick: Callable[..., None],
) -> dict[str, Any]:
    """Turn a copy of the model into an arm, in place; what its training showed."""
    torch.manual_seed(seed)
    if arm != "fp, trained":
        prepare(student, spec, "lsq", config.rule, exclude=config.exclude)
    if arm == "ptq":
        return {}
    if arm.startswith("kd-qat, frozen "):
        freeze(student, arm.removeprefix("kd-qat, frozen ").split(","))
    norms, losses = train_watched(student, teacher, train, config, tick)
    kinds: dict[str, list[str]] = {}
    for name, (_, kind) in places.items():
        kinds.setdefault(kind, []).append(name)
    curves = {
        kind: [geometric(norms[n][t] for n in names) for t in range(len(losses))] for kind, names in kinds.items()
    }
    return {"spikes": {n: spike(v) for n, v in norms.items()}, "curves": curves, "losses": losses}


def train_watched(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Tensor],
    config: SignalConfig,
    tick: Callable[..., None] | None = None,
) -> tuple[dict[str, list[float]], list[float]]:
    """Train on each batch once and record the squared gradient norms of all projections, frozen ones included.

    Args:
        student: full precision or prepared; trained in place, fp32.
        teacher: full precision.
        batches: int64 ``[B, T]``, a step each.
        config: rates, loss, clipping (the norms are those before it).
        tick: ``tick(done, total, note)`` after each step.

    Returns:
        name -> ||dL/dw_hat||_F^2 of each step; the loss of each step.

    Raises:
        FloatingPointError: the loss is NaN or Inf, with the step.
    """
    names = list(projections(student))
    norms: dict[str, list[Tensor]] = {name: [] for name in names}
    device = next(student.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(student, config.lr, config.scale_lr), lr=config.lr)
    warmup = min(config.warmup_steps, len(batches))
    schedule = get_scheduler("cosine", optimizer, warmup, len(batches))
    losses: list[float] = []
    student.train()
    with watch(student, names, gradient=lambda name, g: norms[name].append(g.square().sum())):
        for step, tokens in enumerate(batches, 1):
            tokens = tokens.to(device)
            with torch.no_grad():
                expected = teacher(input_ids=tokens, use_cache=False).logits
            logits = student(input_ids=tokens, use_cache=False).logits
            loss, _ = kd_loss(logits, expected, tokens, config.loss)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"the loss is {losses[-1]} at step {step}; lower lr={config.lr} or scale_lr={config.scale_lr}"
                )
            loss.backward()
            if config.max_grad_norm:
                nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if tick is not None:
                tick(step, len(batches), f"loss {losses[-1]:.4f}")
    student.eval()
    return {name: torch.stack(found).tolist() for name, found in norms.items()}, losses


def _task(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    return kd_loss(student, teacher, tokens, TASK)[0]


@torch.no_grad()
def _losses(student: nn.Module, teacher: nn.Module, probe: Sequence[Tensor]) -> dict[str, float]:
    """KL to the teacher and cross entropy, nats a token, means over the probe."""
    device = next(student.parameters()).device
    total = {"kl": 0.0, "ce": 0.0}
    for tokens in probe:
        tokens = tokens.to(device)
        found, expected = (m(input_ids=tokens, use_cache=False).logits for m in (student, teacher))
        for name, value in kd_loss(found, expected, tokens)[1].items():
            total[name] += value.item() / len(probe)
    return total


# ------------------------------------------------------------------------------------------------ rows


def _held(file: Path, meta: dict[str, Any]) -> dict[str, Any]:
    if not file.is_file():
        return {"meta": meta, "rows": []}
    held = json.loads(file.read_text())
    free = ("versions", "freezes")  # more arms may join
    changed = [k for k in meta if k not in free and held["meta"].get(k) != meta[k]]
    if changed:
        what = ", ".join(f"{k} was {held['meta'].get(k)!r}, is {meta[k]!r}" for k in changed)
        raise ValueError(f"{file} holds rows of another analysis ({what}); give another folder")
    held["meta"]["freezes"] = meta["freezes"]
    return held


def _has(held: dict[str, Any], arm: str, seed: int) -> bool:
    return any(row["arm"] == arm and row["seed"] == seed for row in held["rows"])


def _rounded(value: Any) -> Any:
    """Floats to 6 significant digits: more would be noise that fills the file."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
