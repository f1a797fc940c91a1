"""``--recipe blockwise`` on a checkpoint: what it needs, where hidden states go, and the windows it has finished.

``folder/fingerprint.json`` says what the run is, ``folder/window-0003.safetensors`` holds what the fourth window of blocks
left behind (codes, scales, zeros; what is trained on in the next window), its row in the file's metadata. A file is
written beside its place, flushed and renamed, so it is whole or absent.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.files import flush, write_atomic
from pyquant.integrations.machine import weight_bytes
from pyquant.integrations.streaming import Streamed, deploy
from pyquant.integrations.work import tensor_digest
from pyquant.nn.swap import SwapReport
from pyquant.recipes.blocks import find_blocks
from pyquant.recipes.blockwise import Result, blockwise
from pyquant.recipes.memory import GIB, Estimate, check, estimate
from pyquant.recipes.ranks import Ranks
from pyquant.recipes.settings import Settings

log = logging.getLogger("pyquant")
FINGERPRINT = "fingerprint.json"


class Windows:
    """Finished windows in a folder, a :class:`~pyquant.recipes.blockwise.Keeper`.

    Args:
        folder: theirs alone.
        run: what makes the run (:func:`fingerprint`).
        resume: use what is there.

    Raises:
        ValueError: resumed with other inputs, which are named.
    """

    def __init__(self, folder: Path, run: dict[str, Any], resume: bool) -> None:
        ranks = Ranks()
        self.folder = folder
        if ranks.rank == 0:
            self._claim(folder, run, resume)
        ranks.wait()
        # What was there at the beginning: a window that the first process has just saved is still being left by the others.
        self.there = {file.name for file in folder.glob("window-*.safetensors")}
        ranks.wait()

    def _claim(self, folder: Path, run: dict[str, Any], resume: bool) -> None:
        run = json.loads(json.dumps(run))
        file = folder / FINGERPRINT
        if resume and file.is_file():
            before = json.loads(file.read_text())
            changed = [k for k in sorted(run | before) if run.get(k) != before.get(k)]
            if changed:
                what = ", ".join(f"{k} (was {before.get(k)!r}, is {run.get(k)!r})" for k in changed)
                raise ValueError(f"{folder} holds blocks of a run with other inputs: {what}; --overwrite starts anew")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(run, indent=1))

    def path(self, index: int) -> Path:
        """Of a window."""
        return self.folder / f"window-{index:04d}.safetensors"

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and row of a window, or None; a damaged file counts as absent."""
        file = self.path(index)
        if file.name not in self.there:
            return None
        try:
            with safe_open(file, framework="pt") as held:
                names = list(held.keys())
                return {name: held.get_tensor(name) for name in names}, json.loads(held.metadata()["row"])
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s); its blocks are done again", file, error)
            return None

    def save(self, index: int, tensors: dict[str, Tensor], row: dict[str, Any]) -> None:
        """Keep a window; on return it is on disk."""
        file = self.path(index)
        partial = file.with_name(file.name + ".partial")
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, partial, {"row": json.dumps(row)})
        flush(partial)
        os.replace(partial, file)
        flush(self.folder)


def fingerprint(
    spec: QuantSpec, settings: Settings, tokens: Tensor, model: str, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """What makes a run: format, settings, the tokens, the model's files (a digest), the device and arithmetic."""
    return {
        "spec": spec.to_dict(),
        "settings": asdict(settings),
        "tokens": tensor_digest(tokens),
        "model": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": str(dtype),
        "torch": torch.__version__,
    }


def limits(device: str, gpu_memory: float | None, folder: Path) -> tuple[float | None, float, float]:
    """Bytes that may be used: of the device (None on a CPU), the host, the disk of a folder."""
    gpu = None
    if device == "cuda":
        free = float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())  # what this process holds is its own
        gpu = free if gpu_memory is None else min(free, gpu_memory * GIB)
    near = next(p for p in (folder, *folder.parents) if p.exists())
    return gpu, 0.9 * available_memory(), 0.9 * shutil.disk_usage(near).free


def available_memory() -> float:
    """Bytes of host memory that can still be had."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def place_states(
    asked: str,
    block: nn.Module,
    rest: int,
    vocabulary: int,
    shape: tuple[int, int, int],
    settings: Settings,
    width: int,
    count: int,
    device: str,
    gpu_memory: float | None,
    folder: Path,
) -> tuple[str, Estimate]:
    """Where hidden states go, and what the run will need.

    Args:
        asked: a place, or ``auto``: the first of device, host and disk that has room.
        shape: (n, S, H) of the calibration windows.
        folder: of the disk.
        The rest as :func:`pyquant.recipes.memory.estimate` and :func:`limits`.

    Raises:
        ValueError: it fits nowhere, with what to change.
    """
    room = limits(device, gpu_memory, folder)
    places = [asked] if asked != "auto" else ["device", "host", "disk"]
    for place in places:
        need = estimate(block, rest, vocabulary, *shape, settings, width, place, count)
        if device == "cpu":  # one memory: what the device holds, the host holds
            need = Estimate({}, {**need.device, **need.host, "CUDA and slack": 0.0}, need.disk)
        try:
            check(need, *room)
        except ValueError:
            if place == places[-1]:
                raise
            continue
        return place, need
    raise AssertionError(places)


def streams(wanted: bool | None, folder: Path, device: str, gpu_memory: float | None) -> bool:
    """Whether to read a checkpoint block by block: as asked, or where it would fill over 40 % of the GPU's memory."""
    if wanted is not None:
        return wanted
    gpu = limits(device, gpu_memory, folder)[0]
    return gpu is not None and weight_bytes(folder) > 0.4 * gpu


def split_report(report: SwapReport, model: nn.Module, root: str) -> list[str]:
    """Layers of the report that lie in the blocks; the others are entered as kept, in place."""
    chosen = [name for name in report.changed if name.startswith(f"{root}.")]
    for name in set(report.changed) - set(chosen):
        report.kept[name] = "outside the decoder's blocks"
        report.quantized -= model.get_submodule(name).weight.numel()
    report.changed = chosen
    return chosen


def quantize_blocks(
    model: nn.Module,
    streamed: Streamed | None,
    tokens: Tensor,
    spec: QuantSpec,
    settings: Settings,
    chosen: list[str],
    stored: torch.dtype,
    model_digest: str,
    folder: Path,
    resume: bool,
    asked: str = "auto",
    gpu_memory: float | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Result, str]:
    """Quantize a model's blocks, in place; its layers become QLinear.

    Args:
        model: in memory on its device, or the model of ``streamed``.
        streamed: gives the blocks of a checkpoint that is read block by block; None when the model is whole.
        tokens: calibration windows, int64 ``[n, S]``.
        spec, settings: what to do.
        chosen: layers, full names.
        stored: dtype of scales in the file.
        model_digest: of the source, for the fingerprint.
        folder: finished windows, and hidden states if they go to the disk.
        resume: use windows that are there.
        asked, gpu_memory: see :func:`place_states`.
        on_progress: see :func:`~pyquant.recipes.blockwise.blockwise`.

    Returns:
        the finished blocks with the rows of the windows, and one line on the memory that was expected.

    Raises:
        ValueError: it does not fit in memory, or what blockwise raises.
    """
    _, blocks = find_blocks(model)
    p = next(p for p in model.parameters() if p.device.type != "meta")
    rest = sum(q.numel() for q in model.parameters()) - sum(q.numel() for q in blocks.parameters())
    if streamed is None and p.device.type == "cuda":  # the whole model is there anyway
        rest = sum(q.numel() for q in model.parameters())
    config: Any = model.config
    sizes = (len(tokens), tokens.shape[1], int(config.get_text_config().hidden_size))
    place, need = place_states(
        asked, blocks[0], rest, int(config.get_text_config().vocab_size), sizes, settings, p.element_size(),
        len(blocks), p.device.type, gpu_memory, folder,
    )  # fmt: skip
    log.info("expected: %s; hidden states on %s", need, place)
    run = fingerprint(spec, settings, tokens, model_digest, p.device.type, p.dtype) | {"layers": len(chosen)}
    keeper = Windows(folder, run, resume)
    result = blockwise(
        model, tokens, spec, settings, chosen, streamed, stored, keeper, place, folder, on_progress=on_progress
    )
    if streamed is None:
        for index, block in result.blocks.items():
            deploy(blocks[index], block, spec, p.dtype)
    else:
        streamed.assemble(result.blocks, spec, p.dtype)
    return result, f"Expected memory: {need}; hidden states on {place}."
