"""Every op in plain torch: what the kernels must compute, and the backend for the CPU.

Same names and argument order as :mod:`pyquant.ops`; arithmetic in fp32 (fp64 inputs stay fp64); no checks, no cleverness.
Notation in :mod:`pyquant.formats`.
"""

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
    "attention_decode",
    "dequantize_int4",
    "distill_blocks",
    "distill_logits",
    "distill_loss",
    "distill_rows",
    "fake_quant",
    "fake_quant_backward",
    "greedy_append",
    "linear_w4a16",
    "linear_w4a16_backward",
    "quantize_int4",
    "rms_norm",
    "rope_append",
    "rotate",
    "silu_and_mul",
    "soft_clamp",
    "soft_round",
    "sum_groups",
]
