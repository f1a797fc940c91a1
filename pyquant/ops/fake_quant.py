"""fake_quant: quantize and dequantize in one differentiable step, for training with quantized weights."""

from __future__ import annotations

from torch import Tensor

from pyquant import reference
from pyquant.ops._checks import check, check_device, check_floats, check_groups
from pyquant.ops._registry import Backend, define, extension, kernels, needs_torch
from pyquant.ops.quantize import _no_fp64, dtype_code, pointer, stream


def _fake_quant_fake(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float = 1.0
) -> Tensor:
    check_floats("fake_quant", "w", w)
    check_groups("fake_quant", w, scale, zero, group_size, bits, most=8)
    for name, t in (("scale", scale), ("zero", zero)):
        check_floats("fake_quant", name, t) if t is not None else None
    check_device("fake_quant", w, scale=scale, zero=zero)
    return w.new_empty(w.shape)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _f32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _forward_cuda(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float = 1.0
) -> Tensor:
    out = _fake_quant_fake(w, scale, zero, group_size, bits)
    w, scale, zero = _rows(w), _f32(scale), _f32(zero)
    extension().fake_quant(
        w.data_ptr(), dtype_code(w.dtype), w.stride(0), scale.data_ptr(), pointer(zero),
        out.data_ptr(), *w.shape, group_size, bits, stream(),
    )  # fmt: skip
    return out


def _forward_triton(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float = 1.0
) -> Tensor:
    out = _fake_quant_fake(w, scale, zero, group_size, bits)
    kernels("fake_quant").fake_quant(out, w, scale, zero, group_size, bits)
    return out


def _forward_torch(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float = 1.0
) -> Tensor:
    _fake_quant_fake(w, scale, zero, group_size, bits)
    return reference.fake_quant(
        w, scale, zero, group_size, bits
    ).contiguous()  # a transposed w gives a transposed result


def _backward_fake(
    grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _fake_quant_fake(w, scale, zero, group_size, bits)
    check(grad.shape == w.shape, f"fake_quant: gradient {tuple(grad.shape)} does not match w {tuple(w.shape)}")
    dzero = scale.new_empty(0) if zero is None else zero.new_empty(zero.shape)
    return w.new_empty(w.shape), scale.new_empty(scale.shape), dzero


def _backward_cuda(
    grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dw, dscale, dzero = _backward_fake(grad, w, scale, zero, group_size, bits, grad_scale)
    grad, w, scale, zero = _rows(grad.to(w.dtype)), _rows(w), _f32(scale), _f32(zero)
    wide_dscale, wide_dzero = dscale.float(), dzero.float()
    extension().fake_quant_backward(
        grad.data_ptr(), grad.stride(0), w.data_ptr(), dtype_code(w.dtype), w.stride(0),
        scale.data_ptr(), pointer(zero), dw.data_ptr(), wide_dscale.data_ptr(), wide_dzero.data_ptr(),
        *w.shape, group_size, bits, grad_scale, stream(),
    )  # fmt: skip
    return dw, wide_dscale.to(dscale.dtype), wide_dzero.to(dzero.dtype)


def _backward_triton(
    grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dw, dscale, dzero = _backward_fake(grad, w, scale, zero, group_size, bits, grad_scale)
    kernels("fake_quant").fake_quant_backward(
        dw, dscale, None if zero is None else dzero, grad, w, scale, zero, group_size, bits, grad_scale
    )
    return dw, dscale, dzero


def _backward_torch(
    grad: Tensor, w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _backward_fake(grad, w, scale, zero, group_size, bits, grad_scale)
    results = reference.fake_quant_backward(grad, w, scale, zero, group_size, bits, grad_scale)
    return tuple(t.contiguous() for t in results)


_fake_quant_backward = define(
    "fake_quant_backward(Tensor grad, Tensor w, Tensor scale, Tensor? zero, int group_size, int bits, float grad_scale)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backends={
        "cuda": Backend(_backward_cuda, _no_fp64),
        "triton": Backend(_backward_triton, _no_fp64),
        "torch": Backend(_backward_torch),
    },
)


def _setup(ctx, inputs, output) -> None:
    w, scale, zero, group_size, bits, grad_scale = inputs
    ctx.save_for_backward(w, scale, zero)
    ctx.how = group_size, bits, grad_scale


def _grad(ctx, grad: Tensor):
    w, scale, zero = ctx.saved_tensors
    dw, dscale, dzero = _fake_quant_backward.overload(grad, w, scale, zero, *ctx.how)
    return dw, dscale, None if zero is None else dzero, None, None, None


_fake_quant = define(
    "fake_quant(Tensor w, Tensor scale, Tensor? zero, int group_size, int bits, float grad_scale=1.0) -> Tensor",
    fake=_fake_quant_fake,
    backends={
        "cuda": Backend(_forward_cuda, _no_fp64),
        "triton": Backend(_forward_triton, _no_fp64),
        "torch": Backend(_forward_torch),
    },
    backward=_grad,
    setup_context=_setup,
)


def fake_quant(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    group_size: int = -1,
    bits: int = 4,
    grad_scale: float = 1.0,
) -> Tensor:
    """Round a weight to its quantized value while staying differentiable (straight-through, learned step size).

    Forward: ``(clamp(round(w / scale) + zero) - zero) * scale``, computed in fp32. Without a zero the codes are
    ``-2^(b-1) .. 2^(b-1)-1``; with one they are ``0 .. 2^b-1`` and the zero is rounded to an integer first.

    Backward, inside meaning that w lies in the range of the codes: w gets the gradient inside and 0 outside (STE); scale
    gets ``(q - zero) - w/scale`` inside and ``q - zero`` outside (LSQ, Esser et al. 2019); zero gets 0 inside and
    ``-scale`` outside (LSQ+, Bhalgat et al. 2020); both are summed over the group and multiplied by grad_scale.

    Args:
        w: ``[N, K]`` bf16, fp16 or fp32.
        scale: ``[N, ceil(K/G)]`` float, positive.
        zero: like scale, float, or None for symmetric.
        group_size: any G >= 1, or -1 for one scale per row.
        bits: 2..8.
        grad_scale: factor on the gradients of scale and zero; LSQ proposes ``1 / sqrt(G * qmax)``.

    Returns:
        w_hat, shape and dtype of w.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the values.
    """
    if needs_torch(w, scale, zero):
        return _fake_quant.overload(w, scale, zero, group_size, bits, grad_scale)
    return _fake_quant.call(w, scale, zero, group_size, bits, grad_scale)
