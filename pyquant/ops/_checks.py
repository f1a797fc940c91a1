"""Argument checks shared by the ops: one sentence each, with the offending values."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant.formats import int4
from pyquant.formats.spec import GROUP_SIZES, num_groups

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless condition."""
    if not condition:
        raise ValueError(message)


def check_floats(op: str, name: str, t: Tensor) -> None:
    """t is bf16, fp16 or fp32 (fp64 passes too: the torch backend takes it)."""
    check(
        t.dtype in FLOATS or t.dtype == torch.float64,
        f"{op}: {name} must be bfloat16, float16 or float32, not {t.dtype}",
    )


def check_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """All tensors are on one device."""
    for name, t in others.items():
        check(
            t is None or t.device == first.device,
            f"{op}: {name} is on {t.device if t is not None else None}, the first argument on {first.device}",
        )


def check_groups(op: str, w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, most: int) -> None:
    """w [N, K] with row-major scale and zero [N, ceil(K/G)]."""
    check(w.dim() == 2, f"{op}: w must be [N, K], got shape {tuple(w.shape)}")
    check(2 <= bits <= most, f"{op}: bits={bits} must be between 2 and {most}")
    check(group_size == -1 or group_size > 0, f"{op}: group_size={group_size} must be positive, or -1 for per channel")
    want = (w.shape[0], num_groups(w.shape[1], group_size))
    for name, t in (("scale", scale), ("zero", zero)):
        check(
            t is None or tuple(t.shape) == want,
            f"{op}: {name} must have shape {want} for w {tuple(w.shape)} with group_size={group_size}, "
            f"got {tuple(t.shape) if t is not None else None}",
        )


def check_tiled(op: str, qweight: Tensor, scale: Tensor, zero: Tensor | None, n: int, k: int, group_size: int) -> None:
    """qweight, scale and zero are in tiled order for a weight of n x k."""
    check(group_size in GROUP_SIZES, f"{op}: group_size={group_size} must be one of {GROUP_SIZES}")
    check(qweight.dtype == torch.int32, f"{op}: qweight must be int32, not {qweight.dtype}")
    check(
        tuple(qweight.shape) == int4.tiled_shape(n, k),
        f"{op}: qweight has shape {tuple(qweight.shape)}, a weight of N={n}, K={k} has {int4.tiled_shape(n, k)}",
    )
    check_floats(op, "scale", scale)
    want = int4.tiled_scale_shape(n, k, group_size)
    check(
        tuple(scale.shape) == want,
        f"{op}: tiled scale must have shape {want} for N={n}, K={k}, group_size={group_size}, got {tuple(scale.shape)}",
    )
    check(qweight.is_contiguous() and scale.is_contiguous(), f"{op}: qweight and scale must be contiguous")
    if zero is not None:
        check(zero.dtype == torch.uint8, f"{op}: tiled zero must be uint8, not {zero.dtype}")
        check(tuple(zero.shape) == want, f"{op}: tiled zero must have shape {want}, got {tuple(zero.shape)}")
        check(zero.is_contiguous(), f"{op}: zero must be contiguous")
    check_device(op, qweight, scale=scale, zero=zero)


def check_no_grad(op: str, *tensors: Tensor | None) -> None:
    """No gradient is wanted of an op that has none."""
    check(
        not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors),
        f"{op}: has no gradient; call it under torch.no_grad() or with tensors that do not require one",
    )
