"""What every training quantizer offers, and the table that finds one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec

QUANTIZERS: dict[str, Callable[..., Quantizer]] = {}  # name -> class, called as (w, spec, rule, **settings)


class Quantizer(nn.Module):
    """A differentiable map from a weight to its quantized value.

    Subclasses implement :meth:`range`; ``forward(w)`` returns w_hat in w's dtype and :meth:`range` the scale and zero that
    ``forward`` uses, so that the deployed codes are those the training saw.
    """

    spec: QuantSpec

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec

    def range(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero ``[N, ceil(K/G)]`` for w ``[N, K]``; zero is None when symmetric."""
        raise NotImplementedError

    def forward(self, w: Tensor) -> Tensor:
        """w_hat, shape and dtype of w."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return str(self.spec)


def register(name: str) -> Callable[[type[Quantizer]], type[Quantizer]]:
    """Class decorator that enters a quantizer into the table."""

    def enter(cls: type[Quantizer]) -> type[Quantizer]:
        QUANTIZERS[name] = cls
        return cls

    return enter


def make_quantizer(name: str, w: Tensor, spec: QuantSpec, rule: str = "minmax", **settings: Any) -> Quantizer:
    """A quantizer of the table, initialised on w.

    Args:
        name: key of :data:`QUANTIZERS`.
        w: ``[N, K]``.
        spec: bits, group size, symmetry.
        rule: how the first range is found (``minmax`` or ``mse``).
        settings: what the quantizer takes beyond these.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {name!r}; known: {', '.join(QUANTIZERS)}")
    with torch.no_grad():
        return QUANTIZERS[name](w, spec, rule, **settings)
