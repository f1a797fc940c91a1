"""The processes that ``torchrun`` or ``accelerate launch`` started: joining them, and which one speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist

from pyquant.recipes.ranks import Ranks

PATIENCE = timedelta(hours=6)  # the others wait while the first evaluates


def started() -> int:
    """How many processes were started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Be one of the processes inside, each on a GPU of its own where ``device`` is ``cuda``; leave them at the end.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    if started() == 1 or dist.is_initialized():
        yield Ranks()
        return
    if device == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local + 1} of this machine has no GPU: torch sees {gpus}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()
