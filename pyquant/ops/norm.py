"""rms_norm, and add_rms_norm, which adds a residual on the way. For inference: neither has a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant import reference
from pyquant.ops._checks import check, check_device, check_floats, check_no_grad
from pyquant.ops._registry import Backend, define, extension, needs_torch
from pyquant.ops.quantize import dtype_code, pointer, stream

_HALVES = (torch.bfloat16, torch.float16)


def _norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_floats("rms_norm", "x", x)
    check(x.dim() >= 1, "rms_norm: x must be [..., K], got a scalar")
    k = x.shape[-1]
    check(tuple(weight.shape) == (k,), f"rms_norm: weight must have shape ({k},), got {tuple(weight.shape)}")
    check(weight.dtype == x.dtype, f"rms_norm: x is {x.dtype} but weight is {weight.dtype}")
    check(weight.is_contiguous(), "rms_norm: weight must be contiguous")
    check_device("rms_norm", x, weight=weight)
    return x.new_empty(x.shape)


def _add_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check(
        x.shape == residual.shape and x.dtype == residual.dtype,
        f"add_rms_norm: residual is {residual.dtype} {tuple(residual.shape)}, x is {x.dtype} {tuple(x.shape)}",
    )
    check_device("add_rms_norm", x, residual=residual)
    return _norm_fake(x, weight, eps), x.new_empty(x.shape)


def rows_of(x: Tensor) -> Tensor:
    """``[M, K]`` of ``x [..., K]`` with K contiguous; a copy only where the strides ask for one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, total: Tensor | None) -> None:
    rows = rows_of(x)
    other = None if residual is None else rows_of(residual)
    m, k = rows.shape
    extension().rms_norm(
        rows.data_ptr(), rows.stride(0), pointer(other), 0 if other is None else other.stride(0), dtype_code(x.dtype),
        weight.data_ptr(), y.data_ptr(), pointer(total), m, k, eps, stream(),
    )  # fmt: skip


def _norm_cuda(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = _norm_fake(x, weight, eps)
    if y.numel():
        _launch(x, None, weight, eps, y, None)
    return y


def _add_norm_cuda(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, total = _add_norm_fake(x, residual, weight, eps)
    if y.numel():
        _launch(x, residual, weight, eps, y, total)
    return y, total


def _norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _norm_fake(x, weight, eps)
    return reference.rms_norm(x, weight, eps).contiguous()


def _add_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _add_norm_fake(x, residual, weight, eps)
    y, total = reference.add_rms_norm(x, residual, weight, eps)
    return y.contiguous(), total.contiguous()


def only_halves(x: Tensor, *args: object) -> str | None:
    """Why the extension declines a first argument, or None."""
    return None if x.dtype in _HALVES else f"{x.dtype} runs in torch"


_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    fake=_norm_fake,
    backends={"cuda": Backend(_norm_cuda, only_halves), "torch": Backend(_norm_torch)},
)
_add_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=_add_norm_fake,
    backends={"cuda": Backend(_add_norm_cuda, only_halves), "torch": Backend(_add_norm_torch)},
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` (1910.07467) over the last dimension, fp32 inside, rounded once.

    transformers rounds the normalized x before it multiplies by weight; here that rounding is left out.

    Args:
        x: ``[..., K]`` bf16 or fp16 (fp32 and fp64 run in plain torch), any strides.
        weight: ``[K]`` in x's dtype.
        eps: added to the mean square.

    Returns:
        ``[..., K]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or when a gradient is wanted.
    """
    check_no_grad("rms_norm", x, weight)
    return (_norm.overload if needs_torch(x, weight) else _norm.call)(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s, weight, eps), s)`` of ``s = x + residual``, s rounded to x's dtype, in one launch.

    Args:
        x, residual: ``[..., K]``, one shape and dtype, any strides.
        weight: ``[K]`` in x's dtype.
        eps: added to the mean square.

    Returns:
        the norm and the sum, both ``[..., K]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or when a gradient is wanted.
    """
    check_no_grad("add_rms_norm", x, residual, weight)
    return (_add_norm.overload if needs_torch(x, residual, weight) else _add_norm.call)(x, residual, weight, eps)
