"""fake_quant: quantize and dequantize at once, forward and backward, with straight-through or soft slopes.

What it computes, with v = w / scale, z = clamp(round(zero)), x = v + z, q = clamp(round(v) + z), h' the slope of the rounding
over the clamp and u the forward's value in steps (without a zero, z = 0 and the codes are symmetric)::

    forward    out = u * scale                    u = q - z, or with SOFT f(c(x)) - z
    backward   dw     = grad h'
               dscale = sum over the group of grad (u - v h')           * grad_scale
               dzero  = sum over the group of grad scale (h' - 1)       * grad_scale

f and c are those of ``reference.soft_round`` and ``reference.soft_clamp``. NEAR takes one gate of the soft clamp, that of the
edge on x's side of the middle m, as e = |x - m| - half, c = m + sign(x - m) (half + e g(-e)), c' = g(-e) - e g'(-e): the
other gate changes a slope by less than 2^-17 where beta * half >= 15.

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

from pyquant.kernels.int4 import clamp_keeping_nan as clamp
from pyquant.kernels.int4 import round_half_even

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
def _slope_of_sigmoid(z):
    """sig(z) sig(-z), in a form that never overflows."""
    e = tl.exp(-tl.abs(z))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _gate(z, PHI: tl.constexpr):
    """(g(z), g'(z)) of the gate at unit sharpness."""
    if PHI:
        return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476), tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        return tl.sigmoid(z), _slope_of_sigmoid(z)


@triton.jit
def _soft_clamp(x, low, high, beta, CLAMP: tl.constexpr, NEAR: tl.constexpr):
    """(c, c') of x in codes. CLAMP 0 hard, 1 sigmoid, 2 phi."""
    if CLAMP == 0:
        return clamp(x, low, high), tl.where((x >= low) & (x <= high), 1.0, 0.0)
    else:
        b = beta
        if CLAMP == 2:
            b = beta / 1.702
        if NEAR:
            half = 0.5 * (high - low)
            middle = 0.5 * (high + low)
            e = tl.abs(x - middle) - half
            g, d = _gate(-b * e, CLAMP == 2)
            y = half + e * g
            return middle + tl.where(x < middle, -y, y), g - b * e * d
        else:
            above, d_above = _gate(b * (x - low), CLAMP == 2)
            below, d_below = _gate(b * (high - x), CLAMP == 2)
            c = x * above * below + low * (1.0 - above) + high * (1.0 - below)
            return c, above * below + b * (d_above * (x * below - low) + d_below * (high - x * above))


@triton.jit
def _soft_round(c, t, ROUND: tl.constexpr):
    """(f, f') of c in codes at temperature t. ROUND 0 straight-through, 1 and 2 the readings A and B."""
    if ROUND == 0:
        return round_half_even(c), 1.0
    elif ROUND == 1:
        n = round_half_even(c)
        u = c - n + 0.5
        f = n - 1.0 + tl.sigmoid(t * u) + tl.sigmoid(t * (u - 1.0))
        return f, t * (_slope_of_sigmoid(t * u) + _slope_of_sigmoid(t * (u - 1.0)))
    else:
        n = tl.floor(c)
        r = c - n - 0.5
        norm = 2.0 * tl.sigmoid(0.5 * t) - 1.0
        return n + 0.5 + (tl.sigmoid(t * r) - 0.5) / norm, t * _slope_of_sigmoid(t * r) / norm


@triton.jit
def _soft(
    v, z, low, high, beta, temperature_ptr,
    HAS_ZERO: tl.constexpr, ROUND: tl.constexpr, CLAMP: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """(f(c(x)) - z, f'(c(x)) c'(x)) at x = v + z."""
    x = clamp(v, -65536.0, 65536.0)  # far outside both are constant, and nothing overflows
    if HAS_ZERO:
        x += z
    t = 0.0
    if ROUND != 0:
        t = tl.load(temperature_ptr)
    c, c_slope = _soft_clamp(x, low, high, beta, CLAMP, NEAR)
    f, f_slope = _soft_round(c, t, ROUND)
    if HAS_ZERO:
        f -= z
    return f, f_slope * c_slope


@triton.jit
def _forward_kernel(
    out_ptr, w_ptr, scale_ptr, zero_ptr, temperature_ptr, n, k, groups, group_size,
    w_stride_n, w_stride_k, scale_stride_n, scale_stride_g, zero_stride_n, zero_stride_g, low, high, beta,
    HAS_ZERO: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    ROUND: tl.constexpr, CLAMP: tl.constexpr, NEAR: tl.constexpr, SOFT: tl.constexpr,
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
        v = tl.div_rn(w.to(tl.float32), s)
        if SOFT:
            steps, _ = _soft(v, z, low, high, beta, temperature_ptr, HAS_ZERO, ROUND, CLAMP, NEAR)
        else:
            steps, _ = _round(v, z, low, high, HAS_ZERO)
        tl.store(out_ptr + row[:, None] * k + col, (steps * s).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dw_ptr, dscale_ptr, dzero_ptr, grad_ptr, w_ptr, scale_ptr, zero_ptr, temperature_ptr, n, k, groups, group_size,
    grad_stride_n, grad_stride_k, w_stride_n, w_stride_k,
    scale_stride_n, scale_stride_g, zero_stride_n, zero_stride_g, low, high, beta, grad_scale,
    HAS_ZERO: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    ROUND: tl.constexpr, CLAMP: tl.constexpr, NEAR: tl.constexpr, SOFT: tl.constexpr,
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
        g = g.to(tl.float32)  # masked lanes have g = 0 and add nothing
        v = tl.div_rn(w, s)
        steps, inside = _round(v, z, low, high, HAS_ZERO)
        if ROUND == 0 and CLAMP == 0:
            dw = tl.where(inside, g, 0.0)
            scale_sum += g * tl.where(inside, steps - v, steps)
        else:
            value, slope = _soft(v, z, low, high, beta, temperature_ptr, HAS_ZERO, ROUND, CLAMP, NEAR)
            if SOFT:
                steps = value
            if CLAMP == 0:
                slope = tl.where(inside, slope, 0.0)
            dw = g * slope
            scale_sum += g * tl.where(slope == 0.0, steps, steps - v * slope)
        tl.store(dw_ptr + row[:, None] * k + col, dw.to(dw_ptr.dtype.element_ty), mask=mask)
        if HAS_ZERO:
            zero_sum += (dw - g) * s
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


def _modes(rounding: str, clamp_name: str, beta: float, soft_forward: bool, codes: tuple[float, float]) -> dict:
    """The constants that pick a surrogate; one kernel serves all beta on the same side of NEAR's bound."""
    hard = (rounding, clamp_name) == ("ste", "hard")
    return {
        "ROUND": ("ste", "sigmoid-a", "sigmoid-b").index(rounding),
        "CLAMP": ("hard", "sigmoid", "phi").index(clamp_name),
        "NEAR": clamp_name != "hard" and beta * (codes[1] - codes[0]) / 2 >= 15,
        "SOFT": soft_forward and not hard,
    }


def fake_quant(
    out: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    rounding: str = "ste",
    clamp: str = "hard",
    temperature: Tensor | None = None,
    beta: float = 10.0,
    soft_forward: bool = False,
) -> None:
    """Fill ``out`` with the quantized value of w, bit-identical to the reference unless ``soft_forward``.

    Args:
        out: ``[N, K]`` in w's dtype, contiguous.
        w: ``[N, K]`` bf16, fp16 or fp32, any strides.
        scale, zero: float ``[N, ceil(K/G)]``, any strides; zero None means symmetric.
        group_size: any G >= 1, or -1.
        bits: 2..8.
        rounding, clamp, temperature, beta, soft_forward: as in :func:`pyquant.fake_quant`; temperature a tensor.
    """
    if out.numel() == 0:
        return
    programs, sizes, codes, constants = _plan(w, scale, zero, group_size, bits)
    zero_strides = (0, 0) if zero is None else zero.stride()
    modes = _modes(rounding, clamp, beta, soft_forward, codes)
    if not modes["SOFT"]:
        modes |= {"ROUND": 0, "CLAMP": 0, "NEAR": False}  # the exact forward is one kernel for all of them
    _forward_kernel[(programs,)](
        out, w, scale, zero, temperature if modes["ROUND"] else None, *sizes,
        *w.stride(), *scale.stride(), *zero_strides, *codes, beta, **constants, **modes,
    )  # fmt: skip


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
    rounding: str = "ste",
    clamp: str = "hard",
    temperature: Tensor | None = None,
    beta: float = 10.0,
    soft_forward: bool = False,
) -> None:
    """Fill the gradients of :func:`fake_quant`.

    Args:
        dw: ``[N, K]`` in w's dtype, contiguous.
        dscale: ``[N, ceil(K/G)]`` in scale's dtype, contiguous.
        dzero: like dscale in zero's dtype, or None without a zero.
        grad: ``[N, K]`` float, any strides.
        w, scale, zero, group_size, bits: as in the forward.
        grad_scale: factor on dscale and dzero.
        rounding, clamp, temperature, beta, soft_forward: as in the forward.
    """
    if dw.numel() == 0:
        dscale.zero_()
        if dzero is not None:
            dzero.zero_()
        return
    programs, sizes, codes, constants = _plan(w, scale, zero, group_size, bits)
    zero_strides = (0, 0) if zero is None else zero.stride()
    modes = _modes(rounding, clamp, beta, soft_forward, codes)
    _backward_kernel[(programs,)](
        dw, dscale, dzero, grad, w, scale, zero, temperature if modes["ROUND"] else None, *sizes,
        *grad.stride(), *w.stride(), *scale.stride(), *zero_strides, *codes, beta, grad_scale, **constants, **modes,
    )  # fmt: skip
