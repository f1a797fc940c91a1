"""fake_quant: quantize and dequantize in one differentiable step, for training with quantized weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyquant import reference
from pyquant.ops._checks import check, check_device, check_floats, check_groups
from pyquant.ops._registry import Backend, define, extension, kernels, needs_torch
from pyquant.ops.quantize import _no_fp64, dtype_code, pointer, stream

ROUNDINGS = ("ste", "sigmoid-a", "sigmoid-b")
CLAMPS = ("hard", "sigmoid", "phi")
_HOW = (
    "int group_size, int bits, float grad_scale{one}, str rounding='ste', str clamp='hard', Tensor? temperature=None, "
    "float beta=10.0, bool soft_forward=False"
)


def _fake_quant_fake(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    grad_scale: float = 1.0,
    rounding: str = "ste",
    clamp: str = "hard",
    temperature: Tensor | None = None,
    beta: float = 10.0,
    soft_forward: bool = False,
) -> Tensor:
    check_floats("fake_quant", "w", w)
    check_groups("fake_quant", w, scale, zero, group_size, bits, most=8)
    for name, t in (("scale", scale), ("zero", zero)):
        check_floats("fake_quant", name, t) if t is not None else None
    check_device("fake_quant", w, scale=scale, zero=zero, temperature=temperature)
    check(rounding in ROUNDINGS, f"fake_quant: rounding={rounding!r} must be one of {', '.join(ROUNDINGS)}")
    check(clamp in CLAMPS, f"fake_quant: clamp={clamp!r} must be one of {', '.join(CLAMPS)}")
    if rounding != "ste":
        check(temperature is not None, f"fake_quant: rounding={rounding!r} needs a temperature")
    if temperature is not None:
        check(
            temperature.dim() == 0 and temperature.dtype == torch.float32,
            f"fake_quant: temperature must be a scalar of torch.float32, got {temperature.dtype} of shape "
            f"{tuple(temperature.shape)}",
        )
    check(0.01 <= beta <= 1e4, f"fake_quant: beta={beta} must be between 0.01 and 10000")
    return w.new_empty(w.shape)


_passed: set[tuple[Any, ...]] = set()  # what the checks above depend on, of calls that they let through


def _output(w: Tensor, scale: Tensor, zero: Tensor | None, *how: Any) -> Tensor:
    """:func:`_fake_quant_fake` for real tensors; the checks, most of a call's time on the host, once for calls alike."""
    key = (*((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in (w, scale, zero, *how)),)
    if key in _passed:
        return torch.empty_like(w, memory_format=torch.contiguous_format)
    out = _fake_quant_fake(w, scale, zero, *how)
    if len(_passed) < 4096:
        _passed.add(key)
    return out


def _backward_fake(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    grad_scale: float,
    *soft: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(_fake_quant_fake(w, scale, zero, group_size, bits, grad_scale, *soft), grad, scale, zero)


def _gradients(dw: Tensor, grad: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of w (given), scale and zero."""
    if grad.shape != dw.shape:
        check(False, f"fake_quant: gradient {tuple(grad.shape)} does not match w {tuple(dw.shape)}")
    dzero = scale.new_empty(0) if zero is None else zero.new_empty(zero.shape)
    return dw, scale.new_empty(scale.shape), dzero


# ------------------------------------------------------------------------------------------------ backends


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _f32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _surrogate(
    rounding: str = "ste",
    clamp: str = "hard",
    temperature: Tensor | None = None,
    beta: float = 10.0,
    soft_forward: bool = False,
) -> tuple[int, int, int, float, bool]:
    """The same as csrc/ops.h takes it: numbers and an address."""
    return ROUNDINGS.index(rounding), CLAMPS.index(clamp), pointer(temperature), beta, soft_forward


def _forward_cuda(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float = 1.0, *soft: Any
) -> Tensor:
    out = _output(w, scale, zero, group_size, bits, grad_scale, *soft)
    w, scale, zero = _rows(w), _f32(scale), _f32(zero)
    extension().fake_quant(
        w.data_ptr(), dtype_code(w.dtype), w.stride(0), scale.data_ptr(), pointer(zero),
        out.data_ptr(), *w.shape, group_size, bits, *_surrogate(*soft), stream(),
    )  # fmt: skip
    return out


def _forward_triton(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float = 1.0, *soft: Any
) -> Tensor:
    out = _output(w, scale, zero, group_size, bits, grad_scale, *soft)
    kernels("fake_quant").fake_quant(out, w, scale, zero, group_size, bits, *soft)
    return out


def _forward_torch(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int, grad_scale: float = 1.0, *soft: Any
) -> Tensor:
    _fake_quant_fake(w, scale, zero, group_size, bits, grad_scale, *soft)
    # a transposed w gives a transposed result
    return reference.fake_quant(w, scale, zero, group_size, bits, grad_scale, *soft).contiguous()


def _backward_cuda(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    grad_scale: float,
    *soft: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dw, dscale, dzero = _gradients(_output(w, scale, zero, group_size, bits, grad_scale, *soft), grad, scale, zero)
    grad, w, scale, zero = _rows(grad.to(w.dtype)), _rows(w), _f32(scale), _f32(zero)
    wide_dscale, wide_dzero = dscale.float(), dzero.float()
    extension().fake_quant_backward(
        grad.data_ptr(), grad.stride(0), w.data_ptr(), dtype_code(w.dtype), w.stride(0),
        scale.data_ptr(), pointer(zero), dw.data_ptr(), wide_dscale.data_ptr(), wide_dzero.data_ptr(),
        *w.shape, group_size, bits, grad_scale, *_surrogate(*soft), stream(),
    )  # fmt: skip
    return dw, wide_dscale.to(dscale.dtype), wide_dzero.to(dzero.dtype)


def _backward_triton(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    grad_scale: float,
    *soft: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dw, dscale, dzero = _gradients(_output(w, scale, zero, group_size, bits, grad_scale, *soft), grad, scale, zero)
    kernels("fake_quant").fake_quant_backward(
        dw, dscale, None if zero is None else dzero, grad, w, scale, zero, group_size, bits, grad_scale, *soft
    )
    return dw, dscale, dzero


def _backward_torch(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    grad_scale: float,
    *soft: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _backward_fake(grad, w, scale, zero, group_size, bits, grad_scale, *soft)
    results = reference.fake_quant_backward(grad, w, scale, zero, group_size, bits, grad_scale, *soft)
    return tuple(t.contiguous() for t in results)


# ------------------------------------------------------------------------------------------------ the op

_fake_quant_backward = define(
    f"fake_quant_backward(Tensor grad, Tensor w, Tensor scale, Tensor? zero, {_HOW.format(one='')})"
    " -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    backends={
        "cuda": Backend(_backward_cuda, _no_fp64),
        "triton": Backend(_backward_triton, _no_fp64),
        "torch": Backend(_backward_torch),
    },
)


def _setup(ctx, inputs, output) -> None:
    w, scale, zero, group_size, bits, grad_scale, rounding, clamp, temperature, beta, soft_forward = inputs
    ctx.save_for_backward(w, scale, zero, temperature)
    ctx.how = group_size, bits, grad_scale, rounding, clamp, beta, soft_forward


def _grad(ctx, grad: Tensor):
    w, scale, zero, temperature = ctx.saved_tensors
    group_size, bits, grad_scale, rounding, clamp, beta, soft_forward = ctx.how
    how = (grad, w, scale, zero, group_size, bits, grad_scale, rounding, clamp, temperature, beta, soft_forward)
    run = _fake_quant_backward.overload if needs_torch(grad, w, scale, zero) else _fake_quant_backward.call
    dw, dscale, dzero = run(*how)
    return (dw, dscale, None if zero is None else dzero, *[None] * 8)


_fake_quant = define(
    f"fake_quant(Tensor w, Tensor scale, Tensor? zero, {_HOW.format(one='=1.0')}) -> Tensor",
    fake=_fake_quant_fake,
    backends={
        "cuda": Backend(_forward_cuda, _no_fp64),
        "triton": Backend(_forward_triton, _no_fp64),
        "torch": Backend(_forward_torch),
    },
    backward=_grad,
    setup_context=_setup,
)


class _Plain(torch.autograd.Function):
    """The op and its gradient for ordinary tensors, past the dispatcher: half of the host's time, which a training step of
    many layers waits for."""

    @staticmethod
    def forward(ctx, *how: Any) -> Tensor:
        _setup(ctx, how, None)
        return _fake_quant.call(*how)

    backward = staticmethod(_grad)


def fake_quant(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    group_size: int = -1,
    bits: int = 4,
    grad_scale: float = 1.0,
    rounding: str = "ste",
    clamp: str = "hard",
    temperature: Tensor | float | None = None,
    beta: float = 10.0,
    soft_forward: bool = False,
) -> Tensor:
    """Round a weight to its quantized value while staying differentiable, with learned step sizes.

    Forward: ``(clamp(round(w / scale) + zero) - zero) * scale``, computed in fp32. Without a zero the codes are
    ``-2^(b-1) .. 2^(b-1)-1``; with one they are ``0 .. 2^b-1`` and the zero is rounded to an integer first.

    Backward: with v = w / scale and h' the slope of the chosen rounding over the chosen clamp, w gets ``h'``, scale gets
    ``(q - zero) - v h'`` and zero gets ``scale (h' - 1)``; the last two are summed over the group and multiplied by
    grad_scale. With "ste" and "hard", h' is 1 inside the range of the codes and 0 outside: LSQ (Esser et al., 1902.08153),
    with a zero LSQ+ (Bhalgat et al., 2004.09576). The other roundings and clamps are readings of 2410.10849, with every
    formula in :func:`pyquant.reference.soft_round` and :func:`pyquant.reference.soft_clamp`.

    The kernels save w and the parameters only, and compute everything else anew in the backward. For 16-bit weights they
    take logistic functions to 2^-12, which stays below the rounding of the gradient they return.

    Args:
        w: ``[N, K]`` bf16, fp16 or fp32.
        scale: ``[N, ceil(K/G)]`` float, positive.
        zero: like scale, float, or None for symmetric.
        group_size: any G >= 1, or -1 for one scale per row.
        bits: 2..8.
        grad_scale: factor on the gradients of scale and zero; LSQ proposes ``1 / sqrt(G * qmax)``.
        rounding: slope of the rounding: "ste" (1), "sigmoid-a" or "sigmoid-b".
        clamp: "hard", "sigmoid" (gate ``sigmoid(beta z)``) or "phi" (gate ``Phi(beta z / 1.702)``).
        temperature: sharpness of a sigmoid rounding, in 1 / step, positive: a scalar fp32 tensor on w's device, which may
            change in place between calls without a recompilation or a wait for the device; a float is turned into one.
            Needed unless rounding is "ste".
        beta: sharpness of a soft clamp, in 1 / step, 0.01 to 10000.
        soft_forward: False: the forward is the exact rounding, what will be deployed, and the surrogate is in the backward
            alone. True: the forward is the surrogate as well, ``(f(c(v + zero)) - zero) * scale``; scale's gradient then has
            this value in the place of ``q - zero``. ("ste" rounds in both.)

    Returns:
        w_hat, shape and dtype of w.

    Raises:
        ValueError: names, shapes, dtypes or devices that do not fit, with the values.
    """
    if isinstance(temperature, float | int):
        check(temperature > 0, f"fake_quant: temperature={temperature} must be positive")
        temperature = torch.full((), float(temperature), dtype=torch.float32, device=w.device)
    how = (w, scale, zero, group_size, bits, grad_scale, rounding, clamp, temperature, beta, soft_forward)
    if not needs_torch(w, scale, zero):
        return _fake_quant.call(*how)
    plain = not torch.compiler.is_compiling() and all(
        t is None or type(t) in (Tensor, torch.nn.Parameter) for t in (w, scale, zero)
    )
    return _Plain.apply(*how) if plain else _fake_quant.overload(*how)
