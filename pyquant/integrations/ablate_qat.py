"""Arms of quantization-aware training for the grid of :mod:`pyquant.integrations.ablate`: every arm with the same windows
in the same order, the same number of steps, and the same evaluation of what would be stored.

An arm is a few settings by name: those of :class:`~pyquant.recipes.kd_settings.KDConfig`, of its loss as ``loss.kl``, of
soft rounding as ``soft.rounding``. ``quantizer: none`` trains the model without quantization, the control of what the
data alone do; ``steps: 0`` rounds to nearest.
"""

from __future__ import annotations

import copy
import math
import re
import time
from dataclasses import fields as fields_of
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.ablate import parse_arm
from pyquant.integrations.evaluate import perplexity
from pyquant.integrations.machine import batch_for
from pyquant.recipes.kd_loss import KDLoss
from pyquant.recipes.kd_qat import convert
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.qat_loop import Teaching, train
from pyquant.recipes.rtn import rtn
from pyquant.recipes.soft_qat import SoftQAT

_CE = {"loss.kl": 0.0, "loss.ce": 1.0}
_EVEN = {"loss.kl": 0.5, "loss.ce": 0.5}
_PURE = {"loss.kl": 1.0, "loss.ce": 0.0}
_OV = {"freeze": ["v_proj", "o_proj"]}
_SOFT = {"quantizer": "soft", "soft.rounding": "sigmoid-b", "soft.clamp": "sigmoid"}

QAT_ARMS: dict[str, dict[str, Any]] = {
    "rtn": {"steps": 0},
    "control": {"quantizer": "none", **_CE},
    "qat-ce": _CE,  # straight-through rounding, hard clamp: the first of the four cells
    "kd": _EVEN,
    "kd-4to1": {"loss.kl": 2.0, "loss.ce": 0.5},  # the recipe's default
    "kd-pure": _PURE,
    "kd-ov": {**_EVEN, **_OV},
    "kd-pure-ov": {**_PURE, **_OV},
    "soft-round": {**_SOFT, "soft.clamp": "hard", **_CE},
    "soft-clamp": {**_SOFT, "soft.rounding": "ste", **_CE},
    "soft-both": {**_SOFT, **_CE},
    "soft-kd": {**_SOFT, **_EVEN},
    "soft-kd-4to1": {**_SOFT, "loss.kl": 2.0, "loss.ce": 0.5},
    "soft-kd-pure": {**_SOFT, **_PURE},
    "soft-kd-ov": {**_SOFT, **_EVEN, **_OV},
    "ste-kd": {"quantizer": "ste", **_EVEN},
    "range-kd": {"quantizer": "range", **_EVEN},
}
QAT_SEEDLESS = ("rtn",)
UNQUANTIZED = "not quantized"  # what stands in the place of a format in rows of the control

KNOWN = [f.name for f in fields_of(KDConfig) if f.name not in ("loss", "soft", "seed")]
KNOWN += [f"loss.{f.name}" for f in fields_of(KDLoss)] + [f"soft.{f.name}" for f in fields_of(SoftQAT)]


def config_of(fields: dict[str, Any], seed: int = 0) -> KDConfig:
    """The settings of an arm.

    Raises:
        ValueError: an unknown key, or a value that cannot be.
    """
    for key in fields:
        if key not in KNOWN:
            raise ValueError(f"{key!r} is no setting; known: {', '.join(KNOWN)}")
    parts: dict[str, dict[str, Any]] = {"": {}, "loss": {}, "soft": {}}
    for key, value in fields.items():
        section, _, name = key.rpartition(".")
        parts[section][name] = tuple(value) if isinstance(value, list) else value
    own = parts[""]
    own["steps"] = max(1, own.get("steps", 1))
    if own.get("quantizer") == "none":
        own["quantizer"] = "lsq"
    soft = SoftQAT(**parts["soft"]) if own.get("quantizer") == "soft" or parts["soft"] else None
    return KDConfig(**own, loss=KDLoss(**parts["loss"]), soft=soft, seed=seed)


def teaching_of(fields: dict[str, Any]) -> str:
    """What an arm learns from: ``control`` (labels, without quantization), ``ce`` (labels), ``kl`` (the teacher alone), or
    ``kl+ce``. Learning rates are chosen for each, since labels of little text are learned by heart at rates that a
    teacher's distributions still gain from."""
    if fields.get("quantizer") == "none":
        return "control"
    loss = config_of({k: v for k, v in fields.items() if k.startswith("loss.")}).loss
    return "ce" if not loss.needs_teacher else "kl+ce" if loss.ce else "kl"


def resolve_qat(arms: list[str], common: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Arms by name or definition to their settings, ``common`` ones beneath what each says itself.

    Raises:
        ValueError: as :func:`pyquant.integrations.ablate.parse_arm`.
    """
    found = dict(parse_arm(arm, QAT_ARMS, KNOWN, config_of) for arm in arms)
    return {
        name: fields if fields.get("steps") == 0 else {**(common or {}), **fields} for name, fields in found.items()
    }


def grid(arms: list[str], axes: list[str]) -> list[str]:
    """Definitions of every arm at every point of a grid: axes ``key=value,value,..`` over ``NAME`` or ``NAME=BASE,..``.

    Raises:
        ValueError: an axis without values.
    """
    points: list[list[str]] = [[]]
    for axis in axes:
        key, _, values = axis.partition("=")
        if not key or not values:
            raise ValueError(f"grid {axis!r}: write key=value,value,.. as in loss.kl=0,0.5,1")
        points = [[*point, f"{key}:{v}"] for point in points for v in re.split(r",(?![^\[]*\])", values)]
    if not axes:
        return arms
    found = []
    for arm in arms:
        name, _, changes = arm.partition("=")
        if name in QAT_SEEDLESS:  # trains nothing that a grid could change
            found.append(arm)
            continue
        found += [f"{' '.join([name, *point])}={','.join([changes or name, *point])}" for point in points]
    return found


class QATBench:
    """A model with its texts.

    Args:
        model: a causal LM in fp32, in eval mode, on its device: the teacher, and where each student starts.
        tokens: all training windows, int64 ``[n, T]``.
        texts: name -> windows to measure.
        rates: format -> :func:`teaching_of` -> settings beneath those of an arm (learning rates).
        scale_dtype: what scales and all unquantized values are rounded to before measuring.
        share: keep the teacher's hidden states of all windows.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        texts: dict[str, Tensor],
        rates: dict[str, dict[str, dict[str, Any]]] | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
        share: bool = True,
    ) -> None:
        self.model, self.texts, self.rates, self.scale_dtype = model, texts, rates or {}, scale_dtype
        unmasked_attention(model)
        device = next(model.parameters()).device
        self.tokens = tokens.to(device)
        self.teaching = Teaching(model, self.tokens, autocast=device.type == "cuda") if share else None

    def measure(self, model: nn.Module | None = None) -> dict[str, float]:
        """Perplexity on each text, in the dtype of the model."""
        model = model or self.model
        return {name: perplexity(model, rows, batch_for(rows)) for name, rows in self.texts.items()}

    def settings(self, fields: dict[str, Any], spec: QuantSpec, seed: int) -> KDConfig:
        """The complete settings of a run."""
        rates = self.rates.get(str(spec), {}).get(teaching_of(fields), {})
        return config_of({"seq_len": self.tokens.shape[1], **rates, **fields}, seed)

    def run(self, fields: dict[str, Any], spec: QuantSpec, seed: int) -> dict[str, Any]:
        """One arm: train a copy of the model, convert it, and measure what would be stored.

        Returns:
            ``{"perplexity": {text: value}, "seconds", "eval_seconds", "ms_per_step", "lr", "scale_lr", "losses", "notes"}``;
            ``losses`` are means over twenty stretches of the run, of the loss and its parts. A run that diverged has
            infinite perplexities and says so in its notes.
        """
        config = self.settings(fields, spec, seed)
        began = time.monotonic()
        student = copy.deepcopy(self.model)
        row: dict[str, Any] = {"notes": []}
        if fields.get("steps") == 0:
            rtn(student, spec, config.rule, config.include, config.exclude, scale_dtype=self.scale_dtype)
            round_all(student, self.scale_dtype)
        else:
            control = fields.get("quantizer") == "none"
            try:
                run = train(student, self.model, self.tokens, config, None if control else spec, self.teaching)
            except FloatingPointError as error:  # a result like any other: these settings diverge
                row |= {"perplexity": dict.fromkeys(self.texts, math.inf), "notes": [str(error)]}
                return row | {"seconds": time.monotonic() - began, "eval_seconds": 0.0}
            stretches = run.losses.tensor_split(min(20, config.steps))
            row |= {
                "ms_per_step": 1000 * run.seconds / config.steps, "lr": config.lr, "scale_lr": config.scale_lr,
                "losses": {
                    name: [round(float(s[:, i].mean()), 5) for s in stretches] for i, name in enumerate(["loss", *run.names])
                },
            }  # fmt: skip
            if control:
                round_all(student, self.scale_dtype)
                row["spec"] = UNQUANTIZED
            else:
                convert(student, self.scale_dtype)
        ready = time.monotonic()
        student.float().eval()
        row["perplexity"] = self.measure(student)
        return row | {"seconds": ready - began, "eval_seconds": time.monotonic() - ready}


def unmasked_attention(model: nn.Module) -> None:
    """Let a model whose windows are full, without padding, attend causally without a mask.

    Under stream capture transformers does not look into tensors, so it builds masks for sequences that might be packed, and
    with a mask the fast attention kernels are out. An attention function without a mask function gets none.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register("unmasked_sdpa", sdpa_attention_forward)
    model.set_attn_implementation("unmasked_sdpa")  # type: ignore[operator]


@torch.no_grad()
def round_all(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to the values that a file of ``dtype`` holds, in place; dtypes stay."""
    for p in model.parameters():
        p.copy_(p.to(dtype))
