"""The numbers that plans rest on, each with where it comes from.

``measured`` ones stand in a file of ``benchmarks/results`` (a test reads them there), ``derived`` ones follow from such a file
and the sizes of the shape it was measured on, ``read`` ones were counted in the code, ``assumed`` ones are properties of a
machine that nobody has measured for this project.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
BASES = ("measured", "derived", "read", "assumed")


@dataclass(frozen=True)
class Constant:
    """A number, its unit, how it is known, and from where."""

    value: float
    unit: str
    basis: str
    source: str


CONSTANTS: dict[str, Constant] = {
    "read bandwidth": Constant(4.37e12, "byte/s", "measured", "h200/end_to_end.json, meta.ceilings"),
    "training rate": Constant(
        4.06e14, "FLOP/s", "derived",
        "h200/qat_large.json, `none` captured: 338 ms less 36 ms of optimizer and clipping, for 8 x 7.5e9 x 2,048 operations",
    ),
    "training of a quantized weight": Constant(
        3.32e-12, "s", "derived", "h200/qat_large.json, captured: 361.3 less 338.1 ms over 6.98e9 weights",
    ),
    "kernel by kernel": Constant(1.096, "x", "derived", "h200/qat_large.json, pyquant: 396.0 over 361.3 ms"),
    "checkpointing": Constant(1.764, "x", "derived", "h200/qat_large.json, pyquant: 698.4 over 396.0 ms"),
    "soft rounding": Constant(1.05, "x", "derived", "h200/fake_quant.json, 4096 x 14336 forward and backward: 154 over 146 us"),
    "head's loss": Constant(0.51 * GIB, "byte", "measured", "h200/distill.json, memory beyond gradients from 4,096 tokens on"),
    "decode, batch 1": Constant(2.22, "ms", "measured", "h200/end_to_end.json, 8B shape at 512 tokens"),
    "decode, batch 8": Constant(2.79, "ms", "measured", "h200/end_to_end.json, 8B shape at 512 tokens"),
    "decode, batch 32": Constant(3.93, "ms", "measured", "h200/end_to_end.json, 8B shape at 512 tokens"),
    "prefill rate": Constant(7.02e14, "FLOP/s", "derived", "h200/end_to_end.json, 2,048 tokens in 40.7 ms"),
    "activations": Constant(
        1.0, "x", "read", "bytes a token and layer that backward keeps: 16 H + 6 Hq D + 4 Hkv D + 8 I (plus 2 H a router); "
        "h200/qat_large.json agrees within 1 %",
    ),
    "weight in 4 bits": Constant(0.5 + 2 / 128, "byte", "read", "codes and a 16-bit scale a group of 128"),
    "python, torch and CUDA on the host": Constant(3.0 * GIB, "byte", "assumed", "libraries and pinned memory"),
    "fp32 rate": Constant(4.5e13, "FLOP/s", "assumed", "products in fp32 without TF32"),
    "launch": Constant(4e-6, "s", "assumed", "a small kernel in a chain"),
    "between GPUs of a host": Constant(3.0e11, "byte/s", "assumed", "each way, of one GPU, over NVLink"),
    "between hosts": Constant(4.5e10, "byte/s", "assumed", "each way, of one GPU: 400 Gbit/s at 90 %"),
    "GPUs of a host": Constant(8, "", "assumed", ""),
    "reading a checkpoint": Constant(1.5e9, "byte/s", "assumed", "of a local disk, and by one process"),
}  # fmt: skip


def value(name: str) -> float:
    """A constant's number."""
    return CONSTANTS[name].value
