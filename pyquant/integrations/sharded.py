"""KD-QAT over several processes: the training of :mod:`pyquant.integrations.trainer` on a sharded student.

The windows of a step are those of one process: ``batch_size`` is that of all processes together, and each takes its share
of every pass. Losses and gradients are means over processes, clipping is by the norm of all shards, so a run equals the one
of a single process up to the order of sums. Dropout is drawn from the seed, the step and the process.

Checkpoints are the folders of :mod:`pyquant.integrations.resume` with the tensors written by
``torch.distributed.checkpoint``: every process writes its own rows. Its usual format has a pickled index; here it writes
safetensors instead (``HuggingFaceStorageWriter``), whose headers say in JSON which rows a file holds, so any number of
processes reads the rows that it needs. All processes must see the same folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh

from pyquant.formats.spec import QuantSpec
from pyquant.integrations import resume as disk
from pyquant.integrations.trainer import Interrupted, check_inputs, deterministic, on_sigint
from pyquant.nn.linear import FakeQuantLinear
from pyquant.recipes.kd_loss import Distillation
from pyquant.recipes.kd_qat import cast_weights, parameter_groups, set_up
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.qat_loop import data_order
from pyquant.recipes.ranks import Ranks
from pyquant.recipes.sharding import (
    ShardedLoss,
    check_shardable,
    freeze_sharded,
    gather,
    mark_frozen,
    shard,
    skeleton,
)
from pyquant.recipes.soft_qat import share_temperature

TENSORS = "sharded"  # folder of a checkpoint that holds the processes' files


@dataclass
class Sharded:
    """A trained student, still sharded.

    Attributes:
        history: as :func:`pyquant.integrations.trainer.train_kd` returns it.
        root: the loss around it.
        empty: its shape, on the first process.
    """

    history: list[dict[str, Any]]
    root: ShardedLoss
    empty: nn.Module | None

    def gather(self, scale_dtype: torch.dtype = torch.bfloat16) -> nn.Module | None:
        """The deployed model on the first process, None on the others (:func:`pyquant.recipes.sharding.gather`)."""
        return gather(self.root, self.empty, scale_dtype)[0]


def train_sharded(
    student: nn.Module,
    teacher: nn.Module,
    tokens: Tensor,
    config: KDConfig,
    spec: QuantSpec,
    work_dir: str | Path,
    resume: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> Sharded:
    """Prepare a student and train it, on all processes of torch.distributed; alone, a group of one is made.

    Args:
        student: a full-precision causal LM, the same on every process, best on the CPU; changed in place.
        teacher, tokens, config, spec, work_dir, resume, on_log: as :func:`pyquant.integrations.trainer.train_kd`. The
            teacher is on the device to train on. ``on_log`` is called by the first process.

    Raises:
        ValueError, FileExistsError, FloatingPointError, OSError, Interrupted: as ``train_kd``, and as
            :func:`~pyquant.recipes.sharding.check_shardable`.
    """
    device = next(teacher.parameters()).device
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    ranks, work_dir = Ranks(), Path(work_dir)
    check_shardable(config, ranks.size)
    check_inputs(student, teacher, tokens, config)
    cast_weights(student, _fp32(config))
    last = _open(work_dir, disk.fingerprint(student, teacher, tokens, config, spec), resume, ranks)
    torch.manual_seed(config.seed)
    set_up(student, _fp32(config), spec, device)
    student.train()
    autocast = (device.type == "cuda" if config.bf16 is None else config.bf16) and config.weights == "fp32"
    precision: Any = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    with precision:
        objective = Distillation(student, teacher.eval(), config.loss, config.fused_loss)
    empty = skeleton(student) if ranks.rank == 0 else None
    root = shard(objective, config, init_device_mesh(device.type, (ranks.size,)))
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    temperature = share_temperature(student)
    groups: Any = parameter_groups(student, config.lr, config.scale_lr, config.weight_decay)
    rates = [float(group["lr"]) for group in groups]
    optimizer = torch.optim.AdamW(groups, fused=config.optim == "adamw_torch_fused")
    history: list[dict[str, Any]] = [] if last is None else _load(last, root, optimizer)
    order = data_order(len(tokens), config.steps * config.batch_size * config.grad_accum, config.seed)
    order = order.view(config.steps, config.grad_accum, config.batch_size)[:, :, ranks.rank :: ranks.size]
    began = time.monotonic()
    with deterministic(), on_sigint() as interrupted:
        for i in range(len(history), config.steps):
            if config.freeze and i == config.freeze_at > 0:
                freeze_sharded(root, config.freeze)
            if temperature is not None and config.soft is not None:
                temperature.fill_(config.soft.temperature(i, config.steps))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * config.rate(i)
            torch.manual_seed(hash((config.seed, i, ranks.rank)) % 2**63)
            optimizer.zero_grad(set_to_none=True)
            found: list[Tensor] = []
            for rows in order[i]:
                with precision:
                    loss, parts = root(tokens[rows].to(device))
                (loss / config.grad_accum).backward()
                found.append(torch.stack([loss.detach().float(), *(p.float() for p in parts.values())]))
            if config.max_grad_norm:
                nn.utils.clip_grad_norm_([p for p in student.parameters() if p.grad is not None], config.max_grad_norm)
            told = torch.cat([torch.stack(found).mean(0), torch.tensor([float(interrupted.set)], device=device)])
            ranks.mean([told])
            *values, stop = told.tolist()
            row = {
                "step": i + 1,
                **dict(zip(["loss", *parts], values, strict=True)),
                "lr": optimizer.param_groups[0]["lr"],
            }
            if not all(abs(v) < float("inf") for v in values):
                raise FloatingPointError(
                    f"the loss is {values[0]} at step {i + 1}; lower lr={config.lr} or scale_lr={config.scale_lr}"
                )
            optimizer.step()
            history.append(row)
            if on_log is not None and ranks.rank == 0:
                on_log({**row, "seconds": time.monotonic() - began})
            if stop or (i + 1) % config.save_steps == 0 or i + 1 == config.steps:
                _save(work_dir, root, optimizer, history, ranks)
            if stop and i + 1 < config.steps:
                raise Interrupted(i + 1)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_disable()
    optimizer.zero_grad(set_to_none=True)
    return Sharded(history, root, empty)


def _fp32(config: KDConfig) -> KDConfig:
    """The shards are the master copies, whatever is gathered from them."""
    from dataclasses import replace

    return replace(config, weights="fp32")


def _open(work_dir: Path, run: dict[str, Any], resume: bool, ranks: Ranks) -> Path | None:
    """Claim the folder; the first process decides, the others follow it into its error."""
    told: list[Any] = [None, None]
    if ranks.rank == 0:
        try:
            last = disk.open_run(work_dir, run, resume)
            if last is not None and not (last / TENSORS).is_dir():
                raise ValueError(f"{last} was written by training in one process; go on in one, without a launcher")
            told = [None if last is None else str(last), None]
        except (ValueError, OSError) as error:
            told = [None, error]
    dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise told[1]
    return None if told[0] is None else Path(told[0])


# ------------------------------------------------------------------------------------------------ checkpoints


def _tensors(root: ShardedLoss, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds: ``model.NAME``, and ``optimizer.NAME.STATE`` of each parameter that has moved."""
    found: dict[str, Tensor] = {}
    for name, p in root.student.named_parameters():
        found[f"model.{name}"] = p.detach()
        for key, t in optimizer.state.get(p, {}).items():
            found[f"optimizer.{name}.{key}"] = t
    for name, m in root.student.named_modules():
        if isinstance(m, FakeQuantLinear) and m.frozen:
            kept = {"frozen_scale": m.frozen_scale, "frozen_zero": m.frozen_zero}
            found |= {f"model.{name}.{own}": t for own, t in kept.items() if t is not None}
    return found


def _save(
    work_dir: Path, root: ShardedLoss, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]], ranks: Ranks
) -> None:
    """Write ``checkpoint-N``, complete or not at all."""
    partial = work_dir / f"checkpoint-{len(history)}.partial"
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / TENSORS).mkdir(parents=True)
    ranks.wait()
    names = {id(p): name for name, p in root.student.named_parameters()}
    writer = HuggingFaceStorageWriter(str(partial / TENSORS), save_distributed=True)
    dcp.save(_tensors(root, optimizer), storage_writer=writer)
    ranks.wait()
    if ranks.rank == 0:
        state = {
            "step": len(history),
            "processes": ranks.size,
            "frozen": [n for n, m in root.student.named_modules() if isinstance(m, FakeQuantLinear) and m.frozen],
            "moved": [names[id(p)] for p, entry in optimizer.state.items() if entry],
            "history": history,
        }
        (partial / "state.json").write_text(json.dumps(state))
        disk.publish(work_dir, partial, len(history))
    ranks.wait()


def _load(checkpoint: Path, root: ShardedLoss, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Put a checkpoint into a student that has just been sharded; returns the history."""
    state = disk.read_state(checkpoint)
    mark_frozen(root, state["frozen"])
    parameters = dict(root.student.named_parameters())
    for name in state["moved"]:
        p = parameters[name]
        step = torch.zeros((), device=p.device if optimizer.defaults["fused"] else "cpu")
        moments = {key: torch.zeros_like(p, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": step, **moments}
    dcp.load(_tensors(root, optimizer), storage_reader=HuggingFaceStorageReader(str(checkpoint / TENSORS)))
    return state["history"]
