"""The KV cache in mixed precision: a 16-bit prompt, a 4-bit body, a 16-bit window of the newest tokens. Normative.

The tokens of one sequence, as one KV head stores them::

    position   0 .. prompt-1      | prompt .. prompt+64*pages-1          | .. length-1
    segment    prompt             | body                                 | window
    held as    tiles of 16 tokens | pages of 64 tokens, 4 bits a value   | a ring of tiles of 16 tokens

    prompt  16 bit  [B or 1, Hkv, prompt tiles, 32 D]     one prompt for the batch where the first size is 1
    pages   uint8   [B, Hkv, page capacity, 68 D + 256]
    window  16 bit  [B, Hkv, ring tiles, 32 D]            the token at position p is in slot (p - prompt) mod (16 ring tiles)
    segments int32  [B, 3]                                prompt tokens, pages, length

**Fragments.** Everything lies as the A operand of ``mma.m16n8k16`` wants it, so that a lane reads its registers as they are.
Of a 16 x 16 piece (rows r, columns c), lane ``4 (r % 8) + (c % 8) / 2`` holds element (r, c) in half ``c % 2`` of register
``r / 8 + 2 (c / 8)``. For the scores the rows are tokens and the columns are channels; for the output, which is
V^T P^T, the rows are channels and the columns are tokens.

A **tile** of 16 tokens is ``K [D/16 pieces][32 lanes][4 registers]`` of two 16-bit values, then V likewise: 64 D bytes.

A **page** of 64 tokens, 68 D + 256 bytes::

    K codes   [4 blocks of 16 tokens] [D/16 pieces, four at a time] [32 lanes] [up to 4 words]     32 D bytes
    K scale, K zero    fp16 [D/16] [4] [4]    of channels 16 j + 2 t + (0, 1, 8, 9) at [j][t]      2 D each
    V codes   as those of K                                                                      32 D
    V scale, V zero    fp16 [64]              by token                                           128 each

A word holds the 8 codes of a lane's four registers: those of registers 2, 0, 3, 1 at bits 0, 4, 8, 12 (half 0) and 16, 20,
24, 28 (half 1), and the whole word turned left by 2. So ``(w & 0x03C003C0) | 0x3C003C00`` is two fp16 values 1 + code / 16 of
register 0, ``(w & 0x003C003C) | 0x3C003C00`` two values 1 + code / 256 of register 2, and after a turn by 8 to the right the
same of registers 1 and 3.

**Values.** ``(code - zero) * scale``, K with one scale and zero for each channel of a page (after KIVI, arXiv 2402.02750), V
with one for each token. A zero is a multiple of 1/4 between -240 and 255, so that 16 + zero and 256 + zero are exact in fp16
and kernels lose nothing when they fold it. Scales of V are at most 255.

At D = 128 a page is 4.375 bits a value, scales and zeros included.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PAGE = 64  # tokens
TILE = 16  # tokens
BITS = 4
HEAD_SIZES = (64, 80, 96, 128, 256)
MAX_V_SCALE = 255.0
_PLACES = (4, 12, 0, 8)  # bit of each register's code in its half of a word


def page_bytes(head_size: int) -> int:
    """Bytes of a page."""
    return 68 * head_size + 256


def tile_values(head_size: int) -> int:
    """16-bit values of a tile."""
    return 32 * head_size


def bits_per_value(head_size: int) -> float:
    """Bits that one value of the body takes, scales and zeros included."""
    return 8 * page_bytes(head_size) / (2 * PAGE * head_size)


def _piece() -> tuple[Tensor, Tensor]:
    """Row and column of every (lane, register, half) of a 16 x 16 piece, int64 ``[32, 4, 2]``."""
    lane, register, half = torch.meshgrid(torch.arange(32), torch.arange(4), torch.arange(2), indexing="ij")
    return lane // 4 + 8 * (register % 2), 2 * (lane % 4) + half + 8 * (register // 2)


@functools.cache
def _tile_order(head_size: int) -> tuple[Tensor, Tensor]:
    """Index into a flat ``[16, D]`` of every K value and of every V value of a tile, int64 ``[16 D]`` each."""
    row, column = _piece()
    pieces = torch.arange(head_size // 16).view(-1, 1, 1, 1)
    k = row * head_size + 16 * pieces + column
    v = column * head_size + 16 * pieces + row
    return k.reshape(-1), v.reshape(-1)


@functools.cache
def _page_order(head_size: int) -> tuple[Tensor, Tensor]:
    """Index into a flat ``[64, D]`` of every code of K and of V, int64 ``[8 D words, 4 registers, 2 halves]`` each."""
    row, column = _piece()
    blocks = torch.arange(PAGE // 16).view(-1, 1, 1, 1, 1)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    pieces = head_size // 16
    for first in range(0, pieces, 4):
        piece = torch.arange(first, min(first + 4, pieces)).view(1, 1, -1, 1, 1)
        r, c = row.view(1, 32, 1, 4, 2), column.view(1, 32, 1, 4, 2)
        parts[0].append(((16 * blocks + r) * head_size + 16 * piece + c).flatten(1, 2))
        parts[1].append(((16 * blocks + c) * head_size + 16 * piece + r).flatten(1, 2))
    k, v = (torch.cat(found, 1).reshape(-1, 4, 2) for found in parts)
    return k, v


@functools.cache
def _channel_order(head_size: int) -> Tensor:
    """Channel at each place of K's scales and zeros, int64 ``[D]``."""
    j, t, c = torch.meshgrid(torch.arange(head_size // 16), torch.arange(4), torch.arange(4), indexing="ij")
    return (16 * j + 2 * t + c % 2 + 8 * (c // 2)).reshape(-1)


def pack_tiles(k: Tensor, v: Tensor) -> Tensor:
    """Tokens to tiles.

    Args:
        k, v: ``[..., 16 n, D]`` of one 16-bit dtype.

    Returns:
        ``[..., n, 32 D]``.
    """
    d = k.shape[-1]
    return torch.cat(
        [
            t.unflatten(-2, (-1, TILE)).flatten(-2)[..., o.to(t.device)]
            for t, o in zip((k, v), _tile_order(d), strict=True)
        ],
        -1,
    )


def unpack_tiles(tiles: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Tiles ``[..., n, 32 D]`` to K and V ``[..., 16 n, D]``."""
    found = []
    for half, order in zip(tiles.chunk(2, -1), _tile_order(head_size), strict=True):
        flat = torch.empty_like(half)
        flat[..., order.to(tiles.device)] = half
        found.append(flat.unflatten(-1, (TILE, head_size)).flatten(-3, -2))
    return found[0], found[1]


def page_ranges(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales and zeros of a page by its extremes.

    Args:
        k, v: ``[..., 64, D]``.

    Returns:
        K scale and zero fp16 ``[..., D]``, V scale and zero fp16 ``[..., 64]``.
    """
    k_scale, k_zero = _range(k.float(), -2)
    v_scale, v_zero = _range(v.float(), -1, MAX_V_SCALE)
    return k_scale, k_zero, v_scale, v_zero


def _range(t: Tensor, dim: int, most: float = 65504.0) -> tuple[Tensor, Tensor]:
    low, high = t.amin(dim), t.amax(dim)
    size = torch.maximum(low.abs(), high.abs())
    # Never so small against the values that the zero would leave its range. Divisors are tensors: by a number, a GPU
    # would multiply with its rounded reciprocal, and the same tokens would give other pages than on a CPU.
    steps, reach = (low.new_full((), float(n)) for n in (2**BITS - 1, 240))
    scale = torch.maximum((high - low) / steps, size / reach).clamp(2.0**-14, most).half()
    return scale, (torch.round(-4 * low / scale.float()) / 4 + 0.0).half()  # + 0: no negative zero


def quantize_page(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Codes uint8 ``[..., 64, D]`` of K and of V, and what :func:`page_ranges` returns."""
    ranges = page_ranges(k, v)
    k_scale, k_zero, v_scale, v_zero = (t.float() for t in ranges)
    most = 2**BITS - 1
    k_codes = torch.round(k.float() / k_scale[..., None, :] + k_zero[..., None, :]).clamp(0, most)
    v_codes = torch.round(v.float() / v_scale[..., None] + v_zero[..., None]).clamp(0, most)
    return k_codes.byte(), v_codes.byte(), ranges


def pack_codes(codes: Tensor, order: Tensor) -> Tensor:
    """Codes uint8 ``[..., 64, D]`` to bytes ``[..., 32 D]`` in the order of words given."""
    flat = codes.flatten(-2)[..., order.to(codes.device)].long()
    shifts = torch.tensor(_PLACES, device=codes.device).view(4, 1) + 16 * torch.arange(2, device=codes.device)
    word = (flat << shifts).sum((-2, -1))
    turned = ((word << 2) | (word >> 30)) & 0xFFFFFFFF
    return (turned.unsqueeze(-1) >> (8 * torch.arange(4, device=codes.device)) & 0xFF).byte().flatten(-2)


def unpack_codes(packed: Tensor, order: Tensor, head_size: int) -> Tensor:
    """The inverse of :func:`pack_codes`."""
    parts = packed.unflatten(-1, (-1, 4)).long() << (8 * torch.arange(4, device=packed.device))
    turned = parts.sum(-1)
    word = ((turned >> 2) | (turned << 30)) & 0xFFFFFFFF
    shifts = torch.tensor(_PLACES, device=packed.device).view(4, 1) + 16 * torch.arange(2, device=packed.device)
    codes = (word[..., None, None] >> shifts) & 15
    flat = torch.empty((*packed.shape[:-1], PAGE * head_size), dtype=torch.uint8, device=packed.device)
    flat[..., order.reshape(-1).to(packed.device)] = codes.flatten(-3).byte()
    return flat.unflatten(-1, (PAGE, head_size))


def pack_pages(k: Tensor, v: Tensor) -> Tensor:
    """Quantize tokens to pages.

    Args:
        k, v: ``[..., 64 n, D]``, finite.

    Returns:
        uint8 ``[..., n, 68 D + 256]``.
    """
    d = k.shape[-1]
    k, v = (t.unflatten(-2, (-1, PAGE)) for t in (k, v))
    k_codes, v_codes, (k_scale, k_zero, v_scale, v_zero) = quantize_page(k, v)
    k_order, v_order = _page_order(d)
    channels = _channel_order(d).to(k.device)
    k_numbers = torch.cat([k_scale[..., channels], k_zero[..., channels]], -1).view(torch.uint8)
    v_numbers = torch.cat([v_scale, v_zero], -1).view(torch.uint8)
    return torch.cat([pack_codes(k_codes, k_order), k_numbers, pack_codes(v_codes, v_order), v_numbers], -1)


def unpack_pages(pages: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """The values of pages uint8 ``[..., n, 68 D + 256]``: K and V fp32 ``[..., 64 n, D]``."""
    d = head_size
    k_codes, k_numbers, v_codes, v_numbers = pages.split([32 * d, 4 * d, 32 * d, 256], -1)
    k_scale, k_zero = k_numbers.contiguous().view(torch.float16).float().chunk(2, -1)
    v_scale, v_zero = v_numbers.contiguous().view(torch.float16).float().chunk(2, -1)
    k_order, v_order = _page_order(d)
    back = torch.argsort(_channel_order(d)).to(pages.device)
    k = (unpack_codes(k_codes, k_order, d) - k_zero[..., None, back]) * k_scale[..., None, back]
    v = (unpack_codes(v_codes, v_order, d) - v_zero[..., None]) * v_scale[..., None]
    return k.flatten(-3, -2), v.flatten(-3, -2)
