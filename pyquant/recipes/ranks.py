"""Data-parallel calibration: which windows a process holds, and sums over processes. One process needs none of it."""

from __future__ import annotations

from collections.abc import Sequence

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

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Mean over processes, in place, in one message."""
        if self.size > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            flat /= self.size
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(part.view_as(t))
