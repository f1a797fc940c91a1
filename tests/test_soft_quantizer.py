"""The quantizer "soft" (hardens exactly, follows its temperature) and fake quantization reused over micro-steps."""

from __future__ import annotations

import copy

import pytest
import torch
from surrogates import MODES
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyquant.formats.spec import QuantSpec
from pyquant.nn import FakeQuantLinear, QLinear, reuse_fake_quant
from pyquant.ops import _registry
from pyquant.quantizers import Soft, make_quantizer

SPECS = [QuantSpec(4, 32), QuantSpec(3, -1), QuantSpec(4, 32, symmetric=False), QuantSpec(2, 64, symmetric=False)]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_hardens_exactly(spec, mode):
    """After training steps, eval() computes what the exported codes do, whatever the forward was while training."""
    linear = nn.Linear(128, 24)
    how = {"rounding": mode.rounding, "clamp": mode.clamp, "soft_forward": mode.soft_forward}
    layer = FakeQuantLinear.from_linear(linear, spec, "soft", **how)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    x = torch.randn(8, 128)
    before = layer.quantizer.scale.detach().clone()
    for _ in range(3):
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(before, layer.quantizer.scale), "the scale is learned"
    layer.eval()
    deployed = QLinear.from_fake_quant(layer)
    assert torch.equal(deployed.dequantize(), layer.quantized_weight())
    layer.train()
    if not mode.soft_forward:
        assert torch.equal(deployed.dequantize(), layer.quantized_weight())
    elif mode.rounding != "ste":
        assert not torch.equal(deployed.dequantize(), layer.quantized_weight()), "training sees the surrogate"


def test_is_lsq_without_approximations():
    w = torch.randn(16, 128)
    grads = []
    for made in (
        make_quantizer("lsq", w, QuantSpec(4, 32), "mse"),
        make_quantizer("soft", w, QuantSpec(4, 32), "mse", rounding="ste", clamp="hard"),
    ):
        leaf = w.clone().requires_grad_()
        grads.append(torch.autograd.grad(made(leaf).sin().sum(), (leaf, made.scale)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_follows_its_temperature():
    w = torch.randn(16, 128).requires_grad_()
    made = make_quantizer("soft", w, QuantSpec(4, 32), clamp="hard")
    slopes = []
    for t in (0.01, 4.0, 40.0):
        made.temperature.fill_(t)
        slopes.append(torch.autograd.grad(made(w).sum(), w)[0])
    inside = slopes[0] != 0
    assert inside.float().mean() > 0.9
    assert (slopes[0][inside] - 1).abs().max() < 1e-3, "nearly straight-through"
    assert slopes[1].std() < slopes[2].std()
    assert "temperature" not in made.state_dict()


def test_survives_a_cast():
    made = make_quantizer("soft", torch.randn(16, 128), QuantSpec(4, 32)).bfloat16()
    assert made(torch.randn(16, 128).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rounding": "soft"}, "rounding='soft' must be one of ste"),
        ({"clamp": "none"}, "clamp='none' must be one of hard"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ],
)
def test_refuses(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Soft(torch.randn(4, 32), QuantSpec(4, 32), **settings)


# ------------------------------------------------------------------------------------------------ reuse


class Net(nn.Module):
    def __init__(self, quantizer: str, device: str, how: str | None) -> None:
        super().__init__()
        spec = QuantSpec(4, 32)
        sizes = [(64, 96), (96, 64)]
        self.layers = nn.ModuleList(FakeQuantLinear.from_linear(nn.Linear(*s), spec, quantizer) for s in sizes)
        self.how = how
        self.to(device)

    def body(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def forward(self, x):
        if self.how is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.how == "reentrant")


def count_calls(monkeypatch):
    calls = {"fake_quant": 0, "fake_quant_backward": 0}
    for name in calls:
        for backend, old in list(_registry.OPS[name].backends.items()):

            def run(*args, name=name, old=old):
                calls[name] += 1
                return old.run(*args)

            monkeypatch.setitem(_registry.OPS[name].backends, backend, _registry.Backend(run, old.declines))
    return calls


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("how", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("quantizer", ["lsq", "soft"])
def test_reuse_gives_the_same_gradients_with_one_kernel_each_way(quantizer, how, device, monkeypatch):
    net = Net(quantizer, device, how)
    twin = copy.deepcopy(net)
    batches = [torch.randn(5, 64, device=device).requires_grad_() for _ in range(3)]
    for x in batches:
        twin(x).square().sum().backward()
    inputs = [x.grad for x in batches]
    for x in batches:
        x.grad = None
    calls = count_calls(monkeypatch)
    with reuse_fake_quant(net):
        for x in batches:
            net(x).square().sum().backward()
        assert all(p.grad is None for layer in net.layers for p in (layer.weight, layer.quantizer.scale))
    assert calls == {"fake_quant": 2, "fake_quant_backward": 2}, "once for each of the two layers"
    assert all(torch.equal(x.grad, want) for x, want in zip(batches, inputs, strict=True))
    for (name, p), want in zip(net.named_parameters(), twin.parameters(), strict=True):
        # the same fp32 terms, added before the product with the slope instead of after it
        torch.testing.assert_close(p.grad, want.grad, rtol=1e-4, atol=1e-5 * want.grad.abs().max().item(), msg=name)


def test_reuse_ends_with_its_context_and_sees_changes():
    net = Net("lsq", "cpu", None)
    x = torch.randn(5, 64)
    with reuse_fake_quant(net):
        first = net(x).detach()
        with torch.no_grad():
            net.layers[0].weight.mul_(0.5)  # nothing waits for a gradient yet
        assert not torch.equal(net(x), first), "quantized again"
        net(x).sum().backward()
    assert all(layer.reused is None for layer in net.layers)
    scale = net.layers[0].quantizer.scale
    with torch.no_grad():
        scale.mul_(2)
    assert not torch.equal(net(x), first)


def test_reuse_refuses_an_optimizer_step_inside():
    net = Net("lsq", "cpu", None)
    with pytest.raises(RuntimeError, match="leave the context before the optimizer's step"), reuse_fake_quant(net):
        net(torch.randn(5, 64)).sum().backward()
        with torch.no_grad():
            net.layers[1].quantizer.scale.mul_(1.1)
    assert all(p.grad is None for layer in net.layers[1:] for p in (layer.weight, layer.quantizer.scale))
    with pytest.raises(RuntimeError, match="already active"), reuse_fake_quant(net), reuse_fake_quant(net):
        pass
    assert all(layer.reused is None for layer in net.layers)


def test_reuse_leaves_frozen_layers_alone():
    net = Net("lsq", "cpu", None)
    net.layers[0].freeze()
    with reuse_fake_quant(net):
        net(torch.randn(5, 64)).sum().backward()
    assert net.layers[0].weight.grad is None
    assert net.layers[1].weight.grad is not None
