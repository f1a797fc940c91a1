"""linear_w4a16: a product of 16-bit activations and a 4-bit weight, the weight expanded in registers.

What it computes::

    y[m, n] = sum over groups g of  scale[n, g] * ( sum over k in g of (code[n, k] - zero[n, g]) * x[m, k] )  + bias[n]

The inner sum runs on tensor cores over small integers, exact in bf16 and fp16; the scale multiplies fp32 sums, so w_hat
is never rounded to 16 bits.

Layouts: x ``[M, K]`` any strides, qweight ``[strips, units, 128, 4]``, scale and zero tiled
``[strips, padded groups, 64]``, y ``[M, N]`` contiguous, partial sums ``[splits, M, N]`` fp32.

Tiles: the weight is the A operand, as in the tiled order: BLOCK_N = 64 * STRIPS features by BLOCK_M tokens, in steps of
16 * WORDS * UNITS columns that lie in one group (32, 64 or 128)::

                 K ->  step    step    step                        x^T  step x BLOCK_M
    strips  | words[UNITS, STRIPS, 128 threads, WORDS] | ...     @           |
                          unpack: (word >> 4j) & 15                   v
                                                         acc[BLOCK_N, BLOCK_M] += scale * ((codes - zero) @ x^T)

Bound by reading the weight, N * K / 2 bytes, up to M of about 64; few tokens leave too few tiles for the machine, so K
is split between programs and a second kernel adds the parts in a fixed order (no atomics: the same bits every time).
Bound by tensor cores and by unpacking each weight M / BLOCK_M times for large M.

Chosen by reading the generated code, not by timing. On sm_90 the words go from cp.async through one 16-byte shared load
to the lanes that unpack them, and the codes feed wgmma from registers. Tried and lost:

* unpacking with a broadcast shift along a new axis: Triton deals the nibbles of a word out to eight lanes, and 64
  two-byte stores a thread and step carry the codes to the right ones (and zeros are loaded 64 times);
* one axis for the words of two units: half of a warp's lanes get the wrong unit, with the same detour for words;
* the general expression for a word's address: Triton no longer sees 16-byte alignment and copies 4 bytes at a time.
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
from pyquant.kernels.tiles import Tile, choose, gpu

MAX_SPLITS = 8  # the parts cost splits * M * N * 8 bytes of traffic
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_SUM_BLOCK = 512  # features of a program that adds parts: 16 bytes a thread
MIN_STEPS = 4  # a program needs some steps for its pipeline


@triton.jit(do_not_specialize=["m"])  # one compilation for any number of tokens that take the same tile
def _linear_kernel(
    out_ptr, x_ptr, qweight_ptr, scale_ptr, zero_ptr, bias_ptr, m, n, k, units, groups, group_size,
    x_stride_m, x_stride_k,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, STRIPS: tl.constexpr,
    UNITS: tl.constexpr, WORDS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of part number program_id(1) of y when K is split: the steps from STEPS * part on."""
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
    x_base = x_ptr + token.to(tl.int64)[:, None] * x_stride_m

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(STEPS):
        step = part * STEPS + i
        first = step * STEP_K
        at = first // UNIT_K + unit
        words = words_base + at * UNIT_WORDS + step % (4 // WORDS) * WORDS  # a step of 32 columns is half a unit
        words = tl.load(words, mask=(strip < strips) & (at < units), other=0)
        col = first + tl.arange(0, STEP_K)
        mask = (token < m)[:, None] & (col < k)[None, :]  # columns past K are 0 in x, so their codes do not matter
        x = tl.load(x_base + col[None, :].to(tl.int64) * x_stride_k, mask=mask, other=0.0)

        group = first // group_size
        valid = has_strip & (group < groups)
        scale = tl.load(scale_ptr + scale_base + group * STRIP, mask=valid, other=0.0).to(tl.float32)
        steps = code_to_float(words_to_tile(words, UNITS, STRIPS, WORDS))
        if HAS_ZERO:
            steps -= tl.load(zero_ptr + scale_base + group * STRIP, mask=valid, other=0).to(tl.float32)[:, None]
        else:
            steps -= SYMMETRIC_ZERO
        acc += tl.dot(steps.to(x.dtype), tl.trans(x), input_precision="ieee") * scale[:, None]

    if HAS_BIAS:
        acc += tl.load(bias_ptr + feature, mask=feature < n, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + (part.to(tl.int64) * m + token[:, None]) * n + feature[None, :]
    tl.store(out, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=(token < m)[:, None] & (feature < n)[None, :])


@triton.jit(do_not_specialize=["m"])
def _sum_parts_kernel(
    y_ptr, parts_ptr, bias_ptr, m, n, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = sum of the parts (+ bias): BLOCK features of one token."""
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1)
    mask = feature < n
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLITS):
        acc += tl.load(parts_ptr + (part * m + token).to(tl.int64) * n + feature, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + feature, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token.to(tl.int64) * n + feature, acc.to(y_ptr.dtype.element_ty), mask=mask)


def plan(m: int, n: int, k: int, group_size: int, tile: Tile) -> tuple[int, int, dict[str, int]]:
    """(programs over tiles, splits of K, compile constants) for a product of these sizes."""
    # a step lies in one group; two units a step halve the work on scales, but mma.sync has not the registers for them
    units, words = {32: (1, 2), 64: (1, 4)}.get(group_size, (tile.units, 4))
    steps = max(1, triton.cdiv(k, 16 * words * units))
    tiles = triton.cdiv(m, tile.tokens) * triton.cdiv(n, STRIP.value * tile.strips)
    splits = max(1, min(tile.programs // tiles, MAX_SPLITS, steps // MIN_STEPS))
    per_split = triton.cdiv(steps, splits)
    constants = {"BLOCK_M": tile.tokens, "STRIPS": tile.strips, "UNITS": units, "WORDS": words, "STEPS": per_split}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return tiles, triton.cdiv(steps, per_split), {**constants, **options}


def add_parts(y: Tensor, parts: Tensor, bias: Tensor | None) -> None:
    """Fill y ``[M, N]`` with the sum of parts ``[splits, M, N]`` fp32, plus bias ``[N]``, in this order."""
    m, n = y.shape
    _sum_parts_kernel[(triton.cdiv(n, _SUM_BLOCK), m)](
        y, parts, bias, m, n, HAS_BIAS=bias is not None, SPLITS=len(parts), BLOCK=_SUM_BLOCK
    )


def linear_w4a16(
    y: Tensor,
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    tile: Tile | None = None,
) -> None:
    """Fill y with ``x @ w_hat.T + bias``.

    Args:
        y: ``[M, N]`` in x's dtype, contiguous.
        x: ``[M, K]`` bf16 or fp16, any strides.
        qweight: int32 ``[ceil(N/64), ceil(K/64), 128, 4]``, contiguous.
        scale: 16-bit float ``[ceil(N/64), padded groups, 64]``, tiled.
        zero: uint8, tiled like scale, or None for symmetric.
        bias: ``[N]`` float, contiguous, or None.
        group_size: 32, 64, 128 or -1.
        tile: how to compute, instead of what :mod:`pyquant.kernels.tiles` says.

    Raises:
        NotImplementedError: bf16 in Triton's interpreter.
    """
    (m, n), k = y.shape, x.shape[1]
    if y.numel() == 0:
        return
    if _INTERPRETED and x.dtype == torch.bfloat16:
        raise NotImplementedError("Triton's interpreter multiplies the bits of bfloat16 as integers; use float16 there")
    tile = tile or choose("forward", m, *gpu(x.device))
    tiles, splits, constants = plan(m, n, k, group_size, tile)
    out = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=y.device)
    epilogue_bias = bias if splits == 1 else None
    units, groups = qweight.shape[1], scale.shape[1]
    _linear_kernel[(tiles, splits)](
        out, x, qweight, scale, zero, epilogue_bias, m, n, k, units, groups,
        max(units, 2) * UNIT_K.value if group_size == -1 else group_size, *x.stride(),
        HAS_ZERO=zero is not None, HAS_BIAS=epilogue_bias is not None, **constants,
    )  # fmt: skip
    if splits > 1:
        add_parts(y, out, bias)
