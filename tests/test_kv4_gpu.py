"""The kernels on a cache in mixed precision, on a GPU: any shape, error beside SDPA, graphs, streams, repeatability."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from kv4_cases import Kv4Case, attend, make_cache, make_case, want_kv4

from cases import mismatch
from pyquant import ops
from pyquant.formats import kv4
from pyquant.ops import _registry

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def extension_only(monkeypatch):
    if why := _registry.unavailable("cuda", "cuda"):
        pytest.skip(why)
    monkeypatch.setenv("PYQUANT_BACKEND", "cuda")


def random_case(rng: random.Random) -> Kv4Case:
    size, kv_heads, group = rng.choice(kv4.HEAD_SIZES), rng.choice([1, 2, 4, 8]), rng.choice([1, 2, 4, 5, 8, 16])
    tokens, shared = rng.choice([1, 1, 1, 2, 3, 8]), rng.random() < 0.3
    tokens = max(1, min(tokens, (16 if size > 128 else 32) // group))
    kept, segments = rng.choice([0, 1, 15, 16, 17, 128, 300]), []
    batch = rng.choice([1, 2, 3, 7, 33])
    for _ in range(batch):
        own = kept if shared else rng.choice([0, 1, 16, 17, 63, 128])
        new = rng.choice([tokens, 63 + tokens, 64, 65, 128, 129, 190])
        segments.append((own, rng.choice([0, 0, 1, 2, 5, 40]), max(new, tokens)))
    return Kv4Case(
        batch, tokens, kv_heads * group, kv_heads, size, tuple(segments), rng.choice([0, 0, 0, 30.0]), shared,
        bits=rng.choice([4, 4, 8, 3, 2]), sliding=rng.choice([0, 0, 1, 64, 100, 1000]), sinks=rng.random() < 0.3,
    )  # fmt: skip


def sdpa(q, cache):
    """torch's attention over the dequantized cache in q's dtype, fp64 of its result."""
    outs = []
    for b, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        length, tokens = k.shape[1], q.shape[1]
        mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)
        out = torch.nn.functional.scaled_dot_product_attention(
            q[b].transpose(0, 1)[None], k.to(q.dtype)[None], v.to(q.dtype)[None], attn_mask=mask, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.stack(outs).double()


@pytest.mark.parametrize("part", range(10))
def test_random_configurations(part):
    """20 configurations each: within the bounds, the same bits twice, and no further from fp64 than torch's attention.

    Over a cache that both know exactly, the kernel's probabilities and queries are rounded to 16 bits as SDPA's are, and
    SDPA also rounds the dequantized values: in bf16 the kernel errs less, in fp16 as much; 1.25 and two final roundings of
    room for few rows, where the ratio of two random errors scatters.
    """
    rng = random.Random(part)
    for _ in range(20):
        case, dtype = random_case(rng), rng.choice([torch.bfloat16, torch.float16])
        q, cache = make_case(case, dtype, "cuda")
        out, lse = attend(q, cache, case)
        again, _ = attend(q, cache, case)
        want, want_lse = want_kv4(q, cache, case, dtype, True)
        assert mismatch(out, want) is None, f"{case} {dtype}"
        assert mismatch(lse, want_lse) is None, f"{case} {dtype}"
        assert torch.equal(out, again), f"{case} {dtype}: other bits the second time"
        if not case.softcap and not case.sinks and not case.sliding:
            error, theirs = ((t - want.value).norm() / want.value.norm() for t in (out.double(), sdpa(q, cache)))
            assert error <= 1.25 * theirs + torch.finfo(dtype).eps / 4, (
                f"{case} {dtype}: {error:.2e}, SDPA {theirs:.2e}"
            )


# Each way to launch: clusters of 16 to 4 blocks, of 2 with 16 warps, of 2 and 1 with 8, for few units whatever lengths; for
# many units about equal lengths, and lengths that differ, which take the list in the same launch; and 16 rows.
LAUNCHES = [
    Kv4Case(1, 1, 32, 8, 128, ((128, 60, 128),)),
    Kv4Case(2, 1, 32, 8, 128, ((128, 60, 128), (16, 3, 70)), sinks=True),
    Kv4Case(4, 1, 32, 8, 128, ((100, 60, 128), (0, 0, 1), (3, 2, 64)), softcap=30.0),
    Kv4Case(8, 1, 32, 8, 128, ((128, 60, 128), (0, 1, 64), (5, 30, 100)), sliding=1000),
    Kv4Case(8, 1, 32, 8, 128, ((128, 210, 128), (100, 200, 100))),
    Kv4Case(8, 1, 32, 8, 128, ((128, 210, 128), (100, 200, 100), (0, 20, 64))),
    Kv4Case(16, 1, 32, 8, 128, ((128, 60, 128), (16, 9, 70))),
    Kv4Case(16, 1, 64, 8, 64, ((128, 110, 128), (100, 106, 100))),
    Kv4Case(16, 1, 32, 8, 64, ((128, 110, 128), (100, 106, 100), (0, 1, 64)), bits=2),
    Kv4Case(32, 1, 32, 8, 128, ((128, 20, 128), (16, 1, 70)), bits=3),
    Kv4Case(32, 1, 32, 8, 128, ((128, 60, 128), (100, 58, 100))),
    Kv4Case(32, 1, 32, 8, 128, ((128, 60, 128), (100, 58, 100), (0, 9, 64))),
    Kv4Case(1, 1, 64, 4, 128, ((128, 60, 128),)),
    Kv4Case(1, 2, 32, 4, 128, ((128, 60, 128),), bits=8),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_launches(case, dtype):
    """On the multiprocessors of an H100 or H200; elsewhere other ways are taken, which must be as right."""
    q, cache = make_case(case, dtype, "cuda")
    want, want_lse = want_kv4(q, cache, case, dtype, True)
    out, lse = attend(q, cache, case)
    assert mismatch(out, want) is None
    assert mismatch(lse, want_lse) is None
    for early in (False, True):
        assert torch.equal(attend(q, cache, case, early=early)[0], out), "other bits the second time"
    wrong = replace(cache, pages=cache.pages.roll(1, 1))
    assert mismatch(attend(q, wrong, case)[0], want), "the comparison missed pages of another head"
    cache.segments[-1] = 0
    out, lse = attend(q, cache, case)
    assert not out[-1].any() and lse[-1].eq(-torch.inf).all()
    others = replace(want, value=want.value[:-1], worst=want.worst[:-1])
    assert mismatch(out[:-1], others) is None, "an empty sequence changes the others"


def long_case(dtype=torch.bfloat16):
    return make_case(Kv4Case(3, 1, 32, 8, 128, ((128, 60, 100), (16, 0, 5), (128, 33, 190))), dtype, "cuda")


def test_early_changes_nothing():
    q, cache = long_case()
    want, _ = ops.attention_kv4(q, *cache.parts())
    for _ in range(20):
        assert torch.equal(ops.attention_kv4(q, *cache.parts(), early=True)[0], want)


def test_captured_graphs_have_their_own_workspaces():
    """Two graphs replayed at once on two streams, with other lengths than at capture."""
    made = [long_case(), long_case(torch.float16)]
    wants = [ops.attention_kv4(q, *cache.parts())[0] for q, cache in made]
    graphs, outs = [], []
    for q, cache in made:
        lengths = cache.segments.clone()
        cache.segments.copy_(torch.tensor([[16, 0, 20]] * 3, device="cuda"))
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            ops.attention_kv4(q, *cache.parts())
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            outs.append(ops.attention_kv4(q, *cache.parts())[0])
        graphs.append(graph)
        cache.segments.copy_(lengths)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for out, want in zip(outs, wants, strict=True):
        assert torch.equal(out, want)


def test_follows_the_current_stream():
    """Segments are written late on a side stream: a kernel on another stream would read the old ones."""
    q, cache = long_case()
    want, _ = ops.attention_kv4(q, *cache.parts())
    lengths = cache.segments.clone()
    cache.segments.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        cache.segments.copy_(lengths)
        out, _ = ops.attention_kv4(q, *cache.parts())
    side.synchronize()
    assert torch.equal(out, want)


def test_two_streams_at_once():
    q, cache = long_case()
    want, _ = ops.attention_kv4(q, *cache.parts())
    streams, outs = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(ops.attention_kv4(q, *cache.parts())[0])
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)


def test_what_the_kernel_declines_runs_elsewhere(monkeypatch):
    monkeypatch.delenv("PYQUANT_BACKEND")
    cache = make_cache([(16, 1, 70)], 1, 128, torch.float16, "cuda")
    q = torch.randn(1, 3, 16, 128, device="cuda").half()  # 48 rows
    out, _ = ops.attention_kv4(q, *cache.parts())
    assert mismatch(out, want_kv4(q, cache, Kv4Case(1, 3, 16, 1, 128, ((16, 1, 70),)), torch.float16, True)[0]) is None
