"""The settings of a run of quantization-aware training; both loops and every way to start one read these."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pyquant.recipes.kd_loss import KDLoss
from pyquant.recipes.soft_qat import SoftQAT

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
WEIGHTS = ("fp32", "bf16")


@dataclass(frozen=True)
class KDConfig:
    """How a student trains.

    Args:
        steps: optimizer steps.
        batch_size: windows a forward pass, of all processes together; ``batch_size * grad_accum`` make a step.
        seq_len: tokens a window.
        grad_accum: forward passes a step.
        lr, scale_lr: peak learning rates of weights, and of scales and zeros (a quarter or so of the weights' was best).
        weight_decay: of matrices; AdamW with betas 0.9 and 0.999.
        warmup_steps: linear warm-up.
        schedule: after it, ``cosine`` or ``linear`` to 0, or ``constant_with_warmup``.
        bf16: autocast; None means on a GPU.
        save_steps: a checkpoint every so many steps, and at the end.
        seed: of the data order and of dropout.
        max_grad_norm: clipping; 0 turns it off.
        freeze: ov-freeze, patterns of layers that are snapped and frozen; ``("v_proj", "o_proj")`` is the paper's.
        freeze_at: the step before which that happens; 0 is before training.
        loss: weights and temperature.
        fused_loss: the loss from hidden states, see :class:`~pyquant.recipes.kd_loss.Distillation`.
        quantizer, rule, include, exclude, skip_experts: as :func:`pyquant.recipes.kd_qat.prepare`.
        soft: rounding, clamping and their schedule, for the quantizer ``soft`` and only then.
        activation_bits: 16 leaves the inputs of quantized layers, 8 rounds each token of them while training.
        embedding_bits, head_bits, train_embeddings, train_head: see
            :func:`~pyquant.recipes.vocabulary.prepare_vocabulary`.
        weights: ``fp32``, or ``bf16`` with fp32 master copies (:mod:`pyquant.recipes.master`): the same memory, but no
            casts, and gradients in bf16.
        optim: AdamW by the name that transformers gives it: ``adamw_torch``, ``adamw_torch_fused``, or with 8-bit
            states ``adamw_8bit`` (bitsandbytes) and ``adamw_torch_8bit`` (torchao).
        gradient_checkpointing: less memory, about a third more time.
        reuse_fake_quant: quantize each weight once for all ``grad_accum`` passes of a step
            (:func:`pyquant.nn.reuse_fake_quant`): less time, and while a step lasts the memory of the quantized weights and
            their gradients.
        shard_teacher: over several processes, shard the teacher's blocks as the student's; otherwise each has it whole.
        keep_gathered: over several processes, keep each block's gathered weights between its forward and its backward: a
            third less traffic, for the memory of the whole student in the dtype that it computes in.

    Raises:
        ValueError: for values that cannot be.
    """

    steps: int = 1000
    batch_size: int = 8
    seq_len: int = 512
    grad_accum: int = 1
    lr: float = 2e-5
    scale_lr: float = 5e-6
    weight_decay: float = 0.0
    warmup_steps: int = 20
    schedule: str = "cosine"
    bf16: bool | None = None
    save_steps: int = 100
    seed: int = 0
    max_grad_norm: float = 1.0
    freeze: tuple[str, ...] = ()
    freeze_at: int = 0
    loss: KDLoss = field(default_factory=KDLoss)
    fused_loss: bool | None = None
    quantizer: str = "lsq"
    rule: str = "mse"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("lm_head",)
    skip_experts: bool = False
    soft: SoftQAT | None = None
    activation_bits: int = 16
    embedding_bits: int = 16
    head_bits: int = 16
    train_embeddings: bool = True
    train_head: bool = True
    weights: str = "fp32"
    optim: str = "adamw_torch"
    gradient_checkpointing: bool = False
    reuse_fake_quant: bool = False
    shard_teacher: bool = False
    keep_gathered: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "grad_accum", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "scale_lr", "weight_decay", "warmup_steps", "max_grad_norm", "freeze_at"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; known: {', '.join(SCHEDULES)}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights={self.weights!r} must be one of {', '.join(WEIGHTS)}")
        if not (self.activation_bits == 16 or 2 <= self.activation_bits <= 8):
            raise ValueError(f"activation_bits={self.activation_bits} must be 16 (off) or between 2 and 8")
        if (self.soft is not None) != (self.quantizer == "soft"):
            raise ValueError(f"quantizer={self.quantizer!r} with soft={self.soft}: the two go together")

    def rate(self, step: int) -> float:
        """The factor of the learning rates at a step counted from 0: linear warm-up, then the schedule."""
        warmup = min(self.warmup_steps, self.steps)
        if step < warmup:
            return step / max(1, warmup)
        progress = (step - warmup) / max(1, self.steps - warmup)
        if self.schedule == "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        return max(0.0, 1 - progress) if self.schedule == "linear" else 1.0
