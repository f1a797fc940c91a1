"""attention_kv4 in Triton: on the CPU in the interpreter (fp16), and compiled for sm_80 and sm_90 without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from aot import compile_kernel
from kv4_cases import FAULTY_CASE, KV4_CASES, KV4_FAULTS, Kv4Case, make_case, want_kv4

from cases import mismatch
from pyquant import ops
from pyquant.kernels import attention_kv4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1")


def check(case, device, monkeypatch, dtype=torch.float16):
    monkeypatch.setenv("PYQUANT_BACKEND", "triton")
    q, cache = make_case(case, dtype, device)
    out, lse = ops.attention_kv4(q, *cache.parts(), softcap=case.softcap)
    want, want_lse = want_kv4(q, cache, case.softcap, dtype, True)
    assert mismatch(out, want) is None
    assert mismatch(lse, want_lse) is None
    return q, cache, want


@interpreted
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", [c for c in KV4_CASES if c.batch * c.size < 400], ids=str)
def test_interpreted(case, monkeypatch):
    check(case, "cpu", monkeypatch)


@interpreted
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("splits", [2, 4])
def test_parts_are_merged(splits, monkeypatch):
    monkeypatch.setattr(attention_kv4, "splits_for", lambda *args: splits)
    q, cache, want = check(FAULTY_CASE, "cpu", monkeypatch)
    for name, fault in KV4_FAULTS.items():
        assert mismatch(ops.attention_kv4(q, *fault(cache).parts())[0], want), f"the comparison missed: {name}"
    cache.segments[0] = 0
    out, lse = ops.attention_kv4(q, *cache.parts())
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="on a GPU Triton compiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [*KV4_CASES, Kv4Case(2, 1, 32, 8, 128, ((128, 60, 100), (16, 33, 190)))], ids=str)
def test_on_a_gpu(case, dtype, monkeypatch):
    check(case, "cuda", monkeypatch, dtype)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("d", "rows"), [(128, 16), (96, 32), (256, 16)])
def test_compiles(arch, d, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wide = {"D": d, "BLOCK_D": 1 << (d - 1).bit_length(), "ROWS": rows, "SPLITS": 8, "CAPPED": False}
    integers = (
        "q_stride_b q_stride_t q_stride_h prompt_stride_b prompt_tiles page_capacity ring_tiles group kv_heads tokens"
    )
    kinds = dict.fromkeys(integers.split(), "i32")
    kinds |= dict.fromkeys(("parts_ptr", "sums_ptr", "lse_ptr"), "*fp32") | dict.fromkeys(
        ("scaling", "softcap"), "fp32"
    )
    kinds |= dict.fromkeys(("q_ptr", "prompt_ptr", "window_ptr", "out_ptr"), "*bf16")
    kinds |= {"pages_ptr": "*u8", "segments_ptr": "*i32"}
    for kernel in (attention_kv4._part_kernel, attention_kv4._merge_kernel):
        built = compile_kernel(kernel, kinds, {**wide, "q_stride_d": 1, "ALIGNED": ("q_stride_h",)}, arch, num_warps=4)
        assert "atom" not in built.ptx, "no atomics: the same bits every time"
        if kernel is attention_kv4._part_kernel:
            assert "mma" in built.ptx, "tensor cores"
            assert built.shared_bytes <= (227 if arch == 90 else 163) * 1024
