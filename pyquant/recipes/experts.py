"""Mixture-of-experts blocks whose experts are fused 3-D parameters, taken apart into linear layers.

``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``, as transformers stores Mixtral's and Qwen's experts, become E
modules of ``gate_proj``, ``up_proj`` and ``down_proj``; whether the result computes the same is tried, not assumed. While
``all_tokens`` is set every expert is run on every token, so that an expert that the calibration text hardly ever chooses
still has statistics to be quantized by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """``down(act(gate x) * up x)``."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """Experts by number, called as ``(x [T, H], index [T, k], weights [T, k])`` as the fused module was."""

    all_tokens = False

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            chosen = (index == number) * weights
            if self.all_tokens:
                out = out + expert(x) * chosen.sum(-1, keepdim=True).to(x.dtype)
                continue
            token, _ = torch.where(index == number)
            if len(token):
                part = expert(x[token]) * chosen[token].sum(-1, keepdim=True)
                out = out.index_add(0, token, part.to(out.dtype))
        return out


def unfuse(block: nn.Module) -> list[str]:
    """Take the fused experts of a block apart, in place.

    Returns:
        names of the modules that were replaced.

    Raises:
        ValueError: fused 3-D weights of another form than the one above, with what was looked for.
    """
    found = []
    for name, module in list(block.named_modules()):
        shapes = {own: tuple(p.shape) for own, p in module.named_parameters(recurse=False) if p.dim() == 3}
        if not shapes or isinstance(module, nn.modules.conv._ConvNd):
            continue
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, _apart(name, module, shapes))
        found.append(name)
    return found


def _apart(name: str, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> Experts:
    own = dict(module.named_parameters(recurse=False))
    wanted = "gate_up_proj [E, 2I, H] and down_proj [E, H, I] without biases, and act_fn"
    act = getattr(module, "act_fn", None)
    if set(own) != {"gate_up_proj", "down_proj"} or act is None:
        raise ValueError(f"{name}: {type(module).__name__} with {shapes} is not known; looked for {wanted}")
    both, down = own["gate_up_proj"].detach(), own["down_proj"].detach()
    count, wide, hidden = both.shape
    if wide % 2 or down.shape != (count, hidden, wide // 2):
        raise ValueError(f"{name}: fused experts of shapes {shapes} do not fit together; looked for {wanted}")
    experts = Experts([Expert(*_halves(both[e]), down[e], act) for e in range(count)]).eval()
    make = torch.Generator().manual_seed(0)
    x = torch.randn(8, hidden, generator=make).to(both)
    index = torch.stack([torch.randperm(count, generator=make)[: min(2, count)] for _ in range(8)]).to(both.device)
    weights = torch.rand(index.shape, generator=make).to(both)
    with torch.no_grad():
        want, got = module(x, index, weights), experts(x, index, weights)
    if (want - got).float().norm() > 0.02 * want.float().norm():
        raise ValueError(f"{name}: {type(module).__name__} computes something else than down(act(gate x) * up x)")
    return experts


@contextmanager
def all_experts(block: nn.Module) -> Iterator[None]:
    """While active, every expert of a block is run on every token."""
    found = [m for m in block.modules() if isinstance(m, Experts)]
    for m in found:
        m.all_tokens = True
    try:
        yield
    finally:
        for m in found:
            m.all_tokens = False


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2)
    return gate, up


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer
