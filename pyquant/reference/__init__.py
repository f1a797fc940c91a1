"""Every op in plain torch: what the kernels must compute, and the backend for the CPU.

Same names and argument order as :mod:`pyquant.ops`; arithmetic in fp32 (fp64 inputs stay fp64); no checks, no cleverness.
Notation in :mod:`pyquant.formats`.
"""

from pyquant.reference.act8 import (
    hadamard_quantize,
    linear_w4a8,
    quantize_activation,
    rms_norm_quantize,
    silu_and_mul_quantize,
)
from pyquant.reference.attention_kv4 import append_kv4, attention_kv4, kv4_values
from pyquant.reference.decode import (
    add_rms_norm,
    append,
    attention_decode,
    greedy_append,
    rms_norm,
    rope_append,
    rotate,
    silu_and_mul,
)
from pyquant.reference.distill import distill_blocks, distill_logits, distill_loss, distill_rows
from pyquant.reference.fake_quant import fake_quant, fake_quant_backward, soft_clamp, soft_round
from pyquant.reference.weights import dequantize_int4, linear_w4a16, linear_w4a16_backward, quantize_int4, sum_groups

__all__ = [
    "add_rms_norm",
    "append",
    "append_kv4",
    "attention_decode",
    "attention_kv4",
    "dequantize_int4",
    "distill_blocks",
    "distill_logits",
    "distill_loss",
    "distill_rows",
    "fake_quant",
    "fake_quant_backward",
    "greedy_append",
    "hadamard_quantize",
    "kv4_values",
    "linear_w4a8",
    "linear_w4a16",
    "linear_w4a16_backward",
    "quantize_activation",
    "quantize_int4",
    "rms_norm",
    "rms_norm_quantize",
    "rope_append",
    "rotate",
    "silu_and_mul",
    "silu_and_mul_quantize",
    "soft_clamp",
    "soft_round",
    "sum_groups",
]
