"""Whole students on every process: gradients are summed over processes while backward still computes.

Where a student with its optimizer fits one GPU, this scales better than sharding (:mod:`pyquant.recipes.sharding`): nothing is
gathered, the host does nothing but start one sum for each weight, and a step with all its sums can be captured as a CUDA
graph. Large gradients are summed where they lie, each as soon as it is there; small ones (norms, scales) together at the end.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

LARGE = 1 << 20  # elements; a sum of fewer costs its latency, so smaller ones go together


class Averaging:
    """Means of gradients over the processes of torch.distributed.

    Backward of ``loss / averaging.size`` with :attr:`on`, then :meth:`finish`; the gradients are then means over processes.
    While :attr:`on` is False (all but the last pass of an accumulated step) nothing is sent. All processes must reach their
    gradients in the same order, as those of one model with the same layers do.

    Args:
        params: what trains; hooks stay on them until :meth:`close`, and do nothing once this object is gone.
        group: the processes; None is all.
        large: gradients of so many elements are sent alone.
    """

    def __init__(self, params: Iterable[Tensor], group: Any = None, large: int = LARGE) -> None:
        self.group, self.size, self.large, self.on = group, dist.get_world_size(group), large, True
        self.params = [p for p in params if p.requires_grad]
        self.works: list[Any] = []
        me = weakref.ref(self)  # a hook that held this object, and so the parameters, would keep itself alive

        def send(p: Tensor) -> None:
            own = me()
            if own is not None and own.on and own.size > 1:
                assert p.grad is not None
                own.works.append(dist.all_reduce(p.grad, group=own.group, async_op=True))

        self.hooks = [p.register_post_accumulate_grad_hook(send) for p in self.params if p.numel() >= large]

    @torch.no_grad()
    def finish(self) -> None:
        """Sum the small gradients, and let what follows on the device wait for all sums."""
        for work in self.works:
            work.wait()
        self.works.clear()
        small: dict[torch.dtype, list[Tensor]] = {}
        for p in self.params:
            if p.grad is not None and p.numel() < self.large:
                small.setdefault(p.grad.dtype, []).append(p.grad)
        for grads in small.values() if self.size > 1 else ():
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat, group=self.group)
            parts = flat.split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [part.view_as(g) for g, part in zip(grads, parts, strict=True)])

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
