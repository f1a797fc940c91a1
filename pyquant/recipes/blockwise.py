"""Block-wise post-training quantization: one block at a time, several jointly, or against what a later block makes of it.

After Shabanovi et al., "Interactions Across Blocks in Post-Training Quantization of Large Language Models"
(arXiv 2411.03934), of which only the abstract was at hand: the choices below are our reading. With F_b the blocks, x the
hidden states that the already quantized blocks produce and z those of the full-precision model::

    min over theta_b .. theta_{b+K-1}   | F_{b+K-1+k} o .. o F_{b+K} o F^_{b+K-1} o .. o F^_b (x)  -  z |^2

``window`` K blocks are trained at once (K = 1 is the baseline, K > 1 their strategy 1), ``stride`` S of them are final
after a window and the rest is trained on in the next one; the error is measured ``lookahead`` k full-precision blocks later
(their strategy 2; ``"end"`` goes to the logits, where it is the KL divergence from the full-precision ones).

So that arms compare: every block gets the same number of gradient steps, ``steps``, spread evenly over the K / S windows it
is in (windows reach over both ends of the model), and all arms draw the same calibration windows in the same order.

Rounding to nearest, clipped ranges, GPTQ and AWQ are the same engine with ``steps = 0``: see :mod:`pyquant.recipes.start`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import FakeQuantLinear
from pyquant.recipes.blocks import block_arguments, call_block, find_blocks, logits_of
from pyquant.recipes.experts import all_experts, unfuse
from pyquant.recipes.objective import Objective
from pyquant.recipes.parametrize import Parametrization, Rounded, Start, parametrize
from pyquant.recipes.ranks import Ranks
from pyquant.recipes.settings import Settings
from pyquant.recipes.start import Statistics, collect, start_block
from pyquant.recipes.streams import Blocks, FullPrecision, InMemory, advance, deterministic, embedded, precision
from pyquant.recipes.train_window import Outcome, rates, schedule, train


@dataclass
class BlockResult:
    """A finished block: its rounded layers, and parameters that changed beside them (norms, by AWQ)."""

    layers: dict[str, Rounded]
    other: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Result:
    """Blocks by number, and one row for each window: ``{"blocks", "steps", "before", "best", "last", "seconds"}``."""

    blocks: dict[int, BlockResult] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Keeper(Protocol):
    """Where finished windows are kept for a run that is resumed."""

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and row of a finished window, or None."""

    def save(self, index: int, tensors: dict[str, Tensor], row: dict[str, Any]) -> None:
        """Keep a finished window; on return it survives a crash."""


def plan(count: int, window: int, stride: int) -> list[range]:
    """The windows over ``count`` blocks: of each K blocks S move on; clipped at both ends, so that every block is in
    K / S of them."""
    found = [range(max(0, s), min(s + window, count)) for s in range(stride - window, count, stride)]
    return [r for r in found if len(r)]


def blockwise(
    model: nn.Module,
    tokens: Tensor,
    spec: QuantSpec,
    settings: Settings | None = None,
    chosen: Iterable[str] | None = None,
    source: Blocks | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    keeper: Keeper | None = None,
    place: str = "device",
    folder: Path | None = None,
    stream: FullPrecision | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Quantize the linear layers of a decoder's blocks; the model is left as it is.

    Args:
        model: a decoder called as ``model(tokens)``, in eval mode, on the device to compute on. With a ``source`` of its
            own, its blocks are not touched and may be on the meta device. Its parameters stop requiring gradients.
        tokens: calibration windows, int64 ``[n, S]``; a rest that fills no batch is dropped.
        spec: bits, group size, symmetry.
        settings: see :class:`Settings`.
        chosen: full names of the layers to quantize; by default all linear layers of the blocks, those of fused experts
            included (:mod:`pyquant.recipes.experts`).
        source: gives blocks by number; by default copies of the model's.
        scale_dtype: what scales are stored in.
        keeper: keeps finished windows; those it has are not trained again, and the result is the same bit by bit.
        place, folder: where hidden states are, see :class:`~pyquant.recipes.activations.Activations`.
        stream: the full-precision hidden states, to share them between several calls with the same tokens.
        on_progress: told (steps done, steps, note).

    Returns:
        the finished blocks. With torch.distributed initialised, the windows are shared out over the processes, and each
        returns the same result.

    Raises:
        ValueError: a model without blocks to walk, fewer windows than a batch, NaN (with the block), and what
            :func:`~pyquant.recipes.start.start_block` raises.
    """
    run = _Run(model, tokens, spec, settings or Settings(), chosen, source, scale_dtype, place, folder, stream)
    run.total = sum(steps for _, steps in run.windows)
    run.on_progress = on_progress
    with deterministic(run.device):
        _all_windows(run, keeper)
    return run.result


def _all_windows(run: _Run, keeper: Keeper | None) -> None:
    windows = run.windows
    for index, (blocks, steps) in enumerate(windows):
        saved = keeper.load(index) if keeper is not None else None
        leaving = run.enter_window(index)
        if saved is not None:
            tensors, row = saved
            run.restore(blocks, leaving, tensors)
        else:
            began = time.perf_counter()
            row = run.work(index, blocks, steps)
            tensors = run.finish(blocks, leaving)
            row["seconds"] = time.perf_counter() - began
            if keeper is not None and run.ranks.rank == 0:
                keeper.save(index, tensors, row)
        run.result.rows.append(row)
        if row.get("failed"):
            first, last = row["blocks"]
            run.result.notes.append(
                f"Training of block {first}{f' to {last}' if last > first else ''} met NaN; the last good state is kept."
            )
        run.done += steps
        run.tell(f"block {blocks[0]}, loss {row['best']:.4g}" if row["steps"] else f"block {blocks[0]}")
        run.carry(index, leaving)


class _Run:
    """State of one call of :func:`blockwise`: the streams, the blocks that are open (being trained), the finished ones."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        spec: QuantSpec,
        settings: Settings,
        chosen: Iterable[str] | None,
        source: Blocks | None,
        scale_dtype: torch.dtype,
        place: str,
        folder: Path | None,
        stream: FullPrecision | None,
    ) -> None:
        self.model = model.requires_grad_(False)
        self.spec, self.settings, self.scale_dtype = spec, settings, scale_dtype
        self.root, self.skeleton = find_blocks(model)
        self.chosen = None if chosen is None else set(chosen)
        self.source = source or InMemory(self.skeleton)
        self.ranks = Ranks()
        batch = settings.batch_size
        if batch % self.ranks.size:
            raise ValueError(f"batch_size={batch} must be a multiple of the {self.ranks.size} processes")
        if len(tokens) < batch:
            raise ValueError(f"{len(tokens)} calibration windows do not fill one batch of {batch}")
        self.count = len(tokens) - len(tokens) % batch
        self.local = batch // self.ranks.size
        mine = self.ranks.share(tokens[: self.count], batch)
        embedding = next(p for p in model.parameters() if p.device.type != "meta")
        self.device = embedding.device
        mine = mine.to(self.device)
        self.precision = precision(self.device, settings.autocast)
        with self.precision():
            _, self.arguments = block_arguments(model, self.skeleton, mine[: self.local])
        self.embedded = partial(embedded, model, self.skeleton, mine, self.local, place, folder, self.precision)
        if stream is None:
            stream = FullPrecision(self.source, self.arguments, self.local, self.precision)
            stream.begin(self.embedded())
        self.fp = stream
        self.x = stream.at(0).copy()  # the quantized stream, at the first block that is not final
        self.at = 0
        self.open: dict[int, nn.Module] = {}
        self.result = Result()
        size = min(settings.window, len(self.source))
        hop = settings.hop if size == settings.window else size
        share = settings.steps * hop / size
        self.windows = [(r, round(share)) for r in plan(len(self.source), size, hop)]
        if settings.polish:
            self.windows.append((range(len(self.source)), settings.polish))
        self.hop, self.total, self.done = hop, 0, 0
        self.on_progress: Callable[[int, int, str], None] | None = None

    def tell(self, note: str, extra: int = 0) -> None:
        if self.on_progress is not None:
            self.on_progress(min(self.done + extra, self.total), self.total, note)

    def polishing(self, index: int) -> bool:
        """Whether a window is the last one, over all blocks."""
        return bool(self.settings.polish) and index == len(self.windows) - 1

    def passed(self, index: int) -> list[int]:
        """Blocks that no later window needs, but for polishing."""
        later = {b for i, (r, _) in enumerate(self.windows) if i > index and not self.polishing(i) for b in r}
        return [b for b in self.windows[index][0] if b not in later]

    def enter_window(self, index: int) -> list[int]:
        """Prepare the stream; returns the blocks that are final after this window."""
        if not self.polishing(index):
            return [] if self.settings.polish else self.passed(index)
        self.x, self.at = self.embedded(), 0
        return list(range(len(self.source)))

    # ------------------------------------------------------------------------------------------- one window

    def work(self, index: int, blocks: range, steps: int) -> dict[str, Any]:
        """Open the blocks of a window that are not, and train them; its row."""
        for b in blocks:
            if b not in self.open:
                try:
                    self.open[b] = self._enter(b)
                except ValueError as error:
                    raise ValueError(f"{self.root}.{b}.{error}") from error
        trains = steps > 0 and any(True for _ in _trained_layers(self.open[b] for b in blocks))
        row: dict[str, Any] = {"blocks": [blocks[0], blocks[-1]], "steps": steps if trains else 0}
        if not trains:
            return row
        outcome = self._train(index, blocks, steps)
        if outcome.before != outcome.before:
            raise ValueError(
                f"block {blocks[0]}: the loss is NaN before any training; the weights or the inputs are broken"
            )
        return row | asdict(outcome)

    def _enter(self, b: int) -> nn.Module:
        """A block in the form that is trained, begun from what the blocks before it produce in their present state."""
        block = self._fetch(b)
        layers = self._layers(b, block)

        def passes() -> None:
            with torch.no_grad(), self.precision(), all_experts(block):
                for i in range(0, len(self.x), self.local):
                    call_block(block, self._before(b, self.x.rows(i, self.local)), self.arguments[b])

        def statistics(_: Iterable[str]) -> Statistics:
            found = collect(layers, passes)
            found.reduce(self.ranks.add)
            return found

        def probe() -> Tensor:
            with torch.no_grad(), all_experts(block):
                return call_block(block, self._before(b, self.x.rows(0, self.local)), self.arguments[b])

        how = self.settings
        before = {n: p.detach().clone() for n, p in block.named_parameters() if p.dim() == 1}
        starts = start_block(
            how.start, block, layers, self.spec, self.scale_dtype, statistics, probe, how.act_order, how.damp
        )
        self._open(block, starts)
        block.changed = [n for n, p in block.named_parameters() if n in before and not torch.equal(p, before[n])]  # type: ignore[assignment]
        return block

    def _fetch(self, b: int) -> nn.Module:
        """A block; its fused experts taken apart where they are to be quantized."""
        block = self.source.fetch(b)
        prefix = f"{self.root}.{b}." if self.root else f"{b}."
        if self.chosen is None or any(n.startswith(prefix) and ".experts." in n for n in self.chosen):
            unfuse(block)
        return block

    def _before(self, b: int, h: Tensor) -> Tensor:
        """Hidden states before block b from those before the first open one."""
        for i in range(self.at, b):
            h = call_block(self.open[i], h, self.arguments[i])
        return h

    def _layers(self, b: int, block: nn.Module) -> dict[str, nn.Linear]:
        prefix = f"{self.root}.{b}." if self.root else f"{b}."
        found = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        return found if self.chosen is None else {n: m for n, m in found.items() if prefix + n in self.chosen}

    def _open(self, block: nn.Module, starts: dict[str, Start]) -> None:
        how = self.settings
        trains = how.steps + how.polish > 0
        for name, start in starts.items():
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            learn = how.learn if trains else "clip"  # nothing to train: no room for offsets
            layer = parametrize(linear, start, learn, self.spec, self.scale_dtype, how.ranges and trains, how.reach)
            parent, _, own = name.rpartition(".")
            setattr(block.get_submodule(parent), own, layer)

    def _train(self, index: int, blocks: range, steps: int) -> Outcome:
        how, ranks, batch = self.settings, self.ranks, self.settings.batch_size
        params: list[nn.Parameter] = []
        factors: list[float] = []
        quantizers: list[Parametrization] = []
        for layer in _trained_layers(self.open[b] for b in blocks):
            quantizer = layer.quantizer
            assert isinstance(quantizer, Parametrization)
            quantizers.append(quantizer)
            for kind, p in quantizer.trained(layer):
                params.append(p.requires_grad_(True))
                factors.append(self._factor(kind, quantizer))
        polishing = self.polishing(index)
        far = "end" if polishing else how.lookahead
        logits = partial(logits_of, self.model, self.skeleton)
        objective = Objective(how, blocks, far, self.open, self.at, self.x, self.fp, logits, ranks)

        def bound() -> None:
            for quantizer in quantizers:
                quantizer.bound()

        rows = self.count // batch
        held = max(1, rows // 16) if rows >= 4 else 0
        order = schedule(self.count, batch, steps, how.seed * 1000 + index, held * batch)
        probe = torch.arange(max(1, held) * batch).view(-1, batch)
        where = self.x.index_device()
        rate = how.polish_lr if polishing else how.rate
        outcome = train(
            params,
            factors,
            objective.loss,
            objective.feed,
            bound,
            ranks.local_index(order, batch).to(where),
            ranks.local_index(probe, batch).to(where),
            rates(steps, rate, how.optimizer).to(self.device),
            how.optimizer,
            how.keep_best,
            ranks.mean if ranks.size > 1 else None,
            how.graphs and self.x.place == "device",
            lambda done: self.tell(f"block {blocks[0]}", done),
        )
        for p in params:
            p.requires_grad_(False)
        return outcome

    def _factor(self, kind: str, quantizer: Parametrization) -> float:
        """Learning rate of a kind, relative to the common one."""
        if kind == "weight":
            return float(quantizer.scale0.mean())
        if kind == "zero":
            return self.settings.scale_lr * quantizer.spec.qmax / 4
        return self.settings.scale_lr if kind == "scale" else 1.0

    # ------------------------------------------------------------------------------------------- its end

    def finish(self, blocks: range, leaving: Sequence[int]) -> dict[str, Tensor]:
        """Make blocks final; everything that a resumed run needs of this window, by name."""
        tensors: dict[str, Tensor] = {}
        for b in blocks:
            block = self.open[b]
            changed = {n: block.get_parameter(n).detach() for n in block.changed}  # type: ignore[union-attr]
            if b in leaving:
                layers = {
                    n: layer.quantizer.deploy(layer.weight)  # type: ignore[operator]
                    for n, layer in block.named_modules()
                    if isinstance(layer, FakeQuantLinear)
                }
                self.result.blocks[b] = BlockResult(layers, {n: t.clone() for n, t in changed.items()})
                for n, r in layers.items():
                    tensors |= {f"final.{b}.{n}|codes": r.codes, f"final.{b}.{n}|scale": r.scale}
                    if r.zero is not None:
                        tensors[f"final.{b}.{n}|zero"] = r.zero
            else:
                for n, layer in block.named_modules():
                    if isinstance(layer, FakeQuantLinear):
                        state = {"weight": layer.weight, **dict(layer.quantizer.state_dict())}
                        tensors |= {f"open.{b}.{n}|{key}": t.detach() for key, t in state.items()}
            tensors |= {f"other.{b}.{n}|value": t for n, t in changed.items()}
        return tensors

    def restore(self, blocks: range, leaving: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """The state that :meth:`finish` described."""
        found: dict[tuple[str, int], dict[str, dict[str, Tensor]]] = {}
        for key, t in tensors.items():
            name, _, own = key.partition("|")
            kind, number, layer = name.split(".", 2)
            found.setdefault((kind, int(number)), {}).setdefault(layer, {})[own] = t.to(self.device)
        for b in blocks:
            other = {n: parts["value"] for n, parts in found.get(("other", b), {}).items()}
            if b in leaving:
                final = found.get(("final", b), {})
                layers = {n: Rounded(p["codes"], p["scale"], p.get("zero"), self.spec) for n, p in final.items()}
                self.result.blocks[b] = BlockResult(layers, other)
                self.open.setdefault(b, self._fetch(b))  # carry() fills it
                continue
            block = self._fetch(b)
            for n, t in other.items():
                block.get_parameter(n).data.copy_(t)
            state = found.get(("open", b), {})
            self._open(block, {n: Start(s["weight"], s["scale0"], s.get("zero0")) for n, s in state.items()})
            for n, parts in state.items():
                layer = block.get_submodule(n)
                assert isinstance(layer, FakeQuantLinear)
                layer.quantizer.load_state_dict({key: t for key, t in parts.items() if key != "weight"})
            block.changed = list(other)  # type: ignore[assignment]
            self.open[b] = block

    def carry(self, index: int, leaving: Sequence[int]) -> None:
        """Move the quantized stream past the blocks that are done with; those that are final are let go."""
        for b in self.passed(index):
            if b in leaving:
                insert(self.open[b], self.result.blocks[b])
            if self.at == b and b < len(self.source) - 1:
                advance(self.open[b], self.arguments[b], self.x, self.x, self.local, self.precision)
            self.at = b + 1
        for b in leaving:
            self.open.pop(b)
        self.fp.forget(self.at)


@torch.no_grad()
def insert(block: nn.Module, result: BlockResult) -> None:
    """Give a block its rounded weights, as plain linear layers, and its other changed parameters, in place.

    Fused experts among them are taken apart first."""
    if any(".experts." in name for name in result.layers):
        unfuse(block)
    for name, r in result.layers.items():
        layer = block.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        dtype = layer.quantizer.out_dtype if isinstance(layer, FakeQuantLinear) else layer.weight.dtype
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(r.weight(dtype), requires_grad=False)
        plain.bias = layer.bias
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, plain.train(layer.training))
    for name, t in result.other.items():
        block.get_parameter(name).data.copy_(t)


def _trained_layers(blocks: Iterable[nn.Module]) -> Iterator[FakeQuantLinear]:
    for block in blocks:
        for module in block.modules():
            if isinstance(module, FakeQuantLinear):
                yield module
