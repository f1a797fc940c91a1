"""The Triton kernels on the CPU, in Triton's interpreter, in a process of their own::

    TRITON_INTERPRET=1 python -m pytest tests/test_triton_interpreter.py

Triton decides at import whether it interprets. The interpreter truncates where it should round to bf16, and multiplies
bf16 matrices as integers, so results here are fp16 and fp32; bf16 is for the GPU tests.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from surrogates import CORNERS, MODES, results

import cases
from cases import (
    FAKE_QUANT_CASES,
    FakeQuantCase,
    LinearCase,
    make_fake_quant,
    make_weight,
    make_x,
    mismatch,
    want_product,
)
from pyquant import ops, reference
from pyquant.formats import int4
from pyquant.kernels import linear, linear_backward
from pyquant.kernels.int4 import words_to_tile
from pyquant.kernels.tiles import Tile

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs with TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("poison"),
]


@pytest.fixture(autouse=True)
def _pinned(monkeypatch):
    monkeypatch.setenv("PYQUANT_BACKEND", "triton")


def ids(case):
    return str(case) if isinstance(case, FakeQuantCase | LinearCase) else None


@triton.jit
def _unpack(out_ptr, words_ptr, UNITS: tl.constexpr, STRIPS: tl.constexpr, WORDS: tl.constexpr):
    unit = tl.arange(0, UNITS)[:, None, None, None]
    strip = tl.arange(0, STRIPS)[None, :, None, None]
    thread = tl.arange(0, 128)[None, None, :, None]
    word = tl.arange(0, WORDS)[None, None, None, :]
    words = tl.load(words_ptr + ((strip * UNITS + unit) * 128 + thread) * 4 + word)
    columns: tl.constexpr = 16 * WORDS * UNITS
    at = tl.arange(0, 64 * STRIPS)[:, None] * columns + tl.arange(0, columns)[None, :]
    tl.store(out_ptr + at, words_to_tile(words, UNITS, STRIPS, WORDS))


@pytest.mark.parametrize(("units", "strips", "words"), [(1, 1, 2), (1, 1, 4), (2, 1, 4), (2, 2, 4), (1, 2, 4)])
def test_unpacking_a_tile(units, strips, words):
    """Whole tiles of random codes, for each number of units, strips and words that a kernel asks for."""
    codes = torch.randint(0, 16, (64 * strips, 64 * units), dtype=torch.uint8)
    out = torch.empty(64 * strips, 16 * words * units, dtype=torch.int32)
    _unpack[(1,)](out, int4.tile_codes(codes), units, strips, words)
    assert torch.equal(out.to(torch.uint8), codes[:, : 16 * words * units])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", [c for c in FAKE_QUANT_CASES if c.bits <= 4 and c.n * c.k < 13000], ids=ids)
def test_quantize(case, dtype):
    w, scale, zero, _ = make_fake_quant(case, dtype, "cpu")
    zero = None if zero is None else zero.round().clamp(0, 2**case.bits - 1)
    args = w, scale, zero, case.group_size, case.bits
    got = ops.quantize_int4(*args)
    assert torch.equal(got, reference.quantize_int4(*args))
    if w.numel() > 100:
        assert not torch.equal(got, reference.quantize_int4(w, scale.roll(1, 0), *args[2:]))


def test_quantize_rounds_half_to_even_and_clamps():
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.4, 7.5, -8.6, 1e30, -1e30, 0.49999997]])
    want = [0, 2, 2, 0, -2, -2, 7, 7, -8, 7, -8, 0]
    assert (int4.untile_codes(ops.quantize_int4(w, torch.ones(1, 1)), 1, 12).int() - 8).tolist() == [want]


def test_divides_exactly():
    w, scale = cases.division_boundaries("cpu")
    assert torch.equal(ops.quantize_int4(w, scale), reference.quantize_int4(w, scale, None, -1, 4))
    assert torch.equal(ops.fake_quant(w, scale), reference.fake_quant(w, scale, None, -1, 4))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(1, 1, -1), (65, 63, 32), (130, 200, 128), (63, 129, 64), (70, 333, -1)]
)
def test_dequantize(n, k, group_size, symmetric, dtypes):
    weight = make_weight(n, k, group_size, symmetric, dtypes[0], "cpu")
    args = *weight.tiled(), n, k, group_size, dtypes[1]
    got = ops.dequantize_int4(*args)
    assert torch.equal(got, reference.dequantize_int4(*args))
    if n > 1:
        for fault in cases.WEIGHT_FAULTS.values():
            assert not torch.equal(got, reference.dequantize_int4(*fault(weight).tiled(), *args[3:]))


@pytest.mark.parametrize(
    "case",
    [
        LinearCase(1, 64, 64, 64),
        LinearCase(1, 1, 1, -1, symmetric=False, bias=True),
        LinearCase(3, 65, 129, 64, symmetric=False, bias=True),
        LinearCase(2, 63, 127, 32, symmetric=False),
        LinearCase(2, 65, 1100, 128, symmetric=False, bias=True),  # K in two parts
        LinearCase(5, 70, 1025, 64, bias=True, layout="columns"),  # K in parts, the last of them short
        LinearCase(17, 130, 200, 128, layout="transposed"),
        LinearCase(33, 64, 333, -1, symmetric=False, bias=True),
        LinearCase(70, 200, 96, 32, symmetric=False, layout="rows"),
        LinearCase(130, 129, 257, 128, bias=True),
    ],
    ids=ids,
)
def test_linear(case):
    weight = make_weight(case.n, case.k, case.group_size, case.symmetric, torch.float16, "cpu")
    x = make_x(case.m, case.k, case.layout, torch.float16, "cpu")
    bias = torch.randn(case.n).half() if case.bias else None
    got = ops.linear_w4a16(x, *weight.tiled(), bias, case.n, case.group_size)
    want = want_product(x, weight.w_hat, bias, torch.float16, False)
    assert mismatch(got, want) is None
    for name, fault in cases.WEIGHT_FAULTS.items():
        if case.n > 1:
            wrong = want_product(x, fault(weight).w_hat, bias, torch.float16, False).value.half()
            assert mismatch(wrong, want) is not None, name


def test_linear_tiles_for_hopper(monkeypatch):
    """Hopper's tiles: two units a step, and 128 tokens by two strips for many tokens."""
    monkeypatch.setattr(linear, "gpu", lambda device: ("sm90", "none"))
    for m, k in ((130, 200), (3, 1345)):
        weight = make_weight(200, k, 128, False, torch.float16, "cpu")
        x = torch.randn(m, k).half()
        got = ops.linear_w4a16(x, *weight.tiled(), None, 200, 128)
        assert mismatch(got, want_product(x, weight.w_hat, None, torch.float16, False)) is None


@pytest.mark.parametrize(
    ("case", "tile"),
    [
        (LinearCase(1, 64, 64, 64), None),
        (LinearCase(1, 1, 1, -1, symmetric=False), None),
        (LinearCase(3, 129, 65, 64, symmetric=False), None),
        (LinearCase(2, 127, 63, 32, symmetric=False, layout="rows"), None),
        (LinearCase(5, 1025, 70, 128, symmetric=False, layout="columns"), None),  # N in parts, the last of them short
        (LinearCase(16, 513, 200, 32, layout="transposed"), None),
        (LinearCase(17, 200, 333, -1, symmetric=False), None),
        (LinearCase(33, 96, 257, 128, layout="rows"), None),
        (LinearCase(64, 130, 130, 64, symmetric=False), None),
        # wider steps and tiles than the table has, as `pyquant bench --tune` may choose, and several tiles of tokens
        (LinearCase(40, 700, 200, 32, symmetric=False), Tile(16, 2, 1, 4, 3, 64)),
        (LinearCase(9, 200, 300, 128, symmetric=False), Tile(16, 1, 2, 4, 3, 0)),
        (LinearCase(9, 200, 300, 64), Tile(16, 2, 2, 4, 3, 0)),
    ],
    ids=ids,
)
def test_linear_backward(case, tile):
    """dY [M, N] @ w_hat [N, K]; w_hat is rounded to 16 bits, as dequantize_int4 does."""
    weight = make_weight(case.n, case.k, case.group_size, case.symmetric, torch.float16, "cpu")
    grad = make_x(case.m, case.n, case.layout, torch.float16, "cpu")
    if tile is None:
        got = torch.ops.pyquant.linear_w4a16_backward(grad, *weight.tiled(), case.k, case.group_size)
    else:
        got = torch.empty(case.m, case.k, dtype=torch.float16)
        linear_backward.linear_w4a16_backward(got, grad, *weight.tiled(), case.group_size, tile)
    want = want_product(grad, weight.w_hat.T, None, torch.float16, rounded_weight=True)
    assert mismatch(got, want) is None
    for fault in cases.RESULT_FAULTS.values():
        assert mismatch(fault(got), want) is not None
    for name, fault in cases.WEIGHT_FAULTS.items():
        if case.n > 1:
            wrong = want_product(grad, fault(weight).w_hat.T, None, torch.float16, False).value.half()
            assert mismatch(wrong, want) is not None, name


def test_linear_backward_takes_the_packed_weight_up_to_64_tokens(monkeypatch):
    """And the expanded weight above; both are right, through autograd, with leading dimensions."""
    taken = []
    fused, expand = linear_backward.linear_w4a16_backward, ops.linear._backward_expand
    monkeypatch.setattr(linear_backward, "linear_w4a16_backward", lambda *a: (taken.append("fused"), fused(*a)))
    monkeypatch.setattr(ops.linear, "_backward_expand", lambda *a: (taken.append("expand"), expand(*a)))
    weight = make_weight(70, 100, 32, False, torch.float16, "cpu")
    for m in (32, 33):
        x = torch.randn(2, m, 100).half().requires_grad_()
        grad = torch.randn(2, m, 70).half()
        ops.linear_w4a16(x, *weight.tiled(), None, 70, 32).backward(grad)
        want = want_product(grad.view(-1, 70), weight.w_hat.T, None, torch.float16, rounded_weight=True)
        assert mismatch(x.grad.view(-1, 100), want) is None
    assert taken == ["fused", "expand"]


def test_linear_says_that_the_interpreter_cannot_do_bf16():
    weight = make_weight(64, 64, 64, True, torch.bfloat16, "cpu")
    with pytest.raises(NotImplementedError, match="interpreter"):
        ops.linear_w4a16(torch.randn(1, 64).bfloat16(), *weight.tiled(), None, 64, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("case", FAKE_QUANT_CASES, ids=ids)
def test_fake_quant(case, dtype):
    w, scale, zero, grad = make_fake_quant(case, dtype, "cpu")
    args = w, scale, zero, case.group_size, case.bits
    assert torch.equal(ops.fake_quant(*args), reference.fake_quant(*args))
    dw, dscale, dzero = torch.ops.pyquant.fake_quant_backward(grad, *args, 0.3)
    want = reference.fake_quant_backward(grad.double(), w.double(), *args[1:], 0.3)
    want_dw, _, _ = reference.fake_quant_backward(grad, *args, 0.3)
    assert torch.equal(dw, want_dw)
    assert dzero.shape == (torch.Size([0]) if zero is None else zero.shape)
    # sums of at most 4100 fp32 terms: 4 sqrt(4100) u of what they would be without cancellation (|grad| |q| summed)
    for name, found, value in (("scale", dscale, want[1]), ("zero", dzero, want[2])):
        if found.numel():
            bound = 256 * cases.U32 * (grad.double().abs() * 2**case.bits * 4).sum(1, keepdim=True)
            assert ((found.double() - value).abs() <= bound).all(), name


@pytest.mark.parametrize("mode", [*MODES, *CORNERS], ids=str)
@pytest.mark.parametrize("case", [FAKE_QUANT_CASES[i] for i in (2, 3, 8, 10)], ids=ids)
def test_fake_quant_soft(case, mode):
    dtype = torch.float16 if case.symmetric else torch.float32
    w, scale, zero, grad = make_fake_quant(case, dtype, "cpu")
    args = w, scale, zero, case.group_size, case.bits
    want = results(w, scale, zero, grad, case, mode, 0.3)
    got = ops.fake_quant(*args, 0.3, *mode.arguments("cpu"))
    if not mode.soft_forward:
        assert torch.equal(got, reference.fake_quant(*args))
    dw, dscale, dzero = torch.ops.pyquant.fake_quant_backward(grad, *args, 0.3, *mode.arguments("cpu"))
    value, terms = want.without_jumps(got, grad, case, 0.3)
    assert mismatch(*value) is None
    assert mismatch(dw, want.dw) is None
    assert mismatch(dw.roll(1, 0), want.dw) is not None
    assert mismatch(dscale, terms["dscale"]) is None
    if zero is not None:
        assert mismatch(dzero, terms["dzero"]) is None


def test_tuning_runs_every_tile_and_leaves_out_a_wrong_one(monkeypatch, tmp_path):
    """All candidates over real kernels, timed by a fake; one of them is made to compute something else."""
    from pyquant.integrations.bench import tune
    from pyquant.kernels import tiles
    from pyquant.kernels import tune as search

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.forget()
    wrong, right = tiles.CANDIDATES["backward"][32][:2]
    backward = search.linear_w4a16_backward

    def faulty(out, x, packed, scale, zero, group, tile):
        backward(out, x, packed, scale.roll(1, 0) if tile == wrong else scale, zero, group, tile)

    monkeypatch.setattr(search, "linear_w4a16_backward", faulty)
    timed = []
    report, file = tune([(70, 128)], 64, timer=lambda calls: timed.append(calls) or 1.0, device="cpu")
    assert [r["failed"] for r in report] == [0, 0, 0, 0, 0, 1, 0]
    # the table's tile and the others at each number of tokens; a candidate that is the table's own is not timed twice
    assert len(timed) > sum(r["tried"] for r in report)
    assert (
        tiles.choose("backward", 20, *tiles.gpu(torch.device("cpu"))) == tiles.TABLE["backward", "other"][1][1] != right
    )
    assert file.parent == tmp_path / "pyquant"
    tiles.forget()
