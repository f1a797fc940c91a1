"""The Triton kernels of the distillation loss: in the interpreter (TRITON_INTERPRET=1), and compiled ahead of time."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from aot import compile_kernel
from distill_cases import MIXES, error, expected, make

from pyquant.kernels import distill as kernels
from pyquant.ops import _distill_chunks as distill
from pyquant.ops import distill_loss
from pyquant.ops.distill_rows import distill_scale

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1")


@interpreted
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", [(1, 8, 5, 4), (7, 24, 101, 16)], ids=str)
def test_loss_and_gradients(shape, mix, monkeypatch, poison):
    """fp32 against fp64: logits of a few units with the error of fp32 products, 1e-6, through exponentials."""
    monkeypatch.setenv("PYQUANT_BACKEND", "triton")
    monkeypatch.setattr(distill, "BLOCK", 16)
    monkeypatch.setattr(kernels, "_BLOCK", 32)
    sample = make(*shape, torch.float32)
    want = expected(sample, **MIXES[mix])
    loss, parts = distill_loss(*sample.args(), chunk=3, **MIXES[mix])
    assert abs(float(loss) - float(want[0])) < 1e-5 * max(1.0, float(want[0]))
    for name, part in parts.items():
        assert abs(float(part) - float(want[1][name])) < 1e-5 * max(1.0, float(want[1][name])), name
    for found, right in zip(torch.autograd.grad(loss, (sample.x, sample.weight)), want[2:], strict=True):
        assert error(found, right) < 1e-5
        assert error(found.roll(1, 0), right) > 1e-2 or found.shape[0] == 1
    with torch.no_grad():
        alone, _ = distill_loss(*sample.args(), **MIXES[mix])
    assert float(alone) == pytest.approx(float(loss), rel=1e-5)


@interpreted
def test_scale(monkeypatch):
    monkeypatch.setenv("PYQUANT_BACKEND", "triton")
    t = torch.randn(5000).half()
    want = (t.float() * 0.75).half()
    distill_scale(t, torch.tensor(3.0), 0.25)
    assert torch.equal(t, want)
    distill_scale(t, torch.tensor(4.0), 0.25)
    assert torch.equal(t, want)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("arch", [90, 80])
def test_compiles(arch, everything, tmp_path, monkeypatch):
    """No spilled registers, 16-byte loads of fp32 logits, no atomics."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = "kl reverse_kl jsd jsd_beta ce temperature softcap teacher_softcap student_scale teacher_scale"
    weights = names.split()
    types = {
        "sums_ptr": "*fp32", "grad_ptr": "*bf16", "student_ptr": "*fp32", "teacher_ptr": "*fp32", "labels_ptr": "*i64",
        "factor_ptr": "*fp32", **dict.fromkeys(weights, "fp32"),
        **dict.fromkeys(("ignore_index", "vocabulary", "student_stride", "teacher_stride", "first", "rows", "block"), "i32"),
    }  # fmt: skip
    constants = {
        "HAS_GRAD": True, "HAS_TEACHER": True, "HAS_LABELS": True, "ALL": everything, "WARM": everything,
        "CAP": everything, "TEACHER_CAP": everything, "BLOCK": 4096, "STEPS": 32, "LAST_STEPS": 32,
        "ALIGNED": ("vocabulary", "student_stride", "teacher_stride", "block"),
    }  # fmt: skip
    built = compile_kernel(kernels._rows_kernel, types, constants, arch, num_warps=8)
    assert built.stack_bytes == 0, f"{built.registers} registers and {built.stack_bytes} spilled bytes a thread"
    assert "ld.global.v4" in built.ptx
    assert "atom" not in built.ptx
