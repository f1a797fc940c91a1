"""Kernels and recipes for 4-bit language models.

The names below are imported when they are first used, so ``import pyquant`` costs nothing and needs no optional
package: a machine that only runs a quantized model never imports what trains one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyquant.formats.spec import QuantSpec
    from pyquant.integrations.inference import prepare_for_inference
    from pyquant.integrations.kv_cache import KVCache
    from pyquant.integrations.transformers import PyQuantConfig, load_model
    from pyquant.nn.linear import FakeQuantLinear, QLinear
    from pyquant.nn.swap import swap
    from pyquant.ops.fake_quant import fake_quant
    from pyquant.ops.linear import linear_w4a16
    from pyquant.ops.quantize import dequantize_int4, quantize_int4

_HOME = {
    "FakeQuantLinear": "pyquant.nn.linear",
    "KVCache": "pyquant.integrations.kv_cache",
    "PyQuantConfig": "pyquant.integrations.transformers",
    "QLinear": "pyquant.nn.linear",
    "QuantSpec": "pyquant.formats.spec",
    "dequantize_int4": "pyquant.ops.quantize",
    "fake_quant": "pyquant.ops.fake_quant",
    "linear_w4a16": "pyquant.ops.linear",
    "load_model": "pyquant.integrations.transformers",
    "prepare_for_inference": "pyquant.integrations.inference",
    "quantize_int4": "pyquant.ops.quantize",
    "swap": "pyquant.nn.swap",
}

__all__ = [
    "FakeQuantLinear",
    "KVCache",
    "PyQuantConfig",
    "QLinear",
    "QuantSpec",
    "__version__",
    "dequantize_int4",
    "fake_quant",
    "linear_w4a16",
    "load_model",
    "prepare_for_inference",
    "quantize_int4",
    "swap",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'pyquant' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
