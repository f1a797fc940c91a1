"""The emulation of a decode over a 4-bit cache, by which perplexity is measured, against the cache itself."""

from __future__ import annotations

import pytest
import torch
from tiny import shared, some_tokens, tiny_llama

import pyquant
from benchmarks.kv_quality import LENGTH, MODEL, NEW, PROMPT, TEXTS, compare, emulate, greedy, in_pages
from pyquant.integrations.data import load_text, windows
from pyquant.integrations.transformers import load_causal_lm


@pytest.mark.parametrize(("bits", "prompt", "window"), [(4, 0, 0), (8, 20, 0), (3, 20, 33), (2, 0, 100)])
def test_the_emulation_is_the_decode(bits, prompt, window):
    model, ids = tiny_llama(max_position_embeddings=512), some_tokens(2, 300)
    cache = pyquant.KVCache(model.config, bits, prompt, window)
    model.set_attn_implementation("pyquant")
    with torch.no_grad():
        parts = [model(ids[:, : max(prompt, 1)], past_key_values=cache).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(max(prompt, 1), 300)]
        plain = model(ids, use_cache=False).logits
        emulate(model, prompt, window, bits)
        got = model(ids, use_cache=False).logits
        emulate(model, prompt, window + 64, bits)
        other = model(ids, use_cache=False).logits
    want = torch.cat(parts, 1)
    error, cost, missed = ((t - want).norm(dim=-1) / want.norm(dim=-1) for t in (got, plain, other))
    # Rounding in fp32, and codes that lay on the edge between two and were moved by it: the more levels, the more edges.
    assert error.median() <= 3e-3 * cost[:, 200:].median()
    assert error.max() <= (0.5 if bits == 8 else 0.2) * cost[:, 200:].median()
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


def first_differences(got, want):
    """Where each text leaves the other, -1 where it does not."""
    return [int((g != w).nonzero()[0]) if (g != w).any() else -1 for g, w in zip(got, want, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_give_the_greedy_tokens_of_16(dtype):
    """The trained model, 200 tokens on 20 prompts, through generate: the same tokens.

    In bf16, logits from 16 to 32 are multiples of 1/8, so that a text may also leave the other where its two likeliest tokens
    lie within two such steps, and only there.
    """
    folder, (file, skip) = shared("models", MODEL), TEXTS["books"]
    model, tokenizer = load_causal_lm(str(folder), dtype, "cuda")
    text = load_text(str(shared("data", *file.split("/"))), skip_chars=skip)
    ids = windows(tokenizer, text, LENGTH, 20, "books")[:, :PROMPT].cuda()
    want, got = greedy(model, ids, NEW, bits=16), greedy(model, ids, NEW, bits=8)
    rough = greedy(model, ids, NEW, bits=2, prompt_tokens=0, window=0)
    assert (got != want).sum() < 0.2 * (rough != want).sum(), "2 bits are told apart"
    model.set_attn_implementation("sdpa")
    for row, at in enumerate(first_differences(got, want)):
        if at < 0:
            continue
        assert dtype == torch.bfloat16, f"prompt {row} leaves the text of 16 bits at token {at}"
        with torch.no_grad():
            logits = model(torch.cat([ids[row], want[row, :at]])[None]).logits[0, -1].float()
        gap = (logits.max() - logits[got[row, at]]).item()
        assert gap <= 0.25, f"prompt {row}, token {at}: the other token lies {gap} behind"
