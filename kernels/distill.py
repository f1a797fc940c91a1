"""distill_rows and distill_scale: losses of rows of logits with their gradient, and the gradient's last factor.

What a row computes stands at the head of csrc/distill.cu; the meaning is :func:`pyquant.reference.distill_rows`.

Layouts: student fp32 and teacher ``[C, V]``, columns contiguous, any row stride; D in blocks of columns one behind the
other (:func:`pyquant.reference.distill_blocks`); sums fp32 ``[C, 4]``.

A program takes a row and walks it BLOCK columns at a time, two or three times::

    step 1   running maximum and sum of exponentials of each lane, merged at the end of the row
    step 2   (reverse KL and JSD only) the sums that their gradients need
    step 3   D

Bound by memory: 8 bytes a value and step, of which L2 serves what the rows in flight leave there, and 2 bytes of D.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_LOW = tl.constexpr(-1e30)  # below every logit, and no NaN as with infinity
_BLOCK = 4096


@triton.jit
def _capped(z, scale, cap, CAP: tl.constexpr):
    z = z * scale
    if CAP:
        z = cap * (1.0 - 2.0 / (1.0 + tl.exp(tl.minimum(2.0 * z / cap, 80.0))))
    return z


@triton.jit
def _load(ptr, col, inside, scale, cap, CAP: tl.constexpr):
    """Logits of one step, capped; minus infinity where not inside."""
    z = tl.load(ptr + col, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, _capped(z, scale, cap, CAP), -float("inf"))


@triton.jit
def _times(p, log_ratio):
    return tl.where(p > 0, p * log_ratio, 0.0)


@triton.jit
def _mixture(u, beta):
    """log(m / s) for u = log(t / s): the larger of the two terms of m in front, so that nothing overflows."""
    small = tl.exp(-tl.abs(u))
    return tl.where(u > 0, u + tl.log(beta + (1 - beta) * small), tl.log(1 - beta + beta * small))


@triton.jit
def _rows_kernel(
    sums_ptr, grad_ptr, student_ptr, teacher_ptr, labels_ptr, factor_ptr, ignore_index,
    kl, reverse_kl, jsd, jsd_beta, ce, temperature, softcap, teacher_softcap, student_scale, teacher_scale,
    vocabulary, student_stride, teacher_stride, first, rows, block,
    HAS_GRAD: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_LABELS: tl.constexpr, ALL: tl.constexpr,
    WARM: tl.constexpr, CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, LAST_STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    student_ptr += row * student_stride
    if HAS_TEACHER:
        teacher_ptr += row * teacher_stride
    live = True
    label = -1
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        live = label != ignore_index
    rate = 1.0 / temperature

    max_s = tl.full((BLOCK,), _LOW, tl.float32)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_p = tl.zeros((BLOCK,), tl.float32)
    max_t = tl.full((BLOCK,), _LOW, tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        col = step * BLOCK + lanes
        inside = (col < vocabulary) & live  # rows that do not count are not read
        z = _load(student_ptr, col, inside, student_scale, softcap, CAP)
        top = tl.maximum(max_s, z)
        sum_s = sum_s * tl.exp((max_s - top) * rate) + tl.exp((z - top) * rate)
        if WARM and HAS_LABELS:
            sum_p = sum_p * tl.exp(max_s - top) + tl.exp(z - top)
        max_s = top
        if HAS_TEACHER:
            y = _load(teacher_ptr, col, inside, teacher_scale, teacher_softcap, TEACHER_CAP)
            top = tl.maximum(max_t, y)
            sum_t = sum_t * tl.exp((max_t - top) * rate) + tl.exp((y - top) * rate)
            max_t = top
    top_s = tl.max(max_s, axis=0)
    log_s = tl.log(tl.sum(sum_s * tl.exp((max_s - top_s) * rate), axis=0))
    log_p = log_s
    if WARM and HAS_LABELS:
        log_p = tl.log(tl.sum(sum_p * tl.exp(max_s - top_s), axis=0))
    top_t = tl.max(max_t, axis=0)
    log_t = log_s
    if HAS_TEACHER:
        log_t = tl.log(tl.sum(sum_t * tl.exp((max_t - top_t) * rate), axis=0))

    of_kl = tl.zeros((BLOCK,), tl.float32)
    total_kl, total_reverse, total_s, total_t = 0.0, 0.0, 0.0, 0.0
    if ALL:
        of_reverse = tl.zeros((BLOCK,), tl.float32)
        of_s = tl.zeros((BLOCK,), tl.float32)
        of_t = tl.zeros((BLOCK,), tl.float32)
        for step in range(STEPS):
            col = step * BLOCK + lanes
            inside = (col < vocabulary) & live
            ls = (_load(student_ptr, col, inside, student_scale, softcap, CAP) - top_s) * rate - log_s
            lt = (_load(teacher_ptr, col, inside, teacher_scale, teacher_softcap, TEACHER_CAP) - top_t) * rate - log_t
            u = lt - ls
            s, t, r = tl.exp(ls), tl.exp(lt), _mixture(u, jsd_beta)
            of_kl += _times(t, u)
            of_reverse -= _times(s, u)
            of_s -= _times(s, r)
            of_t += _times(t, u - r)
        total_reverse, total_s, total_t = tl.sum(of_reverse, axis=0), tl.sum(of_s, axis=0), tl.sum(of_t, axis=0)

    scale = tl.load(factor_ptr).to(tl.float32) * student_scale
    wide_row = first + row
    for step in range(LAST_STEPS):
        col = step * BLOCK + lanes
        inside = (col < vocabulary) & live
        z = tl.load(student_ptr + col, mask=inside, other=0.0)
        z = _capped(z, student_scale, softcap, CAP)
        ls = (z - top_s) * rate - log_s
        s = tl.exp(ls)
        dz = tl.zeros((BLOCK,), tl.float32)
        if HAS_TEACHER:
            y = tl.load(teacher_ptr + col, mask=inside, other=0.0).to(tl.float32)
            lt = (_capped(y, teacher_scale, teacher_softcap, TEACHER_CAP) - top_t) * rate - log_t
            t = tl.exp(lt)
            u = lt - ls
            dz = kl * (s - t)
            if ALL:
                pull = reverse_kl * (u + total_reverse)
                if jsd != 0:
                    pull += jsd * (1 - jsd_beta) * (_mixture(u, jsd_beta) + total_s)
                dz -= _times(s, pull)
            else:
                of_kl += tl.where(inside, _times(t, u), 0.0)
            dz *= temperature
        if HAS_LABELS:
            p = s
            if WARM:
                p = tl.exp(z - top_s - log_p)
            dz += ce * (p - tl.where(col == label, 1.0, 0.0))
        if CAP:
            dz *= 1 - (z / softcap) * (z / softcap)
        if HAS_GRAD:
            begin = col // block * block
            stride = tl.minimum(block, (vocabulary - begin + 7) // 8 * 8)
            at = begin.to(tl.int64) * rows + wide_row * stride + (col - begin)
            dz = tl.where(inside, dz * scale, 0.0)
            tl.store(grad_ptr + at, dz.to(grad_ptr.dtype.element_ty), mask=col < vocabulary)
    square = temperature * temperature
    total_kl = tl.sum(of_kl, axis=0)
    loss = 0.0
    if HAS_LABELS:
        valid = live & (label >= 0) & (label < vocabulary)
        z = _capped(tl.load(student_ptr + label, mask=valid, other=0.0), student_scale, softcap, CAP)
        loss = tl.where(valid, log_p - (z - top_s), float("nan"))  # a label outside of the vocabulary shows
    sums_ptr += row * 4
    tl.store(sums_ptr, tl.where(live, total_kl * square, 0.0))
    tl.store(sums_ptr + 1, tl.where(live & (reverse_kl != 0), total_reverse * square, 0.0))
    both = jsd_beta * total_t + (1 - jsd_beta) * total_s
    tl.store(sums_ptr + 2, tl.where(live & (jsd != 0), both * square, 0.0))
    tl.store(sums_ptr + 3, tl.where(live, loss, 0.0))


@triton.jit
def _scale_kernel(t_ptr, factor_ptr, scale, count, BLOCK: tl.constexpr):
    by = tl.load(factor_ptr).to(tl.float32) * scale
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(t_ptr + at, mask=at < count, other=0.0).to(tl.float32) * by
        tl.store(t_ptr + at, value.to(t_ptr.dtype.element_ty), mask=at < count)


def distill_rows(
    sums: Tensor,
    grad: Tensor | None,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    factor: Tensor,
    ignore_index: int,
    kl: float,
    reverse_kl: float,
    jsd: float,
    jsd_beta: float,
    ce: float,
    temperature: float,
    softcap: float,
    teacher_softcap: float,
    student_scale: float,
    teacher_scale: float,
    first: int,
    rows: int,
    block: int,
) -> None:
    """Fill sums and grad; arguments as in :func:`pyquant.ops.distill_rows.distill_rows`."""
    count, vocabulary = student.shape
    if count == 0:
        return
    if teacher is None:
        temperature = 1.0  # of the divergences only
    everything = teacher is not None and bool(reverse_kl or jsd)
    block_size = min(_BLOCK, triton.next_power_of_2(vocabulary))
    steps = triton.cdiv(vocabulary, block_size)
    # without a gradient, the last step is there for the forward KL alone
    last_steps = steps if grad is not None or (teacher is not None and not everything) else 0
    _rows_kernel[(count,)](
        sums, grad, student, teacher, labels, factor, ignore_index,
        kl, reverse_kl, jsd, jsd_beta, ce, temperature, softcap, teacher_softcap, student_scale, teacher_scale,
        vocabulary, student.stride(0), 0 if teacher is None else teacher.stride(0), first, rows, block,
        HAS_GRAD=grad is not None, HAS_TEACHER=teacher is not None, HAS_LABELS=labels is not None,
        ALL=everything, WARM=temperature != 1, CAP=softcap > 0,
        TEACHER_CAP=teacher_softcap > 0, BLOCK=block_size, STEPS=steps, LAST_STEPS=last_steps, num_warps=8,
    )  # fmt: skip


def distill_scale(t: Tensor, factor: Tensor, scale: float) -> None:
    """``t *= factor * scale`` in place, t contiguous; where the product is 1 nothing of t is touched."""
    if t.numel():
        block = 4096
        _scale_kernel[(triton.cdiv(t.numel(), block),)](t, factor, scale, t.numel(), BLOCK=block, num_warps=8)
