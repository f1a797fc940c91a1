"""Tensor parallel inference: QLinear layers cut over the processes of torch.distributed.

Column-parallel layers (q, k, v, gate, up) keep an equal share of output features: rows of codes, scales, zeros and bias.
Row-parallel ones (o, down) keep a share of input features: columns of codes, and of scales and zeros the groups that cover
them, so a cut must fall between two groups (a single group for the whole row is kept by all). Their products are summed over
the processes. What is between two such layers, heads of attention and channels of the MLP, is never exchanged; so K and V, in
any cache, are those of this process' KV heads.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from pyquant.formats import int4
from pyquant.nn.linear import QLinear

COLUMN, ROW = "colwise", "rowwise"
# Names of today's decoders, as the parallel plans of transformers call them.
PLAN = {
    "*.q_proj": COLUMN, "*.k_proj": COLUMN, "*.v_proj": COLUMN, "*.o_proj": ROW,
    "*.gate_proj": COLUMN, "*.up_proj": COLUMN, "*.down_proj": ROW,
}  # fmt: skip


class RowQLinear(QLinear):
    """A share of the columns of a :class:`QLinear`; ``forward`` sums over the processes of ``group``."""

    group: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if dist.get_world_size(self.group) > 2:  # the sum of two is rounded once in any case
            y = y.float()
        dist.all_reduce(y, group=self.group)
        return y.to(x.dtype)


def why_uncut(layer: QLinear, how: str, size: int) -> str:
    """Why a layer cannot be cut into ``size`` equal parts, or ""."""
    n, k, group = layer.out_features, layer.in_features, layer.spec.group_size
    if how == COLUMN:
        return f"{n} output features do not divide by {size} processes" if n % size else ""
    if k % size:
        return f"{k} input features do not divide by {size} processes"
    if group != -1 and (k // size) % group:
        return f"{k} input features over {size} processes are {k // size} each, which cuts a group of {group}"
    if layer.act is not None and (layer.act.group_size == -1 or (k // size) % layer.act.group_size):
        whole = "a whole token" if layer.act.group_size == -1 else f"groups of {layer.act.group_size}"
        return f"its inputs are quantized by {whole}, and {k // size} of its {k} input features are on each process"
    return ""


@torch.no_grad()
def cut(layer: QLinear, how: str, rank: int, size: int, group: Any = None) -> QLinear:
    """One process' share of a layer.

    Args:
        layer: the whole layer; not changed.
        how: ``colwise`` or ``rowwise``.
        rank, size: which part of how many.
        group: processes that a row-parallel layer sums over; None is all.

    Raises:
        ValueError: an unknown ``how``, or a cut that does not divide the layer or falls inside a group.
    """
    if how not in (COLUMN, ROW):
        raise ValueError(f"how={how!r} must be {COLUMN} or {ROW}")
    if why := why_uncut(layer, how, size):
        raise ValueError(f"{layer}: {why}")
    n, k, g = layer.out_features, layer.in_features, layer.spec.group_size
    codes = int4.untile_codes(layer.qweight, n, k)
    scale = int4.untile_scale(layer.scale, n, k, g)
    zero = None if layer.zero is None else int4.untile_scale(layer.zero, n, k, g)
    bias = layer.bias
    if how == COLUMN:
        n //= size
        codes, scale = codes[rank * n :][:n], scale[rank * n :][:n]
        zero, bias = (None if t is None else t[rank * n :][:n] for t in (zero, bias))
        kind: type[QLinear] = QLinear
    else:
        k //= size
        codes = codes[:, rank * k :][:, :k]
        if g != -1:
            scale = scale[:, rank * k // g :][:, : k // g]
            zero = None if zero is None else zero[:, rank * k // g :][:, : k // g]
        if bias is not None and rank:
            bias = torch.zeros_like(bias)  # added once
        kind = RowQLinear
    made = kind(k, n, bias is not None, layer.spec, "meta", layer.scale.dtype, layer.act)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    made._set_tiled(
        int4.tile_codes(codes.contiguous()), scale.contiguous(), None if zero is None else zero.contiguous()
    )
    if isinstance(made, RowQLinear):
        made.group = group
    return made.train(layer.training)


def parallelize(
    model: nn.Module, rank: int, size: int, plan: dict[str, str] | None = None, group: Any = None
) -> list[str]:
    """Cut the QLinear layers of a decoder, in place; embeddings, norms and head stay whole.

    Args:
        model: with :class:`QLinear` layers; its attention reads the number of heads from what the projections give it, as
            that of Llama, Qwen and Mistral does.
        rank, size: of this process.
        plan: pattern of full names -> ``colwise`` or ``rowwise``; :data:`PLAN` by default.
        group: processes to sum over; None is all.

    Returns:
        the names of the layers that were cut.

    Raises:
        ValueError: KV heads that do not divide, a layer that cannot be cut (named), or none that the plan names; nothing
            was changed.
    """
    config: Any = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads and heads % size:
            raise ValueError(f"{name}={heads} do not divide by {size} processes")
    layers: dict[str, tuple[QLinear, str]] = {}
    for name, m in model.named_modules():
        how = next((h for pattern, h in (plan or PLAN).items() if fnmatch.fnmatchcase(name, pattern)), None)
        if how is None:
            continue
        if not isinstance(m, QLinear):
            raise ValueError(f"{name} is a {type(m).__name__} and not quantized; the plan cuts QLinear layers")
        if why := why_uncut(m, how, size):
            raise ValueError(f"{name}: {why}")
        layers[name] = m, how
    if not layers:
        raise ValueError(f"the plan names no layer of {type(model).__name__}: {', '.join(plan or PLAN)}")
    for name, (layer, how) in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, cut(layer, how, rank, size, group))
    return list(layers)
