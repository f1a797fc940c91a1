"""quantize_activation: tokens to int8 codes, in the order of :mod:`pyquant.formats.act8`, and scales.

What it computes, group by group of a token (or a token at once)::

    scale = max(max|x| * factor, 1e-12)      code = clamp(round(x / scale), -top - 1, top)

Layouts: x ``[M, K]`` any row stride, codes int8 ``[M, K padded to 64]``, scale fp32 ``[M, groups]`` of any strides.

Tiles: a program is one group of one token; a group longer than BLOCK is read twice, once for its maximum::

    position p of 16     0  1  2  3  4 ..     loaded from column  2 (p // 4) + 8 (p % 2) + p % 4 // 2

Bound by memory, 3 bytes a value.

Exactness: IEEE division, half to even; the maximum is taken of bits, so that NaN is larger than infinity. Same bits as the
reference.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyquant.kernels.int4 import clamp, round_half_even

_BLOCK = 2048  # columns at a time


@triton.jit
def _quantize_kernel(
    codes_ptr, scale_ptr, x_ptr, k, columns, groups, width, x_stride_m, scale_stride_m, scale_stride_g, factor, top,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    position = tl.arange(0, BLOCK)
    inside = position % 16
    column = position - inside + 2 * (inside // 4) + 8 * (inside % 2) + inside % 4 // 2
    x_row = x_ptr + row * x_stride_m
    bits = tl.zeros((BLOCK,), tl.int32)
    for i in range(STEPS):
        first = i * BLOCK
        col = group * width + first + column
        x = tl.load(x_row + col, mask=(col < k) & (first + position < width), other=0.0).to(tl.float32)
        bits = tl.maximum(bits, tl.abs(x).to(tl.int32, bitcast=True))
    scale = tl.max(bits, 0).to(tl.float32, bitcast=True) * factor
    scale = tl.where(scale < 1e-12, 1e-12, scale)
    tl.store(scale_ptr + row * scale_stride_m + group * scale_stride_g, scale, mask=group < groups)
    for i in range(STEPS):
        first = i * BLOCK
        col = group * width + first + column
        x = tl.load(x_row + col, mask=(col < k) & (first + position < width), other=0.0).to(tl.float32)
        steps = tl.div_rn(x, scale)
        steps = tl.where(steps != steps, 0.0, clamp(steps, -65536.0, 65536.0))
        codes = clamp(round_half_even(steps), -top - 1.0, top).to(tl.int8)
        at = group * width + first + position
        tl.store(codes_ptr + row * columns + at, codes, mask=(first + position < width) & (at < columns))


def quantize_activation(
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    x: Tensor,
    bits: int,
    group_size: int,
    clip: float,
    dtype: object,
    sum_size: int,
) -> None:
    """Fill codes, scale and sums.

    Args:
        codes: int8 ``[..., columns]``, contiguous.
        scale: fp32 ``[..., groups]``.
        sums: fp32 ``[..., pieces]``, added up by torch; not touched without a sum_size.
        x: ``[M, K]`` with K contiguous.
        bits, group_size, clip, dtype, sum_size: as for the op; dtype is int8, groups are multiples of 16.
    """
    m, k = x.shape
    flat = codes.view(m, -1)
    columns, groups = flat.shape[1], scale.shape[-1]
    width = columns if group_size == -1 else group_size
    block = min(_BLOCK, triton.next_power_of_2(width))
    top = float((1 << (bits - 1)) - 1)
    by_row = scale.view(m, groups)
    _quantize_kernel[(m, triton.cdiv(columns, width))](
        flat, by_row, x, k, columns, groups, width, x.stride(0), by_row.stride(0), by_row.stride(1), clip / top, top,
        BLOCK=block, STEPS=triton.cdiv(width, block), num_warps=4,
    )  # fmt: skip
    if sum_size:
        pieces = sums.shape[-1]
        if sum_size == -1 or columns < pieces * sum_size:
            parts = [flat] if sum_size == -1 else flat.split(sum_size, 1)
            for i, part in enumerate(parts[:pieces]):
                sums.view(m, pieces)[:, i] = part.float().sum(1)
        else:
            sums.view(m, pieces).copy_(flat[:, : pieces * sum_size].view(m, pieces, sum_size).float().sum(2))
