"""fake_quant: quantize and dequantize at once, forward and backward.

What it computes, with v = w / scale, z = clamp(round(zero)), q = clamp(round(v) + z) and "inside" where v + z lies
within the codes (without a zero, z = 0 and the codes are symmetric)::

    forward    out = (q - z) * scale
    backward   dw     = grad                          inside, 0 outside
               dscale = sum over the group of grad * ((q - z) - v) inside, grad * (q - z) outside       * grad_scale
               dzero  = sum over the group of 0 inside, -grad * scale outside                           * grad_scale

Layouts: w and grad ``[N, K]`` any strides; scale and zero ``[N, ceil(K/G)]`` any strides; results contiguous.

Tiles: the weight is a list of segments, one per (row, group), and a program takes SEGMENTS of them whole. A short group
is one step; a long row (per channel) is walked BLOCK columns at a time::

    segment 0   | row 0, columns 0 .. G-1     |      SEGMENTS x BLOCK = 2048 elements a step
    segment 1   | row 0, columns G .. 2G-1    |      the sums of a segment stay in registers until its end:
    ...         |                             |      one launch, no atomics, the same bits every time

Bound by memory: 2 + 2 bytes an element forward, 2 + 2 + 2 backward (16-bit weights); the division hides behind it.
A short last group leaves its lanes idle, nothing more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyquant.kernels.int4 import clamp, round_half_even

_STEP = 2048  # elements of a program's step: 16 per thread of 4 warps


@triton.jit
def _load_group(ptr, row, group, stride_n, stride_g, valid, other: tl.constexpr):
    """fp32 ``[SEGMENTS, 1]``: the scale or zero of each segment."""
    at = row.to(tl.int64) * stride_n + group * stride_g
    return tl.load(ptr + at, mask=valid, other=other).to(tl.float32)[:, None]


@triton.jit
def _round(v, z, low, high, HAS_ZERO: tl.constexpr):
    """(q - z, inside) for v = w / scale. Beyond +-2^16 every code is clamped, and below it the rounding is exact."""
    near = round_half_even(clamp(v, -65536.0, 65536.0))
    if HAS_ZERO:
        steps = clamp(near + z, low, high) - z
        inside = (v + z >= low) & (v + z <= high)
    else:
        steps = clamp(near, low, high)
        inside = (v >= low) & (v <= high)
    return steps, inside


@triton.jit
def _forward_kernel(
    out_ptr, w_ptr, scale_ptr, zero_ptr, n, k, groups, group_size,
    w_stride_n, w_stride_k, scale_stride_n, scale_stride_g, zero_stride_n, zero_stride_g, low, high,
    HAS_ZERO: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    row = segment // groups
    group = (segment % groups).to(tl.int32)
    valid = row < n
    s = _load_group(scale_ptr, row, group, scale_stride_n, scale_stride_g, valid, 1.0)
    z = s
    if HAS_ZERO:
        z = _load_group(zero_ptr, row, group, zero_stride_n, zero_stride_g, valid, 0.0)
        z = round_half_even(clamp(z, low, high))
    first = group * group_size
    last = tl.minimum(first + group_size, k)
    for step in range(STEPS):
        col = first[:, None] + step * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = valid[:, None] & (col < last[:, None])
        w = tl.load(w_ptr + row[:, None] * w_stride_n + col.to(tl.int64) * w_stride_k, mask=mask, other=0.0)
        steps, _ = _round(tl.div_rn(w.to(tl.float32), s), z, low, high, HAS_ZERO)
        tl.store(out_ptr + row[:, None] * k + col, (steps * s).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dw_ptr, dscale_ptr, dzero_ptr, grad_ptr, w_ptr, scale_ptr, zero_ptr, n, k, groups, group_size,
    grad_stride_n, grad_stride_k, w_stride_n, w_stride_k,
    scale_stride_n, scale_stride_g, zero_stride_n, zero_stride_g, low, high, grad_scale,
    HAS_ZERO: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    row = segment // groups
    group = (segment % groups).to(tl.int32)
    valid = row < n
    s = _load_group(scale_ptr, row, group, scale_stride_n, scale_stride_g, valid, 1.0)
    z = s
    if HAS_ZERO:
        z = _load_group(zero_ptr, row, group, zero_stride_n, zero_stride_g, valid, 0.0)
        z = round_half_even(clamp(z, low, high))
    first = group * group_size
    last = tl.minimum(first + group_size, k)
    scale_sum = tl.zeros((SEGMENTS, BLOCK), tl.float32)
    zero_sum = tl.zeros((SEGMENTS, BLOCK), tl.float32)
    for step in range(STEPS):
        col = first[:, None] + step * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = valid[:, None] & (col < last[:, None])
        wide_col = col.to(tl.int64)
        w = tl.load(w_ptr + row[:, None] * w_stride_n + wide_col * w_stride_k, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + row[:, None] * grad_stride_n + wide_col * grad_stride_k, mask=mask, other=0.0)
        v = tl.div_rn(w, s)
        steps, inside = _round(v, z, low, high, HAS_ZERO)
        dw = tl.where(inside, g.to(tl.float32), 0.0)
        tl.store(dw_ptr + row[:, None] * k + col, dw.to(dw_ptr.dtype.element_ty), mask=mask)
        # masked lanes have g = 0 and add nothing
        scale_sum += g.to(tl.float32) * tl.where(inside, steps - v, steps)
        if HAS_ZERO:
            zero_sum += tl.where(inside, 0.0, -g.to(tl.float32) * s)
    dscale = tl.sum(scale_sum, axis=1) * grad_scale
    tl.store(dscale_ptr + segment, dscale.to(dscale_ptr.dtype.element_ty), mask=valid)
    if HAS_ZERO:
        dzero = tl.sum(zero_sum, axis=1) * grad_scale
        tl.store(dzero_ptr + segment, dzero.to(dzero_ptr.dtype.element_ty), mask=valid)


def _plan(w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> tuple[int, tuple, tuple, dict]:
    """(programs, sizes, code range, constants) shared by both directions."""
    n, k = w.shape
    groups, group_size = scale.shape[1], k if group_size == -1 else min(group_size, k)
    block = min(triton.next_power_of_2(group_size), _STEP)
    segments = _STEP // block
    half = 1 << (bits - 1)
    low, high = (-half, half - 1) if zero is None else (0, 2 * half - 1)
    # STEPS is a constant: the compiler unrolls short loops, and a model has few different K
    constants = {
        "HAS_ZERO": zero is not None, "SEGMENTS": segments, "BLOCK": block, "STEPS": triton.cdiv(group_size, block),
    }  # fmt: skip
    return triton.cdiv(n * groups, segments), (n, k, groups, group_size), (float(low), float(high)), constants


def fake_quant(out: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> None:
    """Fill ``out`` with the quantized value of w, bit-identical to the reference.

    Args:
        out: ``[N, K]`` in w's dtype, contiguous.
        w: ``[N, K]`` bf16, fp16 or fp32, any strides.
        scale, zero: float ``[N, ceil(K/G)]``, any strides; zero None means symmetric.
        group_size: any G >= 1, or -1.
        bits: 2..8.
    """
    if out.numel() == 0:
        return
    programs, sizes, codes, constants = _plan(w, scale, zero, group_size, bits)
    zero_strides = (0, 0) if zero is None else zero.stride()
    _forward_kernel[(programs,)](
        out, w, scale, zero, *sizes, *w.stride(), *scale.stride(), *zero_strides, *codes, **constants
    )


def fake_quant_backward(
    dw: Tensor,
    dscale: Tensor,
    dzero: Tensor | None,
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    grad_scale: float,
) -> None:
    """Fill the gradients of :func:`fake_quant`.

    Args:
        dw: ``[N, K]`` in w's dtype, contiguous.
        dscale: ``[N, ceil(K/G)]`` in scale's dtype, contiguous.
        dzero: like dscale in zero's dtype, or None without a zero.
        grad: ``[N, K]`` float, any strides.
        w, scale, zero, group_size, bits: as in the forward.
        grad_scale: factor on dscale and dzero.
    """
    if dw.numel() == 0:
        dscale.zero_()
        if dzero is not None:
            dzero.zero_()
        return
    programs, sizes, codes, constants = _plan(w, scale, zero, group_size, bits)
    zero_strides = (0, 0) if zero is None else zero.stride()
    _backward_kernel[(programs,)](
        dw, dscale, dzero, grad, w, scale, zero, *sizes,
        *grad.stride(), *w.stride(), *scale.stride(), *zero_strides, *codes, grad_scale, **constants,
    )  # fmt: skip
