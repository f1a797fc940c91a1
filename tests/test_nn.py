"""QLinear, FakeQuantLinear and swap as a user meets them: drop in, save, load, move, compile, capture."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from pyquant import QLinear, QuantSpec, swap
from pyquant.formats import int4
from pyquant.nn.linear import FakeQuantLinear
from pyquant.nn.swap import fused_experts, matches

SPECS = [
    QuantSpec(b, g, s) for b, g, s in [(4, 128, True), (4, 32, False), (3, -1, True), (2, 64, False), (4, -1, True)]
]


def linear(n: int = 100, k: int = 256, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(k, n, bias=bias).to(dtype)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_from_linear_is_the_dequantized_linear(spec):
    dense = linear(dtype=torch.float32)
    layer = QLinear.from_linear(dense, spec, scale_dtype=torch.bfloat16)
    x = torch.randn(3, 5, 256)
    want = nn.functional.linear(x, layer.dequantize(), dense.bias)
    assert layer(x).shape == (3, 5, 100)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.scale, layer.scale.bfloat16().float())  # as it will be stored
    step = int4.untile_scale(layer.scale, 100, 256, spec.group_size).max()
    error = (layer.dequantize() - dense.weight).abs().max()
    assert 0 < error <= step  # within a step: nearest code, and half a step of clipping at the symmetric top


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_state_dict_round_trip(spec):
    layer = QLinear.from_linear(linear(), spec, rule="mse")
    state = layer.state_dict()
    keys = {"weight_packed", "weight_scale", "weight_shape", "bias"} | (
        set() if spec.symmetric else {"weight_zero_point"}
    )
    assert set(state) == keys
    assert state["weight_packed"].shape == (100, -(-256 * spec.bits // 32))
    other = QLinear(256, 100, True, spec, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="no weight yet"):
        other(torch.randn(1, 256).bfloat16())
    other.load_state_dict(state)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, dict(other.named_buffers())[name])
    other.load_state_dict(QLinear.from_linear(linear(), spec).state_dict())  # and again, over a loaded one
    assert not torch.equal(other.qweight, layer.qweight)


def test_loads_into_another_dtype_and_moves():
    layer = QLinear.from_linear(linear(), QuantSpec())
    wide = layer.float()
    assert wide.scale.dtype == wide.bias.dtype == torch.float32
    assert wide.qweight.dtype == torch.int32
    with pytest.raises(ValueError, match=r"x is torch.float16 but the weight's scales are torch.float32"):
        wide(torch.randn(1, 256).half())
    with torch.autocast("cpu", torch.bfloat16):  # x arrives in bf16; the layer casts it, as nn.Linear would
        assert wide(torch.randn(1, 256).bfloat16()).dtype == torch.float32


def test_refusals():
    with pytest.raises(ValueError, match=r"K=100 must be a multiple of group_size=128"):
        QLinear(100, 8)
    with pytest.raises(ValueError, match=r"2\.\.4 bits, not 8"):
        QLinear(128, 8, spec=QuantSpec(8))
    with pytest.raises(ValueError, match=r"group_size=48 must be one of"):
        QuantSpec(4, 48)
    broken = linear()
    broken.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"has 1 NaN or Inf"):
        QLinear.from_linear(broken)
    with pytest.raises(ValueError, match=r"weight_shape \[100, 256\] does not match"):
        QLinear(256, 101, dtype=torch.bfloat16)._set_portable(QLinear.from_linear(linear()).state_dict())


def test_weight_is_frozen_and_gradients_flow():
    layer = QLinear.from_linear(linear(dtype=torch.float32), QuantSpec())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    x = torch.randn(4, 256, requires_grad=True)
    layer(x).square().sum().backward()
    grad_y = 2 * layer(x).detach()
    torch.testing.assert_close(x.grad, grad_y @ layer.dequantize(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, grad_y.sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["lsq", "ste"])
def test_fake_quant_linear_deploys_what_it_trained(spec, kind):
    layer = FakeQuantLinear.from_linear(linear(dtype=torch.float32), spec, kind)
    x = torch.randn(8, 256)
    layer(x).square().mean().backward()
    assert layer.weight.grad.abs().sum() > 0
    if kind == "lsq":
        assert layer.quantizer.scale.grad.abs().sum() > 0
    with torch.no_grad():
        layer.weight.sub_(0.1 * layer.weight.grad)
    deployed = QLinear.from_fake_quant(layer)  # scales stay fp32: the very same codes and values
    assert torch.equal(deployed.dequantize(), layer.quantized_weight().detach())


def test_freeze_snaps_and_stops():
    layer = FakeQuantLinear.from_linear(linear(dtype=torch.float32), QuantSpec(3, -1))
    want = layer.quantized_weight().detach().clone()
    assert not torch.equal(layer.weight, want)
    layer.freeze()
    assert torch.equal(layer.weight, want)
    assert torch.equal(layer.quantized_weight(), want)
    assert not any(p.requires_grad for p in layer.parameters())


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 128)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(128, 128), "up": nn.Linear(128, 256)}) for _ in range(2)
        )
        self.lm_head = nn.Linear(128, 10, bias=False)


def test_swap_reports_what_it_did(caplog):
    model = Tiny()
    with caplog.at_level(logging.INFO, "pyquant"):
        report = swap(model, exclude=["lm_head", "layers.1.up"])
    assert report.changed == ["layers.0.q_proj", "layers.0.up", "layers.1.q_proj"]
    assert report.kept == {"layers.1.up": "excluded by name", "lm_head": "excluded by name"}
    assert isinstance(model.layers[0]["up"], QLinear)
    assert type(model.layers[1]["up"]) is nn.Linear
    total = 2 * (128 * 128 + 128 + 128 * 256 + 256) + 2 * 10 * 128
    assert report.total == total
    assert report.percent == pytest.approx(100 * (2 * 128 * 128 + 128 * 256) / total)
    assert "quantized 3 linear layers" in caplog.text
    assert "left lm_head: excluded by name" in caplog.text


def test_swap_changes_nothing_when_it_refuses():
    model = Tiny()
    model.layers[1]["up"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.up: the weight has NaN or Inf"):
        swap(model)
    assert type(model.layers[0]["q_proj"]) is nn.Linear
    with pytest.raises(ValueError, match=r"no linear layer matches include=\['nothing'\]"):
        swap(Tiny(), include=["nothing"])
    odd = nn.Sequential(nn.Linear(128, 8), nn.Linear(100, 8))
    with pytest.raises(ValueError, match=r"1: K=100 must be a multiple of group_size=128"):
        swap(odd)
    assert type(odd[0]) is nn.Linear


def test_fused_experts_are_never_skipped_silently():
    model = Tiny()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.randn(4, 256, 128))
    assert fused_experts(model) == {"experts.gate_up_proj": (4, 256, 128)}
    with pytest.raises(ValueError, match=r"fused expert weight.*experts\.gate_up_proj \(4, 256, 128\)"):
        swap(model)
    report = swap(model, skip_experts=True)
    assert report.kept["experts.gate_up_proj"].startswith("fused experts")
    assert report.percent < 50


@pytest.mark.parametrize(
    ("name", "patterns", "want"),
    [
        ("model.layers.0.self_attn.v_proj", ["v_proj"], True),
        ("model.layers.0.self_attn.v_proj", ["layers.0.*"], True),
        ("model.layers.10.self_attn.v_proj", ["layers.1.*"], False),
        ("model.layers.0.self_attn.qv_proj", ["v_proj"], False),
        ("lm_head", ["*"], True),
    ],
)
def test_patterns(name, patterns, want):
    assert matches(name, patterns) is want


def test_compiles_without_a_graph_break():
    model = nn.Sequential(
        QLinear.from_linear(linear(128, 256)), nn.SiLU(), QLinear.from_linear(linear(64, 128), QuantSpec(4, 32))
    )
    x = torch.randn(3, 256).bfloat16().requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_on_a_gpu(m, dtype):
    model = nn.Sequential(
        QLinear.from_linear(linear(512, 256, dtype=dtype)), QLinear.from_linear(linear(64, 512, dtype=dtype))
    )
    model = model.cuda()
    x = torch.randn(m, 256, device="cuda", dtype=dtype, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    compiled(x).square().sum().backward()
    got, x.grad = x.grad, None
    model(x).square().sum().backward()
    assert torch.equal(got, x.grad)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    layer = QLinear.from_linear(linear(4096, 4096), QuantSpec()).cuda()
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layer(x))
