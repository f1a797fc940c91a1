"""Learned step size: the scale (and zero) of every group is a parameter trained beside the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.ops import fake_quant
from pyquant.quantizers.base import Quantizer, register
from pyquant.quantizers.ranges import find_range

MIN_SCALE = 1e-8  # below this a learned scale has collapsed; the floor keeps the division finite


@register("lsq")
class LSQ(Quantizer):
    """Learned Step Size Quantization (Esser et al., 2019; with a zero, LSQ+, Bhalgat et al., 2020).

    Parameters ``scale`` and, when asymmetric, ``zero``: fp32 ``[N, ceil(K/G)]``. The range starts from ``rule`` instead of
    LSQ's ``2 mean|w| / sqrt(qmax)``, so that training begins at the post-training result. Their gradients are multiplied by
    LSQ's ``1 / sqrt(G * qmax)``.
    """

    def __init__(self, w: Tensor, spec: QuantSpec, rule: str = "minmax") -> None:
        super().__init__(spec)
        scale, zero = find_range(w, spec, rule)
        self.scale = nn.Parameter(scale)
        self.zero = None if zero is None else nn.Parameter(zero)
        width = w.shape[1] if spec.group_size == -1 else spec.group_size
        self.grad_scale = 1.0 / math.sqrt(width * spec.qmax)

    def range(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.clamp_min(MIN_SCALE)
        zero = None if self.zero is None else torch.round(self.zero).clamp(0, self.spec.qmax)
        return scale, zero

    def forward(self, w: Tensor) -> Tensor:
        scale = self.scale.clamp_min(MIN_SCALE)
        return fake_quant(w, scale, self.zero, self.spec.group_size, self.spec.bits, self.grad_scale)
