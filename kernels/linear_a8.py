"""linear_w4a8: a product of int8 codes of tokens and a 4-bit weight, in integers.

What it computes::

    y[m, n] = sum over pieces of K of  s_w[n] * s_a[m] * ( sum over k of code[m, k] * (w[n, k] - zero[n]) )  + bias[n]

a piece being the columns that have one s_w and one s_a, at most 128 of them. The inner sums are int8 products with int32
sums, exact; w - zero is within -15 .. 15.

Layouts: codes int8 ``[M, K padded to 64]`` in the order of :mod:`pyquant.formats.act8`, s_a fp32 ``[M, groups]`` of any
strides, qweight, scale and zero as in :mod:`pyquant.kernels.linear`, y ``[M, N]`` contiguous.

Tiles: those of :mod:`pyquant.kernels.linear`, 64 or 128 features by 16 to 128 tokens, steps of 32 to 128 columns. A word's
nibbles stand in the registers of a lane in the order of the codes, so the weight is not moved; K is split for few tokens.

Bound by reading the weight up to some hundred tokens, then by tensor cores at twice their 16-bit rate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyquant.kernels.int4 import STRIP, SYMMETRIC_ZERO, UNIT_K, UNIT_WORDS, nibble, scale_position
from pyquant.kernels.linear import add_parts, plan
from pyquant.kernels.tiles import choose, gpu


@triton.jit
def words_to_positions(words, UNITS: tl.constexpr, STRIPS: tl.constexpr, WORDS: tl.constexpr):
    """Words ``[UNITS, STRIPS, 128 threads, WORDS]`` to codes 0..15 ``[64 * STRIPS rows, 16 * WORDS * UNITS positions]``."""
    low = tl.join(tl.join(nibble(words, 0), nibble(words, 4)), tl.join(nibble(words, 2), nibble(words, 6)))
    high = tl.join(tl.join(nibble(words, 1), nibble(words, 5)), tl.join(nibble(words, 3), nibble(words, 7)))
    #                                       unit   strip   warp g  c  word   second upper h
    parts = tl.reshape(tl.join(low, high), UNITS, STRIPS, 4, 8, 4, WORDS, 2, 2, 2)
    # row = (strip, warp, h, g), position = (unit, word, c, second, upper)
    parts = tl.permute(parts, 1, 2, 8, 3, 0, 5, 4, 6, 7)
    return tl.reshape(parts, 64 * STRIPS, 16 * WORDS * UNITS)


@triton.jit
def _linear_kernel(
    out_ptr, codes_ptr, act_ptr, qweight_ptr, scale_ptr, zero_ptr, bias_ptr, m, n, k, columns, units, groups, group_size,
    act_group_size, act_stride_m, act_stride_g,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACT_GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, STRIPS: tl.constexpr,
    UNITS: tl.constexpr, WORDS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of part number program_id(1) of y when K is split."""
    BLOCK_N: tl.constexpr = STRIP * STRIPS
    STEP_K: tl.constexpr = 16 * WORDS * UNITS
    m_tiles = tl.cdiv(m, BLOCK_M)
    m_tile = tl.program_id(0) % m_tiles  # neighbours share the weight: it is read from memory once
    n_tile = tl.program_id(0) // m_tiles
    part = tl.program_id(1)

    strips = tl.cdiv(n, STRIP)
    unit = tl.arange(0, UNITS)[:, None, None, None]
    strip = n_tile * STRIPS + tl.arange(0, STRIPS)[None, :, None, None]
    thread = tl.arange(0, 128)[None, None, :, None]
    word = tl.arange(0, WORDS)[None, None, None, :]
    words_base = qweight_ptr + strip.to(tl.int64) * units * UNIT_WORDS + thread * 4 + word

    feature = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    scale_base = (feature // STRIP).to(tl.int64) * groups * STRIP + scale_position(feature % STRIP)
    has_strip = feature // STRIP < strips
    token = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    codes_base = codes_ptr + token.to(tl.int64)[:, None] * columns

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(STEPS):
        step = part * STEPS + i
        first = step * STEP_K
        at = first // UNIT_K + unit
        words = words_base + at * UNIT_WORDS + step % (4 // WORDS) * WORDS  # a step of 32 columns is half a unit
        words = tl.load(words, mask=(strip < strips) & (at < units), other=0)
        position = first + tl.arange(0, STEP_K)
        codes = tl.load(
            codes_base + position[None, :], mask=(token < m)[:, None] & (position < columns)[None, :], other=0
        )  # codes past K are 0, so what the weight has there does not matter
        group = first // group_size
        valid = has_strip & (group < groups)
        scale = tl.load(scale_ptr + scale_base + group * STRIP, mask=valid, other=0.0).to(tl.float32)
        steps = words_to_positions(words, UNITS, STRIPS, WORDS)
        if HAS_ZERO:
            steps -= tl.load(zero_ptr + scale_base + group * STRIP, mask=valid, other=0).to(tl.int32)[:, None]
        else:
            steps -= SYMMETRIC_ZERO
        exact = tl.dot(steps.to(tl.int8), tl.trans(codes), out_dtype=tl.int32)
        value = exact.to(tl.float32) * scale[:, None]
        if ACT_GROUPS:
            own = token.to(tl.int64) * act_stride_m + (first // act_group_size).to(tl.int64) * act_stride_g
            value *= tl.load(act_ptr + own, mask=(token < m) & (first < k), other=0.0)[None, :]
        acc += value

    if not ACT_GROUPS:
        acc *= tl.load(act_ptr + token.to(tl.int64) * act_stride_m, mask=token < m, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + feature, mask=feature < n, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + (part.to(tl.int64) * m + token[:, None]) * n + feature[None, :]
    tl.store(out, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=(token < m)[:, None] & (feature < n)[None, :])


def linear_w4a8(
    y: Tensor, codes: Tensor, act_scale: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    k: int, group_size: int, act_group_size: int,
) -> None:  # fmt: skip
    """Fill y.

    Args:
        y: ``[M, N]`` 16-bit or fp32, contiguous.
        codes: int8 ``[M, K padded to 64]``, contiguous.
        act_scale: fp32 ``[M, groups]``, any strides.
        qweight: int32 ``[ceil(N/64), ceil(K/64), 128, 4]``, contiguous.
        scale: 16-bit float ``[ceil(N/64), padded groups, 64]``, tiled.
        zero: uint8, tiled like scale, or None for symmetric.
        bias: ``[N]`` float, contiguous, or None.
        k: true K.
        group_size, act_group_size: 32, 64, 128 or -1.
    """
    m, n = y.shape
    finest = min((g for g in (group_size, act_group_size) if g > 0), default=-1)
    tiles, splits, constants = plan(m, n, k, finest, choose("forward", m, *gpu(y.device)))
    out = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=y.device)
    epilogue_bias = bias if splits == 1 else None
    units, groups = qweight.shape[1], scale.shape[1]
    whole = max(units, 2) * UNIT_K.value  # a group that no step leaves
    _linear_kernel[(tiles, splits)](
        out, codes, act_scale, qweight, scale, zero, epilogue_bias, m, n, k, codes.shape[1], units, groups,
        whole if group_size == -1 else group_size, whole if act_group_size == -1 else act_group_size, *act_scale.stride(),
        HAS_ZERO=zero is not None, HAS_BIAS=epilogue_bias is not None, ACT_GROUPS=act_group_size != -1, **constants,
    )  # fmt: skip
    if splits > 1:
        add_parts(y, out, bias)
