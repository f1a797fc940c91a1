"""Several linear layers of one input as one: a single product for q, k and v, and for gate and up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyquant.formats import int4
from pyquant.nn.linear import QLinear, multiply


class FusedLinear:
    """``cat([layer(x) for layer in layers], -1)`` by one product where the layers allow it.

    Quantized layers of one format are fused: their packed weights become parts of one tensor, and each layer goes on as a
    view of its part, so that its own forward pass and its ``state_dict`` stay as they were and no memory is added. That
    needs each N but the last to be a multiple of 64, the strips of the tiled order; other sizes are tiled anew, beside the
    layers' own weights (``copied`` is True). Layers that cannot be fused are called one by one; ``why`` says why.

    This is no module: it owns no parameter and appears in no ``state_dict``.

    Args:
        layers: modules that map ``[..., K]`` to ``[..., N_i]``.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self.why = _unfit(self.layers)
        self.n = sum(layer.out_features for layer in self.layers)
        self.weight: tuple[Tensor, Tensor, Tensor | None] | None = None
        self.bias: Tensor | None = None
        self.copied = False
        if self.why is None:
            self.weight = _share(self.layers)
            self.copied = self.weight is None
            if self.copied:
                self.weight = _tile_anew(self.layers)
            self.bias = _join_bias(self.layers)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., sum(N_i)]``."""
        if self.weight is None:
            parts = [layer(x) for layer in self.layers]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        first = self.layers[0]
        return multiply(x, self.weight, self.bias, self.n, first.spec.group_size, first.act)


def _unfit(layers: Sequence[nn.Module]) -> str | None:
    """Why layers cannot be one product, or None."""
    if len(layers) == 1:
        return "a single layer needs no fusing"
    for layer in layers:
        if type(layer) is not QLinear:
            return f"{type(layer).__name__} is no QLinear"
        if not layer.prepared:
            return "a layer holds no weight yet"
    first = layers[0]
    for layer in layers[1:]:
        for what, a, b in (
            ("in_features", first.in_features, layer.in_features),
            ("group_size", first.spec.group_size, layer.spec.group_size),
            ("symmetric", first.spec.symmetric, layer.spec.symmetric),
            ("act", first.act, layer.act),
            ("dtype", first.scale.dtype, layer.scale.dtype),
            ("device", first.scale.device, layer.scale.device),
        ):
            if a != b:
                return f"their {what} differ ({a} and {b})"
    return None


def _share(layers: Sequence[QLinear]) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """One weight whose parts the layers become, or None where a strip would hold rows of two layers."""
    if any(layer.out_features % 64 for layer in layers[:-1]):
        return None
    joined: list[Tensor | None] = []
    for name in ("qweight", "scale", "zero"):
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is None:
            joined.append(None)
            continue
        whole = torch.cat(parts)
        joined.append(whole)
        for layer, part in zip(layers, whole.split([len(p) for p in parts]), strict=True):
            layer._buffers[name] = part
    return tuple(joined)


def _tile_anew(layers: Sequence[QLinear]) -> tuple[Tensor, Tensor, Tensor | None]:
    """One weight of its own, from the codes."""
    k, group = layers[0].in_features, layers[0].spec.group_size
    codes = torch.cat([int4.untile_codes(layer.qweight, layer.out_features, k) for layer in layers])
    scale = torch.cat([int4.untile_scale(layer.scale, layer.out_features, k, group) for layer in layers])
    zero = None
    if layers[0].zero is not None:
        zeros = torch.cat([int4.untile_scale(layer.zero, layer.out_features, k, group) for layer in layers])
        zero = int4.tile_scale(zeros, k, group, int4.SYMMETRIC_ZERO)
    return int4.tile_codes(codes), int4.tile_scale(scale, k, group), zero


def _join_bias(layers: Sequence[QLinear]) -> Tensor | None:
    """The layers' biases in a row, zeros for those that have none; a copy."""
    if all(layer.bias is None for layer in layers):
        return None
    like = layers[0].scale
    return torch.cat([like.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in layers])
