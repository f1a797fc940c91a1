"""Where block-wise training begins: ranges and roundings of each layer of a block from its weights and inputs.

==========  ================================================================================================
``minmax``  the range covers the weight, round to nearest
``mse``     the range with the smallest squared error of the weight, round to nearest
``gptq``    such a range, then column by column (:mod:`pyquant.recipes.gptq`)
``awq``     channels scaled by what flows through them, folded into what produces it (:mod:`pyquant.recipes.awq`),
            then as ``mse``
==========  ================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.quantizers.ranges import find_range
from pyquant.recipes.awq import fold_scales
from pyquant.recipes.blocks import watch_inputs
from pyquant.recipes.gptq import Hessian, gptq_weight
from pyquant.recipes.parametrize import Start

STARTS = ("minmax", "mse", "gptq", "awq")


@dataclass
class Statistics:
    """What a block's layers saw: per layer ``2 mean(x x^T)`` fp32 ``[K, K]`` and ``mean |x|`` ``[K]``."""

    hessians: dict[str, Hessian] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)

    def reduce(self, add: Callable[[Tensor], None]) -> None:
        """Sum over processes; ``add`` sums a tensor in place."""
        for name, hessian in self.hessians.items():
            add(hessian.sum)
            tokens = torch.tensor(float(hessian.tokens), device=hessian.sum.device)
            add(tokens)
            hessian.tokens = int(tokens)
            add(self.magnitudes[name])


def collect(layers: dict[str, nn.Linear], passes: Callable[[], None]) -> Statistics:
    """Statistics of the inputs of layers while ``passes`` runs the block over all windows."""
    found = Statistics()

    def see(name: str, x: Tensor) -> None:
        if name not in found.hessians:
            found.hessians[name] = Hessian(x.shape[-1], x.device)
            found.magnitudes[name] = torch.zeros(x.shape[-1], device=x.device)
        found.hessians[name].see(x)
        found.magnitudes[name] += x.detach().reshape(-1, x.shape[-1]).float().abs().sum(0)

    with torch.no_grad(), watch_inputs(layers, see):
        passes()
    return found


@torch.no_grad()
def start_block(
    how: str,
    block: nn.Module,
    layers: dict[str, nn.Linear],
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    statistics: Callable[[Iterable[str]], Statistics],
    probe: Callable[[], Tensor],
    act_order: bool = True,
    damp: float = 0.01,
) -> dict[str, Start]:
    """Start of each layer of a block.

    Args:
        how: key of the table above.
        block: holds the layers; ``awq`` changes its norms and the rows of layers that produce other layers' inputs.
        layers: name inside the block -> layer.
        spec, scale_dtype: the format.
        statistics: gathers them for the named layers (only called where they are needed).
        probe: the block's output for a few windows, for ``awq`` to see what may be folded.
        act_order, damp: of ``gptq``.

    Raises:
        ValueError: an unknown ``how``; NaN inputs or weights, with the layer.
    """
    if how not in STARTS:
        raise ValueError(f"start={how!r} must be one of {', '.join(STARTS)}")
    seen = statistics(layers) if how in ("gptq", "awq") else Statistics()
    if how == "awq":
        fold_scales(block, layers, spec, seen.hessians, seen.magnitudes, probe, scale_dtype)
    found = {}
    for name, layer in layers.items():
        try:
            scale, zero = find_range(layer.weight, spec, "minmax" if how == "minmax" else "mse", scale_dtype)
            weight = layer.weight.detach()
            hessian = seen.hessians.get(name)
            if how == "gptq" and hessian is not None and hessian.tokens:
                moved = torch.empty(weight.shape, device=weight.device)
                gptq_weight(weight, hessian.value(), scale, zero, spec, act_order, damp, moved)
                weight = moved
            found[name] = Start(weight, scale, zero)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found
