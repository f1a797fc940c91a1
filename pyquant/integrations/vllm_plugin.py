"""A plug-in of vLLM: its compressed-tensors layers of 4, 3 and 2 bits on the kernels of this package.

vLLM calls :func:`register` by the entry point ``vllm.general_plugins`` in each of its processes. It adds a kernel to those that
vLLM considers for "mixed precision" linear layers (integer weights times 16-bit inputs, which is what its compressed-tensors
W4A16 scheme asks for), by vLLM's own ``register_linear_kernel``. Such a kernel comes last: it serves what no other can. With
``PYQUANT_VLLM=first`` in the environment it comes first; ``PYQUANT_VLLM=off`` leaves vLLM alone. Read against vLLM 0.33.

vLLM shares layers out over GPUs and joins q, k and v, or gate and up, to one before a kernel sees them: what arrives is one
``[N, K]`` weight of this process, packed along K as in the file, zeros packed along N.

``python -m pyquant.integrations.vllm_plugin FOLDER`` is a smoke test: it serves a few words from a quantized folder by vLLM.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import QLinear, multiply

log = logging.getLogger("pyquant")

SWITCH = "PYQUANT_VLLM"
CHOICES = ("last", "first", "off")
NEEDED = 80  # compute capability


def why_not(bits: int, group_size: int, zeros: bool, n: int, k: int, dtype: torch.dtype) -> str:
    """Why a layer cannot run here, or "".

    Args:
        bits, group_size, zeros: of the weight; group -1 is one scale a row.
        n, k: output and input features of this process.
        dtype: of inputs.
    """
    if bits not in (2, 3, 4):
        return f"weights of {bits} bits; pyquant's kernels hold 2, 3 or 4"
    if group_size not in (-1, 32, 64, 128):
        return f"groups of {group_size}; pyquant's kernels know 32, 64, 128 and whole rows"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"inputs in {dtype}; pyquant's kernels take bfloat16 and float16"
    if (k * bits) % 32:
        return f"{k} input features of {bits} bits do not fill 32-bit words"
    if zeros and (n * bits) % 32:
        return f"zeros of {n} output features of {bits} bits do not fill 32-bit words"
    return QuantSpec(bits, group_size, not zeros).misfit(k) or ""


def tiled(
    packed: Tensor, scale: Tensor, zeros: Tensor | None, n: int, k: int, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The order of :mod:`pyquant.formats.int4` from the tensors of a file.

    Args:
        packed: int32 ``[N, K bits / 32]``; scale: ``[N, ceil(K/G)]``; zeros: int32 ``[N bits / 32, ceil(K/G)]`` or None.

    Returns:
        (qweight, scale, zero) as :func:`pyquant.linear_w4a16` takes them.

    Raises:
        ValueError: shapes that contradict each other.
    """
    layer = QLinear(k, n, False, QuantSpec(bits, group_size, zeros is None), "meta", scale.dtype)
    held = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    layer._set_portable(held if zeros is None else {**held, "weight_zero_point": zeros})
    return layer.qweight, layer.scale, layer.zero


def make_kernel() -> type:
    """The kernel's class, a subclass of vLLM's.

    Raises:
        ImportError: vLLM is not installed, or has no such interface.
    """
    from vllm.model_executor.kernels.linear import MPLinearKernel
    from vllm.model_executor.layers.quantization.utils import replace_parameter

    class PyQuantLinearKernel(MPLinearKernel):
        """``linear_w4a16`` of pyquant."""

        @classmethod
        def get_min_capability(cls) -> int:
            return NEEDED

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            k, n = c.partition_weight_shape
            bits = c.weight_type.size_bits
            middle = 0 if c.zero_points else 1 << (bits - 1)
            if c.weight_type.is_floating_point() or c.weight_type.is_signed() or c.weight_type.bias != middle:
                return False, f"weights of type {c.weight_type}"
            why = why_not(bits, c.group_size, c.zero_points, n, k, c.act_type)
            return not why, why or None

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            (k, n), bits = self.config.partition_weight_shape, self.config.weight_type.size_bits
            packed, scale, zeros = self._get_weight_params(layer)
            zeros = zeros.data if self.config.zero_points and zeros is not None else None
            made = tiled(packed.data, scale.data, zeros, n, k, bits, self.config.group_size)
            for name, tensor in zip((self.w_q_name, self.w_s_name, self.w_zp_name), made, strict=True):
                if tensor is not None and name is not None:
                    replace_parameter(layer, name, nn.Parameter(tensor, requires_grad=False))

        def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            packed, scale, zeros = self._get_weight_params(layer)
            weight = packed, scale, zeros if self.config.zero_points else None
            return multiply(x, weight, bias, self.config.partition_weight_shape[1], self.config.group_size)

    return PyQuantLinearKernel


_registered: list[type] = []  # vLLM may load plug-ins more than once


def register() -> None:
    """Tell vLLM of the kernel; see the module.

    Raises:
        ValueError: ``PYQUANT_VLLM`` is none of its values.
    """
    how = os.environ.get(SWITCH, CHOICES[0])
    if how not in CHOICES:
        raise ValueError(f"{SWITCH}={how!r} must be one of {', '.join(CHOICES)}")
    if how == "off" or _registered:
        return
    try:
        from vllm.model_executor.kernels import linear as kernels
        from vllm.platforms import PlatformEnum

        kernel = make_kernel()
        kernels.register_linear_kernel(kernel, PlatformEnum.CUDA, "mp")
    except ImportError as error:
        log.warning("this vLLM has no linear kernels to register: %s", error)
        return
    _registered.append(kernel)
    if how == "first":
        known = getattr(kernels, "_POSSIBLE_KERNELS", {}).get(PlatformEnum.CUDA)
        if not known or kernel not in known:
            log.warning("this vLLM keeps its kernels elsewhere; name those before ours in VLLM_DISABLED_KERNELS")
            return
        known.remove(kernel)
        known.insert(0, kernel)


def main() -> None:
    """Serve a few words from a folder, by vLLM with this kernel first."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m pyquant.integrations.vllm_plugin FOLDER")
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed here: pip install vllm beside pyquant, then run this again")
    os.environ.setdefault(SWITCH, "first")
    from vllm import LLM, SamplingParams

    model = LLM(sys.argv[1], max_model_len=512, gpu_memory_utilization=0.5)
    for made in model.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=32)):
        print(made.prompt + made.outputs[0].text)


if __name__ == "__main__":
    main()
