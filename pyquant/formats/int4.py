"""The two orders of a 4-bit weight. Normative: ``csrc/format.cuh`` and ``kernels/int4.py`` mirror this file.

A weight is ``w_hat[n, k] = (codes[n, k] - zero[n, k // G]) * scale[n, k // G]`` with codes 0..15. A symmetric weight has
no stored zero: its zero is 8. Weights of 2 or 3 bits use the same 4-bit container and a smaller range of codes
(symmetric: 8 - 2^(b-1) .. 8 + 2^(b-1) - 1; asymmetric: 0 .. 2^b - 1), so that every kernel serves them.

1. The portable order, on disk
------------------------------
Each row is a stream of b-bit fields, least significant bit first, cut into int32 words and padded with zero bits::

    word 0 of a row at 4 bits    bit 31                                   bit 0
                                 | k=7 | k=6 | k=5 | k=4 | k=3 | k=2 | k=1 | k=0 |

A field holds ``q + 2^(b-1)`` for symmetric codes q, the code itself for asymmetric ones. At 4 bits this is
compressed-tensors' ``pack-quantized`` tensor and, transposed, GPTQ's ``qweight``.

2. The tiled order, in memory
-----------------------------
N is padded to a multiple of 64 and K to a multiple of 64 (code 8, scale 0: padding weighs nothing). The weight is cut into
units of 64 rows x 64 columns = 2,048 bytes, all units of a 64-row strip one after another along K, strip after strip::

    qweight int32 [N/64 strips, K/64 units, 128 threads, 4 words]

              K ->   64       64       64
    strip 0        unit 0 | unit 1 | unit 2 | ...      a thread block that walks K reads one linear stream
    strip 1        unit 0 | unit 1 | unit 2 | ...

Inside a unit, the 16 bytes of thread t (warp t / 32 owns rows 16*(t/32) .. +15) are its A-operand fragments for four
k16 steps of ``mma.sync.m16n8k16``, which are also the four stacked fragments of ``wgmma.m64nNk16`` with A in registers.
With g = (t % 32) / 4 and c = t % 4, word i (k16 step i) holds, for register j = 0..3 of the fragment::

    row  = 16 * (t / 32) + g + 8 * (j % 2)
    col  = 16 * i + 2 * c + 8 * (j / 2)             col     in nibble j      (bits 4j .. 4j+3)
                                                    col + 1 in nibble j + 4  (bits 4j+16 .. 4j+19)

           bit 31                                                 bit 0
           | j=3 k+1 | j=2 k+1 | j=1 k+1 | j=0 k+1 | j=3 k | j=2 k | j=1 k | j=0 k |

so that ``(word >> 4j) & 0x000f000f`` is one register: two codes ready to be turned into a pair of 16-bit floats. One
16-byte load a thread, contiguous over the warp, feeds a whole k64 step.

Scales (and zeros) go to the same lanes. A strip's 64 values of one group are stored as 32 pairs (row, row + 8)::

    scale [N/64 strips, padded K / G groups, 64]      position 2 * (8 * warp + g) + h   holds row 16 * warp + g + 8 * h

so that one 32-bit load gives a thread the 16-bit scales of its two rows. Zeros are uint8 in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant.formats.spec import num_groups

STRIP = 64  # rows of a unit
UNIT_K = 64  # columns of a unit
SYMMETRIC_ZERO = 8  # the zero of a symmetric weight in the 4-bit container


# ------------------------------------------------------------------------------------------------ portable order


def pack_bits(fields: Tensor, bits: int = 4) -> Tensor:
    """Pack unsigned fields into rows of int32 words, a dense little-endian bit stream.

    Args:
        fields: ``[N, K]`` integers in ``0 .. 2^bits - 1``.
        bits: width of a field, 1..8.

    Returns:
        int32 ``[N, ceil(K * bits / 32)]``.
    """
    n, k = fields.shape
    words = -(-k * bits // 32)
    first = torch.arange(k, device=fields.device) * bits  # bit where field k begins
    word, shift = first // 32, first % 32
    wide = fields.to(torch.int64) << shift  # at most 31 + 8 bits: the overflow belongs to the next word
    out = torch.zeros(n, words + 1, dtype=torch.int64, device=fields.device)
    out.index_add_(1, word, wide & 0xFFFFFFFF)
    out.index_add_(1, word + 1, wide >> 32)
    return _as_int32(out[:, :words])


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of :func:`pack_bits`: uint8 ``[N, k]``."""
    first = torch.arange(k, device=packed.device) * bits
    word, shift = first // 32, first % 32
    wide = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    both = wide[:, word] | (wide[:, word + 1] << 32)
    return ((both >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def codes_to_fields(codes: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Container codes (zero 8) to stored fields (zero ``2^(b-1)``); the identity for asymmetric weights."""
    return codes - (SYMMETRIC_ZERO - (1 << (bits - 1))) if symmetric else codes


def fields_to_codes(fields: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Inverse of :func:`codes_to_fields`."""
    return fields + (SYMMETRIC_ZERO - (1 << (bits - 1))) if symmetric else fields


# ------------------------------------------------------------------------------------------------ tiled order


def padded_shape(n: int, k: int) -> tuple[int, int]:
    """N and K rounded up to whole units."""
    return -(-n // STRIP) * STRIP, -(-k // UNIT_K) * UNIT_K


def tiled_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """Shape of ``qweight`` for a weight of n x k."""
    n_pad, k_pad = padded_shape(n, k)
    return n_pad // STRIP, k_pad // UNIT_K, 128, 4


def tiled_scale_shape(n: int, k: int, group_size: int) -> tuple[int, int, int]:
    """Shape of tiled scales and zeros for a weight of n x k."""
    n_pad, k_pad = padded_shape(n, k)
    return n_pad // STRIP, num_groups(k_pad, group_size), STRIP


# Both orders are permutations of bits of the row and column numbers, so a view and a permute tell them whole:
# row 0..63 = (warp 4, h 2, g 8), column 0..63 = (word 4, upper 2, c 4, second 2), nibble = 4 * second + 2 * upper + h.


def tile_codes(codes: Tensor) -> Tensor:
    """Codes uint8 ``[N, K]`` to ``qweight`` int32 ``[ceil(N/64), ceil(K/64), 128, 4]``."""
    n, k = codes.shape
    n_pad, k_pad = padded_shape(n, k)
    full = torch.nn.functional.pad(codes, (0, k_pad - k, 0, n_pad - n), value=SYMMETRIC_ZERO)
    #                strip        warp h  g  unit           word upper c second
    parts = full.view(n_pad // STRIP, 4, 2, 8, k_pad // UNIT_K, 4, 2, 4, 2)
    nibbles = parts.permute(0, 4, 1, 3, 7, 5, 8, 6, 2)  # strip, unit, (warp, g, c) = thread, word, (second, upper, h)
    nibbles = nibbles.reshape(n_pad // STRIP, k_pad // UNIT_K, 128, 4, 8)
    words = nibbles[..., 0].to(torch.int32)
    for i in range(1, 8):
        words = words | (nibbles[..., i].to(torch.int32) << (4 * i))
    return words


def untile_codes(qweight: Tensor, n: int, k: int) -> Tensor:
    """Inverse of :func:`tile_codes`: uint8 ``[n, k]``."""
    strips, units = qweight.shape[:2]
    nibbles = torch.stack([((qweight >> (4 * i)) & 0xF).to(torch.uint8) for i in range(8)], dim=-1)
    parts = nibbles.view(strips, units, 4, 8, 4, 4, 2, 2, 2)  # strip, unit, warp, g, c, word, second, upper, h
    full = parts.permute(0, 2, 8, 3, 1, 5, 7, 4, 6)
    return full.reshape(strips * STRIP, units * UNIT_K)[:n, :k]


def tile_scale(scale: Tensor, k: int, group_size: int, fill: float = 0) -> Tensor:
    """Row-major scales or zeros ``[N, ceil(k/G)]`` to tiled order ``[ceil(N/64), padded groups, 64]``, same dtype."""
    n = scale.shape[0]
    strips, groups, _ = tiled_scale_shape(n, k, group_size)
    full = torch.nn.functional.pad(scale, (0, groups - scale.shape[1], 0, strips * STRIP - n), value=fill)
    return full.view(strips, 4, 2, 8, groups).permute(0, 4, 1, 3, 2).reshape(strips, groups, STRIP)


def untile_scale(tiled: Tensor, n: int, k: int, group_size: int) -> Tensor:
    """Inverse of :func:`tile_scale`: ``[n, ceil(k/G)]``."""
    strips, groups, _ = tiled.shape
    row_major = tiled.view(strips, groups, 4, 8, 2).permute(0, 2, 4, 3, 1).reshape(strips * STRIP, groups)
    return row_major[:n, : num_groups(k, group_size)].contiguous()


def expand_groups(per_group: Tensor, k: int, group_size: int) -> Tensor:
    """``[N, ceil(k/G)]`` to ``[N, k]``: each group's value at each of its columns."""
    if per_group.shape[1] == 1:
        return per_group.expand(-1, k)
    return per_group.repeat_interleave(group_size, dim=1)[:, :k]


def _as_int32(words: Tensor) -> Tensor:
    """int64 values 0 .. 2^32-1 to the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
