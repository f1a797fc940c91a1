"""pyquant.KVCache under transformers: the same tokens as its own cache in 16 bits, and one answer however 4 bits are read."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from kv_models import logits_of, make, run
from tiny import byte_tokenizer, some_tokens, tiny_config

import pyquant
from pyquant.integrations import commands, inference, kv_cache
from pyquant.integrations.inference import prepare_for_inference


@pytest.fixture
def no_warning(caplog):
    caplog.set_level(logging.WARNING, logger="pyquant")
    yield
    assert not caplog.records, caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=["greedy", "beams", "two"]
)
def test_16_bits_give_the_tokens_of_transformers(family, how, no_warning):
    model, ids = make(family), some_tokens(2, 150)
    want = run(model, ids, None, attention="sdpa", **how)
    cache = pyquant.KVCache(model.config, bits=16, prompt_tokens=20, window=16)
    assert torch.equal(run(model, ids, cache, **how), want)
    assert cache.get_seq_length() == 189


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_4_bits_by_kernel_and_dequantized_agree(family, chunk, caplog):
    """The packed cache read by attention_kv4 and the same cache dequantized for torch's attention: rounding of fp32 apart."""
    model, ids = make(family), some_tokens(2, 300)
    settings = {"prompt_tokens": 10, "window": 32}
    caches = [pyquant.KVCache(model.config, **settings) for _ in range(2)]
    got = logits_of(model, ids, caches[0], "pyquant", 100, chunk)
    assert not caplog.records, caplog.text
    want = logits_of(model, ids, caches[1], "sdpa", 100, chunk)
    assert "the attention is 'sdpa'" in caplog.text
    with torch.no_grad():
        exact = model(ids).logits[:, 100:]
    assert caches[0].layers[0].kept.held == caches[1].layers[0].kept.held == [(10, (300 - 10 - 32) // 64, 300)] * 2
    # Rounding in fp32, and codes that lay on the edge between two and were moved by it.
    error, cost = ((got - t).norm(dim=-1) / t.norm(dim=-1) for t in (want, exact))
    assert error.median() <= 1e-3 * cost.median()
    assert error.max() <= 0.1 * cost.median()
    assert 1e-3 < cost.median() < 0.5


SLIDING = [
    ("mistral", {"sliding_window": 60}),
    ("qwen3", {"sliding_window": 50, "use_sliding_window": True, "max_window_layers": 1}),
    ("gpt-oss", {}),
]


@pytest.mark.parametrize(("family", "changes"), SLIDING, ids=[s[0] for s in SLIDING])
@pytest.mark.parametrize("static", [False, True])
def test_sliding_windows_and_sinks(family, changes, static, no_warning):
    """16 bits: the tokens of transformers over texts longer than the window, padding and all, through the op."""
    model, ids = make(family, **changes), some_tokens(2, 130)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    want = run(model, ids, None, attention="eager", attention_mask=mask)
    assert torch.equal(run(model, ids, None, attention="pyquant", attention_mask=mask), want), "without a KVCache"
    cache = pyquant.KVCache(model.config, bits=16, window=16, capacity=200 if static else 0, static=static)
    assert torch.equal(run(model, ids, cache, attention_mask=mask), want)


@pytest.mark.parametrize(("family", "changes"), SLIDING, ids=[s[0] for s in SLIDING])
@pytest.mark.parametrize("bits", [8, 3])
def test_sliding_windows_over_pages(family, changes, bits, no_warning):
    """By the op and dequantized for plain attention: the same logits."""
    model, ids = make(family, **changes), some_tokens(2, 260)
    settings = {"bits": bits, "prompt_tokens": 10, "window": 16}
    got = logits_of(model, ids, pyquant.KVCache(model.config, **settings), "pyquant", 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "_why_not", lambda *args, **kwargs: "the test compares with it")
        patch.setattr(kv_cache.KVCache, "warn", lambda *args: None)
        want = logits_of(model, ids, pyquant.KVCache(model.config, **settings), "pyquant", 100)
    error, size = ((t).norm(dim=-1) for t in (got - want, want))
    # Rounding in fp32, and codes that lay on the edge between two and were moved by it.
    assert (error / size).median() <= 1e-5
    assert (error / size).max() <= 0.02


def test_fewer_bits_cost_more(no_warning):
    """Logits against those of 16 bits: a bit less at least doubles the steps of a code; measured 2 to 2.5 times the error."""
    model, ids = make("llama"), some_tokens(2, 260)
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits[:, 200:]
    cost = {}
    for b in (8, 4, 3, 2):
        got = logits_of(model, ids, pyquant.KVCache(model.config, b, 0, 0), "pyquant", 100)[:, 100:]
        cost[b] = ((got - exact).norm() / exact.norm()).item()
    assert 10 * cost[8] < cost[4] and 1.5 * cost[4] < cost[3] and 1.5 * cost[3] < cost[2] < 1, cost


def test_left_padding_changes_nothing(no_warning):
    """Padding is not stored: a padded sequence gets the tokens that it gets alone, 4 bits and all."""
    model = make("llama")
    alone = [some_tokens(1, n, seed=n) for n in (140, 200, 77)]
    width = max(t.shape[1] for t in alone)
    ids = torch.cat([torch.nn.functional.pad(t, (width - t.shape[1], 0)) for t in alone])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(t), (width - t.shape[1], 0)) for t in alone])
    make_cache = lambda: pyquant.KVCache(model.config, prompt_tokens=20, window=16)  # noqa: E731
    got = run(model, ids, make_cache(), attention_mask=mask, new=80)
    for row, own in zip(got, alone, strict=True):
        assert torch.equal(row[width:], run(model, own, make_cache(), new=80)[0, own.shape[1] :])


def test_a_shared_prompt(no_warning):
    """A system prompt filled once for one sequence serves a batch, and each row is as if it had its own."""
    model = make("llama")
    system, users = some_tokens(1, 120, seed=5), some_tokens(3, 30, seed=6)
    cache = pyquant.KVCache(model.config, prompt_tokens=None, window=16)
    model.set_attn_implementation("pyquant")
    with torch.no_grad():
        model(system, past_key_values=cache)
    kept = copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    assert cache.layers[0].kept.prompt.shape[0] == 1
    ids = torch.cat([system.expand(3, -1), users], 1)
    got = run(model, ids, cache, new=60)
    for row in range(3):
        assert torch.equal(got[row], run(model, ids[row : row + 1], copy.deepcopy(kept), new=60)[0])


def test_assisted_decoding_crops(no_warning):
    """Proposals of the prompt's own n-grams, most of them refused and cropped away: greedy tokens all the same."""
    model = make("llama")
    ids = some_tokens(1, 30).repeat(1, 4)
    want = run(model, ids, None, attention="sdpa", new=50)
    cache = pyquant.KVCache(model.config, bits=16, window=16)
    assert torch.equal(run(model, ids, cache, new=50, prompt_lookup_num_tokens=5), want)


def test_bytes_are_counted():
    model, ids = make("llama", hidden_size=512), some_tokens(1, 500)
    small, full = (pyquant.KVCache(model.config, bits=bits, prompt_tokens=0, window=0) for bits in (4, 16))
    for cache in (small, full):
        run(model, ids, cache, new=2)
    assert small.nbytes < 0.5 * full.nbytes


# ------------------------------------------------------------------------------------------------ what falls back


@pytest.mark.parametrize(
    ("family", "changes", "how", "sentence"),
    [
        ("llama", {"head_dim": 24}, {}, "heads of 24 and 24 channels have no 4-bit format"),
        ("llama", {}, {"output_attentions": True, "return_dict_in_generate": True}, "attention weights are asked for"),
        ("llama", {}, {"hole": 40}, "the attention mask is not that of the first call's padding"),
    ],
)
def test_falls_back_once_and_is_right(family, changes, how, sentence, caplog):
    """bits=16, so that transformers' own cache is the measure; one line names the reason."""
    model, ids = make(family, **changes), some_tokens(2, 100)
    mask, how = torch.ones_like(ids), dict(how)
    if "hole" in how:
        mask[1, how.pop("hole")] = 0
    want = run(model, ids, None, attention="eager" if how else "sdpa", attention_mask=mask, **how)
    cache = pyquant.KVCache(model.config, bits=16, window=16)
    got = run(model, ids, cache, attention_mask=mask, **how)
    if how:
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(got.attentions[-1][-1], want.attentions[-1][-1], rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(got, want)
    assert caplog.text.count(sentence) == 1, caplog.text
    assert len(caplog.records) == 1


def test_prepared_models_leave_it_to_transformers(caplog):
    model, ids = make("llama"), some_tokens(2, 100)
    want = run(model, ids, pyquant.KVCache(model.config, window=16))
    prepare_for_inference(model)
    assert torch.equal(run(model, ids, pyquant.KVCache(model.config, window=16)), want)
    assert "past_key_values is given" in caplog.text


@pytest.mark.parametrize(
    ("family", "kept", "bits", "changes"),
    [
        ("llama", 24, 4, {}),
        ("qwen3", None, 3, {}),
        ("mistral", 24, 2, {}),
        ("mistral", None, 4, {"sliding_window": 64}),
        ("llama", None, 8, {}),
    ],
)
def test_prepared_models_with_few_bits(family, kept, bits, changes, no_warning, no_fallback):
    """The fused decode step over the same cache: the tokens of transformers' loop over a KVCache, padding and all."""
    model = make(family, **changes)
    calls = [(some_tokens(2, n, seed=n), torch.ones(2, n, dtype=torch.int64)) for n in (150, 90)]
    calls[1][1][0, :20] = 0
    wants = []
    for ids, mask in calls:
        cache = pyquant.KVCache(model.config, bits, prompt_tokens=kept, window=16)
        wants.append(run(model, ids, cache, attention_mask=mask, new=150))
    prepare_for_inference(model, kv_bits=bits, kv_prompt_tokens=kept, kv_window=16)
    for (ids, mask), want in (*zip(calls, wants, strict=True), (calls[0], wants[0])):
        assert torch.equal(run(model, ids, None, attention="sdpa", attention_mask=mask, new=150), want)


def test_prepared_models_refuse_other_bits():
    with pytest.raises(ValueError, match="bits=5 of a KV cache must be 2, 3, 4, 8, or 16"):
        prepare_for_inference(make("llama"), kv_bits=5)


def test_without_our_cache_it_is_torchs_attention():
    model, ids = make("llama"), some_tokens(2, 50)
    assert torch.equal(run(model, ids, None, attention="pyquant"), run(model, ids, None, attention="sdpa"))


def test_refusals():
    model = make("llama")
    with pytest.raises(ValueError, match="bits=5 of a KV cache must be 2, 3, 4, 8, or 16"):
        pyquant.KVCache(model.config, bits=5)
    config = tiny_config()
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="this model has linear_attention"):
        pyquant.KVCache(config)
    cache = pyquant.KVCache(model.config)
    with pytest.raises(ValueError, match="give the tokens to remove as a negative number"):
        cache.crop(5)


def test_masks_of_sliding_windows():
    """Each row the newest three; where padding ends is told by the first call, later masks are held against it."""
    column, row = torch.arange(8), torch.arange(8)[:, None]
    band = (column <= row) & (column > row - 3)
    first = torch.stack([band, band & (column >= 2)])[:, None]
    assert kv_cache.left_padding(first, 3) == [0, 2]
    late = first[:, :, 6:].clone()
    assert kv_cache.left_padding(late, 3, [0, 2]) == [0, 2]
    assert kv_cache.left_padding(late.clone(), 4, [0, 2]) is None, "another window"
    assert kv_cache.left_padding(first.clone(), 3, [0, 0]) is None, "other padding"
    assert kv_cache.left_padding(first.clone()) is None, "no window"


def test_masks():
    causal = torch.ones(4, 6, dtype=torch.bool).tril(2)
    masks = torch.stack([causal, causal & (torch.arange(6) >= 2)])[:, None]
    assert kv_cache.left_padding(masks) == [0, 2]
    hole = masks.clone()
    hole[0, 0, :, 3] = False
    assert kv_cache.left_padding(hole) is None
    assert kv_cache.left_padding(torch.zeros(2, 1, 4, 6)) is None
    assert kv_cache.left_padding(masks) == [0, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8, 3])
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 100}), ("gpt-oss", {})]
)
def test_on_a_gpu(family, changes, bits, no_warning):
    """bf16, heads of 64: logits by the kernels as close to fp32's of the CPU as 16 bits allow; windows and sinks too."""
    model = make(family, hidden_size=256, head_dim=64, initializer_range=0.06, **changes)
    ids = some_tokens(2, 300)
    settings = {"bits": bits, "prompt_tokens": 10, "window": 32}
    want = logits_of(model, ids, pyquant.KVCache(model.config, **settings), "pyquant", 100)
    model.to("cuda", torch.bfloat16)
    got = logits_of(model, ids.cuda(), pyquant.KVCache(model.config, **settings), "pyquant", 100)
    error = (got.float().cpu() - want).norm() / want.norm()
    assert error <= 0.12  # activations rounded to bf16 in two layers: 0.015 to 0.084 in plain torch on a CPU


@pytest.mark.parametrize(
    ("given", "want"),
    [((4, "all", 64), (4, None, 64)), ((4, "none", 0), (4, 0, 0)), ((16, "7", 128), (16, 7, 128))],
)
def test_the_command_lines_settings(given, want):
    settings = commands.kv_settings(*given)
    assert (settings.bits, settings.prompt_tokens, settings.window) == want


def test_the_command_line_refuses():
    for given, sentence in (
        ((4, "some", 8), "--kv-prompt 'some' must be a number"),
        ((5, "all", 8), "bits=5 of a KV cache"),
    ):
        with pytest.raises(ValueError, match=sentence):
            commands.kv_settings(*given)


def test_generate_with_a_cache(no_warning):
    """Through the function behind the command, 4 bits, pages and all."""
    model, tokenizer = make("llama"), byte_tokenizer()
    text = commands.generate(model, tokenizer, "once upon a time " * 10, 90, 0.0, kv=commands.kv_settings(4, "8", 16))
    assert text.startswith("once upon a time ")


@pytest.mark.gpu
@pytest.mark.parametrize(("kept", "bits"), [(24, 4), (None, 4), (24, 8), (24, 3), (None, 2)])
def test_prepared_on_a_gpu(kept, bits, no_warning, no_fallback):
    """The captured graph over the cache, used twice and with padding, against the same chain of ops without a graph.

    Both run the same kernels on the same numbers, so tokens are equal.
    """
    model = make("llama", hidden_size=256, head_dim=64, initializer_range=0.06).to("cuda", torch.bfloat16)
    prepare_for_inference(model, kv_bits=bits, kv_prompt_tokens=kept, kv_window=16)
    calls = [(some_tokens(2, n, seed=n).cuda(), torch.ones(2, n, dtype=torch.int64, device="cuda")) for n in (150, 90)]
    calls[1][1][0, :20] = 0
    first = [run(model, ids, None, attention="sdpa", attention_mask=mask, new=150) for ids, mask in calls]
    again = [run(model, ids, None, attention="sdpa", attention_mask=mask, new=150) for ids, mask in calls]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "Captured", lambda step, device: step)
        prepare_for_inference(inference.undo(model), kv_bits=bits, kv_prompt_tokens=kept, kv_window=16)
        plain = [run(model, ids, None, attention="sdpa", attention_mask=mask, new=150) for ids, mask in calls]
    for a, b, c in zip(first, again, plain, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
