"""fake_quant with soft slopes in fp64, written forward only: what torch's autograd makes of it is what the ops must return.

Nothing here is shared with the package: the formulas are typed again, element by element, with a scale and a zero for each
element so that their gradients are the terms of the group sums.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

import cases
from cases import FakeQuantCase, Want
from pyquant.formats import int4

ROUNDINGS, CLAMPS = ("ste", "sigmoid-a", "sigmoid-b"), ("hard", "sigmoid", "phi")


@dataclass(frozen=True)
class Mode:
    """One surrogate: what the op takes behind grad_scale."""

    rounding: str = "ste"
    clamp: str = "hard"
    temperature: float = 4.0
    beta: float = 10.0
    soft_forward: bool = False

    def __str__(self) -> str:
        kind = f"{self.rounding}-{self.clamp}-T{self.temperature:g}-b{self.beta:g}"
        return kind + ("-soft" if self.soft_forward else "")

    def arguments(self, device: str) -> tuple:
        """(rounding, clamp, temperature, beta, soft_forward) for the op."""
        return self.rounding, self.clamp, torch.tensor(self.temperature, device=device), self.beta, self.soft_forward


MODES = tuple(
    Mode(rounding, clamp, soft_forward=soft)
    for rounding, clamp, soft in itertools.product(ROUNDINGS, CLAMPS, (False, True))
)
# Both gates at once (beta * half below 15), a temperature that is nearly straight-through, and one that is nearly a step
CORNERS = (
    Mode("sigmoid-b", "sigmoid", beta=1.0),
    Mode("sigmoid-a", "phi", beta=1.702, soft_forward=True),
    Mode("sigmoid-b", "phi", 0.5, 3.0),
    Mode("sigmoid-a", "sigmoid", 10.0, 100.0, soft_forward=True),
    Mode("sigmoid-b", "sigmoid", 10.0, 4.0, soft_forward=True),
    Mode("ste", "phi", beta=0.5),
)


def gate(z: Tensor, mode: Mode) -> Tensor:
    if mode.clamp == "sigmoid":
        return torch.sigmoid(mode.beta * z)
    return 0.5 * torch.erfc(-z * mode.beta / 1.702 / 2**0.5)


def elementwise(w: Tensor, s: Tensor, z: Tensor | None, bits: int, mode: Mode, exact_v: Tensor | None = None) -> Tensor:
    """w_hat in fp64, differentiable in w, s and z ``[N, K]``; exact_v is the fp32 quotient where the op takes it in fp32."""
    low, high = cases.code_range(bits, z is None)
    v = w / s
    if exact_v is not None:
        v = v + (exact_v.double() - v).detach()
    zero = torch.zeros_like(v) if z is None else z + (z.round().clamp(low, high) - z).detach()
    x = v + zero
    if mode.clamp == "hard":
        c = x.clamp(low, high)
    else:
        c = (
            x * gate(x - low, mode) * gate(high - x, mode)
            + low * gate(low - x, mode)
            + high * gate(x - high, mode)
        )  # fmt: skip
    t = mode.temperature
    if mode.rounding == "ste":
        f = c + (c.round() - c).detach()
    elif mode.rounding == "sigmoid-a":
        n = c.detach().round()
        u = c - n + 0.5
        f = n - 1 + torch.sigmoid(t * u) + torch.sigmoid(t * (u - 1))
    else:
        n = c.detach().floor()
        half = torch.sigmoid(torch.tensor(t / 2, dtype=torch.float64, device=c.device))
        f = n + (torch.sigmoid(t * (c - n - 0.5)) - (1 - half)) / (2 * half - 1)
    value = f - zero
    if not mode.soft_forward:
        value = value + ((v.round() + zero).clamp(low, high) - zero - value).detach()
    return value * s


def near_a_jump(w: Tensor, s: Tensor, z: Tensor | None, bits: int, mode: Mode) -> Tensor:
    """Where fp32 and fp64 may fall on different sides of a threshold of the soft-clamped value: reading A jumps there."""
    with torch.no_grad():
        flat = Mode("sigmoid-b", mode.clamp, 1e-3, mode.beta, True)  # f(c) = c: the clamped value itself
        c = elementwise(w, s, z, bits, flat) / s
        away = (c - c.floor() - 0.5).abs()
    return away < 1e-3


@dataclass(frozen=True)
class Results:
    """What a right op returns: w_hat, dw and the sums dscale and dzero, with their tolerances."""

    value: Want
    dw: Want
    dscale: Want
    dzero: Want | None
    jump: Tensor

    def without_jumps(self, got: Tensor, grad: Tensor, case: FakeQuantCase, grad_scale: float) -> tuple[tuple, dict]:
        """((got, value) with elements next to a jump left out, the sums with room for such elements: one step each)."""
        value = Want(torch.where(self.jump, 0.0, self.value.value), self.value.worst, self.value.rms)
        step = cases._sum_groups(grad.double().abs() * self.jump, case.group_size) * grad_scale
        sums = {}
        for name, want in (("dscale", self.dscale), ("dzero", self.dzero)):
            if want is not None:
                rms = float(step.norm() / want.value.norm().clamp_min(1e-300))
                sums[name] = Want(want.value, want.worst + step, want.rms + rms)
        return (torch.where(self.jump, 0, got), value), sums


def results(
    w: Tensor, scale: Tensor, zero: Tensor | None, grad: Tensor, case: FakeQuantCase, mode: Mode, grad_scale: float
) -> Results:
    """The op on tensors of at most 32 bits, with these tolerances (u: unit roundoff of w's dtype; levels = 2^bits):

    * x in fp32 is off by levels * 2^-24, so the argument T r or beta e of a logistic by that times max(T, beta); a slope
      changes with its argument by at most 4 times its size, which is at most max(1, T / 2);
    * for 16-bit weights a hyperbolic tangent is good to 2^-11, and a slope has the square of two of them at most;
    * the errors of the terms of a sum are independent: 4 deviations of it;
    * every result is rounded once.
    """
    k, bits = case.k, case.bits
    wide = w.double().requires_grad_()
    s = int4.expand_groups(scale.double(), k, case.group_size).contiguous().requires_grad_()
    z = None if zero is None else int4.expand_groups(zero.double(), k, case.group_size).contiguous().requires_grad_()
    exact_v = w.float() / int4.expand_groups(scale.float(), k, case.group_size)
    value = elementwise(wide, s, z, bits, mode, exact_v)
    leaves = [t for t in (wide, s, z) if t is not None]
    terms = torch.autograd.grad(value, leaves, grad.double())
    u = cases.unit_roundoff(w.dtype)
    steep = max(mode.temperature, mode.beta) if (mode.rounding, mode.clamp) != ("ste", "hard") else 0.0
    peak = max(1.0, mode.temperature / 2)
    slope_error = 2.0**-24 * 2**bits * 4 * steep * peak + (4 * 2.0**-11 * peak if u > cases.U32 and steep else 0.0)
    value = value.detach()
    value_error = u * value.abs() + s.detach() * (slope_error if mode.soft_forward else 2.0**-24 * 2**bits)
    dw_error = u * terms[0].abs() + slope_error * grad.double().abs() + 1e-30
    magnitude = grad.double().abs() * (exact_v.double().abs() + 1)
    dscale = _sums(terms[1], magnitude, slope_error + 2.0**-22, case, grad_scale)
    dzero = None
    if z is not None:
        dzero = _sums(terms[2], grad.double().abs() * s.detach(), slope_error + 2.0**-22, case, grad_scale)
    return Results(
        Want(value, value_error + torch.finfo(w.dtype).tiny, u + slope_error),
        Want(terms[0], dw_error, 2 * u + 3 * slope_error),
        dscale,
        dzero,
        near_a_jump(wide, s, z, bits, mode)
        if mode.soft_forward and mode.rounding == "sigmoid-a"
        else torch.zeros_like(w, dtype=torch.bool),
    )


def _sums(terms: Tensor, magnitude: Tensor, relative: float, case: FakeQuantCase, factor: float) -> Want:
    want = cases.want_group_sums(terms, case.group_size, factor, torch.float32)
    extra = 4 * relative * factor * cases._sum_groups(magnitude.square(), case.group_size).sqrt()
    rms = float(extra.norm() / want.value.norm().clamp_min(1e-300))
    return Want(want.value, want.worst + extra, want.rms + rms)
