"""4-bit weights: packing, unpacking and the product with them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant.formats import int4
from pyquant.formats.spec import num_groups


def wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def quantize_int4(w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> Tensor:
    """``qweight`` of w: ``clamp(round(w / scale) + zero)``, in tiled order. scale and zero are row-major ``[N, ceil(K/G)]``."""
    k = w.shape[1]
    steps = torch.round(wide(w) / int4.expand_groups(wide(scale), k, group_size))
    if zero is None:
        half = 1 << (bits - 1)
        codes = steps.clamp(-half, half - 1) + int4.SYMMETRIC_ZERO
    else:
        codes = (steps + int4.expand_groups(wide(zero), k, group_size)).clamp(0, (1 << bits) - 1)
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
    s = int4.expand_groups(wide(int4.untile_scale(scale, n, k, group_size)), k, group_size)
    if zero is None:
        steps = codes.to(s.dtype) - int4.SYMMETRIC_ZERO
    else:
        steps = codes.to(s.dtype) - int4.expand_groups(int4.untile_scale(zero, n, k, group_size), k, group_size)
    return (steps * s).to(dtype or scale.dtype)


def linear_w4a16(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, group_size: int
) -> Tensor:
    """``y = x @ w_hat.T + bias`` with ``x [..., K]``; w_hat in fp32, never rounded to 16 bits; y in x's dtype."""
    w_hat = dequantize_int4(qweight, scale, zero, n, x.shape[-1], group_size, wide(scale).dtype)
    y = wide(x) @ w_hat.T
    if bias is not None:
        y = y + wide(bias)
    return y.to(x.dtype)


def linear_w4a16_backward(
    grad_y: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, k: int, group_size: int
) -> Tensor:
    """``grad_x = grad_y @ w_hat`` with ``grad_y [..., N]``. The weight is frozen: it has no gradient."""
    w_hat = dequantize_int4(qweight, scale, zero, grad_y.shape[-1], k, group_size, wide(scale).dtype)
    return (wide(grad_y) @ w_hat).to(grad_y.dtype)


def sum_groups(t: Tensor, group_size: int) -> Tensor:
    """Sum ``[N, K]`` over each group of columns: ``[N, ceil(K/G)]``."""
    if group_size == -1:
        return t.sum(1, keepdim=True)
    groups = num_groups(t.shape[1], group_size)
    short = groups * group_size - t.shape[1]
    return torch.nn.functional.pad(t, (0, short)).view(t.shape[0], groups, group_size).sum(-1)
