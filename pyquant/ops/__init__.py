"""The ops: schema, checks, shape function, gradient, and the choice of backend. One file a family."""

from pyquant.ops.act8 import hadamard_quantize, quantize_activation, rms_norm_quantize, silu_and_mul_quantize
from pyquant.ops.activation import silu_and_mul
from pyquant.ops.attention import attention_decode, rope_append
from pyquant.ops.attention_kv4 import append_kv4, attention_kv4
from pyquant.ops.distill import distill_loss
from pyquant.ops.fake_quant import fake_quant
from pyquant.ops.linear import linear_w4a16
from pyquant.ops.linear_a8 import linear_w4a8
from pyquant.ops.norm import add_rms_norm, rms_norm
from pyquant.ops.quantize import dequantize_int4, quantize_int4
from pyquant.ops.sample import greedy_append

__all__ = [
    "add_rms_norm",
    "append_kv4",
    "attention_decode",
    "attention_kv4",
    "dequantize_int4",
    "distill_loss",
    "fake_quant",
    "greedy_append",
    "hadamard_quantize",
    "linear_w4a8",
    "linear_w4a16",
    "quantize_activation",
    "quantize_int4",
    "rms_norm",
    "rms_norm_quantize",
    "rope_append",
    "silu_and_mul",
    "silu_and_mul_quantize",
]
