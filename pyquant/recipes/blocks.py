"""Walk a decoder block by block: find the blocks, catch what goes into the first, and carry it from block to block.

Nothing here knows a model family: the blocks of a decoder are the ``nn.ModuleList`` of equal modules that holds most of
the model's linear weights, and their inputs are whatever the model calls the first one with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
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


# ------------------------------------------------------------------------------------------------ one set of arguments


@dataclass
class Arguments:
    """What a block is called with beside the hidden states: the same for every batch of one shape."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def stand_in(blocks: nn.ModuleList, forward: Callable[[int, Tensor, Arguments], Tensor]) -> Iterator[None]:
    """While active, block i returns ``forward(i, hidden, arguments)`` instead of computing: the model around them is run
    alone, and the blocks may even lie on the meta device."""

    def replacement(index: int) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            kwargs = dict(kwargs)
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            for name, value in kwargs.items():
                if hasattr(value, "get_seq_length"):
                    kwargs[name] = None  # a cache would grow with every pass
            return forward(index, hidden, Arguments(rest, kwargs))

        return call

    for index, block in enumerate(blocks):
        block.forward = replacement(index)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def block_arguments(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor) -> tuple[Tensor, list[Arguments]]:
    """The embedded tokens and what each block is called with.

    Args:
        model: a decoder called as ``model(tokens)``; its blocks are not run.
        tokens: int64 ``[B, S]``.

    Returns:
        hidden states ``[B, S, H]`` before the first block, and the arguments of each block (they differ where layers attend
        differently, as in Gemma 3).

    Raises:
        ValueError: a block is not called in order, or gets something that depends on the tokens.
    """
    first = _arguments(model, blocks, tokens)
    again = _arguments(model, blocks, tokens.flip(0, 1).roll(1, 1))
    for index, (a, b) in enumerate(zip(first[1], again[1], strict=True)):
        for name in a.kwargs.keys() | b.kwargs.keys():
            if not _same(a.kwargs.get(name), b.kwargs.get(name)):
                raise ValueError(
                    f"block {index} of {type(model).__name__} is given {name!r}, which depends on the tokens; only "
                    "hidden states may"
                )
        if not _same(a.args, b.args):
            raise ValueError(f"block {index} of {type(model).__name__} is given values that depend on the tokens")
    return first


def _arguments(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor) -> tuple[Tensor, list[Arguments]]:
    seen: list[Arguments] = []
    hidden: list[Tensor] = []

    def catch(index: int, states: Tensor, arguments: Arguments) -> Tensor:
        if index != len(seen):
            raise ValueError(f"{type(model).__name__} calls block {index} when block {len(seen)} was expected")
        if not index:
            hidden.append(states)
        seen.append(arguments)
        if len(seen) == len(blocks):
            raise _Caught
        return states

    with stand_in(blocks, catch), suppress(_Caught):
        model(tokens)
    if len(seen) != len(blocks):
        raise ValueError(
            f"{type(model).__name__} called {len(seen)} of its {len(blocks)} blocks, each is expected once"
        )
    return hidden[0], seen


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, str | int | float | bool | None):
        return a == b
    return type(a) is type(b)


@torch.no_grad()
def embed(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
    """Hidden states ``[B, S, H]`` before the first block."""
    found: list[Tensor] = []

    def catch(index: int, states: Tensor, arguments: Arguments) -> Tensor:
        found.append(states)
        raise _Caught

    with stand_in(blocks, catch), suppress(_Caught):
        model(tokens)
    return found[0]


def logits_of(model: nn.Module, blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    """Logits ``[B, S, V]`` from the hidden states ``[B, S, H]`` after the last block, by the model's own way (final norm,
    head, whatever else it does there); differentiable."""
    last = len(blocks) - 1
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    with stand_in(blocks, lambda index, states, arguments: hidden if index == last else states):
        out = model(tokens)
    return out.logits if hasattr(out, "logits") else out


def call_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Hidden states ``[B, S, H]`` after a block; differentiable."""
    out = block(hidden, *arguments.args, **arguments.kwargs)
    return out[0] if isinstance(out, tuple) else out
