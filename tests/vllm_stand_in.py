"""What the plug-in of vLLM imports from it, for tests where it is not installed: same names, arguments and meaning."""

from __future__ import annotations

import enum
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn


@dataclass(frozen=True)
class ScalarType:
    """A number's type; a stored integer means itself less ``bias``."""

    exponent: int
    mantissa: int
    signed: bool
    bias: int

    @property
    def size_bits(self) -> int:
        return self.exponent + self.mantissa + int(self.signed)

    def is_floating_point(self) -> bool:
        return self.exponent != 0

    def is_signed(self) -> bool:
        return self.signed

    @classmethod
    def uint(cls, size_bits: int, bias: int | None) -> ScalarType:
        return cls(0, size_bits, False, bias or 0)


class scalar_types:
    int4 = ScalarType(0, 3, True, 0)
    uint4 = ScalarType.uint(4, None)
    uint8b128 = ScalarType.uint(8, 128)
    float8_e4m3fn = ScalarType(4, 3, True, 0)


@dataclass
class MPLinearLayerConfig:
    """Shapes are [in, out]."""

    full_weight_shape: tuple[int, int]
    partition_weight_shape: tuple[int, int]
    weight_type: ScalarType
    act_type: torch.dtype
    group_size: int
    zero_points: bool


class MPLinearKernel(ABC):
    """Holds the names of a layer's parameters; that of zeros only where there are any."""

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @classmethod
    @abstractmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]: ...

    def __init__(self, c: MPLinearLayerConfig, w_q: str, w_s: str, w_zp: str | None = None) -> None:
        assert self.can_implement(c)[0]
        assert w_zp is not None or not c.zero_points
        self.config, self.w_q_name, self.w_s_name, self.w_zp_name = c, w_q, w_s, w_zp

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None: ...

    @abstractmethod
    def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...

    def _get_weight_params(self, layer: nn.Module) -> tuple[Any, Any, Any]:
        zeros = getattr(layer, self.w_zp_name or "", None)
        return getattr(layer, self.w_q_name), getattr(layer, self.w_s_name), zeros


def replace_parameter(layer: nn.Module, name: str, new: torch.Tensor) -> None:
    """The layer has the parameter already."""
    getattr(layer, name)
    layer.register_parameter(name, nn.Parameter(new.data, requires_grad=False))


class PlatformEnum(enum.Enum):
    CUDA = enum.auto()
    CPU = enum.auto()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``vllm`` importable until the test ends."""
    possible: dict[PlatformEnum, list[type]] = {PlatformEnum.CUDA: [type("MarlinLinearKernel", (), {})]}

    def register_linear_kernel(kernel_class: type, platform: PlatformEnum, kernel_type: str = "mp") -> None:
        if kernel_type != "mp":
            raise ValueError(f"kernel type {kernel_type}")
        possible.setdefault(platform, []).append(kernel_class)

    linear = {
        "MPLinearKernel": MPLinearKernel, "MPLinearLayerConfig": MPLinearLayerConfig, "_POSSIBLE_KERNELS": possible,
        "register_linear_kernel": register_linear_kernel,
    }  # fmt: skip
    names: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.platforms": {"PlatformEnum": PlatformEnum},
        "vllm.scalar_type": {"ScalarType": ScalarType, "scalar_types": scalar_types},
        "vllm.model_executor": {},
        "vllm.model_executor.kernels": {},
        "vllm.model_executor.kernels.linear": linear,
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.quantization": {},
        "vllm.model_executor.layers.quantization.utils": {"replace_parameter": replace_parameter},
    }
    for path, held in names.items():
        module = types.ModuleType(path)
        module.__path__ = []
        module.__dict__.update(held)
        monkeypatch.setitem(sys.modules, path, module)
        parent, _, name = path.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)
