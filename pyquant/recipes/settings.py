"""The settings of block-wise quantization, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyquant.recipes.parametrize import LEARN
from pyquant.recipes.start import STARTS
from pyquant.recipes.train_window import OPTIMIZERS

TARGETS = ("fp", "block", "both")


@dataclass(frozen=True)
class Settings:
    """How blocks are trained; what an arm of a comparison is.

    Attributes:
        window, stride: K and S above; stride divides window.
        lookahead: k above, or ``"end"``.
        target: z from the full-precision model's own stream (``fp``), from full-precision blocks on the quantized stream
            (``block``), or the mean of both errors (``both``).
        start: see :mod:`pyquant.recipes.start`.
        learn: see :mod:`pyquant.recipes.parametrize`.
        ranges: whether scales (and zeros) are trained too.
        reach: bound of a learned rounding offset, in steps.
        steps: gradient steps of each block; 0 stops at the start.
        batch_size: windows a step.
        optimizer: ``sign-sgd`` or ``adamw``.
        lr: of offsets (in steps of the scale) and of weights (in mean steps of the scale); None is 1/steps for sign-SGD, by
            which an offset can travel half a step, and 0.01 for AdamW.
        scale_lr: of factors of scales and of zeros, relative to lr.
        kl, end_mse: weights of the KL divergence and of the hidden states' error where the chain ends in logits. The
            divergence alone fits the calibration text: on another kind of text it was worse than no look-ahead.
        local: weight of the error right after the window, beside the one further on.
        polish, polish_lr: steps (and learning rate) in which all blocks are trained jointly at the end, to the logits.
        keep_best: keep the state with the smallest loss on held-out windows (a sixteenth of them).
        act_order, damp: of the start ``gptq``.
        seed: of the order of windows.
        graphs: capture steps as CUDA graphs on a GPU.
        autocast: compute blocks in bf16 on a GPU while master values stay as they are.
    """

    window: int = 1
    stride: int | None = None
    lookahead: int | Literal["end"] = 0
    target: str = "fp"
    start: str = "mse"
    learn: str = "rounding"
    ranges: bool = True
    reach: float = 0.5
    steps: int = 200
    batch_size: int = 8
    optimizer: str = "sign-sgd"
    lr: float | None = None
    scale_lr: float = 1.0
    kl: float = 1.0
    end_mse: float = 1.0
    local: float = 0.0
    polish: int = 0
    polish_lr: float = 2e-3
    keep_best: bool = True
    act_order: bool = True
    damp: float = 0.01
    seed: int = 0
    graphs: bool = True
    autocast: bool = True

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(what)

        stride = self.stride or self.window
        need(self.window >= 1, f"window={self.window} must be at least 1")
        need(
            1 <= stride <= self.window and self.window % stride == 0,
            f"stride={stride} must divide window={self.window}: each block is in window/stride windows",
        )
        far = self.lookahead
        need(far == "end" or (isinstance(far, int) and far >= 0), f"lookahead={far!r} must be 0, 1, .. or 'end'")
        for name, known in (("target", TARGETS), ("start", STARTS), ("learn", LEARN), ("optimizer", OPTIMIZERS)):
            value = getattr(self, name)
            need(value in known, f"{name}={value!r} must be one of {', '.join(known)}")
        need(self.steps >= 0 and self.polish >= 0, f"steps={self.steps}, polish={self.polish} must not be negative")
        need(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1")

    @property
    def hop(self) -> int:
        """The stride."""
        return self.stride or self.window

    @property
    def rate(self) -> float:
        """The learning rate."""
        if self.lr is not None:
            return self.lr
        return 1 / max(1, self.steps) if self.optimizer == "sign-sgd" else 0.01
