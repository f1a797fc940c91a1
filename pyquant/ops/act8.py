"""quantize_activation and its fused forms: tokens to 8-bit codes and scales. For inference: none has a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyquant import reference
from pyquant.formats import act8
from pyquant.formats.spec import GROUP_SIZES, num_groups
from pyquant.ops._checks import check, check_device, check_floats, check_no_grad
from pyquant.ops._registry import Backend, define, extension, kernels, needs_torch
from pyquant.ops.norm import rows_of
from pyquant.ops.quantize import dtype_code, pointer, stream

DTYPES = (torch.int8, act8.FP8)
Quantized = tuple[Tensor, Tensor, Tensor]
_HALVES = (torch.bfloat16, torch.float16)
_HOW = "int bits, int group_size, float clip, ScalarType dtype, int sum_size"


def _outputs(
    op: str, x: Tensor, k: int, bits: int, group_size: int, clip: float, dtype: torch.dtype, sum_size: int
) -> Quantized:
    check(dtype in DTYPES, f"{op}: dtype={dtype} must be torch.int8 or torch.float8_e4m3fn")
    check(2 <= bits <= 8, f"{op}: bits={bits} must be between 2 and 8")
    check(group_size == -1 or group_size > 0, f"{op}: group_size={group_size} must be positive, or -1 for whole tokens")
    check(0 < clip <= 1, f"{op}: clip={clip:g} must be in (0, 1]")
    check(sum_size >= -1, f"{op}: sum_size={sum_size} must be positive, -1 for whole tokens, or 0 for no sums")
    lead = tuple(x.shape[:-1])
    codes = x.new_empty((*lead, act8.padded_columns(k)), dtype=dtype)
    scale = act8.empty_groups(x, lead, num_groups(k, group_size))
    sums = (
        act8.empty_groups(x, lead, num_groups(k, sum_size))
        if sum_size
        else x.new_empty((*lead, 0), dtype=torch.float32)
    )
    return codes, scale, sums


def _check_x(op: str, name: str, x: Tensor) -> None:
    check_floats(op, name, x)
    check(x.dim() >= 1 and x.shape[-1] > 0, f"{op}: {name} must be [..., K] with K > 0, got shape {tuple(x.shape)}")


def _launch(
    x: Tensor, k: int, source: int, made: Quantized, how: tuple[Any, ...],
    weight: Tensor | None = None, eps: float = 0.0, small: Tensor | None = None,
) -> Quantized:  # fmt: skip
    codes, scale, sums = made
    bits, group_size, clip, dtype, sum_size = how
    if codes.numel():
        rows = rows_of(x)
        extension().quantize_activation(
            rows.data_ptr(), rows.stride(0), dtype_code(x.dtype), source, pointer(weight), eps, pointer(small),
            1 if small is None else small.shape[0], codes.data_ptr(), scale.data_ptr(), sums.data_ptr(), rows.shape[0], k,
            group_size, sum_size, bits, clip, dtype == act8.FP8, stream(),
        )  # fmt: skip
    return made


def _declines(x: Tensor, *args: Any) -> str | None:
    _, group_size, _, _, sum_size = args[-5:]
    if x.dtype not in _HALVES:
        return f"{x.dtype} runs in torch"
    if group_size not in GROUP_SIZES or sum_size not in (0, *GROUP_SIZES):
        return f"groups of {group_size} and sums of {sum_size} columns run in torch (known: 32, 64, 128, -1)"
    return None


def _triton_declines(x: Tensor, *how: Any) -> str | None:
    if how[3] != torch.int8:
        return f"{how[3]} runs in torch"
    if how[1] % 16 and how[1] != -1:
        return f"groups of {how[1]} columns run in torch (known: multiples of 16, -1)"
    return _declines(x, *how)


# ------------------------------------------------------------------------------------------------ quantize_activation


def _fake(x: Tensor, *how: Any) -> Quantized:
    _check_x("quantize_activation", "x", x)
    return _outputs("quantize_activation", x, x.shape[-1], *how)


def _cuda(x: Tensor, *how: Any) -> Quantized:
    return _launch(x, x.shape[-1], 0, _fake(x, *how), how)


def _triton(x: Tensor, *how: Any) -> Quantized:
    made = _fake(x, *how)
    if made[0].numel():
        kernels("act8").quantize_activation(*made, rows_of(x), *how)
    return made


def _torch_of(fake: Callable[..., Quantized], meaning: Callable[..., Quantized]) -> Callable[..., Quantized]:
    def run(*args: Any) -> Quantized:
        fake(*args)
        return meaning(*args)

    return run


_quantize = define(
    f"quantize_activation(Tensor x, {_HOW}) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    backends={
        "cuda": Backend(_cuda, _declines),
        "triton": Backend(_triton, _triton_declines),
        "torch": Backend(_torch_of(_fake, reference.quantize_activation)),
    },
)


def quantize_activation(
    x: Tensor,
    bits: int = 8,
    group_size: int = -1,
    clip: float = 1.0,
    dtype: torch.dtype = torch.int8,
    sum_size: int = 0,
) -> Quantized:
    """Round tokens to 8-bit codes with scales found on the way, symmetric, in one launch::

        scale = max(max|x| * fp32(clip / top), 1e-12)      top = 2^(bits-1) - 1, or 448 for e4m3
        code  = clamp(round(x / scale), -top - 1, top)     e4m3: x / scale limited to +-448 and rounded to e4m3

    Quotients are IEEE fp32, ties go to even, so codes and scales of every backend are the same bits. Where x has a NaN or an
    infinity, that scale is not finite (a code of a NaN quotient is 0), and so is what a product makes of that token.

    Args:
        x: ``[..., K]`` bf16 or fp16 (fp32 and fp64 run in plain torch), any strides.
        bits: 2..8; fewer than 8 are stored in the same bytes. Not used for e4m3.
        group_size: G, columns of a token that share a scale, or -1 for one scale a token. Kernels know 32, 64 and 128.
        clip: factor of the largest magnitude, in (0, 1].
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
        sum_size: columns of each sum of codes that a product needs besides (see :func:`pyquant.formats.act8.sum_size`);
            0 for none.

    Returns:
        codes ``[..., K padded to 64]`` in the order of :mod:`pyquant.formats.act8`, scale fp32 ``[..., ceil(K/G)]``, and sums
        fp32 ``[..., ceil(K/sum_size)]`` (``[..., 0]`` for none).

    Raises:
        ValueError: arguments that cannot be, with the values, or when a gradient is wanted.
    """
    check_no_grad("quantize_activation", x)
    run = _quantize.overload if needs_torch(x) else _quantize.call
    return run(x, bits, group_size, clip, dtype, sum_size)


# ------------------------------------------------------------------------------------------------ after a norm


def _norm_fake(x: Tensor, weight: Tensor, eps: float, *how: Any) -> Quantized:
    op = "rms_norm_quantize"
    _check_x(op, "x", x)
    k = x.shape[-1]
    check(tuple(weight.shape) == (k,), f"{op}: weight must have shape ({k},), got {tuple(weight.shape)}")
    check(weight.dtype == x.dtype, f"{op}: x is {x.dtype} but weight is {weight.dtype}")
    check(weight.is_contiguous(), f"{op}: weight must be contiguous")
    check_device(op, x, weight=weight)
    return _outputs(op, x, k, *how)


def _norm_cuda(x: Tensor, weight: Tensor, eps: float, *how: Any) -> Quantized:
    return _launch(x, x.shape[-1], 1, _norm_fake(x, weight, eps, *how), how, weight, eps)


_norm = define(
    f"rms_norm_quantize(Tensor x, Tensor weight, float eps, {_HOW}) -> (Tensor, Tensor, Tensor)",
    fake=_norm_fake,
    backends={
        "cuda": Backend(_norm_cuda, _declines),
        "torch": Backend(_torch_of(_norm_fake, reference.rms_norm_quantize)),
    },
)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    bits: int = 8,
    group_size: int = -1,
    clip: float = 1.0,
    dtype: torch.dtype = torch.int8,
    sum_size: int = 0,
) -> Quantized:
    """:func:`quantize_activation` of :func:`~pyquant.ops.rms_norm`, rounded to x's dtype in between, in one launch.

    Args:
        x: ``[..., K]``.
        weight: ``[K]`` in x's dtype.
        eps: added to the mean square.
        bits, group_size, clip, dtype, sum_size: as for :func:`quantize_activation`.

    Returns:
        codes, scale and sums.

    Raises:
        ValueError: arguments that cannot be, with the values, or when a gradient is wanted.
    """
    check_no_grad("rms_norm_quantize", x, weight)
    run = _norm.overload if needs_torch(x, weight) else _norm.call
    return run(x, weight, eps, bits, group_size, clip, dtype, sum_size)


# ------------------------------------------------------------------------------------------------ after silu * up


def _silu_fake(gate_up: Tensor, *how: Any) -> Quantized:
    op = "silu_and_mul_quantize"
    _check_x(op, "gate_up", gate_up)
    check(gate_up.shape[-1] % 2 == 0, f"{op}: gate_up must be [..., 2 K], got shape {tuple(gate_up.shape)}")
    return _outputs(op, gate_up, gate_up.shape[-1] // 2, *how)


def _silu_cuda(gate_up: Tensor, *how: Any) -> Quantized:
    return _launch(gate_up, gate_up.shape[-1] // 2, 2, _silu_fake(gate_up, *how), how)


_silu = define(
    f"silu_and_mul_quantize(Tensor gate_up, {_HOW}) -> (Tensor, Tensor, Tensor)",
    fake=_silu_fake,
    backends={
        "cuda": Backend(_silu_cuda, _declines),
        "torch": Backend(_torch_of(_silu_fake, reference.silu_and_mul_quantize)),
    },
)


def silu_and_mul_quantize(
    gate_up: Tensor,
    bits: int = 8,
    group_size: int = -1,
    clip: float = 1.0,
    dtype: torch.dtype = torch.int8,
    sum_size: int = 0,
) -> Quantized:
    """:func:`quantize_activation` of :func:`~pyquant.ops.silu_and_mul`, rounded to its dtype in between, in one launch.

    Args:
        gate_up: ``[..., 2 K]``, gate in the first half.
        bits, group_size, clip, dtype, sum_size: as for :func:`quantize_activation`.

    Returns:
        codes, scale and sums of ``[..., K]``.

    Raises:
        ValueError: arguments that cannot be, with the values, or when a gradient is wanted.
    """
    check_no_grad("silu_and_mul_quantize", gate_up)
    run = _silu.overload if needs_torch(gate_up) else _silu.call
    return run(gate_up, bits, group_size, clip, dtype, sum_size)


# ------------------------------------------------------------------------------------------------ after a rotation


def _hadamard_fake(x: Tensor, small: Tensor | None, *how: Any) -> Quantized:
    op = "hadamard_quantize"
    _check_x(op, "x", x)
    k, m = x.shape[-1], 1 if small is None else small.shape[0]
    if small is not None:
        check(small.dim() == 2 and small.shape == (m, m), f"{op}: small must be square, got {tuple(small.shape)}")
        check(small.dtype == torch.float32 and small.is_contiguous(), f"{op}: small must be contiguous float32")
    p = k // m
    check(k % m == 0 and p & (p - 1) == 0, f"{op}: K={k} is no power of two times the {m} rows of small")
    check_device(op, x, small=small)
    return _outputs(op, x, k, *how)


def _hadamard_cuda(x: Tensor, small: Tensor | None, *how: Any) -> Quantized:
    return _launch(x, x.shape[-1], 3, _hadamard_fake(x, small, *how), how, small=small)


_SHARED_FLOATS = 227 * 256  # that a block holds


def _hadamard_declines(x: Tensor, small: Tensor | None, *how: Any) -> str | None:
    if x.shape[-1] * (1 if small is None else 2) > _SHARED_FLOATS:
        return f"K={x.shape[-1]} does not fit into shared memory"
    return _declines(x, *how)


_hadamard = define(
    f"hadamard_quantize(Tensor x, Tensor? small, {_HOW}) -> (Tensor, Tensor, Tensor)",
    fake=_hadamard_fake,
    backends={
        "cuda": Backend(_hadamard_cuda, _hadamard_declines),
        "torch": Backend(_torch_of(_hadamard_fake, reference.hadamard_quantize)),
    },
)


def hadamard_quantize(
    x: Tensor,
    small: Tensor | None = None,
    bits: int = 8,
    group_size: int = -1,
    clip: float = 1.0,
    dtype: torch.dtype = torch.int8,
    sum_size: int = 0,
) -> Quantized:
    """:func:`quantize_activation` of ``x R``, rounded to x's dtype in between, in one launch; ``R = S (x) H`` with H the
    Walsh-Hadamard matrix of 2^n columns in natural order over sqrt(2^n), as QuaRot rotates online (arXiv 2404.00456).

    Sums are fp32 in an order of the kernel's own: codes at the border of two may differ from those of the reference.

    Args:
        x: ``[..., K]``, K = m 2^n.
        small: S, fp32 ``[m, m]`` contiguous, or None for m = 1. Meant for small m: the kernel takes m multiplications a
            value without tensor cores.
        bits, group_size, clip, dtype, sum_size: as for :func:`quantize_activation`.

    Returns:
        codes, scale and sums.

    Raises:
        ValueError: arguments that cannot be, with the values, or when a gradient is wanted.
    """
    check_no_grad("hadamard_quantize", x, small)
    run = _hadamard.overload if needs_torch(x, small) else _hadamard.call
    return run(x, small, bits, group_size, clip, dtype, sum_size)


def rows_of_groups(t: Tensor, m: int) -> Tensor:
    """Scales or sums ``[..., groups]`` as ``[M, groups]`` with the strides that kernels read; a copy where they differ."""
    flat = t.reshape(m, t.shape[-1])
    rows4 = math.ceil(m / 4) * 4
    fits = (flat.stride(0) == 1 or m == 1) and (flat.stride(1) == rows4 or flat.shape[1] == 1)
    room = flat.untyped_storage().nbytes() // 4 - flat.storage_offset() >= rows4 * flat.shape[1]
    return flat if fits and room and flat.data_ptr() % 16 == 0 else act8.store_groups(flat)
