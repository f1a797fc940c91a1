"""8-bit activations: their order against the weight's fragments, quantization bit for bit, products of exact sums."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from act8_cases import CASES, LARGE_CASES, Act8Case, exact_sums, make, swap_positions, want_linear

from cases import RESULT_FAULTS, WEIGHT_FAULTS, make_x, mismatch
from pyquant import ops, reference
from pyquant.formats import act8, int4
from pyquant.ops import _registry

pytestmark = pytest.mark.usefixtures("poison")

HEADER = Path(__file__).resolve().parents[1] / "csrc" / "act8.cuh"


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="torch-cpu"),
        pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
        pytest.param(("cuda", "cuda"), id="cuda-cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request, monkeypatch):
    """(backend, device), pinned, so that nothing else can answer in its place."""
    name, device = request.param
    why = _registry.unavailable(name, device)
    if why:
        pytest.skip(why)
    monkeypatch.setenv("PYQUANT_BACKEND", name)
    return request.param


def params(cases):
    return [pytest.param(c, id=str(c), marks=[pytest.mark.small] if c.m * c.n * c.k < 10**6 else []) for c in cases]


def serves(backend: str, case: Act8Case) -> None:
    """Skip what a backend leaves to torch."""
    if case.dtype == act8.FP8 and backend == "triton":
        pytest.skip("e4m3 codes run in torch")


# ------------------------------------------------------------------------------------------------ the order of codes


def test_order_is_its_own_picture():
    codes = torch.arange(16, dtype=torch.int8)[None]
    assert act8.order_codes(codes)[0, :16].tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert act8.order_codes(codes)[0, 16:].count_nonzero() == 0


@pytest.mark.parametrize("k", [1, 15, 16, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.int8, act8.FP8])
def test_order_round_trip(k, dtype):
    codes = torch.randint(0, 120, (3, k), dtype=torch.uint8).view(dtype)
    there = act8.order_codes(codes)
    assert there.shape == (3, act8.padded_columns(k))
    assert torch.equal(act8.plain_codes(there, k).view(torch.uint8), codes.view(torch.uint8))


def fragments(words: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """What csrc/linear_w4a8.cuh makes of the words ``[128 threads, 4]`` of a unit, ``[128, 2 k32 steps, 4 registers, 4]``
    signed bytes: two masks a word, as there."""
    made = []
    for word in (words.to(torch.int64) & 0xFFFFFFFF).unbind(1):
        if symmetric:
            made += [((word << 4) & 0xF0F0F0F0) ^ 0x80808080, (word & 0xF0F0F0F0) ^ 0x80808080]
        else:
            made += [word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F]
    registers = torch.stack(made, 1).view(128, 2, 4)
    values = torch.stack([(registers >> (8 * b)) & 255 for b in range(4)], -1)
    return torch.where(values > 127, values - 256, values)


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_are_fragments_of_8_bit_products(symmetric):
    """The unit's words under two masks, laid out as the PTX manual lays out A of m16n8k32 (and each quarter of wgmma's m64k32)
    for 8-bit types, times codes in their order, are the products of the unpacked matrices, row by row."""
    w = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    x = torch.randint(-128, 128, (5, 64), dtype=torch.int8)
    a = fragments(int4.tile_codes(w)[0, 0], symmetric)
    matrix = torch.zeros(64, 64, dtype=torch.int64)
    for thread in range(128):
        warp, g, c = thread // 32, thread % 32 // 4, thread % 4
        for step in range(2):
            for register in range(4):
                row, first = 16 * warp + g + 8 * (register % 2), 32 * step + 4 * c + 16 * (register // 2)
                matrix[row, first : first + 4] = a[thread, step, register]
    got = act8.order_codes(x).long() @ matrix.T
    want = x.long() @ (16 * (w.long() - 8) if symmetric else w.long()).T
    assert torch.equal(got, want)
    assert not torch.equal(act8.order_codes(x)[:, torch.arange(64) ^ 1].long() @ matrix.T, want)
    assert not torch.equal(x.long() @ matrix.T, want)


def test_codes_0_to_15_are_e4m3_numbers():
    """Bits 0..15 read as e4m3 are code * 2^-9: why the kernel for e4m3 converts nothing."""
    bits = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(bits.view(act8.FP8).float(), bits.float() * 2.0**-9)


def test_the_header_has_the_same_order(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "order.cpp").write_text(
        f'#include "{HEADER}"\n#include <cstdio>\nint main() {{ for (int p = 0; p < 16; ++p) '
        'std::printf("%d ", pyquant::act8_column(p)); }\n'
    )
    subprocess.run([compiler, "-std=c++17", "-o", tmp_path / "order", tmp_path / "order.cpp"], check=True)
    out = subprocess.run([tmp_path / "order"], check=True, capture_output=True, text=True).stdout
    assert tuple(int(v) for v in out.split()) == act8.ORDER


# ------------------------------------------------------------------------------------------------ quantize_activation


def formula(x: torch.Tensor, bits: int, group_size: int, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer codes and scales one group after another, quotients from fp32 numbers in fp64 and rounded to fp32."""
    m, k = x.shape
    top = 2 ** (bits - 1) - 1
    width = k if group_size == -1 else group_size
    codes, scales = torch.zeros(m, k, dtype=torch.int8), []
    for first in range(0, k, width):
        piece = x[:, first : first + width].float()
        scale = (piece.abs().amax(1) * torch.tensor(clip / top, dtype=torch.float32)).clamp_min(1e-12)
        steps = (piece.double() / scale[:, None].double()).float()
        codes[:, first : first + width] = steps.round().clamp(-top - 1, top).to(torch.int8)
        scales.append(scale)
    return codes, torch.stack(scales, 1)


@pytest.mark.parametrize("case", params(CASES))
def test_quantize_activation(backend, case):
    name, device = backend
    serves(name, case)
    x, _, _ = make(case, torch.bfloat16, device)
    codes, scale, sums = ops.quantize_activation(x, *case.how)
    plain = act8.plain_codes(codes, case.k).cpu()
    if case.dtype == torch.int8:
        want_codes, want_scale = formula(x.cpu(), case.bits, case.act_group_size, case.clip)
        assert torch.equal(plain, want_codes)
        assert torch.equal(scale.cpu(), want_scale)
        assert (plain.abs() > 2 ** (case.bits - 1) - 2).any()
        assert case.k == 1 or not torch.equal(
            plain, formula(x.cpu().roll(1, 1), case.bits, case.act_group_size, case.clip)[0]
        )
    else:
        want_codes, want_scale, _ = reference.quantize_activation(x.cpu(), *case.how)
        assert torch.equal(codes.view(torch.uint8).cpu(), want_codes.view(torch.uint8))
        assert torch.equal(scale.cpu(), want_scale)
    pieces = [part.float().sum(1) for part in plain.float().split(case.sum_size, 1)]
    # integers, exact; sums of at most 128 e4m3 numbers up to 448 otherwise
    torch.testing.assert_close(sums.cpu(), torch.stack(pieces, 1), rtol=0, atol=0 if case.dtype == torch.int8 else 0.05)
    padded = act8.plain_codes(codes, codes.shape[1])[:, case.k :].view(torch.uint8)
    assert padded.count_nonzero() == 0
    assert all(t.stride(-1) % 4 == 0 or t.shape[-1] == 1 for t in (scale, sums))


@pytest.mark.small
def test_odd_values(backend):
    """Zeros, a NaN and an infinity: a scale that is not finite, codes that are, and other tokens as they were."""
    device = backend[1]
    x = torch.randn(6, 256, device=device).half()
    clean = ops.quantize_activation(x, 8, -1)
    x[1], x[2, 7], x[3, 200] = 0, float("nan"), -float("inf")
    codes, scale, _ = ops.quantize_activation(x, 8, -1)
    assert codes[1].count_nonzero() == 0
    assert scale[1, 0].item() == pytest.approx(1e-12)
    assert torch.isnan(scale[2, 0])
    assert torch.isinf(scale[3, 0])
    for row in (0, 4, 5):
        assert torch.equal(codes[row], clean[0][row])
    weight = make(Act8Case(6, 64, 256, 128), torch.float16, device)[1]
    y = ops.linear_w4a8(codes, scale, None, *weight.tiled(), None, 64, 256, 128)
    assert torch.isnan(y[2:4]).all()
    assert torch.isfinite(y[[0, 1, 4, 5]]).all()


@pytest.mark.parametrize("k", [8, 200, 1024, 4096 + 8, 14336, 40000])
def test_fused_forms(backend, k):
    """Quantized norm, activation and rotation: values within a step and the rounding of 16 bits of what they stand for."""
    name, device = backend
    if name == "triton":
        pytest.skip("fused forms have no Triton kernel")
    rows = 3
    x, weight = torch.randn(rows, k, device=device).half(), (torch.rand(k, device=device) + 0.5).half()
    gate_up = make_x(rows, 2 * k, "rows", torch.float16, device)
    wide = x.double()
    power = k & -k
    size = k // power
    calls = {
        "norm": (
            ops.rms_norm_quantize(x, weight, 1e-5, 8, 128),
            wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double(),
        ),
        "silu": (
            ops.silu_and_mul_quantize(gate_up, 8, -1),
            torch.nn.functional.silu(gate_up.double()[:, :k]) * gate_up.double()[:, k:],
        ),
    }
    if k < 5000 and size < 200:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < power:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        small = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0].contiguous() if size > 1 else None
        rotation = h / power**0.5 if small is None else torch.kron(small, h / power**0.5)
        own = None if small is None else small.float().to(device)
        calls["rotated"] = ops.hadamard_quantize(x, own, 8, -1), wide @ rotation.to(device)
    for kind, ((codes, scale, _), want) in calls.items():
        group = 128 if kind == "norm" else -1
        got = act8.plain_codes(codes, k).double() * int4.expand_groups(scale.double(), k, group)
        step = int4.expand_groups(scale.double(), k, group)
        # half a step, twice where the largest is off by a rounding; 2^-11 |v| of the rounding to fp16, and 2^-10 of a step
        # for each of 127 steps that the scale may be off
        room = 0.5 * step + 2.0**-10 * want.abs() + 127 * 2.0**-10 * step
        assert ((got - want).abs() <= room).all(), kind
        assert not ((got - want.roll(1, 1)).abs() <= room).all(), kind


# ------------------------------------------------------------------------------------------------ linear_w4a8


@pytest.mark.parametrize(
    "case", params(CASES) + [pytest.param(c, id=str(c), marks=pytest.mark.gpu) for c in LARGE_CASES]
)
def test_linear_w4a8(backend, case):
    name, device = backend
    serves(name, case)
    half = torch.bfloat16 if case.symmetric else torch.float16
    x, weight, bias = make(case, half, device)
    codes, scale, sums = ops.quantize_activation(x, *case.how)
    args = case.n, case.k, case.group_size, case.act_group_size
    for dtype in (half, torch.float32):
        got = ops.linear_w4a8(codes, scale, sums, *weight.tiled(), bias, *args, dtype)
        want = want_linear(case, codes, scale, weight, bias, dtype)
        assert mismatch(got, want) is None
        for fault in RESULT_FAULTS.values():
            assert mismatch(fault(got), want) is not None
        if case.n == 1 or case.m < 3:
            continue
        for fault_name, fault in WEIGHT_FAULTS.items():
            wrong = want_linear(case, codes, scale, fault(weight), bias, dtype).value.to(dtype)
            assert mismatch(wrong, want) is not None, fault_name
        wrong = ops.linear_w4a8(swap_positions(codes), scale, sums, *weight.tiled(), bias, *args, dtype)
        assert mismatch(wrong, want) is not None
        wrong = ops.linear_w4a8(codes, act8.store_groups(scale.roll(1, 0)), sums, *weight.tiled(), bias, *args, dtype)
        assert mismatch(wrong, want) is not None


@pytest.mark.parametrize("case", params(c for c in CASES if c.dtype == torch.int8))
def test_integer_sums_are_exact(backend, case):
    """With scales of one the fp32 results are the integers themselves."""
    device = backend[1]
    x, weight, _ = make(case, torch.float16, device)
    weight = replace(weight, scale=torch.ones_like(weight.scale))
    codes, scale, sums = ops.quantize_activation(x, *case.how)
    ones = act8.store_groups(torch.ones_like(scale))
    args = case.n, case.k, case.group_size, case.act_group_size
    got = ops.linear_w4a8(codes, ones, sums, *weight.tiled(), None, *args, torch.float32)
    want = exact_sums(codes, weight)
    assert want.abs().max() < 2**24
    assert torch.equal(got.double(), want)


GOOD_CASE = Act8Case(6, 70, 100, 32, symmetric=False, bias=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({0: torch.zeros(6, 128)}, "codes must be torch.int8 or torch.float8_e4m3fn, not torch.float32"),
        ({0: torch.zeros(6, 64, dtype=torch.int8)}, r"codes of K=100 must be \[..., 128\], got shape \(6, 64\)"),
        (
            {1: torch.zeros(6, 2)},
            r"act_scale must be float32 \(6, 1\) for act_group_size=-1, got torch.float32 \(6, 2\)",
        ),
        ({2: None}, r"need sums float32 \(6, 4\) of 32 columns each, got None: pass sum_size=32 when quantizing"),
        ({6: torch.zeros(70)}, "bias must be torch.float16 like the weight's scales"),
        ({9: 48}, r"group_size=48 must be one of"),
        ({10: 48}, r"act_group_size=48 must be one of"),
        ({11: torch.bfloat16}, "dtype=torch.bfloat16 must be that of the weight's scales, torch.float16, or float32"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_linear_w4a8_refuses(changes, sentence):
    x, weight, bias = make(GOOD_CASE, torch.float16, "cpu")
    args = [*ops.quantize_activation(x, *GOOD_CASE.how), *weight.tiled(), bias, 70, 100, 32, -1, torch.float16]
    ops.linear_w4a8(*args)
    with pytest.raises(ValueError, match="linear_w4a8: .*" + sentence):
        ops.linear_w4a8(*[changes.get(i, value) for i, value in enumerate(args)])


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ((1,), "bits=1 must be between 2 and 8"),
        ((8, 0), "group_size=0 must be positive, or -1 for whole tokens"),
        ((8, -1, 1.5), r"clip=1.5 must be in \(0, 1\]"),
        ((8, -1, 1.0, torch.uint8), "dtype=torch.uint8 must be torch.int8 or torch.float8_e4m3fn"),
    ],
)
def test_quantize_activation_refuses(how, sentence):
    with pytest.raises(ValueError, match="quantize_activation: " + sentence):
        ops.quantize_activation(torch.randn(2, 64), *how)


def test_other_refusals():
    x = torch.randn(2, 96)
    with pytest.raises(ValueError, match="hadamard_quantize: K=96 is no power of two times the 1 rows of small"):
        ops.hadamard_quantize(x)
    with pytest.raises(ValueError, match=r"silu_and_mul_quantize: gate_up must be \[..., 2 K\], got shape \(2, 3\)"):
        ops.silu_and_mul_quantize(x[:, :3])
    with pytest.raises(ValueError, match=r"rms_norm_quantize: weight must have shape \(96,\), got \(95,\)"):
        ops.rms_norm_quantize(x, torch.ones(95), 1e-5)
    with pytest.raises(ValueError, match="quantize_activation: has no gradient"):
        ops.quantize_activation(x.requires_grad_())
