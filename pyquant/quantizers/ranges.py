"""Scales and zeros of a weight from the weight alone: min-max, or the clipping that minimises the squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant import reference
from pyquant.formats import int4
from pyquant.formats.spec import QuantSpec

_ROWS_AT_ONCE = 1 << 22  # elements that one step of the search holds in fp32


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 scales rounded to the dtype they will be stored in, never to 0; still fp32."""
    tiny = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return scale.float().clamp_min(tiny).to(dtype).float()


def minmax_range(w: Tensor, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """The range that just covers the weight.

    Symmetric: ``scale = max|w| / (2^b - 1) * 2``, so that the grid's 2^b - 1 steps span ``-max|w| .. max|w|``; the largest
    positive value may round down by half a step (the rule of compressed-tensors). Asymmetric: the 2^b - 1 steps span
    ``min(w, 0) .. max(w, 0)``, zero rounded to an integer.

    Args:
        w: ``[N, K]``.
        spec: bits, group size, symmetry.
        dtype: the dtype scales will be stored in; they are rounded to it.

    Returns:
        scale and zero fp32 ``[N, ceil(K/G)]``; zero is None when symmetric.
    """
    low, high = _extremes(w, spec)
    steps = (1 << spec.bits) - 1
    if spec.symmetric:
        return round_scale(_nonzero(2 * torch.maximum(-low, high) / steps), dtype), None
    scale = round_scale(_nonzero((high - low) / steps), dtype)
    return scale, torch.round(-low / scale).clamp(0, steps)


def mse_range(
    w: Tensor, spec: QuantSpec, dtype: torch.dtype = torch.float32, shrink: float = 0.3, step: float = 0.02
) -> tuple[Tensor, Tensor | None]:
    """The clipped range with the smallest squared error, searched group by group on a grid.

    Candidates are ``r * max|w| / qmax`` (asymmetric: ``r * (max - min) / (2^b - 1)``) for r from 1 down to ``shrink``.

    Args, Returns:
        as :func:`minmax_range`; ``shrink`` and ``step`` set the grid of r.
    """
    ratios = [1.0 - step * i for i in range(round((1.0 - shrink) / step) + 1)]
    rows = max(1, _ROWS_AT_ONCE // max(1, w.shape[1]))
    parts = [_mse_rows(part, spec, dtype, ratios) for part in w.split(rows)]
    scale = torch.cat([s for s, _ in parts])
    return scale, None if spec.symmetric else torch.cat([z for _, z in parts])


def _mse_rows(w: Tensor, spec: QuantSpec, dtype: torch.dtype, ratios: list[float]) -> tuple[Tensor, Tensor | None]:
    low, high = _extremes(w, spec)
    w = w.float()
    best = torch.full_like(low, float("inf"))
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for r in ratios:
        if spec.symmetric:
            scale, zero = round_scale(_nonzero(r * torch.maximum(-low, high) / spec.qmax), dtype), None
        else:
            scale = round_scale(_nonzero(r * (high - low) / spec.qmax), dtype)
            zero = torch.round(-r * low / scale).clamp(0, spec.qmax)
        error = reference.fake_quant(w, scale, zero, spec.group_size, spec.bits) - w
        error = reference.sum_groups(error.square(), spec.group_size)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, None if spec.symmetric else best_zero


RANGES = {"minmax": minmax_range, "mse": mse_range}


def find_range(
    w: Tensor, spec: QuantSpec, rule: str = "minmax", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of a weight by the named rule.

    Raises:
        ValueError: for a weight with NaN or Inf, or an unknown rule.
    """
    if rule not in RANGES:
        raise ValueError(f"unknown range rule {rule!r}; known: {', '.join(RANGES)}")
    if not torch.isfinite(w).all():
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"the weight {tuple(w.shape)} has {bad} NaN or Inf value(s)")
    return RANGES[rule](w.detach(), spec, dtype)


def _extremes(w: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Lowest (<= 0) and highest (>= 0) value of each group, fp32 ``[N, ceil(K/G)]``."""
    n, k = w.shape
    groups = spec.num_groups(k)
    width = k if spec.group_size == -1 else spec.group_size
    grouped = torch.nn.functional.pad(w.float(), (0, groups * width - k)).view(n, groups, width)
    return grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)


def _nonzero(scale: Tensor) -> Tensor:
    """A group of zeros gets scale 1: any scale represents it."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize_weight(w: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Container codes uint8 ``[N, K]`` of a weight, row-major (for tests and reports)."""
    qweight = reference.quantize_int4(w, scale, zero, spec.group_size, spec.bits)
    return int4.untile_codes(qweight, *w.shape)
