"""quantize_int4 and dequantize_int4: between float weights and the tiled order.

What they compute::

    quantize_int4     code[n, k]  = clamp(round(w[n, k] / scale[n, k / G]) + zero[n, k / G])     -> qweight
    dequantize_int4   w_hat[n, k] = (code[n, k] - zero[n, k / G]) * scale[n, k / G]              <- qweight

Layouts: w ``[N, K]`` any strides, scale and zero ``[N, ceil(K/G)]`` for quantize_int4 and tiled
``[strips, padded groups, 64]`` for dequantize_int4, qweight ``[strips, units, 128, 4]``, w_hat ``[N, K]`` contiguous.

Tiles: one program is one unit of 64 x 64 codes, so a program writes (reads) one run of 2 KB of qweight::

    program p      strip p / units, unit p % units
                   64 rows x 64 columns of w     <->     512 words

Bound by memory: N * K * (2 + 1/2) bytes for 16-bit weights.

Exactness: the division is IEEE and the rounding half-to-even, so codes equal the reference's bit for bit, as does w_hat
(one fp32 product, one rounding).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyquant.kernels.int4 import (
    STRIP,
    SYMMETRIC_ZERO,
    UNIT_K,
    UNIT_WORDS,
    clamp,
    code_to_float,
    round_half_even,
    scale_position,
    tile_to_words,
    words_to_tile,
)


@triton.jit
def _quantize_kernel(
    out_ptr, w_ptr, scale_ptr, zero_ptr, n, k, units, group_size,
    w_stride_n, w_stride_k, scale_stride_n, scale_stride_g, zero_stride_n, zero_stride_g, low, high,
    HAS_ZERO: tl.constexpr, ONE_GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // units) * STRIP + tl.arange(0, STRIP)[:, None]  # [64, 1]
    col = (program % units) * UNIT_K + tl.arange(0, UNIT_K)[None, :]  # [1, 64]
    inside = (row < n) & (col < k)
    wide_row = row.to(tl.int64)  # N * K may pass 2^31
    if ONE_GROUP:  # a unit lies in one group: one scale a row, [64, 1]
        group = (program % units) * UNIT_K // group_size
        has_scale = row < n
    else:
        group = col // group_size
        has_scale = inside
    w = tl.load(w_ptr + wide_row * w_stride_n + col.to(tl.int64) * w_stride_k, mask=inside, other=0.0).to(tl.float32)
    at = wide_row * scale_stride_n + group * scale_stride_g
    scale = tl.load(scale_ptr + at, mask=has_scale, other=1.0).to(tl.float32)
    # far outside the codes the exact value no longer matters, and the rounding is valid
    steps = round_half_even(clamp(tl.div_rn(w, scale), -65536.0, 65536.0))
    if HAS_ZERO:
        at = wide_row * zero_stride_n + group * zero_stride_g
        codes = clamp(steps + tl.load(zero_ptr + at, mask=has_scale, other=0.0).to(tl.float32), low, high)
    else:
        codes = clamp(steps, low, high) + SYMMETRIC_ZERO
    codes = tl.where(inside, codes.to(tl.int32), SYMMETRIC_ZERO)
    tl.store(out_ptr + program.to(tl.int64) * UNIT_WORDS + tl.arange(0, UNIT_WORDS), tile_to_words(codes))


def quantize_int4(out: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> None:
    """Fill ``out`` with the codes of w.

    Args:
        out: int32 ``[ceil(N/64), ceil(K/64), 128, 4]``, contiguous; padding is written too (code 8).
        w: ``[N, K]`` bf16, fp16 or fp32, any strides.
        scale, zero: float ``[N, ceil(K/G)]``, any strides; zero holds integers, None means symmetric.
        group_size: any G >= 1, or -1.
        bits: 2..4.
    """
    if out.numel() == 0:
        return
    (n, k), (strips, units) = w.shape, out.shape[:2]
    half = 1 << (bits - 1)
    low, high = (-half, half - 1) if zero is None else (0, 2 * half - 1)
    _quantize_kernel[(strips * units,)](
        out, w, scale, zero, n, k, units, k if group_size == -1 else group_size,
        *w.stride(), *scale.stride(), *((0, 0) if zero is None else zero.stride()), float(low), float(high),
        HAS_ZERO=zero is not None, ONE_GROUP=group_size % UNIT_K.value == 0 or group_size == -1,
    )  # fmt: skip


@triton.jit
def _dequantize_kernel(
    out_ptr, qweight_ptr, scale_ptr, zero_ptr, n, k, units, groups, group_size,
    HAS_ZERO: tl.constexpr, UNIT_GROUPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    strip = program // units
    unit = program % units
    thread = tl.arange(0, 128)[None, None, :, None]
    word = tl.arange(0, 4)[None, None, None, :]
    words = tl.load(qweight_ptr + program.to(tl.int64) * UNIT_WORDS + thread * 4 + word)
    codes = tl.reshape(words_to_tile(words, 1, 1, 4), STRIP, UNIT_GROUPS, UNIT_K // UNIT_GROUPS)

    local_row = tl.arange(0, STRIP)
    group = unit * UNIT_K // group_size + tl.arange(0, UNIT_GROUPS)
    at = (strip.to(tl.int64) * groups + group[None, :]) * STRIP + scale_position(local_row)[:, None]
    valid = (group < groups)[None, :]
    scale = tl.load(scale_ptr + at, mask=valid, other=0.0).to(tl.float32)  # [64, UNIT_GROUPS]
    if HAS_ZERO:
        zero = tl.load(zero_ptr + at, mask=valid, other=0).to(tl.float32)
        steps = code_to_float(codes) - zero[:, :, None]
    else:
        steps = code_to_float(codes) - SYMMETRIC_ZERO
    w_hat = tl.reshape(steps * scale[:, :, None], STRIP, UNIT_K)

    row = strip * STRIP + local_row[:, None]
    col = unit * UNIT_K + tl.arange(0, UNIT_K)[None, :]
    out = out_ptr + row.to(tl.int64) * k + col
    tl.store(out, w_hat.to(out_ptr.dtype.element_ty), mask=(row < n) & (col < k))


def dequantize_int4(out: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> None:
    """Fill ``out`` with w_hat.

    Args:
        out: ``[N, K]`` bf16, fp16 or fp32, contiguous.
        qweight: int32 ``[ceil(N/64), ceil(K/64), 128, 4]``, contiguous.
        scale: bf16, fp16 or fp32 ``[ceil(N/64), padded groups, 64]``, tiled.
        zero: uint8, tiled like scale, or None for symmetric.
        group_size: 32, 64, 128 or -1.
    """
    if out.numel() == 0:
        return
    (n, k), (strips, units) = out.shape, qweight.shape[:2]
    group_columns = UNIT_K.value * units if group_size == -1 else group_size
    _dequantize_kernel[(strips * units,)](
        out, qweight, scale, zero, n, k, units, scale.shape[1], group_columns,
        HAS_ZERO=zero is not None, UNIT_GROUPS=2 if group_size == 32 else 1,
    )  # fmt: skip
