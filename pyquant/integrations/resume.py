"""Checkpoints of a training run: complete or absent, safetensors and JSON only.

``work_dir/fingerprint.json`` says what the run is; ``work_dir/checkpoint-N/`` holds the state after N steps:

=============================  =====================================================================
model.safetensors              the student's state_dict, fp32
optimizer.safetensors          ``i.name``: state ``name`` of the optimizer's i-th parameter; ``i.name:int`` a Python
                               number; ``i.name.inner`` a part of a tensor of several (8-bit states)
rng.safetensors                generators of torch (CPU and every GPU)
state.json                     step, learning rates, frozen layers, history, Python's and NumPy's generators
trainer_state.json             what transformers' Trainer needs
manifest.json                  name and size of each of these, written last
=============================  =====================================================================

A checkpoint is written beside its place, flushed to disk and renamed. One without a manifest, or with a file of another
size, is not used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.files import flush, write_atomic
from pyquant.nn.linear import FakeQuantLinear

log = logging.getLogger("pyquant")

KEEP = 2  # checkpoints of a run that stay on disk
FREE = (
    "save_steps",
    "gradient_checkpointing",
    "shard_teacher",
    "keep_gathered",
)  # may change between start and resume: they do not change the result


def fingerprint(student: nn.Module, teacher: nn.Module, tokens: Tensor, config: Any, spec: QuantSpec) -> dict[str, Any]:
    """What makes a run: every setting that changes its result, and hashes of data and models."""
    return {
        **{key: value for key, value in asdict(config).items() if key not in FREE},
        **spec.to_dict(),
        "device": next(student.parameters()).device.type,
        "data": hashlib.sha256(tokens.contiguous().cpu().numpy().tobytes()).hexdigest()[:16],
        "student": _hash(student),
        "teacher": _hash(teacher),
    }


def _hash(model: nn.Module) -> str:
    """Names, shapes and up to 64 values of every tensor: cheap, and no two checkpoints agree in it."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        flat = p.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].double().cpu()
        digest.update(f"{name} {tuple(p.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def open_run(work_dir: Path, mine: dict[str, Any], resume: bool) -> Path | None:
    """Claim a folder for a run, or find where to continue.

    Returns:
        the last complete checkpoint, or None to start.

    Raises:
        FileExistsError: it holds checkpoints and ``resume`` is False.
        ValueError: it holds another run; the differing settings are named.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    file = work_dir / "fingerprint.json"
    last = latest(work_dir)
    mine = json.loads(json.dumps(mine))  # tuples become lists, as in the file
    if resume and file.is_file():
        try:
            theirs = json.loads(file.read_text())
        except json.JSONDecodeError:
            raise ValueError(f"{file} is damaged; delete {work_dir} to start again") from None
        changed = [key for key in sorted(mine | theirs) if mine.get(key) != theirs.get(key)]
        if changed and last is not None:
            what = ", ".join(f"{key} (was {theirs.get(key)!r}, now {mine.get(key)!r})" for key in changed)
            raise ValueError(f"{work_dir} holds a run with other inputs: {what}; give the same ones, or another folder")
    elif last is not None:
        raise FileExistsError(f"{work_dir} holds a run at step {step_of(last)}; resume it, or give another folder")
    write_atomic(file, json.dumps(mine, indent=2) + "\n")
    return last if resume else None


def step_of(checkpoint: Path) -> int:
    """N of ``checkpoint-N``."""
    return int(checkpoint.name.split("-")[1])


def latest(work_dir: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are passed over, with a warning."""
    found = [p for p in work_dir.glob("checkpoint-*") if p.name.split("-", 1)[1].isdigit()]
    for checkpoint in sorted(found, key=step_of, reverse=True):
        if why := _incomplete(checkpoint):
            log.warning("%s is not complete (%s); an earlier one is used", checkpoint, why)
        else:
            return checkpoint
    return None


def _incomplete(checkpoint: Path) -> str | None:
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, size in manifest.items():
            if (checkpoint / name).stat().st_size != size:
                return f"{name} has {(checkpoint / name).stat().st_size} bytes instead of {size}"
        read_state(checkpoint)
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        return str(error)
    return None


# ------------------------------------------------------------------------------------------------ writing


def save(
    work_dir: Path,
    trainer_state: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
) -> Path:
    """Write ``checkpoint-N`` and drop all but the last two.

    Raises:
        OSError: the disk is full; earlier checkpoints are whole.
    """
    step = trainer_state.global_step
    final = work_dir / f"checkpoint-{step}"
    partial = work_dir / f"checkpoint-{step}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_unique(model.state_dict()), partial / "model.safetensors")
        save_file(_optimizer_tensors(optimizer), partial / "optimizer.safetensors")
        save_file(_rng_tensors(), partial / "rng.safetensors")
        numpy_state: Any = np.random.get_state()
        state = {
            "step": step,
            "lr": [float(group["lr"]) for group in optimizer.param_groups],
            "frozen": [n for n, m in model.named_modules() if isinstance(m, FakeQuantLinear) and m.frozen],
            "history": history,
            "python": random.getstate(),
            "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        }
        (partial / "state.json").write_text(json.dumps(state))
        trainer_state.save_to_json(str(partial / "trainer_state.json"))
        publish(work_dir, partial, step)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error).lower():
            last = latest(work_dir)
            kept = f"; step {step_of(last)} is still there to resume from" if last else ""
            raise OSError(
                errno.ENOSPC, f"the disk of {work_dir} is full: step {step} could not be saved{kept}"
            ) from error
        raise
    return final


def publish(work_dir: Path, partial: Path, step: int) -> None:
    """Give a written folder its manifest and its name, flushed to disk, and drop all checkpoints but the last two."""
    final = work_dir / f"checkpoint-{step}"
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(partial)): file.stat().st_size for file in files}
    for file in files:
        flush(file)
    write_atomic(partial / "manifest.json", json.dumps(sizes))
    flush(partial)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    flush(work_dir)
    for old in work_dir.glob("checkpoint-*"):
        name = old.name.split("-", 1)[1]
        if not name.isdigit() or int(name) > step:
            shutil.rmtree(old, ignore_errors=True)
    for old in sorted(work_dir.glob("checkpoint-*"), key=step_of)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def _unique(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once, contiguous, as safetensors wants them."""
    first: dict[int, str] = {}
    for name, t in state.items():
        first.setdefault(t.data_ptr(), name)
    return {name: state[name].contiguous() for name in first.values()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for i, entry in optimizer.state_dict()["state"].items():
        for name, t in entry.items():
            if not isinstance(t, Tensor):
                found[f"{i}.{name}:int"] = torch.tensor(int(t))
            elif hasattr(t, "__tensor_flatten__"):
                found |= {f"{i}.{name}.{inner}": getattr(t, inner).contiguous() for inner in t.__tensor_flatten__()[0]}
            else:
                found[f"{i}.{name}"] = t.contiguous()
    return found


def _rng_tensors() -> dict[str, Tensor]:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda{i}": t for i, t in enumerate(gpus)}}


# ------------------------------------------------------------------------------------------------ reading


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json``."""
    return json.loads((checkpoint / "state.json").read_text())


def load_student(checkpoint: Path, model: nn.Module) -> list[dict[str, Any]]:
    """Put the saved weights into a prepared student, with the layers frozen that were; returns the history.

    Raises:
        ValueError: tensors that do not fit the model.
    """
    saved = read_state(checkpoint)
    for name in saved["frozen"]:
        model.get_submodule(name).freeze(snap=False)  # the file has the snapped weights
    state = load_file(checkpoint / "model.safetensors")
    result = model.load_state_dict(state, strict=False)
    own = model.state_dict()
    stored = {t.data_ptr() for name, t in own.items() if name in state}  # a tied tensor is stored once
    wrong = [name for name in result.missing_keys if own[name].data_ptr() not in stored] + result.unexpected_keys
    if wrong:
        raise ValueError(f"{checkpoint} does not fit the model: {wrong[0]}")
    return saved["history"]


def load_optimizer(checkpoint: Path, optimizer: Any) -> None:
    """Put the saved moments and learning rates into an optimizer over the same parameters."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper only steps when it is told to
    tensors = load_file(checkpoint / "optimizer.safetensors")
    state: dict[int, dict[str, Any]] = {}
    parts: list[tuple[int, str, str, Tensor]] = []
    for key, t in tensors.items():
        i, name, *inner = key.split(".")
        if inner:
            parts.append((int(i), name, inner[0], t))
        elif name.endswith(":int"):
            state.setdefault(int(i), {})[name.removesuffix(":int")] = int(t)
        else:
            state.setdefault(int(i), {})[name] = t
    if parts:
        _make_states(optimizer)
        current = optimizer.state_dict()["state"]
        for n, name, own, t in parts:
            getattr(current[n][name], own).copy_(t)
            state.setdefault(n, {})[name] = current[n][name]
    groups = optimizer.state_dict()["param_groups"]
    for group, lr in zip(groups, read_state(checkpoint)["lr"], strict=True):
        group["lr"] = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _make_states(optimizer: Any) -> None:
    """Let an optimizer make the state of every parameter: a step without gradient at a rate of 0 moves nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.0 * group["lr"]
    for p in params:
        p.grad = torch.zeros_like(p)
    getattr(optimizer, "step_masters", optimizer.step)()
    for p in params:
        p.grad = None
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def load_rng(checkpoint: Path) -> None:
    """Set every random generator to where it was."""
    tensors, state = load_file(checkpoint / "rng.safetensors"), read_state(checkpoint)
    torch.set_rng_state(tensors.pop("cpu"))
    if tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensors[f"cuda{i}"] for i in range(len(tensors))])
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
