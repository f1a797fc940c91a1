"""A static KVCache: the growing one's results where nothing moves in memory, compiled in one graph, captured and replayed."""

from __future__ import annotations

import pytest
import torch
from kv_models import LENGTH, logits_of, make, run
from tiny import some_tokens
from transformers import CompileConfig

import pyquant
from pyquant.nn.kv_cache import KVLayer, KVSettings

KINDS = [{"bits": 4, "prompt_tokens": 10, "window": 32}, {"bits": 4, "prompt_tokens": None, "window": 0}, {"bits": 16}]


def both(model, settings, capacity=LENGTH):
    return [pyquant.KVCache(model.config, **settings, **more) for more in ({}, {"capacity": capacity, "static": True})]


def places(cache):
    return [[t.data_ptr() for t in layer.kept.parts()] for layer in cache.layers]


@pytest.mark.parametrize("settings", KINDS, ids=["10+32", "all+0", "16"])
@pytest.mark.parametrize(("family", "chunk"), [("llama", 1), ("qwen3", 3), ("mistral", 40)])
def test_it_is_the_growing_cache_in_one_place(settings, family, chunk):
    """Logits bit for bit, by steps, chunks and after reset, at the same addresses."""
    model, ids = make(family), some_tokens(2, 190)
    grown, static = both(model, settings)
    want = logits_of(model, ids, grown, "pyquant", 100, chunk)
    where = None
    for _ in range(2):
        with torch.no_grad():
            model(ids[:, :100], past_key_values=static)
            where = where or places(static)
            got = [model(ids[:, i : i + chunk], past_key_values=static).logits for i in range(100, 190, chunk)]
        assert torch.equal(torch.cat(got, 1), want)
        for a, b in zip(grown.layers, static.layers, strict=True):
            assert a.kept.held == b.kept.held
        static.reset()
        assert static.get_seq_length() == 0 and places(static) == where


def test_what_transformers_asks_of_it():
    model, ids = make("llama"), some_tokens(2, 50)
    grown, static = both(model, KINDS[0], 300)
    assert static.is_compileable == (not torch.cuda.is_available())
    assert not grown.is_compileable
    assert static.get_seq_length() == 0
    logits_of(model, ids, static, "pyquant", 40)
    length = static.get_seq_length()
    assert isinstance(length, torch.Tensor) and length == 50
    assert static.get_mask_sizes(1, 0) == (300, 0)
    assert static.layers[0].get_max_length() == 300


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 5}], ids=["greedy", "beams", "lookup"]
)
def test_generate(how):
    """Padding, beams (reordered in place) and crop; the batch of the lookup is one, as transformers asks."""
    model = make("llama")
    ids = some_tokens(1, 30).repeat(1, 4) if "prompt_lookup_num_tokens" in how else some_tokens(2, 120)
    mask = torch.ones_like(ids)
    if not how:
        mask[1, :17] = 0
    grown, static = both(model, KINDS[0])
    want = run(model, ids, grown, attention_mask=mask, new=80, **how)
    assert torch.equal(run(model, ids, static, attention_mask=mask, new=80, **how), want)


def compiled_step(model):
    """A decode step as one graph; a host that looks at a number of the device would break it."""
    torch._dynamo.reset()

    def step(ids, positions, cache):
        return model(ids, position_ids=positions, past_key_values=cache).logits

    return torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)


@pytest.mark.parametrize("settings", KINDS[::2], ids=["4 bits", "16"])
def test_a_step_compiles_to_one_graph(settings):
    """fullgraph, no second compilation however long the text becomes, and the logits of the growing cache."""
    model, ids = make("llama"), some_tokens(2, 140)
    grown, static = both(model, settings)
    want = logits_of(model, ids, grown, "pyquant", 60)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=static)
        step, got = compiled_step(model), []
        for i in range(60, 140):
            with torch.compiler.set_stance("fail_on_recompile" if i > 60 else "default"):
                got.append(step(ids[:, i : i + 1], torch.tensor([[i]]), static))
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)  # products in another order
    assert static.layers[0].kept.held == grown.layers[0].kept.held


def test_generate_compiles():
    """Where generate compiles, a step is one graph."""
    model, ids = make("llama"), some_tokens(2, 100)
    grown, static = both(model, KINDS[0])
    want = run(model, ids, grown, new=40)
    torch._dynamo.reset()
    compiles = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compiles._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    assert torch.equal(run(model, ids, static, new=40, compile_config=compiles), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "it was compiled"


@pytest.mark.parametrize("bits", [4, 16])
def test_more_than_its_capacity_is_refused(bits):
    settings = KVSettings(bits, 0, 0, 200, static=True)
    k = torch.randn(1, 2, 264, 64)
    layer = KVLayer(settings, 1, 2, 64, torch.float32, "cpu")
    with pytest.raises(ValueError, match="more tokens than the 200 that the static KV cache was made for"):
        layer.add(k, k)


def test_steps_beyond_its_capacity_are_refused():
    model, ids = make("llama"), some_tokens(2, 101)
    _, static = both(model, KINDS[0], 100)
    assert logits_of(model, ids[:, :100], static, "pyquant", 90).shape[1] == 10
    with torch.no_grad(), pytest.raises(ValueError, match="101 tokens are more than the 100 of the static KV cache"):
        model(ids[:, 100:], past_key_values=static)


def test_refusals():
    model, ids = make("llama"), some_tokens(2, 40)
    with pytest.raises(ValueError, match="a static KV cache needs a capacity"):
        pyquant.KVCache(model.config, static=True)
    _, static = both(model, KINDS[0])
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="works with the attention \"pyquant\" alone, and the model has 'sdpa'"):
        model(ids, past_key_values=static)
    _, static = both(model, KINDS[0])
    logits_of(model, ids, static, "pyquant", 39)
    with pytest.raises(ValueError, match="of 2 sequences cannot become one of 4"):
        static.batch_repeat_interleave(2)
    odd = make("llama", head_dim=24)
    odd.set_attn_implementation("pyquant")
    with pytest.raises(ValueError, match="does not hold heads of 24"):
        odd(ids, past_key_values=both(odd, KINDS[0])[1])


def test_a_mask_with_holes_is_seen():
    """Outside of graphs masks are read as those of a growing cache, and the line in the log is the same."""
    model, ids = make("llama"), some_tokens(2, 100)
    mask = torch.ones_like(ids)
    mask[1, 40] = 0
    grown, static = both(model, {"bits": 16})
    want = run(model, ids, grown, attention_mask=mask, new=20)
    assert torch.equal(run(model, ids, static, attention_mask=mask, new=20), want)
    assert static.warned == grown.warned != set()


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [10, None])
def test_a_captured_step(kept):
    """A step captured once and replayed 150 times, then again after reset: bit for bit the logits of uncaptured steps over such
    a cache, and those of the growing one up to bf16.
    """
    model = make("llama", hidden_size=256, head_dim=64, initializer_range=0.06).to("cuda", torch.bfloat16)
    settings, ids = {"prompt_tokens": kept, "window": 32}, some_tokens(2, 250).cuda()
    grown, static = both(model, settings)
    near, want = (logits_of(model, ids, cache, "pyquant", 100) for cache in (grown, both(model, settings)[1]))
    assert (
        want - near
    ).float().norm() <= 0.02 * near.float().norm()  # rounded twice in each of two layers: 0.004 a time
    token, place = torch.zeros_like(ids[:, :1]), torch.zeros(1, 1, dtype=torch.int64, device="cuda")

    def step():
        return model(token, position_ids=place, past_key_values=static).logits

    graph = None
    with torch.no_grad():
        for _ in range(2):
            model(ids[:, :100], past_key_values=static)
            if graph is None:
                graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    step()
                torch.cuda.current_stream().wait_stream(side)
                with torch.cuda.graph(graph):
                    logits = step()
                static.reset()
                model(ids[:, :100], past_key_values=static)
            got = []
            for i in range(100, 250):
                token.copy_(ids[:, i : i + 1])
                place.fill_(i)
                graph.replay()
                got.append(logits.clone())
            assert torch.equal(torch.cat(got, 1), want)
            assert static.layers[0].kept.held == grown.layers[0].kept.held
            static.reset()


@pytest.mark.gpu
def test_generate_on_a_gpu():
    """generate over a static cache, which it leaves uncompiled on a GPU; bf16 products in another order may turn a near
    tie, so most tokens of random weights agree, and those of a cache that is lost would not.
    """
    model = make("llama", hidden_size=256, head_dim=64, initializer_range=0.06).to("cuda", torch.bfloat16)
    ids = some_tokens(2, 100).cuda()
    grown, static = both(model, KINDS[0])
    want = run(model, ids, grown, new=60)
    got = run(model, ids, static, new=60)
    same = (got[:, 100:] == want[:, 100:]).long().cumprod(1).sum(1)
    assert (same >= 10).all(), same.tolist()
    assert [h[2] for h in static.layers[0].kept.held] == [159, 159]
