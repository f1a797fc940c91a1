"""What block-wise training may move, behind one protocol: roundings, ranges, or the weights themselves.

Every parametrization is a :class:`~pyquant.quantizers.base.Quantizer`: ``forward(w)`` is w_hat by the op ``fake_quant``,
and w_hat lies on the grid of :meth:`range`, so the codes that training saw are the codes that are stored.

=============  ==============================================================  =======================================
name           w_hat                                                           after
=============  ==============================================================  =======================================
``rounding``   fake_quant(w + V s, s, z), V in [-reach, reach], s = s0 a       AdaRound (arXiv 2004.10568), AutoRound
                                                                               (arXiv 2309.05516)
``clip``       fake_quant(w, s, z), s = s0 a                                   OmniQuant's clipping (arXiv 2308.13137)
``weights``    fake_quant(w, s, z), w trained too                              Block-AP of EfficientQAT
                                                                               (arXiv 2407.11062)
=============  ==============================================================  =======================================

Choices of ours: V is hard-clamped after each step and rounded straight through, as AutoRound does, with AdaRound's soft
rounding left out; a range is one factor a of each scale (and a shift of the zero) instead of two clipped ends; the
scale is rounded to the dtype of the file inside the forward pass, straight through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyquant import reference
from pyquant.formats import int4
from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import FakeQuantLinear
from pyquant.ops import fake_quant
from pyquant.quantizers.base import Quantizer
from pyquant.quantizers.ranges import round_scale

LEARN = ("rounding", "clip", "weights")
FACTOR = (0.25, 2.0)  # where the factor of a scale may go


@dataclass
class Start:
    """Where a layer begins: weight ``[N, K]`` that is rounded at step 0, fp32 scale and zero ``[N, ceil(K/G)]``."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None


@dataclass
class Rounded:
    """A layer as it is deployed: unsigned codes ``q - qmin`` uint8 ``[N, K]``, fp32 scale and zero ``[N, ceil(K/G)]``."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QuantSpec

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w_hat ``[N, K]``: the product in fp32, rounded once to dtype."""
        k, group = self.codes.shape[1], self.spec.group_size
        zero = None if self.zero is None else int4.expand_groups(self.zero.float(), k, group)
        steps = self.codes.float() - (1 << (self.spec.bits - 1) if zero is None else zero)
        return (steps * int4.expand_groups(self.scale.float(), k, group)).to(dtype)


def rounded(w: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Rounded:
    """Codes of a weight ``[N, K]``; scale and zero as they will be stored."""
    w_hat = reference.fake_quant(w.float(), scale.float(), zero, spec.group_size, spec.bits)
    k = w.shape[1]
    steps = torch.round(w_hat / int4.expand_groups(scale.float(), k, spec.group_size))
    offset = 1 << (spec.bits - 1)
    z = offset if zero is None else int4.expand_groups(zero.float(), k, spec.group_size)
    return Rounded((steps + z).to(torch.uint8), scale.float(), zero, spec)


class Parametrization(Quantizer):
    """Base: a learned factor of each scale, and a learned shift of each zero.

    Args:
        start: where the layer begins.
        spec: bits, group size, symmetry.
        scale_dtype: what scales are stored in.
        ranges: whether scale and zero are trained.
    """

    def __init__(self, start: Start, spec: QuantSpec, scale_dtype: torch.dtype, ranges: bool = True) -> None:
        super().__init__(spec)
        self.scale_dtype, self.out_dtype = scale_dtype, start.weight.dtype
        self.scale0: Tensor
        self.zero0: Tensor | None
        self.register_buffer("scale0", start.scale.float())
        self.register_buffer("zero0", None if start.zero is None else start.zero.float())
        self.factor = nn.Parameter(torch.ones_like(self.scale0)) if ranges else None
        learned = ranges and self.zero0 is not None
        self.shift = nn.Parameter(torch.zeros_like(self.scale0)) if learned else None

    def range(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = self.scale0 if self.factor is None else self.scale0 * self.factor
        scale = scale + (round_scale(scale.detach(), self.scale_dtype) - scale).detach()
        zero = self.zero0
        if zero is not None and self.shift is not None:
            zero = zero + self.shift
        return scale, zero

    def forward(self, w: Tensor) -> Tensor:
        scale, zero = self.range(w)
        w_hat = fake_quant(self.adjusted(w, scale), scale, zero, self.spec.group_size, self.spec.bits)
        return w_hat.to(self.out_dtype)

    def adjusted(self, w: Tensor, scale: Tensor) -> Tensor:
        """What is rounded to nearest."""
        return w

    def trained(self, layer: FakeQuantLinear) -> list[tuple[str, nn.Parameter]]:
        """(kind, parameter) of everything that is trained; kinds are keys of the learning rates."""
        found = [("scale", self.factor), ("zero", self.shift)]
        return [(kind, p) for kind, p in found if p is not None]

    @torch.no_grad()
    def bound(self) -> None:
        """Clamp what has bounds; called after each step."""
        if self.factor is not None:
            self.factor.clamp_(*FACTOR)

    @torch.no_grad()
    def deploy(self, w: Tensor) -> Rounded:
        """The codes of the present state."""
        scale, zero = self.range(w)
        zero = None if zero is None else torch.round(zero).clamp(0, (1 << self.spec.bits) - 1)
        return rounded(self.adjusted(w.float(), scale), scale.detach().clone(), zero, self.spec)


class Clip(Parametrization):
    """Only the ranges are trained."""


class Rounding(Parametrization):
    """A learned offset V of each rounding, in steps of the scale, and the ranges.

    Args:
        reach: bound of ``|V|``; 0.5 lets each weight go to either neighbour and no further.
        The rest as :class:`Parametrization`.
    """

    def __init__(
        self, start: Start, spec: QuantSpec, scale_dtype: torch.dtype, ranges: bool = True, reach: float = 0.5
    ) -> None:
        super().__init__(start, spec, scale_dtype, ranges)
        self.reach = reach
        self.offset = nn.Parameter(torch.zeros(start.weight.shape, device=start.weight.device))

    def adjusted(self, w: Tensor, scale: Tensor) -> Tensor:
        return w + self.offset * _per_weight(scale, w.shape[1], self.spec.group_size)

    def trained(self, layer: FakeQuantLinear) -> list[tuple[str, nn.Parameter]]:
        return [("rounding", self.offset), *super().trained(layer)]

    @torch.no_grad()
    def bound(self) -> None:
        super().bound()
        self.offset.clamp_(-self.reach, self.reach)


class Weights(Parametrization):
    """All weights are trained, and the ranges."""

    def trained(self, layer: FakeQuantLinear) -> list[tuple[str, nn.Parameter]]:
        return [("weight", layer.weight), *super().trained(layer)]


def parametrize(
    linear: nn.Linear,
    start: Start,
    learn: str,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    ranges: bool = True,
    reach: float = 0.5,
) -> FakeQuantLinear:
    """The layer in the form that is trained; its weight becomes ``start.weight`` (fp32 when weights are trained).

    Raises:
        ValueError: an unknown ``learn``.
    """
    if learn not in LEARN:
        raise ValueError(f"learn={learn!r} must be one of {', '.join(LEARN)}")
    quantizer: Parametrization
    if learn == "rounding":
        quantizer = Rounding(start, spec, scale_dtype, ranges, reach)
    else:
        quantizer = (Clip if learn == "clip" else Weights)(start, spec, scale_dtype, ranges)
    quantizer.out_dtype = linear.weight.dtype
    weight = start.weight.float() if learn == "weights" else start.weight
    if linear.bias is not None:
        linear.bias.requires_grad_(False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=learn == "weights")
    return FakeQuantLinear(linear, quantizer)


def _per_weight(scale: Tensor, k: int, group_size: int) -> Tensor:
    """``[N, ceil(K/G)]`` to ``[N, K]``, by a view where groups are whole: its gradient is a plain sum."""
    n, groups = scale.shape
    if groups == 1 or k % group_size:
        return int4.expand_groups(scale, k, group_size)
    return scale[:, :, None].expand(n, groups, group_size).reshape(n, k)
