"""Every op in plain torch: what the kernels must compute, and the backend for the CPU.

Same names and argument order as :mod:`pyquant.ops`; arithmetic in fp32 (fp64 inputs stay fp64); no checks, no cleverness.
Notation in :mod:`pyquant.formats`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant.formats import int4
from pyquant.formats.spec import num_groups


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def quantize_int4(w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> Tensor:
    """``qweight`` of w: ``clamp(round(w / scale) + zero)``, in tiled order. scale and zero are row-major ``[N, ceil(K/G)]``."""
    k = w.shape[1]
    steps = torch.round(_wide(w) / int4.expand_groups(_wide(scale), k, group_size))
    if zero is None:
        half = 1 << (bits - 1)
        codes = steps.clamp(-half, half - 1) + int4.SYMMETRIC_ZERO
    else:
        codes = (steps + int4.expand_groups(_wide(zero), k, group_size)).clamp(0, (1 << bits) - 1)
    return int4.tile_codes(codes.to(torch.uint8))


def dequantize_int4(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``w_hat [n, k]`` of a tiled weight; scale and zero in tiled order. The product is fp32, rounded once to dtype."""
    codes = int4.untile_codes(qweight, n, k)
    s = int4.expand_groups(_wide(int4.untile_scale(scale, n, k, group_size)), k, group_size)
    if zero is None:
        steps = codes.to(s.dtype) - int4.SYMMETRIC_ZERO
    else:
        steps = codes.to(s.dtype) - int4.expand_groups(int4.untile_scale(zero, n, k, group_size), k, group_size)
    return (steps * s).to(dtype or scale.dtype)


def linear_w4a16(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, group_size: int
) -> Tensor:
    """``y = x @ w_hat.T + bias`` with ``x [..., K]``; w_hat in fp32, never rounded to 16 bits; y in x's dtype."""
    w_hat = dequantize_int4(qweight, scale, zero, n, x.shape[-1], group_size, _wide(scale).dtype)
    y = _wide(x) @ w_hat.T
    if bias is not None:
        y = y + _wide(bias)
    return y.to(x.dtype)


def linear_w4a16_backward(
    grad_y: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, k: int, group_size: int
) -> Tensor:
    """``grad_x = grad_y @ w_hat`` with ``grad_y [..., N]``. The weight is frozen: it has no gradient."""
    w_hat = dequantize_int4(qweight, scale, zero, grad_y.shape[-1], k, group_size, _wide(scale).dtype)
    return (_wide(grad_y) @ w_hat).to(grad_y.dtype)


def _fake_quant_parts(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(v = w / scale, q - zero, inside the clamp?, scale), each ``[N, K]``."""
    k = w.shape[1]
    s = int4.expand_groups(_wide(scale), k, group_size)
    v = _wide(w) / s
    if zero is None:
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        return v, torch.round(v).clamp(low, high), (v >= low) & (v <= high), s
    high = (1 << bits) - 1
    z = int4.expand_groups(torch.round(_wide(zero)).clamp(0, high), k, group_size)
    return v, (torch.round(v) + z).clamp(0, high) - z, (v + z >= 0) & (v + z <= high), s


def fake_quant(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float = 1.0
) -> Tensor:
    """Quantize and dequantize at once: ``(clamp(round(w / scale) + zero) - zero) * scale`` in w's dtype.

    ``zero`` is a float ``[N, ceil(K/G)]`` that is rounded and clamped to the codes here, so that a learned zero trains at the
    integer it will be stored as. ``grad_scale`` only matters to the gradient.
    """
    _, steps, _, s = _fake_quant_parts(w, scale, zero, group_size, bits)
    return (steps * s).to(w.dtype)


def fake_quant_backward(
    grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (w, scale, zero) of :func:`fake_quant` with the straight-through estimator and LSQ's step gradient.

    With v = w / scale and "inside" where v + zero lies within the codes::

        dw     = grad                     inside, 0 outside
        dscale = sum_group grad * ((q - zero) - v)   inside,  grad * (q - zero) outside        times grad_scale
        dzero  = sum_group 0              inside,  -grad * scale outside                       times grad_scale

    (Esser et al., "Learned Step Size Quantization", 2019; Bhalgat et al., "LSQ+", 2020.) dzero is empty without a zero.
    """
    v, steps, inside, s = _fake_quant_parts(w, scale, zero, group_size, bits)
    g = _wide(grad)
    dw = torch.where(inside, g, 0.0).to(w.dtype)
    dscale = grad_scale * sum_groups(g * torch.where(inside, steps - v, steps), group_size)
    if zero is None:
        return dw, dscale.to(scale.dtype), scale.new_empty(0)
    dzero = grad_scale * sum_groups(torch.where(inside, 0.0, -g * s), group_size)
    return dw, dscale.to(scale.dtype), dzero.to(zero.dtype)


def sum_groups(t: Tensor, group_size: int) -> Tensor:
    """Sum ``[N, K]`` over each group of columns: ``[N, ceil(K/G)]``."""
    if group_size == -1:
        return t.sum(1, keepdim=True)
    groups = num_groups(t.shape[1], group_size)
    short = groups * group_size - t.shape[1]
    return torch.nn.functional.pad(t, (0, short)).view(t.shape[0], groups, group_size).sum(-1)
