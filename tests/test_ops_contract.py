"""What surrounds the arithmetic of the ops: registration, refusals in full sentences, choice of backend, tracing."""

from __future__ import annotations

import pytest
import torch

import cases
from cases import make_weight
from pyquant import ops
from pyquant.formats import int4
from pyquant.ops import _registry

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


# ------------------------------------------------------------------------------------------------ registration


def test_every_op_has_sample_calls():
    missing = set(_registry.OPS) - set(cases.sample_calls("cpu"))
    assert not missing, f"add calls of {sorted(missing)} to cases.sample_calls, so that opcheck reaches them"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(_registry.OPS))
def test_opcheck(name, device):
    """Schema, shape function and strides, autograd registration, and tracing with static and dynamic shapes."""
    for args in cases.sample_calls(device)[name]:
        torch.library.opcheck(_registry.OPS[name].overload, args)


@pytest.mark.parametrize("name", sorted(_registry.OPS))
def test_every_op_runs_everywhere(name):
    assert "torch" in _registry.OPS[name].backends
    assert set(_registry.OPS[name].backends) <= set(_registry.BACKENDS)


# ------------------------------------------------------------------------------------------------ refusals


def linear_arguments(**changes):
    weight = make_weight(70, 100, 32, False, torch.float16, "cpu")
    qweight, scale, zero = weight.tiled()
    arguments = {
        "x": torch.randn(3, 100).half(), "qweight": qweight, "scale": scale, "zero": zero,
        "bias": torch.zeros(70).half(), "n": 70, "group_size": 32,
    }  # fmt: skip
    return [changes.get(name, value) for name, value in arguments.items()]


def transposed(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


GOOD = dict(zip(("x", "qweight", "scale", "zero", "bias", "n", "group_size"), linear_arguments(), strict=True))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x": GOOD["x"].int()}, "x must be bfloat16, float16 or float32, not torch.int32"),
        ({"x": GOOD["x"].bfloat16()}, "x is torch.bfloat16 but the weight's scales are torch.float16; convert"),
        ({"x": GOOD["x"][:, :60]}, r"qweight has shape \(2, 2, 128, 4\), a weight of N=70, K=60 has \(2, 1, 128, 4\)"),
        ({"x": torch.tensor(1.0).half()}, r"x must be \[..., K\], got a scalar"),
        ({"qweight": GOOD["qweight"].long()}, "qweight must be int32, not torch.int64"),
        ({"qweight": transposed(GOOD["qweight"])}, "qweight and scale must be contiguous"),
        ({"scale": GOOD["scale"][:, :2]}, r"tiled scale must have shape \(2, 4, 64\) for N=70, K=100, group_size=32"),
        ({"scale": transposed(GOOD["scale"])}, "qweight and scale must be contiguous"),
        ({"scale": GOOD["scale"].to("meta")}, "scale is on meta, the first argument on cpu"),
        ({"zero": GOOD["zero"].int()}, "tiled zero must be uint8, not torch.int32"),
        ({"zero": GOOD["zero"][:1]}, r"tiled zero must have shape \(2, 4, 64\), got \(1, 4, 64\)"),
        ({"zero": transposed(GOOD["zero"])}, "zero must be contiguous"),
        ({"bias": torch.zeros(71).half()}, r"bias must have shape \(70,\)"),
        ({"bias": torch.zeros(70)}, "bias must be torch.float16 like x"),
        ({"bias": torch.zeros(140).half()[::2]}, "bias must be contiguous"),
        ({"n": 200}, r"a weight of N=200, K=100 has \(4, 2, 128, 4\)"),
        ({"group_size": 48}, r"group_size=48 must be one of \(-1, 32, 64, 128\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_linear_refuses(changes, sentence):
    ops.linear_w4a16(*linear_arguments())
    with pytest.raises(ValueError, match="linear_w4a16: .*" + sentence):
        ops.linear_w4a16(*linear_arguments(**changes))
    if (
        changes.get("scale", GOOD["scale"]).device.type == "cpu"
    ):  # the shape function refuses the same calls when tracing
        with torch._subclasses.FakeTensorMode() as mode:
            fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in linear_arguments(**changes)]
            with pytest.raises(ValueError, match=sentence):
                _registry.OPS["linear_w4a16"].overload(*fake)


W, S = torch.randn(6, 40), torch.ones(6, 3)


@pytest.mark.parametrize("op", [ops.quantize_int4, ops.fake_quant])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((W[0], S, None, 16, 4), r"w must be \[N, K\], got shape \(40,\)"),
        ((W.int(), S, None, 16, 4), "w must be bfloat16, float16 or float32, not torch.int32"),
        ((W, S.int(), None, 16, 4), "scale must be bfloat16, float16 or float32, not torch.int32"),
        (
            (W, S[:, :2], None, 16, 4),
            r"scale must have shape \(6, 3\) for w \(6, 40\) with group_size=16, got \(6, 2\)",
        ),
        ((W, S, S[:5], 16, 4), r"zero must have shape \(6, 3\)"),
        ((W, S, None, 0, 4), "group_size=0 must be positive, or -1 for per channel"),
        ((W, S, None, 16, 1), "bits=1 must be between 2 and"),
        ((W, S, None, 16, 9), "bits=9 must be between 2 and"),
        ((W, S.to("meta"), None, 16, 4), "scale is on meta, the first argument on cpu"),
    ],
)
def test_quantizing_ops_refuse(op, arguments, sentence):
    op(W, S, None, 16, 4)
    with pytest.raises(ValueError, match=f"{op.__name__}: .*{sentence}"):
        op(*arguments)


def test_bits_limits():
    assert ops.fake_quant(W, S, None, 16, 8).shape == W.shape
    with pytest.raises(ValueError, match="bits=5 must be between 2 and 4"):
        ops.quantize_int4(W, S, None, 16, 5)


def test_dequantize_refuses():
    weight = make_weight(70, 100, 32, False, torch.float16, "cpu")
    with pytest.raises(ValueError, match="dequantize_int4: qweight has shape"):
        ops.dequantize_int4(*weight.tiled(), 70, 200, 32)


def test_fake_quant_backward_refuses():
    with pytest.raises(ValueError, match=r"gradient \(5, 40\) does not match w \(6, 40\)"):
        torch.ops.pyquant.fake_quant_backward(W[:5], W, S, None, 16, 4, 1.0)


# ------------------------------------------------------------------------------------------------ choice of backend


def test_pinned_backend_that_declines_is_an_error(monkeypatch):
    for name, why in (("cuda", "the extension serves GPU tensors"), ("fpga", "no backend 'fpga'")):
        monkeypatch.setenv("PYQUANT_BACKEND", name)
        with pytest.raises(RuntimeError, match=f"PYQUANT_BACKEND={name} cannot run quantize_int4 on cpu: .*{why}"):
            ops.quantize_int4(W, S, None, 16, 4)


def test_describe_names_every_op_and_device():
    rows = _registry.describe()
    assert {(row["op"], row["device"]) for row in rows} == {(n, d) for n in _registry.OPS for d in ("cpu", "cuda")}
    if _registry.unavailable("triton", "cpu"):
        assert all(row["backend"] == "torch" for row in rows if row["device"] == "cpu")


@pytest.mark.parametrize("wide", ["w", "scale", "zero"])
def test_fp64_anywhere_goes_to_torch(wide):
    """fp64 is never narrowed silently: the kernels decline it in whichever argument it comes."""
    arguments = {"w": W, "scale": S, "zero": S}
    arguments[wide] = arguments[wide].double()
    for op in ("quantize_int4", "fake_quant"):
        for backend in ("cuda", "triton"):
            assert _registry.OPS[op].backends[backend].declines(*arguments.values(), 16, 4) is not None


# ------------------------------------------------------------------------------------------------ gradients and tracing


def test_gradients_only_where_they_are_asked_for():
    weight = make_weight(70, 100, 32, False, torch.float16, "cpu")
    qweight, scale, zero = weight.tiled()
    x = torch.randn(3, 100).half().requires_grad_()
    bias = torch.zeros(70).half()
    ops.linear_w4a16(x, qweight, scale, zero, bias, 70, 32).sum().backward()
    assert x.grad is not None
    assert bias.grad is None
    w = W.clone().requires_grad_()
    ops.fake_quant(w, S, S.clone().requires_grad_(), 16).sum().backward()
    assert torch.isfinite(w.grad).all()
    with torch.no_grad():
        assert not ops.fake_quant(w, S, None, 16).requires_grad
    assert not ops.linear_w4a16(x.detach(), qweight, scale, zero, bias, 70, 32).requires_grad


def test_fp64_gradients_keep_their_precision():
    weight = make_weight(5, 40, 32, False, torch.float64, "cpu")
    qweight, scale, zero = weight.tiled()
    scale.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ops.dequantize_int4(qweight, s, zero, 5, 40, 32), (scale,))
    grad = torch.randn(5, 40, dtype=torch.float64)
    (got,) = torch.autograd.grad(ops.dequantize_int4(qweight, scale, zero, 5, 40, 32), scale, grad)
    want = int4.tile_scale(torch.stack([t.sum(1) for t in (grad * weight.steps).split(32, 1)], 1), 40, 32)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)  # fp64 sums of 32 terms
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    x, grad = torch.randn(7, 40, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    (got,) = torch.autograd.grad(ops.linear_w4a16(x, qweight, scale, zero, bias, 5, 32), bias, grad)
    torch.testing.assert_close(got, grad.sum(0), rtol=1e-13, atol=1e-13)


def traced_step(x, w, s, weight, bias):
    """A trained layer and a deployed one, in one graph."""
    qweight, scale, zero = weight
    hidden = x @ ops.fake_quant(w, s, None, 32, 4, 0.1).T
    return ops.linear_w4a16(hidden, qweight, scale, zero, bias, 70, 32)


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)],
)
def test_compiles_to_one_graph_forward_and_backward(device, backend):
    weight = make_weight(70, 100, 32, False, torch.float16, device).tiled()
    made = torch.randn(4, 64), torch.randn(100, 64) / 8, torch.full((100, 2), 0.1), torch.randn(70)
    step = torch.compile(traced_step, fullgraph=True, backend=backend)
    results = []
    for function in (traced_step, step):
        x, w, s, bias = (t.to(device).half().detach().requires_grad_() for t in made)
        y = function(x, w, s, weight, bias)
        results.append((y, *torch.autograd.grad(y.float().sin().sum(), (x, w, s, bias))))
    for name, eager, compiled in zip(("y", "dx", "dw", "ds", "dbias"), *results, strict=True):
        # our ops run the same kernels in both; the fp16 products and sums around them may be fused and reordered
        error = (eager.float() - compiled.float()).norm() / eager.float().norm()
        assert error <= 4 * cases.unit_roundoff(torch.float16), name
