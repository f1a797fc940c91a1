"""8-bit activations: dynamic quantization, and the product of its codes with a 4-bit weight."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant.formats import act8, int4
from pyquant.formats.spec import num_groups
from pyquant.reference.decode import rms_norm, silu_and_mul
from pyquant.reference.weights import wide

LEAST_SCALE = 1e-12  # of a group of zeros


def quantize_activation(
    x: Tensor, bits: int, group_size: int, clip: float, dtype: torch.dtype, sum_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and sums of ``x [..., K]``: see :mod:`pyquant.formats.act8`. Quotients in fp32, ties to even::

    scale = max(max|x| * fp32(clip / top), 1e-12)         top = 2^(bits-1) - 1, or 448 for e4m3
    code  = clamp(round(x / scale), -top - 1, top)        e4m3: clamp(x / scale, -448, 448), rounded to e4m3
    """
    k = x.shape[-1]
    integers = dtype == torch.int8
    top = float((1 << (bits - 1)) - 1) if integers else act8.FP8_TOP
    v = x.float()
    grouped = _groups(v, group_size)
    scale = (grouped.abs().amax(-1) * (clip / top)).clamp_min(LEAST_SCALE)
    steps = (grouped / scale.unsqueeze(-1)).nan_to_num(0.0, torch.inf, -torch.inf)
    codes = steps.round().clamp(-top - 1, top) if integers else steps.clamp(-top, top)
    codes = codes.to(dtype).flatten(-2)[..., :k]
    sums = x.new_empty((*x.shape[:-1], 0), dtype=torch.float32)
    if sum_size:
        sums = act8.store_groups(_groups(codes.float(), sum_size).sum(-1))
    return act8.order_codes(codes.contiguous()), act8.store_groups(scale), sums


def _groups(v: Tensor, group_size: int) -> Tensor:
    """``[..., K]`` to ``[..., groups, G]``, padded with zeros."""
    k = v.shape[-1]
    width = max(k, 1) if group_size == -1 else group_size
    return torch.nn.functional.pad(v, (0, num_groups(k, group_size) * width - k)).unflatten(-1, (-1, width))


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, bits: int, group_size: int, clip: float, dtype: torch.dtype, sum_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize_activation` of :func:`rms_norm`, which is rounded to x's dtype in between."""
    return quantize_activation(rms_norm(x, weight, eps), bits, group_size, clip, dtype, sum_size)


def silu_and_mul_quantize(
    gate_up: Tensor, bits: int, group_size: int, clip: float, dtype: torch.dtype, sum_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize_activation` of :func:`silu_and_mul`, which is rounded to its dtype in between."""
    return quantize_activation(silu_and_mul(gate_up), bits, group_size, clip, dtype, sum_size)


def linear_w4a8(
    codes: Tensor,
    act_scale: Tensor,
    sums: Tensor | None,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    act_group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """``y[m, n] = sum_k codes[m, k] s_a[m, k // Ga] (w[n, k] - zero[n, k // G]) s_w[n, k // G] + bias[n]`` in dtype.

    Integer codes: the sum over every piece of K that has one s_a and one s_w is exact (fp64 here), then fp32. ``sums`` is
    what kernels use for zeros; here the zeros are subtracted.
    """
    plain = act8.plain_codes(codes, k).reshape(-1, k)
    steps = int4.untile_codes(qweight, n, k).to(torch.float64)
    if zero is None:
        steps = steps - int4.SYMMETRIC_ZERO
    else:
        steps = steps - int4.expand_groups(int4.untile_scale(zero, n, k, group_size).to(torch.float64), k, group_size)
    s_w = wide(int4.untile_scale(scale, n, k, group_size))
    s_a = act_scale.reshape(plain.shape[0], -1)
    y = s_w.new_zeros(plain.shape[0], n)
    width = min(w for w in (group_size, act_group_size, k) if w > 0)
    for first in range(0, k, width):
        piece = slice(first, first + width)
        exact = plain[:, piece].double() @ steps[:, piece].T
        factor = s_w[:, 0 if group_size == -1 else first // group_size]
        part = exact.to(y.dtype) * factor
        y = y + (part if act_group_size == -1 else part * s_a[:, first // act_group_size, None])
    if act_group_size == -1:
        y = y * s_a
    if bias is not None:
        y = y + wide(bias)
    return y.to(dtype).view(*codes.shape[:-1], n)


def hadamard_quantize(
    x: Tensor, small: Tensor | None, bits: int, group_size: int, clip: float, dtype: torch.dtype, sum_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize_activation` of ``x R``, ``R = S (x) H``, in fp32, rounded to x's dtype in between. S is small or 1,
    H the Walsh-Hadamard matrix in natural order over the square root of its size."""
    k, m = x.shape[-1], 1 if small is None else small.shape[0]
    p = k // m
    y = wide(x).reshape(-1, m, p)
    width = 1
    while width < p:
        halves = y.reshape(-1, p // (2 * width), 2, width)
        y = torch.stack((halves[:, :, 0] + halves[:, :, 1], halves[:, :, 0] - halves[:, :, 1]), 2)
        width *= 2
    y = y.reshape(-1, m, p) * p**-0.5
    if small is not None:
        y = torch.einsum("bmp,mn->bnp", y, small.to(y.dtype))
    return quantize_activation(y.reshape(x.shape).to(x.dtype), bits, group_size, clip, dtype, sum_size)
