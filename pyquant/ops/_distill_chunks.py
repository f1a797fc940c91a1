"""How distill_loss goes through its tokens, and where its intermediate results lie.

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

import torch
from torch import Tensor

from pyquant import reference
from pyquant.ops.distill_rows import PARTS, aligned, distill_rows

SCRATCH = 512 << 20  # bytes for logits and their gradients where the head's gradient does not lend its own
LEND = 1  # 0: dw never lends its memory (for measurements)
BLOCK = 132 * 128  # columns of a product: 132 multiprocessors have whole tiles of 128 of it, whatever H is
LOGITS = (
    33 * 320
)  # 4 x 33 tiles of 128 x 320 are a whole wave of 132 multiprocessors: so many columns, and the rest apart
MOST_ROWS = 2048  # of a chunk: more does not make the products faster
MOST_SEGMENT = 8192
_ALIGN = 256  # bytes


@dataclass(frozen=True)
class How:
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
class Inputs:
    x: Tensor
    weight: Tensor
    labels: Tensor | None
    teacher_x: Tensor | None
    teacher_weight: Tensor | None
    teacher_logits: Tensor | None
    how: How


def forward(inputs: Inputs, dx: Tensor | None, dw: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Loss and its parts ``[4]``; fills dx ``[T, H]`` and dw ``[V, H]``, where given, with scale times its gradients."""
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
        _chunks(inputs, segment, done, chunk, sums, factor)
        if gradients:
            _products(inputs, segment, done, dx, dw, lent)
        done += plan.rows
    parts = sums.sum(0) * inverse
    weights = (how.kl, how.reverse_kl, how.jsd, how.ce)
    terms = [weight * part for weight, part in zip(weights, parts.unbind(), strict=True) if weight]
    loss = terms[0]
    for term in terms[1:]:
        loss = loss + term
    return loss, parts


def _chunks(inputs: Inputs, segment: _Segment, done: int, chunk: int, sums: Tensor, factor: Tensor) -> None:
    """Losses and D of the tokens of a segment, the first of which is token ``done``."""
    for first in range(0, segment.rows, chunk):
        logits = _logits(inputs, segment, done + first, min(chunk, segment.rows - first), chunk)
        _rows(inputs, segment, logits, done, first, sums, factor)


def _head(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """``out = x @ weight^T`` in whole waves of tiles, and what is left."""
    whole = weight.shape[0] // LOGITS * LOGITS
    for part in (slice(0, whole), slice(whole, weight.shape[0])):
        if part.start < part.stop:
            _product(out[:, part], x, weight[part].T)


def _logits(inputs: Inputs, segment: _Segment, first: int, count: int, most: int) -> tuple:
    """(student's logits, teacher's or None, the factor that the teacher's still need) of ``count`` tokens."""
    how, wide, here = inputs.how, _wide(inputs.x.dtype), slice(first, first + count)
    student = segment.logits(0, count, most, wide)
    _head(student, inputs.x[here], inputs.weight)
    if not how.divergence:
        return student, None, 1.0
    if inputs.teacher_logits is None:
        teacher = segment.logits(1, count, most, wide)
        _head(teacher, inputs.teacher_x[here], inputs.teacher_weight)
        return student, teacher, how.logit_scale
    teacher = inputs.teacher_logits[here]
    if not aligned(inputs.teacher_logits):
        teacher = segment.logits(1, count, most, wide).copy_(teacher)
    return student, teacher, 1.0


def _rows(
    inputs: Inputs, segment: _Segment, logits: tuple, done: int, first: int, sums: Tensor, factor: Tensor
) -> None:
    """Losses and D of one chunk, whose first token is ``done + first``."""
    how, (student, teacher, teacher_scale) = inputs.how, logits
    here = slice(done + first, done + first + student.shape[0])
    distill_rows(
        sums[here], segment.grad, student, teacher, None if inputs.labels is None else inputs.labels[here], factor,
        how.ignore_index, how.kl, how.reverse_kl, how.jsd, how.jsd_beta, how.ce, how.temperature, how.softcap or 0.0,
        how.teacher_softcap or 0.0, how.logit_scale, teacher_scale, first, segment.rows, BLOCK,
    )  # fmt: skip


def _products(inputs: Inputs, segment: _Segment, done: int, dx: Tensor | None, dw: Tensor | None, lent: bool) -> None:
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
