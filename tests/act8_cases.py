"""Inputs, references, tolerances and planted faults of the ops with 8-bit activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cases import U32, Want, Weight, make_weight, make_x, unit_roundoff
from pyquant.formats import act8, int4


@dataclass(frozen=True)
class Act8Case:
    """One quantize_activation and the product of its codes with a weight."""

    m: int
    n: int
    k: int
    group_size: int
    act_group_size: int = -1
    symmetric: bool = True
    bias: bool = False
    bits: int = 8
    clip: float = 1.0
    dtype: torch.dtype = torch.int8
    layout: str = "contiguous"

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "zero"
        codes = "e4m3" if self.dtype == act8.FP8 else f"a{self.bits}"
        return f"{self.m}x{self.n}x{self.k}-g{self.group_size}-{codes}-g{self.act_group_size}-{kind}-{self.layout}"

    @property
    def sum_size(self) -> int:
        return act8.sum_size(self.group_size, self.act_group_size)

    @property
    def how(self) -> tuple:
        return self.bits, self.act_group_size, self.clip, self.dtype, self.sum_size


# Tiles are 128 features by 16 to 256 tokens, stages of 128 columns: edges and neighbours; every kind of groups.
CASES = (
    Act8Case(1, 64, 64, 64),
    Act8Case(1, 1, 1, -1, symmetric=False, bias=True),
    Act8Case(3, 65, 129, 128, bias=True),
    Act8Case(2, 63, 127, 32, symmetric=False),
    Act8Case(5, 130, 1000, 128, bits=4, clip=0.9, layout="rows"),
    Act8Case(16, 128, 640, 128, act_group_size=128, bits=4),
    Act8Case(17, 129, 200, 64, act_group_size=32, symmetric=False, bias=True, layout="columns"),
    Act8Case(33, 191, 704, -1, act_group_size=64, layout="transposed"),
    Act8Case(64, 256, 512, 128, bits=3),
    Act8Case(65, 70, 1025, -1, symmetric=False, bias=True),
    Act8Case(129, 257, 577, 128, symmetric=False),
    Act8Case(300, 96, 384, 128, bias=True),
    Act8Case(4, 65, 300, 128, dtype=act8.FP8),
    Act8Case(40, 130, 640, 64, symmetric=False, dtype=act8.FP8, bias=True),
    Act8Case(130, 129, 1000, -1, act_group_size=128, dtype=act8.FP8),
)
LARGE_CASES = (
    Act8Case(1, 4096, 4096, 128),
    Act8Case(64, 2048, 4096, 128, bias=True),
    Act8Case(1000, 1024, 2048, 128),
    Act8Case(257, 1000, 4000, -1, symmetric=False),
    Act8Case(513, 768, 3072, 128, act_group_size=128, bits=4),
    Act8Case(600, 512, 4096, 128, dtype=act8.FP8),
)


def make(case: Act8Case, half: torch.dtype, device: str) -> tuple[Tensor, Weight, Tensor | None]:
    """x with a channel of outliers, a weight, and a bias."""
    x = make_x(case.m, case.k, case.layout, half, device)
    x[:, case.k // 2] *= 8
    weight = make_weight(case.n, case.k, case.group_size, case.symmetric, half, device)
    return x, weight, torch.randn(case.n, device=device).to(half) if case.bias else None


def exact_sums(codes: Tensor, weight: Weight) -> Tensor:
    """``sum of code * (w - zero)``, in fp64, which holds them exactly."""
    k = weight.shape[1]
    return act8.plain_codes(codes, k).double() @ weight.steps.T


def want_linear(
    case: Act8Case, codes: Tensor, act_scale: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype
) -> Want:
    """The product of these codes and scales by a kernel that returns dtype.

    A right kernel errs by the last rounding, u |y|, and by fp32 work on exact sums of pieces: each piece is scaled (two or
    three roundings) and added, where a partial sum stays below about 4 l2 with l2 = sqrt(sum (x w)^2); 4 more for the bias
    and the token's scale. Zeros are subtracted from sums of codes about 16 times as large as what remains of them, in fp32
    numbers that are exact integers up to 2^24, so they add nothing.

    e4m3: the tensor cores align the 32 terms of a step, and the sum so far, to the largest of them and keep 13 bits or more
    of it: an error of at most 2^-13 of the largest a step, and steps of a piece of K add up. Codes are multiplied as 0..15
    and corrected by the zero: largest terms are up to 15 |x|, which is at most 4 l2 / sqrt(K) times 16.
    """
    x = act8.plain_codes(codes, case.k).double()
    x = x * int4.expand_groups(act_scale.double().reshape(case.m, -1), case.k, case.act_group_size)
    value, l2 = x @ weight.w_hat.T, (x.square() @ weight.w_hat.square().T).sqrt()
    if bias is not None:
        value = value + bias.double()
    pieces = -(-case.k // 32)
    u = unit_roundoff(dtype)
    sums = 2 * U32 * (pieces + 8) * 4 * (l2 if bias is None else l2 + bias.double().abs())
    rms = u + 2 * U32 * (8 + pieces**0.5)
    if case.dtype == act8.FP8:
        w = int4.expand_groups(weight.scale.double(), case.k, case.group_size) * 16
        sums = sums + 2.0**-13 * (x.square() @ w.square().T).sqrt() * 6
        rms = rms + 2.0**-13 * 16
    return Want(value, u * value.abs() + sums + torch.finfo(dtype).tiny, rms)


def swap_positions(codes: Tensor) -> Tensor:
    """Codes of neighbouring positions exchanged, as if the order of columns were taken wrongly."""
    bytes_of = codes.view(torch.uint8)
    return bytes_of.view(*codes.shape[:-1], -1, 2).flip(-1).reshape(codes.shape).view(codes.dtype)


def sample_calls(device: str) -> dict[str, list[tuple]]:
    """Argument tuples for each op of this file."""
    x, gate_up = torch.randn(3, 5, 192, device=device).half(), torch.randn(2, 7, 200, device=device).half()
    weight, small = torch.randn(192, device=device).half(), torch.eye(3, device=device)
    ways = [(8, -1, 1.0, torch.int8, 0), (4, 32, 0.9, torch.int8, 128), (8, -1, 1.0, act8.FP8, -1)]
    wide = x.transpose(0, 1)
    calls: dict[str, list[tuple]] = {
        "quantize_activation": [(t, *how) for how in ways for t in (x, wide)],
        "rms_norm_quantize": [(wide, weight, 1e-6, *how) for how in ways],
        "silu_and_mul_quantize": [(gate_up, *how) for how in ways],
        "hadamard_quantize": [(wide, small, *how) for how in ways] + [(x[..., :64], None, *ways[0])],
        "linear_w4a8": [],
    }
    for symmetric in (True, False):
        case = Act8Case(6, 70, 100, 32, symmetric=symmetric, bias=symmetric)
        x, made, bias = make(replace(case, act_group_size=-1 if symmetric else 64), torch.float16, device)
        from pyquant import ops

        codes, scale, sums = ops.quantize_activation(x, *case.how)
        shape = (2, 3)
        calls["linear_w4a8"].append(
            (codes.view(*shape, -1), scale.view(*shape, -1), sums.view(*shape, -1), *made.tiled(), bias, 70, 100, 32, -1,
             torch.float32 if symmetric else torch.float16)
        )  # fmt: skip
    return calls
