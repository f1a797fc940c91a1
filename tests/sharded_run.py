"""What each process of tests/test_sharded.py runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from tiny import learnable_tokens, tiny_llama
from torch import distributed as dist

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.sharded import train_sharded
from pyquant.recipes.kd_settings import KDConfig

SPEC = QuantSpec(3, 32)


def process(rank: int, size: int, folder: str, config: KDConfig, resume: bool, die_at: int | None) -> None:
    """Train, and leave ``history.json`` and the gathered model's state beside it; or die without a word."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group-{resume}", rank=rank, world_size=size)
    found = train(Path(folder), config, resume, die_at)
    state = found.gather()
    if rank == 0:
        assert state is not None
        torch.save(state.state_dict(), f"{folder}/state.pt")
        Path(folder, "history.json").write_text(json.dumps(found.history))
    dist.destroy_process_group()


def train(folder: Path, config: KDConfig, resume: bool = False, die_at: int | None = None) -> Any:
    """One process' part of a run."""

    def die(row: dict[str, Any]) -> None:
        if row["step"] == die_at:
            os._exit(9)

    return train_sharded(tiny_llama(), tiny_llama(), learnable_tokens(), config, SPEC, folder / "work", resume, die)
