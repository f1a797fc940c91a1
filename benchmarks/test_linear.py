"""linear_w4a16 and its gradient under pytest-benchmark, on a GPU::

    pytest benchmarks/test_linear.py                                  # about two minutes
    pytest benchmarks/test_linear.py --benchmark-save=before          # and later --benchmark-compare
    pytest benchmarks/test_linear.py -k "backward and 4096x14336"

Each round replays one CUDA graph of calls over weights that come from memory and waits for it; the time is that of all
calls in it, ``us_per_call`` in the extra information that of one. A result that is off is not timed. Plain ``pytest`` looks
into ``tests/`` only, so it does not run these; for tables with peers there is ``python -m benchmarks.run``.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.linear import GROUP, backward_ways, check, random_weights
from benchmarks.peers import LINEAR
from benchmarks.timing import capture, copies_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can see")
pytest.importorskip("pytest_benchmark")

SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)]  # (K, N)
TOKENS = [1, 16, 64, 256, 2048]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def weights(request):
    """bf16 weights of one shape, enough of them that none is found in a cache."""
    torch.manual_seed(0)
    k, n = request.param
    return random_weights(n, k, copies_for(n * k // 2, most=16))


def replay(benchmark, calls):
    """Time one graph of the calls; the rounds are few, as a GPU's times are steady."""
    graph = capture(calls)

    def run():
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["us_per_call"] = round(1e6 * benchmark.stats.stats.median / len(calls), 2)


@pytest.mark.parametrize("impl", ["pyquant", "cublas-bf16"])
@pytest.mark.parametrize("m", TOKENS)
def test_forward(benchmark, weights, m, impl):
    n, k = weights[0].shape
    benchmark.group = f"forward {k}x{n} M={m}"
    layers = [LINEAR[impl](w, GROUP) for w in weights]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w = layers[0].dequantize(torch.float32) if impl == "pyquant" else weights[0].float()
    check(f"{impl} at M={m} N={n} K={k}", layers[0](x), x.float() @ w.T)
    replay(benchmark, [partial(layer, x) for layer in layers])


@pytest.mark.parametrize("impl", ["pyquant", "expand", "fused", "cublas-bf16"])
@pytest.mark.parametrize("m", TOKENS)
def test_backward(benchmark, weights, m, impl):
    n, k = weights[0].shape
    benchmark.group = f"backward {k}x{n} M={m}"
    grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    if impl == "cublas-bf16":
        replay(benchmark, [partial(torch.mm, grad, w) for w in weights])
        return
    way = backward_ways().get(impl)
    if way is None or (impl == "fused" and m > 256):
        pytest.skip("no Triton here" if way is None else "unpacks everything again for each 64 tokens")
    layers = [LINEAR["pyquant"](w, GROUP) for w in weights]
    exact = grad.float() @ layers[0].dequantize(torch.float32)
    check(f"{impl} gradient at M={m} N={n} K={k}", way(layers[0], grad), exact)
    replay(benchmark, [partial(way, layer, grad) for layer in layers])
