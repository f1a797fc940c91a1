"""Range learning: the ends of each group's range are the parameters, as in AIMET."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.ops import fake_quant
from pyquant.quantizers.base import Quantizer, register
from pyquant.quantizers.ranges import find_range

TINY = 1e-8  # half of the narrowest range; keeps the division finite where an end collapsed onto 0


@register("range")
class RangeLearning(Quantizer):
    """Learned range ends, after "training range learning" of AIMET (quic/aimet, read in its ``llm_qat_kd`` example, which
    goes with arXiv 2403.18159).

    Parameters fp32 ``[N, ceil(K/G)]``: ``high``, with ``scale = high / qmax``, and when asymmetric ``low`` too, with
    ``scale = (high - low) / qmax`` and ``zero = -low / scale``. So ``dL/dhigh = dL/dscale / qmax``: LSQ's gradient of the
    step without LSQ's factor ``1 / sqrt(G qmax)``. Under Adam, which divides a gradient by its own size, such a factor
    changes nothing; what differs from ``lsq`` there is that a step of the learning rate is one of the range, and so qmax
    times smaller in the scale.

    Choices of ours: the first range is that of ``rule``; the zero is rounded in the forward pass and its gradient is that of
    ``fake_quant``; ranges contain 0.
    """

    def __init__(self, w: Tensor, spec: QuantSpec, rule: str = "minmax") -> None:
        super().__init__(spec)
        scale, zero = find_range(w, spec, rule)
        self.low = None if zero is None else nn.Parameter(-zero * scale)
        self.high = nn.Parameter(scale * spec.qmax if zero is None else (spec.qmax - zero) * scale)

    def _live(self) -> tuple[Tensor, Tensor | None]:
        high = self.high.clamp_min(TINY)
        if self.low is None:
            return high / self.spec.qmax, None
        low = self.low.clamp_max(-TINY)
        scale = (high - low) / self.spec.qmax
        return scale, -low / scale

    def range(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero = self._live()
        return scale, None if zero is None else torch.round(zero).clamp(0, self.spec.qmax)

    def forward(self, w: Tensor) -> Tensor:
        scale, zero = self._live()
        return fake_quant(w, scale, zero, self.spec.group_size, self.spec.bits)
