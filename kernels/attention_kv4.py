"""attention_kv4: a few query tokens a sequence against a cache in mixed precision (:mod:`pyquant.formats.kv4`).

What it computes, for each query row of a KV head::

    out = sum over tokens t of  softmax(scaling * q . k[t]) * v[t]      a sink is one more exponential in the denominator

Tokens are read 64 at a time: four tiles of the prompt, a page, or four tiles of the window's ring. All blocks of a head are
dealt out to SPLITS programs in turn, and a second kernel adds the parts in the order of the programs (no atomics: the same
bits every time). The rows of a KV head, query heads times query tokens, are padded to ROWS, a multiple of 16.

Of a page the codes less their zeros are exact in fp16; the scales of K go into the queries, those of V into the
probabilities, both rounded to fp16. Values come by the address of each: eight neighbours share a word of a page, which one
line of the L1 cache serves. That, not the memory, is what bounds it: the CUDA kernel reads whole fragments.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyquant.formats import kv4

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_ROWS = 64
MAX_SPLITS = 32
_LOG2E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(-1e30)  # a score that weighs nothing; finite, so that differences are numbers
_GAIN = tl.constexpr(256.0)  # keeps small probabilities times V's scales away from fp16's smallest numbers


@triton.jit
def k_place(row, channel):
    """16-bit value of K within a tile's 16 D."""
    lane = 4 * (row % 8) + channel % 8 // 2
    return ((channel // 16 * 32 + lane) * 4 + row // 8 + channel % 16 // 8 * 2) * 2 + channel % 2


@triton.jit
def v_place(row, channel):
    """16-bit value of V within a tile's 16 D."""
    lane = 4 * (channel % 8) + row % 8 // 2
    return ((channel // 16 * 32 + lane) * 4 + channel % 16 // 8 + row // 8 * 2) * 2 + row % 2


@triton.jit
def _fields(words_ptr, block, piece, lane, register, half, mask, D: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH bits of the codes of a plane at (block of 16 tokens, piece, lane, register, half), int32."""
    GROUP: tl.constexpr = 2 if WIDTH == 8 else 4
    SPAN: tl.constexpr = 4 if WIDTH == 1 else (2 if WIDTH == 2 else 1)
    TURN: tl.constexpr = 7 if WIDTH == 1 else (5 if WIDTH == 2 else 2)
    first = piece // GROUP * GROUP
    count = tl.minimum(D // 16 - first, GROUP)
    at = block // SPAN * (2 * D) + first * 32 + lane * count + piece - first
    if WIDTH == 8:
        at = 2 * at + register // 2
    word = tl.load(words_ptr + at, mask=mask, other=0)
    near = 1 - register // 2
    if WIDTH == 8:
        bit = 16 * (register % 2) + 8 * half
    else:
        word = ((word >> TURN) & ((1 << (32 - TURN)) - 1)) | (word << (32 - TURN))  # it lies turned left
        if WIDTH == 4:
            bit = 4 * near + 8 * (register % 2) + 16 * half
        elif WIDTH == 2:
            bit = 2 * near + 4 * (register % 2) + 8 * (block % 2) + 16 * half
        else:
            bit = 2 * near + 4 * (register % 2) + 8 * (block % 2) + block // 2 + 16 * half
    return (word >> bit) & ((1 << WIDTH) - 1)


@triton.jit
def _codes(words_ptr, block, piece, lane, register, half, mask, D: tl.constexpr, BITS: tl.constexpr):
    """Codes of a page, fp32."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    codes = _fields(words_ptr, block, piece, lane, register, half, mask, D, WIDTH)
    if BITS == 3:
        codes += _fields(words_ptr + 4 * D, block, piece, lane, register, half, mask, D, 1) << 2
    return codes.to(tl.float32)


@triton.jit
def _soften(score, most, total, acc, position, limit, reach, valid, softcap, CAPPED: tl.constexpr):
    """Scores (times log2 e) to weights, and what was summed before made to fit them."""
    if CAPPED:
        score = softcap * _LOG2E * (1.0 - 2.0 / (tl.exp(2.0 * score / (softcap * _LOG2E)) + 1.0))
    behind = limit[:, None] - position[None, :]
    score = tl.where((behind >= 0) & (behind < reach) & valid[None, :], score, _NOTHING)
    highest = tl.maximum(most, tl.max(score, 1))
    p = tl.exp2(score - highest[:, None])
    p = tl.where(score <= _NOTHING, 0.0, p)
    shrink = tl.exp2(most - highest)
    return p, highest, total * shrink + tl.sum(p, 1), acc * shrink[:, None]


@triton.jit
def _part_kernel(
    parts_ptr, sums_ptr, q_ptr, prompt_ptr, pages_ptr, window_ptr, segments_ptr, q_stride_b, q_stride_t, q_stride_h,
    q_stride_d, prompt_stride_b, prompt_tiles, page_capacity, ring_tiles, group, kv_heads, tokens, scaling, softcap, reach,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, CAPPED: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Blocks program_id(1), + SPLITS, ... of one KV head of one sequence: output, maximum and sum of each row."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = head // kv_heads
    kept = tl.load(segments_ptr + 3 * b)
    full = tl.load(segments_ptr + 3 * b + 1)
    length = tl.load(segments_ptr + 3 * b + 2)

    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    in_head = channel < D
    token = row // group
    used = row < group * tokens
    q_at = b * q_stride_b + token * q_stride_t + (head % kv_heads * group + row % group) * q_stride_h
    q = tl.load(q_ptr + q_at[:, None] + channel[None, :] * q_stride_d, mask=used[:, None] & in_head[None, :], other=0.0)
    limit = length - tokens + token  # the last position that a row sees
    first = tl.maximum(length - tokens + 1 - reach, 0)  # that any row sees

    most = tl.full((ROWS,), _NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    of_block = tl.arange(0, 64)
    block, inside = of_block // 16, of_block % 16
    prompt_blocks = tl.cdiv(kept, 64)
    start = kept + 64 * full
    window_blocks = tl.cdiv(length - start, 64)

    # 16 bits: the prompt, then the window
    kind = q.dtype
    i = part + tl.where(first < kept, first // 64, prompt_blocks + tl.maximum(first - start, 0) // 64)
    while i < prompt_blocks + window_blocks:  # a range over loaded numbers is more than the interpreter takes
        early = i < prompt_blocks
        late = i - prompt_blocks
        position = tl.where(early, 64 * i, start + 64 * late) + of_block
        valid = position < tl.where(early, kept, length)
        at_prompt = b * prompt_stride_b + (head % kv_heads * prompt_tiles + 4 * i + block) * (32 * D)
        at_window = (head * ring_tiles + (4 * (full + late) + block) % ring_tiles) * (32 * D)
        mask = valid[:, None] & in_head[None, :]
        k_at, v_at = k_place(inside[:, None], channel[None, :]), v_place(inside[:, None], channel[None, :]) + 16 * D
        if early:
            k = tl.load(prompt_ptr + at_prompt[:, None] + k_at, mask=mask, other=0.0)
            v = tl.load(prompt_ptr + at_prompt[:, None] + v_at, mask=mask, other=0.0)
        else:
            k = tl.load(window_ptr + at_window[:, None] + k_at, mask=mask, other=0.0)
            v = tl.load(window_ptr + at_window[:, None] + v_at, mask=mask, other=0.0)
        score = tl.dot(q, tl.trans(k)) * (scaling * _LOG2E)
        p, most, total, acc = _soften(score, most, total, acc, position, limit, reach, valid, softcap, CAPPED)
        acc += tl.dot((p * _GAIN).to(kind), v)
        i += SPLITS

    # fewer bits
    page_bytes: tl.constexpr = 16 * BITS * D + 4 * D + 256
    codes_at: tl.constexpr = 4 * BITS * D  # where numbers begin, in 16-bit values
    piece, across = channel // 16, channel % 16
    numbers_at = 16 * piece + across % 8 // 2 * 4 + across % 2 + across // 8 * 2
    i = part + tl.maximum(first - kept, 0) // 64
    while i < full:
        page = pages_ptr + (head * page_capacity + i) * page_bytes
        words, numbers = page.to(tl.pointer_type(tl.int32)), page.to(tl.pointer_type(tl.float16))
        mask = (of_block >= 0)[:, None] & in_head[None, :]
        k_scale = tl.load(numbers + codes_at + numbers_at, mask=in_head, other=0.0).to(tl.float32)
        k_zero = tl.load(numbers + codes_at + D + numbers_at, mask=in_head, other=0.0).to(tl.float32)
        v_scale = tl.load(numbers + 2 * codes_at + 2 * D + of_block).to(tl.float32)
        v_zero = tl.load(numbers + 2 * codes_at + 2 * D + 64 + of_block).to(tl.float32)
        k = _codes(
            words, block[:, None], piece[None, :], 4 * (inside % 8)[:, None] + (across % 8 // 2)[None, :],
            (inside // 8)[:, None] + (across // 8 * 2)[None, :], (across % 2)[None, :], mask, D, BITS,
        ) - k_zero[None, :]  # fmt: skip
        scaled = (q.to(tl.float32) * (k_scale * (scaling * _LOG2E))[None, :]).to(tl.float16)
        score = tl.dot(scaled, tl.trans(k.to(tl.float16)))
        position = kept + 64 * i + of_block
        valid = position < length
        p, most, total, acc = _soften(score, most, total, acc, position, limit, reach, valid, softcap, CAPPED)
        v = _codes(
            words + (2 * BITS + 1) * D, block[:, None], piece[None, :], 4 * (across % 8)[None, :] + (inside % 8 // 2)[:, None],
            (across // 8)[None, :] + (inside // 8 * 2)[:, None], (inside % 2)[:, None], mask, D, BITS,
        ) - v_zero[:, None]  # fmt: skip
        acc += tl.dot((p * (v_scale * _GAIN)[None, :]).to(tl.float16), v.to(tl.float16))
        i += SPLITS

    at = (head * SPLITS + part) * ROWS + row
    tl.store(parts_ptr + at[:, None] * BLOCK_D + channel[None, :], acc)
    tl.store(sums_ptr + 2 * at, most)
    tl.store(sums_ptr + 2 * at + 1, total)


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, parts_ptr, sums_ptr, sinks_ptr, group, kv_heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The parts of 16 rows of a KV head, in the order of the programs that left them."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * 16 + tl.arange(0, 16)
    channel = tl.arange(0, BLOCK_D)
    most = tl.full((16,), _NOTHING, tl.float32)
    total = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, BLOCK_D), tl.float32)
    for part in range(SPLITS):
        at = (head * SPLITS + part) * ROWS + row
        theirs = tl.load(sums_ptr + 2 * at)
        highest = tl.maximum(most, theirs)
        old, new = tl.exp2(most - highest), tl.exp2(theirs - highest)
        acc = acc * old[:, None] + tl.load(parts_ptr + at[:, None] * BLOCK_D + channel[None, :]) * new[:, None]
        total = total * old + tl.load(sums_ptr + 2 * at + 1) * new
        most = highest
    some = total > 0
    used = row < group * tokens
    if SINKS:
        theirs = (
            tl.load(sinks_ptr + head % kv_heads * group + row % group, mask=used, other=0.0).to(tl.float32) * _LOG2E
        )
        highest = tl.maximum(most, theirs)
        old = tl.exp2(most - highest)
        acc = acc * old[:, None]
        total = total * old + tl.where(some, tl.exp2(theirs - highest), 0.0)
        most = highest
    b = head // kv_heads
    to = (b * tokens + row // group) * (group * kv_heads) + head % kv_heads * group + row % group
    weight = tl.where(some, total, 1.0)
    out = tl.where(some[:, None], acc / (weight * _GAIN)[:, None], 0.0)
    mask = used[:, None] & (channel < D)[None, :]
    tl.store(out_ptr + to[:, None] * D + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(some, (most + tl.log2(weight)) / _LOG2E, float("-inf"))
    tl.store(lse_ptr + to, lse, mask=used)


def splits_for(heads: int, blocks: int, multiprocessors: int) -> int:
    """Programs that share a KV head, a power of two: about two a multiprocessor in all, and some blocks for each."""
    most = max(1, min(MAX_SPLITS, 2 * multiprocessors // max(1, heads), blocks // 2))
    return 1 << (most.bit_length() - 1)


def attention_kv4(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    prompt: Tensor,
    pages: Tensor,
    window: Tensor,
    segments: Tensor,
    scaling: float,
    softcap: float,
    sliding_window: int,
    sinks: Tensor | None,
) -> None:
    """Write out ``[B, T, Hq, D]`` and lse ``[B, T, Hq]``; the rest as in :func:`pyquant.ops.attention_kv4`."""
    if _INTERPRETED and q.dtype == torch.bfloat16:
        raise NotImplementedError("Triton's interpreter cannot multiply bf16 matrices")
    batch, tokens, heads, d = q.shape
    kv_heads, group = window.shape[1], heads // window.shape[1]
    rows = max(16, triton.next_power_of_2(group * tokens))
    blocks = pages.shape[2] + prompt.shape[2] // 4 + window.shape[2] // 4
    if sliding_window:
        blocks = min(blocks, (sliding_window + tokens) // 64 + 3)
    count = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    splits = splits_for(batch * kv_heads, blocks, count)
    block_d = triton.next_power_of_2(d)
    parts = torch.empty(batch * kv_heads, splits, rows, block_d, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch * kv_heads, splits, rows, 2, dtype=torch.float32, device=q.device)
    shape = {"D": d, "BLOCK_D": block_d, "ROWS": rows, "SPLITS": splits}
    _part_kernel[(batch * kv_heads, splits)](
        parts, sums, q, prompt, pages, window, segments, *q.stride(), 0 if len(prompt) == 1 else prompt.stride(0),
        prompt.shape[2], pages.shape[2], window.shape[2], group, kv_heads, tokens, scaling, softcap,
        sliding_window or 1 << 30, CAPPED=softcap > 0, BITS=kv4.bits_of(pages.shape[3], d),
        num_warps=4 if rows * block_d <= 4096 else 8, num_stages=2, **shape,
    )  # fmt: skip
    _merge_kernel[(batch * kv_heads, rows // 16)](
        out, lse, parts, sums, lse if sinks is None else sinks.contiguous(), group, kv_heads, tokens, SINKS=sinks is not None,
        num_warps=4, **shape,
    )  # fmt: skip
