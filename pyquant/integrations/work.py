"""The folder of unfinished work beside the output: what lets an interrupted run go on, and when it may."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyquant.integrations.files import write_atomic

if TYPE_CHECKING:  # pydantic is only needed where a configuration is read
    from pyquant.integrations.config import QuantizeConfig

STATE, EVALUATIONS, TRAINER, BLOCKS = "state.json", "evaluations.json", "trainer", "blocks"


class Work:
    """State of one run in ``<out>.work/``: the settings, the finished evaluations, the trainer's checkpoints.

    Args:
        config: the run. With ``resume`` the settings that decide the weights must be those the work was started with.

    Raises:
        FileExistsError: ``out`` or unfinished work is there and neither ``overwrite`` nor ``resume`` says what to do.
        ValueError: resumed with other settings, which are named.
    """

    def __init__(self, config: QuantizeConfig) -> None:
        self.config, self.path = config, config.work
        self.evaluations: dict[str, float] = {}
        if config.out.exists() and not config.overwrite:
            raise FileExistsError(f"{config.out} exists; --overwrite replaces it")
        if self.path.exists() and not (config.resume or config.overwrite):
            raise FileExistsError(
                f"{self.path} holds unfinished work of an earlier run; --resume continues it, --overwrite starts anew"
            )
        self.resumed = config.resume and (self.path / STATE).is_file()
        if self.resumed:
            self._compare(json.loads((self.path / STATE).read_text()))
            if (self.path / EVALUATIONS).is_file():
                self.evaluations = json.loads((self.path / EVALUATIONS).read_text())

    def _compare(self, before: dict[str, Any]) -> None:
        now = self.config.fixed()
        changed = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in now if before.get(key) != now[key]]
        changed += [f"{key} was {before[key]!r}" for key in before if key not in now]
        if changed:
            raise ValueError(
                f"{self.path} was started with other settings ({'; '.join(changed)}); "
                "give the same ones, or --overwrite to start anew"
            )

    def open(self) -> None:
        """Create the folder, empty unless resumed. Called once everything is validated."""
        if self.path.exists() and not self.resumed:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / STATE, json.dumps(self.config.fixed(), indent=1))

    def remember(self, key: str, perplexity: float) -> None:
        """Keep a finished evaluation."""
        self.evaluations[key] = perplexity
        write_atomic(self.path / EVALUATIONS, json.dumps(self.evaluations, indent=1))

    def close_after_failure(self) -> bool:
        """Drop the folder unless it holds something that a resumed run would use; returns whether it was kept."""
        found = [*(self.path / TRAINER).glob("checkpoint-*"), *(self.path / BLOCKS).glob("window-*.safetensors")]
        worth = (self.path / EVALUATIONS).is_file() or bool(found)
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)
        if not worth:
            shutil.rmtree(self.path, ignore_errors=True)
        return worth

    def publish(self, finished: Path) -> None:
        """Move a finished folder to ``out`` (replacing it when allowed) and drop the work."""
        out = self.config.out
        old = out.parent / f"{out.name}.old"
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
        os.replace(finished, out)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)


def checkpoint_digest(folder: Path) -> str:
    """Names, sizes and times of a checkpoint's files: changes when the source changes."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json"))
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((str(folder.resolve()), facts)).encode()).hexdigest()


def tensor_digest(*tensors: Tensor) -> str:
    """sha256 over the bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """sha256 over all parameters and buffers of a model."""
    return tensor_digest(*model.parameters(), *model.buffers())
