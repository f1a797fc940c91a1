"""KD-QAT with ov-freeze: train a fake-quantized student against its full-precision self.

After "Oh! We Freeze: Improving Quantized Knowledge Distillation via Signal Propagation Analysis for Large Language
Models" (Bhardwaj et al., 2024, arXiv 2403.18159).

From the paper: a full-precision teacher and a student that is its quantized copy, trained on public text with a
weighted sum of KL divergence and cross-entropy; 4-bit weights, per channel, symmetric; and ov-freeze, the weights of
v_proj and o_proj fixed at their quantized values while everything else adapts.

Our reading, each a parameter:

* the weights and the temperature of the loss (:class:`~pyquant.recipes.kd_loss.KDLoss`): the paper's are not known to
  us. Qualcomm's public example (quic/aimet, ``llm_qat_kd``) uses 0.5 and 0.5 at temperature 1, but its "batchmean" KL
  is a sum over positions against a mean for CE, which makes it nearly pure KL. Ours takes the mean over tokens for
  both; ``KDLoss(kl=1, ce=0)`` is closest to it. The default, 2 and 0.5, was the best of what we measured at 3 and 4 bits.
* the quantizer: learned scales (LSQ, Esser et al. 2019) with their own learning rate; ``range`` learns the ends of the
  range as that example does, ``ste`` keeps min-max ranges.
* the first range: ``rule`` of :func:`prepare`, min-max or clipped to the smallest squared error.
* when ov-freeze happens: before the first step (call :func:`freeze` after :func:`prepare`), which is how we read
  "fixed at their quantized values", or later; and for which layers.
* what else trains: every parameter that requires a gradient, embeddings and norms too, unless
  :func:`~pyquant.recipes.vocabulary.prepare_vocabulary` says otherwise.
* activations: the paper's are 16-bit integers, for which 16-bit floats stand in here (as in that example); 8 bits is an
  option of ours, a scale for each token.

All functions work on plain modules; the loop around them is the caller's: ``pyquant.integrations.trainer`` has one that
resumes bit by bit, :mod:`pyquant.recipes.qat_loop` a fast one for experiments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import FakeQuantLinear, QLinear
from pyquant.nn.swap import SwapReport, matches, swap
from pyquant.quantizers import QUANTIZERS, Quantizer
from pyquant.recipes.kd_loss import KDLoss, kd_loss
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.rtn import check_deployable
from pyquant.recipes.vocabulary import bake_vocabulary, prepare_vocabulary, quantize_inputs

__all__ = ["KDLoss", "cast_weights", "convert", "freeze", "kd_loss", "parameter_groups", "prepare", "set_up"]


def prepare(
    model: nn.Module,
    spec: QuantSpec | None = None,
    quantizer: str = "lsq",
    rule: str = "mse",
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = ("lm_head",),
    skip_experts: bool = False,
    options: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> SwapReport:
    """Replace the linear layers of a model by :class:`~pyquant.nn.FakeQuantLinear`, in place; weights stay the same
    tensors.

    Args:
        model: any module with ``nn.Linear`` layers.
        spec: bits (2..4), group size, symmetry.
        quantizer: name in :data:`pyquant.quantizers.QUANTIZERS`: ``lsq`` (learned scales), ``range`` (learned ends of
            the range), ``soft`` (learned scales, continuous rounding and clamping) or ``ste`` (min-max at every step).
        rule: how the first range is found, ``minmax`` or ``mse``.
        include, exclude: shell-style patterns on dotted names or their tails.
        skip_experts: leave fused mixture-of-experts weights as they are instead of refusing them.
        options: what the quantizer takes beyond weight, spec and rule (``soft``: rounding, clamp, beta, soft_forward).
        device: where the first ranges are searched; None is where the weights are.

    Raises:
        ValueError: as :func:`pyquant.recipes.rtn.rtn`, and for an unknown quantizer.
    """
    spec = spec or QuantSpec()
    check_deployable(spec)
    if quantizer not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {quantizer!r}; known: {', '.join(QUANTIZERS)}")

    def replace(name: str, linear: nn.Linear) -> nn.Module:
        with torch.no_grad():
            made = QUANTIZERS[quantizer](linear.weight.to(device), spec, rule, **(options or {}))
        return FakeQuantLinear(linear, made.to(linear.weight.device))

    return swap(model, spec, replace, include, exclude, skip_experts)


def cast_weights(model: nn.Module, config: KDConfig) -> None:
    """Put the parameters of a model into the dtype that it trains in. Buffers stay as they are: rotary frequencies in
    bf16 are other positions, and no file holds them."""
    dtype = torch.bfloat16 if config.weights == "bf16" else torch.float32
    for p in model.parameters():
        p.data = p.data.to(dtype)


def set_up(student: nn.Module, config: KDConfig, spec: QuantSpec, device: torch.device | None = None) -> SwapReport:
    """Everything that happens to a student before its first step, in place: its dtype, its quantizers, embeddings and
    head, the inputs of its layers, and ov-freeze where that comes first. ``device`` as in :func:`prepare`.

    Raises:
        ValueError: as :func:`prepare`, :func:`freeze` and :func:`~pyquant.recipes.vocabulary.prepare_vocabulary`.
    """
    cast_weights(student, config)
    options = None if config.soft is None else config.soft.options()
    chosen = config.include, config.exclude, config.skip_experts
    report = prepare(student, spec, config.quantizer, config.rule, *chosen, options, device)
    prepare_vocabulary(student, config.embedding_bits, config.head_bits, config.train_embeddings, config.train_head)
    if config.activation_bits != 16:
        quantize_inputs(student, config.activation_bits)
    if config.freeze and config.freeze_at == 0:
        freeze(student, config.freeze)  # before the optimizer is made: frozen layers are not part of it
    return report


def freeze(
    model: nn.Module, patterns: Iterable[str] = ("v_proj", "o_proj"), scale_dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """ov-freeze: snap the matching layers to their quantized values and stop training them.

    Args:
        model: a model after :func:`prepare`.
        patterns: shell-style patterns on dotted names or their tails; ``3.v_proj`` is the v_proj of block 3.
        scale_dtype: the dtype that :func:`convert` will store, so that the frozen values are the deployed ones.

    Returns:
        the names of the frozen layers.

    Raises:
        ValueError: when a pattern matches no layer.
    """
    patterns = list(patterns)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, FakeQuantLinear)]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name, _ in layers):
            raise ValueError(f"freeze={pattern!r} matches none of the {len(layers)} quantized layers")
    chosen = [(name, layer) for name, layer in layers if matches(name, patterns)]
    for _, layer in chosen:
        layer.freeze(scale_dtype)
    return [name for name, _ in chosen]


def parameter_groups(
    model: nn.Module, lr: float, scale_lr: float, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Optimizer groups: matrices, then vectors (norms, biases) without decay, then scales and zeros with their own
    rate.

    Args:
        model: a model after :func:`prepare`; parameters that do not require a gradient are left out.
        lr, scale_lr: learning rates of weights, and of the quantizers' scales and zeros.
        weight_decay: for the matrices only.

    Returns:
        groups ``{"params", "lr", "weight_decay", "name"}``, empty ones left out.

    Raises:
        ValueError: when nothing is left to train.
    """
    ranges = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": lr, "weight_decay": weight_decay, "name": "weights"},
        {"params": [], "lr": lr, "weight_decay": 0.0, "name": "vectors"},
        {"params": [], "lr": scale_lr, "weight_decay": 0.0, "name": "scales"},
    ]
    for p in model.parameters():
        if p.requires_grad:
            which = 2 if id(p) in ranges else 0 if p.dim() >= 2 else 1
            groups[which]["params"].append(p)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("nothing to train: no parameter of the model requires a gradient")
    return groups


def convert(model: nn.Module, scale_dtype: torch.dtype = torch.bfloat16) -> SwapReport:
    """Deploy: :class:`~pyquant.nn.FakeQuantLinear` to :class:`~pyquant.nn.QLinear`, in place.

    Everything that will be stored is rounded to ``scale_dtype`` now: the scales before the codes are chosen, and the
    other trained parameters (embeddings, norms, biases, excluded layers). Dtypes stay, so an fp32 model computes with
    exactly the values that a bf16 file will hold: what is evaluated is what is loaded. Embeddings and heads of 8 bits
    become plain layers with the rounded values; the rounding of activations ends here.

    Raises:
        ValueError: when there is no FakeQuantLinear, or a weight went NaN or Inf.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, FakeQuantLinear)]
    if not layers:
        raise ValueError("nothing to convert: the model has no FakeQuantLinear (prepare it first)")
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise ValueError(f"{name} has NaN or Inf values after training; nothing was converted")
    ranges = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    report = SwapReport(total=sum(p.numel() for p in model.parameters() if id(p) not in ranges))
    baked = bake_vocabulary(model, scale_dtype)
    for name, layer in layers:
        if name in baked:
            continue
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, QLinear.from_fake_quant(layer, scale_dtype))
        report.changed.append(name)
        report.quantized += layer.weight.numel()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(scale_dtype))
    report.kept = {name: "not prepared" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return report
