"""Each op against its reference in fp64, on every backend that this machine has, with faults that must be noticed.

What only a GPU can show (streams, graphs, several devices) is in test_ops_gpu.py; refusals and registration are in
test_ops_contract.py.
"""

from __future__ import annotations

import sys

import pytest
import torch

import cases
from cases import (
    FAKE_QUANT_CASES,
    LARGE_LINEAR_CASES,
    LINEAR_CASES,
    RESULT_FAULTS,
    WEIGHT_FAULTS,
    FakeQuantCase,
    LinearCase,
    Want,
    make_fake_quant,
    make_weight,
    make_x,
    mismatch,
    want_product,
)
from pyquant import ops, reference
from pyquant.formats import int4
from pyquant.ops import _registry, linear
from pyquant.ops.linear import EXACT_TOKENS, FEW_TOKENS, FUSED_MAX_TOKENS

pytestmark = pytest.mark.usefixtures("poison")

HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
FLOATS = [*HALVES, pytest.param(torch.float32, id="fp32")]
SMALL = 64 * 70  # elements of a weight up to which a GPU test also runs under compute-sanitizer


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="torch-cpu"),
        pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
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


def by_size(all_cases):
    """pytest parameters; tiny cases carry the marker that compute-sanitizer runs select."""
    marked = [c for c in all_cases if c.n * c.k <= SMALL and getattr(c, "m", 0) <= 20]
    return [pytest.param(c, id=str(c), marks=[pytest.mark.small] if c in marked else []) for c in all_cases]


# ------------------------------------------------------------------------------------------------ quantize_int4


def quantize_inputs(case: FakeQuantCase, dtype, device):
    w, scale, zero, _ = make_fake_quant(case, dtype, device)
    zero = None if zero is None else zero.round().clamp(0, 2**case.bits - 1)
    return w, scale, zero, case.group_size, case.bits


def codes_by_definition(w, scale, zero, group_size, bits):
    """clamp(round(w / scale) + zero): the quotient in fp32, the rest in fp64."""
    k = w.shape[1]
    low, high = cases.code_range(bits, zero is None)
    steps = (w.float() / int4.expand_groups(scale.float(), k, group_size)).double().round()
    if zero is not None:
        steps = steps + int4.expand_groups(zero.double(), k, group_size)
    return (steps.clamp(low, high) + (8 if zero is None else 0)).to(torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", by_size([c for c in FAKE_QUANT_CASES if c.bits <= 4]))
def test_quantize(backend, case, dtype):
    args = quantize_inputs(case, dtype, backend[1])
    codes = codes_by_definition(*args)
    got = ops.quantize_int4(*args)
    assert torch.equal(got, int4.tile_codes(codes)), "codes must agree in every bit, padding included"
    if codes.numel() > 100:
        assert not torch.equal(ops.quantize_int4(args[0], args[1].roll(1, 0), *args[2:]), got), "a shifted scale"


def test_quantize_rounds_half_to_even_and_clamps(backend):
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.4, 7.5, -8.6, 1e30, -1e30, 0.49999997]], device=backend[1])
    got = ops.quantize_int4(w, torch.ones(1, 1, device=backend[1]))
    want = [0, 2, 2, 0, -2, -2, 7, 7, -8, 7, -8, 0]
    assert (int4.untile_codes(got, 1, 12).int() - 8).tolist() == [want]


def test_quantize_divides_exactly(backend):
    w, scale = cases.division_boundaries(backend[1])
    want = codes_by_definition(w, scale, None, -1, 4)
    assert torch.equal(ops.quantize_int4(w, scale), int4.tile_codes(want))
    by_reciprocal = ((w * (1 / scale)).round().clamp(-8, 7) + 8).to(torch.uint8)
    assert not torch.equal(by_reciprocal, want), "these inputs must tell a division from a multiplication"


# ------------------------------------------------------------------------------------------------ dequantize_int4

WEIGHTS = [(1, 1, -1), (65, 63, 32), (64, 64, 64), (130, 200, 128), (63, 129, 64), (70, 333, -1), (129, 1000, 32)]


def want_dequantized(weight, dtype) -> Want:
    """One product in fp32 and one rounding to dtype: 2^-24 and u of the value (tiny: subnormal results)."""
    value, u = weight.w_hat, cases.U32 + cases.unit_roundoff(dtype)
    return Want(value, u * value.abs() + torch.finfo(dtype).tiny * cases.unit_roundoff(dtype), u)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [pytest.param(*w, marks=[pytest.mark.small] if w[0] * w[1] <= SMALL else []) for w in WEIGHTS],
)
def test_dequantize(backend, n, k, group_size, symmetric, dtype, out_dtype):
    weight = make_weight(n, k, group_size, symmetric, dtype, backend[1])
    got = ops.dequantize_int4(*weight.tiled(), n, k, group_size, out_dtype)
    assert got.dtype == (out_dtype or dtype)
    want = want_dequantized(weight, got.dtype)
    assert mismatch(got, want) is None
    assert torch.equal(
        got, (weight.steps.float() * int4.expand_groups(weight.scale, k, group_size).float()).to(got.dtype)
    )


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
@pytest.mark.parametrize(("n", "k", "group_size"), [w for w in WEIGHTS if w[0] > 1])
def test_dequantize_comparison_rejects(backend, n, k, group_size, fault):
    weight = make_weight(n, k, group_size, False, torch.float16, backend[1])
    got = ops.dequantize_int4(*WEIGHT_FAULTS[fault](weight).tiled(), n, k, group_size)
    assert mismatch(got, want_dequantized(weight, torch.float16)) is not None


def test_dequantize_scale_gradient(backend):
    """Against the definition: dscale[n, g] = sum over the group of grad * (code - zero); padding gets 0."""
    n, k, group_size = 70, 200, 32
    weight = make_weight(n, k, group_size, False, torch.float32, backend[1])
    qweight, scale, zero = weight.tiled()
    grad = torch.randn(n, k, device=backend[1])
    scale.requires_grad_()
    ops.dequantize_int4(qweight, scale, zero, n, k, group_size).backward(grad)
    want = cases.want_group_sums(grad.double() * weight.steps, group_size, 1.0, torch.float32)
    got = int4.untile_scale(scale.grad, n, k, group_size)
    assert mismatch(got, want) is None
    assert mismatch(got.roll(1, 1), want) is not None
    assert scale.grad.count_nonzero() == got.count_nonzero()


# ------------------------------------------------------------------------------------------------ linear_w4a16


def run_linear(case: LinearCase, dtype, backend, fault=None):
    """(result, what it should be) of one case; the fault changes only what the op sees."""
    name, device = backend
    weight = make_weight(case.n, case.k, case.group_size, case.symmetric, dtype, device)
    x = make_x(case.m, case.k, case.layout, dtype, device)
    bias = torch.randn(case.n, device=device).to(dtype) if case.bias else None
    seen = fault(weight) if fault else weight
    got = ops.linear_w4a16(x, *seen.tiled(), bias, case.n, case.group_size)
    return got, want_product(x, weight.w_hat, bias, dtype, **errors_of(name, case.m))


def errors_of(backend: str, m: int) -> dict[str, bool]:
    """What the kernel for m tokens rounds besides its sums and its result."""
    hopper = backend == "cuda" and torch.cuda.get_device_capability()[0] == 9
    exact = m <= (EXACT_TOKENS if hopper else FUSED_MAX_TOKENS)
    fixed = m <= (FEW_TOKENS if hopper else FUSED_MAX_TOKENS)
    rounded = backend == "cuda" and not exact
    return {
        "rounded_weight": rounded,
        "fixed_point_x": backend == "cuda" and fixed,
        "by_cublas": rounded and not hopper,
    }


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", by_size(LINEAR_CASES))
def test_linear(backend, case, dtype):
    got, want = run_linear(case, dtype, backend)
    assert got.dtype == dtype
    assert mismatch(got, want) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", by_size(LARGE_LINEAR_CASES))
def test_linear_large(backend, case, dtype):
    got, want = run_linear(case, dtype, backend)
    assert mismatch(got, want) is None


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", by_size([c for c in LINEAR_CASES if c.n > 1]))
def test_linear_comparison_rejects(backend, case, dtype, fault):
    got, want = run_linear(case, dtype, backend, WEIGHT_FAULTS[fault])
    assert mismatch(got, want) is not None


@pytest.mark.parametrize("fault", RESULT_FAULTS)
@pytest.mark.parametrize("case", by_size(LINEAR_CASES))
def test_linear_comparison_rejects_one_element(backend, case, fault):
    got, want = run_linear(case, torch.bfloat16, backend)
    assert mismatch(RESULT_FAULTS[fault](got), want) is not None


def test_linear_repeats_bit_for_bit(backend):
    """No atomics: two runs of a product whose K is split agree in every bit."""
    case = LinearCase(4, 64, 4096, 128)
    weight = make_weight(case.n, case.k, 128, True, torch.float16, backend[1])
    x = make_x(case.m, case.k, "contiguous", torch.float16, backend[1])
    first, second = (ops.linear_w4a16(x, *weight.tiled(), None, case.n, 128) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3, 5), (2, 1, 4), ()])
def test_linear_takes_any_leading_shape(backend, shape):
    weight = make_weight(70, 100, 32, False, torch.float16, backend[1])
    x = torch.randn(*shape, 100, device=backend[1]).half()
    got = ops.linear_w4a16(x, *weight.tiled(), None, 70, 32)
    assert got.shape == (*shape, 70)
    errors = errors_of(backend[0], got.numel() // 70)
    want = want_product(x.reshape(-1, 100), weight.w_hat, None, torch.float16, **errors)
    assert mismatch(got.reshape(-1, 70), want) is None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("m", [1, 17, 70])
def test_linear_gradients(backend, m, symmetric, dtype):
    name, device = backend
    n, k, group_size = 130, 200, 64
    weight = make_weight(n, k, group_size, symmetric, dtype, device)
    qweight, scale, zero = weight.tiled()
    x = make_x(m, k, "rows", dtype, device).requires_grad_()
    bias = torch.randn(n, device=device).to(dtype).requires_grad_()
    grad = make_x(m, n, "columns", dtype, device)
    ops.linear_w4a16(x, qweight, scale, zero, bias, n, group_size).backward(grad)
    want = want_product(grad, weight.w_hat.T, None, dtype, rounded_weight=name != "torch", by_cublas=name != "torch")
    assert mismatch(x.grad, want) is None
    for fault in WEIGHT_FAULTS.values():
        wrong = want_product(grad, fault(weight).w_hat.T, None, dtype, rounded_weight=False).value
        assert mismatch(wrong.to(dtype), want) is not None
    want = cases.want_group_sums(grad.double().T, -1, 1.0, dtype)
    assert mismatch(bias.grad[:, None], want) is None
    assert mismatch(bias.grad.roll(1)[:, None], want) is not None


@pytest.mark.parametrize(("k", "group_size", "symmetric"), [(1000, 128, False), (511, 32, True), (385, -1, False)])
def test_linear_gradient_through_parts_of_the_expanded_weight(monkeypatch, backend, k, group_size, symmetric):
    """Each column is written once, by a part that is expanded alone: a few units, and the whole weight at once."""
    device = backend[1]
    n, m, dtype = 200, 70, torch.bfloat16
    weight = make_weight(n, k, group_size, symmetric, dtype, device)
    grad = make_x(m, n, "rows", dtype, device)
    want = want_product(grad, weight.w_hat.T, None, dtype, rounded_weight=True, by_cublas=True)
    sizes, dequantize = [], linear._dequantize.call
    monkeypatch.setattr(linear._dequantize, "call", lambda *a: sizes.append(a[3] * a[4] * 2) or dequantize(*a))
    for limit in (1, 2 * n * 256, 1 << 27):
        monkeypatch.setattr(linear, "EXPANDED_BYTES", limit)
        got = torch.full((m, k), float("nan"), dtype=dtype, device=device)
        linear._backward_expand(got, grad, *weight.tiled(), group_size)
        assert mismatch(got, want) is None
        assert max(sizes) <= max(limit, 2 * n * linear.PART)
        assert sum(sizes) == 2 * n * k
        sizes.clear()
    assert mismatch(got.roll(linear.PART, 1), want) is not None


def test_linear_gradcheck_fp64(monkeypatch):
    monkeypatch.setenv("PYQUANT_BACKEND", "torch")
    weight = make_weight(5, 40, 32, False, torch.float64, "cpu")
    tiled = weight.tiled()
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def linear(x, bias):
        return ops.linear_w4a16(x, *tiled, bias, 5, 32)

    assert torch.autograd.gradcheck(linear, (x, bias))


# ------------------------------------------------------------------------------------------------ fake_quant


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", by_size(FAKE_QUANT_CASES))
def test_fake_quant(backend, case, dtype):
    w, scale, zero, _ = make_fake_quant(case, dtype, backend[1])
    got = ops.fake_quant(w, scale, zero, case.group_size, case.bits)
    assert got.dtype == dtype
    value = cases.fake_quant_formula(w, scale, zero, case.group_size, case.bits)
    assert torch.equal(got, value.float().to(dtype)), "an integer times a scale, rounded to fp32 and then to w's dtype"
    assert torch.equal(got, reference.fake_quant(w, scale, zero, case.group_size, case.bits))
    if w.numel() > 100:
        shifted = cases.fake_quant_formula(w, scale.roll(1, 0), zero, case.group_size, case.bits)
        assert not torch.equal(got, shifted.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", by_size(FAKE_QUANT_CASES))
def test_fake_quant_gradients(backend, case, dtype):
    """Against autograd of the fp64 formula, term by term, and against the three written formulas' sums."""
    w, scale, zero, grad = make_fake_quant(case, dtype, backend[1])
    group_size, bits, grad_scale = case.group_size, case.bits, 0.3
    leaves = [t.clone().requires_grad_() for t in (w, scale, zero) if t is not None]
    out = ops.fake_quant(*leaves, *[None] * (zero is None), group_size, bits, grad_scale)
    got = torch.autograd.grad(out, leaves, grad)

    k = case.k
    wide_w = w.double().requires_grad_()
    # a scale and a zero for each element: their gradients are the terms of the sums
    wide_s = int4.expand_groups(scale.double(), k, group_size).contiguous().requires_grad_()
    wide_z = None if zero is None else int4.expand_groups(zero.double(), k, group_size).contiguous().requires_grad_()
    exact_v = w.float() / wide_s.detach().float()
    value = fake_quant_elementwise(wide_w, wide_s, wide_z, bits, exact_v)
    terms = torch.autograd.grad(value, [t for t in (wide_w, wide_s, wide_z) if t is not None], grad.double())

    assert torch.equal(got[0], terms[0].to(dtype)), "dw is grad or 0, exactly"
    assert got[0].count_nonzero() > 0 or w.numel() < 100
    # fp32 keeps round(v) - v to 2^-24 |v|, which the terms inherit: count |grad * v| towards the sum of magnitudes
    for name, found, term, leaf in zip(("scale", "zero"), got[1:], terms[1:], (scale, zero), strict=False):
        want = cases.want_group_sums(term, group_size, grad_scale, leaf.dtype)
        slack = cases.want_group_sums((grad.double() * exact_v).abs(), group_size, grad_scale, leaf.dtype)
        want = Want(want.value, want.worst + 4 * cases.U32 * slack.value, want.rms + 1e-6)  # 1e-6: 16 u, cancellation
        assert mismatch(found, want) is None, name
        if found.numel() > 20 and found.count_nonzero() > 10:
            assert mismatch(found.roll(1), want) is not None, f"{name}: sums of the wrong group"
            assert mismatch(found / grad_scale, want) is not None, f"{name}: without grad_scale"


def fake_quant_elementwise(w, s, z, bits, exact_v):
    """cases.fake_quant_formula with a scale and a zero per element and the given fp32 quotient."""
    low, high = cases.code_range(bits, z is None)
    v = w / s
    v = v + (exact_v.double() - v).detach()
    if z is None:
        z = torch.zeros_like(v)
    else:
        z = z + (z.detach().float().round().double().clamp(low, high) - z).detach()
    inside = (v + z).clamp(low, high)
    return (inside + (inside.round() - inside).detach() - z) * s


@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quant_gradients_fp64(symmetric, monkeypatch):
    """In fp64, all three gradients equal those of the straight-through formula to the last digits."""
    monkeypatch.setenv("PYQUANT_BACKEND", "torch")
    case = FakeQuantCase(9, 50, 16, symmetric=symmetric)
    made = make_fake_quant(case, torch.float32, "cpu")
    leaves = [t.double().requires_grad_() for t in made[:3] if t is not None]
    none = [None] * (3 - len(leaves))
    grad = made[3].double()
    got = torch.autograd.grad(ops.fake_quant(*leaves, *none, 16, 4), leaves, grad)
    want = torch.autograd.grad(cases.fake_quant_formula(*leaves, *none, 16, 4), leaves, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # fp64 sums of 16 terms in another order


def test_fake_quant_equals_dequantized_codes(backend):
    """What is trained is what is deployed: fake_quant(w) == dequantize(quantize(w)), bit for bit."""
    case = FakeQuantCase(65, 256, 64, symmetric=False)
    w, scale, zero, _, _ = (*quantize_inputs(case, torch.bfloat16, backend[1]),)
    qweight = ops.quantize_int4(w, scale, zero, 64, 4)
    tiled = int4.tile_scale(scale, 256, 64), int4.tile_scale(zero.to(torch.uint8), 256, 64)
    deployed = ops.dequantize_int4(qweight, *tiled, 65, 256, 64, torch.bfloat16)
    assert torch.equal(ops.fake_quant(w, scale, zero, 64, 4), deployed)


def test_fake_quant_with_and_without_the_dispatcher():
    """Ordinary tensors go past torch's dispatcher; the results are the same, and so are the refusals, each time."""
    torch.manual_seed(0)
    w, scale, grad = torch.randn(6, 32), torch.rand(6, 2) + 0.5, torch.randn(6, 32)
    results = []
    for run in (ops.fake_quant, torch.ops.pyquant.fake_quant.default):
        leaves = w.clone().requires_grad_(), scale.clone().requires_grad_()
        out = run(*leaves, None, 16, 4, 0.3)
        out.backward(grad)
        results.append((out.detach(), *[leaf.grad for leaf in leaves]))
    assert type(ops.fake_quant(*leaves, None, 16, 4).grad_fn).__name__ == "_PlainBackward"
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    for _ in range(2):
        with pytest.raises(ValueError, match="bits=9 must be between 2 and 8"):
            ops.fake_quant(*leaves, None, 16, 9)


def test_checks_that_were_passed_are_those_of_calls_alike():
    """Kernels check once for calls alike; whatever the checks look at makes a call another one."""
    checked = sys.modules["pyquant.ops.fake_quant"]._output
    w, scale = torch.randn(6, 32), torch.rand(6, 2) + 0.5
    good = (w, scale, None, 16, 4, 1.0, "ste", "hard", None, 10.0, False)
    for _ in range(2):
        assert checked(*good).shape == w.shape
        for place, value, message in (
            (1, scale[:, :1], "scale must have shape"), (1, scale.int(), "scale must be bfloat16"), (4, 9, "bits=9"),
            (0, w.T, "scale must have shape"), (2, scale[:1], "zero must have shape"), (6, "no", "rounding='no'"),
            (6, "sigmoid-a", "needs a temperature"), (7, "no", "clamp='no'"), (9, 0.0, "beta=0.0"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                checked(*good[:place], value, *good[place + 1 :])
