"""Gradient accumulation with one fake quantization: w_hat is computed once, its backward runs once on the summed gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyquant.nn.linear import FakeQuantLinear


class _Reused:
    """The quantized weight of one layer, as a leaf that collects gradients."""

    def __init__(self, name: str, layer: FakeQuantLinear) -> None:
        self.name, self.layer = name, layer
        self.seen: list[tuple[Tensor, int]] = []  # the tensors that w_hat was made from, and their versions
        self.training = layer.training
        self.value: Tensor | None = None
        self.leaf: Tensor | None = None

    def _sources(self) -> list[tuple[Tensor, int]]:
        quantizer = self.layer.quantizer
        return [(t, t._version) for t in (self.layer.weight, *quantizer.parameters(), *quantizer.buffers())]

    def _stale(self) -> bool:
        now = self._sources()
        same = len(now) == len(self.seen) and all(
            a is b and i == j for (a, i), (b, j) in zip(now, self.seen, strict=True)
        )
        return not same or self.training != self.layer.training

    def weight(self) -> Tensor:
        """w_hat ``[N, K]``: the one of the last call while nothing it was made from has changed."""
        if self.leaf is None or self._stale():
            self._refuse_pending()
            # Hooks of our own keep those of gradient checkpointing away: they would count on seeing this again when the
            # block is recomputed. Its first pass may also have gradients off.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                self.value = self.layer.quantizer(self.layer.weight)
            self.seen, self.training = self._sources(), self.layer.training
            self.leaf = self.value.detach().requires_grad_(self.value.requires_grad)
        return self.leaf

    def _refuse_pending(self) -> None:
        if self.leaf is not None and self.leaf.grad is not None:
            raise RuntimeError(
                f"{self.name}: the weight or its quantizer changed inside reuse_fake_quant while gradients were waiting for "
                "them; leave the context before the optimizer's step"
            )

    def finish(self) -> None:
        """Hand the summed gradient on to the weight and the quantizer."""
        if self.leaf is None or self.leaf.grad is None:
            return
        if self._stale():
            self._refuse_pending()
        torch.autograd.backward(self.value, self.leaf.grad)


@contextmanager
def reuse_fake_quant(model: nn.Module) -> Iterator[None]:
    """Inside, each :class:`FakeQuantLinear` of a model quantizes its weight once for all forward passes, and gradients with
    respect to the quantized weight add up; on leaving, its backward runs once per layer and fills ``.grad``::

        with reuse_fake_quant(model):
            for batch in micro_batches:
                loss(model, batch).backward()
        optimizer.step()

    The gradients are those of the same passes without it, up to the order of additions: the backward is linear in the
    incoming gradient. Of n passes it saves n - 1 forward and backward kernels per layer, and costs the quantized weights
    and their gradients (in the weight's dtype) while it lasts. Weights that are read again after a change (versions are
    compared) are quantized again. Gradient checkpointing works, reentrant or not. Gradients of weights and quantizers
    exist only after leaving, so do clipping and hooks on them there. An exception inside leaves them unset.

    Raises:
        RuntimeError: when a weight or quantizer changes inside while gradients are waiting, or contexts are nested.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, FakeQuantLinear)]
    if any(layer.reused is not None for _, layer in layers):
        raise RuntimeError("reuse_fake_quant is already active on this model")
    made = [_Reused(name, layer) for name, layer in layers]
    for one in made:
        one.layer.reused = one
    try:
        yield
        for one in made:
            one.finish()
    finally:
        for one in made:
            one.layer.reused = None
