"""What a window of blocks is trained for: errors of hidden states, and the divergence of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pyquant.recipes.activations import Activations
from pyquant.recipes.blocks import call_block
from pyquant.recipes.ranks import Ranks
from pyquant.recipes.settings import Settings
from pyquant.recipes.streams import FullPrecision


class Objective:
    """The loss of a window, and the fixed buffers that it reads.

    Args:
        settings: weights of the parts, and the target.
        blocks: the window.
        lookahead: how many full-precision blocks further on the error is measured, or ``"end"``.
        opened: blocks in training form, by number, from ``at`` to the window's last.
        at, x: the quantized stream, and before which block it is.
        fp: the full-precision stream.
        logits: from the hidden states after the last block.
        ranks: processes that share the windows.
    """

    def __init__(
        self,
        settings: Settings,
        blocks: range,
        lookahead: int | Literal["end"],
        opened: dict[int, nn.Module],
        at: int,
        x: Activations,
        fp: FullPrecision,
        logits: Callable[[Tensor], Tensor],
        ranks: Ranks,
    ) -> None:
        self.settings, self.blocks, self.opened, self.at, self.logits = settings, blocks, opened, at, logits
        self.arguments, self.precision = fp.arguments, fp.context
        last = len(fp.source)
        self.end = last if lookahead == "end" else min(blocks[-1] + 1 + lookahead, last)
        self.to_logits = lookahead == "end"
        self.later = [fp.block(b) for b in range(blocks[-1] + 1, self.end)]
        self.mse = settings.end_mse if self.to_logits else 1.0
        self.local = settings.local if self.end > blocks[-1] + 1 or self.to_logits else 0.0
        self.sources: list[Activations] = [x]
        if settings.target != "block" or self.to_logits:
            self.fp = len(self.sources)
            self.sources.append(fp.at(self.end))
        if settings.target != "fp" and self.mse:
            self.same = len(self.sources)
            self.sources.append(self._same_inputs(x, fp))
        if self.local:
            self.near = len(self.sources)
            self.sources.append(fp.at(blocks[-1] + 1))
        shape = (fp.batch, *x.data.shape[1:])
        self.buffers = [torch.empty(shape, dtype=s.data.dtype, device=x.device) for s in self.sources]
        self.norm = [s.rows(0, fp.batch).float().square().mean().clamp_min(1e-12) for s in self.sources]
        ranks.mean(self.norm)

    @torch.no_grad()
    def _same_inputs(self, x: Activations, fp: FullPrecision) -> Activations:
        """What the full-precision blocks of the chain make of the quantized stream."""
        out = x.like()
        chain = [fp.block(b) for b in range(self.at, self.end)]
        for i in range(0, len(x), fp.batch):
            with self.precision():
                h = x.rows(i, fp.batch)
                for b, block in zip(range(self.at, self.end), chain, strict=True):
                    h = call_block(block, h, self.arguments[b])
                out.write(i, h)
        return out

    def feed(self, index: Tensor) -> None:
        """Fill the buffers with the windows of an index ``[B]``."""
        for source, buffer in zip(self.sources, self.buffers, strict=True):
            source.gather(index, buffer)

    def loss(self) -> Tensor:
        """0-dim, differentiable in whatever the open blocks train."""
        how = self.settings
        with self.precision():
            h = self.buffers[0]
            for b in range(self.at, self.blocks[-1] + 1):
                h = call_block(self.opened[b], h, self.arguments[b])
            total = torch.zeros((), device=h.device)
            if self.local:
                total = total + self.local * self._error(h, self.near)
            for b, block in zip(range(self.blocks[-1] + 1, self.end), self.later, strict=True):
                h = call_block(block, h, self.arguments[b])
            if self.mse:
                errors = [self._error(h, self.fp)] if how.target != "block" else []
                errors += [self._error(h, self.same)] if how.target != "fp" else []
                total = total + self.mse * sum(errors, torch.zeros_like(total)) / len(errors)
            if self.to_logits and how.kl:
                with torch.no_grad():
                    teacher = self.logits(self.buffers[self.fp]).float().log_softmax(-1)
                student = self.logits(h).float().log_softmax(-1)
                total = total + how.kl * (teacher.exp() * (teacher - student)).sum(-1).mean()
        return total

    def _error(self, h: Tensor, which: int) -> Tensor:
        return (h - self.buffers[which]).float().square().mean() / self.norm[which]
