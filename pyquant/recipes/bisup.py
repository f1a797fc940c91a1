"""Weight-activation quantization by round to nearest, Atom or QuaRot, with or without BiSup's vertical parts.

BiSup (arXiv 2405.15346) suppresses the errors that pile up through the layers of a token by training a few parameters of
each block on little data: clipping, smoothing and a low-rank compensation (:mod:`pyquant.recipes.bisup_parts`). Only its
abstract and short accounts were at hand, so what follows is our reading and every choice is a field of :class:`BiSup`.
Block by block, on the hidden states x^q that the finished blocks before produce::

    min  | F_b(x^fp) - F^_b(x^q) |^2  +  | F_b(x^q) - F^_b(x^q) |^2         (target "both"; each relative to its signal)

=========  =============================================================================================================
host       what a block computes
=========  =============================================================================================================
``rtn``    weights and inputs rounded to nearest in groups
``atom``   besides, the input channels with the most energy have 8 bits, with their columns; clips 0.9 and 0.85
           (after Atom, arXiv 2310.19102, without its GPTQ)
``quarot`` the rotated model (:mod:`pyquant.recipes.rotate`; after QuaRot, arXiv 2404.00456, without its GPTQ)
=========  =============================================================================================================
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.recipes.act_linear import ActLinear, Inputs
from pyquant.recipes.bisup_open import Opened, put
from pyquant.recipes.bisup_settings import HOSTS, PARTS, BiSup
from pyquant.recipes.blocks import block_arguments, find_blocks, logits_of
from pyquant.recipes.blockwise import Keeper
from pyquant.recipes.objective import Objective
from pyquant.recipes.ranks import Ranks
from pyquant.recipes.rotate import Rotated, rotate
from pyquant.recipes.settings import Settings
from pyquant.recipes.streams import FullPrecision, InMemory, advance, deterministic, embedded, precision
from pyquant.recipes.train_window import rates, schedule, train

__all__ = ["HOSTS", "PARTS", "BiSup", "Opened", "Quantized", "bisup"]


@dataclass
class Quantized:
    """What :func:`bisup` made.

    Attributes:
        model: its layers are :class:`~pyquant.recipes.act_linear.ActLinear`.
        reference: the full-precision model that it approximates block by block: the given one, or its rotated copy.
        rows: one for each block, ``{"blocks", "steps", "before", "best", "last", "failed", "smooth_alpha", "seconds"}``.
        notes: caveats, in sentences.
    """

    model: nn.Module
    reference: nn.Module
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def bisup(
    model: nn.Module,
    tokens: Tensor,
    spec: QuantSpec,
    settings: BiSup | None = None,
    chosen: Iterable[str] | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    keeper: Keeper | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Quantized:
    """Quantize weights and inputs of the linear layers of a decoder's blocks; the model is left as it is.

    Args:
        model: a decoder called as ``model(tokens)``, in fp32, in eval mode, on the device to compute on. Its parameters stop
            requiring gradients.
        tokens: calibration windows, int64 ``[n, S]``; a rest that fills no batch is dropped. Over the processes of
            torch.distributed every one is given all windows and works on its share of each batch
            (:class:`~pyquant.recipes.ranks.Ranks`); all end with the same model, that of one process up to the order of sums.
        spec: bits and group size of weights; symmetric.
        settings: see :class:`BiSup`.
        chosen: full names of the layers to quantize; by default all linear layers of the blocks.
        scale_dtype: what scales and norms are stored in.
        keeper: keeps finished blocks; those it has are not trained again, and the result is the same bit by bit.
        on_progress: told (steps done, steps, note).

    Raises:
        ValueError: an asymmetric spec, a model without blocks to walk or that does not rotate, fewer windows than a batch,
            NaN inputs, or a batch that does not divide by the processes.
    """
    how = settings or BiSup()
    if not spec.symmetric:
        raise ValueError("weights of a weight-activation recipe are symmetric; asymmetric ones belong to blockwise")
    batch, ranks = how.batch_size, Ranks()
    if batch % ranks.size:
        raise ValueError(f"batch_size={batch} must be a multiple of the {ranks.size} processes")
    if len(tokens) < batch:
        raise ValueError(f"{len(tokens)} calibration windows do not fill one batch of {batch}")
    model.requires_grad_(False)
    device = next(model.parameters()).device
    tokens = tokens[: len(tokens) - len(tokens) % batch]
    reference = model
    if how.host == "quarot":
        reference = copy.deepcopy(model)
        rotate(reference, tokens[:1].to(device), how.seed, how.online)
    result = Quantized(copy.deepcopy(reference), reference)
    with deterministic(device):
        mine = ranks.share(tokens, batch).to(device)
        _all_blocks(result, mine, spec, how, chosen, scale_dtype, keeper, on_progress, ranks)
    return result


def _all_blocks(
    result: Quantized,
    tokens: Tensor,
    spec: QuantSpec,
    how: BiSup,
    chosen: Iterable[str] | None,
    scale_dtype: torch.dtype,
    keeper: Keeper | None,
    on_progress: Callable[[int, int, str], None] | None,
    ranks: Ranks,
) -> None:
    reference, batch = result.reference, how.batch_size // ranks.size
    root, skeleton = find_blocks(reference)
    _, finished = find_blocks(result.model)
    names = None if chosen is None else set(chosen)
    source = InMemory(skeleton)
    context = precision(tokens.device, how.autocast)
    with context():
        _, arguments = block_arguments(reference, skeleton, tokens[:batch])
    fp = FullPrecision(source, arguments, batch, context)
    fp.begin(embedded(reference, skeleton, tokens, batch, "device", None, context))
    x = fp.at(0).copy()
    total, logits = how.steps * len(source), partial(logits_of, reference, skeleton)
    for b in range(len(source)):
        block = source.fetch(b)
        own = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        layers = {n: m for n, m in own.items() if names is None or f"{root}.{b}.{n}" in names}
        saved = keeper.load(b) if keeper is not None else None
        if saved is not None:
            tensors, row = saved
            _restore(block, layers, tensors, spec, how, tokens.device)
        else:
            began = time.perf_counter()
            opened = Opened(block, layers, spec, how, scale_dtype, b, ranks)
            opened.begin(x.rows, len(x), batch, arguments[b], fp, context)
            row = {"blocks": [b, b], "steps": 0, "smooth_alpha": opened.alpha}
            if how.steps and opened.parameters():
                settings = Settings(target=how.target, steps=how.steps, batch_size=batch, keep_best=how.keep_best)
                objective = Objective(settings, range(b, b + 1), 0, {b: block}, b, x, fp, logits, ranks)
                tell = partial(_tell, on_progress, b * how.steps, total, f"block {b}")
                row |= {"steps": how.steps} | _train(opened, objective, len(x), how, b, tell, ranks)
            opened.finish()
            row["seconds"] = time.perf_counter() - began
            if keeper is not None and ranks.rank == 0:
                keeper.save(b, {n: t.detach() for n, t in block.state_dict().items()}, row)
        if row.get("failed"):
            result.notes.append(f"Training of block {b} met NaN; the last good state is kept.")
        result.rows.append(row)
        finished[b] = block
        if b < len(source) - 1:
            advance(block, arguments[b], x, x, batch, context)
            fp.at(b + 1)
        fp.forget(b + 1)
        _tell(
            on_progress,
            0,
            total,
            f"block {b}" + (f", loss {row['best']:.4g}" if row["steps"] else ""),
            (b + 1) * how.steps,
        )


def _tell(say: Callable[[int, int, str], None] | None, base: int, total: int, note: str, done: int) -> None:
    if say is not None:
        say(base + done, total, note)


def _train(
    opened: Opened,
    objective: Objective,
    own: int,
    how: BiSup,
    index: int,
    tell: Callable[[int], None],
    ranks: Ranks,
) -> dict[str, Any]:
    batch, count = how.batch_size, own * ranks.size
    pairs = opened.parameters()
    rows = count // batch
    held = max(1, rows // 16) if rows >= 4 else 0
    order = schedule(count, batch, how.steps, how.seed * 1000 + index, held * batch)
    probe = torch.arange(max(1, held) * batch).view(-1, batch)
    where, device = objective.sources[0].index_device(), pairs[0][0].device
    outcome = train(
        [p.requires_grad_(True) for p, _ in pairs],
        [rate for _, rate in pairs],
        objective.loss,
        objective.feed,
        lambda: None,
        ranks.local_index(order, batch).to(where),
        ranks.local_index(probe, batch).to(where),
        rates(how.steps, 1.0, "adamw", round(how.warmup * how.steps)).to(device),
        "adamw",
        how.keep_best,
        ranks.mean if ranks.size > 1 else None,
        how.graphs,
        tell,
    )
    for p, _ in pairs:
        p.requires_grad_(False)
    return asdict(outcome)


def _restore(
    block: nn.Module,
    layers: dict[str, nn.Linear],
    tensors: dict[str, Tensor],
    spec: QuantSpec,
    how: BiSup,
    device: torch.device,
) -> None:
    """The finished block of its tensors."""
    group = spec.group_size if how.act_group is None else how.act_group
    for name, layer in layers.items():
        outliers = tensors.get(f"{name}.inputs.outliers")
        inputs = Inputs(how.act_bits, group, 1.0, outliers, how.outlier_bits, isinstance(layer, Rotated))
        scale = torch.empty_like(tensors[f"{name}.scale"])
        put(block, name, ActLinear(layer.weight.detach(), scale, layer.bias, inputs).to(device).train(False))
    block.load_state_dict(tensors)
