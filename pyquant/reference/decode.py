"""The ops of a decode step."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant.reference.weights import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, rounded once (Zhang and Sennrich, 1910.07467)."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s), s)`` of the sum ``s = x + residual`` in x's dtype."""
    total = (wide(x) + wide(residual)).to(x.dtype)
    return rms_norm(total, weight, eps), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for the halves of the last dimension, gate first."""
    gate, up = wide(gate_up).chunk(2, -1)
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
    q, k = wide(q), wide(k)
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
    q = wide(rope_append(qkv[:, None], cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps))
    at, last = torch.arange(slots, device=qkv.device), slot.long()[:, None]
    live = (at >= start.long()[:, None]) & (at <= last)
    if window > 0:
        live &= at > last - window
    score = torch.einsum("bhgd,bhsd->bhgs", q.view(batch, kv_heads, -1, size), wide(k_cache)) * scaling
    p = score.masked_fill(~live[:, None, None], -torch.inf).softmax(-1)
    value = torch.where(live[:, None, :, None], wide(v_cache), 0.0)
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
