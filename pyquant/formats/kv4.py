"""The KV cache in mixed precision: a 16-bit prompt, a low-bit body, a 16-bit window of the newest tokens. Normative.

The tokens of one sequence, as one KV head stores them::

    position   0 .. prompt-1      | prompt .. prompt+64*pages-1              | .. length-1
    segment    prompt             | body                                     | window
    held as    tiles of 16 tokens | pages of 64 tokens, 2, 3, 4 or 8 bits    | a ring of tiles of 16 tokens

    prompt  16 bit  [B or 1, Hkv, prompt tiles, 32 D]     one prompt for the batch where the first size is 1
    pages   uint8   [B, Hkv, page capacity, 16 bits D + 4 D + 256]    the size of a page says its bits
    window  16 bit  [B, Hkv, ring tiles, 32 D]            the token at position p is in slot (p - prompt) mod (16 ring tiles)
    segments int32  [B, 3]                                prompt tokens, pages, length

**Fragments.** Everything lies as the A operand of ``mma.m16n8k16`` wants it, so that a lane reads its registers as they are.
Of a 16 x 16 piece (rows r, columns c), lane ``4 (r % 8) + (c % 8) / 2`` holds element (r, c) in half ``c % 2`` of register
``r / 8 + 2 (c / 8)``. For the scores the rows are tokens and the columns are channels; for the output, which is
V^T P^T, the rows are channels and the columns are tokens.

A **tile** of 16 tokens is ``K [D/16 pieces][32 lanes][4 registers]`` of two 16-bit values, then V likewise: 64 D bytes.

A **page** of 64 tokens is four blocks of 16::

    K codes   one plane, or two (3 bits)                                      8 bits D bytes
    K scale, K zero    fp16 [D/16] [4] [4]    of channels 16 j + 2 t + (0, 1, 8, 9) at [j][t]      2 D each
    V codes   as those of K                                                   8 bits D
    V scale, V zero    fp16 [64]              by token                        128 each

    plane     [4 / S groups of S blocks] [D/16 pieces, P at a time] [32 lanes] [up to P pieces' words], whole words of 32 bits

A plane holds w bits of each code, and its word the codes of a lane's four registers in S blocks (8 bits: of two registers)::

    bits  planes                              w   S   P            a word is turned left by
    8     the code                            8   1   2            0
    4     the code                            4   1   4            2
    2     the code                            2   2   4            5
    3     the two lower bits, the highest     2,1 2,4 4            5, 7

Before the turn, the bits of register r, block s of the S and half h lie from this bit on (half 1 in the upper 16 bits)::

    8     16 (r % 2) + 8 h                    registers 0 and 1 in the first word of a piece, 2 and 3 in the second
    4     4 (1 - r/2) + 8 (r % 2) + 16 h
    2     2 (1 - r/2) + 4 (r % 2) + 8 s + 16 h
    1     2 (1 - r/2) + 4 (r % 2) + 8 (s % 2) + s/2 + 16 h

so that masks of turned words are fp16 numbers. 4 bits: ``(w & 0x03C003C0) | 0x3C003C00`` is two values 1 + code / 16 of
register 0, ``(w & 0x003C003C) | 0x3C003C00`` two values 1 + code / 256 of register 2, and after a turn by 8 to the right the
same of registers 1 and 3. 2 bits: after a turn by 8 s + 4 (r % 2), masks 0x0180 and 0x0060 give 1 + code / 8 and 1 + code / 32.
3 bits: the same, and the highest bit lies above at 0x0200 and 0x0080 after a turn by 8 (s % 2) + 4 (r % 2) + s/2. 8 bits: bytes
under 0x64 are 1024 + code.

**Values.** ``(code - zero) * scale``, K with one scale and zero for each channel of a page (after KIVI, arXiv 2402.02750), V
with one for each token. Zeros are such that kernels lose nothing when they fold them. Up to 4 bits: a multiple of 1/4 between
-240 and 255, so that 16 + zero and 256 + zero are exact in fp16. 8 bits: a whole number between -1024 and 1024, so that
1024 + zero and code - zero are. Scales of V are at most 255.

At D = 128 a page is ``bits + 0.375`` bits a value, scales and zeros included. The planes are our own layout.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PAGE = 64  # tokens
TILE = 16  # tokens
BITS = (2, 3, 4, 8)
HEAD_SIZES = (64, 80, 96, 128, 256)
MAX_V_SCALE = 255.0
_PLANES = {
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    8: ((8, 0),),
}  # width of each plane, its lowest bit of a code
_SPANS = {8: 1, 4: 1, 2: 2, 1: 4}  # blocks that a word of a plane reaches over, by width
_TURNS = {8: 0, 4: 2, 2: 5, 1: 7}


def page_bytes(head_size: int, bits: int = 4) -> int:
    """Bytes of a page.

    Raises:
        ValueError: bits that pages do not have.
    """
    if bits not in BITS:
        raise ValueError(f"pages of {bits} bits: there are those of {', '.join(map(str, BITS))}")
    return 16 * bits * head_size + 4 * head_size + 256


def bits_of(size: int, head_size: int) -> int:
    """The bits of pages of ``size`` bytes; 0 where no pages are of that size."""
    return next((bits for bits in BITS if page_bytes(head_size, bits) == size), 0)


def tile_values(head_size: int) -> int:
    """16-bit values of a tile."""
    return 32 * head_size


def bits_per_value(head_size: int, bits: int = 4) -> float:
    """Bits that one value of the body takes, scales and zeros included."""
    return 8 * page_bytes(head_size, bits) / (2 * PAGE * head_size)


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
def _plane_order(head_size: int, width: int) -> tuple[Tensor, Tensor]:
    """Index into a flat ``[64, D]`` of every field of a plane of K and of V, int64 ``[2 width D words, 32 / width]`` each."""
    row, column = _piece()
    span, group, pieces = _SPANS[width], 2 if width == 8 else 4, head_size // 16
    blocks = torch.arange(PAGE // 16).view(-1, 1, 1, span, 1, 1)
    r, c = row.view(1, 32, 1, 1, 4, 2), column.view(1, 32, 1, 1, 4, 2)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first in range(0, pieces, group):
        piece = torch.arange(first, min(first + group, pieces)).view(1, 1, -1, 1, 1, 1)
        for found, token, channel in ((parts[0], r, c), (parts[1], c, r)):
            index = (16 * blocks + token) * head_size + 16 * piece + channel  # [4 / span, 32, pieces, span, 4, 2]
            found.append(index.reshape(PAGE // 16 // span, -1, 32 // width))
    k, v = (torch.cat(found, 1).reshape(-1, 32 // width) for found in parts)
    return k, v


@functools.cache
def _plane_shifts(width: int) -> Tensor:
    """Bit of each field before the turn, int64 ``[32 / width]``."""
    if width == 8:
        return 8 * torch.arange(4)
    s, r, h = torch.meshgrid(torch.arange(_SPANS[width]), torch.arange(4), torch.arange(2), indexing="ij")
    near = 1 - r // 2
    at = {4: 4 * near + 8 * (r % 2), 2: 2 * near + 4 * (r % 2) + 8 * s}
    at[1] = 2 * near + 4 * (r % 2) + 8 * (s % 2) + s // 2
    return (at[width] + 16 * h).reshape(-1)


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


def page_ranges(k: Tensor, v: Tensor, bits: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales and zeros of a page by its extremes.

    Args:
        k, v: ``[..., 64, D]``.
        bits: 2, 3, 4 or 8.

    Returns:
        K scale and zero fp16 ``[..., D]``, V scale and zero fp16 ``[..., 64]``.
    """
    k_scale, k_zero = _range(k.float(), -2, bits)
    v_scale, v_zero = _range(v.float(), -1, bits, MAX_V_SCALE)
    return k_scale, k_zero, v_scale, v_zero


def _range(t: Tensor, dim: int, bits: int, most: float = 65504.0) -> tuple[Tensor, Tensor]:
    low, high = t.amin(dim), t.amax(dim)
    size = torch.maximum(low.abs(), high.abs())
    # Never so small against the values that the zero would leave its range. Divisors are tensors: by a number, a GPU
    # would multiply with its rounded reciprocal, and the same tokens would give other pages than on a CPU.
    reach, grid = (1023, 1) if bits == 8 else (240, 4)
    steps, farthest = (low.new_full((), float(n)) for n in (2**bits - 1, reach))
    scale = torch.maximum((high - low) / steps, size / farthest).clamp(2.0**-14, most).half()
    return scale, (torch.round(-grid * low / scale.float()) / grid + 0.0).half()  # + 0: no negative zero


def quantize_page(k: Tensor, v: Tensor, bits: int = 4) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Codes uint8 ``[..., 64, D]`` of K and of V, and what :func:`page_ranges` returns."""
    ranges = page_ranges(k, v, bits)
    k_scale, k_zero, v_scale, v_zero = (t.float() for t in ranges)
    most = 2**bits - 1
    k_codes = torch.round(k.float() / k_scale[..., None, :] + k_zero[..., None, :]).clamp(0, most)
    v_codes = torch.round(v.float() / v_scale[..., None] + v_zero[..., None]).clamp(0, most)
    return k_codes.byte(), v_codes.byte(), ranges


def _turned_left(word: Tensor, by: int) -> Tensor:
    """Words of 32 bits in int64."""
    return ((word << by) | (word >> (32 - by))) & 0xFFFFFFFF


def pack_codes(codes: Tensor, bits: int, of_k: bool) -> Tensor:
    """Codes uint8 ``[..., 64, D]`` of a page's K or V to its planes, bytes ``[..., 8 bits D]``."""
    planes, flat = [], codes.flatten(-2)
    for width, lowest in _PLANES[bits]:
        order = _plane_order(codes.shape[-1], width)[0 if of_k else 1].to(codes.device)
        fields = (flat[..., order].long() >> lowest) & (2**width - 1)
        word = _turned_left((fields << _plane_shifts(width).to(codes.device)).sum(-1), _TURNS[width])
        planes.append((word.unsqueeze(-1) >> (8 * torch.arange(4, device=codes.device)) & 0xFF).byte().flatten(-2))
    return torch.cat(planes, -1)


def unpack_codes(packed: Tensor, bits: int, of_k: bool) -> Tensor:
    """The inverse of :func:`pack_codes`."""
    size = packed.shape[-1] // (8 * bits)
    flat = torch.zeros((*packed.shape[:-1], PAGE * size), dtype=torch.uint8, device=packed.device)
    planes = packed.split([8 * width * size for width, _ in _PLANES[bits]], -1)
    for plane, (width, lowest) in zip(planes, _PLANES[bits], strict=True):
        order = _plane_order(size, width)[0 if of_k else 1].to(packed.device).reshape(-1)
        turned = (plane.unflatten(-1, (-1, 4)).long() << (8 * torch.arange(4, device=packed.device))).sum(-1)
        word = _turned_left(turned, 32 - _TURNS[width])
        fields = (word.unsqueeze(-1) >> _plane_shifts(width).to(packed.device)) & (2**width - 1)
        flat[..., order] |= (fields << lowest).byte().flatten(-2)
    return flat.unflatten(-1, (PAGE, size))


def pack_pages(k: Tensor, v: Tensor, bits: int = 4) -> Tensor:
    """Quantize tokens to pages.

    Args:
        k, v: ``[..., 64 n, D]``, finite.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 ``[..., n, 16 bits D + 4 D + 256]``.
    """
    k, v = (t.unflatten(-2, (-1, PAGE)) for t in (k, v))
    k_codes, v_codes, (k_scale, k_zero, v_scale, v_zero) = quantize_page(k, v, bits)
    channels = _channel_order(k.shape[-1]).to(k.device)
    k_numbers = torch.cat([k_scale[..., channels], k_zero[..., channels]], -1).view(torch.uint8)
    v_numbers = torch.cat([v_scale, v_zero], -1).view(torch.uint8)
    return torch.cat([pack_codes(k_codes, bits, True), k_numbers, pack_codes(v_codes, bits, False), v_numbers], -1)


def unpack_pages(pages: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """The values of pages uint8 ``[..., n, page_bytes]``: K and V fp32 ``[..., 64 n, D]``.

    Raises:
        ValueError: pages of a size that no bits give.
    """
    d, bits = head_size, bits_of(pages.shape[-1], head_size)
    if not bits:
        raise ValueError(f"{pages.shape[-1]} bytes are no page of head size {d}: {[page_bytes(d, b) for b in BITS]}")
    k_codes, k_numbers, v_codes, v_numbers = pages.split([8 * bits * d, 4 * d, 8 * bits * d, 4 * PAGE], -1)
    k_scale, k_zero = k_numbers.contiguous().view(torch.float16).float().chunk(2, -1)
    v_scale, v_zero = v_numbers.contiguous().view(torch.float16).float().chunk(2, -1)
    back = torch.argsort(_channel_order(d)).to(pages.device)
    k = (unpack_codes(k_codes, bits, True) - k_zero[..., None, back]) * k_scale[..., None, back]
    v = (unpack_codes(v_codes, bits, False) - v_zero[..., None]) * v_scale[..., None]
    return k.flatten(-3, -2), v.flatten(-3, -2)
