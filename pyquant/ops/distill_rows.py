"""distill_rows and distill_scale: what the distillation loss does between its matrix products, and after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyquant import reference
from pyquant.ops._checks import FLOATS, check, check_device
from pyquant.ops._registry import Backend, define, extension, kernels
from pyquant.ops.quantize import _no_fp64, dtype_code, pointer, stream

PARTS = ("kl", "reverse_kl", "jsd", "ce")


def _check_rows(
    sums: Tensor,
    grad: Tensor | None,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    factor: Tensor,
    ignore_index: int,
    *rest: float,
) -> None:
    name = "distill_rows"
    check(student.dim() == 2, f"{name}: student must be [C, V], got shape {tuple(student.shape)}")
    count, vocabulary = student.shape
    first, rows, block = rest[-3:]
    check(tuple(sums.shape) == (count, 4) and sums.is_contiguous(), f"{name}: sums must be [{count}, 4], contiguous")
    check(teacher is None or teacher.shape == student.shape, f"{name}: teacher {teacher is not None and teacher.shape}")
    for t in (student, teacher):
        check(t is None or t.stride(1) == 1 or vocabulary == 1, f"{name}: the columns of logits must be contiguous")
    check(labels is None or tuple(labels.shape) == (count,), f"{name}: labels must be [{count}]")
    check(block > 0 and block % 8 == 0, f"{name}: block={block} must be a multiple of 8")
    check(first >= 0 and first + count <= rows, f"{name}: rows {first} to {first + count} of {rows}")
    padded = -(-vocabulary // 8) * 8
    check(
        grad is None or (grad.dim() == 1 and grad.is_contiguous() and grad.numel() >= rows * padded),
        f"{name}: grad must be contiguous with at least {rows * padded} elements",
    )
    check_device(name, sums, grad=grad, student=student, teacher=teacher, labels=labels, factor=factor)


def _rows_cuda(
    sums: Tensor,
    grad: Tensor | None,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    factor: Tensor,
    ignore_index: int,
    *rest: float,
) -> None:
    _check_rows(sums, grad, student, teacher, labels, factor, ignore_index, *rest)
    if not student.numel():
        return
    *weights, first, rows, block = rest
    extension().distill_rows(
        sums.data_ptr(), pointer(grad), 0 if grad is None else dtype_code(grad.dtype), student.data_ptr(),
        student.stride(0), pointer(teacher), 2 if teacher is None else dtype_code(teacher.dtype),
        0 if teacher is None else teacher.stride(0), pointer(labels), factor.data_ptr(), ignore_index, *weights,
        *student.shape, first, rows, block, stream(),
    )  # fmt: skip


def _rows_triton(sums: Tensor, *args: Any) -> None:
    _check_rows(sums, *args)
    kernels("distill").distill_rows(sums, *args)


def _rows_torch(sums: Tensor, *args: Any) -> None:
    _check_rows(sums, *args)
    reference.distill_rows(sums, *args)


def aligned(t: Tensor | None) -> bool:
    """Whether kernels can read the rows of t ``[C, V]`` in pieces of 8 elements: columns contiguous, rows at 16 bytes,
    and what lies between V and the next multiple of 8 belongs to the row."""
    if t is None:
        return True
    padded, rows = -(-t.shape[1] // 8) * 8, t.shape[0]
    end = t.storage_offset() + (rows - 1) * t.stride(0) + padded
    inside = end * t.element_size() <= t.untyped_storage().nbytes()
    starts = t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 and t.stride(0) >= padded
    return t.stride(1) == 1 and starts and inside


def _rows_declines(
    sums: Tensor, grad: Tensor | None, student: Tensor, teacher: Tensor | None, labels: Tensor | None, *rest: object
) -> str | None:
    if student.dtype != torch.float32 or sums.dtype != torch.float32:
        return f"{student.dtype} logits run in torch"
    if any(t is not None and t.dtype not in FLOATS for t in (grad, teacher)):
        return "float64 runs in torch"
    if labels is not None and labels.dtype != torch.int64:
        return f"labels of {labels.dtype} run in torch"
    return None


def _rows_declines_cuda(sums: Tensor, grad: Tensor | None, student: Tensor, teacher: Tensor | None, *rest: object):
    if not (aligned(student) and aligned(teacher) and (grad is None or grad.data_ptr() % 16 == 0)):
        return "logits whose rows do not start at 16 bytes, or end within a piece of 8, run elsewhere"
    return _rows_declines(sums, grad, student, teacher, *rest)


_rows = define(
    "distill_rows(Tensor(a!) sums, Tensor(b!)? grad, Tensor student, Tensor? teacher, Tensor? labels, Tensor factor, "
    "int ignore_index, float kl, float reverse_kl, float jsd, float jsd_beta, float ce, float temperature, "
    "float softcap, float teacher_softcap, float student_scale, float teacher_scale, int first, int rows, int block)"
    " -> ()",
    fake=_check_rows,
    backends={
        "cuda": Backend(_rows_cuda, _rows_declines_cuda),
        "triton": Backend(_rows_triton, _rows_declines),
        "torch": Backend(_rows_torch),
    },
)


def distill_rows(
    sums: Tensor,
    grad: Tensor | None,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    factor: Tensor,
    ignore_index: int,
    *rest: float,
) -> None:
    """The losses of each row of logits, and their gradient to the student's product with its head; one launch.

    Args:
        sums: fp32 ``[C, 4]``, gets kl, reverse_kl, jsd and ce of each row, 0 for ignored rows; kl wherever there is a
            teacher, ce wherever there are labels, the other two where their weight is not 0.
        grad: bf16, fp16 or fp32, gets the gradient times factor, rounded once, in the parts that
            :func:`pyquant.reference.distill_blocks` describes; or None.
        student: fp32 ``[C, V]``, the products as they are; scale and cap are applied here.
        teacher: ``[C, V]`` bf16, fp16 or fp32, or None.
        labels: int64 ``[C]``, or None.
        factor: fp32, one element: 1 / tokens, possibly scaled.
        ignore_index: the label of rows that do not count.
        rest: kl, reverse_kl, jsd, jsd_beta, ce, temperature, softcap (0 for none), teacher_softcap, student_scale,
            teacher_scale, first, rows, block: see :func:`pyquant.ops.distill_loss`; row 0 is row ``first`` of ``rows``.

    Raises:
        ValueError: for shapes that do not fit.
    """
    _rows.call(sums, grad, student, teacher, labels, factor, ignore_index, *rest)


# ------------------------------------------------------------------------------------------------ distill_scale


def _check_scale(t: Tensor, factor: Tensor, scale: float) -> None:
    check(t.is_contiguous(), "distill_scale: t must be contiguous")
    check(factor.numel() == 1, f"distill_scale: factor must have one element, got {tuple(factor.shape)}")
    check_device("distill_scale", t, factor=factor)


def _scale_cuda(t: Tensor, factor: Tensor, scale: float) -> None:
    _check_scale(t, factor, scale)
    if t.numel():
        wide = factor.float()
        extension().distill_scale(t.data_ptr(), dtype_code(t.dtype), t.numel(), wide.data_ptr(), scale, stream())


def _scale_triton(t: Tensor, factor: Tensor, scale: float) -> None:
    _check_scale(t, factor, scale)
    kernels("distill").distill_scale(t, factor, scale)


def _scale_torch(t: Tensor, factor: Tensor, scale: float) -> None:
    _check_scale(t, factor, scale)
    wide = factor.reshape(()).to(torch.float64 if t.dtype == torch.float64 else torch.float32)
    t.copy_(t.to(wide.dtype) * (wide * scale))


_scale = define(
    "distill_scale(Tensor(a!) t, Tensor factor, float scale) -> ()",
    fake=_check_scale,
    backends={
        "cuda": Backend(_scale_cuda, _no_fp64),
        "triton": Backend(_scale_triton, _no_fp64),
        "torch": Backend(_scale_torch),
    },
)


def distill_scale(t: Tensor, factor: Tensor, scale: float) -> None:
    """``t *= factor * scale`` in place; where the product is 1 the kernels read nothing but that.

    Args:
        t: float, contiguous.
        factor: float, one element, on the device.
        scale: a number known to the host.

    Raises:
        ValueError: for a t that is not contiguous.
    """
    _scale.call(t, factor, scale)
