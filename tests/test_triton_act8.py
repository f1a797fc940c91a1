"""The Triton kernels for 8-bit activations, in Triton's interpreter, and compiled for sm_90 and sm_80 without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from act8_cases import CASES, Act8Case, exact_sums, make, want_linear
from aot import compile_kernel

from cases import mismatch
from pyquant import ops, reference
from pyquant.formats import act8

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
SMALL = [pytest.param(c, id=str(c)) for c in CASES if c.dtype == torch.int8 and c.m * c.n * c.k < 10**7]


@pytest.fixture
def pinned(monkeypatch, poison):
    monkeypatch.setenv("PYQUANT_BACKEND", "triton")


@interpreted
@pytest.mark.parametrize("case", SMALL)
def test_quantize_activation(case, pinned):
    x, _, _ = make(case, torch.float16, "cpu")
    for sum_size in (0, -1, case.sum_size):
        how = case.bits, case.act_group_size, case.clip, torch.int8, sum_size
        for got, want in zip(ops.quantize_activation(x, *how), reference.quantize_activation(x, *how), strict=True):
            assert torch.equal(got, want)
            assert got.stride() == want.stride()


@interpreted
def test_quantize_activation_of_a_long_row_and_odd_values(pinned):
    x = torch.randn(5, 4500).half()
    x[1], x[2, 7], x[3, 4400] = 0, float("nan"), float("inf")
    got, want = ops.quantize_activation(x), reference.quantize_activation(x, 8, -1, 1.0, torch.int8, 0)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].nan_to_num(7.0), want[1].nan_to_num(7.0))


@interpreted
@pytest.mark.parametrize("case", SMALL)
def test_linear_w4a8(case, pinned):
    x, weight, bias = make(case, torch.float16, "cpu")
    codes, scale, sums = ops.quantize_activation(x, *case.how)
    args = case.n, case.k, case.group_size, case.act_group_size
    for dtype in (torch.float16, torch.float32):
        got = ops.linear_w4a8(codes, scale, sums, *weight.tiled(), bias, *args, dtype)
        want = want_linear(case, codes, scale, weight, bias, dtype)
        assert mismatch(got, want) is None
    ones = act8.store_groups(torch.ones_like(scale))
    qweight, one, zero = weight.tiled()[0], torch.ones_like(weight.tiled()[1]), weight.tiled()[2]
    got = ops.linear_w4a8(codes, ones, sums, qweight, one, zero, None, *args, torch.float32)
    assert torch.equal(got.double(), exact_sums(codes, weight))


@interpreted
def test_linear_w4a8_for_hopper(monkeypatch, pinned):
    """Hopper's plan: two units a step, and 128 tokens by two strips for many tokens."""
    from pyquant.kernels import linear_a8

    monkeypatch.setattr(linear_a8, "gpu", lambda device: ("sm90", ""))
    for m, k in ((130, 200), (3, 1345)):
        case = Act8Case(m, 200, k, 128, symmetric=False)
        x, weight, _ = make(case, torch.float16, "cpu")
        codes, scale, sums = ops.quantize_activation(x, *case.how)
        got = ops.linear_w4a8(codes, scale, sums, *weight.tiled(), None, 200, k, 128)
        assert mismatch(got, want_linear(case, codes, scale, weight, None, torch.float16)) is None


KINDS = {
    "out_ptr": "*bf16", "codes_ptr": "*i8", "act_ptr": "*fp32", "qweight_ptr": "*i32", "scale_ptr": "*bf16",
    "zero_ptr": "*u8", "bias_ptr": "*bf16", "x_ptr": "*bf16", "factor": "fp32", "top": "fp32",
    **dict.fromkeys(("m", "n", "k", "columns", "units", "groups", "group_size", "act_group_size", "width"), "i32"),
    **dict.fromkeys(("act_stride_m", "act_stride_g", "x_stride_m", "scale_stride_m", "scale_stride_g"), "i32"),
}  # fmt: skip
ALIGNED = ("n", "k", "columns", "group_size", "act_group_size", "width", "x_stride_m")


@compiled
@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("zero", [False, True])
def test_linear_w4a8_compiles(arch, zero, tmp_path, monkeypatch):
    """Without spills, on integer tensor cores, and with the weight going from registers to them."""
    from pyquant.kernels import linear_a8
    from pyquant.kernels.tiles import TABLE

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = [tile for _, tile in TABLE["forward", "sm90" if arch == 90 else "other"]]
    for tile, act_groups in zip(tiles, (False, True, False, False), strict=True):
        constants = {
            "HAS_ZERO": zero, "HAS_BIAS": True, "ACT_GROUPS": act_groups, "BLOCK_M": tile.tokens, "STRIPS": tile.strips,
            "UNITS": tile.units, "WORDS": 4, "STEPS": 32, "ALIGNED": ALIGNED, "act_stride_m": 1,
        }  # fmt: skip
        if not zero:
            constants["zero_ptr"] = None
        built = compile_kernel(
            linear_a8._linear_kernel, KINDS, constants, arch, num_warps=tile.warps, num_stages=tile.stages
        )
        assert built.stack_bytes == 0, f"{built.registers} registers, {built.stack_bytes} spilled bytes a thread"
        assert ".s32.s8.s8" in built.ptx, "integer tensor cores"
        assert built.shared_bytes <= (227 if arch == 90 else 163) * 1024


@compiled
@pytest.mark.parametrize("arch", [90, 80])
def test_quantize_activation_compiles(arch, tmp_path, monkeypatch):
    from pyquant.kernels import act8 as act8_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for block, steps in ((32, 1), (2048, 4)):
        constants = {"BLOCK": block, "STEPS": steps, "ALIGNED": ALIGNED, "scale_stride_m": 1}
        kinds = {**KINDS, "scale_ptr": "*fp32"}
        built = compile_kernel(act8_kernels._quantize_kernel, kinds, constants, arch, num_warps=4, num_stages=2)
        assert "div.rn.f32" in built.ptx
        assert built.stack_bytes == 0
