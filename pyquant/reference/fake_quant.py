"""Fake quantization: values and gradients, exact and soft."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyquant.formats import int4
from pyquant.reference.weights import sum_groups, wide

_FAR = 65536.0  # steps beyond which every clamp is constant; an infinite quotient would turn a slope of 0 into NaN


def _fake_quant_parts(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(v = w / scale, q - zero, inside the clamp?, scale), each ``[N, K]``."""
    k = w.shape[1]
    s = int4.expand_groups(wide(scale), k, group_size)
    v = wide(w) / s
    if zero is None:
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        return v, torch.round(v).clamp(low, high), (v >= low) & (v <= high), s
    high = (1 << bits) - 1
    z = int4.expand_groups(torch.round(wide(zero)).clamp(0, high), k, group_size)
    return v, (torch.round(v) + z).clamp(0, high) - z, (v + z >= 0) & (v + z <= high), s


def fake_quant(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    grad_scale: float = 1.0,
    rounding: str = "ste",
    clamp: str = "hard",
    temperature: Tensor | None = None,
    beta: float = 10.0,
    soft_forward: bool = False,
) -> Tensor:
    """Quantize and dequantize at once: ``(clamp(round(w / scale) + zero) - zero) * scale`` in w's dtype.

    ``zero`` is a float ``[N, ceil(K/G)]`` that is rounded and clamped to the codes here, so that a learned zero trains at the
    integer it will be stored as. With ``soft_forward`` the value is ``(f(c(w / scale + zero)) - zero) * scale`` instead, f
    being :func:`soft_round` and c :func:`soft_clamp`. ``grad_scale`` only matters to the gradient, and without
    ``soft_forward`` so do the arguments behind it.
    """
    v, steps, _, s = _fake_quant_parts(w, scale, zero, group_size, bits)
    if soft_forward and (rounding, clamp) != ("ste", "hard"):
        steps, _ = _soft_parts(v, zero, group_size, bits, rounding, clamp, temperature, beta)
    return (steps * s).to(w.dtype)


def fake_quant_backward(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    grad_scale: float,
    rounding: str = "ste",
    clamp: str = "hard",
    temperature: Tensor | None = None,
    beta: float = 10.0,
    soft_forward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (w, scale, zero) of :func:`fake_quant`; dzero is empty without a zero.

    With v = w / scale, x = v + zero, ``h' = f'(c(x)) c'(x)`` the slope of :func:`soft_round` over :func:`soft_clamp`, and u the
    forward's value in steps (``q - zero``, or ``f(c(x)) - zero`` with ``soft_forward``)::

        dw     = grad h'
        dscale = sum_group grad (u - v h')              times grad_scale
        dzero  = sum_group grad scale (h' - 1)          times grad_scale

    With rounding "ste" and clamp "hard", h' is 1 where x lies within the codes and 0 outside, and these are LSQ's gradients
    (Esser et al., "Learned Step Size Quantization", 1902.08153; with a zero LSQ+, Bhalgat et al., 2004.09576).
    """
    v, value, inside, s = _fake_quant_parts(w, scale, zero, group_size, bits)
    g = wide(grad)
    if (rounding, clamp) == ("ste", "hard"):
        dw = torch.where(inside, g, 0.0)
        dscale = g * torch.where(inside, value - v, value)
        dzero = torch.where(inside, 0.0, -g * s)
    else:
        soft, slope = _soft_parts(v, zero, group_size, bits, rounding, clamp, temperature, beta)
        if clamp == "hard":
            slope = torch.where(inside, slope, 0.0)
        dw = g * slope
        v = v.clamp(-_FAR, _FAR)
        dscale = g * ((soft if soft_forward else value) - v * slope)
        dzero = g * s * (slope - 1)
    dscale = (grad_scale * sum_groups(dscale, group_size)).to(scale.dtype)
    if zero is None:
        return dw.to(w.dtype), dscale, scale.new_empty(0)
    return dw.to(w.dtype), dscale, (grad_scale * sum_groups(dzero, group_size)).to(zero.dtype)


def soft_clamp(x: Tensor, low: float, high: float, clamp: str, beta: float) -> tuple[Tensor, Tensor]:
    """(c, c') of a clamp of x to ``low .. high``, after SoftClamp of 2410.10849::

        c(x)  = x g(x - low) g(high - x) + low g(low - x) + high g(x - high)
        c'(x) = g(x - low) g(high - x) + g'(x - low) (x g(high - x) - low) + g'(high - x) (high - x g(x - low))

    with a gate g that "sigmoid" takes as ``sigmoid(beta z)`` (the gate of Swish) and "phi" as ``Phi(beta z / 1.702)`` with the
    normal distribution function Phi, which is the gate of GELU at beta = 1.702; the factor makes both rise over the same
    width at equal beta. "hard" is the exact clamp, c' 1 inside, edges included, and 0 outside. The paper was at hand in
    reviews only: the gate and beta are our reading.
    """
    if clamp == "hard":
        return x.clamp(low, high), ((x >= low) & (x <= high)).to(x.dtype)
    if clamp == "sigmoid":
        above, below = torch.sigmoid(beta * (x - low)), torch.sigmoid(beta * (high - x))
        d_above = beta * above * torch.sigmoid(beta * (low - x))
        d_below = beta * below * torch.sigmoid(beta * (x - high))
        under, over = torch.sigmoid(beta * (low - x)), torch.sigmoid(beta * (x - high))
    else:
        b = beta / 1.702
        above, below = torch.special.ndtr(b * (x - low)), torch.special.ndtr(b * (high - x))
        d_above = b * torch.exp(-0.5 * (b * (x - low)) ** 2) / math.sqrt(2 * math.pi)
        d_below = b * torch.exp(-0.5 * (b * (high - x)) ** 2) / math.sqrt(2 * math.pi)
        under, over = torch.special.ndtr(b * (low - x)), torch.special.ndtr(b * (x - high))
    value = x * above * below + low * under + high * over
    return value, above * below + d_above * (x * below - low) + d_below * (high - x * above)


def soft_round(c: Tensor, rounding: str, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """(f, f') of a rounding of c with temperature T, larger is sharper; sig is the logistic function::

        "ste"        f = round(c)                                       f' = 1
        "sigmoid-a"  f = n - 1 + sig(T u) + sig(T (u - 1))              f' = T (sig'(T u) + sig'(T (u - 1)))
                     n = round(c), u = c - n + 1/2 in [0, 1]
        "sigmoid-b"  f = floor(c) + (sig(T r) - sig(-T/2)) / (2 sig(T/2) - 1)      f' = T sig'(T r) / (2 sig(T/2) - 1)
                     r = c - floor(c) - 1/2 in [-1/2, 1/2)

    Two readings of the sigmoid rounding of 2410.10849, whose printed formula reached us garbled. A keeps its sum over two
    sigmoids: f jumps by 2 sig(-T) at each threshold, and f' has the mean tanh(T / 2). B is normalised as in DSQ (1908.05033):
    f is continuous and f' has the mean 1. Ties go to even, as in the deployed rounding.
    """
    if rounding == "ste":
        return torch.round(c), torch.ones_like(c)
    assert temperature is not None
    t = temperature.to(c.dtype)
    if rounding == "sigmoid-a":
        n = torch.round(c)
        u = c - n + 0.5
        value = n - 1 + torch.sigmoid(t * u) + torch.sigmoid(t * (u - 1))
        return value, t * (_logistic_slope(t * u) + _logistic_slope(t * (u - 1)))
    n, norm = torch.floor(c), torch.tanh(t / 4)  # 2 sig(T/2) - 1
    r = c - n - 0.5
    return n + 0.5 + 0.5 * torch.tanh(t * r / 2) / norm, t * _logistic_slope(t * r) / norm


def _logistic_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _soft_parts(
    v: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    rounding: str,
    clamp: str,
    temperature: Tensor | None,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """(f(c(x)) - z, f'(c(x)) c'(x)) at x = v + z, each ``[N, K]``; z is the rounded zero."""
    if zero is None:
        z: Tensor | float = 0.0
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    else:
        low, high = 0, (1 << bits) - 1
        z = int4.expand_groups(torch.round(wide(zero)).clamp(low, high), v.shape[1], group_size)
    c, c_slope = soft_clamp((v + z).clamp(-_FAR, _FAR), low, high, clamp, beta)
    f, f_slope = soft_round(c, rounding, temperature)
    return f - z, f_slope * c_slope
