"""The settings of weight-activation quantization, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

HOSTS: dict[str, tuple[float, float]] = {"rtn": (1.0, 1.0), "atom": (0.9, 0.85), "quarot": (1.0, 1.0)}  # default clips
PARTS = ("clip", "smooth", "low-rank")


@dataclass(frozen=True)
class BiSup:
    """A host and its vertical parts. All choices marked * are ours.

    Attributes:
        host: key of the table in :mod:`pyquant.recipes.bisup`.
        act_bits, act_group: of inputs, 2..8 (16: none); group None is the weights'.
        act_clip, weight_clip: factor of each group's largest magnitude; None is the host's.
        outliers: share of the channels that atom keeps in ``outlier_bits``, rounded up (128 of 4,096).
        outlier_bits: 8.
        online: of quarot: rotate the inputs of o_proj and down_proj. Without it the result is a plain checkpoint.
        parts: any of ``clip``, ``smooth``, ``low-rank`` (also as one text, ``clip+smooth``); none is the bare host.
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

        parts = self.parts
        if isinstance(parts, str):
            parts = tuple(filter(None, parts.replace("+", ",").split(",")))
        object.__setattr__(self, "parts", tuple(parts))
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
