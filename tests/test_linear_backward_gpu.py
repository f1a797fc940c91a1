"""The gradient of linear_w4a16 to x on a GPU: both of its ways at any shape, repeatability, graphs, memory."""

from __future__ import annotations

import random

import pytest
import torch

import cases
from cases import LinearCase, make_weight, make_x, mismatch, want_product
from pyquant.ops import linear
from pyquant.ops._registry import kernels, unavailable

pytestmark = pytest.mark.gpu

CASES = (
    LinearCase(1, 64, 64, 64),
    LinearCase(1, 1, 1, -1, symmetric=False),
    LinearCase(2, 127, 63, 32, symmetric=False, layout="rows"),
    LinearCase(5, 1025, 70, 128, symmetric=False, layout="columns"),
    LinearCase(16, 4096, 2048, 128),
    LinearCase(17, 513, 200, 32, layout="transposed"),
    LinearCase(33, 200, 333, -1, symmetric=False),
    LinearCase(63, 191, 704, 64, symmetric=False, layout="rows"),
    LinearCase(64, 2048, 4096 + 32, 32, symmetric=False),
    LinearCase(65, 130, 1000, 128),
    LinearCase(200, 1000, 577, 64, symmetric=False, layout="transposed"),
)
HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]


def fused(out, *args):
    if why := unavailable("triton", "cuda"):
        pytest.skip(why)
    kernels("linear_backward").linear_w4a16_backward(out, *args)


WAYS = {"fused": fused, "expand": linear._backward_expand}


def gradient(way: str, grad, weight, k: int):
    out = torch.full((len(grad), k), float("nan"), dtype=grad.dtype, device="cuda")
    WAYS[way](out, grad, *weight.tiled(), weight.group_size)
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient(case, dtype, way):
    weight = make_weight(case.n, case.k, case.group_size, case.symmetric, dtype, "cuda")
    grad = make_x(case.m, case.n, case.layout, dtype, "cuda")
    got = gradient(way, grad, weight, case.k)
    want = want_product(grad, weight.w_hat.T, None, dtype, rounded_weight=True, by_cublas=way == "expand")
    assert mismatch(got, want) is None
    for name, fault in cases.WEIGHT_FAULTS.items():
        if case.n > 1 and not (name == "wrong code" and case.m == 1):  # it meets one number, which may be close to 0
            assert mismatch(gradient(way, grad, fault(weight), case.k), want) is not None, name
    for fault in cases.RESULT_FAULTS.values():
        assert mismatch(fault(got), want) is not None


def test_error_is_no_larger_than_that_of_cublas():
    """At 60 random shapes, RMS over all of them and with room for chance at each, as for the forward."""
    rng, sums = random.Random(1), [0.0, 0.0]
    for _ in range(60):
        m = rng.randint(1, linear.FUSED_BACKWARD_TOKENS)
        n, k = (max(1, int(9000 ** rng.random()) + rng.choice([-1, 0, 1])) for _ in range(2))
        group_size, symmetric = rng.choice([32, 64, 128, -1]), rng.random() < 0.5
        weight = make_weight(n, k, group_size, symmetric, torch.bfloat16, "cuda")
        grad = torch.randn(m, n, device="cuda").bfloat16()
        got = gradient("fused", grad, weight, k)
        want = want_product(grad, weight.w_hat.T, None, torch.bfloat16, rounded_weight=True)
        assert mismatch(got, want) is None, (m, n, k, group_size, symmetric)
        theirs = grad @ weight.w_hat.bfloat16()
        ours_rms, their_rms = ((t.double() - want.value).square().sum().item() for t in (got, theirs))
        assert ours_rms <= their_rms * (1 + 3 / (2 * got.numel()) ** 0.5) ** 2 + 1e-12, (m, n, k, group_size)
        scale = want.value.square().sum().item() + 1e-30
        sums = [sums[0] + ours_rms / scale, sums[1] + their_rms / scale]
    assert sums[0] <= sums[1] * 1.01, sums


@pytest.mark.parametrize("m", [1, 33, 64])
def test_repeats_bit_for_bit_also_in_a_graph(m):
    weight = make_weight(4096, 1536, 128, False, torch.bfloat16, "cuda")
    tiled = weight.tiled()
    grad = torch.randn(m, 4096, device="cuda").bfloat16()

    def backward():
        return torch.ops.pyquant.linear_w4a16_backward(grad, *tiled, 1536, 128)

    first = backward()
    for _ in range(100):
        assert torch.equal(backward(), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = backward()
    graph.replay()
    assert torch.equal(again, first)


def test_the_expanded_weight_never_stands_in_memory_whole():
    n, k, m = 8192, 16_400, 128
    weight = make_weight(n, k, -1, True, torch.bfloat16, "cuda")
    tiled = weight.tiled()
    assert 2 * n * k > linear.EXPANDED_BYTES
    grad = torch.randn(m, n, device="cuda").bfloat16()
    torch.ops.pyquant.linear_w4a16_backward(grad, *tiled, k, -1)  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = torch.ops.pyquant.linear_w4a16_backward(grad, *tiled, k, -1)
    extra = torch.cuda.max_memory_allocated() - before - got.numel() * 2
    assert extra < 1.3 * linear.EXPANDED_BYTES  # and a quarter for the packed columns
    want = want_product(grad, weight.w_hat.T, None, torch.bfloat16, rounded_weight=True, by_cublas=True)
    assert mismatch(got, want) is None


@pytest.mark.parametrize("m", [8, 100])
def test_under_compile_it_is_the_same(m):
    weight = make_weight(256, 512, 128, True, torch.bfloat16, "cuda")
    tiled = weight.tiled()

    def loss(x):
        return torch.ops.pyquant.linear_w4a16(x, *tiled, None, 256, 128).float().square().sum()

    grads = []
    x = torch.randn(m, 512, device="cuda").bfloat16()
    for run in (loss, torch.compile(loss, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        run(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
