"""Tiles of the Triton products, by kernel, GPU and number of tokens: one table, nothing is tried out at a first call.

The table was made by reading the generated code, not by timing; ``pyquant bench --tune`` times :data:`CANDIDATES` on the
GPU at hand and keeps the fastest in a file, which then goes before the table on GPUs of that name::

    $XDG_CACHE_HOME/pyquant/tiles.json  (~/.cache where that is unset)
    {"version": 1, "triton": "3.6.0", "gpus": {"NVIDIA H200": {"forward": [[16, [16, 1, 2, 4, 4, 512]], ..], ..}}}

The numbers are the most tokens (null: any number) and the fields of :class:`Tile`. A file that cannot be read, or of
another version, is left alone, with one warning. Another tile may add in another order, so the last bits of a result may
differ from those of the table's tile; with either, the same input gives the same bits every time.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

VERSION = 1  # of the file; raised when a tile changes its meaning


class Tile(NamedTuple):
    """How one program computes, and how many of them."""

    tokens: int  # rows of x or dY in a tile, a power of two from 16 on
    strips: int  # strips of 64 features in a tile (forward) or a step (backward)
    units: int  # units of 64 columns in a step (forward) or a tile (backward); fewer where a group is narrower
    warps: int
    stages: int  # of the pipeline
    programs: int  # wanted: the sum is split between programs until there are as many


Row = tuple[int | None, Tile]  # the most tokens it is for (None: any number), the tile

# Few tokens leave few tiles, so the sum is split to fill 132 multiprocessors a few times; the more tokens, the more the
# parts cost. mma.sync has not the registers for two units a step or 128 tokens; wgmma reads x from shared memory.
# Backward: in both, more than one strip or unit makes the way of w_hat through shared memory one of 2-byte stores.
TABLE: dict[tuple[str, str], tuple[Row, ...]] = {
    ("forward", "sm90"): (
        (16, Tile(16, 1, 2, 4, 4, 512)),
        (32, Tile(32, 1, 2, 4, 4, 384)),
        (64, Tile(64, 1, 2, 4, 3, 264)),
        (None, Tile(128, 2, 2, 8, 3, 0)),
    ),
    ("forward", "other"): (
        (16, Tile(16, 1, 1, 4, 4, 512)),
        (32, Tile(32, 1, 1, 4, 4, 384)),
        (64, Tile(64, 1, 1, 4, 3, 264)),
        (None, Tile(64, 2, 1, 8, 3, 0)),
    ),
    ("backward", "sm90"): (
        (16, Tile(16, 1, 1, 4, 4, 512)),
        (32, Tile(32, 1, 1, 4, 4, 384)),
        (None, Tile(64, 1, 1, 4, 3, 264)),
    ),
    ("backward", "other"): (
        (16, Tile(16, 1, 1, 4, 4, 512)),
        (32, Tile(32, 1, 1, 4, 4, 384)),
        (None, Tile(64, 1, 1, 4, 3, 264)),
    ),
}

# What `pyquant bench --tune` tries beside the table's tile, by the most tokens of a range.
CANDIDATES: dict[str, dict[int | None, tuple[Tile, ...]]] = {
    "forward": {
        16: tuple(Tile(16, 1, u, 4, s, p) for u in (1, 2) for s, p in ((3, 528), (5, 264), (5, 1056))),
        32: tuple(Tile(32, 1, u, 4, s, p) for u in (1, 2) for s, p in ((3, 264), (4, 528))),
        64: tuple(Tile(64, 1, u, w, 3, p) for u in (1, 2) for w, p in ((4, 132), (4, 528), (8, 264))),
        None: (Tile(64, 1, 2, 4, 3, 0), Tile(64, 2, 1, 8, 4, 0), Tile(128, 1, 2, 4, 3, 0), Tile(128, 2, 1, 8, 4, 0)),
    },
    "backward": {
        16: tuple(Tile(16, 1, 1, 4, s, p) for s, p in ((3, 528), (5, 264), (5, 512), (5, 1056))),
        32: tuple(Tile(32, 1, 1, 4, s, p) for s, p in ((3, 264), (4, 528), (5, 264))),
        None: tuple(Tile(64, 1, 1, w, 3, p) for w, p in ((4, 132), (4, 528), (8, 264))),
    },
}


@functools.cache
def gpu(device: torch.device) -> tuple[str, str]:
    """(kind in :data:`TABLE`, name) of a device; the interpreter's CPU counts as any other GPU."""
    if device.type != "cuda":
        return "other", device.type
    name = torch.cuda.get_device_name(device)
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    return ("sm90" if hopper else "other"), name


def choose(kernel: str, m: int, kind: str, name: str = "") -> Tile:
    """The tile for m tokens: the one that was measured on a GPU of this name, otherwise the table's.

    Args:
        kernel: ``forward`` or ``backward``.
        m: tokens, 1 and more.
        kind: ``sm90`` or ``other``.
        name: of the GPU, as torch tells it.
    """
    return next(tile for most, tile in _rows_for(kernel, kind, name) if most is None or m <= most)


@functools.cache
def _rows_for(kernel: str, kind: str, name: str) -> tuple[Row, ...]:
    return _measured(tiles_file()).get(name, {}).get(kernel) or TABLE[kernel, kind]


# ------------------------------------------------------------------------------------------------ the file


def tiles_file() -> Path:
    """Where measured tiles are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pyquant" / "tiles.json"


def save(name: str, kernels: dict[str, list[Row]], triton: str) -> Path:
    """Keep the tiles measured on a GPU of this name beside those of others; whatever is no such file is replaced."""
    file = tiles_file()
    gpus = {other: dict(rows) for other, rows in _measured(file).items()}
    gpus[name] = {**gpus.get(name, {}), **{kernel: tuple(rows) for kernel, rows in kernels.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"version": VERSION, "triton": triton, "gpus": gpus}, indent=1) + "\n")
    part.replace(file)
    forget()
    return file


def forget() -> None:
    """Read the file again at the next call: it is read once in a process."""
    _measured.cache_clear()
    _rows_for.cache_clear()


@functools.cache
def _measured(file: Path) -> dict[str, dict[str, tuple[Row, ...]]]:
    """GPU name -> kernel -> rows; empty, with a warning, where the file is not what :func:`save` writes."""
    try:
        held = json.loads(file.read_text())
        if held["version"] != VERSION:
            raise ValueError(f"it is of version {held['version']}, this pyquant reads {VERSION}")
        return {name: {k: _rows(v) for k, v in kernels.items()} for name, kernels in held["gpus"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        warnings.warn(
            f"measured tiles in {file} are left alone ({why}); pyquant bench --tune writes new ones", stacklevel=2
        )
        return {}


def _rows(values: list[Any]) -> tuple[Row, ...]:
    rows = tuple((most, Tile(*numbers)) for most, numbers in values)
    for _, tile in rows:
        wrong = (
            not all(type(v) is int for v in tile) or tile.tokens not in (16, 32, 64, 128) or tile.strips not in (1, 2)
        )
        if (
            wrong
            or tile.units not in (1, 2)
            or tile.warps not in (4, 8)
            or not 1 <= tile.stages <= 8
            or tile.programs < 0
        ):
            raise ValueError(f"{list(tile)} is no tile")
    if not rows or rows[-1][0] is not None or any(type(most) is not int for most, _ in rows[:-1]):
        raise ValueError("the rows of a kernel do not end in one for any number of tokens")
    return rows
