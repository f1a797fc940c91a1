"""A fast loop for quantization-aware training: experiments on small models, where launching kernels is most of the time.

It trains what :mod:`pyquant.integrations.trainer` trains, by the same functions (:func:`~pyquant.recipes.kd_qat.set_up`,
:class:`~pyquant.recipes.kd_loss.Distillation`, :func:`~pyquant.recipes.kd_qat.parameter_groups`), in the same data order,
at the same rates; without checkpoints, progress of the Trainer's kind, or bitwise repeatability on a GPU. There each step
is one replay of a captured CUDA graph: forward passes (with fused norms), loss, backward, clipping, AdamW. The host only
sets the tokens, the learning rates and the temperature, and waits for nothing until the end.

Over the processes of torch.distributed each trains the whole student on its share of every pass (``batch_size`` is that of
all together), gradients are means over them (:mod:`pyquant.recipes.replicas`), and a run is that of one process up to the
order of sums. All are given the same models and tokens, and end with the same weights.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.nn import reuse_fake_quant
from pyquant.recipes.clip import clip_gradients
from pyquant.recipes.kd_loss import Distillation, Seen, find_head
from pyquant.recipes.kd_qat import cast_weights, freeze, parameter_groups, set_up
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.master import with_masters
from pyquant.recipes.ranks import Ranks
from pyquant.recipes.replicas import Averaging
from pyquant.recipes.soft_qat import share_temperature

log = logging.getLogger("pyquant")

WARMUP = 3  # steps before the capture: cuBLAS, Triton and autograd set themselves up in them


def data_order(count: int, wanted: int, seed: int) -> Tensor:
    """Which windows a run visits: permutation after permutation of ``count`` windows, drawn from the seed, int64
    ``[wanted]``."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-wanted // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:wanted]


@dataclass
class Run:
    """What :func:`train` returns.

    Attributes:
        losses: fp32 ``[steps, 1 + parts]`` on the CPU: the loss, then ``names``.
        names: of the parts.
        seconds: of all steps, capture excluded.
        graph: whether a CUDA graph was replayed.
    """

    losses: Tensor
    names: list[str]
    seconds: float
    graph: bool


class Teaching:
    """The teacher's last hidden states of all windows, computed once for every arm and seed that trains on them.

    Args:
        teacher: in eval mode on its device.
        tokens: int64 ``[n, T]`` on that device.
        batch: windows at once.
        autocast: bf16 autocast, as the training uses.

    The states, and a copy of the head's weight, are kept in the dtype that the head multiplies in: ``n T H`` values of 2
    bytes under autocast, or 4.
    """

    def __init__(self, teacher: nn.Module, tokens: Tensor, batch: int = 8, autocast: bool = True) -> None:
        self.hidden: Tensor | None = None
        dtype = torch.bfloat16 if autocast else torch.float32
        with torch.no_grad(), precision(tokens.device, autocast)():
            self.head = find_head(teacher)
            if self.head is None:
                return
            self.weight = self.head.weight().detach().to(dtype)
            for i in range(0, len(tokens), batch):
                found = self.head.body(input_ids=tokens[i : i + batch], use_cache=False).last_hidden_state
                if self.hidden is None:
                    self.hidden = found.new_empty((len(tokens), *found.shape[1:]), dtype=dtype)
                self.hidden[i : i + batch].copy_(found)

    def see(self, rows: Tensor, fused: bool) -> Seen:
        """The teacher's side of windows int64 ``[B]``, as :meth:`Distillation.teach` would give it."""
        assert self.hidden is not None and self.head is not None
        hidden = self.hidden.index_select(0, rows)
        if fused:
            return Seen(hidden=hidden, weight=self.weight)
        with torch.no_grad():
            return Seen(logits=self.head.logits(hidden.to(self.head.weight().dtype)))


def train(
    student: nn.Module,
    teacher: nn.Module | None,
    tokens: Tensor,
    config: KDConfig,
    spec: QuantSpec | None,
    teaching: Teaching | None = None,
    graph: bool | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Run:
    """Set up a student and train it in place.

    Args:
        student: a full-precision causal LM on its device; left with its trained quantizers, to be converted.
        teacher: in eval mode on the same device; None for cross entropy alone.
        tokens: int64 ``[n, seq_len]`` on the same device.
        config: how to train; ``save_steps``, ``optim`` and ``gradient_checkpointing`` mean nothing here.
        spec: of the weights; None trains the model as it is, the control of what the data alone do.
        teaching: the teacher's hidden states, where they were computed before.
        graph: capture the step; None means on a GPU.
        on_step: called with the number of finished steps (as launched: on a GPU they may still run).

    Raises:
        ValueError: as :func:`~pyquant.recipes.kd_qat.set_up`; a batch that does not divide by the processes.
        FloatingPointError: a loss was NaN or Inf; found at the end.
    """
    device, ranks = tokens.device, Ranks()
    if config.batch_size % ranks.size:
        raise ValueError(f"batch_size={config.batch_size} must be a multiple of the {ranks.size} processes")
    torch.manual_seed(config.seed)
    if spec is None:
        cast_weights(student, config)
    else:
        set_up(student, config, spec)
    student.to(device).train()
    temperature = share_temperature(student)
    step = _Step(student, teacher, tokens, config, teaching, device.type == "cuda" if graph is None else graph)
    order = data_order(len(tokens), config.steps * config.grad_accum * config.batch_size, config.seed)
    order = order.view(config.steps, config.grad_accum, config.batch_size)[:, :, ranks.rank :: ranks.size]
    order = order.reshape(config.steps, -1).to(device)
    began, ended = _Clock(device), _Clock(device)
    with fused_norms(student) if device.type == "cuda" else contextlib.nullcontext():
        step.prepare(order[0])
        began.mark()
        for i in range(config.steps):
            if config.freeze and i == config.freeze_at and i > 0:
                freeze(student, config.freeze)
                step.prepare(order[i], again=True)
            if temperature is not None and config.soft is not None:
                temperature.fill_(config.soft.temperature(i, config.steps))
            step.run(i, order[i])
            if on_step is not None:
                on_step(i + 1)
        ended.mark()
    ranks.mean([step.log])
    losses = step.log.cpu()
    if not torch.isfinite(losses).all():
        bad = int((~torch.isfinite(losses)).any(1).nonzero()[0])
        raise FloatingPointError(
            f"the loss is {losses[bad, 0].item()} at step {bad + 1}; lower lr={config.lr} or scale_lr={config.scale_lr}"
        )
    student.zero_grad()
    return Run(losses, step.names, began.seconds_to(ended), step.graph is not None)


class _Step:
    """One optimizer step over fixed buffers, captured or not."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        tokens: Tensor,
        config: KDConfig,
        teaching: Teaching | None,
        capture: bool,
    ) -> None:
        self.student, self.tokens, self.config, self.capture = student, tokens, config, capture
        device = tokens.device
        on_gpu = device.type == "cuda"
        self.size = Ranks().size
        self.local = config.batch_size // self.size
        self.windows = self.local * config.grad_accum
        autocast = (on_gpu if config.bf16 is None else config.bf16) and config.weights == "fp32"
        self.precision = precision(device, autocast)
        with self.precision():
            self.objective = Distillation(student, teacher, config.loss, config.fused_loss)
        usable = teaching is not None and teaching.hidden is not None and not config.loss.features
        self.taught = teaching if usable and config.loss.needs_teacher else None
        groups = parameter_groups(student, config.lr, config.scale_lr, config.weight_decay)
        self.rates = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
        if on_gpu:
            for group in groups:
                group["lr"] = torch.zeros((), device=device)
        kind = torch.optim.AdamW if config.weights == "fp32" else with_masters(torch.optim.AdamW)
        flags: dict[str, Any] = {"fused": True, "capturable": True} if on_gpu else {"foreach": True}
        self.optimizer: Any = kind(groups, **flags)  # type: ignore[arg-type]
        self.averaging = Averaging(student.parameters()) if self.size > 1 else None
        self.rows = torch.zeros(self.windows, dtype=torch.int64, device=device)
        self.names: list[str] = []
        self.graph: Any = None
        self.out: Tensor | None = None
        self.log = torch.zeros(0)

    def body(self) -> Tensor:
        """Loss and parts of one step on the windows that ``rows`` names, ``[1 + parts]``; weights are updated."""
        total: Tensor | None = None
        reuse = self.config.reuse_fake_quant and self.config.grad_accum > 1
        with reuse_fake_quant(self.student) if reuse else contextlib.nullcontext():
            for i, rows in enumerate(self.rows.split(self.local)):
                if self.averaging is not None:
                    self.averaging.on = i + 1 == self.config.grad_accum
                ids = self.tokens.index_select(0, rows)
                with self.precision():
                    taught = None if self.taught is None else self.taught.see(rows, self.objective.fused)
                    loss, parts = self.objective(ids, ids, taught)
                (loss / (self.config.grad_accum * self.size)).backward()
                self.names = list(parts)
                found = (
                    torch.stack([loss.detach().float(), *(p.float() for p in parts.values())]) / self.config.grad_accum
                )
                total = found if total is None else total + found
        if self.averaging is not None:
            self.averaging.finish()
        if self.config.max_grad_norm:
            clip_gradients(self.student.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        assert total is not None
        return total

    def set_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def prepare(self, rows: Tensor, again: bool = False) -> None:
        """Capture the step. The warm-up steps before it run at a rate of 0 and their moments are forgotten, or kept from
        before where a capture is made again."""
        self.optimizer.zero_grad(set_to_none=True)
        if not self.capture:
            return
        kept = {}
        if again:
            kept = {p: {k: v.clone() for k, v in s.items()} for p, s in self.optimizer.state.items()}
        self.graph = None
        self.set_rates(0.0)
        self.rows.copy_(rows)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self.optimizer.zero_grad(set_to_none=True)
                self.body()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            mode = "global" if self.averaging is None else "thread_local"  # other threads look after the sums
            with torch.cuda.graph(graph, capture_error_mode=mode):
                self.out = self.body()
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.optimizer.zero_grad(set_to_none=True)
            log.warning("the step cannot be captured and runs eagerly: %s", str(error).split("\n")[0])
        for p, state in self.optimizer.state.items():
            for name, value in state.items():
                if p in kept:
                    value.copy_(kept[p][name])
                else:
                    value.zero_()

    def run(self, i: int, rows: Tensor) -> None:
        """Step i, counted from 0."""
        self.rows.copy_(rows)
        self.set_rates(self.config.rate(i))
        if self.graph is not None:
            self.graph.replay()
            out = self.out
        else:
            self.optimizer.zero_grad(set_to_none=True)
            out = self.body()
        assert out is not None
        if not len(self.log):
            self.log = out.new_zeros(self.config.steps, len(out))
        self.log[i].copy_(out)


@contextlib.contextmanager
def fused_norms(model: nn.Module) -> Iterator[int]:
    """Inside, norms that compute what ``torch.nn.functional.rms_norm`` does are computed by it, one kernel instead of six
    forward and a dozen backward. Whether one does is tried on random numbers, whatever its class is called.

    Yields:
        how many there are.
    """
    found = []
    for m in model.modules():
        eps = getattr(m, "variance_epsilon", getattr(m, "eps", None))
        weight = getattr(m, "weight", None)
        if isinstance(eps, float) and isinstance(weight, Tensor) and weight.dim() == 1 and not list(m.children()):
            probe = torch.randn(4, len(weight), device=weight.device, dtype=weight.dtype) * 3
            with torch.no_grad():
                want, got = m(probe), nn.functional.rms_norm(probe, (len(weight),), weight, eps)
            if torch.allclose(got.float(), want.float(), rtol=2e-2, atol=1e-5):
                m.forward = functools.partial(_fused_norm, m, eps)
                found.append(m)
    try:
        yield len(found)
    finally:
        for m in found:
            del m.forward


def _fused_norm(norm: nn.Module, eps: float, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],), norm.weight, eps)  # type: ignore[arg-type]


def precision(device: torch.device, autocast: bool) -> Callable[[], Any]:
    """Makes contexts: bf16 autocast, or nothing."""
    if not autocast:
        return contextlib.nullcontext
    # Without its cache: a cast made while warming up must not be reused by the captured step.
    return lambda: torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


class _Clock:
    """A moment on the device, read without stopping it."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.time = 0.0

    def mark(self) -> None:
        if self.event is not None:
            self.event.record()
        else:
            self.time = time.monotonic()

    def seconds_to(self, later: _Clock) -> float:
        if self.event is None or later.event is None:
            return later.time - self.time
        later.event.synchronize()
        return self.event.elapsed_time(later.event) / 1000
