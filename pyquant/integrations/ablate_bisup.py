"""Arms of weight-activation quantization for the grid of :mod:`pyquant.integrations.ablate`.

An arm is settings of :class:`~pyquant.recipes.bisup.BiSup` and of what is measured: ``kv_bits`` of the K and V of tokens
behind the prompt (None: those of the inputs) and ``storage`` of the prompt (:mod:`pyquant.integrations.prompt`). Every arm
is measured twice on each text: plainly, K and V in 16 bits (``books``), and behind the same prompt with low-bit K and V
(``books, prompt``). Arms that differ only in ``storage`` are quantized once.
"""

from __future__ import annotations

from dataclasses import fields as fields_of
from typing import Any

from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.ablate import Job, _now, calibration_windows, parse_arm
from pyquant.integrations.evaluate import perplexity
from pyquant.integrations.machine import batch_for
from pyquant.integrations.prompt import STORAGES, prompt_cache, prompted_perplexity
from pyquant.recipes.bisup import HOSTS, PARTS, BiSup, Quantized, bisup

BISUP_ARMS: dict[str, dict[str, Any]] = {}  # those of one quantized model beside each other
for _host in HOSTS:
    _bare, _all = {"host": _host, "parts": []}, {"host": _host, "parts": list(PARTS)}
    BISUP_ARMS |= {
        _host: _bare | {"storage": "none"},
        f"{_host}+horizontal": _bare | {"storage": "both"},
        f"{_host}+vertical": _all | {"storage": "none"},
        f"{_host}+both": _all | {"storage": "both"},
        f"{_host}+both-computed": _all | {"storage": "computed"},
        f"{_host}+both-stored": _all | {"storage": "stored"},
        f"{_host}-mse": {
            "host": _host,
            "parts": ["clip"],
            "steps": 0,
            "storage": "none",
        },  # searched ranges, no training
        **{f"{_host}+{part}": {"host": _host, "parts": [part], "storage": "none"} for part in PARTS},
    }
MAIN = tuple(f"{host}{what}" for host in HOSTS for what in ("", "+horizontal", "+vertical", "+both"))
MEASURED = ("kv_bits", "storage")  # settings of an arm that are no part of the quantized model
KNOWN = [f.name for f in fields_of(BiSup) if f.name != "seed"] + list(MEASURED)


def bisup_of(fields: dict[str, Any], seed: int = 0) -> BiSup:
    """The recipe of an arm.

    Raises:
        ValueError: an unknown key, or a value that cannot be.
    """
    for key in fields:
        if key not in KNOWN:
            raise ValueError(f"{key!r} is no setting; known: {', '.join(KNOWN)}")
    if (storage := fields.get("storage", "none")) not in STORAGES:
        raise ValueError(f"storage={storage!r} must be one of {', '.join(STORAGES)}")
    return BiSup(**{k: v for k, v in fields.items() if k not in MEASURED}, seed=seed)


def resolve_bisup(arms: list[str], common: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Arms by name or definition to their settings, ``common`` ones beneath what each says itself.

    Raises:
        ValueError: as :func:`pyquant.integrations.ablate.parse_arm`.
    """
    found = dict(parse_arm(arm, BISUP_ARMS, KNOWN, bisup_of) for arm in arms)
    found = {name: {**(common or {}), **fields} for name, fields in found.items()}
    for fields in found.values():
        bisup_of(fields)
    return found


def by_model(todo: list[Job], arms: dict[str, dict[str, Any]]) -> list[list[Job]]:
    """Jobs grouped by what is quantized, which is the same for arms that differ in what is measured only."""
    groups: dict[Any, list[Job]] = {}
    for job in todo:
        groups.setdefault((bisup_of(arms[job.arm]), job.spec, job.seed), []).append(job)
    return list(groups.values())


def is_seedless(fields: dict[str, Any]) -> bool:
    """Whether no random choice and no calibration text enters: bare ``rtn``."""
    return fields["host"] == "rtn" and not fields["parts"]


class BiSupBench:
    """A model with its texts and the prompt.

    Args:
        model: a causal LM in fp32, in eval mode, on its device.
        calibration: all windows that seeds draw from, int64 ``[n, S]``.
        count: windows a seed.
        texts: name -> windows to measure ``[n, T]``; behind the prompt the first ``T - P`` tokens of each are.
        prompt: int64 ``[P]``.
        batch: windows a step.

    Raises:
        ValueError: a prompt that leaves nothing of a window.
    """

    def __init__(
        self, model: nn.Module, calibration: Tensor, count: int, texts: dict[str, Tensor], prompt: Tensor, batch: int
    ) -> None:
        for name, rows in texts.items():
            if len(prompt) > rows.shape[1] - 2:
                raise ValueError(
                    f"the prompt of {len(prompt)} tokens leaves nothing of windows of {rows.shape[1]} ({name})"
                )
        self.model, self.calibration, self.count, self.texts = model, calibration, count, texts
        self.prompt, self.batch = prompt, batch
        self.kept: tuple[Any, Quantized] | None = None
        self.plain: tuple[Any, dict[str, float]] | None = None

    def measure(self, model: nn.Module | None = None) -> dict[str, float]:
        """Perplexity on each text, plainly; of full precision (no model given) behind the prompt too."""
        found = {name: perplexity(model or self.model, rows, batch_for(rows)) for name, rows in self.texts.items()}
        return found if model is not None else found | self._prompted(self.model, 16, "both", 128, False)

    def _prompted(self, model: nn.Module, bits: int, storage: str, group: int, rotated: bool) -> dict[str, float]:
        pairs = prompt_cache(model, self.model, self.prompt, bits, storage, group, rotated)
        return {
            f"{name}, prompt": prompted_perplexity(
                model, rows[:, : rows.shape[1] - len(self.prompt)], pairs, bits, group, rotated, batch_for(rows)
            )
            for name, rows in self.texts.items()
        }

    def run(self, fields: dict[str, Any], spec: QuantSpec, seed: int) -> dict[str, Any]:
        """One arm: quantize a copy of the model and measure it.

        Returns:
            ``{"perplexity": {text: value}, "seconds", "eval_seconds", "windows": rows, "notes"}``.
        """
        how = bisup_of({"batch_size": self.batch, **fields}, seed)
        key = (spec, how)
        if self.kept is None or self.kept[0] != key:
            self.kept = None  # one quantized model at a time
            tokens = calibration_windows(self.calibration, self.count, seed)
            self.kept = (key, bisup(self.model, tokens, spec, how))
        made = self.kept[1]
        ready = _now(self.model)
        if self.plain is None or self.plain[0] != key:
            self.plain = (key, self.measure(made.model))
        bits = fields.get("kv_bits") or how.act_bits
        storage, rotated = fields.get("storage", "none"), how.host == "quarot"
        group = spec.group_size if how.act_group is None else how.act_group
        found = self.plain[1] | self._prompted(made.model, bits, storage, group, rotated)
        return {
            "perplexity": found,
            "seconds": sum(row["seconds"] for row in made.rows),
            "eval_seconds": _now(self.model) - ready,
            "windows": made.rows,
            "notes": made.notes,
        }
