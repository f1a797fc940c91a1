"""Gradients clipped by their common norm, where some are in 16 bits and some in 32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for gradients of several dtypes.

    torch multiplies all of them by one fp32 factor, for which its foreach function leaves the fast path as soon as a
    gradient is in 16 bits: with bf16 weights and fp32 scales that took longer than fake quantization itself. Here every
    dtype gets the factor in its own, which is within 2^-9 of it.

    Args:
        params: parameters of any dtypes on one device; those without a gradient are left out.
        max_norm: what the norm over all of them is brought down to.

    Returns:
        the norm before, a scalar on the device (nothing waits for it).
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    factor = (max_norm / (norm.float() + 1e-6)).clamp(max=1.0)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        by_dtype.setdefault(grad.dtype, []).append(grad)
    for dtype, group in by_dtype.items():
        torch._foreach_mul_(group, factor.to(dtype))
    return norm
