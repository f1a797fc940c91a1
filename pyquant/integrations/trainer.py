"""KD-QAT on transformers' Trainer: exact resume, Ctrl-C that saves, and errors that say what to do.

Exact means bit by bit: a run that was killed and resumed ends in the same weights as one that was not. Each step is a
function of the checkpoint: weights, optimizer and schedule, random generators, and a data order fixed by the seed.
That needs deterministic algorithms: ``torch.use_deterministic_algorithms(True)`` during training,
``CUBLAS_WORKSPACE_CONFIG`` set when this module is imported (it counts from the first matrix product on), and on a GPU
attention by FlashAttention, whose backward has a deterministic mode, or by plain math where that does not apply; the
memory-efficient and cuDNN backends are left out. The promise holds on the same machine, with the same thread count and
library versions.

Training is in fp32 weights, under bf16 autocast on a GPU, or in bf16 weights with fp32 master copies
(:mod:`pyquant.recipes.master`); one process, one device. Everything saved is safetensors or JSON (see
:mod:`pyquant.integrations.resume`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback

from pyquant.formats.spec import QuantSpec
from pyquant.integrations import resume as disk
from pyquant.nn import reuse_fake_quant
from pyquant.nn.linear import FakeQuantLinear
from pyquant.recipes.clip import clip_gradients
from pyquant.recipes.kd_loss import Distillation
from pyquant.recipes.kd_qat import cast_weights, freeze, parameter_groups, set_up
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.master import with_masters
from pyquant.recipes.qat_loop import data_order
from pyquant.recipes.soft_qat import share_temperature

__all__ = ["Interrupted", "KDConfig", "train_kd"]

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The optimizers that ``optim`` may name, and the package that each needs beside torch.
OPTIMIZERS = {
    "adamw_torch": None, "adamw_torch_fused": None, "adamw_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao",
}  # fmt: skip


_SHOWN = ("kl", "ce", "reverse_kl", "jsd", "features")  # parts of a loss, in the order of the log


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; the state after ``step`` steps is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}; the state is saved, resume continues from there")
        self.step = step


def train_kd(
    student: nn.Module,
    teacher: nn.Module,
    tokens: Tensor,
    config: KDConfig,
    spec: QuantSpec,
    work_dir: str | Path,
    resume: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Prepare a student and train it against its teacher.

    Args:
        student: a full-precision causal LM; cast to ``config.weights`` and changed in place. It is left with
            :class:`~pyquant.nn.FakeQuantLinear` layers and the final weights.
        teacher: the model to follow; put in eval mode, never changed. Not the same object as the student.
        tokens: int64 ``[n, seq_len]``; visited in a new random order each time round.
        config: how to train.
        spec: bits (2..4), group size, symmetry.
        work_dir: where checkpoints go. The last two are kept.
        resume: continue from the last complete checkpoint of ``work_dir``, or start if there is none.
        on_log: called after every step with ``{"step", "loss", "kl", "ce", "lr", "seconds"}`` and what else the loss
            mixes; a loss without a teacher has no "kl".

    Returns:
        the log of every step from the first, those before a resume included (without "seconds").

    Raises:
        ValueError: tokens that do not fit, a quantized student, a spec or pattern that fits nothing, or (with
            ``resume``) inputs that differ from the run in ``work_dir``, named.
        FileExistsError: ``work_dir`` holds a run and ``resume`` is False.
        ImportError: ``config.optim`` needs a package that is not installed.
        FloatingPointError: the loss is NaN or Inf; the message has the step.
        RuntimeError: out of GPU memory; the message says what to lower.
        OSError: the disk is full while saving; the last complete checkpoint is whole.
        Interrupted: Ctrl-C, after the step was finished and saved. A second Ctrl-C stops at once.
    """
    work_dir = Path(work_dir)
    check_inputs(student, teacher, tokens, config)
    optimizer_class(config)
    cast_weights(student, config)
    fingerprint = disk.fingerprint(student, teacher, tokens, config, spec)
    last = disk.open_run(work_dir, fingerprint, resume)
    torch.manual_seed(config.seed)
    set_up(student, config, spec)
    if last is not None and disk.read_state(last)["step"] >= config.steps:
        return disk.load_student(last, student)
    with deterministic(), on_sigint() as interrupted:
        trainer = _KDTrainer(student, teacher, tokens, config, work_dir, interrupted, on_log)
        try:
            if config.gradient_checkpointing:
                student.gradient_checkpointing_enable()
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"out of GPU memory at step {trainer.state.global_step + 1} with batch_size={config.batch_size}, "
                f"seq_len={config.seq_len}: lower batch_size (and raise grad_accum={config.grad_accum} by as much), "
                f"lower seq_len, or set gradient_checkpointing (now {config.gradient_checkpointing})"
            ) from error
        finally:
            if config.gradient_checkpointing:
                student.gradient_checkpointing_disable()
        step = trainer.state.global_step
    student.zero_grad()
    if interrupted.set and step < config.steps:
        raise Interrupted(step)
    return trainer.history


def optimizer_class(config: KDConfig) -> tuple[Any, dict[str, Any]]:
    """The class that ``config.optim`` names, keeping fp32 copies of bf16 weights, and what it is made with.

    Raises:
        ValueError: an unknown name.
        ImportError: the package that it needs is not installed.
    """
    if config.optim not in OPTIMIZERS:
        raise ValueError(f"unknown optim {config.optim!r}; known: {', '.join(OPTIMIZERS)}")
    package = OPTIMIZERS[config.optim]
    if package is not None and importlib.util.find_spec(package) is None:
        raise ImportError(f"optim={config.optim!r} needs the package {package}: pip install {package}")
    args = TrainingArguments(output_dir="unused", optim=config.optim, report_to="none", use_cpu=True)
    kind, flags = Trainer.get_optimizer_cls_and_kwargs(args)
    flags.pop("lr")
    return (with_masters(kind) if config.weights == "bf16" else kind), flags


def check_inputs(student: nn.Module, teacher: nn.Module, tokens: Tensor, config: KDConfig) -> None:
    """Refuse models and tokens that do not fit, as :func:`train_kd` says."""
    if tokens.dim() != 2 or tokens.shape[0] == 0 or tokens.shape[1] != config.seq_len or tokens.dtype != torch.int64:
        raise ValueError(
            f"tokens must be int64 [n >= 1, seq_len={config.seq_len}], got {tokens.dtype} {tuple(tokens.shape)}"
        )
    if student is teacher:
        raise ValueError("student and teacher are the same object; load the model twice or deepcopy it")
    if (
        any(isinstance(m, FakeQuantLinear) for m in student.modules())
        or getattr(student, "hf_quantizer", None) is not None
    ):
        raise ValueError("the student is already quantized; give the full-precision model")
    vocab = student.get_input_embeddings().num_embeddings
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
        raise ValueError(
            f"tokens reach {int(tokens.max())}, the student's vocabulary has {vocab}: another tokenizer's?"
        )
    positions = getattr(student.config, "max_position_embeddings", None)
    if positions and config.seq_len > positions:
        raise ValueError(f"seq_len={config.seq_len} is more than the {positions} positions of the model")
    if config.freeze_at >= config.steps and config.freeze:
        raise ValueError(f"freeze_at={config.freeze_at} is never reached in {config.steps} steps")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, and attention that has them."""
    was, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads empty memory
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def on_sigint() -> Iterator[SimpleNamespace]:
    """The first Ctrl-C sets ``.set``; a second one interrupts at once. Signals belong to the main thread."""
    flag = SimpleNamespace(set=False)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(*_: Any) -> None:
        flag.set = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


class _Plan(Dataset):
    """Every window of the whole run, in order: permutation after permutation of the tokens, drawn from the seed."""

    def __init__(self, tokens: Tensor, count: int, seed: int) -> None:
        self.tokens = tokens
        self.order = data_order(len(tokens), count, seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        window = self.tokens[self.order[i]]
        return {"input_ids": window, "labels": window}


class _Steps(TrainerCallback):
    """Freezes on time, writes the log, and turns Ctrl-C into a saved stop."""

    def __init__(self, trainer: _KDTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.trainer
        run.parts.clear()
        run.lr = float(run.optimizer.param_groups[0]["lr"])
        if run.config.freeze and state.global_step == run.config.freeze_at > 0:
            freeze(run.model, run.config.freeze)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.trainer
        names = ["loss", *sorted(run.parts[0].keys() - {"loss"}, key=_SHOWN.index)]
        mean = torch.stack([torch.stack([parts[name].float() for name in names]) for parts in run.parts]).mean(0)
        row = {"step": state.global_step, **dict(zip(names, mean.tolist(), strict=True)), "lr": run.lr}
        run.history.append(row)
        if run.on_log is not None:
            run.on_log({**row, "seconds": time.monotonic() - run.started})
        if run.interrupted.set:
            control.should_save = control.should_training_stop = True
        control.should_save |= state.global_step == run.config.steps


class _KDTrainer(Trainer):
    """The loss of :func:`pyquant.recipes.kd_qat.kd_loss`, and checkpoints of our own making."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        tokens: Tensor,
        config: KDConfig,
        work_dir: Path,
        interrupted: SimpleNamespace,
        on_log: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        on_gpu = next(student.parameters()).device.type == "cuda"
        args = TrainingArguments(
            output_dir=str(work_dir),
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.grad_accum,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            save_strategy="steps",
            save_steps=config.save_steps,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=on_gpu,
            use_cpu=not on_gpu,
        )
        args._n_gpu = min(args.n_gpu, 1)  # never DataParallel
        if args.world_size > 1:
            raise ValueError(f"train_kd runs in one process, not {args.world_size}; train_sharded runs in several")
        self.config, self.interrupted, self.on_log = config, interrupted, on_log
        self.history: list[dict[str, Any]] = []
        self.parts: list[dict[str, Tensor]] = []
        self.reuse: contextlib.ExitStack | None = None
        self.started = time.monotonic()
        student.to(args.device)
        self.teacher = teacher.to(args.device).eval()
        groups = parameter_groups(student, config.lr, config.scale_lr, config.weight_decay)
        kind, flags = optimizer_class(config)
        optimizer = kind(groups, lr=config.lr, **flags)
        warmup = min(config.warmup_steps, config.steps)
        scheduler = get_scheduler(config.schedule, optimizer, warmup, config.steps)
        plan = _Plan(tokens, config.steps * config.batch_size * config.grad_accum, config.seed)
        super().__init__(model=student, args=args, train_dataset=plan, optimizers=(optimizer, scheduler))
        self.model_accepts_loss_kwargs = False  # our loss is a mean per batch: divided by grad_accum
        self.autocast = (
            torch.autocast(args.device.type, torch.bfloat16)
            if (on_gpu if config.bf16 is None else config.bf16) and config.weights == "fp32"
            else None
        )
        self.temperature = share_temperature(student)
        with self.autocast or contextlib.nullcontext():
            self.objective = Distillation(student, self.teacher, config.loss, config.fused_loss)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Steps(self))

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if self.temperature is not None and self.config.soft is not None:
            self.temperature.fill_(self.config.soft.temperature(self.state.global_step, self.config.steps))
        with self.autocast or contextlib.nullcontext():
            loss, parts = self.objective(inputs["input_ids"], inputs["labels"])
        if not torch.isfinite(loss):
            what = ", ".join(f"{name} {part.item()}" for name, part in parts.items())
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} ({what}); "
                f"lower lr={self.config.lr} or scale_lr={self.config.scale_lr}"
            )
        self.parts.append({"loss": loss.detach(), **parts})
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """With ``reuse_fake_quant`` the passes of an optimizer step share the quantized weights."""
        if not self.config.reuse_fake_quant or self.config.grad_accum == 1:
            return super().training_step(*args, **kwargs)
        if self.reuse is None:
            self.reuse = contextlib.ExitStack()
            self.reuse.enter_context(reuse_fake_quant(self.model))
        with contextlib.ExitStack() as unless_done:
            unless_done.push(self.reuse)  # an exception passes through the context
            loss = super().training_step(*args, **kwargs)
            if not self.accelerator.sync_gradients:
                unless_done.pop_all()
                return loss
        self.reuse = None
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return clip_gradients(model.parameters(), self.args.max_grad_norm)

    # The Trainer's own checkpoints are pickles; these four hooks write and read ours instead.

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        disk.save(Path(self.args.output_dir), self.state, self.model, self.optimizer, self.history)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        self.history[:] = disk.load_student(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> None:
        if checkpoint is not None:
            disk.load_optimizer(Path(checkpoint), self.optimizer)
            self.lr_scheduler.last_epoch = self.lr_scheduler._step_count = disk.read_state(Path(checkpoint))["step"]
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_rng_state(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> None:
        if checkpoint is not None:
            disk.load_rng(Path(checkpoint))
