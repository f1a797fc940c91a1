"""The ops: schema, checks, shape function, gradient, and the choice of backend. One file a family."""

from pyquant.ops.activation import silu_and_mul
from pyquant.ops.attention import attention_decode, rope_append
from pyquant.ops.distill import distill_loss
from pyquant.ops.fake_quant import fake_quant
from pyquant.ops.linear import linear_w4a16
from pyquant.ops.norm import add_rms_norm, rms_norm
from pyquant.ops.quantize import dequantize_int4, quantize_int4
from pyquant.ops.sample import greedy_append

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "dequantize_int4",
    "distill_loss",
    "fake_quant",
    "greedy_append",
    "linear_w4a16",
    "quantize_int4",
    "rms_norm",
    "rope_append",
    "silu_and_mul",
]
