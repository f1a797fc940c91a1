"""A block of weight-activation quantization while it is open: what its layers see, what is trained, how it is closed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.recipes.act_linear import Inputs, best_clip
from pyquant.recipes.awq import find_folds
from pyquant.recipes.bisup_parts import Smoothing, Trained, fold, fold_before
from pyquant.recipes.bisup_settings import BiSup
from pyquant.recipes.blocks import Arguments, call_block, watch_inputs
from pyquant.recipes.ranks import Ranks
from pyquant.recipes.rotate import Rotated
from pyquant.recipes.streams import FullPrecision

ALPHAS = (0.25, 0.5, 0.75)  # of SmoothQuant's start, tried besides no smoothing
SAMPLE = 2048  # tokens that the clip of inputs is looked for on


class Opened:
    """A block in the form that is trained.

    Args:
        block: changed in place.
        layers: its layers to be quantized, by name.
        spec, how, scale_dtype: the format and the settings.
        index: of the block.
        ranks: processes that share the windows; every one finds the same starts.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: dict[str, nn.Linear],
        spec: QuantSpec,
        how: BiSup,
        scale_dtype: torch.dtype,
        index: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
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
                sample[name], tensors[name] = self.ranks.first_rows(x.detach().float(), SAMPLE), x
            energy[name] += flat.square().sum(0)
            largest[name] = torch.maximum(largest[name], flat.abs().amax(0))

        with torch.no_grad(), context(), watch_inputs(layers, see):
            for i in range(0, count, batch):
                call_block(self.block, rows(i, batch), arguments)
        for name in layers:
            self.ranks.add(energy[name])
            self.ranks.most(largest[name])
        for name, layer in layers.items():
            if not torch.isfinite(energy[name]).all() or not torch.isfinite(layer.weight).all():
                raise ValueError(f"block {self.index}: {name} has NaN or infinite inputs or weights")

        def probe() -> Tensor:
            with torch.no_grad():
                return call_block(self.block, rows(0, batch)[:1], _first(arguments, batch))

        folds = self.ranks.agree(find_folds(self.block, layers, probe) if "smooth" in how.parts else {})
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
            put(self.block, name, new.train(layer.training))
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
                    found = (call_block(self.block, x, arguments).float() - wanted).square().sum()
                self.ranks.add(found)
                return float(found)

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
            put(self.block, name, layer.train(False))


def put(block: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a submodule of a block by its dotted name."""
    parent, _, own = name.rpartition(".")
    setattr(block.get_submodule(parent), own, layer)


def _first(arguments: Arguments, batch: int) -> Arguments:
    """Arguments of the first window alone, where they were made for a batch."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch:
            return value[:1]
        return tuple(map(cut, value)) if isinstance(value, tuple) else value

    return Arguments(tuple(map(cut, arguments.args)), {k: cut(v) for k, v in arguments.kwargs.items()})
