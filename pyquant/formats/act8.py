"""8-bit activations as products with 4-bit weights take them. Normative: ``csrc/act8.cuh`` and Triton kernels mirror it.

A token ``x[m, :]`` becomes codes and scales, ``x[m, k] ~ codes[m, k] * scale[m, k // G]`` with G along K or one scale for the
whole token (-1). Codes are int8 (of 8 bits or fewer: 4- and 3-bit codes ride in the same bytes), or fp8 e4m3.

1. The order of codes
---------------------
K is padded with zeros to a multiple of 64, the unit of the weight's tiled order, and inside each 16 columns codes stand in
the order in which the weight's nibbles come out of a word with one mask (:mod:`pyquant.formats.int4`)::

    position 4 c + b      holds column  2 c + 8 (b % 2) + b // 2         c, b = 0..3

    position   0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12 13 14 15
    column     0  8  1  9 |  2 10  3 11 |  4 12  5 13 |  6 14  7 15

Why: word i of a thread of the weight holds, in its even nibbles, row g and in its odd nibbles row g + 8 of columns
``2c, 2c + 8, 2c + 1, 2c + 9`` of k16 step i. So ``word & 0x0f0f0f0f`` and ``(word >> 4) & 0x0f0f0f0f`` are registers of the
A operand of an 8-bit product (``mma.m16n8k32``, ``wgmma.m64nNk32``), whose thread holds columns ``4c .. 4c + 3`` of each 16:
the same 16 columns, if x has them in this order. A product over K does not care about the order of K.

2. Scales, and sums of codes
----------------------------
``scale [M, groups]``, and ``sums [M, pieces]`` of the codes of each :func:`sum_size` columns, with which products correct by
the weight's zeros, are fp32, stored group after group with M padded to a multiple of 4: strides ``(1, M4)``, so that the
values of neighbouring tokens can be copied as one piece.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyquant.formats.int4 import UNIT_K

ORDER = tuple(2 * (p // 4) + 8 * (p % 2) + p % 4 // 2 for p in range(16))  # column of each position of 16
FP8 = torch.float8_e4m3fn
FP8_TOP = 448.0  # the largest e4m3


def padded_columns(k: int) -> int:
    """K of the codes: rounded up to whole units of the weight."""
    return -(-k // UNIT_K) * UNIT_K


def sum_size(group_size: int, act_group_size: int) -> int:
    """Columns of a sum of codes for these groups of a weight and of tokens: 128, or 32 where tokens have groups, or the
    weight's are smaller than 128."""
    return 32 if 0 < group_size < 128 or act_group_size != -1 else 128


def needs_sums(symmetric: bool, dtype: torch.dtype) -> bool:
    """Whether a product takes sums of codes at all: with zeros, and where codes are e4m3."""
    return not symmetric or dtype != torch.int8


def order_codes(codes: Tensor) -> Tensor:
    """Codes ``[..., K]`` in the order of columns to the order of the products, ``[..., padded K]``, zeros in the padding."""
    k = codes.shape[-1]
    full = torch.nn.functional.pad(codes.view(torch.uint8), (0, padded_columns(k) - k)).view(codes.dtype)
    return _permute(full, torch.tensor(ORDER, device=codes.device))


def plain_codes(codes: Tensor, k: int) -> Tensor:
    """Inverse of :func:`order_codes`: ``[..., k]``."""
    return _permute(codes, torch.tensor(ORDER, device=codes.device).argsort())[..., :k]


def _permute(codes: Tensor, order: Tensor) -> Tensor:
    blocks = codes.view(torch.uint8).unflatten(-1, (-1, 16))
    return blocks[..., order].flatten(-2).view(codes.dtype)


def empty_groups(like: Tensor, lead: tuple[int, ...], groups: int) -> Tensor:
    """Uninitialised fp32 ``[*lead, groups]`` with the strides of section 2."""
    rows = -(-math.prod(lead) // 4) * 4
    stored = like.new_empty((groups, rows), dtype=torch.float32)
    strides = [math.prod(lead[i + 1 :]) for i in range(len(lead))]
    return stored.as_strided((*lead, groups), (*strides, rows))


def store_groups(values: Tensor) -> Tensor:
    """fp32 ``[*lead, groups]`` copied to the strides of section 2."""
    return empty_groups(values, tuple(values.shape[:-1]), values.shape[-1]).copy_(values)
