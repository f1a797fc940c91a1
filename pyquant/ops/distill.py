"""distill_loss: linear heads, divergences and cross-entropy in one step, so that logits of all tokens never exist.

The gradients are made in the forward pass; the backward pass multiplies them by the gradient of the loss. Tokens are
taken in segments of S rows, these in chunks of C rows::

    chunk      student logits  fp32 [C, V] = x W^T        distill_rows: losses, and D = d loss / d(x W^T)
               teacher logits  fp32 [C, V] = xt Wt^T      in x's dtype, in blocks of BLOCK columns [S, BLOCK]
    segment    for each block j of columns:   dW[j] (+)= D[j]^T x       dx += D[j] W[j]   (fp32)

Bytes: the first segment needs nothing but the gradients. D and the logits live in the memory of dW until dW is written:
D at its end, block by block, so that writing dW[j] only overwrites what has been used (``_Segment.keep`` copies the one
or two blocks for which that fails). For a 16-bit head of H columns that is S = H/2 tokens: at H = 4096, V = 128256, D of
2048 tokens is 525 MB and two logits of 512 rows are 525 MB, together the 1051 MB of dW. Further segments, and all of them
when the head is frozen, take ``SCRATCH`` bytes, whatever T is: there 1024 tokens in chunks of 256 rows; each adds to dW
in dW's dtype, reading and writing it once more. In bf16 that rounds the sum once a segment (32 segments: about 4e-3 of
dW); a head in fp32 under autocast has no such error.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyquant import reference
from pyquant.ops._checks import check, check_device, check_floats
from pyquant.ops.distill_rows import PARTS, aligned, distill_rows, distill_scale

SCRATCH = 512 << 20  # bytes for logits and their gradients where the head's gradient does not lend its own
LEND = 1  # 0: dw never lends its memory (for measurements)
BLOCK = 132 * 128  # columns of one product: 132 multiprocessors have whole tiles of 128 of it, whatever H is
MOST_ROWS = 2048  # of a chunk: more does not make the products faster
MOST_SEGMENT = 8192
_ALIGN = 256  # bytes


@dataclass(frozen=True)
class _How:
    """Everything but tensors; names as in :func:`distill_loss`."""

    kl: float
    reverse_kl: float
    jsd: float
    jsd_beta: float
    ce: float
    temperature: float
    softcap: float | None
    teacher_softcap: float | None
    logit_scale: float
    ignore_index: int
    chunk: int | None

    @property
    def divergence(self) -> bool:
        return bool(self.kl or self.reverse_kl or self.jsd)


# ------------------------------------------------------------------------------------------------ products


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _adds_wide() -> bool:
    """Whether this torch adds a product of 16-bit matrices to an fp32 matrix (its first versions refused)."""
    a, out = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda"), torch.zeros(16, 16, device="cuda")
    try:
        torch.ops.aten.addmm.dtype_out(out, a, a, torch.float32, out=out)
    except (RuntimeError, AttributeError):
        return False
    return True


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``, fp32 sums rounded to out's dtype only, where torch can (>= 2.8 on a GPU)."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    elif a.is_cuda:
        out.copy_(a @ b)
    else:
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif a.is_cuda and _adds_wide():
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        more = torch.empty_like(out)
        _product(more, a, b)
        out += more


# ------------------------------------------------------------------------------------------------ memory


@dataclass(frozen=True)
class _Plan:
    """Tokens of a segment, and at most how many rows of logits at once."""

    rows: int
    chunk: int


def _plan(size: int, left: int, grad_bytes: int, logit_bytes: int, least: int | None = None) -> _Plan | None:
    """How to use ``size`` bytes, half of them at most for D: None where that gives short segments or chunks.

    Args:
        left: tokens still to do.
        grad_bytes, logit_bytes: of one row of D (0: none is made) and of logits.
        least: what both may shrink to; None for what is worth it.
    """
    rows = min(left, max(1, _down(size // 2 // grad_bytes)), MOST_SEGMENT) if grad_bytes else left
    room = (size - rows * grad_bytes) // _ALIGN * _ALIGN
    chunk = min(rows, _down(room // logit_bytes), MOST_ROWS)
    if least is None and (rows < min(left, 512) or chunk < min(rows, 128)):
        return None
    return _Plan(rows, max(1, chunk))


def _down(rows: int) -> int:
    """Whole tiles of 128 rows, where there are that many."""
    return rows // 128 * 128 if rows >= 128 else rows


def _even(rows: int, most: int) -> int:
    """The size of equal parts of at most ``most`` rows, whole 64s where there is room."""
    size = -(-rows // -(-rows // most))
    return min(-(-size // 64) * 64, most, rows)


class _Segment:
    """Memory of one segment: ``logits(C)`` and the blocks of D, cut from one piece of bytes.

    Args:
        arena: uint8, contiguous; D lies at its end, logits at its start.
        rows: S of this segment.
        padded: V rounded up to 8.
        dtype: of D, or None where no gradient is wanted.
    """

    def __init__(self, arena: Tensor, rows: int, vocabulary: int, dtype: torch.dtype | None) -> None:
        self.arena, self.rows, self.vocabulary = arena, rows, vocabulary
        self.padded = -(-vocabulary // 8) * 8
        self.grad = None
        if dtype is not None:
            size = rows * self.padded * dtype.itemsize
            start = (arena.numel() - size) // _ALIGN * _ALIGN
            self.grad = arena[start : start + size].view(dtype)

    def logits(self, index: int, count: int, most: int, dtype: torch.dtype) -> Tensor:
        """The index-th matrix ``[count, V]`` of the chunk, where chunks have up to ``most`` rows."""
        size = most * self.padded * dtype.itemsize
        flat = self.arena[index * size : (index + 1) * size].view(dtype)
        return flat.view(most, self.padded)[:count, : self.vocabulary]

    def blocks(self) -> list[tuple[int, Tensor]]:
        return reference.distill_blocks(self.grad, self.rows, self.vocabulary, BLOCK)

    def keep(self, blocks: list[tuple[int, Tensor]], j: int, end: int) -> None:
        """Copy those of the blocks j, j + 1, ... that begin before byte ``end`` of the arena, in place of the views."""
        here = self.arena.data_ptr()
        for k in range(j, len(blocks)):
            first, part = blocks[k]
            if not here <= part.data_ptr() < here + end:
                break
            blocks[k] = first, part.clone()


def _row_bytes(x: Tensor, teacher_products: bool, vocabulary: int) -> tuple[int, int]:
    """Bytes of one row of D, and of one row of logits."""
    padded = -(-vocabulary // 8) * 8
    return padded * x.dtype.itemsize, padded * _wide(x.dtype).itemsize * (1 + teacher_products)


# ------------------------------------------------------------------------------------------------ the passes


@dataclass
class _Inputs:
    x: Tensor
    weight: Tensor
    labels: Tensor | None
    teacher_x: Tensor | None
    teacher_weight: Tensor | None
    teacher_logits: Tensor | None
    how: _How


def _forward(inputs: _Inputs, dx: Tensor | None, dw: Tensor | None, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and parts; fills dx ``[T, H]`` and dw ``[V, H]`` with the gradients of the loss times scale, where wanted."""
    x, weight, how = inputs.x, inputs.weight, inputs.how
    tokens, vocabulary = x.shape[0], weight.shape[0]
    wide = _wide(x.dtype)
    if inputs.labels is None:
        inverse = torch.full((), 1 / max(tokens, 1), dtype=wide, device=x.device)
    else:
        inverse = (inputs.labels != how.ignore_index).sum().clamp_min(1).to(wide).reciprocal()
    factor = inverse * scale if scale != 1 else inverse
    sums = torch.empty(tokens, len(PARTS), dtype=wide, device=x.device)
    gradients = dx is not None or dw is not None
    # user's logits are read where they lie, if their rows begin at 16 bytes
    copies = inputs.teacher_logits is not None and not aligned(inputs.teacher_logits)
    products = how.divergence and (inputs.teacher_logits is None or copies)
    grad_bytes, logit_bytes = _row_bytes(x, products, vocabulary)

    done, scratch, most = 0, None, None
    while done < tokens:
        plan = None
        if dw is not None and done == 0 and LEND:
            arena = dw.view(-1).view(torch.uint8)
            plan = _plan(arena.numel(), tokens, grad_bytes, logit_bytes)
        lent = plan is not None
        if plan is None:
            if scratch is None:
                most = _plan(SCRATCH, tokens - done, grad_bytes if gradients else 0, logit_bytes, least=1)
                size = most.rows * grad_bytes * gradients + most.chunk * logit_bytes + _ALIGN
                scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
            rows = _even(tokens - done, most.rows)
            plan, arena = _Plan(rows, min(most.chunk, rows)), scratch
        chunk = _even(plan.rows, min(plan.chunk, how.chunk or plan.chunk))
        segment = _Segment(arena, plan.rows, vocabulary, x.dtype if gradients else None)
        for first in range(0, plan.rows, chunk):
            _chunk(inputs, segment, done, first, min(chunk, plan.rows - first), chunk, sums, factor)
        if gradients:
            _products(inputs, segment, done, dx, dw, lent)
        done += plan.rows
    mean = (sums.sum(0) * inverse).unbind()
    parts = dict(zip(PARTS, mean, strict=True))
    loss = how.kl * mean[0] + how.reverse_kl * mean[1] + how.jsd * mean[2] + how.ce * mean[3]
    return loss, parts


def _chunk(
    inputs: _Inputs, segment: _Segment, done: int, first: int, count: int, most: int, sums: Tensor, factor: Tensor
) -> None:
    """Losses and D of the tokens ``done + first`` to ``done + first + count``."""
    how, wide = inputs.how, _wide(inputs.x.dtype)
    here = slice(done + first, done + first + count)
    student = segment.logits(0, count, most, wide)
    _product(student, inputs.x[here], inputs.weight.T)
    teacher, teacher_scale = None, 1.0
    if how.divergence and inputs.teacher_logits is None:
        teacher, teacher_scale = segment.logits(1, count, most, wide), how.logit_scale
        _product(teacher, inputs.teacher_x[here], inputs.teacher_weight.T)
    elif how.divergence:
        teacher = inputs.teacher_logits[here]
        if not aligned(inputs.teacher_logits):
            teacher = segment.logits(1, count, most, wide).copy_(teacher)
    distill_rows(
        sums[here], segment.grad, student, teacher, None if inputs.labels is None else inputs.labels[here], factor,
        how.ignore_index, how.kl, how.reverse_kl, how.jsd, how.jsd_beta, how.ce, how.temperature, how.softcap or 0.0,
        how.teacher_softcap or 0.0, how.logit_scale, teacher_scale, first, segment.rows, BLOCK,
    )  # fmt: skip


def _products(inputs: _Inputs, segment: _Segment, done: int, dx: Tensor | None, dw: Tensor | None, lent: bool) -> None:
    """dx and dw of one segment; ``lent`` says that D lies in dw itself, which is then written, not added to."""
    x = inputs.x[done : done + segment.rows]
    total = None
    if dx is not None:
        total = dx[done : done + segment.rows]
        if total.dtype != _wide(x.dtype):
            total = torch.empty(x.shape, dtype=_wide(x.dtype), device=x.device)
    blocks = segment.blocks()
    for j in range(len(blocks)):
        start, grad = blocks[j]
        if total is not None:
            (_add_product if j else _product)(total, grad, inputs.weight[start : start + grad.shape[1]])
        if dw is not None:
            part = dw[start : start + grad.shape[1]]
            if lent:
                segment.keep(blocks, j, (start + grad.shape[1]) * dw.shape[1] * dw.dtype.itemsize)
                grad = blocks[j][1]
            (_product if lent or done == 0 else _add_product)(part, grad.T, x)
        blocks[j] = (start, None)
    if total is not None and total.dtype != dx.dtype:
        dx[done : done + segment.rows].copy_(total)


class _Loss(torch.autograd.Function):
    """The gradients wait in ``ctx.made`` and leave it when they are used: nothing else holds them, so that autograd
    need not copy them into ``.grad``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, inputs: _Inputs, wants: tuple[bool, bool]) -> tuple:
        halves = inputs.x.dtype == torch.float16
        # fp16: 1/tokens would push D towards its subnormal numbers, and the caller's loss scale only comes with the
        # backward pass. So D is that of the sum over about T tokens, and what is kept stays fp32.
        power = 2.0 ** (inputs.x.shape[0] - 1).bit_length() if halves else 1.0
        kept = [torch.float32 if t.dtype == torch.float16 else t.dtype for t in (hidden, weight)]
        made = [
            torch.empty(t.shape, dtype=dtype, device=t.device) if want else None
            for t, dtype, want in zip((hidden, weight), kept, wants, strict=True)
        ]
        if not inputs.x.shape[0] and made[1] is not None:
            made[1].zero_()
        loss, parts = _forward(inputs, *made, power)
        ctx.made, ctx.scale, ctx.dtypes = made, 1 / power, (hidden.dtype, weight.dtype)
        values = tuple(parts.values())
        ctx.mark_non_differentiable(*values)
        return (loss, *values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *of_parts: Tensor) -> tuple:
        if ctx.made is None:
            raise RuntimeError(
                "distill_loss: its gradients are made once and handed over by the first backward pass; "
                "compute the loss again instead of keeping the graph for a second one"
            )
        made, ctx.made = ctx.made, None
        for i, t in enumerate(made):
            if t is not None:
                distill_scale(t, grad, ctx.scale)
                made[i] = t if t.dtype == ctx.dtypes[i] else t.to(ctx.dtypes[i])
        return (*made, None, None)


# ------------------------------------------------------------------------------------------------ the public call


def _check(name: str, inputs: _Inputs) -> None:
    x, weight, labels, how = inputs.x, inputs.weight, inputs.labels, inputs.how
    check(
        x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1],
        f"{name}: student_hidden {tuple(x.shape)} and student_weight {tuple(weight.shape)} must be [T, H] and [V, H]",
    )
    check_floats(name, "student_hidden", x)
    check(weight.shape[0] > 0, f"{name}: student_weight {tuple(weight.shape)} has no rows")
    check(
        x.dtype == weight.dtype,
        f"{name}: student_hidden is {x.dtype} but student_weight is {weight.dtype}; convert one",
    )
    tokens, vocabulary = x.shape[0], weight.shape[0]
    for what in ("kl", "reverse_kl", "jsd", "ce"):
        check(getattr(how, what) >= 0, f"{name}: the weight {what}={getattr(how, what)} must not be negative")
    check(how.divergence or how.ce > 0, f"{name}: all of kl, reverse_kl, jsd and ce are 0")
    check(how.temperature > 0, f"{name}: temperature={how.temperature} must be positive")
    check(0 < how.jsd_beta < 1, f"{name}: jsd_beta={how.jsd_beta} must lie between 0 and 1; its limits are the KLs")
    for what in ("softcap", "teacher_softcap"):
        value = getattr(how, what)
        check(value is None or value > 0, f"{name}: {what}={value} must be positive, or None")
    check(how.logit_scale != 0, f"{name}: logit_scale={how.logit_scale} must not be 0")
    check(how.chunk is None or how.chunk > 0, f"{name}: chunk={how.chunk} must be positive")
    if labels is None:
        check(how.ce == 0, f"{name}: ce={how.ce} needs labels")
    else:
        check(
            tuple(labels.shape) == (tokens,) and labels.dtype == torch.int64,
            f"{name}: labels must be int64 [{tokens}] like student_hidden, got {labels.dtype} {tuple(labels.shape)}",
        )
    _check_teacher(name, inputs, tokens, vocabulary)
    check_device(
        name, x, student_weight=weight, labels=labels, teacher_hidden=inputs.teacher_x,
        teacher_weight=inputs.teacher_weight, teacher_logits=inputs.teacher_logits,
    )  # fmt: skip


def _check_teacher(name: str, inputs: _Inputs, tokens: int, vocabulary: int) -> None:
    hidden, weight, logits = inputs.teacher_x, inputs.teacher_weight, inputs.teacher_logits
    check((hidden is None) == (weight is None), f"{name}: teacher_hidden and teacher_weight belong together")
    check(
        hidden is None or logits is None, f"{name}: give teacher_hidden and teacher_weight, or teacher_logits, not both"
    )
    if logits is not None:
        check_floats(name, "teacher_logits", logits)
        check(
            tuple(logits.shape) == (tokens, vocabulary),
            f"{name}: teacher_logits must be [{tokens}, {vocabulary}], got {tuple(logits.shape)}",
        )
        check(
            inputs.how.teacher_softcap is None,
            f"{name}: teacher_softcap={inputs.how.teacher_softcap} is for logits made here; teacher_logits are final",
        )
    elif hidden is not None:
        check_floats(name, "teacher_hidden", hidden)
        check(
            hidden.dim() == 2 and hidden.shape[0] == tokens and tuple(weight.shape) == (vocabulary, hidden.shape[1]),
            f"{name}: teacher_hidden {tuple(hidden.shape)} and teacher_weight {tuple(weight.shape)} must be "
            f"[{tokens}, Ht] and [{vocabulary}, Ht]",
        )
        check(
            hidden.dtype == weight.dtype,
            f"{name}: teacher_hidden is {hidden.dtype} but teacher_weight is {weight.dtype}; convert one",
        )
    else:
        check(not inputs.how.divergence, f"{name}: kl, reverse_kl and jsd need a teacher; give one or set them to 0")


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    *,
    teacher_logits: Tensor | None = None,
    kl: float = 0.5,
    reverse_kl: float = 0.0,
    jsd: float = 0.0,
    jsd_beta: float = 0.5,
    ce: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Distillation loss of a linear head against a teacher's, without the logits of all tokens in memory.

    With s and t the softmax of student and teacher logits over temperature, p that of the student's logits, y the
    label, and m = jsd_beta t + (1 - jsd_beta) s::

        loss = mean over tokens of   temperature^2 (kl KL(t||s) + reverse_kl KL(s||t)
                                        + jsd (jsd_beta KL(t||m) + (1 - jsd_beta) KL(s||m)))  -  ce log p[y]

    Tokens whose label is ignore_index do not count; without a counted token the loss and its gradients are 0. The
    temperature^2 is Hinton et al.'s (1503.02531); the generalized JSD is that of Agarwal et al. (2306.13649). Our own
    reading: the mean over tokens for all terms, and cross-entropy at temperature 1.

    Gradients are made in this call (under ``torch.no_grad`` none are) and handed over by one backward pass; a second one
    over the same graph, or a derivative of the gradient, is refused. None flow to the teacher. Nothing waits for the
    GPU, and forward and backward can be captured in a CUDA graph. Under autocast, products are of its dtype. Memory
    beside the gradients: none up to about H/2 tokens, above that ``SCRATCH`` (512 MB), see the head of this file.

    Args:
        student_hidden: ``[T, H]`` bf16, fp16, fp32 or fp64.
        student_weight: ``[V, H]``, the same dtype (under autocast any).
        labels: int64 ``[T]``, already shifted: position t holds the token that row t predicts. None counts all tokens
            and needs ``ce=0``.
        teacher_hidden, teacher_weight: ``[T, Ht]`` and ``[V, Ht]``, of one dtype; or
        teacher_logits: ``[T, V]`` float, final: neither scaled nor capped here.
        kl, reverse_kl, jsd, ce: weights, not negative, not all 0.
        jsd_beta: between 0 and 1, both excluded.
        temperature: of the divergences, positive.
        softcap, teacher_softcap: logits z become ``cap tanh(z / cap)``; None for none. The teacher's is not taken over
            from the student's.
        logit_scale: factor on both products, before the cap.
        ignore_index: label of tokens that do not count.
        chunk: rows of logits at once; None takes what fits the memory above.

    Returns:
        the loss (0-dim, fp32; fp64 for fp64), and its parts, detached and before weighting: ``kl`` and ``ce`` wherever
        there is what they need (a weighted divergence, labels), ``reverse_kl`` and ``jsd`` where weighted, else 0.

    Raises:
        ValueError: for shapes, dtypes, devices or weights that do not fit.
        RuntimeError: from the backward pass, when it is run twice.
    """
    how = _How(
        kl, reverse_kl, jsd, jsd_beta, ce, temperature, softcap, teacher_softcap, logit_scale, ignore_index, chunk
    )
    given = student_hidden, student_weight, teacher_hidden, teacher_weight
    kind = student_hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        given = tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in given)
    x, weight, teacher_x, teacher_weight = (None if t is None else t.detach() for t in given)
    if teacher_logits is not None:
        teacher_logits = teacher_logits.detach()
    if labels is not None:
        labels = labels.contiguous()
    inputs = _Inputs(x, weight, labels, teacher_x, teacher_weight, teacher_logits, how)
    _check("distill_loss", inputs)
    wants = tuple(torch.is_grad_enabled() and t.requires_grad for t in (student_hidden, student_weight))
    with torch.autocast(kind, enabled=False):
        if any(wants):
            loss, *values = _Loss.apply(student_hidden, student_weight, inputs, wants)
            return loss, dict(zip(PARTS, values, strict=True))
        with torch.no_grad():
            return _forward(inputs, None, None, 1.0)
