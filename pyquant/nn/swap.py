"""swap: put quantized layers into a model by name, and say what was changed, what was left, and how much that is."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import FakeQuantLinear, QLinear

log = logging.getLogger("pyquant")


@dataclass
class SwapReport:
    """What :func:`swap` did.

    Attributes:
        changed: names of the replaced layers.
        kept: name -> reason, for every linear layer that was left.
        quantized: weights (elements) in replaced layers.
        total: weights (elements) of the whole model, embeddings included, tied tensors counted once.
    """

    changed: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    quantized: int = 0
    total: int = 0

    @property
    def percent(self) -> float:
        """Share of the model's weights that were quantized, 0..100."""
        return 100.0 * self.quantized / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [f"quantized {len(self.changed)} linear layers, {self.percent:.1f} % of {self.total:,} weights"]
        lines += [f"  left {name}: {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if the dotted name, or any trailing part of it, matches one of the shell-style patterns.

    ``3.v_proj`` is short for ``3.*.v_proj``, the layer of that name in block 3.
    """
    patterns = [p for pattern in patterns for p in (pattern, re.sub(r"^(\d+)\.([^.]+)$", r"\1.*.\2", pattern))]
    tails = [".".join(name.split(".")[i:]) for i in range(name.count(".") + 1)]
    return any(fnmatch.fnmatchcase(tail, pattern) for tail in tails for pattern in patterns)


def fused_experts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weights that a walk over ``nn.Linear`` cannot see: 3-D parameters, as transformers stores MoE experts.

    The 3-D kernels of convolutions (state-space models, speech encoders) are none.
    """
    return {
        f"{name}.{own}".lstrip("."): tuple(p.shape)
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for own, p in module.named_parameters(recurse=False)
        if p.dim() == 3 and p.is_floating_point()
    }


def swap(
    model: nn.Module,
    spec: QuantSpec | None = None,
    replace: Callable[[str, nn.Linear], nn.Module] | None = None,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = ("lm_head",),
    skip_experts: bool = False,
) -> SwapReport:
    """Replace the linear layers of a model in place.

    Args:
        model: any module.
        spec: bits, group size, symmetry.
        replace: ``(name, linear) -> module``; by default :meth:`QLinear.from_linear` with spec.
        include, exclude: shell-style patterns on dotted names or their tails (``"q_proj"``, ``"layers.0.*"``).
        skip_experts: leave fused mixture-of-experts weights in high precision instead of refusing them.

    Returns:
        the report, which is also logged.

    Raises:
        ValueError: when a layer does not fit the spec or has NaN or Inf weights (named, before anything is changed), when the
            model has fused 3-D expert weights and ``skip_experts`` is False, or when nothing matches.
    """
    spec = spec or QuantSpec()
    replace = replace or (lambda _, linear: QLinear.from_linear(linear, spec))
    include, exclude = list(include), list(exclude)
    experts = fused_experts(model)
    if experts and not skip_experts:
        name, shape = next(iter(experts.items()))
        raise ValueError(
            f"{len(experts)} fused expert weight(s) such as {name} {shape} are not linear layers and would stay in high "
            "precision; quantizing them is not supported yet (skip_experts=True leaves them as they are)"
        )
    report = SwapReport(total=sum(p.numel() for p in model.parameters()))
    targets: list[tuple[str, nn.Linear]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module, FakeQuantLinear):
            continue
        if matches(name, exclude):
            report.kept[name] = "excluded by name"
        elif not matches(name, include):
            report.kept[name] = "not included by name"
        else:
            targets.append((name, module))
    for name in experts:
        report.kept[name] = "fused experts, left in high precision on request"
    for name, linear in targets:
        if why := spec.misfit(linear.in_features):
            raise ValueError(f"{name}: {why}")
        if linear.weight.device.type != "meta" and not linear.weight.isfinite().all():
            raise ValueError(f"{name}: the weight has NaN or Inf values; the checkpoint is damaged")
    if not targets:
        raise ValueError(f"no linear layer matches include={include} exclude={exclude}")
    for name, linear in targets:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], replace(name, linear))
        report.changed.append(name)
        report.quantized += linear.weight.numel()
    log.info("%s", report)
    return report
