"""append_kv4: new tokens into the window of a cache in mixed precision, and the page that leaves it.

A program serves one KV head of one sequence; what it decides follows from the segments as they were, which a second kernel
brings up to date when the first has ended. The oldest 64 tokens are read as ``[64, D]`` from the ring, or from what is new
where that is so young, their ranges go along an axis, and codes become words by a reshape::

    token   = (block 4, r 2, g 8)      channel = (piece, c 2, t 4, h 2)      word (block, piece, g, t), nibble (r + 2 c, h)
    channel = (piece, r 2, g 8)        token   = (block 4, c 2, t 4, h 2)    the same for V

Divisions and roundings are those of IEEE in the order of :func:`pyquant.formats.kv4.quantize_page`: pages are equal bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pyquant.kernels.attention_kv4 import k_place, v_place
from pyquant.kernels.int4 import clamp, round_half_even


@triton.jit
def _range(low, high, most):
    """Scale and zero, fp32 numbers that fp16 holds exactly."""
    size = tl.maximum(tl.abs(low), tl.abs(high))
    scale = tl.maximum(tl.div_rn(high - low, 15.0 + 0.0 * low), tl.div_rn(size, 240.0 + 0.0 * low))
    scale = clamp(scale, 0.00006103515625, most).to(tl.float16).to(tl.float32)
    zero = round_half_even(tl.div_rn(-4.0 * low, scale)) * 0.25
    return scale, zero.to(tl.float16).to(tl.float32)


@triton.jit
def _codes(x, scale, zero):
    at = round_half_even(clamp(tl.div_rn(x, scale) + zero, -65536.0, 65536.0))
    return clamp(at, 0.0, 15.0).to(tl.int32)


@triton.jit
def _words(parts, BLOCKS: tl.constexpr, PIECES: tl.constexpr):
    """Codes ``(block, piece, g, t, h, c, r)`` to words ``[block, piece, lane]``, turned left by 2."""
    r0, r1 = tl.split(tl.reshape(parts, BLOCKS, PIECES, 32, 2, 2, 2))
    r0_c0, r0_c1 = tl.split(r0)  # registers 0 and 2
    r1_c0, r1_c1 = tl.split(r1)  # 1 and 3
    a0, a1 = tl.split(r0_c0)
    b0, b1 = tl.split(r1_c0)
    c0, c1 = tl.split(r0_c1)
    d0, d1 = tl.split(r1_c1)
    near, far = c0 | (a0 << 4) | (d0 << 8) | (b0 << 12), c1 | (a1 << 4) | (d1 << 8) | (b1 << 12)
    word = near | (far << 16)
    return (word << 2) | ((word >> 30) & 3)


@triton.jit
def _store_words(page_words, words, D: tl.constexpr, PIECES: tl.constexpr):
    block = tl.arange(0, 4)[:, None, None]
    piece = tl.arange(0, PIECES)[None, :, None]
    lane = tl.arange(0, 32)[None, None, :]
    first = piece // 4 * 4
    count = tl.minimum(D // 16 - first, 4)
    at = block * (2 * D) + first * 32 + lane * count + piece - first
    tl.store(page_words + at, words, mask=(piece < D // 16) & (block >= 0) & (lane >= 0))


@triton.jit
def _append_kernel(
    k_ptr, v_ptr, pages_ptr, window_ptr, segments_ptr, k_stride_b, k_stride_t, k_stride_h, k_stride_d, v_stride_b,
    v_stride_t, v_stride_h, v_stride_d, page_capacity, ring_tiles, kv_heads, tokens, keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
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
    new_k = k_ptr + b * k_stride_b + head % kv_heads * k_stride_h + channel[None, :] * k_stride_d
    new_v = v_ptr + b * v_stride_b + head % kv_heads * v_stride_h + channel[None, :] * v_stride_d

    if (keep >= 0) & (held + tokens >= keep + 64) & (full < page_capacity):  # before the ring is written
        old = tl.arange(0, 64)
        tile = ring + ((4 * full + old // 16) % ring_tiles).to(tl.int64)[:, None] * (32 * D)
        row, fresh = old % 16, (old >= held)[:, None]
        mask, late = in_head[None, :] & ~fresh, in_head[None, :] & fresh
        k = tl.load(tile + k_place(row[:, None], channel[None, :]), mask=mask, other=0.0).to(tl.float32)
        k += tl.load(new_k + (old - held)[:, None] * k_stride_t, mask=late, other=0.0).to(tl.float32)
        v = tl.load(tile + 16 * D + v_place(row[:, None], channel[None, :]), mask=mask, other=0.0).to(tl.float32)
        v += tl.load(new_v + (old - held)[:, None] * v_stride_t, mask=late, other=0.0).to(tl.float32)
        PIECES: tl.constexpr = BLOCK_D // 16
        page = pages_ptr + (head * page_capacity + full) * (68 * D + 256)
        words, numbers = page.to(tl.pointer_type(tl.int32)), page.to(tl.pointer_type(tl.float16))
        k_scale, k_zero = _range(tl.min(k, 0), tl.max(k, 0), 65504.0)
        codes = tl.reshape(_codes(k, k_scale[None, :], k_zero[None, :]), 4, 2, 8, PIECES, 2, 4, 2)
        _store_words(words, _words(tl.permute(codes, 0, 3, 2, 5, 6, 4, 1), 4, PIECES), D, PIECES)
        across = channel % 16
        at = channel - across + across % 8 // 2 * 4 + across % 2 + across // 8 * 2
        tl.store(numbers + 16 * D + at, k_scale.to(tl.float16), mask=in_head)
        tl.store(numbers + 17 * D + at, k_zero.to(tl.float16), mask=in_head)
        low = tl.min(tl.where(in_head[None, :], v, float("inf")), 1)
        v_scale, v_zero = _range(low, tl.max(tl.where(in_head[None, :], v, float("-inf")), 1), 255.0)
        codes = tl.reshape(_codes(v, v_scale[:, None], v_zero[:, None]), 4, 2, 4, 2, PIECES, 2, 8)
        _store_words(words + 9 * D, _words(tl.permute(codes, 0, 4, 6, 2, 3, 1, 5), 4, PIECES), D, PIECES)
        tl.store(numbers + 34 * D + old, v_scale.to(tl.float16))
        tl.store(numbers + 34 * D + 64 + old, v_zero.to(tl.float16))
        tl.debug_barrier()  # what was read must be read before new tokens overwrite the ring

    token = tl.arange(0, BLOCK_T)
    slot = (length - kept + token) % (16 * ring_tiles)
    tile = ring + (slot // 16).to(tl.int64)[:, None] * (32 * D)
    row, mask = slot % 16, (token < tokens)[:, None] & in_head[None, :]
    k = tl.load(new_k + token[:, None] * k_stride_t, mask=mask, other=0.0)
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


def append_kv4(k: Tensor, v: Tensor, pages: Tensor, window: Tensor, segments: Tensor, keep: int) -> None:
    """Arguments as in :func:`pyquant.ops.append_kv4`."""
    batch, tokens, kv_heads, d = k.shape
    shape = {"D": d, "BLOCK_D": triton.next_power_of_2(d), "BLOCK_T": triton.next_power_of_2(tokens)}
    _append_kernel[(batch * kv_heads,)](
        k, v, pages, window, segments, *k.stride(), *v.stride(), pages.shape[2], window.shape[2], kv_heads, tokens, keep,
        num_warps=8, **shape,
    )  # fmt: skip
    _segments_kernel[(batch,)](segments, pages.shape[2], tokens, keep, num_warps=1)
