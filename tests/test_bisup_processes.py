"""Weight-activation quantization over two CPU processes finds what one process finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import learnable_tokens, tiny_llama
from torch import distributed as dist
from torch import multiprocessing

from pyquant.formats.spec import QuantSpec
from pyquant.recipes.bisup import BiSup, Quantized, bisup
from pyquant.recipes.ranks import Ranks

SPEC = QuantSpec(3, 32)
HOSTS = {"rtn": {}, "quarot": {}, "atom": {"steps": 0, "outliers": 0.25}}  # of atom: which channels are loud


def found(host: str, **changes: Any) -> Quantized:
    how = BiSup(**{"host": host, "act_bits": 3, "steps": 8, "batch_size": 4, "keep_best": False, **changes})
    return bisup(tiny_llama(), learnable_tokens(16, 24), SPEC, how)


def process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    for host, changes in HOSTS.items():
        made = found(host, **changes)
        torch.save(made.model.state_dict(), f"{folder}/{host}-{rank}.pt")
        Path(folder, f"{host}-{rank}.json").write_text(json.dumps(made.rows))
    batch = torch.arange(4 * 24 * 8.0).view(4, 24, 8)
    for count in (1, 25, 60, 1000):  # the first rows of a batch, whoever holds them
        mine = Ranks().first_rows(batch[rank::size], count)
        assert torch.equal(mine, batch.flatten(0, 1)[:count])
    try:
        found("rtn", batch_size=3)
    except ValueError as error:
        Path(folder, f"refused-{rank}").write_text(str(error))
    dist.destroy_process_group()


def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Share of the values of the layer that differs most which are another code, or far off."""
    shares = []
    for name, want in b.items():
        if want.is_floating_point() and want.dim() == 2 and name.endswith("proj.weight"):
            shares.append(((a[name] - want).abs() > 1e-2 * want.abs().max()).float().mean().item())
    assert len(shares) == 14
    return max(shares)


def test_two_processes_find_what_one_finds(tmp_path: Path):
    multiprocessing.spawn(process, (2, str(tmp_path)), nprocs=2)
    for host, changes in HOSTS.items():
        a, b = (torch.load(tmp_path / f"{host}-{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)  # the processes agree to the bit
        one = found(host, **changes)
        rows = json.loads((tmp_path / f"{host}-0.json").read_text())
        for got, want in zip(rows, one.rows, strict=True):
            assert got["smooth_alpha"] == want["smooth_alpha"]
            # means of two halves in fp32: 2e-7 was seen; a code that turns over would move a loss by 1e-4
            if not want["steps"]:
                continue
            assert got["before"] == pytest.approx(want["before"], rel=1e-5)
            assert got["best"] == pytest.approx(want["best"], rel=1e-5)
        # a scale moved by rounding turns over codes at a boundary, few of them: none was seen
        assert moved(a, one.model.state_dict()) < 1e-3
    assert moved(a, found("atom", outliers=0.0, steps=0).model.state_dict()) > 0.02  # other channels are seen by this
    a = torch.load(tmp_path / "quarot-0.pt", weights_only=True)
    assert moved(a, found("quarot", seed=1).model.state_dict()) > 0.02  # another order of windows is seen by this
    for rank in range(2):
        assert (tmp_path / f"refused-{rank}").read_text() == "batch_size=3 must be a multiple of the 2 processes"
