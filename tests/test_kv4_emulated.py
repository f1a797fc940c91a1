"""The CUDA kernels of the KV cache without a GPU: their source, compiled for the CPU, where a thread is a fiber.

``tests/emulated`` stands in for csrc/pieces.cuh and what it includes, and says what such a run cannot show. It needs a C++
compiler that knows C++20 and ``_Float16``.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulation import DYNAMIC, emulated_library
from kv4_cases import (
    FAULTY_CASE,
    KV4_CASES,
    KV4_FAULTS,
    KV4_MORE,
    OLD_CASE,
    OPTION_FAULTS,
    OPTIONS_CASE,
    Kv4Case,
    make_case,
    want_kv4,
    without_old,
)
from test_kv4_append import Story

from cases import mismatch
from pyquant import ops
from pyquant.formats import kv4

ROOT = Path(__file__).resolve().parents[1]
P, L, F, B = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_bool


class Attention(ctypes.Structure):
    """Kv4Arguments of csrc/ops.h."""

    _fields_ = [
        ("q", P), ("q_batch_stride", L), ("q_token_stride", L), ("dtype", ctypes.c_int), ("prompt", P),
        ("prompt_batch_stride", L), ("prompt_tiles", L), ("pages", P), ("page_capacity", L), ("window", P),
        ("ring_tiles", L), ("segments", P), ("out", P), ("lse", P), ("workspace", P), ("scaling", F), ("softcap", F),
        ("batch", L), ("tokens", L), ("heads", L), ("kv_heads", L), ("head_size", L), ("early", B), ("bits", L),
        ("sliding_window", L), ("sinks", P),
    ]  # fmt: skip


class Append(ctypes.Structure):
    """Kv4Append of csrc/ops.h."""

    _fields_ = [
        ("k", P), ("v", P), ("k_strides", L * 4), ("v_strides", L * 4), ("dtype", ctypes.c_int), ("pages", P),
        ("page_capacity", L), ("window", P), ("ring_tiles", L), ("segments", P), ("workspace", P), ("batch", L),
        ("tokens", L), ("kv_heads", L), ("head_size", L), ("keep", L), ("bits", L), ("cos", P), ("sin", P),
        ("rope_batch_stride", L), ("rope_wide", B),
    ]  # fmt: skip


def device_part(text: str) -> str:
    """What runs on a GPU of a source file: everything before its launch, without the declaration of dynamic memory."""
    for launch in (
        "template <typename T, int D, int NT, int BITS>\nvoid launch(",
        "}  // namespace\n\nvoid append_kv4(",
    ):
        if launch in text:
            text = text.split(launch)[0] + "}  // namespace\n}  // namespace pyquant\n"
            text = text.replace("}  // namespace\n}  // namespace\n", "}  // namespace\n")
    return text.replace(DYNAMIC, "")


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    """The kernels as a library of the CPU."""
    names = (
        "kv4_codes.cuh",
        "kv4_work.cuh",
        "ops.h",
        "attention_kv4.cuh",
        "attention_kv4_cluster.cuh",
        "append_kv4.cu",
    )
    sources = {name: device_part((ROOT / "csrc" / name).read_text()) for name in names}
    return emulated_library(tmp_path_factory.mktemp("emulated"), sources, ["attention_kv4.cpp", "append_kv4.cpp"])


def attend(
    lib,
    q,
    cache,
    grid=7,
    cluster=0,
    warps=8,
    check_even=False,
    softcap=0.0,
    sliding_window=0,
    sinks=None,
    list_used=None,
):
    """(out, log-sum-exp) as ops.attention_kv4 returns them; whether blocks left parts in the workspace, to ``list_used``."""
    (batch, tokens, heads, d), kv_heads = q.shape, cache.window.shape[1]
    out, lse = torch.full_like(q, float("nan")), torch.full((batch, tokens, heads), float("nan"))
    space = torch.zeros((1 << 16) + max(grid, batch * kv_heads * cluster) * 2 * 32 * (d + 2) * 4, dtype=torch.uint8)
    call = Attention(
        q.data_ptr(), q.stride(0), q.stride(1), int(q.dtype == torch.float16), cache.prompt.data_ptr(),
        0 if len(cache.prompt) == 1 else cache.prompt.stride(0), cache.prompt.shape[2], cache.pages.data_ptr(),
        cache.pages.shape[2], cache.window.data_ptr(), cache.window.shape[2], cache.segments.data_ptr(), out.data_ptr(),
        lse.data_ptr(), space.data_ptr(), d**-0.5, softcap, batch, tokens, heads, kv_heads, d, True,
        kv4.bits_of(cache.pages.shape[3], d), sliding_window, sinks.data_ptr() if sinks is not None else None,
    )  # fmt: skip
    if lib.attend(ctypes.byref(call), grid, cluster, warps, B(check_even)):
        return None
    if list_used is not None:
        list_used.append(bool(space.any()))
    assert not space[: 1 << 16].any(), "counters that were not set back"
    return out, lse


def check(lib, case, grid, cluster=0, dtype=torch.float16, **more):
    """Within the tolerance of a kernel on a GPU, whose every rounding to 16 bits this one has too."""
    q, cache = make_case(case, dtype, "cpu")
    options = {"softcap": case.softcap, "sliding_window": case.sliding, "sinks": cache.sinks}
    got = attend(lib, q, cache, grid, cluster, **more, **options)
    assert got is not None, "not among the instances that are compiled"
    want, want_lse = want_kv4(q, cache, case, dtype, True)
    assert mismatch(got[0], want) is None
    assert mismatch(got[1], want_lse) is None
    return q, cache, options, want


# Head size, blocks of 8 rows (up to 8, 16, 32 rows), bits: what tests/emulated/attention_kv4.cpp compiles in fp16.
COMPILED = {
    (64, 1, 4), (64, 1, 8), (64, 1, 3), (64, 1, 2), (80, 1, 4), (80, 1, 2), (96, 1, 3), (128, 2, 2), (128, 2, 4),
    (128, 4, 4), (256, 2, 8),
}  # fmt: skip


def compiled(case):
    rows = case.heads // case.kv_heads * case.tokens
    return (case.size, 1 if rows <= 8 else 2 if rows <= 16 else 4, case.bits) in COMPILED


WIDE = replace(KV4_CASES[4], tokens=8, segments=((20, 3, 64), (0, 2, 8)))  # 32 rows
MADE = [c for c in (*KV4_CASES, *KV4_MORE, WIDE) if compiled(c)]


@pytest.mark.parametrize("grid", [3, 40])
@pytest.mark.parametrize("case", MADE, ids=str)
def test_attention(lib, case, grid):
    """One block for everything, runs that cross heads or end with them, a block for every few units, halves of pages."""
    check(lib, case, grid)


def test_attention_in_bf16(lib):
    check(lib, replace(KV4_CASES[1], sliding=100, sinks=True), 5, dtype=torch.bfloat16)


FEW_ROWS = [c for c in MADE if c.heads // c.kv_heads * c.tokens <= 16 and c.size <= 128]


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("case", FEW_ROWS, ids=str)
def test_clusters(lib, case, size):
    """A cluster for each head, of sequences of any lengths."""
    check(lib, replace(case, batch=1, shared=False) if size == 16 else case, 1, size)


@pytest.mark.parametrize("case", [c for c in FEW_ROWS if c.size == 64 and c.bits == 4], ids=str)
def test_clusters_of_many_warps(lib, case):
    check(lib, case, 1, 2, warps=16)


EVEN = Kv4Case(3, 1, 4, 2, 64, ((17, 40, 64), (17, 36, 100), (30, 41, 64)))


@pytest.mark.parametrize("warps", [8, 16])
@pytest.mark.parametrize(("segments", "even"), [
    (EVEN.segments, True),
    ((*EVEN.segments[:2], (0, 20, 100)), False),
    (((0, 20, 100), *EVEN.segments[1:]), False),
])  # fmt: skip
def test_lengths_that_differ_take_the_list(lib, warps, segments, even):
    """Clusters that are asked to look find out whether all sequences are about as long; the list leaves parts."""
    used = []
    check(lib, replace(EVEN, segments=segments), 1, 2, warps=warps, check_even=True, list_used=used)
    assert used == [not even]


@pytest.mark.parametrize("cluster", [0, 1, 2])
def test_an_empty_sequence(lib, cluster):
    q, cache = make_case(EVEN, torch.float16, "cpu")
    want, _ = attend(lib, q, cache, cluster=cluster)
    cache.segments[1] = 0
    out, lse = attend(lib, q, cache, cluster=cluster)
    assert not out[1].any() and lse[1].eq(-torch.inf).all()
    assert torch.allclose(out[::2].float(), want[::2].float(), rtol=2**-9, atol=2**-9)  # other blocks, other roundings


def test_notices(lib):
    q, cache, _, want = check(lib, FAULTY_CASE, 5)
    for name, fault in KV4_FAULTS.items():
        assert mismatch(attend(lib, q, fault(cache))[0], want), f"the comparison missed: {name}"
    q, cache, options, want = check(lib, OPTIONS_CASE, 5)
    for name, fault in OPTION_FAULTS.items():
        assert mismatch(attend(lib, q, cache, **(options | fault(cache)))[0], want), f"the comparison missed: {name}"


def test_what_is_too_old_is_not_read(lib):
    q, cache, options, want = check(lib, OLD_CASE, 40)
    assert mismatch(attend(lib, q, without_old(cache), **options)[0], want) is None


@pytest.mark.parametrize(
    ("size", "keep", "most", "bits", "rope", "dtype"),
    [
        (64, 20, 9, 4, True, torch.float16),
        (64, 0, 30, 3, False, torch.float16),
        (64, 64, 40, 2, False, torch.float16),
        (96, 5, 33, 2, True, torch.float16),
        (80, 0, 20, 8, True, torch.float16),
        (64, 70, 64, 8, False, torch.bfloat16),
        (80, 10, 31, 4, True, torch.bfloat16),
    ],
)
def test_append(lib, size, keep, most, bits, rope, dtype, monkeypatch):
    """Pages, window and segments bit by bit, as on a GPU."""
    story = Story((0, 63, 40), keep, 2, size, dtype, "cpu", most=most, bits=bits, rope=rope)
    counters = torch.zeros(3, dtype=torch.int32)

    def emulated(k, v, pages, window, segments, keep, cos=None, sin=None):
        pointers = (None, None) if cos is None else (cos.data_ptr(), sin.data_ptr())
        strides = ((L * 4)(*t.stride()) for t in (k, v))
        call = Append(
            k.data_ptr(), v.data_ptr(), *strides, int(dtype == torch.float16), pages.data_ptr(), pages.shape[2],
            window.data_ptr(), window.shape[2], segments.data_ptr(), counters.data_ptr(), *k.shape, keep, bits, *pointers,
            k.shape[1] * size, True,
        )  # fmt: skip
        assert lib.append(ctypes.byref(call)) == 0

    monkeypatch.setattr(ops, "append_kv4", emulated)
    while max(story.held) + most <= 330:
        story.append(most)
        story.check()
    assert min(story.packed) >= 2 and not counters.any()
    story.pages[1, 1, 0, 5] ^= 16
    with pytest.raises(AssertionError, match="pages differ in bits"):
        story.check()
