"""Signal propagation: what each projection of a decoder computes forward and receives backward, against full precision.

After the analysis of "Oh! We Freeze" (Bhardwaj et al., 2024, arXiv 2403.18159): squared Frobenius norms of the
gradients of the attention's projections, and forward statistics, of a quantized model beside the full-precision one.

Our reading, as the paper's details were not at hand:

* the gradient of a projection is taken with respect to the weight it multiplies with, dL/dw_hat = dY^T X. Under the
  straight-through estimator that is what the weight receives, clipped elements aside, and it exists for frozen and for
  packed layers too, so all arms are measured alike;
* beside norm and ratio, which do not see a turned gradient, the cosine, and the squared deviation ||g - g_fp||^2,
  which joins both;
* the signal-to-noise ratio of an output includes the errors of all layers before it.

Layers are watched by hooks, nothing of the model changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.nn.linear import QLinear

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (student logits, teacher logits, tokens) -> scalar


def projections(model: nn.Module) -> dict[str, tuple[int, str]]:
    """The linear layers inside numbered blocks: dotted name -> (block, kind), the kind being the last part of the name.

    Raises:
        ValueError: when there is none.
    """
    found = {}
    for name, module in model.named_modules():
        block = re.search(r"(?:^|\.)(\d+)\.", name)
        if block and isinstance(module, nn.Linear | QLinear):
            found[name] = (int(block[1]), name.rpartition(".")[2])
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layers in numbered blocks: nothing to measure")
    return found


@contextmanager
def watch(
    model: nn.Module,
    names: Sequence[str],
    output: Callable[[str, Tensor], None] | None = None,
    gradient: Callable[[str, Tensor], None] | None = None,
) -> Iterator[None]:
    """While active, what the named layers compute and the gradients of their weights are handed over.

    Args:
        model: any module.
        names: dotted names of linear layers (``nn.Linear``, ``FakeQuantLinear`` or ``QLinear``).
        output: ``output(name, y)`` at each call, y ``[..., N]`` detached.
        gradient: ``gradient(name, g)`` during backward, g fp32 ``[N, K]``, the gradient of this call's loss with
            respect to the weight that the layer multiplies with. Nothing comes for a layer whose output requires no
            gradient.
    """

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            if output is not None:
                output(name, y.detach())
            if gradient is not None and y.requires_grad:
                x = args[0].detach()

                def backward(g: Tensor) -> None:
                    flat = g.detach().reshape(-1, g.shape[-1]).float()
                    gradient(name, flat.T @ x.reshape(-1, x.shape[-1]).float())

                y.register_hook(backward)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(after(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _only_activations(model: nn.Module) -> Iterator[None]:
    """While active, gradients flow through activations from the embeddings on, and no parameter collects one."""
    trained = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    hooks = [
        m.register_forward_hook(lambda _, args, y: y.requires_grad_() if y.is_leaf else y)
        for m in model.modules()
        if isinstance(m, nn.Embedding)
    ]
    if not hooks:
        raise ValueError(f"{type(model).__name__} has no nn.Embedding, where gradients could start from")
    for p in trained:
        p.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for p in trained:
            p.requires_grad_(True)
        for hook in hooks:
            hook.remove()


class _Sums:
    """Running sums of one output, fp64 on its device: of y, y^2, r^2 and (y - r)^2, r the reference."""

    def __init__(self) -> None:
        self.count, self.sums = 0, torch.zeros(4, dtype=torch.float64)

    def add(self, y: Tensor, reference: Tensor) -> None:
        y, reference = y.double(), reference.double()
        sums = torch.stack([y.sum(), y.square().sum(), reference.square().sum(), (y - reference).square().sum()])
        self.sums = self.sums.to(y.device) + sums
        self.count += y.numel()

    def row(self) -> dict[str, float | None]:
        total, square, reference, noise = self.sums.tolist()
        mean = total / self.count
        snr = 10 * math.log10(reference / noise) if noise and reference else None
        return {"mean": mean, "variance": max(square / self.count - mean * mean, 0.0), "snr_db": snr}


def gradients(
    model: nn.Module, teacher: nn.Module, batches: Sequence[Tensor], loss: Loss
) -> tuple[dict[str, Tensor], dict[str, dict[str, float | None]]]:
    """Gradients and outputs of every projection over some batches.

    Args:
        model: the causal LM to measure: ``model(input_ids=...)`` has ``.logits``.
        teacher: the full-precision model; may be the same object.
        batches: int64 ``[B, T]`` each.
        loss: of a batch, see :data:`Loss`; the gradient is of its mean over batches.

    Returns:
        name -> gradient fp32 ``[N, K]``; name -> ``{"mean", "variance", "snr_db"}`` of its outputs over all batches
        (mean and variance over all elements; ``snr_db`` = 10 log10(sum r^2 / sum (y - r)^2) in dB against the
        teacher's outputs r, None where the two are equal).

    Raises:
        ValueError: no batches, layers that the teacher lacks, or a loss that is not finite.
    """
    if not batches:
        raise ValueError("no batches to measure on")
    names = list(projections(model))
    if lacking := [name for name in names if name not in projections(teacher)]:
        raise ValueError(f"the full-precision model has no layer {lacking[0]}: not the same architecture")
    total: dict[str, Tensor] = {}
    sums = {name: _Sums() for name in names}
    device = next(model.parameters()).device

    seen: dict[str, Tensor] = {}

    def collect(name: str, g: Tensor) -> None:
        total[name] = g if name not in total else total[name].add_(g)

    def note(name: str, y: Tensor) -> None:
        sums[name].add(y, seen.pop(name))

    for tokens in batches:
        tokens = tokens.to(device)
        with torch.no_grad(), watch(teacher, names, output=seen.__setitem__):
            expected = teacher(input_ids=tokens, use_cache=False).logits
        with _only_activations(model), watch(model, names, note, collect):
            error = loss(model(input_ids=tokens, use_cache=False).logits, expected, tokens) / len(batches)
            if not torch.isfinite(error):
                raise ValueError(f"the loss of the measured model is {error.item()}: its gradients mean nothing")
            error.backward()
    return total, {name: s.row() for name, s in sums.items()}


def compare(
    found: Mapping[str, Tensor], reference: Mapping[str, Tensor], places: Mapping[str, tuple[int, str]]
) -> list[dict[str, Any]]:
    """Gradients against those of full precision, layer by layer.

    Args:
        found, reference: name -> gradient ``[N, K]``.
        places: name -> (block, kind), see :func:`projections`.

    Returns:
        rows ``{"name", "block", "kind", "weights", "norm_sq", "ratio", "cosine", "deviation"}``: N * K; ||g||_F^2; that
        over the reference's; <g, r> / (||g|| ||r||); ||g - r||^2 / ||r||^2 = ratio - 2 cosine sqrt(ratio) + 1. The last
        three are None where the reference is 0.
    """
    rows = []
    for name, (block, kind) in places.items():
        g, r = found[name].double(), reference[name].double()
        norm, base, dot = g.square().sum().item(), r.square().sum().item(), (g * r).sum().item()
        row: dict[str, Any] = {"name": name, "block": block, "kind": kind, "weights": g.numel(), "norm_sq": norm}
        row["ratio"] = norm / base if base else None
        row["cosine"] = dot / math.sqrt(norm * base) if norm and base else None
        row["deviation"] = (g - r).square().sum().item() / base if base else None
        rows.append(row)
    return rows
