"""FusedLinear: several layers of one input as one product, and each layer still itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import make_weight
from pyquant import QLinear, QuantSpec, reference
from pyquant.nn.fused import FusedLinear


def make_layers(rows, k=96, group=32, symmetric=False, biases=(True, False, True)):
    layers = []
    for n, bias in zip(rows, biases, strict=False):
        weight = make_weight(n, k, group, symmetric, torch.float32, "cpu")
        layer = QLinear(k, n, bias, QuantSpec(4, group, symmetric))
        layer._set_tiled(reference.quantize_int4(weight.w_hat.float(), weight.scale,
                                                 None if weight.zero is None else weight.zero, group, 4),
                         weight.scale, weight.zero)  # fmt: skip
        if bias:
            layer.bias = nn.Parameter(torch.randn(n), requires_grad=False)
        layers.append(layer.requires_grad_(False))
    return layers


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 32, 64])
@pytest.mark.parametrize("rows", [(64, 128, 64), (128, 64, 70), (64, 30, 65), (1, 64)])
def test_fused_projections(rows, group, symmetric):
    layers = make_layers(rows, k=192, group=group, symmetric=symmetric)
    x = torch.randn(3, 192)
    separate, state = [layer(x) for layer in layers], [layer.state_dict() for layer in layers]
    fused = FusedLinear(layers)
    assert fused.why is None
    assert fused.copied == any(n % 64 for n in rows[:-1])
    # fp32 sums of 192 terms, blocked differently
    torch.testing.assert_close(fused(x), torch.cat(separate, -1), rtol=1e-5, atol=1e-4)
    for layer, y, before in zip(layers, separate, state, strict=True):
        assert torch.equal(layer(x), y)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    if not fused.copied:
        ends = [layer.qweight.data_ptr() + layer.qweight.numel() * 4 for layer in layers]
        assert [layer.qweight.data_ptr() for layer in layers[1:]] == ends[:-1], "the layers are views of one weight"


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([nn.Linear(96, 8), nn.Linear(96, 8)], "Linear is no QLinear"),
        ([*make_layers((64,)), *make_layers((64,), group=-1)], "their group_size differ"),
        ([*make_layers((64,)), *make_layers((64,), symmetric=True)], "their symmetric differ"),
        (make_layers((64,)), "a single layer"),
        ([QLinear(96, 64, spec=QuantSpec(4, 32)), *make_layers((64,))], "holds no weight yet"),
    ],
    ids=lambda a: a if isinstance(a, str) else "",
)
def test_what_cannot_be_fused_is_called_one_by_one(layers, why):
    fused = FusedLinear(layers)
    assert why in fused.why
    if "no weight" not in why:
        x = torch.randn(2, 96)
        assert torch.equal(fused(x), torch.cat([layer(x) for layer in layers], -1))
