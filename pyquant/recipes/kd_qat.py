"""KD-QAT with ov-freeze: train a fake-quantized student against its full-precision self.

After "Oh! We Freeze: Improving Quantized Knowledge Distillation via Signal Propagation Analysis for Large Language
Models" (Bhardwaj et al., 2024, arXiv 2403.18159).

From the paper: a full-precision teacher and a student that is its quantized copy, trained on public text with a
weighted sum of KL divergence and cross-entropy; 4-bit weights, per channel, symmetric; and ov-freeze, the weights of
v_proj and o_proj fixed at their quantized values while everything else adapts.

Our reading, each a parameter:

* the weights and the temperature of the loss (:class:`KDLoss`): the paper's are not known to us. Qualcomm's public
  example (quic/aimet, ``llm_qat_kd``) uses 0.5 and 0.5 at temperature 1, but its "batchmean" KL is a sum over
  positions against a mean for CE, which makes it nearly pure KL. Ours takes the mean over tokens for both;
  ``KDLoss(kl=1, ce=0)`` is closest to it.
* the quantizer: learned scales (LSQ, Esser et al. 2019) with their own learning rate; ``ste`` keeps min-max ranges.
* the first range: ``rule`` of :func:`prepare`, min-max or clipped to the smallest squared error.
* when ov-freeze happens: before the first step (call :func:`freeze` after :func:`prepare`), which is how we read
  "fixed at their quantized values", or later; and for which layers.
* what else trains: every parameter that requires a gradient, embeddings and norms too.

All functions work on plain modules; the loop around them is the caller's (``pyquant.integrations.trainer`` has one).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import FakeQuantLinear, QLinear
from pyquant.nn.swap import SwapReport, matches, swap
from pyquant.quantizers.base import Quantizer
from pyquant.recipes.rtn import check_deployable


@dataclass(frozen=True)
class KDLoss:
    """Weights of the loss: ``kl * T^2 * KL(teacher_T || student_T) + ce * CE(student, labels)``.

    Both terms are means over the same tokens. ``softmax(logits / T)`` has gradients of order 1/T^2, so the KL is
    multiplied by T^2 (Hinton et al., 2015) and its weight keeps its meaning when T changes.

    Args:
        kl, ce: weights, not negative, not both 0.
        temperature: T > 0, for the KL only.

    Raises:
        ValueError: for values outside these ranges.
    """

    kl: float = 0.5
    ce: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kl < 0 or self.ce < 0 or self.kl + self.ce == 0:
            raise ValueError(f"loss weights kl={self.kl} and ce={self.ce} must not be negative, nor both 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, how: KDLoss | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch, in fp32.

    Args:
        student_logits, teacher_logits: ``[B, T, V]`` bf16, fp16 or fp32; no gradient flows to the teacher.
        labels: int64 ``[B, T]``, the input tokens, not shifted: position t is scored against ``labels[:, t + 1]``, and
            not at all where that is -100. KL and CE use the same positions.
        how: weights and temperature.

    Returns:
        the loss (scalar, fp32) and its parts ``{"kl", "ce"}``, detached, before weighting, the KL with its T^2.
        Without any label the loss is 0.

    Raises:
        ValueError: for shapes that do not fit.
    """
    how = how or KDLoss()
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must agree"
        )
    if student_logits.dim() != 3 or labels.shape != student_logits.shape[:2]:
        raise ValueError(
            f"logits {tuple(student_logits.shape)} must be [B, T, V] with labels {tuple(labels.shape)} [B, T]"
        )
    target = labels[:, 1:]
    mask = (target != -100).float()
    count = mask.sum().clamp_min(1)
    student = student_logits[:, :-1].float()
    teacher = teacher_logits[:, :-1].detach().float()
    log_p = torch.log_softmax(student, -1)
    ce = -(log_p.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1) * mask).sum() / count
    log_s = log_p if how.temperature == 1 else torch.log_softmax(student / how.temperature, -1)
    log_t = torch.log_softmax(teacher / how.temperature, -1)
    kl = ((log_t.exp() * (log_t - log_s)).sum(-1) * mask).sum() / count * how.temperature**2
    return how.kl * kl + how.ce * ce, {"kl": kl.detach(), "ce": ce.detach()}


def prepare(
    model: nn.Module,
    spec: QuantSpec | None = None,
    quantizer: str = "lsq",
    rule: str = "mse",
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = ("lm_head",),
    skip_experts: bool = False,
) -> SwapReport:
    """Replace the linear layers of a model by :class:`~pyquant.nn.FakeQuantLinear`, in place; weights stay the same
    tensors.

    Args:
        model: any module with ``nn.Linear`` layers.
        spec: bits (2..4), group size, symmetry.
        quantizer: name in :data:`pyquant.quantizers.QUANTIZERS`: ``lsq`` (learned scales) or ``ste`` (min-max at every
            step).
        rule: how the first range is found, ``minmax`` or ``mse``.
        include, exclude: shell-style patterns on dotted names or their tails.
        skip_experts: leave fused mixture-of-experts weights as they are instead of refusing them.

    Raises:
        ValueError: as :func:`pyquant.recipes.rtn.rtn`, and for an unknown quantizer.
    """
    spec = spec or QuantSpec()
    check_deployable(spec)

    def replace(name: str, linear: nn.Linear) -> nn.Module:
        return FakeQuantLinear.from_linear(linear, spec, quantizer, rule)

    return swap(model, spec, replace, include, exclude, skip_experts)


def freeze(
    model: nn.Module, patterns: Iterable[str] = ("v_proj", "o_proj"), scale_dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """ov-freeze: snap the matching layers to their quantized values and stop training them.

    Args:
        model: a model after :func:`prepare`.
        patterns: shell-style patterns on dotted names or their tails.
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
    groups: list[dict[str, object]] = [
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
    exactly the values that a bf16 file will hold: what is evaluated is what is loaded.

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
    for name, layer in layers:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, QLinear.from_fake_quant(layer, scale_dtype))
        report.changed.append(name)
        report.quantized += layer.weight.numel()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(scale_dtype))
    report.kept = {name: "not prepared" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return report
