"""linear_w4a16 for a few tokens (csrc/linear_mma.cuh) without a GPU: its source, compiled for the CPU.

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
    before, found, _ = text.partition("template <typename T, int NT, int GROUPS, int GEOMETRY>\nvoid launch(")
    assert found
    return before.replace(DYNAMIC, "") + "}  // namespace\n}  // namespace pyquant\n"


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    csrc = ROOT / "csrc"
    sources = {name: (csrc / name).read_text() for name in ("ops.h", "linear_mma.h", "format.cuh")}
    sources["linear_mma.cuh"] = planned_part((csrc / "linear_mma.cuh").read_text())
    return emulated_library(tmp_path_factory.mktemp("emulated"), sources, ["linear_mma.cpp"])


def multiply(lib, x, tiled, bias, n, group_size, tokens, geometry, log_splits, multiprocessors, most_bytes=BLOCK):
    qweight, scale, zero = tiled
    y = torch.full((len(x), n), float("nan"), dtype=x.dtype)
    call = Linear(
        x.data_ptr(), x.stride(0), int(x.dtype == torch.float16), qweight.data_ptr(), scale.data_ptr(),
        None if zero is None else zero.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), len(x), n,
        x.shape[1], group_size,
    )  # fmt: skip
    assert lib.multiply(ctypes.byref(call), tokens, geometry, log_splits, multiprocessors, most_bytes) == 0
    return y


# (dtype, tokens of a pass, group size, geometry): the instances that tests/emulated/linear_mma.cpp makes.
INSTANCES = [
    (torch.bfloat16, 8, 128, 0), (torch.bfloat16, 16, -1, 1), (torch.bfloat16, 8, 32, 1), (torch.float16, 16, 64, 0),
    (torch.float16, 8, 32, 2), (torch.float16, 16, 128, 3), (torch.bfloat16, 16, 64, 2),
]  # fmt: skip


@pytest.mark.parametrize("log_splits", [0, 1, 3])
@pytest.mark.parametrize("dtype, tokens, group_size, geometry", INSTANCES)
def test_products_and_planted_faults(lib, dtype, tokens, group_size, geometry, log_splits):
    """Rings filled once and often, K that ends inside a unit and N inside a tile, one pass of tokens and two."""
    torch.manual_seed(log_splits)
    for i, (m, n, k, blocks) in enumerate([(tokens, 130, 712, 4), (5, 48, 2440, 2), (tokens + 3, 180, 325, 1)]):
        symmetric = (i + log_splits) % 2 == 0
        weight = make_weight(n, k, group_size, symmetric, dtype, "cpu")
        wide = torch.randn(m, -(-k // 8) * 8 + 8).to(dtype)
        x, bias = wide[:, :k], torch.randn(n).to(dtype) if i != 1 else None
        options = (n, group_size, tokens, geometry, log_splits, blocks << log_splits)
        want = want_product(x, weight.w_hat, bias, dtype, rounded_weight=False)
        assert mismatch(multiply(lib, x, weight.tiled(), bias, *options), want) is None, (m, n, k)
        for name, fault in WEIGHT_FAULTS.items() if i == 2 else ():
            wrong = multiply(lib, x, fault(weight).tiled(), bias, *options)
            assert mismatch(wrong, want) is not None, name


def test_x_that_does_not_fit_is_read_again(lib):
    m, n, k = 8, 64, 4096
    weight = make_weight(n, k, 128, True, torch.bfloat16, "cpu")
    x = torch.randn(m, k).bfloat16()
    want = want_product(x, weight.w_hat, None, torch.bfloat16, rounded_weight=False)
    options = (n, 128, 8, 0, 0, 1)
    for most_bytes in (BLOCK, 120 << 10):
        assert mismatch(multiply(lib, x, weight.tiled(), None, *options, most_bytes), want) is None
    with pytest.raises(AssertionError):
        multiply(lib, x, weight.tiled(), None, *options, 64 << 10)


def test_what_is_not_finite_stays_in_its_token(lib):
    weight = make_weight(40, 300, 128, True, torch.bfloat16, "cpu")
    x = torch.randn(4, 304).bfloat16()[:, :300]
    options = (40, 128, 8, 0, 0, 1)
    clean = multiply(lib, x, weight.tiled(), None, *options)
    x[1, 200] = float("inf")
    got = multiply(lib, x, weight.tiled(), None, *options)
    assert not torch.isfinite(got[1]).any()
    assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])
