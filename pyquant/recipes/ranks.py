"""Data-parallel calibration: which windows a process holds, and sums over processes. One process needs none of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class Ranks:
    """This process among those of torch.distributed (or alone).

    A batch's position j belongs to process ``j mod size``, and with it all windows i with ``i mod batch = j``: any number
    of processes that divides the batch draws the same batches.
    """

    def __init__(self) -> None:
        on = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if on else 1
        self.rank = dist.get_rank() if on else 0

    def share(self, windows: Tensor, batch: int) -> Tensor:
        """The windows ``[n, ...]`` of this process, n a multiple of batch."""
        position = torch.arange(len(windows)) % batch
        return windows[position % self.size == self.rank]

    def local_index(self, index: Tensor, batch: int) -> Tensor:
        """Numbers ``[steps, batch]`` of windows to this process' own ``[steps, batch / size]``."""
        mine = index[:, self.rank :: self.size]
        return mine // batch * (batch // self.size) + mine % batch // self.size

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def add(self, t: Tensor) -> None:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(t)

    def most(self, t: Tensor) -> None:
        """The largest over processes, in place."""
        if self.size > 1:
            dist.all_reduce(t, dist.ReduceOp.MAX)

    def agree(self, value: Any) -> Any:
        """What the first process says, a plain Python object."""
        told = [value]
        if self.size > 1:
            dist.broadcast_object_list(told, 0)
        return told[0]

    def first_rows(self, x: Tensor, count: int) -> Tensor:
        """The first ``count`` rows of the first batch as one process sees them.

        Args:
            x: this process' share ``[local, S, K]`` of a batch, or ``[tokens, K]`` where tokens are routed and their places in
                the batch not known: then the first process' rows stand for all.

        Returns:
            ``[count or fewer, K]``, the same on every process.
        """
        if self.size == 1:
            return x.reshape(-1, x.shape[-1])[:count].clone()
        if x.dim() != 3:
            return self.agree(x.reshape(-1, x.shape[-1])[:count].cpu()).to(x.device)
        own = x[: -(-count // (x.shape[1] * self.size))].contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return torch.stack(parts, 1).flatten(0, 2)[:count].clone()

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Mean over processes, in place, in one message."""
        if self.size > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            flat /= self.size
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(part.view_as(t))
