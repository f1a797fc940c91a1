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
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.recipes.act_linear import ActLinear, Inputs, best_clip
from pyquant.recipes.awq import find_folds
from pyquant.recipes.bisup_parts import Smoothing, Trained, fold, fold_before
from pyquant.recipes.blocks import Arguments, block_arguments, call_block, find_blocks, logits_of, watch_inputs
from pyquant.recipes.blockwise import Keeper
from pyquant.recipes.objective import Objective
from pyquant.recipes.ranks import Ranks
from pyquant.recipes.rotate import Rotated, rotate
from pyquant.recipes.settings import Settings
from pyquant.recipes.streams import FullPrecision, InMemory, advance, deterministic, embedded, precision
from pyquant.recipes.train_window import rates, schedule, train

HOSTS: dict[str, tuple[float, float]] = {"rtn": (1.0, 1.0), "atom": (0.9, 0.85), "quarot": (1.0, 1.0)}  # default clips
PARTS = ("clip", "smooth", "low-rank")
ALPHAS = (0.25, 0.5, 0.75)  # of SmoothQuant's start, tried besides no smoothing
SAMPLE = 2048  # tokens that the clip of inputs is looked for on


@dataclass(frozen=True)
class BiSup:
    """A host and its vertical parts. All choices marked * are ours.

    Attributes:
        host: key of the table above.
        act_bits, act_group: of inputs, 2..8 (16: none); group None is the weights'.
        act_clip, weight_clip: factor of each group's largest magnitude; None is the host's.
        outliers: share of the channels that atom keeps in ``outlier_bits``, rounded up (128 of 4,096).
        outlier_bits: 8.
        online: of quarot: rotate the inputs of o_proj and down_proj. Without it the result is a plain checkpoint.
        parts: any of ``clip``, ``smooth``, ``low-rank``; none is the bare host.
        steps: gradient steps of each block*; 0 stops at the start of the parts.
        batch_size: windows a step*.
        lr_clip, lr_act_clip, lr_smooth, lr_low_rank: AdamW's rates*, linear to 0.
        warmup: share of the steps in which rates rise*.
        clip_start: ``mse``: ranges and clips begin where the squared error is smallest*; ``host``: at the host's.
        clip_most: largest ratio a learned clip begins with (sigmoid(4))*.
        act_clipping: whether the clip of inputs is learned too, one for all layers that read a tensor*.
        smooth_alpha: SmoothQuant's exponent of s0 (arXiv 2211.10438); None: the best on a batch of 0.25, 0.5, 0.75 and no
            smoothing*.
        smooth_reach: tau, how far log s may go from log s0*.
        rank, alpha: of the low-rank term ``alpha / sqrt(rank) B A``* (rank-stabilised, arXiv 2312.03732).
        target: see :class:`~pyquant.recipes.settings.Settings`.
        keep_best, seed, graphs, autocast: as there.

    Raises:
        ValueError: for values that cannot be.
    """

    host: str = "rtn"
    act_bits: int = 4
    act_group: int | None = None
    act_clip: float | None = None
    weight_clip: float | None = None
    outliers: float = 1 / 32
    outlier_bits: int = 8
    online: bool = True
    parts: tuple[str, ...] = PARTS
    steps: int = 320
    batch_size: int = 8
    lr_clip: float = 1e-2
    lr_act_clip: float = 1e-2
    lr_smooth: float = 5e-3
    lr_low_rank: float = 5e-4
    warmup: float = 0.1
    clip_start: str = "mse"
    clip_most: float = 1 / (1 + math.exp(-4))
    act_clipping: bool = True
    smooth_alpha: float | None = None
    smooth_reach: float = 1.0
    rank: int = 16
    alpha: float = 4.0
    target: str = "both"
    keep_best: bool = True
    seed: int = 0
    graphs: bool = True
    autocast: bool = True

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(what)

        object.__setattr__(self, "parts", tuple(self.parts))
        need(self.host in HOSTS, f"host={self.host!r} must be one of {', '.join(HOSTS)}")
        unknown = sorted(set(self.parts) - set(PARTS))
        need(not unknown, f"parts={', '.join(unknown)} unknown; known: {', '.join(PARTS)}")
        bits = self.act_bits
        need(bits == 16 or 2 <= bits <= 8, f"act_bits={bits} must be 16 (off) or between 2 and 8")
        need(self.clip_start in ("mse", "host"), f"clip_start={self.clip_start!r} must be mse or host")
        for name in ("act_clip", "weight_clip"):
            value = getattr(self, name)
            need(value is None or 0 < value <= 1, f"{name}={value} must be in (0, 1]")
        need(0 <= self.outliers < 1, f"outliers={self.outliers} must be in [0, 1)")
        need(0 <= self.warmup < 1, f"warmup={self.warmup} must be in [0, 1)")
        need(self.steps >= 0 and self.batch_size >= 1 and self.rank >= 1, "steps, batch_size and rank must be positive")
        need(self.smooth_reach > 0, f"smooth_reach={self.smooth_reach} must be positive")

    @property
    def clips(self) -> tuple[float, float]:
        """Of inputs and weights."""
        acts, weights = HOSTS[self.host]
        return self.act_clip or acts, self.weight_clip or weights


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
        tokens: calibration windows, int64 ``[n, S]``; a rest that fills no batch is dropped.
        spec: bits and group size of weights; symmetric.
        settings: see :class:`BiSup`.
        chosen: full names of the layers to quantize; by default all linear layers of the blocks.
        scale_dtype: what scales and norms are stored in.
        keeper: keeps finished blocks; those it has are not trained again, and the result is the same bit by bit.
        on_progress: told (steps done, steps, note).

    Raises:
        ValueError: an asymmetric spec, a model without blocks to walk or that does not rotate, fewer windows than a batch,
            NaN inputs.
    """
    how = settings or BiSup()
    if not spec.symmetric:
        raise ValueError("weights of a weight-activation recipe are symmetric; asymmetric ones belong to blockwise")
    batch = how.batch_size
    if len(tokens) < batch:
        raise ValueError(f"{len(tokens)} calibration windows do not fill one batch of {batch}")
    model.requires_grad_(False)
    device = next(model.parameters()).device
    tokens = tokens[: len(tokens) - len(tokens) % batch].to(device)
    reference = model
    if how.host == "quarot":
        reference = copy.deepcopy(model)
        rotate(reference, tokens[:1], how.seed, how.online)
    result = Quantized(copy.deepcopy(reference), reference)
    with deterministic(device):
        _all_blocks(result, tokens, spec, how, chosen, scale_dtype, keeper, on_progress)
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
) -> None:
    reference, batch = result.reference, how.batch_size
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
            opened = Opened(block, layers, spec, how, scale_dtype, b)
            opened.begin(x.rows, len(x), batch, arguments[b], fp, context)
            row = {"blocks": [b, b], "steps": 0, "smooth_alpha": opened.alpha}
            if how.steps and opened.parameters():
                settings = Settings(target=how.target, steps=how.steps, batch_size=batch, keep_best=how.keep_best)
                objective = Objective(settings, range(b, b + 1), 0, {b: block}, b, x, fp, logits, Ranks())
                tell = partial(_tell, on_progress, b * how.steps, total, f"block {b}")
                row |= {"steps": how.steps} | _train(opened, objective, len(x), how, b, tell)
            opened.finish()
            row["seconds"] = time.perf_counter() - began
            if keeper is not None:
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


class Opened:
    """A block in the form that is trained.

    Args:
        block: changed in place.
        layers: its layers to be quantized, by name.
        spec, how, scale_dtype: the format and the settings.
        index: of the block.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: dict[str, nn.Linear],
        spec: QuantSpec,
        how: BiSup,
        scale_dtype: torch.dtype,
        index: int,
    ) -> None:
        self.block, self.layers, self.spec, self.how = block, layers, spec, how
        self.scale_dtype, self.index = scale_dtype, index
        self.trained: dict[str, Trained] = {}
        self.smoothings: dict[str, Smoothing] = {}
        self.hook: Any = None
        self.alpha: float | None = None

    def begin(
        self,
        rows: Callable[[int, int], Tensor],
        count: int,
        batch: int,
        arguments: Arguments,
        fp: FullPrecision,
        context: Callable[[], Any],
    ) -> None:
        """Look at the inputs of the layers and put :class:`Trained` ones in their place.

        Raises:
            ValueError: NaN or infinite inputs or weights, with the layer.
        """
        how, layers = self.how, self.layers
        energy: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
        sample: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}

        def see(name: str, x: Tensor) -> None:
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            if name not in energy:
                energy[name], largest[name] = torch.zeros(flat.shape[1], device=flat.device), torch.zeros_like(flat[0])
                sample[name], tensors[name] = flat[:SAMPLE].clone(), x
            energy[name] += flat.square().sum(0)
            largest[name] = torch.maximum(largest[name], flat.abs().amax(0))

        with torch.no_grad(), context(), watch_inputs(layers, see):
            for i in range(0, count, batch):
                call_block(self.block, rows(i, batch), arguments)
        for name, layer in layers.items():
            if not torch.isfinite(energy[name]).all() or not torch.isfinite(layer.weight).all():
                raise ValueError(f"block {self.index}: {name} has NaN or infinite inputs or weights")

        def probe() -> Tensor:
            with torch.no_grad():
                return call_block(self.block, rows(0, batch)[:1], _first(arguments, batch))

        folds = find_folds(self.block, layers, probe) if "smooth" in how.parts else {}
        ratios: dict[int, nn.Parameter] = {}
        for producer, consumers in folds.items():
            module = self.block.get_submodule(producer)
            if isinstance(module, nn.Linear) and producer not in layers:
                continue
            ones = torch.ones_like(largest[consumers[0]])
            self.smoothings[producer] = Smoothing(module, ones, how.smooth_reach, self.scale_dtype)
        reads = {n: self.smoothings[p] for p, consumers in folds.items() if p in self.smoothings for n in consumers}
        acts, weights = how.clips
        group = self.spec.group_size if how.act_group is None else how.act_group
        for name, layer in layers.items():
            outliers = None
            if how.host == "atom" and how.outliers:
                top = energy[name].topk(math.ceil(how.outliers * layer.in_features)).indices
                outliers = torch.zeros(layer.in_features, dtype=torch.bool, device=top.device)
                outliers[top] = True
            inputs = Inputs(how.act_bits, group, acts, outliers, how.outlier_bits, isinstance(layer, Rotated))
            inputs = inputs.to(layer.weight.device)
            if "clip" in how.parts:
                if how.clip_start == "mse":
                    inputs.clip.fill_(best_clip(sample[name], inputs))
                if how.act_clipping and how.act_bits != 16:
                    begin = torch.logit(inputs.clip.clamp(max=how.clip_most))
                    shared = ratios.setdefault(id(tensors[name]), nn.Parameter(begin, requires_grad=False))
                    inputs.ratio = shared
            shape = (layer.out_features, self.spec.num_groups(layer.in_features))
            ratio = torch.full(shape, weights, device=layer.weight.device)
            new = Trained(layer, inputs, self.spec, self.scale_dtype, ratio, reads.get(name), self.smoothings.get(name))
            self.trained[name] = new
            _put(self.block, name, new.train(layer.training))
        self.hook = fold_before(self.block, self.smoothings)
        self._start(folds, largest, rows(0, batch), arguments, fp, context)

    def _start(
        self,
        folds: dict[str, list[str]],
        largest: dict[str, Tensor],
        x: Tensor,
        arguments: Arguments,
        fp: FullPrecision,
        context: Callable[[], Any],
    ) -> None:
        """Where smoothing, ranges and the low-rank term begin."""
        how = self.how
        clipped = "clip" in how.parts and how.clip_start == "mse"
        if clipped:
            for layer in self.trained.values():
                layer.find_ratio()
        if self.smoothings:
            with torch.no_grad(), context():
                wanted = call_block(fp.block(self.index), x, arguments).float()

            def error(alpha: float | None) -> float:
                self._smooth(folds, largest, alpha)
                with torch.no_grad(), context():
                    return float((call_block(self.block, x, arguments).float() - wanted).square().sum())

            tried = [how.smooth_alpha] if how.smooth_alpha is not None else [None, *ALPHAS]
            self.alpha = min(tried, key=error)
            self._smooth(folds, largest, self.alpha)
            if clipped:
                for layer in self.trained.values():
                    layer.find_ratio()
        for i, layer in enumerate(self.trained.values()):
            if "clip" in how.parts:
                layer.learn_clip(how.clip_most)
            if "low-rank" in how.parts:
                seed = (how.seed * 1000 + self.index) * 1000 + i
                layer.add_low_rank(how.rank, how.alpha / math.sqrt(how.rank), seed)

    def _smooth(self, folds: dict[str, list[str]], largest: dict[str, Tensor], alpha: float | None) -> None:
        for producer, smoothing in self.smoothings.items():
            if alpha is None:
                smoothing.s0.fill_(1)
                continue
            acts = largest[folds[producer][0]].clamp_min(1e-5)
            weights = torch.stack([self.trained[n].weight.float().abs().amax(0) for n in folds[producer]]).amax(0)
            s = acts.pow(alpha) / weights.clamp_min(1e-5).pow(1 - alpha)
            smoothing.s0.copy_(s / s.log().mean().exp())

    def parameters(self) -> list[tuple[nn.Parameter, float]]:
        """Everything that is trained, each once, with its learning rate."""
        how = self.how
        found: dict[int, tuple[nn.Parameter, float]] = {}
        for layer in self.trained.values():
            own = ((layer.gamma, how.lr_clip), (layer.inputs.ratio, how.lr_act_clip), (layer.a, how.lr_low_rank))
            for p, rate in (*own, (layer.b, how.lr_low_rank)):
                if p is not None:
                    found[id(p)] = (p, rate)
        for smoothing in self.smoothings.values():
            found[id(smoothing.rho)] = (smoothing.rho, how.lr_smooth)
        return list(found.values())

    def finish(self) -> None:
        """Replace the layers by finished ones and fold the smoothing, in place."""
        for layer in self.trained.values():
            layer.inputs.settle()
        done = {name: layer.finish() for name, layer in self.trained.items()}
        fold(self.block, self.smoothings, self.hook)
        for name, layer in done.items():
            _put(self.block, name, layer.train(False))


def _train(
    opened: Opened, objective: Objective, count: int, how: BiSup, index: int, tell: Callable[[int], None]
) -> dict[str, Any]:
    batch = how.batch_size
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
        order.to(where),
        probe.to(where),
        rates(how.steps, 1.0, "adamw", round(how.warmup * how.steps)).to(device),
        "adamw",
        how.keep_best,
        None,
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
        _put(block, name, ActLinear(layer.weight.detach(), scale, layer.bias, inputs).to(device).train(False))
    block.load_state_dict(tensors)


def _put(block: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(block.get_submodule(parent), own, layer)


def _first(arguments: Arguments, batch: int) -> Arguments:
    """Arguments of the first window alone, where they were made for a batch."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch:
            return value[:1]
        return tuple(map(cut, value)) if isinstance(value, tuple) else value

    return Arguments(tuple(map(cut, arguments.args)), {k: cut(v) for k, v in arguments.kwargs.items()})
