"""Attention over a KV cache in mixed precision (:mod:`pyquant.formats.kv4`), and what is added to it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant.formats import kv4
from pyquant.reference.weights import wide


def kv4_values(prompt: Tensor, pages: Tensor, window: Tensor, segments: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Keys and values of sequence b in the order of its tokens, ``[Hkv, length, D]``, fp32 (fp64 from an fp64 cache).

    Raises:
        ValueError: segments that the three parts cannot hold.
    """
    d = window.shape[-1] // 32
    kept, full, length = segments[b].tolist()
    start, ring = kept + kv4.PAGE * full, kv4.TILE * window.shape[2]
    if not (0 <= kept <= kv4.TILE * prompt.shape[2] and 0 <= full <= pages.shape[2] and 0 <= length - start <= ring):
        raise ValueError(
            f"segments of sequence {b} (prompt {kept}, pages {full}, length {length}) do not fit a cache of "
            f"{prompt.shape[2]} prompt tiles, {pages.shape[2]} pages and a ring of {ring} tokens"
        )
    early = kv4.unpack_tiles(prompt[b if len(prompt) > 1 else 0, :, : -(-kept // kv4.TILE)], d)
    body = kv4.unpack_pages(pages[b, :, :full], d)
    slots = (torch.arange(length - start, device=window.device) + kv4.PAGE * full) % ring
    late = kv4.unpack_tiles(window[b], d)
    k, v = (
        torch.cat([wide(e[:, :kept]), wide(m).to(wide(e).dtype), wide(w[:, slots])], 1)
        for e, m, w in zip(early, body, late, strict=True)
    )
    return k, v


def attention_kv4(
    q: Tensor,
    prompt: Tensor,
    pages: Tensor,
    window: Tensor,
    segments: Tensor,
    scaling: float,
    softcap: float,
    early: bool,
    sliding_window: int = 0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The newest T tokens' attention: ``(out [B, T, Hq, D], log-sum-exp fp32 [B, T, Hq])``.

    Token t of them stands at position ``length - T + t`` and attends to positions up to its own; with a positive
    sliding_window S only to the newest S of those, its own among them. A positive softcap bends scores to
    ``softcap * tanh(score / softcap)``. ``sinks [Hq]`` are one more score for each query head, beside no value: they add to
    the sum of exponentials (softcap does not bend them). A sequence of length 0 gives zeros and -inf. ``early`` only
    matters to the CUDA kernel.
    """
    batch, tokens, heads, size = q.shape
    out, lse = torch.zeros_like(wide(q)), wide(q).new_full((batch, tokens, heads), -torch.inf)
    for b, length in enumerate(segments[:, 2].tolist()):
        if length == 0:
            continue
        if length < tokens:
            raise ValueError(f"attention_kv4: sequence {b} has {length} tokens, fewer than the {tokens} of q")
        k, v = kv4_values(prompt, pages, window, segments, b)
        grouped = wide(q[b]).view(tokens, k.shape[0], -1, size)
        score = torch.einsum("thgd,hld->thgl", grouped, k) * scaling
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        at = torch.arange(length, device=q.device)
        own = length - tokens + torch.arange(tokens, device=q.device)[:, None]
        hidden = (at > own) | (at <= own - (sliding_window or length))
        score = score.masked_fill(hidden[:, None, None], -torch.inf)
        total = score.logsumexp(-1)
        if sinks is not None:
            total = torch.logaddexp(total, wide(sinks).to(total.dtype).view(total.shape[1:]))
        lse[b] = total.flatten(1)
        out[b] = torch.einsum("thgl,hld->thgd", (score - total[..., None]).exp(), v).flatten(1, 2)
    return out.to(q.dtype), lse.float() if q.dtype != torch.float64 else lse


def rotate_keys(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of keys, as Llama stores its heads: ``k cos + (-k_high, k_low) sin`` in fp32, rounded once.

    Args:
        k: ``[B, T, Hkv, D]``.
        cos, sin: ``[B or 1, T, D]``.

    Returns:
        ``[B, T, Hkv, D]`` in k's dtype.
    """
    low, high = wide(k).chunk(2, -1)
    turned = torch.cat([-high, low], -1)
    return (wide(k) * wide(cos).unsqueeze(2) + turned * wide(sin).unsqueeze(2)).to(k.dtype)


def append_kv4(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    window: Tensor,
    segments: Tensor,
    keep: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """T new tokens ``k, v [B, T, Hkv, D]`` into the window, in place; then, where it holds ``keep + 64`` or more, its oldest
    64 into the next page, of as many bits as the pages are, quantized as :func:`pyquant.formats.kv4.quantize_page` says.
    Nothing is packed for keep = -1. Keys are rotated before, where cos and sin are given (:func:`rotate_keys`).
    """
    if cos is not None and sin is not None:
        k = rotate_keys(k, cos, sin)
    tokens, ring, d = k.shape[1], kv4.TILE * window.shape[2], k.shape[3]
    held = [length - kept - kv4.PAGE * full for kept, full, length in segments.tolist()]
    pack = [keep >= 0 and w + tokens >= keep + kv4.PAGE for w in held]
    for b, (w, (_, full, _)) in enumerate(zip(held, segments.tolist(), strict=True)):
        if w < 0 or w + tokens > ring:
            raise ValueError(
                f"append_kv4: the window of sequence {b} holds {w} tokens of {ring}, {tokens} more do not fit"
            )
        if pack[b] and full >= pages.shape[2]:
            raise ValueError(f"append_kv4: all {full} pages of sequence {b} are in use and it needs one more")
    late = kv4.unpack_tiles(window, d)
    offset = segments[:, 2].long() - segments[:, 0].long()
    slots = (offset[:, None] + torch.arange(tokens, device=k.device)) % ring
    rows = torch.arange(len(k), device=k.device)[:, None]
    for values, new in zip(late, (k, v), strict=True):
        values[rows, :, slots] = new
    window.copy_(kv4.pack_tiles(*late))
    for b, full in enumerate(segments[:, 1].tolist()):
        if pack[b]:
            oldest = (torch.arange(kv4.PAGE, device=k.device) + kv4.PAGE * full) % ring
            old_k, old_v = (values[b][:, oldest] for values in late)
            pages[b, :, full] = kv4.pack_pages(old_k, old_v, kv4.bits_of(pages.shape[3], d))[:, 0]
            segments[b, 1] += 1
    segments[:, 2] += tokens
