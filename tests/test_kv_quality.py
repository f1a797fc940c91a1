"""The emulation of a decode over a 4-bit cache, by which perplexity is measured, against the cache itself."""

from __future__ import annotations

import pytest
import torch
from tiny import some_tokens, tiny_llama

import pyquant
from benchmarks.kv_quality import compare, emulate, in_pages


@pytest.mark.parametrize(("prompt", "window"), [(0, 0), (20, 0), (20, 33), (0, 100)])
def test_the_emulation_is_the_decode(prompt, window):
    model, ids = tiny_llama(max_position_embeddings=512), some_tokens(2, 300)
    cache = pyquant.KVCache(model.config, prompt_tokens=prompt, window=window)
    model.set_attn_implementation("pyquant")
    with torch.no_grad():
        parts = [model(ids[:, : max(prompt, 1)], past_key_values=cache).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(max(prompt, 1), 300)]
        plain = model(ids, use_cache=False).logits
        emulate(model, prompt, window)
        got = model(ids, use_cache=False).logits
        emulate(model, prompt, window + 64)
        other = model(ids, use_cache=False).logits
    want = torch.cat(parts, 1)
    error, cost, missed = ((t - want).norm(dim=-1) / want.norm(dim=-1) for t in (got, plain, other))
    # Rounding in fp32, and codes that lay on the edge between two and were moved by it.
    assert error.median() <= 1e-3 * cost[:, 200:].median()
    assert error.max() <= 0.2 * cost[:, 200:].median()
    assert missed.max() > error.max(), "a window of another size is told apart"
    assert cache.layers[0].kept.held[0][1] == (300 - prompt - window) // 64


def test_what_is_seen_in_pages():
    low = in_pages(200, 10, 30, "cpu")
    assert not low[:, :10].any()
    assert not low[102].any() and low[103].nonzero().flatten().tolist() == list(range(10, 74))
    assert int(low[199].sum()) == 128
    assert not (low & ~torch.ones(200, 200, dtype=torch.bool).tril()).any()


def test_compare():
    want = torch.arange(10).expand(2, 10)
    got = want.clone()
    got[0, 4] = 99
    assert compare(got, want) == {"equal": 0.95, "before": 7.0}
