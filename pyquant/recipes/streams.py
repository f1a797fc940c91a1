"""Blocks by number, and the hidden states of the full-precision model at their boundaries."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyquant.recipes.activations import Activations
from pyquant.recipes.blocks import Arguments, call_block, embed

log = logging.getLogger("pyquant")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products; counts from the first one on


class Blocks(Protocol):
    """Where blocks come from: a model in memory, or a checkpoint read block by block."""

    def __len__(self) -> int:
        """How many."""

    def fetch(self, index: int) -> nn.Module:
        """A copy of a block on the device, in eval mode, that the caller may change."""


class InMemory:
    """Copies of blocks of a model that is in memory.

    Args:
        blocks: the model's.
        device: where copies go to; the block's own by default.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device | None = None) -> None:
        self.blocks, self.device = blocks, device

    def __len__(self) -> int:
        return len(self.blocks)

    def fetch(self, index: int) -> nn.Module:
        block = copy.deepcopy(self.blocks[index]).eval().requires_grad_(False)
        return block if self.device is None else block.to(self.device)


class FullPrecision:
    """The full-precision stream: hidden states at block boundaries, computed as they are asked for.

    Args:
        source: the blocks.
        arguments: what each is called with.
        batch: windows at once.
        context: maker of the context to compute in.
        keep_all: keep every boundary, to share the stream between arms; otherwise what is behind is dropped.
    """

    def __init__(
        self,
        source: Blocks,
        arguments: list[Arguments],
        batch: int,
        context: Callable[[], AbstractContextManager[Any]],
        keep_all: bool = False,
    ) -> None:
        self.source, self.arguments, self.batch, self.context = source, arguments, batch, context
        self.keep_all = keep_all
        self.states: dict[int, Activations] = {}
        self.blocks: dict[int, nn.Module] = {}

    def begin(self, embedded: Activations) -> None:
        """Set what goes into the first block."""
        self.states = {0: embedded}

    def block(self, index: int) -> nn.Module:
        """A full-precision block; kept until :meth:`forget`."""
        if index not in self.blocks:
            self.blocks[index] = self.source.fetch(index)
        return self.blocks[index]

    @torch.no_grad()
    def at(self, boundary: int) -> Activations:
        """Hidden states before block ``boundary`` (its number of blocks: after the last)."""
        if boundary not in self.states:
            reached = max(i for i in self.states if i < boundary)
            x = self.states[reached]
            for i in range(reached, boundary):
                own = self.keep_all or x is self.states[reached]
                out = x.like() if own else x
                block = self.block(i)
                for row in range(0, len(x), self.batch):
                    with self.context():
                        out.write(row, call_block(block, x.rows(row, self.batch), self.arguments[i]))
                x = out
                if self.keep_all:
                    self.states[i + 1] = x
                else:
                    self.blocks.pop(i, None)
            self.states[boundary] = x
        return self.states[boundary]

    def forget(self, at: int) -> None:
        """Drop what lies before boundary ``at``, as far as nothing later can be computed without it."""
        if self.keep_all:
            return
        for i in [i for i in self.blocks if i < at]:
            del self.blocks[i]
        usable = [i for i in self.states if i <= at]
        for i in usable[:-1] if usable else []:
            del self.states[i]


def precision(device: torch.device, autocast: bool) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of the context in which blocks compute: bf16 autocast on a GPU where asked for. Weights are not cached in
    bf16, which a captured graph would not see change."""
    wanted = autocast and device.type == "cuda"
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """While active, a GPU gives the same bits each time; what has no such form warns. Nothing changes on a CPU.

    Attention: FlashAttention, whose backward pass has a deterministic form, or plain math where that does not apply. Under
    warnings instead of errors that form is not taken: :func:`strictly` is for the steps of a training.
    """
    if device.type != "cuda":
        yield
        return
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would cost a launch for each new tensor
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def strictly(rehearsal: Callable[[], object]) -> Iterator[None]:
    """Within :func:`deterministic`: errors instead of warnings, without which attention's backward pass adds up in an
    order of its own; as before, with one line in the log, where the rehearsal meets an operation that has no
    deterministic form."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        try:
            rehearsal()
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            torch.use_deterministic_algorithms(True, warn_only=True)
            log.warning("this training does not repeat to the bit: %s", str(error).split(". ")[0])
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


@torch.no_grad()
def embedded(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    batch: int,
    place: str,
    folder: Path | None,
    context: Callable[[], AbstractContextManager[Any]],
) -> Activations:
    """Hidden states before the first block for all tokens ``[n, S]``."""
    out: Activations | None = None
    for i in range(0, len(tokens), batch):
        with context():
            h = embed(model, blocks, tokens[i : i + batch])
        if out is None:
            out = Activations((len(tokens), h.shape[1], h.shape[2]), h.dtype, h.device, place, folder)
        out.write(i, h)
    assert out is not None
    return out


@torch.no_grad()
def advance(
    block: nn.Module,
    arguments: Arguments,
    x: Activations,
    out: Activations,
    batch: int,
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    """``out = block(x)`` over all windows; out may be x."""
    for i in range(0, len(x), batch):
        with context():
            out.write(i, call_block(block, x.rows(i, batch), arguments))
