"""The training loop of one window of blocks: a plain loop over fixed buffers, no synchronisation with the host inside.

Everything a step needs lies on the device before the loop begins: the order of windows, the learning rates, the best state
so far. On a GPU one step is captured as a CUDA graph and replayed; a small model is bound by launches otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyquant.recipes.streams import strictly

log = logging.getLogger("pyquant")

OPTIMIZERS = ("sign-sgd", "adamw")
CHECKS = 8  # times that the probe decides whether the present state is the best


@dataclass
class Outcome:
    """Losses of the probe before, at the best state (which is kept) and at the end; whether NaN ended the training."""

    before: float
    best: float
    last: float
    failed: bool


def schedule(n: int, batch: int, steps: int, seed: int, first: int = 0) -> Tensor:
    """Which windows each step takes, int64 ``[steps, batch]``.

    Position j of a batch always takes windows of the class ``j mod batch``, each class in shuffled epochs: so processes
    that hold whole classes draw the same batches as one process that holds all windows.

    Args:
        n: windows, a multiple of batch.
        batch, steps: shape of the result.
        seed: of the shuffles.
        first: windows below are left out (held out for the probe); a multiple of batch.

    Raises:
        ValueError: sizes that do not fit.
    """
    if n % batch or first % batch or first >= n:
        raise ValueError(f"{n} windows, {first} of them held out, do not divide into batches of {batch}")
    make = torch.Generator().manual_seed(seed)
    rows = (n - first) // batch
    columns = []
    for j in range(batch):
        epochs = [torch.randperm(rows, generator=make) for _ in range(-(-steps // rows))]
        turns = torch.cat(epochs)[:steps] if epochs else torch.empty(0, dtype=torch.int64)
        columns.append(first + turns * batch + j)
    return torch.stack(columns, 1)


def rates(steps: int, lr: float, optimizer: str, warmup: int = 0) -> Tensor:
    """The learning rate of each step, fp32 ``[steps]``: linear to 0; AdamW's bias correction is part of it."""
    t = torch.arange(steps, dtype=torch.float64)
    rate = lr * (1 - t / max(1, steps))
    if warmup:
        rate = rate * ((t + 1) / warmup).clamp_max(1)
    if optimizer == "adamw":
        rate = rate * (1 - 0.999 ** (t + 1)).sqrt() / (1 - 0.9 ** (t + 1))
    return rate.float()


class Stepper:
    """One step of the optimizer over parameters with rates relative to a common one.

    Args:
        params: what is trained.
        factors: of the learning rate, one for each parameter.
        optimizer: ``sign-sgd`` (``p -= lr sign(g)``) or ``adamw`` (betas 0.9, 0.999, no decay).

    Raises:
        ValueError: an unknown optimizer.
    """

    def __init__(self, params: Sequence[Tensor], factors: Sequence[float], optimizer: str) -> None:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer!r} must be one of {', '.join(OPTIMIZERS)}")
        self.params, self.optimizer = list(params), optimizer
        self.factors = list(factors)
        if optimizer == "adamw":
            self.m = [torch.zeros_like(p) for p in self.params]
            self.v = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: Tensor) -> None:
        """Move the parameters; lr is a 0-dim tensor on the device."""
        if self.optimizer == "sign-sgd":
            moves = torch._foreach_sign(list(grads))
        else:
            torch._foreach_lerp_(self.m, list(grads), 0.1)
            torch._foreach_mul_(self.v, 0.999)
            torch._foreach_addcmul_(self.v, list(grads), list(grads), 0.001)
            below = torch._foreach_sqrt(self.v)
            torch._foreach_add_(below, 1e-8)
            moves = torch._foreach_div(self.m, below)
        torch._foreach_mul_(moves, self.factors)
        torch._foreach_mul_(moves, lr)
        torch._foreach_sub_(self.params, moves)

    def state(self) -> list[Tensor]:
        """Tensors that a step changes."""
        return [*self.params, *(self.m + self.v if self.optimizer == "adamw" else [])]


def train(
    params: Sequence[nn.Parameter],
    factors: Sequence[float],
    loss: Callable[[], Tensor],
    feed: Callable[[Tensor], None],
    bound: Callable[[], None],
    order: Tensor,
    probe: Tensor,
    lr: Tensor,
    optimizer: str = "sign-sgd",
    keep_best: bool = True,
    reduce: Callable[[Sequence[Tensor]], None] | None = None,
    graphs: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Outcome:
    """Train parameters in place.

    Args:
        params, factors: what is trained, and its share of the learning rate.
        loss: reads the fixed input buffers and returns a 0-dim loss.
        feed: fills these buffers with the windows of an index ``[B]``.
        bound: clamps parameters after a step.
        order: int64 ``[steps, B]``, on the device where ``feed`` wants it.
        probe: int64 ``[P, B]``; its mean loss decides which state is the best.
        lr: fp32 ``[steps]`` on the device.
        optimizer: see :class:`Stepper`.
        keep_best: return to the state with the smallest probe loss; without it only a NaN does.
        reduce: averages tensors over processes, in place.
        graphs: capture a step as a CUDA graph where the parameters are on a GPU.
        on_step: told the number of finished steps now and then.

    Returns:
        the losses.
    """
    params = list(params)
    if len(order):
        feed(order[0])
    with strictly(lambda: torch.autograd.grad(loss(), params, materialize_grads=True)):
        return _train(
            params, factors, loss, feed, bound, order, probe, lr, optimizer, keep_best, reduce, graphs, on_step
        )


def _train(
    params: list[nn.Parameter],
    factors: Sequence[float],
    loss: Callable[[], Tensor],
    feed: Callable[[Tensor], None],
    bound: Callable[[], None],
    order: Tensor,
    probe: Tensor,
    lr: Tensor,
    optimizer: str,
    keep_best: bool,
    reduce: Callable[[Sequence[Tensor]], None] | None,
    graphs: bool,
    on_step: Callable[[int], None] | None,
) -> Outcome:
    device = params[0].device
    stepper = Stepper(params, factors, optimizer)
    rate, last = torch.zeros((), device=device), torch.zeros((), device=device)
    total = torch.zeros((), device=device)
    best = torch.full((), float("inf"), device=device)
    kept = [p.detach().clone() for p in params]

    def step() -> None:
        value = loss()
        grads = list(torch.autograd.grad(value, params, materialize_grads=True))
        if reduce is not None:
            reduce(grads)
        stepper.step(grads, rate)
        bound()
        last.copy_(value.detach())

    @torch.no_grad()
    def add() -> None:
        total.add_(loss().float())

    run_step, run_add = step, add
    if graphs and device.type == "cuda" and reduce is None and len(order):
        feed(order[0])
        run_step, run_add = _captured(step, stepper.state()), _captured(add, [total])

    @torch.no_grad()
    def check() -> Tensor:
        total.zero_()
        for index in probe:
            feed(index)
            run_add()
        mean = total / len(probe)
        if reduce is not None:
            reduce([mean])
        better = mean < best  # false for NaN: the last good state stays
        best.copy_(torch.where(better, mean, best))
        for mine, p in zip(kept, params, strict=True):
            mine.copy_(torch.where(better, p, mine))
        return mean

    first = check()
    steps = len(order)
    due = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)} if keep_best else {steps}
    final = first
    for i in range(steps):
        feed(order[i])
        rate.copy_(lr[i])
        run_step()
        if i + 1 in due:
            final = check()
            if on_step is not None:
                on_step(i + 1)
    facts = torch.stack([first, best, final, last]).tolist()  # the one synchronisation
    failed = not all(math.isfinite(value) for value in facts)
    if keep_best or failed:
        with torch.no_grad():
            for p, mine in zip(params, kept, strict=True):
                p.copy_(mine)
    return Outcome(facts[0], facts[1], facts[2], failed)


def _captured(work: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """``work`` as a CUDA graph; what its rehearsals change in ``state`` is put back. Eager when it cannot be captured."""
    saved = [t.detach().clone() for t in state]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    replay: Callable[[], None] = work
    try:
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        replay = graph.replay
    except RuntimeError as error:
        torch.cuda.synchronize()
        log.warning(
            "a training step cannot be captured as a CUDA graph and runs eagerly: %s", str(error).split("\n")[0]
        )
    with torch.no_grad():
        for t, old in zip(state, saved, strict=True):
            t.copy_(old)
    return replay
