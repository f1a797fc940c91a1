"""attention_kv4 in Triton: on the CPU in the interpreter (fp16), and compiled for sm_80 and sm_90 without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from aot import compile_kernel
from kv4_cases import (
    FAULTY_CASE,
    KV4_CASES,
    KV4_FAULTS,
    KV4_MORE,
    OLD_CASE,
    OPTION_FAULTS,
    OPTIONS_CASE,
    Kv4Case,
    attend,
    make_case,
    want_kv4,
    without_old,
)
from test_kv4_append import APPENDS, Story

from cases import mismatch
from pyquant import ops
from pyquant.kernels import append_kv4, attention_kv4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1")


def check(case, device, monkeypatch, dtype=torch.float16):
    monkeypatch.setenv("PYQUANT_BACKEND", "triton")
    q, cache = make_case(case, dtype, device)
    out, lse = attend(q, cache, case)
    want, want_lse = want_kv4(q, cache, case, dtype, True)
    assert mismatch(out, want) is None
    assert mismatch(lse, want_lse) is None
    return q, cache, want


@interpreted
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", [c for c in (*KV4_CASES, *KV4_MORE) if c.batch * c.size < 400], ids=str)
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


@interpreted
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("splits", [1, 4])
def test_notices_options(splits, monkeypatch):
    monkeypatch.setattr(attention_kv4, "splits_for", lambda *args: splits)
    q, cache, want = check(OPTIONS_CASE, "cpu", monkeypatch)
    for name, fault in OPTION_FAULTS.items():
        assert mismatch(attend(q, cache, OPTIONS_CASE, **fault(cache))[0], want), f"the comparison missed: {name}"


@interpreted
@pytest.mark.usefixtures("poison")
def test_what_is_too_old_is_not_read(monkeypatch):
    q, cache, _ = check(OLD_CASE, "cpu", monkeypatch)
    got, want = attend(q, without_old(cache), OLD_CASE), attend(q, cache, OLD_CASE)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@interpreted
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("size", "keep", "most", "bits", "rope"),
    [(64, 0, 8, 4, False), (96, 70, 20, 4, True), (80, 0, 20, 8, False), (80, 9, 20, 3, True), (64, 40, 30, 2, False)],
)
def test_append_interpreted(size, keep, most, bits, rope, monkeypatch):
    monkeypatch.setenv("PYQUANT_BACKEND", "torch")
    story = Story((0, 63, 40), keep, 2, size, torch.float16, "cpu", most=most, bits=bits, rope=rope)
    monkeypatch.setenv("PYQUANT_BACKEND", "triton")
    while max(story.held) + most <= 330:
        story.append(most)
        story.check()
    assert min(story.packed) >= 2


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="on a GPU Triton compiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", APPENDS)
def test_append_on_a_gpu(shape, dtype, monkeypatch):
    size, keep, most, bits, rope = shape
    monkeypatch.setenv("PYQUANT_BACKEND", "triton")
    story = Story((0, 63, 40), keep, 2, size, dtype, "cuda", most=most, bits=bits, rope=rope)
    while max(story.held) + most <= 330:
        story.append(most)
    story.check()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="on a GPU Triton compiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "case", [*KV4_CASES, *KV4_MORE, Kv4Case(2, 1, 32, 8, 128, ((128, 60, 100), (16, 33, 190)))], ids=str
)
def test_on_a_gpu(case, dtype, monkeypatch):
    check(case, "cuda", monkeypatch, dtype)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("d", "rows", "bits"), [(128, 16, 4), (96, 32, 3), (256, 16, 8)])
def test_compiles(arch, d, rows, bits, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wide = {
        "D": d,
        "BLOCK_D": 1 << (d - 1).bit_length(),
        "ROWS": rows,
        "SPLITS": 8,
        "CAPPED": False,
        "BITS": bits,
        "SINKS": bits == 8,
    }
    strides = ("q_stride_b", "q_stride_t", "q_stride_h", "prompt_stride_b")
    counts = ("prompt_tiles", "page_capacity", "ring_tiles", "group", "kv_heads", "tokens", "reach")
    kinds = dict.fromkeys((*strides, *counts), "i32")
    kinds |= dict.fromkeys(("parts_ptr", "sums_ptr", "lse_ptr", "sinks_ptr"), "*fp32") | dict.fromkeys(
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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("d", "bits", "rope"), [(128, 4, False), (80, 3, True), (128, 8, True)])
def test_append_compiles(arch, d, bits, rope, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = append_kv4._append_kernel
    kinds = {name: "i32" for name in kernel.arg_names if name.islower() and not name.endswith("_ptr")}
    kinds |= {"k_ptr": "*bf16", "v_ptr": "*bf16", "window_ptr": "*bf16", "pages_ptr": "*u8", "segments_ptr": "*i32"}
    kinds |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    shape = {"D": d, "BLOCK_D": 128, "BLOCK_T": 1, "k_stride_d": 1, "v_stride_d": 1, "ROPE": rope, "BITS": bits}
    built = compile_kernel(kernel, kinds, shape, arch, num_warps=8)
    assert "div.rn.f32" in built.ptx
    assert "div.full" not in built.ptx, "codes need the IEEE quotient"
    assert built.shared_bytes <= (227 if arch == 90 else 163) * 1024
