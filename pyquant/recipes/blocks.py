"""Walk a decoder block by block: find the blocks, catch what goes into the first, and carry it from block to block.

Nothing here knows a model family: the blocks of a decoder are the ``nn.ModuleList`` of equal modules that holds most of
the model's linear weights, and their inputs are whatever the model calls the first one with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class BlockCall:
    """One call of a block: hidden states ``[B, S, H]`` and everything else it was given (masks, positions)."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Caught(Exception):
    """Raised to leave the model's forward once the first block's inputs are known."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks and their dotted name.

    Returns:
        (name, list) of the ``nn.ModuleList`` of modules of one class with the most linear weights.

    Raises:
        ValueError: when the model has no such list.
    """
    best: tuple[int, str, nn.ModuleList | None] = (0, "", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1:
            weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
            if weights > best[0]:
                best = (weights, name, module)
    if best[2] is None:
        raise ValueError(
            f"{type(model).__name__} has no blocks to walk: looked for an nn.ModuleList of modules of one class that hold "
            "linear layers"
        )
    return best[1], best[2]


@torch.no_grad()
def first_calls(model: nn.Module, blocks: nn.ModuleList, batches: Iterable[Tensor]) -> list[BlockCall]:
    """What the first block is called with for each batch of tokens ``[B, S]``; the rest of the model is not run."""
    calls: list[BlockCall] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = None  # a cache would grow with every pass
        calls.append(BlockCall(hidden, rest, kwargs))
        raise _Caught

    hook = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    device = next(model.parameters()).device
    try:
        for batch in batches:
            try:
                model(batch.to(device))
            except _Caught:
                continue
            raise ValueError(f"{type(model).__name__} did not call the first of its {len(blocks)} blocks")
    finally:
        hook.remove()
    if not calls:
        raise ValueError("no calibration batches were given")
    return calls


@torch.no_grad()
def run_block(block: nn.Module, call: BlockCall) -> Tensor:
    """Hidden states ``[B, S, H]`` after a block."""
    out = block(call.hidden, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def watch_inputs(layers: dict[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While active, ``see(name, x)`` receives the input ``[..., K]`` of every call of these layers."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
