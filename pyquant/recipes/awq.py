"""AWQ-style scaling: input channels that carry much are scaled up before rounding, and what produces them down.

Lin et al., "AWQ" (arXiv 2306.00978): with x the input of linear layers and s a positive vector, ``W diag(s)`` is quantized
and 1/s is folded into whatever produces x. ``s = mean|x|^r`` normalised to ``sqrt(max s * min s) = 1``; r is searched on a
grid for the smallest output error of all layers that read x.

Choices of ours: the error is the quadratic form ``tr(D H D^T)`` with ``D = W - Q(W diag(s)) / s`` over the second moments
H of all calibration tokens, instead of running the layers again; ranges are clipped for the least squared error; and where
a scale may be folded is found by trying, not by name: a module of the block qualifies when scaling its output channels
scales the inputs of certain linear layers, and dividing those layers' columns brings the block's output back. So a norm
before q, k and v, a norm before gate and up, and up before down are found in any architecture, and what is not exact (v
before o with grouped heads) is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyquant import reference
from pyquant.formats.spec import QuantSpec
from pyquant.quantizers.ranges import mse_range
from pyquant.recipes.blocks import watch_inputs
from pyquant.recipes.gptq import Hessian

RATIOS = 20  # r = 0, 1/20, .. 19/20
EXACT = 1e-3  # relative error of the block's output up to which a fold counts as exact (fp32 rounding, or bf16's)


def fold_scales(
    block: nn.Module,
    layers: dict[str, nn.Linear],
    spec: QuantSpec,
    hessians: dict[str, Hessian],
    magnitudes: dict[str, Tensor],
    probe: Callable[[], Tensor],
    stored: torch.dtype = torch.bfloat16,
) -> dict[str, list[str]]:
    """Scale the layers of a block and fold the scales away, in place; the block computes what it did before.

    Args:
        block: in fp32 (fp16 and bf16 round each fold once).
        layers: name -> linear layer to be quantized.
        spec: the format.
        hessians, magnitudes: of the inputs of each layer; magnitudes may be sums, only their ratios matter.
        probe: runs the block on a few windows.
        stored: dtype that norms are stored in; they are rounded to it, and the layers are scaled by what came out.

    Returns:
        producer -> the layers whose inputs it scales.
    """
    folds = find_folds(block, layers, probe)
    producers = dict(block.named_modules())
    for producer, consumers in folds.items():
        seen = [name for name in consumers if name in hessians]
        if not seen:
            continue
        h, size = hessians[seen[0]].value(), magnitudes[seen[0]].clone()
        scale = search([layers[name].weight for name in consumers], h, size, spec)
        applied = _scale_output(producers[producer], 1 / scale, stored)
        for name in consumers:
            layers[name].weight.data.div_(applied)
            hessian = hessians.get(name)
            if hessian is not None:  # its inputs are scaled from now on
                hessian.sum.mul_(applied).mul_(applied[:, None])
                magnitudes[name].mul_(applied)
    return folds


@torch.no_grad()
def search(weights: list[Tensor], h: Tensor, size: Tensor, spec: QuantSpec) -> Tensor:
    """The scale ``[K]`` with the smallest output error of weights ``[N, K]`` that read the same inputs."""
    size = size.float().clamp_min(1e-8)
    best, chosen = None, torch.ones_like(size)
    for step in range(RATIOS):
        scale = (size / size.mean()).pow(step / RATIOS).clamp_min(1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = torch.zeros((), device=h.device)
        for w in weights:
            w = w.float()
            s, z = mse_range(w * scale, spec, step=0.07)  # a coarse grid: only ratios are compared
            d = reference.fake_quant(w * scale, s, z, spec.group_size, spec.bits) / scale - w
            error += ((d @ h) * d).sum()
        if best is None:
            best = error
            continue
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen


@torch.no_grad()
def find_folds(block: nn.Module, layers: dict[str, nn.Linear], probe: Callable[[], Tensor]) -> dict[str, list[str]]:
    """Modules whose output channels can be scaled exactly, with the layers that take the scale back.

    Returns:
        producer's name -> names of the layers (all of them in ``layers``).
    """
    inputs = _inputs(layers, probe)
    before = probe()
    found: dict[str, list[str]] = {}
    for name, module in block.named_modules():
        width = _output_width(module)
        wide = [n for n, layer in layers.items() if layer.in_features == width and n in inputs and n != name]
        if not wide:
            continue
        assert width is not None
        make = torch.Generator().manual_seed(0)
        t = torch.exp(0.5 * torch.randn(width, generator=make)).to(before.device)
        saved = {n: p.detach().clone() for n, p in module.named_parameters(recurse=False)}
        applied = _scale_output(module, t)
        moved = _inputs({n: layers[n] for n in wide}, probe)
        scaled = [n for n in wide if _close(moved[n], inputs[n] * applied)]
        kept = {n: layers[n].weight.detach().clone() for n in scaled}
        for n in scaled:
            layers[n].weight.data.div_(applied)
        if scaled and _close(probe(), before):
            found[name] = scaled
        for n, w in kept.items():
            layers[n].weight.data.copy_(w)
        for n, p in module.named_parameters(recurse=False):
            p.data.copy_(saved[n])
    return found


def _inputs(layers: dict[str, nn.Linear], probe: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The first input ``[..., K]`` of each layer during a probe."""
    seen: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        if name not in seen:
            seen[name] = x.detach().clone()

    with watch_inputs(layers, see):
        probe()
    return seen


def _output_width(module: nn.Module) -> int | None:
    """Channels of a linear layer's or a norm's output, None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features
    own = list(module.parameters(recurse=False))
    norm = own and all(p.dim() == 1 for p in own) and "norm" in type(module).__name__.lower()
    return own[0].numel() if norm else None


def _scale_output(module: nn.Module, t: Tensor, stored: torch.dtype = torch.float32) -> Tensor:
    """Multiply the output channels of a linear layer or a norm by t; returns the factors after a norm was rounded."""
    if isinstance(module, nn.Linear):
        module.weight.data.mul_(t[:, None])
        if module.bias is not None:
            module.bias.data.mul_(t)
        return t
    weight = module.weight
    shift = 1.0 if _is_offset_norm(module) else 0.0
    old = weight.detach().float() + shift
    weight.data.copy_((old * t - shift).to(stored))
    if getattr(module, "bias", None) is not None:
        module.bias.data.mul_(t)
    new = weight.detach().float() + shift
    return torch.where(old == 0, t, new / torch.where(old == 0, 1, old))


def _is_offset_norm(module: nn.Module) -> bool:
    """Whether a norm multiplies by 1 + weight (Gemma): seen by what it does to ones and minus ones."""
    weight = module.weight
    saved = weight.detach().clone()
    try:
        weight.data.zero_()
        k = weight.numel()
        x = torch.ones(1, k, device=weight.device, dtype=weight.dtype)
        x[:, ::2] = -1
        return bool((module(x) - module(-x)).abs().max() > 1)  # the difference is free of a bias
    finally:
        weight.data.copy_(saved)


def _close(a: Tensor, b: Tensor) -> bool:
    exact = EXACT if a.dtype == torch.float32 else 0.02
    return bool((a - b).float().norm() <= exact * b.float().norm().clamp_min(1e-12))
