"""linear_w4a16 for up to 8 tokens (csrc/linear_mma.cuh) without a GPU: its source, compiled for the CPU.

``tests/emulated`` says what such a run cannot show.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from emulation import DYNAMIC, emulated_library

from cases import WEIGHT_FAULTS, make_weight, mismatch, want_product

ROOT = Path(__file__).resolve().parents[1]
P, L = ctypes.c_void_p, ctypes.c_int64
BLOCK = 227 << 10  # bytes of shared memory


class Linear(ctypes.Structure):
    """LinearCall of csrc/ops.h."""

    _fields_ = [
        ("x", P), ("x_stride", L), ("dtype", ctypes.c_int), ("qweight", P), ("scale", P), ("zero", P), ("bias", P),
        ("y", P), ("m", L), ("n", L), ("k", L), ("group_size", L), ("workspace", P), ("workspace_bytes", L),
    ]  # fmt: skip


def planned_part(text: str) -> str:
    """What runs on a GPU, and the plan of a launch, without the launch and the declaration of dynamic memory."""
    before, found, _ = text.partition("template <typename T, int GROUPS>\nvoid launch(")
    assert found
    return before.replace(DYNAMIC, "") + "}  // namespace\n}  // namespace pyquant\n"


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    csrc = ROOT / "csrc"
    sources = {name: (csrc / name).read_text() for name in ("ops.h", "linear_mma.h", "format.cuh")}
    sources["linear_mma.cuh"] = planned_part((csrc / "linear_mma.cuh").read_text())
    return emulated_library(tmp_path_factory.mktemp("emulated"), sources, ["linear_mma.cpp"])


def multiply(lib, x, tiled, bias, n, group_size, splits, multiprocessors, most_bytes=BLOCK):
    qweight, scale, zero = tiled
    y = torch.full((len(x), n), float("nan"), dtype=x.dtype)
    call = Linear(
        x.data_ptr(), x.stride(0), int(x.dtype == torch.float16), qweight.data_ptr(), scale.data_ptr(),
        None if zero is None else zero.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), len(x), n,
        x.shape[1], group_size,
    )  # fmt: skip
    assert lib.multiply(ctypes.byref(call), splits, multiprocessors, most_bytes) == 0
    return y


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_products_and_planted_faults(lib, dtype, group_size, splits):
    """Rings filled once and often, K that ends inside a unit and N inside a tile, blocks of no columns and of 12 tiles."""
    torch.manual_seed(splits)
    for i, (m, n, k, blocks) in enumerate([(8, 130, 712, 4), (5, 48, 2440, 2), (7, 180, 325, 1), (1, 20, 100, 1)]):
        symmetric = (i + splits) % 2 == 0
        weight = make_weight(n, k, group_size, symmetric, dtype, "cpu")
        wide = torch.randn(m, -(-k // 8) * 8 + 8).to(dtype)
        x, bias = wide[:, :k], torch.randn(n).to(dtype) if i != 1 else None
        options = (n, group_size, splits, blocks * splits)
        want = want_product(x, weight.w_hat, bias, dtype, rounded_weight=False)
        assert mismatch(multiply(lib, x, weight.tiled(), bias, *options), want) is None, (m, n, k)
        for name, fault in WEIGHT_FAULTS.items() if i == 2 else ():
            wrong = multiply(lib, x, fault(weight).tiled(), bias, *options)
            assert mismatch(wrong, want) is not None, name


@pytest.mark.parametrize("splits", [1, 2])
def test_x_that_does_not_fit_is_read_again(lib, splits):
    m, n, k = 8, 144, 4096 * splits  # three turns of 4 tiles, the last of one
    weight = make_weight(n, k, 128, True, torch.bfloat16, "cpu")
    x = torch.randn(m, k).bfloat16()
    want = want_product(x, weight.w_hat, None, torch.bfloat16, rounded_weight=False)
    options = (n, 128, splits, splits)
    for most_bytes in (BLOCK, 130 << 10):
        assert mismatch(multiply(lib, x, weight.tiled(), None, *options, most_bytes), want) is None
    with pytest.raises(AssertionError):
        multiply(lib, x, weight.tiled(), None, *options, 100 << 10)


# (K, N): blocks that share K where that was the faster way at 8 tokens on an H200, benchmarks/NOTES.md.
FASTER = {(4096, 14336): 1, (14336, 4096): 2, (8192, 8192): 2, (8192, 28672): 2}


@pytest.mark.parametrize("k, n", FASTER)
def test_the_choice_is_the_faster_way(lib, k, n):
    call, bytes_ = Linear(m=8, n=n, k=k, group_size=128), ctypes.c_int()
    assert lib.chosen(ctypes.byref(call), 132, BLOCK, ctypes.byref(bytes_)) == FASTER[k, n]


def test_two_blocks_fit_a_multiprocessor_where_few_strips_are_cut(lib):
    call, bytes_ = Linear(m=8, n=4096, k=4096, group_size=128), ctypes.c_int()
    assert lib.chosen(ctypes.byref(call), 132, BLOCK, ctypes.byref(bytes_)) == 2
    assert 2 * (bytes_.value + 1024) <= 228 << 10  # the system takes 1 KB of each block


@pytest.mark.parametrize("splits", [1, 2])
def test_what_is_not_finite_stays_in_its_token(lib, splits):
    weight = make_weight(40, 300, 128, True, torch.bfloat16, "cpu")
    x = torch.randn(4, 304).bfloat16()[:, :300]
    options = (40, 128, splits, splits)
    clean = multiply(lib, x, weight.tiled(), None, *options)
    x[1, 200] = float("inf")
    got = multiply(lib, x, weight.tiled(), None, *options)
    assert not torch.isfinite(got[1]).any()
    assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])
