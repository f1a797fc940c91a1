"""The KD-QAT step of :mod:`benchmarks.several_gpus`: on one GPU, and on all of a host by three ways of spreading it.

Every way has the same precision and the same states, those of :mod:`benchmarks.qat_large`: bf16 weights, gradients and moments,
fp32 scales, a bf16 teacher that is whole on every GPU. Each GPU takes one sequence a step, so the global batch grows with
the number of GPUs; ``one, all windows`` is one GPU that takes the same windows one after the other, for the losses and for the
time of the same global batch. Losses of the captured ways are those of the steps after the capture, which moves nothing.

==================  ====================================================================================================
one                 one GPU, kernel by kernel; ``one, teacher captured``: the teacher's pass one CUDA graph;
                    ``one, captured``: the whole step one graph
fsdp                :func:`pyquant.recipes.sharding.shard` as the recipe calls it: everything sharded, blocks gathered in
                    forward and again in backward, gradients reduced in fp32
fsdp, gathered      ``keep_gathered``, gradients reduced in bf16, all blocks gathered while the (captured) teacher computes
replicas            :class:`pyquant.recipes.replicas.Averaging`: whole students, gradients summed during backward
replicas, captured  the same with all its sums as one CUDA graph
==================  ====================================================================================================
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from benchmarks.qat_large import captured, make_optimizer, timed
from pyquant.formats.spec import QuantSpec
from pyquant.recipes.blocks import find_blocks
from pyquant.recipes.clip import clip_gradients
from pyquant.recipes.kd_loss import Distillation, KDLoss, Seen
from pyquant.recipes.kd_qat import parameter_groups, set_up
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.replicas import Averaging
from pyquant.recipes.sharding import shard

ONE = ("one", "one, all windows", "one, teacher captured", "one, captured")
MANY = ("fsdp", "fsdp, gathered", "replicas", "replicas, captured")
LIKE = {  # what a way of several GPUs is compared with
    "fsdp": "one", "fsdp, gathered": "one, teacher captured", "replicas": "one", "replicas, captured": "one, captured",
}  # fmt: skip

Step = Callable[[Tensor], Tensor]


def configuration(way: str, length: int) -> KDConfig:
    """Rates large enough that a lost update shows in the next loss: bf16 rounds moves of 1e-6 away."""
    return KDConfig(
        loss=KDLoss(), lr=1e-4, scale_lr=1e-4, seq_len=length, weights="bf16", rule="minmax",
        keep_gathered=way == "fsdp, gathered",
    )  # fmt: skip


def teaching(objective: Distillation, ids: Tensor) -> Callable[[Tensor], Seen | None]:
    """The teacher's pass as one CUDA graph (on a CPU as it is)."""
    if ids.device.type != "cuda":
        return objective.teach
    held, side = ids.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        objective.teach(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        seen = objective.teach(held)

    def run(given: Tensor) -> Seen | None:
        held.copy_(given)
        graph.replay()
        return seen

    return run


def whole_step(way: str, objective: Distillation, config: KDConfig, ids: Tensor, large: int) -> Step:
    """A step of a student that is whole on this GPU; ``ids`` ``[windows, length]``, taken one after the other."""
    device = ids.device.type
    several, capture = way.startswith("replicas"), way.endswith("captured") and "teacher" not in way
    groups = parameter_groups(objective.student, config.lr, config.scale_lr)
    optimizer = make_optimizer(groups, "bf16", device, capture and device == "cuda")
    params = [p for p in objective.student.parameters() if p.requires_grad]
    averaging = Averaging(params, large=large) if several else None
    teach = teaching(objective, ids[:1]) if "teacher" in way else objective.teach

    def step(ids: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for one in ids.split(1):
            loss, _ = objective(one, one, teach(one))
            losses.append(loss.detach())
            (loss / (averaging.size if averaging else len(ids))).backward()
        if averaging:
            averaging.finish()
        clip_gradients(params, config.max_grad_norm)
        optimizer.step()
        return torch.stack(losses).mean()

    if not capture or device != "cuda":
        return step
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:  # what runs before the capture moves nothing
        group["lr"] = torch.zeros((), device=device)
    run = captured(step, ids, 2, "thread_local")
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"].fill_(rate)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    return run


def sharded_step(objective: Distillation, config: KDConfig, ids: Tensor) -> Step:
    """A step of a sharded student. The optimizer and the clipping see plain tensors, this process' rows: each of their calls
    on hundreds of DTensors would cost the host more than its kernels take."""
    device = ids.device.type
    reduce_dtype = torch.bfloat16 if config.keep_gathered else torch.float32
    root = shard(objective, config, init_device_mesh(device, (dist.get_world_size(),)), reduce_dtype)
    names: Any = parameter_groups(objective.student, config.lr, config.scale_lr)
    pairs: list[tuple[Tensor, Tensor]] = []
    for group in names:
        rows = [nn.Parameter(p.detach().to_local() if isinstance(p, DTensor) else p.detach()) for p in group["params"]]
        pairs += zip(rows, group["params"], strict=True)
        group["params"] = rows
    optimizer = make_optimizer(names, "bf16", device)
    teach = teaching(objective, ids[:1]) if config.keep_gathered else None
    held = [m for block in find_blocks(objective.student)[1] for m in block.modules() if isinstance(m, FSDPModule)]
    done = 0

    def step(ids: Tensor) -> Tensor:
        nonlocal done
        for rows, p in pairs:
            rows.grad, p.grad = None, None
        if teach is not None and done:  # the first pass finds the root
            for m in held:
                m.unshard(async_op=True)
        done += 1
        loss, _ = root(ids, None if teach is None else teach(ids))
        loss.backward()
        for rows, p in pairs:
            rows.grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        clip_rows([rows for rows, _ in pairs], config.max_grad_norm)
        optimizer.step()
        return loss.detach()

    return step


@torch.no_grad()
def clip_rows(rows: list[Tensor], most: float) -> None:
    """:func:`pyquant.recipes.clip.clip_gradients` of rows that are spread over all processes."""
    grads = [p.grad for p in rows if p.grad is not None]
    square = nn.utils.get_total_norm(grads).float().square()
    dist.all_reduce(square)
    factor = (most / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for dtype in {g.dtype for g in grads}:
        torch._foreach_mul_([g for g in grads if g.dtype == dtype], factor.to(dtype))


def train(way: str, teacher: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """One row: milliseconds a step, tokens a second of all GPUs together, GPU memory, the first losses."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), args.device
    free(device)
    config = configuration(way, args.length)
    vocabulary = teacher.config.vocab_size  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(1)
    batches = torch.randint(0, vocabulary, (args.first + args.steps, size, args.length), generator=draw).to(device)
    if way != "one, all windows":
        batches = batches[:, rank : rank + 1]
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    set_up(student, config, QuantSpec(4, args.group_size))
    objective = Distillation(student, teacher, config.loss)
    if way.startswith("fsdp"):
        step = sharded_step(objective, config, batches[0])
    else:
        step = whole_step(way, objective, config, batches[0], args.large)
    first = [step(ids) for ids in batches[: args.first]]
    dist.barrier()
    milliseconds, losses = timed(step, batches[args.first :], device)
    told = torch.stack([loss.double() for loss in [*first, *losses]])
    if way in MANY:
        dist.all_reduce(told)
        told /= size
    windows = size if way in MANY or way == "one, all windows" else 1
    row: dict[str, Any] = {
        "op": "kd_qat_step", "way": way, "gpus": size if way in MANY else 1, "windows": windows, "ms": milliseconds,
        "tokens_s": windows * args.length / milliseconds * 1000, "losses": told.tolist(), "fused_loss": objective.fused,
    }  # fmt: skip
    if device == "cuda":
        row |= {"allocated_gib": torch.cuda.max_memory_allocated() / 2**30}
        row |= {"reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
    return row


def free(device: str) -> None:
    """Give back what the way before held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
