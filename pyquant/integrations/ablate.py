"""A grid of arms x formats x seeds of block-wise quantization on one model: every arm with the same calibration windows
in the same order, the same number of gradient steps of each block, and the same evaluation.

What arms have in common is computed once: the calibration tokens of a seed, the full-precision hidden states, the windows
that are measured. A finished row is written to the file at once; a run that finds rows there goes on after them.
"""

from __future__ import annotations

import copy
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.evaluate import perplexity
from pyquant.integrations.files import write_atomic
from pyquant.integrations.machine import batch_for
from pyquant.recipes.blocks import block_arguments, find_blocks
from pyquant.recipes.blockwise import blockwise, insert
from pyquant.recipes.settings import Settings
from pyquant.recipes.streams import FullPrecision, InMemory, embedded, precision

ARMS: dict[str, dict[str, Any]] = {
    "rtn": {"steps": 0, "start": "minmax"},
    "mse": {"steps": 0},
    "gptq": {"steps": 0, "start": "gptq"},
    "awq": {"steps": 0, "start": "awq"},
    "single": {},
    "joint2": {"window": 2},
    "joint2-overlap": {"window": 2, "stride": 1},
    "joint3": {"window": 3},
    "joint3-overlap": {"window": 3, "stride": 1},
    "ahead1": {"lookahead": 1},
    "ahead2": {"lookahead": 2},
    "ahead-end": {"lookahead": "end"},
    "best": {"start": "gptq", "target": "both", "scale_lr": 0.3, "polish": 400, "polish_lr": 0.0025},
}
UNCOMPARED = ("commit", "full_precision")  # of meta: may differ between the runs that fill a file
SEEDLESS = ("rtn", "mse")  # no data in them: one seed says all


@dataclass(frozen=True)
class Job:
    """One row to be: an arm by name, its format, its seed."""

    arm: str
    spec: QuantSpec
    seed: int

    def key(self) -> str:
        """What names the row in the file."""
        return f"{self.arm} | {self.spec} | seed {self.seed}"


def parse_arm(
    text: str,
    arms: dict[str, dict[str, Any]] | None = None,
    known: Iterable[str] = tuple(Settings.__dataclass_fields__),
    check: Callable[[dict[str, Any]], Any] = lambda fields: Settings(**fields),
) -> tuple[str, dict[str, Any]]:
    """``NAME`` of the known arms, or ``NAME=BASE,key:value,..``: a new arm that changes settings of a known one.

    Args:
        text: the arm.
        arms: name -> settings; those of block-wise quantization by default, and so the settings that are known and the check
            that raises for values which cannot be.

    Raises:
        ValueError: an unknown name, key or value.
    """
    arms, known = ARMS if arms is None else arms, list(known)
    name, _, changes = text.partition("=")
    if not changes:
        if name not in arms:
            raise ValueError(f"arm {name!r} is unknown; known: {', '.join(arms)} (or NAME=BASE,key:value,..)")
        return name, arms[name]
    base, *pairs = re.split(r",(?![^\[]*\])", changes)  # a list keeps its commas
    if base not in arms:
        raise ValueError(f"arm {text!r} builds on {base!r}, which is unknown; known: {', '.join(arms)}")
    fields = dict(arms[base])
    for pair in pairs:
        key, _, value = pair.partition(":")
        if key not in known:
            raise ValueError(f"arm {text!r}: {key!r} is no setting; known: {', '.join(known)}")
        try:
            fields[key] = json.loads(value)
        except json.JSONDecodeError:
            fields[key] = value  # a word
    check(fields)
    return name, fields


def jobs(arms: Iterable[str], specs: Iterable[QuantSpec], seeds: int, seedless: Iterable[str] = SEEDLESS) -> list[Job]:
    """Every combination, one seed of everything first; of the arms without randomness there is only that one."""
    specs, arms, seedless = list(specs), list(arms), set(seedless)
    return [
        Job(arm, spec, seed)
        for seed in range(seeds)
        for spec in specs
        for arm in arms
        if seed == 0 or arm not in seedless
    ]


def calibration_windows(windows: Tensor, count: int, seed: int) -> Tensor:
    """``count`` of the windows ``[n, S]``, drawn without repetition by the seed.

    Raises:
        ValueError: fewer windows than asked for.
    """
    if count > len(windows):
        raise ValueError(
            f"the calibration text has {len(windows)} windows of {windows.shape[1]}, {count} were asked for"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


class Bench:
    """A model with its texts, and what the arms of one seed share.

    Args:
        model: a causal LM in eval mode on its device.
        calibration: all windows that seeds draw from, int64 ``[n, S]``.
        count: windows a seed.
        texts: name -> windows to measure.
        batch: windows at once, in training and elsewhere; of every arm.
        share: keep the full-precision hidden states at all blocks (``(L + 1) n S H`` values) for the next arm.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Tensor,
        count: int,
        texts: dict[str, Tensor],
        batch: int,
        share: bool = True,
    ) -> None:
        self.model, self.calibration, self.count, self.texts = model, calibration, count, texts
        self.batch, self.share = batch, share
        self.seed: int | None = None
        self.tokens: Tensor | None = None
        self.stream: FullPrecision | None = None

    def measure(self, model: nn.Module | None = None) -> dict[str, float]:
        """Perplexity on each text."""
        model = model or self.model
        return {name: perplexity(model, rows, batch_for(rows)) for name, rows in self.texts.items()}

    def run(self, fields: dict[str, Any], spec: QuantSpec, seed: int) -> dict[str, Any]:
        """One arm: quantize a copy of the model and measure it.

        Returns:
            ``{"perplexity": {text: value}, "seconds", "eval_seconds", "windows": rows, "notes"}``.
        """
        settings = Settings(**{"batch_size": self.batch, **fields, "seed": seed})
        if settings.batch_size != self.batch:
            raise ValueError(f"batch_size={settings.batch_size}: all arms share batches of {self.batch}")
        tokens, stream = self._shared(seed, settings.autocast)
        began = _now(self.model)
        result = blockwise(self.model, tokens, spec, settings, scale_dtype=torch.bfloat16, stream=stream)
        ready = _now(self.model)
        model = copy.deepcopy(self.model)
        _, blocks = find_blocks(model)
        for b, block in result.blocks.items():
            insert(blocks[b], block)
        found = self.measure(model)
        return {
            "perplexity": found,
            "seconds": ready - began,
            "eval_seconds": _now(self.model) - ready,
            "windows": [{k: v for k, v in row.items() if k != "failed" or v} for row in result.rows],
            "notes": result.notes,
        }

    def _shared(self, seed: int, autocast: bool) -> tuple[Tensor, FullPrecision | None]:
        if self.seed != seed:
            self.seed, self.stream = seed, None
            self.tokens = calibration_windows(self.calibration, self.count, seed)
        assert self.tokens is not None
        if self.share and self.stream is None:
            device = next(self.model.parameters()).device
            context = precision(device, autocast)
            _, blocks = find_blocks(self.model)
            mine = self.tokens[: self.count - self.count % self.batch].to(device)
            with context():
                _, arguments = block_arguments(self.model, blocks, mine[: self.batch])
            self.stream = FullPrecision(InMemory(blocks), arguments, self.batch, context, keep_all=True)
            self.stream.begin(embedded(self.model, blocks, mine, self.batch, "device", None, context))
        return self.tokens, self.stream


class Runs(Protocol):
    """What :func:`run_jobs` needs of a bench."""

    def run(self, fields: dict[str, Any], spec: QuantSpec, seed: int) -> dict[str, Any]:
        """A row, see :meth:`Bench.run`."""
        ...


def run_jobs(
    bench: Runs,
    todo: Sequence[Job],
    arms: dict[str, dict[str, Any]],
    file: Path,
    meta: dict[str, Any],
    deadline: float = math.inf,
    say: Callable[[str], None] = print,
) -> bool:
    """Run jobs that the file has no row of, each row written when it is there.

    Args:
        bench: the model.
        todo: what to run, in order.
        arms: name -> settings.
        file: JSON, ``{"meta", "rows"}``.
        meta: what the rows have in common; rows under another meta are refused.
        deadline: ``time.monotonic()`` after which no job is begun.
        say: told a line for each row.

    Returns:
        whether all jobs are done.

    Raises:
        ValueError: the file is of another run, with what differs.
    """
    held = _read(file, meta)
    write_atomic(file, json.dumps(held, indent=1) + "\n")
    longest = 0.0
    for job in todo:
        entry: dict[str, Any] = {"key": job.key(), "settings": arms[job.arm]}
        if any(row["key"] == job.key() and row["settings"] == entry["settings"] for row in held["rows"]):
            continue
        if time.monotonic() + longest > deadline:
            say(f"out of time before {job.key()}")
            return False
        began = time.monotonic()
        row = bench.run(arms[job.arm], job.spec, job.seed)
        entry |= {"arm": job.arm, "spec": str(job.spec), "seed": job.seed, **row}
        held["rows"] = [r for r in held["rows"] if r["key"] != job.key()] + [entry]
        write_atomic(file, json.dumps(held, indent=1) + "\n")
        longest = max(longest, time.monotonic() - began)
        values = "  ".join(f"{name} {value:.3f}" for name, value in row["perplexity"].items())
        say(f"{job.key():48}  {values}  {row['seconds']:.1f} s + {row['eval_seconds']:.1f} s")
    return True


def _read(file: Path, meta: dict[str, Any]) -> dict[str, Any]:
    if not file.is_file():
        return {"meta": meta, "rows": []}
    held = json.loads(file.read_text())
    changed = [k for k in meta if k not in UNCOMPARED and held["meta"].get(k) != meta[k]]
    if changed:
        what = ", ".join(f"{k} was {held['meta'].get(k)!r}, is {meta[k]!r}" for k in changed)
        raise ValueError(f"{file} holds rows of another run ({what}); give another file")
    return held


def resolve(arms: Iterable[str], steps: int | None = None) -> dict[str, dict[str, Any]]:
    """Arms by name or definition to their settings; ``steps`` replaces the default number of steps where one trains."""
    found = dict(parse_arm(arm) for arm in arms)
    if steps is not None:
        for name, fields in found.items():
            if fields.get("steps") != 0:
                found[name] = {"steps": steps, **fields}
    for fields in found.values():
        replace(Settings(), **fields)
    return found


def _now(model: nn.Module) -> float:
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()
