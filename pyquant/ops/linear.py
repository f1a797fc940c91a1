"""linear_w4a16: y = x @ w_hat.T + bias from 4-bit weights and 16-bit activations."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from pyquant import reference
from pyquant.formats.int4 import STRIP, UNIT_K
from pyquant.ops._checks import check, check_device, check_floats, check_tiled
from pyquant.ops._registry import Backend, define, extension, kernels, needs_torch, unavailable
from pyquant.ops._workspace import workspace
from pyquant.ops.quantize import _dequantize, dtype_code, pointer, stream

_HALVES = (torch.bfloat16, torch.float16)

# Above this many tokens GPUs before Hopper expand the weight to 16 bits once and let cuBLAS multiply: their fused kernel
# reads the weight once per 8 tokens and stops paying there. Hopper's serves any number.
FUSED_MAX_TOKENS = 64
# Up to this many, csrc/linear_decode.cuh serves any GPU and any x with rows in one piece.
FEW_TOKENS = 4
# Up to this many, Hopper's kernel for more tokens keeps the weight exact; above, it rounds it to 16 bits.
EXACT_TOKENS = 16
# From this many tokens and this many weights on, Hopper expands the weight too: in long runs, under the clocks that the
# card then keeps, its fused kernel takes 1.13 to 1.17 times cuBLAS there, expansion and cuBLAS together 1.04 to 1.08.
MANY_TOKENS, MANY_WEIGHTS = 2048, 40_000_000
EXPANDED_BYTES = 128 << 20  # of 16-bit weight at a time

# Up to this many tokens the gradient to x comes from the packed weight, above by expanding it and calling cuBLAS. Bytes
# a weight: 0.52 packed, once while all tokens fit one tile (64, kernels/linear_backward.py), against 4.5 for reading it,
# writing it in 16 bits and reading that; each further tile unpacks the weight again. Measured on an
# H200, 8192 x 8192, us: 16 tokens 40 against 99, 64 tokens 67 against 102, 128 tokens 117 against 100.
FUSED_BACKWARD_TOKENS = 64
PART = 128  # columns: parts of the expanded weight begin at whole units and whole groups


@functools.cache
def _multiprocessors(device: int) -> int:
    """Of a Hopper GPU; 0 for any other."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major == 9 else 0


def _workspace(device: int, stream_handle: int) -> Tensor:
    """Where the blocks of one launch leave parts of tiles for each other; see csrc/ops.h."""
    return workspace("linear", device, stream_handle, _workspace_bytes(device))


@functools.cache
def _workspace_bytes(device: int) -> int:
    return extension().linear_workspace(_multiprocessors(device))


def _linear_fake(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, group_size: int
) -> Tensor:
    check_floats("linear_w4a16", "x", x)
    check(x.dim() >= 1, "linear_w4a16: x must be [..., K], got a scalar")
    check_tiled("linear_w4a16", qweight, scale, zero, n, x.shape[-1], group_size)
    check(
        x.dtype == scale.dtype,
        f"linear_w4a16: x is {x.dtype} but the weight's scales are {scale.dtype}; convert one of them (module.to(dtype))",
    )
    check(bias is None or tuple(bias.shape) == (n,), f"linear_w4a16: bias must have shape ({n},)")
    check(bias is None or bias.dtype == x.dtype, f"linear_w4a16: bias must be {x.dtype} like x")
    check(bias is None or bias.is_contiguous(), "linear_w4a16: bias must be contiguous")
    check_device("linear_w4a16", x, qweight=qweight, bias=bias)
    return x.new_empty((*x.shape[:-1], n))


def _linear_cuda(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, group_size: int
) -> Tensor:
    y = _linear_fake(x, qweight, scale, zero, bias, n, group_size)
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if m == 0:
        return y
    hopper = _multiprocessors(x.device.index)
    if (m > FUSED_MAX_TOKENS and not hopper) or (m >= MANY_TOKENS and n * k >= MANY_WEIGHTS):
        return _expand_and_multiply(rows, y.view(m, n), qweight, scale, zero, bias, group_size).view(y.shape)
    handle, space = stream(), None
    if hopper and m > FEW_TOKENS:
        if k % 8 or rows.stride(0) % 8 or rows.stride(0) < k or rows.data_ptr() % 16:
            rows = torch.nn.functional.pad(rows, (0, -k % 8)).contiguous()  # the copy engine takes rows at 16 bytes
        space = _workspace(x.device.index, handle)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    extension().linear_w4a16(
        rows.data_ptr(), rows.stride(0), dtype_code(x.dtype), qweight.data_ptr(), scale.data_ptr(), pointer(zero),
        pointer(bias), y.data_ptr(), m, n, k, group_size, handle, pointer(space), 0 if space is None else space.numel(),
    )  # fmt: skip
    return y


def _expand_and_multiply(
    x: Tensor, y: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """y ``[M, N]``, by cuBLAS over a few thousand rows of the expanded weight at a time."""
    (n, k), size = (y.shape[1], x.shape[1]), x.element_size()
    parts = -(-n * k * size // EXPANDED_BYTES)
    strips = -(-len(qweight) // parts)
    for first in range(0, len(qweight), strips):
        part, begin = slice(first, first + strips), first * STRIP
        end = min(begin + strips * STRIP, n)
        own_zero = None if zero is None else zero[part]
        w_hat = _dequantize.call(qweight[part], scale[part], own_zero, end - begin, k, group_size, x.dtype)
        if bias is None:
            torch.mm(x, w_hat.T, out=y[:, begin:end])
        else:
            torch.addmm(bias[begin:end], x, w_hat.T, out=y[:, begin:end])
        del w_hat  # before the next part takes its place
    return y


def _linear_triton(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, group_size: int
) -> Tensor:
    y = _linear_fake(x, qweight, scale, zero, bias, n, group_size)
    if y.numel():
        k = x.shape[-1]
        kernels("linear").linear_w4a16(y.view(-1, n), x.reshape(-1, k), qweight, scale, zero, bias, group_size)
    return y


def _linear_torch(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, group_size: int
) -> Tensor:
    _linear_fake(x, qweight, scale, zero, bias, n, group_size)
    return reference.linear_w4a16(x, qweight, scale, zero, bias, n, group_size)


def _only_halves(x: Tensor, *args: object) -> str | None:
    return None if x.dtype in _HALVES else f"{x.dtype} activations run in torch"


# The gradient to x is an op of its own, so that torch.compile traces through the backward as well.


def _backward_fake(
    grad_y: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, k: int, group_size: int
) -> Tensor:
    check_tiled("linear_w4a16_backward", qweight, scale, zero, grad_y.shape[-1], k, group_size)
    return grad_y.new_empty((*grad_y.shape[:-1], k))


def _backward_gpu(
    grad_y: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, k: int, group_size: int
) -> Tensor:
    grad_x = _backward_fake(grad_y, qweight, scale, zero, k, group_size)
    rows = grad_y.reshape(-1, grad_y.shape[-1])
    if grad_x.numel() and len(rows) <= FUSED_BACKWARD_TOKENS and _triton_may_serve(grad_y.device.type):
        backward = kernels("linear_backward").linear_w4a16_backward
        backward(grad_x.view(-1, k), rows, qweight, scale, zero, group_size)
    elif grad_x.numel():
        _backward_expand(grad_x.view(-1, k), rows, qweight, scale, zero, group_size)
    return grad_x


def _triton_may_serve(device: str) -> bool:
    """The extension has no kernel for the gradient: Triton's serves it too, unless the extension is pinned."""
    return os.environ.get("PYQUANT_BACKEND") != "cuda" and unavailable("triton", device) is None


def _backward_expand(
    grad_x: Tensor,
    grad_y: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    part_bytes: int | None = None,
) -> None:
    """Fill grad_x ``[M, K]``, by cuBLAS over some columns of the expanded weight at a time.

    A part has all N features, so that each sum stays in one product and is rounded once; its packed columns are copied
    together first, a quarter more memory on top of the expanded part's at most :data:`EXPANDED_BYTES` (or ``part_bytes``).
    """
    n, k = grad_y.shape[1], grad_x.shape[1]
    column_bytes = grad_y.element_size() * max(n, 1)
    columns = max(1, (part_bytes or EXPANDED_BYTES) // (column_bytes * PART)) * PART
    for first in range(0, k, columns):
        width = min(columns, k - first)
        part = qweight, scale, zero
        if width < k:
            units = slice(first // UNIT_K, -(-(first + width) // UNIT_K))
            groups = slice(None) if group_size == -1 else slice(first // group_size, -(-(first + width) // group_size))
            part = qweight[:, units].contiguous(), *(None if t is None else t[:, groups].contiguous() for t in part[1:])
        w_hat = _dequantize.call(*part, n, width, group_size, grad_y.dtype)
        torch.mm(grad_y, w_hat, out=grad_x[:, first : first + width])
        del part, w_hat  # before the next part takes their place


_linear_backward = define(
    "linear_w4a16_backward(Tensor grad_y, Tensor qweight, Tensor scale, Tensor? zero, int k, int group_size) -> Tensor",
    fake=_backward_fake,
    backends={
        "cuda": Backend(_backward_gpu, _only_halves),
        "triton": Backend(_backward_gpu, _only_halves),
        "torch": Backend(reference.linear_w4a16_backward),
    },
)


def _linear_setup(ctx, inputs, output) -> None:
    x, qweight, scale, zero, bias, _, group_size = inputs
    ctx.save_for_backward(qweight, scale, zero)
    ctx.k, ctx.group_size, ctx.has_bias = x.shape[-1], group_size, bias is not None


def _linear_grad(ctx, grad_y: Tensor):
    qweight, scale, zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _linear_backward.overload(grad_y, qweight, scale, zero, ctx.k, ctx.group_size)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        wide = torch.promote_types(grad_y.dtype, torch.float32)
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=wide).to(grad_y.dtype)
    return grad_x, None, None, None, grad_bias, None, None


_linear = define(
    "linear_w4a16(Tensor x, Tensor qweight, Tensor scale, Tensor? zero, Tensor? bias, int n, int group_size) -> Tensor",
    fake=_linear_fake,
    backends={
        "cuda": Backend(_linear_cuda, _only_halves),
        "triton": Backend(_linear_triton, _only_halves),
        "torch": Backend(_linear_torch),
    },
    backward=_linear_grad,
    setup_context=_linear_setup,
)


def linear_w4a16(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, group_size: int
) -> Tensor:
    """``y = x @ w_hat.T + bias`` straight from the 4-bit weight; accumulation in fp32.

    The CUDA kernel for up to 4 tokens takes x as 16-bit fixed point within 128 columns (off by at most 2^-15 of the largest of
    them) and the weight as it is; a NaN or infinity makes its whole token NaN. Above 16 tokens w_hat is rounded to x's dtype.

    Differentiable in x and bias. The weight is frozen: codes, scales and zeros get no gradient (to train them, see
    :func:`pyquant.fake_quant` and :func:`pyquant.dequantize_int4`).

    Args:
        x: ``[..., K]`` bf16 or fp16 (fp32 runs in plain torch), any strides.
        qweight: int32 ``[ceil(N/64), ceil(K/64), 128, 4]``, from :func:`pyquant.quantize_int4`.
        scale: tiled scales in x's dtype, ``[ceil(N/64), padded groups, 64]``.
        zero: tiled zeros, uint8, or None for symmetric.
        bias: ``[n]`` in x's dtype, or None.
        n: output features.
        group_size: G in {32, 64, 128}, or -1 for per channel.

    Returns:
        y ``[..., n]`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the values.
    """
    if needs_torch(x, qweight, bias):
        return _linear.overload(x, qweight, scale, zero, bias, n, group_size)
    return _linear.call(x, qweight, scale, zero, bias, n, group_size)
