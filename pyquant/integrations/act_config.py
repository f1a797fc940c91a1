"""Quantized inputs in compressed-tensors' configuration: ``input_activations``, dynamic, symmetric, token by token."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyquant.formats.spec import ActSpec
from pyquant.nn.linear import QLinear


def input_activations(act: ActSpec | None) -> dict[str, Any] | None:
    """What stands in a config group for inputs that are quantized like this, None for none.

    Raises:
        ValueError: a clip, for which the format has no place.
    """
    if act is None:
        return None
    if act.clip != 1:
        raise ValueError(f"act_clip={act.clip:g}: compressed-tensors has no place for the clip of inputs, it must be 1")
    whole = act.group_size == -1
    return {
        "num_bits": act.bits,
        "type": act.kind,
        "symmetric": True,
        "strategy": "token" if whole else "group",
        "group_size": None if whole else act.group_size,
        "dynamic": True,
    }


def act_of(found: dict[str, Any] | None) -> ActSpec | None:
    """Inverse of :func:`input_activations`.

    Raises:
        ValueError: anything but symmetric dynamic scales of tokens or their groups, saying what it is.
    """
    if not found:
        return None
    strategy, dynamic = found.get("strategy"), found.get("dynamic")
    if strategy not in ("token", "group") or dynamic is not True or not found.get("symmetric", True):
        kind = "symmetric" if found.get("symmetric", True) else "asymmetric"
        raise ValueError(f"its inputs are quantized {kind}, strategy {strategy!r}, dynamic {dynamic}")
    group_size = -1 if strategy == "token" else found.get("group_size") or -1
    return ActSpec(found.get("num_bits", 8), group_size, kind=found.get("type", "int"))


def set_act(model: nn.Module, act: ActSpec | None) -> int:
    """Let every :class:`~pyquant.nn.QLinear` of a model quantize its inputs like this; how many there are."""
    layers = [m for m in model.modules() if isinstance(m, QLinear)]
    for layer in layers:
        layer.act = act
    return len(layers)


def common_act(model: nn.Module) -> ActSpec | None:
    """How the inputs of a model's :class:`~pyquant.nn.QLinear` layers are quantized.

    Raises:
        ValueError: layers that differ.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}
    acts = {m.act for m in layers.values()}
    if len(acts) > 1:
        first = next(iter(layers))
        other = next(n for n, m in layers.items() if m.act != layers[first].act)
        raise ValueError(
            f"inputs of {first} are quantized as {layers[first].act}, of {other} as {layers[other].act}: the format has one "
            "way for all"
        )
    return acts.pop() if acts else None
