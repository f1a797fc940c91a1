"""linear_w4a8: the product of 8-bit codes of tokens and a 4-bit weight. For inference: it has no gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyquant import reference
from pyquant.formats import act8
from pyquant.formats.spec import GROUP_SIZES, num_groups
from pyquant.ops._checks import check, check_device, check_no_grad, check_tiled
from pyquant.ops._registry import Backend, define, extension, kernels, needs_torch
from pyquant.ops._workspace import workspace
from pyquant.ops.act8 import DTYPES, rows_of_groups
from pyquant.ops.linear import _multiprocessors
from pyquant.ops.quantize import dtype_code, pointer, stream

_HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def _workspace_bytes(device: int) -> int:
    return extension().linear_w4a8_workspace(_multiprocessors(device))


def _fake(
    codes: Tensor, act_scale: Tensor, sums: Tensor | None, qweight: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, n: int, k: int, group_size: int, act_group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    op = "linear_w4a8"
    check(codes.dtype in DTYPES, f"{op}: codes must be torch.int8 or torch.float8_e4m3fn, not {codes.dtype}")
    check(
        codes.dim() >= 1 and codes.shape[-1] == act8.padded_columns(k),
        f"{op}: codes of K={k} must be [..., {act8.padded_columns(k)}], got shape {tuple(codes.shape)}",
    )
    check(codes.is_contiguous(), f"{op}: codes must be contiguous")
    check_tiled(op, qweight, scale, zero, n, k, group_size)
    check(act_group_size in GROUP_SIZES, f"{op}: act_group_size={act_group_size} must be one of {GROUP_SIZES}")
    want = (*codes.shape[:-1], num_groups(k, act_group_size))
    check(
        act_scale.dtype == torch.float32 and tuple(act_scale.shape) == tuple(want),
        f"{op}: act_scale must be float32 {tuple(want)} for act_group_size={act_group_size}, "
        f"got {act_scale.dtype} {tuple(act_scale.shape)}",
    )
    if act8.needs_sums(zero is None, codes.dtype):
        size = act8.sum_size(group_size, act_group_size)
        want = (*codes.shape[:-1], num_groups(k, size))
        got = None if sums is None else tuple(sums.shape)
        check(
            sums is not None and got == tuple(want) and sums.dtype == torch.float32,
            f"{op}: zeros, and e4m3 codes, need sums float32 {tuple(want)} of {size} columns each, got {got}: pass "
            f"sum_size={size} when quantizing",
        )
    check(bias is None or tuple(bias.shape) == (n,), f"{op}: bias must have shape ({n},)")
    check(bias is None or bias.dtype == scale.dtype, f"{op}: bias must be {scale.dtype} like the weight's scales")
    check(bias is None or bias.is_contiguous(), f"{op}: bias must be contiguous")
    check(
        dtype in (scale.dtype, torch.float32),
        f"{op}: dtype={dtype} must be that of the weight's scales, {scale.dtype}, or float32",
    )
    check_device(op, codes, act_scale=act_scale, sums=sums, qweight=qweight, bias=bias)
    return codes.new_empty((*codes.shape[:-1], n), dtype=dtype)


def _launch(
    y: Tensor, codes: Tensor, act_scale: Tensor, sums: Tensor | None, qweight: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, n: int, k: int, group_size: int, act_group_size: int,
    tokens: int = 0, variant: int = -1,
) -> None:  # fmt: skip
    """One launch; tokens and variant pin the kernel's tile, see csrc/ops.h."""
    device, handle = codes.device.index, stream()
    m = codes.numel() // codes.shape[-1]
    act_scale = rows_of_groups(act_scale, m)
    needed = act8.needs_sums(zero is None, codes.dtype)
    sums = rows_of_groups(sums, m) if needed and sums is not None else None
    space = None
    if _multiprocessors(device):
        space = workspace("linear_w4a8", device, handle, _workspace_bytes(device))
    extension().linear_w4a8(
        codes.data_ptr(), act_scale.data_ptr(), pointer(sums), codes.dtype == act8.FP8, qweight.data_ptr(),
        scale.data_ptr(), dtype_code(scale.dtype), pointer(zero), pointer(bias), y.data_ptr(), dtype_code(y.dtype), m, n, k,
        group_size, act_group_size, handle, pointer(space), 0 if space is None else space.numel(), tokens, variant,
    )  # fmt: skip


def _cuda(
    codes: Tensor, act_scale: Tensor, sums: Tensor | None, qweight: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, n: int, k: int, group_size: int, act_group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    y = _fake(codes, act_scale, sums, qweight, scale, zero, bias, n, k, group_size, act_group_size, dtype)
    if y.numel():
        _launch(y, codes, act_scale, sums, qweight, scale, zero, bias, n, k, group_size, act_group_size)
    return y


def _triton(
    codes: Tensor, act_scale: Tensor, sums: Tensor | None, qweight: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, n: int, k: int, group_size: int, act_group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    y = _fake(codes, act_scale, sums, qweight, scale, zero, bias, n, k, group_size, act_group_size, dtype)
    if y.numel():
        flat, m = codes.view(-1, codes.shape[-1]), codes.numel() // codes.shape[-1]
        kernels("linear_a8").linear_w4a8(
            y.view(m, n), flat, act_scale.reshape(m, -1), qweight, scale, zero, bias, k, group_size, act_group_size
        )
    return y


def _torch(
    codes: Tensor, act_scale: Tensor, sums: Tensor | None, qweight: Tensor, scale: Tensor, zero: Tensor | None,
    bias: Tensor | None, n: int, k: int, group_size: int, act_group_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    args = codes, act_scale, sums, qweight, scale, zero, bias, n, k, group_size, act_group_size, dtype
    _fake(*args)
    return reference.linear_w4a8(*args)


def _cuda_declines(
    codes: Tensor, act_scale: Tensor, sums: Tensor | None, qweight: Tensor, scale: Tensor, *args
) -> str | None:
    if scale.dtype not in _HALVES:
        return f"scales of {scale.dtype} run in torch"
    if codes.dtype != torch.int8 and not _multiprocessors(codes.device.index):
        return "e4m3 codes need a Hopper GPU"
    return None


def _triton_declines(
    codes: Tensor, act_scale: Tensor, sums: Tensor | None, qweight: Tensor, scale: Tensor, *args
) -> str | None:
    if scale.dtype not in _HALVES:
        return f"scales of {scale.dtype} run in torch"
    return None if codes.dtype == torch.int8 else "e4m3 codes run in torch"


_linear = define(
    "linear_w4a8(Tensor codes, Tensor act_scale, Tensor? sums, Tensor qweight, Tensor scale, Tensor? zero, Tensor? bias, "
    "int n, int k, int group_size, int act_group_size, ScalarType dtype) -> Tensor",
    fake=_fake,
    backends={
        "cuda": Backend(_cuda, _cuda_declines),
        "triton": Backend(_triton, _triton_declines),
        "torch": Backend(_torch),
    },
)


def linear_w4a8(
    codes: Tensor,
    act_scale: Tensor,
    sums: Tensor | None,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    act_group_size: int = -1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``y[m, n] = sum over pieces of K with one s_a and one s_w of s_w s_a sum(code * (w - zero)) + bias[n]``.

    int8 codes: the inner sums are exact integers; what follows is fp32, once in at most 128 columns. e4m3 codes: the inner
    sums are those of the tensor cores, which keep about 13 bits of the largest term of 32.

    Args:
        codes, act_scale, sums: from :func:`quantize_activation` of ``[..., K]`` with group_size ``act_group_size`` and, where
            :func:`pyquant.formats.act8.needs_sums` says so, sum_size :func:`pyquant.formats.act8.sum_size`.
        qweight, scale, zero: a tiled weight, as for :func:`pyquant.linear_w4a16`.
        bias: ``[n]`` in scale's dtype, or None.
        n, k: true sizes of the weight.
        group_size: of the weight, in {32, 64, 128}, or -1.
        act_group_size: of the tokens, likewise.
        dtype: of y: scale's (the default) or fp32.

    Returns:
        y ``[..., n]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the values, or when a gradient is wanted.
    """
    check_no_grad("linear_w4a8", act_scale, scale, bias)
    run = _linear.overload if needs_torch(codes, act_scale, qweight, bias) else _linear.call
    return run(
        codes, act_scale, sums, qweight, scale, zero, bias, n, k, group_size, act_group_size, dtype or scale.dtype
    )  # fmt: skip
