"""silu_and_mul: the activation between the gate and up projections and the down projection. No gradient."""

from __future__ import annotations

from torch import Tensor

from pyquant import reference
from pyquant.ops._checks import check, check_floats, check_no_grad
from pyquant.ops._registry import Backend, define, extension, needs_torch
from pyquant.ops.norm import only_halves, rows_of
from pyquant.ops.quantize import dtype_code, stream


def _silu_fake(gate_up: Tensor) -> Tensor:
    check_floats("silu_and_mul", "gate_up", gate_up)
    check(
        gate_up.dim() >= 1 and gate_up.shape[-1] % 2 == 0,
        f"silu_and_mul: gate_up must be [..., 2 I], got shape {tuple(gate_up.shape)}",
    )
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _silu_cuda(gate_up: Tensor) -> Tensor:
    y = _silu_fake(gate_up)
    if y.numel():
        rows = rows_of(gate_up)
        extension().silu_and_mul(
            rows.data_ptr(), rows.stride(0), dtype_code(rows.dtype), y.data_ptr(), rows.shape[0], y.shape[-1], stream()
        )
    return y


def _silu_torch(gate_up: Tensor) -> Tensor:
    _silu_fake(gate_up)
    return reference.silu_and_mul(gate_up).contiguous()


_silu = define(
    "silu_and_mul(Tensor gate_up) -> Tensor",
    fake=_silu_fake,
    backends={"cuda": Backend(_silu_cuda, only_halves), "torch": Backend(_silu_torch)},
)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` with ``silu(v) = v / (1 + exp(-v))``, fp32 inside, rounded once.

    Args:
        gate_up: ``[..., 2 I]`` bf16 or fp16 (fp32 and fp64 run in plain torch), gate in the first half, any strides.

    Returns:
        ``[..., I]`` in gate_up's dtype.

    Raises:
        ValueError: an odd last dimension, a dtype that is no float, or when a gradient is wanted.
    """
    check_no_grad("silu_and_mul", gate_up)
    return (_silu.overload if needs_torch(gate_up) else _silu.call)(gate_up)
