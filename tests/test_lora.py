"""Low-rank adapters over a frozen 4-bit model: gradients pass through QLinear, and training goes as over plain weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_llama
from torch import nn

from pyquant import QuantSpec, swap
from pyquant.nn import QLinear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class LoRA(nn.Module):
    """``base(x) + x A^T B^T`` with a frozen base."""

    def __init__(self, base: nn.Module, rank: int, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter((torch.randn(rank, base.in_features, generator=generator) / rank**0.5).to(dtype))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def adapt(model: nn.Module, rank: int = 4) -> list[nn.Parameter]:
    """Put adapters around every projection, the same ones for the same seed; returns what trains."""
    generator = torch.Generator().manual_seed(0)
    model.requires_grad_(False)
    dtype = next(model.parameters()).dtype
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], LoRA(layer, rank, generator, dtype))
    return [p for p in model.parameters() if p.requires_grad]


def losses(model: nn.Module, ids: torch.Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(adapt(model), lr=2e-2, weight_decay=0.0)
    model.to(ids.device)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_train_as_over_the_dequantized_model(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = tiny_llama().to(dtype)
    quantized = copy.deepcopy(model)
    swap(quantized, QuantSpec(bits=4, group_size=32), exclude=["lm_head"])
    plain = copy.deepcopy(model)
    for name, layer in quantized.named_modules():
        if isinstance(layer, QLinear):
            plain.get_submodule(name).weight.data = layer.dequantize()
    ids = torch.randint(0, model.config.vocab_size, (4, 24), device=device)
    ours = losses(quantized.to(device), ids, 20)
    theirs = losses(plain.to(device), ids, 20)
    assert ours[-1] < 0.8 * ours[0]
    # fp32: sums in another order. bf16: two roundings of 2^-8 that differ, carried through 20 steps of AdamW.
    tolerance = 1e-3 if device == "cpu" else 3e-2
    assert ours == pytest.approx(theirs, rel=tolerance)
    assert losses(copy.deepcopy(model).to(device), ids, 1)[0] != pytest.approx(ours[0], rel=1e-4), (
        "nothing was quantized"
    )
