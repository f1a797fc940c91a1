"""What the kernels are compared with: makers of ``(x -> y)`` callables from a full-precision weight, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import QLinear

Maker = Callable[[Tensor, int], Callable[[Tensor], Tensor]]


def cublas(w: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """torch's 16-bit linear, i.e. cuBLAS."""
    return lambda x: torch.nn.functional.linear(x, w)


def pyquant(w: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """QLinear, symmetric; whatever backend serves it."""
    n, k = w.shape
    linear = torch.nn.Linear(k, n, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    return QLinear.from_linear(linear, QuantSpec(4, group)).requires_grad_(False)


def tinygemm(w: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """torch's own int4 kernel (bf16, asymmetric scales and zeros); random codes are as good as any for timing."""
    if w.dtype != torch.bfloat16 or group < 32:
        raise NotImplementedError("tinygemm takes bf16 and groups of 32 and more")
    n, k = w.shape
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=w.device)
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = (torch.rand(k // group, n, 2, device=w.device) + 0.5) * 0.2 / k**0.5  # results of the size of x
    scales[..., 1] -= scales[..., 1].mean()
    scales = scales.bfloat16()
    return lambda x: torch._weight_int4pack_mm(x, packed, group, scales)


LINEAR: dict[str, Maker] = {"cublas-bf16": cublas, "pyquant": pyquant, "tinygemm": tinygemm}
