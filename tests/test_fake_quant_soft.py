"""fake_quant with soft rounding and clamping: slopes against fp64, kernels against the reference, and what must be exact."""

from __future__ import annotations

import pytest
import surrogates
import torch
from surrogates import CORNERS, MODES

import cases
from cases import FAKE_QUANT_CASES, FakeQuantCase, make_fake_quant, mismatch
from pyquant import ops, reference
from pyquant.formats import int4
from pyquant.ops import _registry

pytestmark = pytest.mark.usefixtures("poison")

SMALL = 64 * 70  # elements up to which a GPU test also runs under compute-sanitizer


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="torch-cpu"),
        pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
        pytest.param(("cuda", "cuda"), id="cuda-cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request, monkeypatch):
    """(backend, device), pinned."""
    name, device = request.param
    why = _registry.unavailable(name, device)
    if why:
        pytest.skip(why)
    monkeypatch.setenv("PYQUANT_BACKEND", name)
    return request.param


def run(w, scale, zero, grad, case, mode, grad_scale=0.3):
    """(w_hat, dw, dscale, dzero) of the op; dzero None without a zero."""
    leaves = [t.detach().clone().requires_grad_() for t in (w, scale, zero) if t is not None]
    none = [None] * (zero is None)
    out = ops.fake_quant(*leaves, *none, case.group_size, case.bits, grad_scale, *mode.arguments(w.device.type))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad), *none]


# ------------------------------------------------------------------------------------------------ the surrogates, fp64


@pytest.mark.parametrize("mode", [*MODES, *CORNERS], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_equal_autograd_of_the_surrogate(mode, symmetric, monkeypatch):
    """In fp64 the written backward is the derivative of the formula typed in surrogates.py, to the last digits."""
    monkeypatch.setenv("PYQUANT_BACKEND", "torch")
    case = FakeQuantCase(9, 50, 16, bits=3, symmetric=symmetric)
    w, scale, zero, grad = make_fake_quant(case, torch.float32, "cpu")
    w, scale, grad = w.double(), scale.double(), grad.double()
    zero = None if zero is None else zero.double()
    got = run(w, scale, zero, grad, case, mode, 1.0)
    leaves = [t.clone().requires_grad_() for t in (w, scale, zero) if t is not None]
    wide = [leaves[0], *(int4.expand_groups(t, case.k, case.group_size) for t in leaves[1:])]
    value = surrogates.elementwise(*wide, *[None] * (zero is None), case.bits, mode)
    want = [value.detach(), *torch.autograd.grad(value, leaves, grad)]
    for name, a, b in zip(("value", "dw", "dscale", "dzero"), got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mode", [m for m in (*MODES, *CORNERS) if m.soft_forward and m.rounding != "ste"], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradcheck(mode, symmetric, monkeypatch):
    """Finite differences of the soft forward itself, off its jumps (reading A) and kinks (the hard clamp)."""
    monkeypatch.setenv("PYQUANT_BACKEND", "torch")
    bits, n, k = 3, 2, 12
    low, high = cases.code_range(bits, symmetric)
    scale = torch.tensor([[0.3, 0.7], [1.1, 0.05]], dtype=torch.float64)
    zero = None if symmetric else torch.tensor([[2.0, 5.0], [1.0, 3.0]], dtype=torch.float64)
    offset = 0.0 if zero is None else int4.expand_groups(zero, k, 6)
    x = torch.rand(n, k, dtype=torch.float64) * (high - low + 2) + low - 1
    x = torch.where((2 * x - (2 * x).round()).abs() < 0.05, x + 0.1, x)
    w = ((x - offset) * int4.expand_groups(scale, k, 6)).requires_grad_()
    how = mode.arguments("cpu")

    def soft(w, scale):
        return ops.fake_quant(w, scale, zero, 6, bits, 1.0, *how)

    assert torch.autograd.gradcheck(soft, (w, scale.requires_grad_()), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("clamp", ["sigmoid", "phi"])
def test_soft_clamp_is_a_clamp(clamp):
    """Exact at the edges with slope 1/2, the identity inside, the edge outside; the figures are those of the formula."""
    x = torch.tensor([-1000.0, -8.0, 0.0, 5.0, 7.0, 1000.0], dtype=torch.float64)
    c, slope = reference.soft_clamp(x, -8, 7, clamp, 10.0)
    torch.testing.assert_close(c, torch.tensor([-8.0, -8, 0, 5, 7, 7], dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(slope, torch.tensor([0, 0.5, 1, 1, 0.5, 0], dtype=torch.float64), rtol=0, atol=1e-6)
    assert reference.soft_clamp(torch.tensor(7.25), -8, 7, clamp, 10.0)[1] < 0, "a small negative slope beyond the edge"


def test_slopes_of_soft_round():
    """Mean slope over a period: tanh(T/2) for A, 1 for B; the values at grid points and thresholds at T = 4."""
    c = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = torch.tensor(4.0)
    assert abs(reference.soft_round(c, "sigmoid-a", t)[1].mean() - torch.tanh(torch.tensor(2.0))) < 1e-6
    assert abs(reference.soft_round(c, "sigmoid-b", t)[1].mean() - 1) < 1e-6
    at = torch.tensor([0.0, 0.5], dtype=torch.float64)  # a grid point, a threshold
    for rounding, want in (("sigmoid-a", (0.840, 1.071)), ("sigmoid-b", (0.551, 1.313))):
        got = reference.soft_round(at, rounding, t)[1]
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=6e-4)


# ------------------------------------------------------------------------------------------------ the ops


# Every mode meets half a dozen shapes and layouts, every shape half of the modes, in one of the dtypes.
PAIRS = [
    pytest.param(
        case, mode, dtype, id=f"{case}-{mode}-{str(dtype)[6:]}", marks=[pytest.mark.small] * (case.n * case.k <= SMALL)
    )
    for i, case in enumerate(FAKE_QUANT_CASES)
    for j, mode in enumerate((*MODES, *CORNERS))
    for d, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32))
    if (i + j + 2 * d) % 6 == 0
]


@pytest.mark.parametrize(("case", "mode", "dtype"), PAIRS)
def test_against_fp64(backend, case, mode, dtype):
    """Value and all three gradients of every mode, shape and layout, with faults that must be noticed."""
    w, scale, zero, grad = make_fake_quant(case, dtype, backend[1])
    got = run(w, scale, zero, grad, case, mode)
    want = surrogates.results(w, scale, zero, grad, case, mode, 0.3)
    if not mode.soft_forward:
        assert torch.equal(got[0], reference.fake_quant(w, scale, zero, case.group_size, case.bits)), "exactly rounded"
    value, sums = want.without_jumps(got[0], grad, case, 0.3)
    assert mismatch(*value) is None
    assert mismatch(got[1], want.dw) is None
    for name, found in zip(sums, got[2:], strict=False):
        assert mismatch(found, sums[name]) is None, name
    if w.numel() > 100:
        wrong = surrogates.results(w, scale.roll(1, 0), zero, grad, case, mode, 0.3)
        assert mismatch(wrong.dw.value.to(dtype), want.dw) is not None, "the slope of another scale"
        assert mismatch(wrong.dscale.value.float(), want.dscale) is not None
        assert mismatch(cases.one_wrong_element(got[1]), want.dw) is not None
        assert mismatch(cases.one_unwritten_element(got[2]), want.dscale) is not None


@pytest.mark.parametrize("mode", [m for m in MODES if m.rounding != "ste" or m.clamp != "hard"], ids=str)
def test_modes_differ(backend, mode):
    """Each mode is told apart from the others by the comparison that accepts it."""
    case = FakeQuantCase(64, 256, 64, bits=3)
    w, scale, zero, grad = make_fake_quant(case, torch.float16, backend[1])
    want = surrogates.results(w, scale, zero, grad, case, mode, 0.3)
    for other in MODES:
        if (other.rounding, other.clamp) != (mode.rounding, mode.clamp):
            assert mismatch(run(w, scale, zero, grad, case, other)[1], want.dw) is not None, other


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_same_bits_every_time(backend, mode):
    case = FakeQuantCase(33, 4100, -1, symmetric=False)
    made = make_fake_quant(case, torch.bfloat16, backend[1])
    for a, b in zip(run(*made, case, mode), run(*made, case, mode), strict=True):
        assert torch.equal(a, b)


@pytest.mark.small
def test_huge_and_tiny_weights_and_scales(backend):
    """Quotients far beyond the codes and scales near the ends of fp32: finite, exact codes, slope 0 far outside."""
    device = backend[1]
    w = torch.tensor([[1e30, -1e30, 3e38, 0.0, 1e-30, -1e-38, 6.0, 7.0]], device=device)
    for scale in (1.0, 1e-30, 1e30, 2e-38):
        s = torch.full((1, 1), scale, device=device)
        for mode in MODES:
            if mode.soft_forward:
                continue
            got = run(w, s, None, torch.ones_like(w), FakeQuantCase(1, 8, -1), mode)
            assert torch.equal(got[0], reference.fake_quant(w, s, None, -1, 4))
            assert torch.isfinite(got[1]).all()
            assert torch.isfinite(got[2]).all()
            if scale <= 1:
                assert got[1][0, :3].abs().max() < 1e-6


def test_nan_weights_stay_nan(backend):
    w = torch.tensor([[float("nan"), 1.0, 2.0, 3.0]], device=backend[1])
    out = ops.fake_quant(w, torch.ones(1, 1, device=backend[1]))
    assert out[0].isnan().tolist() == [True, False, False, False]


def test_division_is_ieee(backend):
    w, scale = cases.division_boundaries(backend[1])
    assert torch.equal(ops.fake_quant(w, scale), reference.fake_quant(w, scale, None, -1, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_at_every_boundary_of_16_bit_weights(backend, dtype):
    """Weights next to each tie and each edge, scales of bf16 and fp32, and such whose mantissa is ones or nearly so: the
    kernels multiply by a reciprocal, and must land on the codes, and on the side of the clamp, that division gives."""
    device = backend[1]
    ones = (1 << 24) - 1 - torch.arange(64, device=device)
    mantissas = torch.cat(
        [
            ones,
            (1 << 24) - ones,  # just above a power of two
            torch.randint(1 << 23, 1 << 24, (256,), device=device),
            torch.randint(1 << 7, 1 << 8, (256,), device=device) << 16,
        ]
    )
    scale = (mantissas.double() * 2.0**-28).float()[:, None]
    halves = torch.arange(-17, 18, device=device).double() / 2
    near = (halves * scale.double()).to(dtype)
    beside = [(near.view(torch.int16) + step).view(dtype) for step in (-1, 0, 1)]
    powers = torch.exp2(torch.arange(-8, 3, device=device)).to(dtype).expand(scale.shape[0], -1)
    w = torch.cat([*(torch.where(near == 0, near, t) for t in beside), powers], 1)
    got = run(w, scale, None, torch.ones_like(w), FakeQuantCase(*w.shape, -1), MODES[0])
    assert torch.equal(got[0], reference.fake_quant(w, scale, None, -1, 4))
    inside = (w.float() / scale >= -8) & (w.float() / scale <= 7)
    assert torch.equal(got[1], inside.to(dtype))
    assert 0 < inside.float().mean() < 1


def test_nothing_is_saved_but_w_and_the_parameters(backend):
    case = FakeQuantCase(16, 256, 128, symmetric=False)
    made = make_fake_quant(case, torch.bfloat16, backend[1])
    w, scale, zero = (t.requires_grad_() for t in made[:3])
    temperature = torch.tensor(4.0, device=backend[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        ops.fake_quant(w, scale, zero, 128, 4, 1.0, "sigmoid-b", "sigmoid", temperature)
    assert sorted(kept) == sorted(t.data_ptr() for t in (w, scale, zero, temperature))


# ------------------------------------------------------------------------------------------------ arguments


W, S = torch.randn(6, 40), torch.ones(6, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("soft",), "rounding='soft' must be one of ste, sigmoid-a, sigmoid-b"),
        (("ste", "swish"), "clamp='swish' must be one of hard, sigmoid, phi"),
        (("sigmoid-a",), "rounding='sigmoid-a' needs a temperature"),
        (("sigmoid-b", "hard", -1.0), "temperature=-1.0 must be positive"),
        (("sigmoid-b", "hard", torch.ones(1)), r"temperature must be a scalar of torch.float32, got .* shape \(1,\)"),
        (
            ("sigmoid-b", "hard", torch.tensor(1.0).double()),
            "temperature must be a scalar of torch.float32, got torch.f",
        ),
        (("sigmoid-b", "hard", torch.tensor(1.0, device="meta")), "temperature is on meta, the first argument on cpu"),
        (("ste", "sigmoid", None, 0.0), "beta=0.0 must be between 0.01 and 10000"),
    ],
)
def test_refuses(arguments, sentence):
    with pytest.raises(ValueError, match="fake_quant: " + sentence):
        ops.fake_quant(W, S, None, 16, 4, 1.0, *arguments)


def test_a_number_is_a_temperature():
    want = ops.fake_quant(W, S, None, 16, 4, 1.0, "sigmoid-b", "hard", torch.tensor(3.0), 10.0, True)
    assert torch.equal(ops.fake_quant(W, S, None, 16, 4, 1.0, "sigmoid-b", "hard", 3, 10.0, True), want)


@pytest.mark.parametrize(
    ("device", "compiler"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_a_new_temperature_does_not_recompile(device, compiler):
    compiled = 0

    def count(graph, inputs):
        nonlocal compiled
        compiled += 1
        return torch._dynamo.backends.registry.lookup_backend(compiler)(graph, inputs)

    def step(w, s, t):
        return ops.fake_quant(w, s, None, 16, 4, 0.5, "sigmoid-b", "sigmoid", t, 10.0, True)

    fast = torch.compile(step, backend=count, fullgraph=True)
    w, s = W.to(device).requires_grad_(), S.to(device).requires_grad_()
    t = torch.tensor(2.0, device=device)
    for value in (2.0, 4.0, 8.0):
        t.fill_(value)
        got = torch.autograd.grad(fast(w, s, t).sum(), (w, s))
        want = torch.autograd.grad(step(w, s, t).sum(), (w, s))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert compiled == 1
