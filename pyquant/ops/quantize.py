"""quantize_int4 and dequantize_int4: between float weights and the tiled order of :mod:`pyquant.formats.int4`."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant import reference
from pyquant.formats import int4
from pyquant.ops._checks import check_device, check_floats, check_groups, check_tiled
from pyquant.ops._registry import Backend, define, extension, kernels, needs_torch

_DTYPE_CODE = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def dtype_code(dtype: torch.dtype) -> int:
    """The extension's number for a float dtype."""
    return _DTYPE_CODE[dtype]


def stream() -> int:
    """The current CUDA stream as the integer that the extension takes."""
    return torch.cuda.current_stream().cuda_stream


def pointer(t: Tensor | None) -> int:
    """Address of a tensor's first element, 0 for None."""
    return 0 if t is None else t.data_ptr()


# ------------------------------------------------------------------------------------------------ quantize_int4


def _quantize_fake(w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> Tensor:
    check_floats("quantize_int4", "w", w)
    check_floats("quantize_int4", "scale", scale)
    check_groups("quantize_int4", w, scale, zero, group_size, bits, most=4)
    check_device("quantize_int4", w, scale=scale, zero=zero)
    return w.new_empty(int4.tiled_shape(*w.shape), dtype=torch.int32)


def _quantize_cuda(w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> Tensor:
    out = _quantize_fake(w, scale, zero, group_size, bits)
    w = w if w.stride(1) == 1 else w.contiguous()
    scale = scale.float().contiguous()
    zero = None if zero is None else zero.float().contiguous()
    n, k = w.shape
    extension().quantize_int4(
        w.data_ptr(), dtype_code(w.dtype), w.stride(0), scale.data_ptr(), pointer(zero),
        out.data_ptr(), n, k, group_size, bits, stream(),
    )  # fmt: skip
    return out


def _quantize_triton(w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> Tensor:
    out = _quantize_fake(w, scale, zero, group_size, bits)
    kernels("quantize").quantize_int4(out, w, scale, zero, group_size, bits)
    return out


def _quantize_torch(w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> Tensor:
    _quantize_fake(w, scale, zero, group_size, bits)
    return reference.quantize_int4(w, scale, zero, group_size, bits)


def _no_fp64(*args: object) -> str | None:
    wide = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
    return "float64 runs in torch" if wide else None


_quantize = define(
    "quantize_int4(Tensor w, Tensor scale, Tensor? zero, int group_size, int bits) -> Tensor",
    fake=_quantize_fake,
    backends={
        "cuda": Backend(_quantize_cuda, _no_fp64),
        "triton": Backend(_quantize_triton, _no_fp64),
        "torch": Backend(_quantize_torch),
    },
)


def quantize_int4(w: Tensor, scale: Tensor, zero: Tensor | None = None, group_size: int = -1, bits: int = 4) -> Tensor:
    """Round a weight to codes and lay them out in the tiled order that the kernels read.

    ``code = clamp(round_half_even(w / scale) + zero)``; without a zero the codes are symmetric around 8. Not differentiable
    (see :func:`pyquant.fake_quant`).

    Args:
        w: ``[N, K]`` bf16, fp16 or fp32.
        scale: ``[N, ceil(K/G)]`` float, row-major.
        zero: like scale, holding integers 0..15, or None for symmetric.
        group_size: G, or -1 for one scale per row.
        bits: 2..4; narrower codes live in the same 4-bit container.

    Returns:
        qweight int32 ``[ceil(N/64), ceil(K/64), 128, 4]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the values.
    """
    if needs_torch(w, scale, zero):
        return _quantize.overload(w, scale, zero, group_size, bits)
    return _quantize.call(w, scale, zero, group_size, bits)


# ------------------------------------------------------------------------------------------------ dequantize_int4


def _dequantize_fake(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    check_tiled("dequantize_int4", qweight, scale, zero, n, k, group_size)
    return scale.new_empty((n, k), dtype=dtype or scale.dtype)


def _dequantize_cuda(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out = _dequantize_fake(qweight, scale, zero, n, k, group_size, dtype)
    extension().dequantize_int4(
        qweight.data_ptr(), scale.data_ptr(), dtype_code(scale.dtype), pointer(zero),
        out.data_ptr(), dtype_code(out.dtype), n, k, group_size, stream(),
    )  # fmt: skip
    return out


def _dequantize_triton(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out = _dequantize_fake(qweight, scale, zero, n, k, group_size, dtype)
    kernels("quantize").dequantize_int4(out, qweight, scale, zero, group_size)
    return out


def _dequantize_torch(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _dequantize_fake(qweight, scale, zero, n, k, group_size, dtype)
    return reference.dequantize_int4(qweight, scale, zero, n, k, group_size, dtype)


def _dequantize_declines(qweight: Tensor, scale: Tensor, *args: object) -> str | None:
    wide = torch.float64 in (scale.dtype, args[-1] if args else None)
    return "float64 runs in torch" if wide else None


def _dequantize_setup(ctx, inputs, output) -> None:
    qweight, scale, zero, n, k, group_size, _ = inputs
    ctx.save_for_backward(qweight, scale, zero)
    ctx.sizes = n, k, group_size


def _dequantize_backward(ctx, grad: Tensor):
    """dscale = sum over the group of grad * (codes - zero), in tiled order; the codes are frozen."""
    qweight, scale, zero = ctx.saved_tensors
    n, k, group_size = ctx.sizes
    if not ctx.needs_input_grad[1]:
        return (None,) * 7
    ones = torch.ones_like(scale, dtype=torch.promote_types(scale.dtype, torch.float32))
    steps = _dequantize.overload(qweight, ones, zero, n, k, group_size, None)
    groups = reference.sum_groups(grad.to(steps.dtype) * steps, group_size)
    return None, int4.tile_scale(groups, k, group_size).to(scale.dtype), None, None, None, None, None


_dequantize = define(
    "dequantize_int4(Tensor qweight, Tensor scale, Tensor? zero, int n, int k, int group_size, ScalarType? dtype=None)"
    " -> Tensor",
    fake=_dequantize_fake,
    backends={
        "cuda": Backend(_dequantize_cuda, _dequantize_declines),
        "triton": Backend(_dequantize_triton, _dequantize_declines),
        "torch": Backend(_dequantize_torch),
    },
    backward=_dequantize_backward,
    setup_context=_dequantize_setup,
)


def dequantize_int4(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight that a tiled qweight stands for: ``(codes - zero) * scale``, computed in fp32 and rounded once.

    Args:
        qweight: int32 ``[ceil(N/64), ceil(K/64), 128, 4]``.
        scale: tiled scales ``[ceil(N/64), padded groups, 64]``; receives a gradient (for training scales over fixed codes).
        zero: tiled zeros, uint8, or None for symmetric.
        n, k: true sizes of the weight.
        group_size: G, or -1.
        dtype: of the result; scale's by default.

    Returns:
        ``[n, k]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the values.
    """
    if needs_torch(qweight, scale, zero):
        return _dequantize.overload(qweight, scale, zero, n, k, group_size, dtype)
    return _dequantize.call(qweight, scale, zero, n, k, group_size, dtype)
