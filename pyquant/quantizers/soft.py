"""Learned step size with continuous approximations of rounding and clamping in the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant.formats.spec import QuantSpec
from pyquant.ops import fake_quant
from pyquant.ops.fake_quant import CLAMPS, ROUNDINGS
from pyquant.quantizers.base import register
from pyquant.quantizers.lsq import LSQ, MIN_SCALE


@register("soft")
class Soft(LSQ):
    """:class:`~pyquant.quantizers.LSQ` whose gradients see a sigmoid rounding and a soft clamp (2410.10849; the formulas, and
    what in them is our reading, are in :func:`pyquant.reference.soft_round` and :func:`pyquant.reference.soft_clamp`).

    It hardens exactly: :meth:`range` is LSQ's, and the codes made with it are those of the exact forward. With
    ``soft_forward`` the surrogate is the forward while the module trains; after ``eval()`` the forward is exact.

    The buffer ``temperature``, a scalar fp32 tensor, is None with rounding "ste". A schedule sets it by ``fill_``, which
    neither waits for the device nor recompiles anything. It is not part of the state_dict: the schedule knows it.

    Args:
        w, spec, rule: as for every quantizer.
        rounding: "ste", "sigmoid-a" or "sigmoid-b".
        clamp: "hard", "sigmoid" or "phi".
        beta: sharpness of the soft clamp, in 1 / step.
        temperature: first sharpness of the sigmoid rounding, in 1 / step.
        soft_forward: train on the surrogate's value instead of the rounded one.

    Raises:
        ValueError: for an unknown name, or a temperature that is not positive.
    """

    def __init__(
        self,
        w: Tensor,
        spec: QuantSpec,
        rule: str = "minmax",
        rounding: str = "sigmoid-b",
        clamp: str = "sigmoid",
        beta: float = 10.0,
        temperature: float = 4.0,
        soft_forward: bool = False,
    ) -> None:
        super().__init__(w, spec, rule)
        for name, value, known in (("rounding", rounding, ROUNDINGS), ("clamp", clamp, CLAMPS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        self.rounding, self.clamp, self.beta, self.soft_forward = rounding, clamp, beta, soft_forward
        made = None if rounding == "ste" else torch.tensor(temperature, dtype=torch.float32, device=w.device)
        self.register_buffer("temperature", made, persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        scale = self.scale.clamp_min(MIN_SCALE)
        # a module cast to 16 bits casts its buffers too
        temperature = None if self.temperature is None else self.temperature.float()
        how = self.rounding, self.clamp, temperature, self.beta, self.soft_forward and self.training
        return fake_quant(w, scale, self.zero, self.spec.group_size, self.spec.bits, self.grad_scale, *how)

    def extra_repr(self) -> str:
        soft = ", soft forward" if self.soft_forward else ""
        return f"{super().extra_repr()}, {self.rounding}, {self.clamp}, beta={self.beta:g}{soft}"
