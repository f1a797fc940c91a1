"""Soft QAT: rounding and clamping that training sees through continuous approximations.

After "Continuous Approximations for Improving Quantization Aware Training of LLMs" (Li et al., 2024, arXiv 2410.10849):
a sigmoid in place of the straight-through rounding, a smooth clamp, learned step sizes and weights. Its full text was not
at hand, so the formulas (``pyquant.ops.fake_quant`` has them) and what follows are our reading, each a setting:

* rounding ``sigmoid-a`` or ``sigmoid-b`` (or ``ste``), clamp ``sigmoid`` or ``phi`` by the gate (or ``hard``);
* the forward pass rounds exactly and only the gradient is that of the approximation, unless ``soft_forward``;
* the temperature of the sigmoid follows a schedule over the run; large ones are close to a step.

However it trained, a layer hardens exactly: the codes that are evaluated and stored come from
``round(clamp(w / scale))`` with the stored scale (:func:`pyquant.recipes.kd_qat.convert`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROUNDINGS = ("ste", "sigmoid-a", "sigmoid-b")
CLAMPS = ("hard", "sigmoid", "phi")
SCHEDULES = ("constant", "linear", "cosine", "exponential")


@dataclass(frozen=True)
class SoftQAT:
    """Settings of the quantizer ``soft``.

    Args:
        rounding: ``ste``, ``sigmoid-a`` or ``sigmoid-b``.
        clamp: ``hard``, ``sigmoid`` or ``phi``.
        beta: sharpness of the soft clamp's gate.
        soft_forward: the approximation in the forward pass too.
        schedule: of the temperature over the run: ``constant``, ``linear``, ``cosine`` or ``exponential``.
        start, end: the temperature's first and last value; ``constant`` stays at ``start``.

    Raises:
        ValueError: unknown names, or values that are not positive.
    """

    rounding: str = "sigmoid-b"
    clamp: str = "sigmoid"
    beta: float = 10.0
    soft_forward: bool = False
    schedule: str = "constant"
    start: float = 4.0
    end: float = 4.0

    def __post_init__(self) -> None:
        for name, known in (("rounding", ROUNDINGS), ("clamp", CLAMPS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("beta", "start", "end"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    def options(self) -> dict[str, Any]:
        """What the quantizer is made with."""
        return {
            "rounding": self.rounding, "clamp": self.clamp, "beta": self.beta, "soft_forward": self.soft_forward,
        }  # fmt: skip

    def temperature(self, step: int, steps: int) -> float:
        """The temperature of a step counted from 0 of a run of ``steps``: ``start`` at the first, ``end`` at the last."""
        x = min(1.0, step / max(1, steps - 1))
        if self.schedule == "constant":
            return self.start
        if self.schedule == "exponential":
            return self.start * (self.end / self.start) ** x
        if self.schedule == "cosine":
            x = 0.5 * (1 - math.cos(math.pi * x))
        return self.start + (self.end - self.start) * x


def share_temperature(model: nn.Module) -> Tensor | None:
    """Make all soft quantizers of a model read one temperature, which :meth:`Tensor.fill_` then sets for all of them
    without waiting for the device.

    Call it once the model is where it trains: moving a module makes separate buffers again.

    Returns:
        the tensor, 0-dim fp32 on the device of the model; None where no quantizer has a temperature.
    """
    soft = [m for m in model.modules() if "temperature" in m._buffers and m._buffers["temperature"] is not None]
    if not soft:
        return None
    first = soft[0]._buffers["temperature"]
    assert isinstance(first, torch.Tensor)
    for m in soft:
        m._buffers["temperature"] = first
    return first
