"""The ops: schema, checks, shape function, gradient, and the choice of backend. One file a family."""

from pyquant.ops.fake_quant import fake_quant
from pyquant.ops.linear import linear_w4a16
from pyquant.ops.quantize import dequantize_int4, quantize_int4

__all__ = ["dequantize_int4", "fake_quant", "linear_w4a16", "quantize_int4"]
