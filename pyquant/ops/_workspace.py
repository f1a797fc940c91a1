"""Memory in which the blocks of one launch leave parts for each other and count who has arrived."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant.ops._registry import extension

_spaces: dict[tuple[str, int, int], tuple[int, Tensor]] = {}


def workspace(family: str, device: int, stream_handle: int, size: int) -> Tensor:
    """Zeroed uint8 ``[>= size]`` for a kernel family that leaves its counters at zero.

    Launches of one stream follow each other, so they share one. A graph that is being captured gets its own, zeroed by
    the graph itself, since it may be replayed on any stream: while the capture lasts it is kept here, and afterwards the
    graph's memory pool holds it.
    """
    capture = extension().capture_id(stream_handle)
    made_for, space = _spaces.get((family, device, stream_handle), (-1, None))
    if space is None or made_for != capture or space.numel() < size:
        space = torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", device))
        _spaces[family, device, stream_handle] = capture, space
    return space
