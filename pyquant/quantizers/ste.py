"""Straight-through estimator with a range that follows the weight."""

from __future__ import annotations

from torch import Tensor

from pyquant.formats.spec import QuantSpec
from pyquant.ops import fake_quant
from pyquant.quantizers.base import Quantizer, register
from pyquant.quantizers.ranges import minmax_range


@register("ste")
class MinMaxSTE(Quantizer):
    """The min-max range is found anew from the weight at every call; only the weight is trained."""

    def __init__(self, w: Tensor, spec: QuantSpec, rule: str = "minmax") -> None:
        super().__init__(spec)

    def range(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        return minmax_range(w.detach(), self.spec)

    def forward(self, w: Tensor) -> Tensor:
        scale, zero = self.range(w)
        return fake_quant(w, scale, zero, self.spec.group_size, self.spec.bits)
