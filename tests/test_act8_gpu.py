"""linear_w4a8 on a Hopper GPU: every tile and way to cut the work, of every kind of scales, zeros and codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from act8_cases import Act8Case, exact_sums, make, want_linear

from cases import WEIGHT_FAULTS, mismatch
from pyquant import ops
from pyquant.formats import act8
from pyquant.ops import _registry
from pyquant.ops.linear import _multiprocessors
from pyquant.ops.linear_a8 import _launch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper_extension(monkeypatch):
    why = _registry.unavailable("cuda", "cuda")
    if why:
        pytest.skip(why)
    monkeypatch.setenv("PYQUANT_BACKEND", "cuda")
    if not _multiprocessors(torch.cuda.current_device()):
        pytest.skip("wgmma needs a Hopper GPU")


SIZES = ((1, 200, 1096), (9, 384, 4096), (70, 1000, 840), (130, 2000, 640), (300, 130, 2056))
KINDS = {
    "symmetric": Act8Case(1, 1, 1, 128),
    "per channel": Act8Case(1, 1, 1, -1),
    "groups of tokens": Act8Case(1, 1, 1, 128, act_group_size=128, bits=4),
    "zeros": Act8Case(1, 1, 1, 128, symmetric=False),
    "zeros per channel": Act8Case(1, 1, 1, -1, symmetric=False),
    "e4m3": Act8Case(1, 1, 1, 128, dtype=act8.FP8),
    "small groups": Act8Case(1, 1, 1, 64, act_group_size=32),
    "small steps of zeros": Act8Case(1, 1, 1, -1, act_group_size=128, symmetric=False),
    "small groups and zeros": Act8Case(1, 1, 1, 32, symmetric=False),
    "small groups of e4m3": Act8Case(1, 1, 1, 128, act_group_size=64, dtype=act8.FP8),
}


def tiles(kind: str) -> list[int]:
    """Tiles of csrc/linear_w4a8.cuh by name: tokens, and rows before them where they are not 128; 8 is linear_w4a8_mma.cu."""
    if kind in ("symmetric", "per channel"):
        return [8, 16, 32, 64, 256, 192064, 192128]
    small = [16, 64] if kind.startswith("small") else [16, 64, 192128]
    return small if "e4m3" in kind else [8, *small]


WAYS = [
    pytest.param(kind, tile, cut, id=f"{kind}-{tile}-{cut}")
    for kind in KINDS
    for tile in tiles(kind)
    for cut in range(1 if tile == 8 else 3 if tile <= 64 else 2)
]


def call(case, codes, scale, sums, weight, bias, dtype, tile, cut):
    y = torch.full((case.m, case.n), float("nan"), dtype=dtype, device="cuda")
    args = case.n, case.k, case.group_size, case.act_group_size
    _launch(y, codes, scale, sums, *weight.tiled(), bias, *args, tile, cut)
    return y


@pytest.mark.parametrize(("kind", "tile", "cut"), WAYS)
def test_every_way_to_cut_the_work(kind, tile, cut):
    for m, n, k in SIZES:
        if m > 8 * (tile % 1000):
            continue
        case = replace(KINDS[kind], m=m, n=n, k=k, bias=True)
        half = torch.bfloat16 if case.symmetric else torch.float16
        x, weight, bias = make(case, half, "cuda")
        codes, scale, sums = ops.quantize_activation(x, *case.how)
        for dtype in (half, torch.float32):
            got = call(case, codes, scale, sums, weight, bias, dtype, tile, cut)
            want = want_linear(case, codes, scale, weight, bias, dtype)
            assert mismatch(got, want) is None, (m, n, k)
        for name, fault in WEIGHT_FAULTS.items():
            if name == "wrong code" and m == 1:
                continue  # it meets one value of x, which may be close to 0
            wrong = call(case, codes, scale, sums, fault(weight), bias, torch.float32, tile, cut)
            assert mismatch(wrong, want) is not None, name
        if case.dtype != torch.int8:
            continue
        plain = replace(weight, scale=torch.ones_like(weight.scale))
        ones = act8.store_groups(torch.ones_like(scale))
        got = call(case, codes, ones, sums, plain, None, torch.float32, tile, cut)
        assert torch.equal(got.double(), exact_sums(codes, plain)), (m, n, k)


def test_the_same_bits_every_time():
    case = Act8Case(64, 1000, 4096, 128)
    x, weight, bias = make(case, torch.bfloat16, "cuda")
    made = ops.quantize_activation(x, *case.how)
    first = call(case, *made, weight, bias, torch.bfloat16, 64, 2)
    for _ in range(20):
        assert torch.equal(call(case, *made, weight, bias, torch.bfloat16, 64, 2), first)


def test_refuses_a_tile_that_is_not_there():
    case = Act8Case(4, 64, 128, 128)
    x, weight, _ = make(case, torch.bfloat16, "cuda")
    made = ops.quantize_activation(x, *case.how)
    with pytest.raises(ValueError, match="linear_w4a8: no kernel with tile 48 for"):
        call(case, *made, weight, None, torch.bfloat16, 48, 0)
