"""linear_w4a16 on a GPU at any shape: error beside cuBLAS, every way to cut the work, repeatability, odd values."""

from __future__ import annotations

import random

import pytest
import torch

from cases import WEIGHT_FAULTS, make_weight, mismatch, want_product
from pyquant import ops
from pyquant.ops import _registry
from pyquant.ops.linear import (
    EXACT_TOKENS,
    EXPANDED_BYTES,
    FEW_TOKENS,
    MANY_TOKENS,
    MANY_WEIGHTS,
    _multiprocessors,
    _workspace,
)
from pyquant.ops.quantize import dtype_code, pointer, stream

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def extension_only(monkeypatch):
    why = _registry.unavailable("cuda", "cuda")
    if why:
        pytest.skip(why)
    monkeypatch.setenv("PYQUANT_BACKEND", "cuda")


def hopper() -> bool:
    return _multiprocessors(torch.cuda.current_device()) > 0


# Token tiles and ways to cut the work that csrc/linear_decode.cuh (8), csrc/linear_wgmma.cuh and csrc/linear_mma.cuh
# (-8, for up to 8 tokens) know: see csrc/ops.h.
WAYS = [(8, splits) for splits in (1, 2, 4, 8)] + [
    (tile, cut) for tile in (16, 32, 64, 128, 256) for cut in range(3 if tile < 128 else 2)
]
WAYS += [(-8, variant) for variant in (-1, 1, 2)]


def call(x, tiled, bias, n, group_size, tokens, variant, y=None):
    """One launch of the kernel for this token tile, cut this way."""
    qweight, scale, zero = tiled
    if y is None:
        y = torch.full((x.shape[0], n), float("nan"), dtype=x.dtype, device=x.device)
    space = _workspace(x.device.index, stream())
    _registry.extension().linear_w4a16(
        x.data_ptr(), x.stride(0), dtype_code(x.dtype), qweight.data_ptr(), scale.data_ptr(), pointer(zero),
        pointer(bias), y.data_ptr(), *x.shape[:1], n, x.shape[1], group_size, stream(), space.data_ptr(), space.numel(),
        tokens, variant,
    )  # fmt: skip
    return y


def errors_of_tile(tokens: int) -> dict[str, bool]:
    return {"rounded_weight": tokens > EXACT_TOKENS, "fixed_point_x": 0 < tokens <= 8}


# ------------------------------------------------------------------------------------------------ every way, any shape


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("tokens, variant", WAYS)
def test_every_way_to_cut_the_work(tokens, variant, group_size, symmetric):
    if not hopper():
        pytest.skip("clusters and wgmma need a Hopper GPU")
    dtype = torch.bfloat16 if symmetric else torch.float16
    for m, n, k in ((1, 200, 1096), (9, 384, 4096), (70, 1000, 840), (300, 130, 2056)):
        if tokens < 0:
            m = min(m, -tokens)
        elif m > 8 * tokens:
            continue
        weight = make_weight(n, k, group_size, symmetric, dtype, "cuda")
        x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
        got = call(x, weight.tiled(), bias, n, group_size, tokens, variant)
        want = want_product(x, weight.w_hat, bias, dtype, **errors_of_tile(tokens))
        assert mismatch(got, want) is None, (m, n, k)
        for name, fault in WEIGHT_FAULTS.items():
            if name == "wrong code" and m == 1:
                continue  # it meets one value of x, which may be close to 0
            wrong = call(x, fault(weight).tiled(), bias, n, group_size, tokens, variant)
            assert mismatch(wrong, want) is not None, name


@pytest.mark.parametrize("n, k", [(17_000, 2056), (200, 20_008)], ids=["turns", "x read again"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("variant", [1, 2])
def test_up_to_8_tokens_over_many_tiles_a_block_and_x_that_does_not_fit(variant, group_size, n, k):
    """A block's places for sums and its barriers serve several turns; of long rows it has a part at a time."""
    if not hopper():
        pytest.skip("linear_mma needs a Hopper GPU")
    weight = make_weight(n, k, group_size, variant == 1, torch.bfloat16, "cuda")
    x = torch.randn(8, k, device="cuda").bfloat16()
    want = want_product(x, weight.w_hat, None, torch.bfloat16, rounded_weight=False)
    assert mismatch(call(x, weight.tiled(), None, n, group_size, -8, variant), want) is None
    for name, fault in WEIGHT_FAULTS.items():
        assert mismatch(call(x, fault(weight).tiled(), None, n, group_size, -8, variant), want) is not None, name


@pytest.mark.parametrize(
    "m, tokens, variant, why",
    [(9, -8, 1, "M=9"), (8, -8, 0, "variant=0"), (8, -8, 4, "variant=4"), (8, -16, 1, "tokens=-16")],
)
def test_pins_that_linear_mma_does_not_know_are_errors(m, tokens, variant, why):
    if not hopper():
        pytest.skip("linear_mma needs a Hopper GPU")
    weight = make_weight(64, 128, 128, True, torch.bfloat16, "cuda")
    x = torch.randn(m, 128, device="cuda").bfloat16()
    with pytest.raises(ValueError, match=why):
        call(x, weight.tiled(), None, 64, 128, tokens, variant)


@pytest.mark.parametrize("symmetric", [True, False])
def test_many_tokens_over_a_large_weight_go_through_the_expanded_weight_in_parts(symmetric):
    m, n, k, dtype = MANY_TOKENS + 1, 16_400 + 21, 4_101, torch.bfloat16
    assert n * k > MANY_WEIGHTS and 2 * n * k > EXPANDED_BYTES
    weight = make_weight(n, k, 64, symmetric, dtype, "cuda")
    x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    x[:64] @ x[:64].T  # cuBLAS' workspace of 32 MB, which comes with a process' first product and stays
    for b in (bias, None):
        want = want_product(x, weight.w_hat, b, dtype, rounded_weight=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        got = ops.linear_w4a16(x, *weight.tiled(), b, n, 64)
        extra = torch.cuda.max_memory_allocated() - before - got.numel() * 2
        assert extra < 1.1 * EXPANDED_BYTES
        assert mismatch(got, want) is None
    for name, fault in WEIGHT_FAULTS.items():
        assert mismatch(ops.linear_w4a16(x, *fault(weight).tiled(), None, n, 64), want) is not None, name


def random_shapes(count: int):
    """M 1..5000, N and K 1..20000: odd ones, primes, and tile edges with their neighbours."""
    rng = random.Random(0)
    primes = [2, 3, 5, 7, 13, 31, 61, 127, 257, 509, 1021, 2039, 4093, 8191, 16381, 19997]

    def size(most):
        kind = rng.randrange(3)
        if kind == 0:
            v = int(most ** rng.random()) | 1
        elif kind == 1:
            v = rng.choice(primes)
        else:
            v = rng.choice([16, 32, 64, 128, 256]) * rng.randint(1, 40) + rng.choice([-1, 0, 1])
        return max(1, min(v, most))

    for _ in range(count):
        yield (
            size(5000),
            size(20000),
            size(20000),
            rng.choice([32, 64, 128, -1]),
            rng.random() < 0.5,
            rng.random() < 0.5,
        )


def test_error_is_no_larger_than_that_of_cublas():
    """At 200 random shapes: within the derived bound element by element, and RMS no larger than cuBLAS on w_hat in bf16.

    The comparison is by sums over all shapes of one kind, and shape by shape with room for chance: two RMS errors of the
    same size over few outputs differ by about 3 / sqrt(2 outputs) of themselves.
    """
    sums: dict[bool, list[float]] = {}
    for m, n, k, group_size, symmetric, has_bias in random_shapes(200):
        weight = make_weight(n, k, group_size, symmetric, torch.bfloat16, "cuda")
        tiled = weight.tiled()
        x = torch.randn(m, k, device="cuda").bfloat16()
        bias = torch.randn(n, device="cuda").bfloat16() if has_bias else None
        got = ops.linear_w4a16(x, *tiled, bias, n, group_size)
        few = m <= (FEW_TOKENS if hopper() else 64)
        exact = m <= (EXACT_TOKENS if hopper() else 64)
        want = want_product(x, weight.w_hat, bias, torch.bfloat16, rounded_weight=not exact, fixed_point_x=few)
        where = (m, n, k, group_size, symmetric, has_bias)
        assert mismatch(got, want) is None, where
        w_hat = ops.dequantize_int4(*tiled, n, k, group_size)
        theirs = torch.nn.functional.linear(x, w_hat, bias)
        ours_rms, their_rms = ((t.double() - want.value).square().sum().item() for t in (got, theirs))
        room = (1 + 3 / (2 * got.numel()) ** 0.5) ** 2
        assert ours_rms <= their_rms * room + 1e-12, where
        both = sums.setdefault(exact, [0.0, 0.0])
        scale = want.value.square().sum().item() + 1e-30
        both[0] += ours_rms / scale
        both[1] += their_rms / scale
    for exact, (ours, theirs) in sums.items():
        assert ours <= theirs * 1.01, (exact, ours, theirs)


# ------------------------------------------------------------------------------------------------ repeatability


@pytest.mark.parametrize("m", [1, 4, 9, 33, 64, 100, 257])
def test_a_thousand_runs_are_bitwise_equal_beside_another_stream(m):
    """Blocks of one launch wait for each other; another kernel that holds multiprocessors changes when, not what."""
    n, k = 1536, 4096
    weight = make_weight(n, k, 128, False, torch.bfloat16, "cuda")
    tiled = weight.tiled()
    x = torch.randn(m, k, device="cuda").bfloat16()
    first = ops.linear_w4a16(x, *tiled, None, n, 128)
    other = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device="cuda")
    more = torch.randn(48, k, device="cuda").bfloat16()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    alone = ops.linear_w4a16(more, *tiled, None, n, 128)
    torch.cuda.synchronize()
    for i in range(1000):
        with torch.cuda.stream(other):
            if i % 20 == 0:
                noise = (noise @ noise).clamp(-1, 1)
            if i % 7 == 0:  # the same kernel with a workspace of its own
                beside = ops.linear_w4a16(more, *tiled, None, n, 128)
                differing += (beside != alone).sum()
        differing += (ops.linear_w4a16(x, *tiled, None, n, 128) != first).sum()
    torch.cuda.synchronize()
    assert differing.item() == 0


def test_graphs_with_their_own_workspaces():
    """Two captured graphs replayed on two streams at once, and eager calls in between."""
    n, k = 768, 8192
    weight = make_weight(n, k, 128, True, torch.bfloat16, "cuda")
    tiled = weight.tiled()
    xs = [torch.randn(m, k, device="cuda").bfloat16() for m in (16, 64)]
    want = [ops.linear_w4a16(x, *tiled, None, n, 128) for x in xs]
    graphs, outputs = [], []
    for x in xs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append([ops.linear_w4a16(x, *tiled, None, n, 128) for _ in range(5)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, on in zip(graphs, streams, strict=True):
            with torch.cuda.stream(on):
                graph.replay()
        eager = ops.linear_w4a16(xs[0], *tiled, None, n, 128)
    torch.cuda.synchronize()
    assert torch.equal(eager, want[0])
    for got, right in zip(outputs, want, strict=True):
        assert all(torch.equal(y, right) for y in got)


@pytest.mark.parametrize("tokens, variant", [way for way in WAYS if way[0] < 0])
def test_a_chain_of_products_for_a_few_tokens(tokens, variant):
    """Each call starts before the one ahead has ended, and takes its result: bit for bit what calls one by one give."""
    if not hopper():
        pytest.skip("clusters need a Hopper GPU")
    n = k = 2048
    weights = [make_weight(n, k, 128, i % 2 == 0, torch.bfloat16, "cuda").tiled() for i in range(8)]
    first = torch.randn(5, k, device="cuda").bfloat16()
    one_by_one = [first]
    for weight in weights:
        one_by_one.append(call(one_by_one[-1], weight, None, n, 128, tokens, variant))
        torch.cuda.synchronize()
    for _ in range(20):
        chain = [first] + [torch.full_like(first, float("nan")) for _ in weights]
        for i, weight in enumerate(weights):
            call(chain[i], weight, None, n, 128, tokens, variant, chain[i + 1])
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(chain, one_by_one, strict=True))


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("m", [1, 4, 9, 40])
def test_outliers_zeros_and_extremes(m, dtype):
    """Large mantissas, exact zeros, tokens of very different size, one column a thousand times the others."""
    n, k = 130, 1000
    weight = make_weight(n, k, 64, False, dtype, "cuda")
    wide = dtype == torch.bfloat16  # fp16 would overflow
    x = torch.randn(m, k, device="cuda") * torch.logspace(-2, 2 if wide else 0, m, device="cuda")[:, None]
    x[:, 17] *= 1000 if wide else 100
    x[:, 128:256] = 0
    x[0, 300:400] = 1.9921875 * 2.0**3
    x = x.to(dtype)
    got = ops.linear_w4a16(x, *weight.tiled(), None, n, 64)
    tokens = 8 if m <= FEW_TOKENS or not hopper() else m
    assert mismatch(got, want_product(x, weight.w_hat, None, dtype, **errors_of_tile(tokens))) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [2, 9, 40])
def test_what_is_not_finite_shows(m, bad):
    """In its own token, and in no other."""
    weight = make_weight(130, 512, 128, True, torch.bfloat16, "cuda")
    x = torch.randn(m, 512, device="cuda").bfloat16()
    clean = ops.linear_w4a16(x, *weight.tiled(), None, 130, 128)
    x[1, 200] = bad
    got = ops.linear_w4a16(x, *weight.tiled(), None, 130, 128)
    others = [i for i in range(m) if i != 1]
    assert torch.equal(got[others], clean[others])
    touched = weight.steps[:, 200] != 0
    assert not torch.isfinite(got[1][touched]).any()
