"""append_kv4: new tokens into the window of a cache in mixed precision, and the page that leaves it.

A program serves one KV head of one sequence; what it decides follows from the segments as they were, which a second kernel
brings up to date when the first has ended. The oldest 64 tokens are read as ``[64, D]`` from the ring, or from what is new
where that is so young, their ranges go along an axis, and codes become words by a reshape and sums of
fields that do not overlap::

    token   = (block 4, r 2, g 8)      channel = (piece, c 2, t 4, h 2)      lane (g, t), register r + 2 c, half h
    channel = (piece, r 2, g 8)        token   = (block 4, c 2, t 4, h 2)    the same for V

Divisions and roundings are those of IEEE in the order of :func:`pyquant.formats.kv4.quantize_page`: pages are equal bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyquant.formats import kv4
from pyquant.kernels.attention_kv4 import k_place, v_place
from pyquant.kernels.int4 import clamp, round_half_even


@triton.jit
def _range(low, high, most, BITS: tl.constexpr):
    """Scale and zero, fp32 numbers that fp16 holds exactly."""
    REACH: tl.constexpr = 1023.0 if BITS == 8 else 240.0
    GRID: tl.constexpr = 1.0 if BITS == 8 else 4.0
    STEP: tl.constexpr = 1.0 if BITS == 8 else 0.25
    size = tl.maximum(tl.abs(low), tl.abs(high))
    steps = ((1 << BITS) - 1) + 0.0 * low
    scale = tl.maximum(tl.div_rn(high - low, steps), tl.div_rn(size, REACH + 0.0 * low))
    scale = clamp(scale, 0.00006103515625, most).to(tl.float16).to(tl.float32)
    zero = round_half_even(tl.div_rn(-GRID * low, scale)) * STEP
    return scale, zero.to(tl.float16).to(tl.float32)


@triton.jit
def _codes(x, scale, zero, BITS: tl.constexpr):
    at = round_half_even(clamp(tl.div_rn(x, scale) + zero, -65536.0, 65536.0))
    return clamp(at, 0.0, (1 << BITS) - 1.0).to(tl.int32)


@triton.jit
def _store_plane(words_ptr, parts, D: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    """Fields ``(block, piece, g, t, c, r, h)`` of a plane to its words; c and r are a register's two bits."""
    GROUP: tl.constexpr = 2 if WIDTH == 8 else 4
    SPAN: tl.constexpr = 4 if WIDTH == 1 else (2 if WIDTH == 2 else 1)
    FIELDS: tl.constexpr = 4 if WIDTH == 8 else 8 * SPAN
    TURN: tl.constexpr = 7 if WIDTH == 1 else (5 if WIDTH == 2 else (2 if WIDTH == 4 else 0))
    EACH: tl.constexpr = 2 if WIDTH == 8 else 1  # words of a piece
    spans = tl.reshape(parts, 4 // SPAN, SPAN, PIECES, 32, EACH, 8 // EACH)
    fields = tl.reshape(tl.permute(spans, 0, 2, 3, 4, 1, 5), 4 // SPAN, PIECES * 32 * EACH, FIELDS)
    field = tl.arange(0, FIELDS)
    s, near, r, half = field // 8, 1 - field % 8 // 4, field % 4 // 2, field % 2
    if WIDTH == 8:
        bit = 8 * field
    elif WIDTH == 4:
        bit = 4 * near + 8 * r + 16 * half
    elif WIDTH == 2:
        bit = 2 * near + 4 * r + 8 * s + 16 * half
    else:
        bit = 2 * near + 4 * r + 8 * (s % 2) + s // 2 + 16 * half
    word = tl.sum(fields << bit[None, None, :], 2)  # fields do not overlap
    if WIDTH < 8:
        word = (word << TURN) | ((word >> (32 - TURN)) & ((1 << TURN) - 1))
    span = tl.arange(0, 4 // SPAN)[:, None]
    of_span = tl.arange(0, PIECES * 32 * EACH)[None, :]
    piece, lane = of_span // (32 * EACH), of_span // EACH % 32
    first = piece // GROUP * GROUP
    count = tl.minimum(D // 16 - first, GROUP)
    at = EACH * (span * (2 * D) + first * 32 + lane * count + piece - first) + of_span % EACH
    tl.store(words_ptr + at, word, mask=(piece < D // 16) & (span >= 0))


@triton.jit
def _store_codes(words_ptr, parts, D: tl.constexpr, PIECES: tl.constexpr, BITS: tl.constexpr):
    if BITS == 3:
        _store_plane(words_ptr, parts & 3, D, PIECES, 2)
        _store_plane(words_ptr + 4 * D, parts >> 2, D, PIECES, 1)
    else:
        _store_plane(words_ptr, parts, D, PIECES, BITS)


@triton.jit
def _load_keys(keys, token, stride_t, stride_d, cos_ptr, sin_ptr, channel, mask, D: tl.constexpr, ROPE: tl.constexpr):
    """New keys [tokens, channels], rotated where ROPE; products and sums each rounded to fp32, the result by the caller."""
    at = keys + token[:, None] * stride_t
    k = tl.load(at + channel[None, :] * stride_d, mask=mask, other=0.0)
    if ROPE:
        low = channel < D // 2
        across = tl.load(
            at + tl.where(low, channel + D // 2, channel - D // 2)[None, :] * stride_d, mask=mask, other=0.0
        )
        angle = token[:, None] * D + channel[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        turned = across.to(tl.float32) * tl.where(low, -1.0, 1.0)[None, :]
        k = (k.to(tl.float32) * cos + turned * sin).to(k.dtype)
    return k


@triton.jit
def _append_kernel(
    k_ptr, v_ptr, pages_ptr, window_ptr, segments_ptr, cos_ptr, sin_ptr, k_stride_b, k_stride_t, k_stride_h, k_stride_d,
    v_stride_b, v_stride_t, v_stride_h, v_stride_d, rope_stride_b, page_capacity, ring_tiles, kv_heads, tokens, keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, ROPE: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """New tokens of one KV head to the ring; its oldest 64 to the next page where the window is full."""
    head = tl.program_id(0).to(tl.int64)
    b = head // kv_heads
    kept = tl.load(segments_ptr + 3 * b)
    full = tl.load(segments_ptr + 3 * b + 1)
    length = tl.load(segments_ptr + 3 * b + 2)
    held = length - kept - 64 * full
    channel = tl.arange(0, BLOCK_D)
    in_head = channel < D
    ring = window_ptr + head * ring_tiles * (32 * D)
    new_k = k_ptr + b * k_stride_b + head % kv_heads * k_stride_h
    cos, sin = cos_ptr + b * rope_stride_b, sin_ptr + b * rope_stride_b
    new_v = v_ptr + b * v_stride_b + head % kv_heads * v_stride_h + channel[None, :] * v_stride_d

    if (keep >= 0) & (held + tokens >= keep + 64) & (full < page_capacity):  # before the ring is written
        old = tl.arange(0, 64)
        tile = ring + ((4 * full + old // 16) % ring_tiles).to(tl.int64)[:, None] * (32 * D)
        row, fresh = old % 16, (old >= held)[:, None]
        mask, late = in_head[None, :] & ~fresh, in_head[None, :] & fresh
        k = tl.load(tile + k_place(row[:, None], channel[None, :]), mask=mask, other=0.0).to(tl.float32)
        k += _load_keys(new_k, old - held, k_stride_t, k_stride_d, cos, sin, channel, late, D, ROPE).to(tl.float32)
        v = tl.load(tile + 16 * D + v_place(row[:, None], channel[None, :]), mask=mask, other=0.0).to(tl.float32)
        v += tl.load(new_v + (old - held)[:, None] * v_stride_t, mask=late, other=0.0).to(tl.float32)
        PIECES: tl.constexpr = BLOCK_D // 16
        CODES: tl.constexpr = 8 * BITS * D  # bytes
        page = pages_ptr + (head * page_capacity + full) * (2 * CODES + 4 * D + 256)
        words, numbers = page.to(tl.pointer_type(tl.int32)), page.to(tl.pointer_type(tl.float16)) + CODES // 2
        k_scale, k_zero = _range(tl.min(k, 0), tl.max(k, 0), 65504.0, BITS)
        codes = tl.reshape(_codes(k, k_scale[None, :], k_zero[None, :], BITS), 4, 2, 8, PIECES, 2, 4, 2)
        _store_codes(words, tl.permute(codes, 0, 3, 2, 5, 4, 1, 6), D, PIECES, BITS)
        across = channel % 16
        at = channel - across + across % 8 // 2 * 4 + across % 2 + across // 8 * 2
        tl.store(numbers + at, k_scale.to(tl.float16), mask=in_head)
        tl.store(numbers + D + at, k_zero.to(tl.float16), mask=in_head)
        low = tl.min(tl.where(in_head[None, :], v, float("inf")), 1)
        v_scale, v_zero = _range(low, tl.max(tl.where(in_head[None, :], v, float("-inf")), 1), 255.0, BITS)
        codes = tl.reshape(_codes(v, v_scale[:, None], v_zero[:, None], BITS), 4, 2, 4, 2, PIECES, 2, 8)
        _store_codes(words + CODES // 4 + D, tl.permute(codes, 0, 4, 6, 2, 1, 5, 3), D, PIECES, BITS)
        tl.store(numbers + CODES // 2 + 2 * D + old, v_scale.to(tl.float16))
        tl.store(numbers + CODES // 2 + 2 * D + 64 + old, v_zero.to(tl.float16))
        tl.debug_barrier()  # what was read must be read before new tokens overwrite the ring

    token = tl.arange(0, BLOCK_T)
    slot = (length - kept + token) % (16 * ring_tiles)
    tile = ring + (slot // 16).to(tl.int64)[:, None] * (32 * D)
    row, mask = slot % 16, (token < tokens)[:, None] & in_head[None, :]
    k = _load_keys(new_k, token, k_stride_t, k_stride_d, cos, sin, channel, mask, D, ROPE)
    v = tl.load(new_v + token[:, None] * v_stride_t, mask=mask, other=0.0)
    tl.store(tile + k_place(row[:, None], channel[None, :]), k, mask=mask)
    tl.store(tile + 16 * D + v_place(row[:, None], channel[None, :]), v, mask=mask)


@triton.jit
def _segments_kernel(segments_ptr, page_capacity, tokens, keep):
    b = tl.program_id(0)
    kept = tl.load(segments_ptr + 3 * b)
    full = tl.load(segments_ptr + 3 * b + 1)
    length = tl.load(segments_ptr + 3 * b + 2) + tokens
    pack = (keep >= 0) & (length - kept - 64 * full >= keep + 64) & (full < page_capacity)
    tl.store(segments_ptr + 3 * b + 1, full + tl.where(pack, 1, 0))
    tl.store(segments_ptr + 3 * b + 2, length)


def append_kv4(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    window: Tensor,
    segments: Tensor,
    keep: int,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """Arguments as in :func:`pyquant.ops.append_kv4`."""
    batch, tokens, kv_heads, d = k.shape
    shape = {"D": d, "BLOCK_D": triton.next_power_of_2(d), "BLOCK_T": triton.next_power_of_2(tokens)}
    rope = cos is not None and sin is not None
    if rope:
        cos, sin = cos.contiguous(), sin.contiguous()
    _append_kernel[(batch * kv_heads,)](
        k, v, pages, window, segments, cos if rope else k, sin if rope else k, *k.stride(), *v.stride(),
        tokens * d if rope and len(cos) > 1 else 0, pages.shape[2], window.shape[2], kv_heads, tokens, keep, ROPE=rope,
        BITS=kv4.bits_of(pages.shape[3], d),
        num_warps=8, enable_fp_fusion=False, **shape,
    )  # fmt: skip
    _segments_kernel[(batch,)](segments, pages.shape[2], tokens, keep, num_warps=1)
