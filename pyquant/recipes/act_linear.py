"""Linear layers whose weights and inputs are both low-bit, in plain torch: what a weight-activation recipe trains towards.

The meaning, exact up to the order of fp32 sums: ``y = Qx(x) Qw(W)^T + b`` with Qx of
:func:`~pyquant.recipes.vocabulary.fake_quant_tokens` (symmetric, a scale for each group of each token, found while it runs)
and Qw a fixed matrix on its grid. With ``outliers`` the input channels named there, and the weight's columns that meet
them, have more bits and groups of their own (Atom, arXiv 2310.19102, moves such channels to the end of K instead, which
computes the same but for which channels share a group). ``rotated`` inputs pass through
:func:`~pyquant.recipes.rotate.hadamard` first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyquant import reference
from pyquant.formats.spec import QuantSpec
from pyquant.ops import fake_quant
from pyquant.quantizers.ranges import round_scale
from pyquant.recipes.rotate import hadamard
from pyquant.recipes.vocabulary import fake_quant_tokens


class Inputs(nn.Module):
    """What becomes of a layer's input ``[..., K]``.

    Args:
        bits: 2..8, or 16 for none.
        group_size: of each token, -1 for one scale a token.
        clip: factor of each group's largest magnitude.
        outliers: bool ``[K]``, channels in ``outlier_bits``, one scale a token; None for none.
        outlier_bits: their bits, never clipped.
        rotated: rotate first.

    Raises:
        ValueError: bits or clip that cannot be.
    """

    clip: Tensor
    outliers: Tensor | None

    def __init__(
        self,
        bits: int,
        group_size: int = 128,
        clip: float | Tensor = 1.0,
        outliers: Tensor | None = None,
        outlier_bits: int = 8,
        rotated: bool = False,
    ) -> None:
        super().__init__()
        if not (bits == 16 or 2 <= bits <= 8):
            raise ValueError(f"act_bits={bits} must be 16 (off) or between 2 and 8")
        clip = torch.as_tensor(clip, dtype=torch.float32).clone()
        if not 0 < float(clip) <= 1:
            raise ValueError(f"act_clip={float(clip):g} must be in (0, 1]")
        self.bits, self.group_size, self.outlier_bits, self.rotated = bits, group_size, outlier_bits, rotated
        self.register_buffer("clip", clip)
        self.register_buffer("outliers", outliers)
        self.ratio: nn.Parameter | None = None  # its logit while it is learned
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if self.rotated:
            x = hadamard(x)
        if self.bits == 16 or not self.enabled:
            return x
        learned = self.ratio is not None
        clip = self.clip if self.ratio is None else torch.sigmoid(self.ratio)
        if self.outliers is None:
            return fake_quant_tokens(x, self.bits, self.group_size, clip, learned)
        low = fake_quant_tokens(x.masked_fill(self.outliers, 0), self.bits, self.group_size, clip, learned)
        high = fake_quant_tokens(x.masked_fill(~self.outliers, 0), self.outlier_bits)
        return torch.where(self.outliers, high, low)

    @torch.no_grad()
    def settle(self) -> None:
        """Make the learned clip a constant."""
        if self.ratio is not None:
            self.clip.copy_(torch.sigmoid(self.ratio))
            self.ratio = None

    def extra_repr(self) -> str:
        parts = [f"{self.bits} bits in groups of {self.group_size}, clip {float(self.clip):.3g}"]
        if self.outliers is not None:
            parts.append(f"{int(self.outliers.sum())} outliers in {self.outlier_bits} bits")
        return ", ".join(parts + ["rotated"] * self.rotated)


class ActLinear(nn.Linear):
    """A finished layer: ``y = inputs(x) weight^T + bias``, the weight on its grid.

    Args:
        weight: w_hat ``[N, K]``.
        scale: its scales fp32 ``[N, ceil(K/G)]``.
        bias: ``[N]`` or None.
        inputs: see :class:`Inputs`.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, inputs: Inputs) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("scale", scale)
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inputs(x), self.weight, self.bias)


def magnitudes(w: Tensor, group_size: int) -> Tensor:
    """``max|w|`` of each group, ``[N, ceil(K/G)]``; differentiable."""
    n, k = w.shape
    width = k if group_size == -1 else group_size
    return nn.functional.pad(w, (0, -k % width)).view(n, -1, width).abs().amax(-1)


def round_weight(
    w: Tensor,
    ratio: Tensor | float,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    outliers: Tensor | None = None,
    outlier_bits: int = 8,
) -> tuple[Tensor, Tensor]:
    """A weight on its symmetric grid, ``s = ratio max|w| / (2^(bits-1) - 1)`` group by group.

    Args:
        w: fp32 ``[N, K]``.
        ratio: ``[N, ceil(K/G)]`` or one number.
        spec: bits and group size.
        scale_dtype: what scales are stored in; rounded to it, straight through.
        outliers, outlier_bits: columns (bool ``[K]``) with bits and one scale a row of their own, never clipped.

    Returns:
        w_hat and scale, differentiable in w and ratio (LSQ's gradient of the scale, arXiv 1902.08153).
    """
    low = w if outliers is None else w.masked_fill(outliers, 0)
    scale = magnitudes(low, spec.group_size) * ratio / ((1 << (spec.bits - 1)) - 1)
    scale = _stored(scale, scale_dtype)
    w_hat = fake_quant(low, scale, None, spec.group_size, spec.bits)
    if outliers is not None:
        high = w.masked_fill(~outliers, 0)
        wide = _stored(magnitudes(high, -1) / ((1 << (outlier_bits - 1)) - 1), scale_dtype)
        w_hat = torch.where(outliers, fake_quant(high, wide, None, -1, outlier_bits), w_hat)
    return w_hat, scale


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    scale = torch.where(scale > 0, scale, 1.0)
    return scale + (round_scale(scale.detach(), dtype) - scale).detach()


@torch.no_grad()
def best_ratio(w: Tensor, spec: QuantSpec, outliers: Tensor | None = None, low: float = 0.4) -> Tensor:
    """The ratio of each group with the smallest squared error of the weight, ``[N, ceil(K/G)]``, on a grid down to
    ``low``."""
    w = w if outliers is None else w.masked_fill(outliers, 0)
    best = torch.full_like(magnitudes(w, spec.group_size), torch.inf)
    found = torch.ones_like(best)
    for i in range(round((1 - low) / 0.02) + 1):
        ratio = 1 - 0.02 * i
        error = reference.sum_groups((round_weight(w, ratio, spec, torch.float32)[0] - w).square(), spec.group_size)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, ratio, found)
    return found


@torch.no_grad()
def best_clip(x: Tensor, inputs: Inputs, low: float = 0.4) -> float:
    """The clip of inputs ``[.., K]`` with the smallest squared error, on a grid down to ``low``."""
    if inputs.bits == 16:
        return 1.0
    exact = hadamard(x) if inputs.rotated else x
    errors = {}
    for i in range(round((1 - low) / 0.05) + 1):
        ratio = 1 - 0.05 * i
        trial = Inputs(inputs.bits, inputs.group_size, ratio, inputs.outliers, inputs.outlier_bits)
        errors[ratio] = float((trial(exact) - exact).square().sum())
    return min(errors, key=lambda r: errors[r])
