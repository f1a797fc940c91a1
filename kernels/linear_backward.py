"""The gradient of linear_w4a16: a product of a 16-bit gradient and the 4-bit weight, which is frozen and stays packed.

What it computes::

    dx[m, k] = sum over n of  dy[m, n] * round16( scale[n, k / G] * (code[n, k] - zero[n, k / G]) )

The scale changes along the sum, so unlike in the forward it cannot multiply a finished part of it: w_hat is rounded to
dy's dtype in registers, to the very numbers that :func:`pyquant.dequantize_int4` writes, and the sum is fp32. (Scaling
dy instead would touch fewer numbers, and leave fp16's range: gradients and scales are both small.)

Layouts: dy ``[M, N]`` any strides, qweight ``[strips, units, 128, 4]``, scale and zero tiled ``[strips, padded groups,
64]``, dx ``[M, K]`` contiguous, partial sums ``[splits, M, K]`` fp32.

Tiles: BLOCK_M tokens by 64 * UNITS columns, in steps of 64 * STRIPS features, so a step reads one run of 2 KB::

                 step (64 features)                      k tile
    dy    | BLOCK_M x 64 | ...      @    strip 0   |  unit  |          w_hat through shared memory, transposed on the way
                                         strip 1   |  unit  |          (stmatrix on sm_90)
                                           ...        ...

Bound by reading the weight, N * K / 2 bytes, while all tokens fit one tile, as each further tile of tokens unpacks
everything again: more tokens than 64 are better served by expanding the weight once (pyquant/ops/linear.py). Few tokens
leave too few tiles for the machine, so N is split between programs and the parts are added in a fixed order.

Chosen by reading the generated code, not by timing. Tried and lost: w_hat transposed as the A operand (a second trip
through shared memory on sm_90), and two units or strips a step (64 two-byte stores a thread instead of 4 stmatrix).
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyquant.kernels.int4 import (
    STRIP,
    SYMMETRIC_ZERO,
    UNIT_K,
    UNIT_WORDS,
    code_to_float,
    scale_position,
    words_to_tile,
)
from pyquant.kernels.linear import MAX_SPLITS, MIN_STEPS, add_parts
from pyquant.kernels.tiles import Tile, choose, gpu

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit(do_not_specialize=["m"])
def _backward_kernel(
    out_ptr, grad_ptr, qweight_ptr, scale_ptr, zero_ptr, m, n, k, units, groups, group_size,
    grad_stride_m, grad_stride_n,
    HAS_ZERO: tl.constexpr, BLOCK_M: tl.constexpr, STRIPS: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """One tile of dx, or of part number program_id(1) of dx when N is split: the steps from STEPS * part on."""
    BLOCK_K: tl.constexpr = UNIT_K * UNITS
    BLOCK_N: tl.constexpr = STRIP * STRIPS
    m_tiles = tl.cdiv(m, BLOCK_M)
    m_tile = tl.program_id(0) % m_tiles  # neighbours share the weight: it is read from memory once
    k_tile = tl.program_id(0) // m_tiles
    part = tl.program_id(1)

    strips = tl.cdiv(n, STRIP)
    unit = k_tile * UNITS + tl.arange(0, UNITS)[:, None, None, None]
    local = tl.arange(0, STRIPS)[None, :, None, None]
    thread = tl.arange(0, 128)[None, None, :, None]
    word = tl.arange(0, 4)[None, None, None, :]
    row = tl.arange(0, BLOCK_N)
    group = k_tile * BLOCK_K // group_size + tl.arange(0, GROUPS)[None, :]  # [1, GROUPS] of this tile's columns

    token = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    grad_base = grad_ptr + token.to(tl.int64)[:, None] * grad_stride_m

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for i in range(STEPS):
        first = (part * STEPS + i) * STRIPS
        strip = first + local
        words = qweight_ptr + (strip.to(tl.int64) * units + unit) * UNIT_WORDS + thread * 4 + word
        words = tl.load(words, mask=(strip < strips) & (unit < units), other=0)
        feature = first * STRIP + row
        mask = (token < m)[:, None] & (feature < n)[None, :]
        grad = tl.load(grad_base + feature[None, :].to(tl.int64) * grad_stride_n, mask=mask, other=0.0)

        own = (feature // STRIP)[:, None]
        at = (own.to(tl.int64) * groups + group) * STRIP + scale_position(row % STRIP)[:, None]
        valid = (own < strips) & (group < groups)
        scale = tl.load(scale_ptr + at, mask=valid, other=0.0).to(tl.float32)  # 0 in rows past N: they weigh nothing
        codes = tl.reshape(words_to_tile(words, UNITS, STRIPS, 4), BLOCK_N, GROUPS, BLOCK_K // GROUPS)
        steps = code_to_float(codes)
        if HAS_ZERO:
            steps -= tl.load(zero_ptr + at, mask=valid, other=0).to(tl.float32)[:, :, None]
        else:
            steps -= SYMMETRIC_ZERO
        w_hat = tl.reshape(steps * scale[:, :, None], BLOCK_N, BLOCK_K)
        acc += tl.dot(grad, w_hat.to(grad.dtype), input_precision="ieee")

    column = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    out = out_ptr + (part.to(tl.int64) * m + token[:, None]) * k + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(token < m)[:, None] & (column < k)[None, :])


def plan(m: int, n: int, k: int, group_size: int, tile: Tile) -> tuple[int, int, dict[str, int]]:
    """(programs over tiles, splits of N, compile constants) for a gradient of these sizes."""
    columns = UNIT_K.value * tile.units
    steps = max(1, triton.cdiv(n, STRIP.value * tile.strips))
    tiles = triton.cdiv(m, tile.tokens) * triton.cdiv(k, columns)
    splits = max(1, min(tile.programs // tiles, MAX_SPLITS, steps // MIN_STEPS))
    per_split = triton.cdiv(steps, splits)
    constants = {
        "BLOCK_M": tile.tokens, "STRIPS": tile.strips, "UNITS": tile.units,
        "GROUPS": max(1, columns // group_size) if group_size > 0 else 1, "STEPS": per_split,
    }  # fmt: skip
    return tiles, triton.cdiv(steps, per_split), {**constants, "num_warps": tile.warps, "num_stages": tile.stages}


def linear_w4a16_backward(
    grad_x: Tensor,
    grad_y: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    tile: Tile | None = None,
) -> None:
    """Fill grad_x with ``grad_y @ w_hat``.

    Args:
        grad_x: ``[M, K]`` in grad_y's dtype, contiguous.
        grad_y: ``[M, N]`` bf16 or fp16, any strides.
        qweight: int32 ``[ceil(N/64), ceil(K/64), 128, 4]``, contiguous.
        scale: 16-bit float ``[ceil(N/64), padded groups, 64]``, tiled.
        zero: uint8, tiled like scale, or None for symmetric.
        group_size: 32, 64, 128 or -1.
        tile: how to compute, instead of what :mod:`pyquant.kernels.tiles` says.

    Raises:
        NotImplementedError: bf16 in Triton's interpreter.
    """
    (m, k), n = grad_x.shape, grad_y.shape[1]
    if grad_x.numel() == 0:
        return
    if _INTERPRETED and grad_y.dtype == torch.bfloat16:
        raise NotImplementedError("Triton's interpreter multiplies the bits of bfloat16 as integers; use float16 there")
    tile = tile or choose("backward", m, *gpu(grad_y.device))
    tiles, splits, constants = plan(m, n, k, group_size, tile)
    out = grad_x if splits == 1 else torch.empty((splits, m, k), dtype=torch.float32, device=grad_x.device)
    units, groups = qweight.shape[1], scale.shape[1]
    _backward_kernel[(tiles, splits)](
        out, grad_y, qweight, scale, zero, m, n, k, units, groups,
        max(units, 2) * UNIT_K.value if group_size == -1 else group_size, *grad_y.stride(),
        HAS_ZERO=zero is not None, **constants,
    )  # fmt: skip
    if splits > 1:
        add_parts(grad_x, out, None)
