"""A student spread over the processes of torch.distributed: FSDP2 (``torch.distributed.fsdp.fully_shard``) around training.

Each process keeps the same share of rows of every parameter, of its gradient and of the optimizer's state, as DTensors.
A block's parameters are gathered when its forward begins and let go when it ends, and again in backward. So a quantizer
sees whole plain tensors: it and its weight lie in one block, and whatever it computes is what it computes in one process.

* **Scales are sharded like weights**, by rows: a row of ``[N, K/G]`` lies where its weights lie, freezing and gathering
  need nothing but the process' own rows, and memory falls with the number of processes. Replicated ones would take
  ``16 / G`` bytes a weight with their Adam state, 0.125 at 128 columns a group: 9 GB a GPU at 70 billion weights.
* **fp32 weights** (with or without autocast) are gathered as fp32. With ``weights="bf16"`` the shards are the fp32 master
  copies, what is gathered is bf16, and gradients are summed over processes and passes in fp32; the scales stay fp32 and so
  form a group of their own in each block.
* **Embeddings, final norm and head** belong to the root, which is the loss: inside its forward the head's weight is whole,
  as ``distill_loss`` needs it.
* **The teacher** is whole on each process, or its blocks are sharded too; its embeddings and head stay whole.
* **Gradients are reduced in every pass** of an accumulated step, so that they never exist as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from pyquant.nn.linear import FakeQuantLinear, QLinear
from pyquant.nn.swap import SwapReport, matches
from pyquant.quantizers import Quantizer
from pyquant.recipes.blocks import find_blocks
from pyquant.recipes.kd_loss import Distillation, Seen
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.vocabulary import EIGHT, bake_vocabulary


class ShardedLoss(nn.Module):
    """The loss of a batch as a module, the root of what is sharded.

    ``forward(ids, taught)``: tokens int64 ``[B, T]`` to (loss, parts), as :class:`~pyquant.recipes.kd_loss.Distillation`.
    """

    def __init__(self, objective: Distillation) -> None:
        super().__init__()
        self.objective = objective
        self.student, self.teacher = objective.student, objective.teacher

    def forward(self, ids: Tensor, taught: Seen | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(ids, ids, taught)


def check_shardable(config: KDConfig, processes: int) -> None:
    """Refuse what does not work over several processes.

    Raises:
        ValueError: with the setting.
    """
    if config.batch_size % processes:
        raise ValueError(
            f"batch_size={config.batch_size} is that of all processes together and must be a multiple of their number, "
            f"{processes}"
        )
    if config.reuse_fake_quant and config.grad_accum > 1:
        raise ValueError(
            "reuse_fake_quant keeps quantized weights between passes, which sharded training gathers anew in each; leave it off"
        )
    if config.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(
            f"optim={config.optim!r} does not work on sharded weights; adamw_torch and adamw_torch_fused do"
        )


def skeleton(student: nn.Module) -> nn.Module:
    """A copy of a model whose parameters have shapes only (on the meta device); buffers are copied."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in student.parameters()}
    return copy.deepcopy(student, memo)


def shard(
    objective: Distillation, config: KDConfig, mesh: DeviceMesh, reduce_dtype: torch.dtype = torch.float32
) -> ShardedLoss:
    """Shard a prepared student (after :func:`~pyquant.recipes.kd_qat.set_up`), in place.

    Args:
        objective: of the whole student, in fp32, and a teacher that is on its device.
        config: of the run; ``shard_teacher`` shards the teacher's blocks, ``keep_gathered`` gathers the student's once a
            pass instead of twice.
        mesh: one-dimensional; parameters move to its devices, block by block.
        reduce_dtype: what gradients are summed over processes in, where ``config.weights`` is ``bf16``.

    Returns:
        the loss, to be called with this process' windows; its gradients are means over the processes.
    """
    root = ShardedLoss(objective)
    student, teacher = objective.student, objective.teacher
    policy = MixedPrecisionPolicy()
    if config.weights == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        inside = {id(m) for modules in _blocks(student) for _, m in modules}
        for modules in [*_blocks(student), [(n, m) for n, m in student.named_modules() if id(m) not in inside]]:
            _shard_scales(modules, config, mesh)
    for block in find_blocks(student)[1]:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not config.keep_gathered)
    whole: set[nn.Parameter] = set()
    if teacher is not None:
        if config.shard_teacher:
            for block in find_blocks(teacher)[1]:
                fully_shard(block, mesh=mesh)
        whole = {p for p in teacher.parameters() if not isinstance(p, DTensor)}
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=whole)
    return root


def _blocks(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """The modules of each block with their full names."""
    name, blocks = find_blocks(model)
    return [[(f"{name}.{i}.{n}", m) for n, m in block.named_modules()] for i, block in enumerate(blocks)]


def _shard_scales(modules: list[tuple[str, nn.Module]], config: KDConfig, mesh: DeviceMesh) -> None:
    """Groups of learned ranges, which keep their fp32: one for all that are always used together, one for each that stops
    being used when its layer is frozen later."""
    together: list[nn.Module] = []
    for name, layer in modules:
        if (
            not isinstance(layer, FakeQuantLinear)
            or layer.frozen
            or not any(True for _ in layer.quantizer.parameters())
        ):
            continue
        if config.freeze and matches(name, config.freeze):
            fully_shard(layer.quantizer, mesh=mesh, reshard_after_forward=not config.keep_gathered)
        else:
            together.append(layer.quantizer)
    if together:
        fully_shard(together, mesh=mesh, reshard_after_forward=not config.keep_gathered)


# ------------------------------------------------------------------------------------------------ rows of this process


@contextmanager
def own_rows(module: nn.Module) -> Iterator[None]:
    """Inside, the sharded parameters of a module are plain tensors with this process' rows; changes in place stay."""
    kept = [(m, own, p) for m in module.modules() for own, p in m._parameters.items() if isinstance(p, DTensor)]
    for m, own, p in kept:
        m._parameters[own] = nn.Parameter(p.detach().to_local(), p.requires_grad)
    try:
        yield
    finally:
        for m, own, p in kept:
            p.requires_grad_(m._parameters[own].requires_grad)  # type: ignore[union-attr]
            m._parameters[own] = p


@torch.no_grad()
def freeze_sharded(root: ShardedLoss, patterns: Iterable[str], scale_dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """:func:`pyquant.recipes.kd_qat.freeze` of a sharded student: every row is snapped where it lies. The frozen ranges
    become whole on every process.

    Returns:
        the names of the frozen layers.
    """
    patterns = list(patterns)
    chosen = [
        (name, m)
        for name, m in root.student.named_modules()
        if isinstance(m, FakeQuantLinear) and not m.frozen and matches(name, patterns)
    ]
    for _, layer in chosen:
        _freeze_rows(layer, scale_dtype, snap=True)
    _stop_gradients(root, [layer for _, layer in chosen])
    return [name for name, _ in chosen]


def mark_frozen(root: ShardedLoss, names: Iterable[str]) -> None:
    """Make layers of a student that has just been sharded frozen, but for their values, which are loaded then."""
    for name in names:
        layer = root.student.get_submodule(name)
        assert isinstance(layer, FakeQuantLinear)
        if not layer.frozen:
            _freeze_rows(layer, torch.float32, snap=False)


def _freeze_rows(layer: FakeQuantLinear, scale_dtype: torch.dtype, snap: bool) -> None:
    like = layer.weight
    with own_rows(layer):
        layer.freeze(scale_dtype, snap)
    assert isinstance(like, DTensor)
    for own in ("frozen_scale", "frozen_zero"):
        layer.register_buffer(own, _whole_rows(getattr(layer, own), like))


def _whole_rows(rows: Tensor | None, like: DTensor) -> Tensor | None:
    """All rows ``[N, ..]`` from those of each process, cut as ``like`` is."""
    if rows is None:
        return None
    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    spread = DTensor.from_local(
        rows.contiguous(), like.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    return spread.full_tensor()


def _stop_gradients(root: ShardedLoss, layers: list[FakeQuantLinear]) -> None:
    """The gathered tensors remember whether they wanted gradients: tell them too."""
    blocks = find_blocks(root.student)[1]
    holders = {id(m): block for block in blocks for m in block.modules()}
    for holder in {id(h): h for h in (holders.get(id(layer), root) for layer in layers)}.values():
        assert isinstance(holder, FSDPModule)
        holder.unshard()
        for layer in layers:
            if holders.get(id(layer), root) is holder:
                layer.requires_grad_(False)
        holder.reshard()
    for layer in layers:
        layer.requires_grad_(False)


# ------------------------------------------------------------------------------------------------ the end


@torch.no_grad()
def gather(
    root: ShardedLoss, empty: nn.Module | None, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module | None, SwapReport | None]:
    """The deployed model from a sharded one, as :func:`pyquant.recipes.kd_qat.convert` makes it, tensor by tensor: a whole
    weight exists only while its codes are found.

    Args:
        root: the trained student's loss. All processes call this together.
        empty: :func:`skeleton` of the prepared student on the process that wants the model, None on the others.
        scale_dtype: what will be stored.

    Returns:
        (model, report) where ``empty`` was given, on the device of the shards; (None, None) elsewhere.

    Raises:
        ValueError: a tensor went NaN or Inf, on every process.
    """
    student = root.student
    for m in root.modules():
        if isinstance(m, FSDPModule):
            m.reshard()
    ranges = {id(p) for m in student.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    report = SwapReport(total=sum(p.numel() for p in student.parameters() if id(p) not in ranges))
    placed: dict[int, nn.Parameter | None] = {}
    done: set[int] = set()

    def fill(name: str, module: nn.Module) -> None:
        """Put the whole parameters of one module into the skeleton; tied ones are gathered once."""
        done.add(id(module))
        for own, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in placed:
                full = p.full_tensor() if isinstance(p, DTensor) else p.detach()
                if not torch.isfinite(full).all():
                    raise ValueError(f"{name}.{own} has NaN or Inf values after training; nothing was converted")
                placed[id(p)] = None if empty is None else nn.Parameter(full, p.requires_grad)
            if empty is not None:
                empty.get_submodule(name)._parameters[own] = placed[id(p)]

    for name, module in student.named_modules():
        if id(module) in done:
            continue
        if not isinstance(module, FakeQuantLinear):
            fill(name, module)
            continue
        for part, m in module.named_modules():
            fill(f"{name}.{part}".rstrip("."), m)
        if module.quantizer.spec == EIGHT:
            continue
        if empty is not None:
            layer = empty.get_submodule(name)
            assert isinstance(layer, FakeQuantLinear)
            if module.frozen:
                layer.frozen = True
                layer.register_buffer("frozen_scale", module.frozen_scale)
                layer.register_buffer("frozen_zero", module.frozen_zero)
            parent, _, last = name.rpartition(".")
            setattr(empty.get_submodule(parent), last, QLinear.from_fake_quant(layer, scale_dtype))
        for p in module.parameters():
            placed.pop(id(p), None)
        report.changed.append(name)
        report.quantized += module.weight.numel()
    if empty is None:
        return None, None
    bake_vocabulary(empty, scale_dtype)
    for p in empty.parameters():
        p.copy_(p.to(scale_dtype))
    empty.to(next(empty.parameters()).device)
    report.kept = {name: "not prepared" for name, m in empty.named_modules() if isinstance(m, nn.Linear)}
    return empty, report
