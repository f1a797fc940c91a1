"""The container of one layer: however tokens come, they end in the same place; beams, crop, shared prompts, memory."""

from __future__ import annotations

import pytest
import torch
from kv4_cases import make_tokens, page_values

from pyquant.formats import kv4
from pyquant.nn import kv_cache
from pyquant.nn.kv_cache import KVLayer, KVSettings

SIZE = 64


def layer(settings=None, batch=2, dtype=torch.bfloat16, device="cpu"):
    return KVLayer(settings or KVSettings(prompt_tokens=20, window=70), batch, 2, SIZE, dtype, device)


def tokens(count, batch=2, dtype=torch.bfloat16):
    return make_tokens(batch, 2, count, SIZE, dtype, "cpu"), make_tokens(batch, 2, count, SIZE, dtype, "cpu")


def expected(k, v, kept, full):
    """The values of one sequence's tokens ``[Hkv, L, D]`` when ``full`` pages follow ``kept`` tokens, in k's dtype."""
    end = kept + 64 * full
    return [
        torch.cat([t[:, :kept].double(), page_values(t[:, kept:end], of_k), t[:, end:].double()], 1).to(t.dtype)
        for t, of_k in ((k, True), (v, False))
    ]


def check(cache, k, v):
    """The cache holds k, v ``[B, Hkv, L, D]``, of which ``padding`` on the left are none."""
    found = cache.values()
    assert cache.segments.tolist() == [list(s) for s in cache.held]
    for b, (kept, full, length) in enumerate(cache.held):
        own = [t[b, :, cache.padding[b] :] for t in (k, v)]
        assert own[0].shape[1] == length
        want = expected(*own, kept, full)
        for got, exact in zip(found, want, strict=True):
            assert torch.equal(got[b, :, cache.padding[b] :], exact)
            assert (got[b, :, : cache.padding[b]] == 0).all()
    return found


@pytest.mark.parametrize(
    "chunks", [(400,), (150, 250), (5,) + 79 * (5,), (300,) + 100 * (1,), (1,) + 57 * (7,), (90, 8, 302)]
)
def test_the_way_tokens_come_does_not_matter(chunks):
    k, v = tokens(400)
    cache = layer(KVSettings(prompt_tokens=1 if chunks[0] == 1 else 5, window=70))
    at = 0
    for count in chunks:
        cache.add(k[:, :, at : at + count], v[:, :, at : at + count])
        at += count
    check(cache, k[:, :, :at], v[:, :, :at])
    kept, full, length = cache.held[0]
    assert full == (length - kept - 70) // 64, "pages are packed as soon as window + 64 tokens are not"


@pytest.mark.parametrize(("asked", "kept"), [(0, 0), (17, 17), (1000, 200), (None, 200)])
def test_what_of_the_prompt_stays(asked, kept):
    k, v = tokens(300)
    cache = layer(KVSettings(prompt_tokens=asked, window=0))
    cache.add(k[:, :, :200], v[:, :, :200])
    for i in range(200, 300):
        cache.add(k[:, :, i : i + 1], v[:, :, i : i + 1])
    assert cache.held[0] == (kept, (300 - kept) // 64, 300)
    check(cache, k, v)


def test_long_prompts_are_packed_in_parts(monkeypatch):
    monkeypatch.setattr(kv_cache, "VALUES_AT_ONCE", 2 * 2 * 64 * SIZE * 2)  # two pages of all heads
    k, v = tokens(500)
    cache = layer(KVSettings(prompt_tokens=3, window=0))
    cache.add(k, v, padding=[0, 170])
    check(cache, k, v)
    assert [full for _, full, _ in cache.held] == [7, 5]


def test_16_bits_keep_everything():
    k, v = tokens(300)
    cache = layer(KVSettings(bits=16, prompt_tokens=10, window=16))
    for i in (0, *range(100, 200)):
        step = 100 if i == 0 else 1
        cache.add(k[:, :, i : i + step], v[:, :, i : i + step])
    cache.add(k[:, :, 200:], v[:, :, 200:])
    found = check(cache, k, v)
    assert torch.equal(found[0], k) and torch.equal(found[1], v)


@pytest.mark.parametrize("padding", [[0, 100, 149], [100, 149, 0], [7, 7, 7]])
def test_padding_is_not_kept(padding):
    k, v = tokens(200, batch=3)
    cache = layer(batch=3)
    cache.add(k[:, :, :150], v[:, :, :150], padding=padding)
    for i in range(150, 200):
        cache.add(k[:, :, i : i + 1], v[:, :, i : i + 1])
    check(cache, k, v)
    assert cache.length == 200
    assert [s[2] for s in cache.held] == [200 - p for p in padding]
    with pytest.raises(ValueError, match="padding can only come with the first tokens"):
        cache.add(k[:, :, :1], v[:, :, :1], padding=[1, 0, 0])


def test_attention_over_it():
    k, v = tokens(200, dtype=torch.float32)
    cache = layer(dtype=torch.float32)
    cache.add(k, v)
    q = torch.randn(2, 3, 4, SIZE)
    mask = torch.ones(3, 200, dtype=torch.bool).tril(197)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), *cache.values(), attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(cache.attend(q), want.transpose(1, 2), rtol=1e-5, atol=1e-5)  # fp32 in another order


def test_select_and_repeat():
    k, v = tokens(200, batch=3)
    cache = layer(batch=3)
    cache.add(k, v, padding=[0, 3, 5])
    for index in ([2, 2, 0, 1], [1, 0]):
        cache.select(torch.tensor(index))
        k, v = k[index], v[index]
        check(cache, k, v)
    cache.repeat(2)
    more = tokens(1, batch=4)
    cache.add(*more)
    check(cache, torch.cat([k.repeat_interleave(2, 0), more[0]], 2), torch.cat([v.repeat_interleave(2, 0), more[1]], 2))


def test_a_repeated_prompt_is_kept_once():
    k, v = tokens(300, batch=1)
    cache = layer(KVSettings(prompt_tokens=None), batch=1)
    cache.add(k, v)
    one = cache.nbytes
    cache.repeat(4)
    assert cache.prompt.shape[0] == 1
    assert cache.nbytes < one + 4 * cache.window[0].numel() * 2
    new_k, new_v = tokens(250, batch=4)
    cache.add(new_k, new_v)
    check(cache, torch.cat([k.expand(4, -1, -1, -1), new_k], 2), torch.cat([v.expand(4, -1, -1, -1), new_v], 2))
    cache.select(torch.tensor([3, 1]))
    check(
        cache,
        torch.cat([k.expand(2, -1, -1, -1), new_k[[3, 1]]], 2),
        torch.cat([v.expand(2, -1, -1, -1), new_v[[3, 1]]], 2),
    )


@pytest.mark.parametrize("cut", [1, 70, 71, 134, 135, 190, 290, 300])
def test_crop(cut):
    """Within the window tokens are as they were; from a page that is cut they come back as the page held them."""
    k, v = tokens(300)
    cache = layer()
    cache.add(k, v)
    before = cache.values()
    cache.crop(cut)
    assert cache.length == 300 - cut
    after = cache.values()
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :, : 300 - cut], new)
    more = tokens(200)
    cache.add(*more)
    assert torch.equal(cache.values()[0][:, :, -60:], more[0][:, :, -60:])
    assert cache.segments.tolist() == [list(s) for s in cache.held]


def test_crop_refuses():
    cache = layer()
    cache.add(*tokens(10))
    with pytest.raises(ValueError, match="cannot take 11 tokens off"):
        cache.crop(11)


def test_memory_is_what_the_format_says():
    """A long body: 4.375 bits a value at D = 128, plus prompt, window and spare room of at most an eighth."""
    cache = KVLayer(KVSettings(), 1, 1, 128, torch.bfloat16, "cpu")
    k = torch.zeros(1, 1, 1 << 17, 128, dtype=torch.bfloat16)
    cache.add(k, k)
    assert cache.nbytes <= 0.28 * 2 * k.untyped_storage().nbytes()
    assert kv4.page_bytes(128) * cache.held[0][1] < cache.nbytes


def test_capacity_is_allocated_once():
    cache = layer(KVSettings(capacity=640, prompt_tokens=0, window=64))
    k, v = tokens(600)
    where = None
    for i in range(0, 600, 8):
        cache.add(k[:, :, i : i + 8], v[:, :, i : i + 8])
        if where is None:
            where = [t.data_ptr() for t in (cache.pages, cache.window, cache.segments)]
    assert where == [t.data_ptr() for t in (cache.pages, cache.window, cache.segments)]
    check(cache, k, v)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bits": 5}, "bits=5 of a KV cache must be 2, 3, 4, 8, or 16"),
        ({"window": -1}, "window=-1 must not be negative"),
        ({"prompt_tokens": -5}, "prompt_tokens=-5 must not be negative"),
    ],
)
def test_settings_refuse(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        KVSettings(**settings)


def test_another_batch_is_refused():
    with pytest.raises(ValueError, match="the cache holds 2 sequences, keys came for 3"):
        layer().add(*tokens(1, batch=3))


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    """The same bits of pages, window and segments, and attention as close as 16-bit roundings."""
    k, v = tokens(400)
    made = []
    for device in ("cpu", "cuda"):
        cache = layer(device=device)
        cache.add(k[:, :, :200].to(device), v[:, :, :200].to(device))
        for i in range(200, 400, 4):
            cache.add(k[:, :, i : i + 4].to(device), v[:, :, i : i + 4].to(device))
        made.append(cache)
    cpu, gpu = made
    full = cpu.held[0][1]
    assert cpu.held == gpu.held
    assert torch.equal(cpu.pages[:, :, :full], gpu.pages[:, :, :full].cpu())
    assert torch.equal(cpu.window, gpu.window.cpu()) and torch.equal(cpu.prompt, gpu.prompt.cpu())
    q = torch.randn(2, 1, 8, SIZE).bfloat16()
    want, got = cpu.attend(q).float(), gpu.attend(q.cuda()).float().cpu()
    assert (got - want).norm() <= 2.0**-7 * want.norm()  # two results rounded to bf16, and probabilities
