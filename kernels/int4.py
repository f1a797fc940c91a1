"""The tiled order of a 4-bit weight for Triton. Mirrors :mod:`pyquant.formats.int4`, the norm, which has the pictures.

A unit is 64 rows x 64 columns in 512 int32 words; a strip of 64 rows is a line of units along K. Two ways to see one:

* element by element, for gathers and tests: :func:`unit_word`, :func:`unit_shift`, :func:`scale_position`;
* whole, for kernels: both orders are permutations of the bits of the row and column numbers, so a reshape and a permute
  turn words into a tile and back (:func:`words_to_tile`, :func:`tile_to_words`)::

      row    0..63  = (warp 4, h 2, g 8)                       thread = (warp, g, c)
      column 0..63  = (word 4, upper 2, c 4, second 2)         nibble = (second, upper, h)

With the words loaded as ``[128 threads, words]`` the tile's element (row, column) is already in the register of the
lane that feeds it to the tensor core as the A operand, so on NVIDIA GPUs the permutation need not move any data.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyquant.formats import int4

STRIP = tl.constexpr(64)  # rows of a unit
UNIT_K = tl.constexpr(64)  # columns of a unit
UNIT_WORDS = tl.constexpr(512)  # int32 words of a unit
SYMMETRIC_ZERO = tl.constexpr(8)  # the zero of a symmetric weight

assert (STRIP.value, UNIT_K.value, SYMMETRIC_ZERO.value) == (int4.STRIP, int4.UNIT_K, int4.SYMMETRIC_ZERO)
assert UNIT_WORDS.value == 128 * 4 == int4.STRIP * int4.UNIT_K // 8

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: fp32 numbers of this size are integers


@triton.jit
def unit_word(row, col):
    """Which of a unit's 512 words holds the code at row, col (both 0..63)."""
    thread = (row // 16) * 32 + (row % 8) * 4 + (col % 8) // 2
    return thread * 4 + col // 16


@triton.jit
def unit_shift(row, col):
    """Lowest bit, 0..28, of the code at row, col inside its word."""
    nibble = 4 * (col % 2) + 2 * ((col // 8) % 2) + (row // 8) % 2
    return 4 * nibble


@triton.jit
def scale_position(row):
    """Where the 64 scales of a strip and group hold row 0..63."""
    return 2 * (8 * (row // 16) + row % 8) + (row // 8) % 2


@triton.jit
def nibble(words, J: tl.constexpr):
    """Nibble J of each word, int32 0..15."""
    return (words >> (4 * J)) & 0xF


@triton.jit
def words_to_tile(words, UNITS: tl.constexpr, STRIPS: tl.constexpr, WORDS: tl.constexpr):
    """Words ``[UNITS, STRIPS, 128 threads, WORDS]`` to codes 0..15 ``[64 * STRIPS rows, 16 * WORDS * UNITS columns]``.

    ``tl.join`` keeps a word's nibbles in the lane that loaded the word; broadcasting shifts along a new axis would deal
    them out to eight lanes and move every code through shared memory.
    """
    low = tl.join(tl.join(nibble(words, 0), nibble(words, 4)), tl.join(nibble(words, 2), nibble(words, 6)))
    high = tl.join(tl.join(nibble(words, 1), nibble(words, 5)), tl.join(nibble(words, 3), nibble(words, 7)))
    #                                       unit   strip   warp g  c  word   second upper h
    parts = tl.reshape(tl.join(low, high), UNITS, STRIPS, 4, 8, 4, WORDS, 2, 2, 2)
    # row = (strip, warp, h, g), column = (unit, word, upper, c, second)
    parts = tl.permute(parts, 1, 2, 8, 3, 0, 5, 7, 4, 6)
    return tl.reshape(parts, 64 * STRIPS, 16 * WORDS * UNITS)


@triton.jit
def tile_to_words(codes):
    """Pack int32 codes 0..15 ``[64, 64]`` to the words ``[512]`` of a unit."""
    #                         warp h  g  word upper c second
    parts = tl.reshape(codes, 4, 2, 8, 4, 2, 4, 2)
    parts = tl.permute(parts, 0, 2, 5, 3, 6, 4, 1)  # (warp, g, c) = thread, word, (second, upper, h) = nibble
    # Split rather than sum over an axis of nibbles: compiled for sm_90 by triton 3.6, that sum gave wrong words.
    even, odd = tl.split(tl.reshape(parts, 512, 2, 2, 2))  # h = 0, 1
    n0_n4, n2_n6 = tl.split(even)  # upper = 0, 1
    n1_n5, n3_n7 = tl.split(odd)
    n0, n4 = tl.split(n0_n4)  # second = 0, 1
    n1, n5 = tl.split(n1_n5)
    n2, n6 = tl.split(n2_n6)
    n3, n7 = tl.split(n3_n7)
    low = n0 | (n1 << 4) | (n2 << 8) | (n3 << 12)
    return low | (n4 << 16) | (n5 << 20) | (n6 << 24) | (n7 << 28)


@triton.jit
def code_to_float(codes):
    """int32 codes 0..255 to fp32 by their bits: an or and a subtraction instead of the slow conversion unit."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0  # 0x4B000000 = 2^23, whose ulp is 1


@triton.jit
def round_half_even(v):
    """Round fp32 to the nearest integer, ties to even; valid below 2^22. Adding 1.5 * 2^23 drops the fraction."""
    return (v + _MAGIC) - _MAGIC


@triton.jit
def clamp(v, low, high):
    """v limited to low..high."""
    return tl.minimum(tl.maximum(v, low), high)


@triton.jit
def clamp_keeping_nan(v, low, high):
    """v limited to low..high; NaN stays, where :func:`clamp` makes it low."""
    above = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, high, propagate_nan=tl.PropagateNan.ALL)
