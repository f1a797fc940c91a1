"""Round to nearest: every weight to the closest code of a range found from the weights alone. No data, seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import QLinear
from pyquant.nn.swap import SwapReport, swap


def rtn(
    model: nn.Module,
    spec: QuantSpec | None = None,
    rule: str = "minmax",
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = ("lm_head",),
    scale_dtype: torch.dtype = torch.bfloat16,
    skip_experts: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> SwapReport:
    """Replace the linear layers of a model by :class:`~pyquant.nn.QLinear`, in place.

    Args:
        model: any module with ``nn.Linear`` layers, weights ``[N, K]`` bf16, fp16 or fp32.
        spec: bits (2..4), group size, symmetry.
        rule: ``minmax`` (the range covers the weight) or ``mse`` (clipped to the smallest squared error, group by
            group).
        include, exclude: shell-style patterns on dotted names or their tails.
        scale_dtype: dtype the scales will be stored in. They are rounded to it before the codes are chosen and held in
            the weight's dtype, so a model in fp32 computes with the values that the file will have.
        skip_experts: leave fused mixture-of-experts weights as they are instead of refusing them.
        on_layer: called with the name of each layer before it is quantized.

    Returns:
        which layers were changed, which were left and why.

    Raises:
        ValueError: more than 4 bits, an unknown rule, a layer that does not fit the group size, NaN or Inf weights,
            fused expert weights, or patterns that match nothing.
    """
    spec = spec or QuantSpec()
    check_deployable(spec)

    def replace(name: str, linear: nn.Linear) -> nn.Module:
        if on_layer is not None:
            on_layer(name)
        return QLinear.from_linear(linear, spec, rule, scale_dtype)

    return swap(model, spec, replace, include, exclude, skip_experts)


def check_deployable(spec: QuantSpec) -> None:
    """Refuse specs that train but cannot be stored.

    Raises:
        ValueError: for more than 4 bits.
    """
    if spec.bits > 4:
        raise ValueError(f"bits={spec.bits}: deployable weights have 2, 3 or 4 bits")


def dequantize_model(model: nn.Module) -> int:
    """Turn every :class:`~pyquant.nn.QLinear` back into an ``nn.Linear`` that holds w_hat, in place.

    w_hat is rounded to the layer's dtype: exact in fp32, rounded once in bf16 or fp16.

    Returns:
        how many layers were changed.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QLinear)]
    for name, layer in layers:
        bias = layer.bias
        linear = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        linear.bias = bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, linear.train(layer.training))
    return len(layers)


def layer_errors(before: Mapping[str, Tensor], model: nn.Module) -> list[dict[str, Any]]:
    """How far the quantized weights are from the original ones.

    Args:
        before: layer name -> full-precision weight ``[N, K]``.
        model: the model after quantization; layers that are no QLinear are skipped.

    Returns:
        rows ``{"name", "relative_error", "sqnr_db"}`` in the model's order: ``|w_hat - w| / |w|`` (Frobenius) and the
        same as a signal-to-noise ratio in dB (``inf`` for an exact layer).
    """
    rows = []
    for name, layer in model.named_modules():
        if isinstance(layer, QLinear) and name in before:
            w = before[name].detach().float()
            error = (layer.dequantize(torch.float32).to(w.device) - w).norm().item() / max(w.norm().item(), 1e-30)
            sqnr = -20 * math.log10(error) if error else math.inf
            rows.append({"name": name, "relative_error": error, "sqnr_db": sqnr})
    return rows
