"""Every Triton kernel compiles for sm_90 and sm_80, without a GPU, without spilled registers and with wide loads."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton")

from aot import Compiled, compile_kernel

from pyquant.kernels import fake_quant, linear, linear_backward, quantize
from pyquant.kernels.tiles import TABLE, Tile

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

ARCHES = [90, 80]
SIZES = "m n k units groups group_size w_stride_n grad_stride_m grad_stride_n scale_stride_n zero_stride_n x_stride_m"
ALIGNED = ("n", "k", "group_size", "w_stride_n", "grad_stride_n", "x_stride_m")
UNIT_STRIDES = dict.fromkeys(("w_stride_k", "grad_stride_k", "x_stride_k", "scale_stride_g", "zero_stride_g"), 1)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    """Compile for real, not from the user's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def types(half: str) -> dict[str, str]:
    """Triton types of every runtime argument that a kernel here has."""
    pointers = {
        "out_ptr": half, "w_ptr": half, "x_ptr": half, "y_ptr": half, "bias_ptr": half, "grad_ptr": half,
        "dw_ptr": half, "scale_ptr": half, "zero_ptr": "fp32", "dscale_ptr": "fp32", "dzero_ptr": "fp32",
        "parts_ptr": "fp32", "temperature_ptr": "fp32",
        "qweight_ptr": "i32",
    }  # fmt: skip
    scalars = {**dict.fromkeys(SIZES.split(), "i32"), **dict.fromkeys(("low", "high", "beta", "grad_scale"), "fp32")}
    return {**{name: "*" + kind for name, kind in pointers.items()}, **scalars}


def build(kernel, arch, half="bf16", pointers=None, options=None, **constants) -> Compiled:
    """Compile with contiguous, aligned arguments and check what holds for every kernel."""
    constants = {**UNIT_STRIDES, "ALIGNED": ALIGNED, **constants}
    if not constants.get("HAS_ZERO", True):
        constants |= {"zero_ptr": None, "dzero_ptr": None}
    if not constants.get("HAS_BIAS", True):
        constants |= {"bias_ptr": None}
    if not constants.get("ROUND", True):
        constants |= {"temperature_ptr": None}
    built = compile_kernel(kernel, {**types(half), **(pointers or {})}, constants, arch, **(options or {}))
    assert built.stack_bytes == 0, f"{built.registers} registers and {built.stack_bytes} spilled bytes a thread"
    return built


def count(pattern: str, built: Compiled) -> int:
    return len(re.findall(pattern, built.ptx))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
def test_quantize(arch, zero):
    for one_group in (False, True):
        built = build(
            quantize._quantize_kernel, arch, pointers={"out_ptr": "*i32", "scale_ptr": "*fp32"},
            HAS_ZERO=zero, ONE_GROUP=one_group,
        )  # fmt: skip
        assert "div.rn.f32" in built.ptx
        assert "div.full" not in built.ptx, "codes need the IEEE quotient"
        assert count(r"ld\.global\.v4", built) >= 4, "64 x 64 weights, 8 a load, 128 threads"
        assert count(r"st\.global\.v4", built) == 1, "one 16-byte store a thread"


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
def test_dequantize(arch, zero):
    for unit_groups in (1, 2):
        built = build(
            quantize._dequantize_kernel, arch, pointers={"zero_ptr": "*u8"}, HAS_ZERO=zero, UNIT_GROUPS=unit_groups
        )
        assert count(r"ld\.global\.v4", built) == 1
        assert count(r"st\.global\.v4", built) == 4


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
def test_fake_quant(arch, zero):
    for segments, steps in ((16, 1), (1, 3)):
        how = {"HAS_ZERO": zero, "SEGMENTS": segments, "BLOCK": 2048 // segments, "STEPS": steps}
        how |= {"ROUND": 0, "CLAMP": 0, "NEAR": False, "SOFT": False}
        for kernel in (fake_quant._forward_kernel, fake_quant._backward_kernel):
            built = build(kernel, arch, **how)
            assert "div.rn.f32" in built.ptx
            assert "div.full" not in built.ptx
            assert "atom" not in built.ptx, "no atomics: the same bits every time"
            assert count(r"ld\.global\.v4", built) >= 2
            assert count(r"st\.global\.v4", built) >= 2


@pytest.mark.parametrize("clamp", [0, 1, 2])
@pytest.mark.parametrize("rounding", [0, 1, 2])
def test_fake_quant_soft(rounding, clamp):
    """All surrogates on Hopper, one gate and two, in the backward and in the soft forward."""
    for near in {clamp > 0, False}:
        how = {
            "HAS_ZERO": True,
            "SEGMENTS": 16,
            "BLOCK": 128,
            "STEPS": 1,
            "ROUND": rounding,
            "CLAMP": clamp,
            "NEAR": near,
        }
        for kernel, soft in (
            (fake_quant._forward_kernel, True),
            (fake_quant._backward_kernel, False),
            (fake_quant._backward_kernel, True),
        ):
            built = build(kernel, 90, SOFT=soft, **how)
            assert "atom" not in built.ptx
            assert count(r"ld\.global\.v4", built) >= 2


def tiles(kernel: str, arch: int) -> list[Tile]:
    return [tile for _, tile in TABLE[kernel, "sm90" if arch == 90 else "other"]]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("arch", "units", "words", "half"),
    # the dtype changes conversions only: fp16 once for each arch
    [
        (90, 1, 2, "bf16"),
        (90, 1, 4, "bf16"),
        (90, 2, 4, "bf16"),
        (90, 2, 4, "fp16"),
        (80, 1, 2, "bf16"),
        (80, 1, 4, "fp16"),
    ],
)
def test_linear(arch, units, words, zero, half):
    for tile in tiles("forward", arch):
        built = build(
            linear._linear_kernel, arch, half,
            pointers={"zero_ptr": "*u8", "out_ptr": "*fp32" if tile.programs else "*" + half},  # parts of a split K are fp32
            options={"num_warps": tile.warps, "num_stages": tile.stages},
            HAS_ZERO=zero, HAS_BIAS=not tile.programs, BLOCK_M=tile.tokens, STRIPS=tile.strips,
            UNITS=units, WORDS=words, STEPS=32,
        )  # fmt: skip
        assert "mma" in built.ptx, "tensor cores"
        assert built.shared_bytes <= (227 if arch == 90 else 163) * 1024
        if arch == 90:
            assert "wgmma.mma_async" in built.ptx
            assert "st.shared.b16" not in built.ptx, "codes must reach the tensor cores without shared memory"
            if words == 4:
                assert "cp.async.ca" not in built.ptx, "16 bytes at a time, past the L1 cache"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
def test_sum_of_parts(arch, bias):
    built = build(linear._sum_parts_kernel, arch, HAS_BIAS=bias, SPLITS=8, BLOCK=linear._SUM_BLOCK)
    assert "atom" not in built.ptx
    assert count(r"ld\.global\.v4\.b32", built) >= 8


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("arch", "groups", "half"), [(90, 1, "bf16"), (90, 2, "fp16"), (80, 1, "fp16"), (80, 2, "bf16")]
)
def test_linear_backward(arch, groups, zero, half):
    for tile in tiles("backward", arch):
        built = build(
            linear_backward._backward_kernel, arch, half, pointers={"zero_ptr": "*u8", "out_ptr": "*fp32"},
            options={"num_warps": tile.warps, "num_stages": tile.stages},
            ALIGNED=("n", "k", "group_size", "grad_stride_m"), grad_stride_n=1,
            HAS_ZERO=zero, BLOCK_M=tile.tokens, STRIPS=tile.strips, UNITS=tile.units, GROUPS=groups, STEPS=32,
        )  # fmt: skip
        assert "mma" in built.ptx, "tensor cores"
        assert built.shared_bytes <= (227 if arch == 90 else 163) * 1024
        assert "cp.async.ca" not in built.ptx, "words and gradients 16 bytes at a time, past the L1 cache"
        if arch == 90:
            assert count(r"stmatrix\S*trans", built) == 4, "w_hat is transposed on its way through shared memory"
