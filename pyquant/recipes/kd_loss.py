"""The loss of quantization-aware training: divergences from a teacher, cross entropy, and distances of hidden states.

The divergences over the vocabulary are those of distillation in general: KL(teacher || student) (Hinton et al., 2015,
arXiv 1503.02531), its reverse, and the generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2023, arXiv
2306.13649). "Oh! We Freeze" (arXiv 2403.18159) mixes the first with cross entropy; the rest are options of ours.

:class:`Distillation` computes the loss of a batch from two causal LMs. Where a head is a plain linear layer the logits
never exist as a whole: the hidden states go into the op ``distill_loss`` together with the head's weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.nn.linear import FakeQuantLinear
from pyquant.ops import distill_loss
from pyquant.recipes.blocks import find_blocks


@dataclass(frozen=True)
class KDLoss:
    """Weights of the loss of a batch, a mean over its tokens: with p the teacher's and q the student's distribution
    over the vocabulary at temperature T,

        T^2 * (kl * KL(p || q) + reverse_kl * KL(q || p) + jsd * JSD(p, q)) + ce * CE(student, labels) + features * D

    ``JSD = b KL(p || m) + (1 - b) KL(q || m)``, ``m = b p + (1 - b) q``, b = ``jsd_beta``. The gradients of
    ``softmax(logits / T)`` are of order 1/T^2; the factor T^2 keeps the weights' meaning when T changes. CE is taken at
    temperature 1. D is :func:`feature_loss`.

    Args:
        kl, ce, reverse_kl, jsd, features: weights, not negative, not all 0.
        temperature: T > 0.
        jsd_beta: between 0 and 1, both excluded.
        feature_layers: blocks whose outputs D compares, counted from 0 (negative ones from the end); none means all.

    Raises:
        ValueError: for values outside these ranges.
    """

    kl: float = 2.0
    ce: float = 0.5
    temperature: float = 1.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    jsd_beta: float = 0.5
    features: float = 0.0
    feature_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("kl", "ce", "reverse_kl", "jsd", "features")}
        if any(not w >= 0 for w in weights.values()) or not any(weights.values()):
            shown = ", ".join(f"{name}={w}" for name, w in weights.items())
            raise ValueError(f"loss weights {shown} must not be negative, nor all 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(f"jsd_beta={self.jsd_beta} must lie between 0 and 1")

    @property
    def needs_teacher(self) -> bool:
        """False for cross entropy alone."""
        return self.kl + self.reverse_kl + self.jsd + self.features > 0


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, how: KDLoss | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch from its logits (all but the features), in fp32, or fp64 for fp64 logits.

    Args:
        student_logits, teacher_logits: ``[B, T, V]`` float; no gradient flows to the teacher, which is not needed for
            cross entropy alone.
        labels: int64 ``[B, T]``, the input tokens, not shifted: position t is scored against ``labels[:, t + 1]``, and
            not at all where that is -100. All terms use the same positions.
        how: weights and temperature.

    Returns:
        the loss (scalar) and its parts, detached, before weighting, with their T^2: ``ce``, ``kl`` where there is a
        teacher, ``reverse_kl`` and ``jsd`` where they are weighted. Without any label the loss is 0.

    Raises:
        ValueError: for shapes that do not fit, or a teacher that is missing.
    """
    how = how or KDLoss()
    if teacher_logits is None and how.needs_teacher:
        raise ValueError(f"{how} needs a teacher's logits")
    if teacher_logits is not None and student_logits.shape != teacher_logits.shape:
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
    student = _wide(student_logits[:, :-1])
    log_p = torch.log_softmax(student, -1)
    ce = -(log_p.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1) * mask).sum() / count
    loss, parts = how.ce * ce, {"ce": ce.detach()}
    if teacher_logits is None:
        return loss, parts
    temperature, weights = how.temperature, {"kl": how.kl, "reverse_kl": how.reverse_kl, "jsd": how.jsd}
    log_s = log_p if temperature == 1 else torch.log_softmax(student / temperature, -1)
    log_t = torch.log_softmax(_wide(teacher_logits[:, :-1].detach()) / temperature, -1)
    for name, weight in weights.items():
        if weight or name == "kl":
            value = (_divergence(name, log_t, log_s, how.jsd_beta) * mask).sum() / count * temperature**2
            parts[name] = value.detach()
            loss = loss + weight * value
    return loss, parts


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _divergence(name: str, log_t: Tensor, log_s: Tensor, beta: float) -> Tensor:
    """Of one position each, ``[B, T]``, from log-probabilities ``[B, T, V]``."""
    if name == "kl":
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if name == "reverse_kl":
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    t, s = log_t.exp(), log_s.exp()
    log_m = torch.log((beta * t + (1 - beta) * s).clamp_min(torch.finfo(t.dtype).tiny))
    return (beta * t * (log_t - log_m) + (1 - beta) * s * (log_s - log_m)).sum(-1)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The squared distance of hidden states relative to the teacher's, ``mean |s - t|^2 / |t|^2``, over tokens and
    layers.

    Each token is divided by its own norm, our choice: the first tokens of many models have states a hundred times
    larger than the others, and would be all that a common norm sees.

    Args:
        student, teacher: ``[B, T, H]`` of each layer; no gradient flows to the teacher.
        mask: ``[B, T]``, 1 where a token counts.

    Returns:
        fp32 scalar.
    """
    count = mask.sum().clamp_min(1) * max(1, len(student))
    total = mask.new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        wide = t.detach().float()
        distance = (s.float() - wide).square().sum(-1) / wide.square().sum(-1).clamp_min(1e-12)
        total = total + (distance * mask).sum() / count
    return total


@dataclass
class Seen:
    """What a model makes of a batch: ``logits [B, T, V]``, or ``hidden [B, T, H]`` before its head with the head's weight
    ``[V, H]``; and the outputs of chosen blocks."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    features: list[Tensor] = field(default_factory=list)


@dataclass
class Head:
    """A model whose logits are ``softcap(scale * linear(body(tokens)))``."""

    body: nn.Module
    linear: nn.Linear
    softcap: float | None
    scale: float

    def weight(self) -> Tensor:
        """``[V, H]``; of a quantized head what it multiplies by."""
        return self.linear.quantized_weight() if isinstance(self.linear, FakeQuantLinear) else self.linear.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """``[.., V]`` from hidden states ``[.., H]``."""
        logits = nn.functional.linear(hidden, self.weight()) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@torch.no_grad()
def find_head(model: nn.Module) -> Head | None:
    """How the logits of a causal LM follow from its last hidden states; None where that is no plain linear layer.

    Nothing is taken on trust: the logits of eight tokens computed through the head must be those of the model.
    """
    body, output = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", None)
    linear = None if output is None else output()
    if body is None or body is model or type(linear) not in (nn.Linear, FakeQuantLinear) or linear.bias is not None:
        return None
    if linear._forward_pre_hooks or linear._forward_hooks:
        return None
    config: Any = getattr(model, "config", None)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(body, linear, getattr(config, "final_logit_softcapping", None), float(scale))
    probe = torch.arange(8, device=linear.weight.device).remainder(linear.out_features)[None]
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=probe, use_cache=False).logits.float()
        found = head.logits(body(input_ids=probe, use_cache=False).last_hidden_state).float()
    finally:
        model.train(training)
    close = (found - expected).abs().max() <= 0.02 * expected.abs().max()  # bf16 models differ in the last bits
    return head if bool(close) else None


class Distillation:
    """The loss of batches for a student and its teacher.

    Args:
        student, teacher: causal LMs on one device, of one vocabulary; the teacher may be None for cross entropy alone.
        how: weights of the loss.
        fused: through the op ``distill_loss``, from hidden states; None: where both heads are plain linear layers.

    Raises:
        ValueError: a teacher is missing, a feature layer does not exist, or ``fused`` is True and a head does not allow
            it.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, how: KDLoss | None = None, fused: bool | None = None
    ) -> None:
        self.how = how or KDLoss()
        if teacher is None and self.how.needs_teacher:
            raise ValueError(f"{self.how} needs a teacher")
        self.student, self.teacher = student, teacher if self.how.needs_teacher else None
        heads = [None if m is None or fused is False else find_head(m) for m in (self.student, self.teacher)]
        possible = heads[0] is not None and (self.teacher is None or heads[1] is not None)
        if fused and not possible:
            which = "student" if heads[0] is None else "teacher"
            raise ValueError(f"the {which}'s head is no plain linear layer, so its loss cannot be fused")
        if possible and len({h.scale for h in heads if h is not None}) > 1:
            possible = False  # the op knows one scale of logits
        possible = possible and self.how.kl + self.how.ce + self.how.reverse_kl + self.how.jsd > 0
        self.fused = possible
        self.heads = heads if self.fused else [None, None]
        self.blocks = [self._blocks(m) for m in (self.student, self.teacher)]

    def _blocks(self, model: nn.Module | None) -> list[nn.Module]:
        if model is None or not self.how.features:
            return []
        _, blocks = find_blocks(model)
        layers = self.how.feature_layers or tuple(range(len(blocks)))
        for i in layers:
            if not -len(blocks) <= i < len(blocks):
                raise ValueError(f"feature_layers={layers}: there is no block {i} among {len(blocks)}")
        return [blocks[i] for i in layers]

    def see(self, ids: Tensor, teacher: bool = False) -> Seen:
        """What one of the two models makes of tokens int64 ``[B, T]``."""
        model, head, blocks = (
            (self.teacher, self.heads[1], self.blocks[1]) if teacher else (self.student, self.heads[0], self.blocks[0])
        )
        assert model is not None
        with outputs_of(blocks) as features:
            if head is None:
                return Seen(logits=model(input_ids=ids, use_cache=False).logits, features=features)
            hidden = head.body(input_ids=ids, use_cache=False).last_hidden_state
            return Seen(hidden=hidden, weight=head.weight(), features=features)

    @torch.no_grad()
    def teach(self, ids: Tensor) -> Seen | None:
        """The teacher's side of a batch, which may be kept and given to several calls; None without a teacher."""
        return None if self.teacher is None else self.see(ids, teacher=True)

    def __call__(
        self, ids: Tensor, labels: Tensor | None = None, taught: Seen | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and parts of tokens int64 ``[B, T]`` with labels as :func:`kd_loss` (the tokens themselves if None).

        ``taught`` is what :meth:`teach` gave for these tokens. Parts are detached 0-dim tensors: those of
        :func:`kd_loss`, and ``features``. Nothing waits for the device.
        """
        labels = ids if labels is None else labels
        taught = taught or self.teach(ids)
        seen = self.see(ids)
        if self.fused:
            loss, parts = self._fused(seen, taught, labels)
        else:
            assert seen.logits is not None
            loss, parts = kd_loss(seen.logits, None if taught is None else taught.logits, labels, self.how)
        if self.how.features:
            assert taught is not None
            distance = feature_loss(seen.features, taught.features, (labels != -100).float())
            loss, parts["features"] = loss + self.how.features * distance, distance.detach()
        return loss, parts

    def _fused(self, seen: Seen, taught: Seen | None, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        how, (mine, other) = self.how, self.heads
        assert seen.hidden is not None and mine is not None
        loss, parts = distill_loss(
            _rows(seen.hidden), seen.weight, labels[:, 1:].reshape(-1),
            None if taught is None else _rows(taught.hidden), None if taught is None else taught.weight,
            kl=how.kl, reverse_kl=how.reverse_kl, jsd=how.jsd, jsd_beta=how.jsd_beta, ce=how.ce,
            temperature=how.temperature, softcap=mine.softcap, teacher_softcap=None if other is None else other.softcap,
            logit_scale=mine.scale,
        )  # fmt: skip
        shown = {"ce", *(("kl",) if taught is not None else ())}
        shown |= {name for name in ("reverse_kl", "jsd") if getattr(how, name)}
        return loss, {name: part for name, part in parts.items() if name in shown}


def _rows(hidden: Tensor | None) -> Tensor:
    """``[B, T, H]`` without the last position, which predicts nothing, as ``[B (T - 1), H]``."""
    assert hidden is not None
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects what modules return (the first of a tuple) while the context is open, in the order of ``modules``."""
    found: dict[int, Tensor] = {}
    features: list[Tensor] = []

    def catch(place: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[place] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [m.register_forward_hook(catch(i)) for i, m in enumerate(modules)]
    try:
        yield features
        features += [found[i] for i in range(len(modules))]
    finally:
        for h in hooks:
            h.remove()
