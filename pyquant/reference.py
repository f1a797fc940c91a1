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


# ------------------------------------------------------------------------------------------------ the decode step


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, rounded once (Zhang and Sennrich, 1910.07467)."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s), s)`` of the sum ``s = x + residual`` in x's dtype."""
    total = (_wide(x) + _wide(residual)).to(x.dtype)
    return rms_norm(total, weight, eps), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for the halves of the last dimension, gate first."""
    gate, up = _wide(gate_up).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (2104.09864) of ``x [..., D]`` by ``cos, sin [..., D/2]``, dimension i paired with i + D/2."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    start: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Rotated queries ``[B, L, Hq, D]`` of ``qkv [B, L, (Hq + 2 Hkv) D]``; keys and values go to the cache from ``slot`` on."""
    batch, length, _ = qkv.shape
    kv_heads, size = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.view(batch, length, -1, size)
    q, k, v = heads.split([heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)
    q, k = _wide(q), _wide(k)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    at = slot.long()[:, None] + torch.arange(length, device=qkv.device)
    position = (at - start.long()[:, None]).clamp(0, cos.shape[0] - 1)
    cos, sin = cos[position][:, :, None].to(q.dtype), sin[position][:, :, None].to(q.dtype)
    rows = torch.arange(batch, device=qkv.device)[:, None]
    k_cache[rows, :, at] = rotate(k, cos, sin).to(k_cache.dtype)
    v_cache[rows, :, at] = v
    return rotate(q, cos, sin).to(qkv.dtype)


def attention_decode(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    start: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scaling: float,
    window: int,
    early: bool,
) -> Tensor:
    """``[B, Hq D]``: :func:`rope_append` of one token a sequence, then its attention to slots ``start .. slot``.

    A positive window leaves the newest ``window`` of them. ``early`` only matters to the CUDA kernel.
    """
    batch, kv_heads, slots, size = k_cache.shape
    q = _wide(rope_append(qkv[:, None], cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps))
    at, last = torch.arange(slots, device=qkv.device), slot.long()[:, None]
    live = (at >= start.long()[:, None]) & (at <= last)
    if window > 0:
        live &= at > last - window
    score = torch.einsum("bhgd,bhsd->bhgs", q.view(batch, kv_heads, -1, size), _wide(k_cache)) * scaling
    p = score.masked_fill(~live[:, None, None], -torch.inf).softmax(-1)
    value = torch.where(live[:, None, :, None], _wide(v_cache), 0.0)
    return torch.einsum("bhgs,bhsd->bhgd", p, value).reshape(batch, -1).to(qkv.dtype)


def greedy_append(
    logits: Tensor,
    tokens: Tensor,
    ids: Tensor,
    slot: Tensor,
    unfinished: Tensor,
    length: Tensor,
    eos: Tensor | None,
    pad: int,
) -> None:
    """Choose the likeliest token of each row of ``logits [B, V]`` and append it: see :func:`append`."""
    append(logits.argmax(-1), tokens, ids, slot, unfinished, length, eos, pad)


def append(
    chosen: Tensor,
    tokens: Tensor,
    ids: Tensor,
    slot: Tensor,
    unfinished: Tensor,
    length: Tensor,
    eos: Tensor | None,
    pad: int,
) -> None:
    """Append chosen tokens ``[B]`` in place; only tensors are touched, so that a CUDA graph can hold it.

    Rows that have ended get pad, those that choose one of eos end: ``tokens[slot + 1] = ids = chosen``,
    ``length += unfinished``, ``slot += 1``.
    """
    length.add_(unfinished)
    if eos is not None:
        chosen = torch.where(unfinished.bool(), chosen, pad)
        unfinished.mul_((chosen[:, None] != eos).all(1))
    slot.add_(1)
    tokens.scatter_(1, slot.long()[:, None], chosen[:, None])
    ids.copy_(chosen)
