"""Attention over a cache in mixed precision: format, reference and kernel against fp64, with faults that must be noticed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from kv4_cases import (
    FAULTY_CASE,
    KV4_CASES,
    KV4_FAULTS,
    KV4_MORE,
    OLD_CASE,
    OPTION_FAULTS,
    OPTIONS_CASE,
    attend,
    make_case,
    make_tokens,
    page_values,
    want_kv4,
    without_old,
)

from cases import RESULT_FAULTS, mismatch
from pyquant import ops
from pyquant.formats import kv4
from pyquant.ops import _registry

pytestmark = pytest.mark.usefixtures("poison")

HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
FLOATS = [*HALVES, pytest.param(torch.float32, id="fp32")]
CASES = [pytest.param(c, id=str(c), marks=[pytest.mark.small] if c.batch <= 2 else []) for c in (*KV4_CASES, *KV4_MORE)]


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="torch-cpu"),
        pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
        pytest.param(("cuda", "cuda"), id="cuda-cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request, monkeypatch):
    """(backend, device), pinned."""
    name, device = request.param
    if why := _registry.unavailable(name, device):
        pytest.skip(why)
    monkeypatch.setenv("PYQUANT_BACKEND", name)
    return request.param


def kernels_skip(backend, dtype):
    if backend[0] == "cuda" and dtype == torch.float32:
        pytest.skip("the kernels are for 16-bit values; fp32 runs in torch")


# ------------------------------------------------------------------------------------------------ the format


@pytest.mark.parametrize("bits", kv4.BITS)
@pytest.mark.parametrize("size", [16, *kv4.HEAD_SIZES])
def test_tiles_and_pages_give_back_what_they_hold(size, bits):
    k, v = (make_tokens(2, 3, 128, size, torch.bfloat16, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(kv4.unpack_tiles(kv4.pack_tiles(k, v), size), (k, v), strict=True))
    pages = kv4.pack_pages(k, v, bits)
    assert pages.shape == (2, 3, 2, kv4.page_bytes(size, bits))
    got = kv4.unpack_pages(pages, size)
    assert torch.equal(got[0].double(), page_values(k, True, bits)), (
        "differences of codes times fp16 scales are exact in fp32"
    )
    assert torch.equal(got[1].double(), page_values(v, False, bits))


def _numbers(bits, planes, b, r):
    """Codes ``[..., 2 halves]`` of register r, block b, as fp16 numbers less their offset, from the words of each plane."""
    if bits == 8:
        word = planes[0][..., r // 2]
        halves = torch.stack([word >> (16 * (r % 2)) & 0xFF, word >> (16 * (r % 2) + 8) & 0xFF], -1) | 0x6400
        return halves.short().view(torch.float16).float() - 1024
    turned = lambda word, by: ((word >> by) | (word << (32 - by))) & 0xFFFFFFFF  # noqa: E731
    if bits == 4:
        turn, mask, by = 8 * (r % 2), (0x03C0, 0x003C)[r // 2], (16, 256)[r // 2]
    else:
        turn, mask, by = 8 * (b % 2) + 4 * (r % 2), (0x0180, 0x0060)[r // 2], (8, 32)[r // 2]
    pair = turned(planes[0], turn) & (mask * 0x10001)
    if bits == 3:
        pair |= turned(planes[1], turn + b // 2) & ((0x0200, 0x0080)[r // 2] * 0x10001)
    pair |= 0x3C003C00
    return (torch.stack([pair & 0xFFFF, pair >> 16], -1).short().view(torch.float16).float() - 1) * by


@pytest.mark.parametrize("bits", kv4.BITS)
@pytest.mark.parametrize("size", kv4.HEAD_SIZES)
def test_words_are_what_the_kernels_take_apart(size, bits):
    """Decoded as csrc/kv4_codes.cuh does, by masks and turns, and placed by the picture of a fragment."""
    codes = torch.randint(0, 2**bits, (kv4.PAGE, size), dtype=torch.uint8)
    lane, half = torch.meshgrid(torch.arange(32), torch.arange(2), indexing="ij")
    pieces, group = size // 16, 2 if bits == 8 else 4
    for of_k in (True, False):
        words = kv4.pack_codes(codes, bits, of_k).view(torch.int32).long() & 0xFFFFFFFF
        lower = words[: 4 * size] if bits == 3 else words  # two planes: 2 bits, then 1
        for b, piece, r in itertools.product(range(4), range(pieces), range(4)):
            first = piece // group * group
            count = min(group, pieces - first)
            at = first * 32 + torch.arange(32) * count + piece - first
            if bits == 8:
                planes = [words.view(4, -1, 2)[b, at]]
            else:
                planes = [lower.view({4: 4, 3: 2, 2: 2}[bits], -1)[b // (1 if bits == 4 else 2), at]]
            if bits == 3:
                planes.append(words[4 * size :][at])
            row, column = lane // 4 + 8 * (r % 2), 2 * (lane % 4) + half + 8 * (r // 2)
            token, channel = (row, column) if of_k else (column, row)
            want = codes[16 * b + token, 16 * piece + channel].float()
            assert torch.equal(_numbers(bits, planes, b, r), want), (b, piece, r)


@pytest.mark.parametrize("bits", kv4.BITS)
def test_a_page_errs_by_half_a_step(bits):
    """One scale and zero a channel of K: half a step of the range, and an eighth of a step for zeros on a grid of 1/4."""
    k = make_tokens(1, 1, 64, 64, torch.float32, "cpu")
    step = (k.amax(-2) - k.amin(-2)) / (2**bits - 1)
    got, _ = kv4.unpack_pages(kv4.pack_pages(k, k, bits), 64)
    most = 0.64 if bits < 8 else 0.64 + 2**bits * 2.0**-11  # 1/2 + 1/8, and the rounding of the scale to fp16
    assert ((got - k).abs().amax(-2) <= most * step).all()
    assert ((got - k).abs().amax(-2) > 0.3 * step).float().mean() > 0.9, f"{bits} bits cannot be better than that"


@pytest.mark.parametrize("bits", kv4.BITS)
def test_pages_take_what_is_hard(bits):
    """All-equal channels, one large outlier, values far from zero: finite, and as close as the scales allow."""
    k = torch.zeros(1, 1, 64, 64)
    k[..., 1], k[..., 2], k[..., 3] = 7.0, 1000.0, torch.linspace(500, 501, 64)
    k[0, 0, 5, 4] = 3e4
    got, v = kv4.unpack_pages(kv4.pack_pages(k, k / 1000, bits), 64)
    assert got.isfinite().all() and v.isfinite().all()
    size, reach = k.abs().amax(-2), 1023 if bits == 8 else 240
    steps = (k.amax(-2) - k.amin(-2)) / (2**bits - 1)
    assert ((got - k).abs().amax(-2) <= size / reach + steps * 0.78 + 1e-4).all()


@pytest.mark.parametrize("bits", kv4.BITS)
def test_zeros_lose_nothing_in_fp16(bits):
    """What kernels fold: the offset and the zero, and a code minus its zero, are fp16 numbers at the ends of the range too."""
    k = torch.stack(
        [torch.full((64,), 1.0), torch.linspace(-9, -8.9, 64), torch.linspace(5, 80, 64), torch.zeros(64)], -1
    )
    _, _, (_, zero, _, v_zero) = kv4.quantize_page(k.repeat(1, 16), -k.repeat(1, 16), bits)
    for z in (zero.double(), v_zero.double()):
        for offset in (1024,) if bits == 8 else (16, 256) if bits == 4 else (8, 32):
            assert torch.equal((offset + z).half().double(), offset + z)
        for code in (0, 2**bits - 1):
            assert torch.equal((code - z).half().double(), code - z)


def test_bits_are_reported_with_scales():
    assert kv4.bits_per_value(128) == 8 * (64 * 128 * 2 * 0.5 + 4 * 128 + 4 * 64) / (64 * 128 * 2) == 4.375
    for bits in kv4.BITS:
        pages = kv4.pack_pages(*torch.randn(2, 64, 128), bits)
        assert 8 * pages.numel() / (2 * 64 * 128) == kv4.bits_per_value(128, bits) == bits + 0.375
        assert kv4.bits_of(pages.shape[-1], 128) == bits
    assert kv4.bits_of(kv4.page_bytes(128) + 1, 128) == 0
    with pytest.raises(ValueError, match="pages of 5 bits: there are those of 2, 3, 4, 8"):
        kv4.page_bytes(128, 5)
    with pytest.raises(ValueError, match="8961 bytes are no page of head size 128"):
        kv4.unpack_pages(torch.zeros(1, 8961, dtype=torch.uint8), 128)


# ------------------------------------------------------------------------------------------------ attention


def check_attention(backend, case, dtype):
    q, cache = make_case(case, dtype, backend[1])
    out, lse = attend(q, cache, case)
    want, want_lse = want_kv4(q, cache, case, dtype, backend[0] == "cuda")
    assert out.is_contiguous() and lse.dtype == torch.float32
    assert mismatch(out, want) is None
    assert mismatch(lse, want_lse) is None
    return q, cache, out, want


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
def test_attention(backend, case, dtype):
    kernels_skip(backend, dtype)
    _, _, out, want = check_attention(backend, case, dtype)
    for name, fault in RESULT_FAULTS.items():
        assert mismatch(fault(out), want), f"the comparison missed {name}"


@pytest.mark.small
@pytest.mark.parametrize("fault", KV4_FAULTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_attention_notices(backend, dtype, fault):
    q, cache, _, want = check_attention(backend, FAULTY_CASE, dtype)
    out, _ = ops.attention_kv4(q, *KV4_FAULTS[fault](cache).parts())
    assert mismatch(out, want), f"the comparison missed: {fault}"


@pytest.mark.small
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("fault", ["keys of two pages swapped", "scale of a channel's neighbour", "nibbles swapped"])
def test_attention_notices_in_other_bits(backend, bits, fault):
    case = replace(FAULTY_CASE, bits=bits)
    q, cache, _, want = check_attention(backend, case, torch.float16)
    assert mismatch(attend(q, KV4_FAULTS[fault](cache), case)[0], want), f"the comparison missed: {fault}"


@pytest.mark.small
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fault", OPTION_FAULTS)
def test_attention_notices_options(backend, fault, dtype):
    """The window is off by one, the sinks are others: the comparison sees it."""
    q, cache, _, want = check_attention(backend, OPTIONS_CASE, dtype)
    out, _ = attend(q, cache, OPTIONS_CASE, **OPTION_FAULTS[fault](cache))
    assert mismatch(out, want), f"the comparison missed: {fault}"


@pytest.mark.small
def test_what_lies_before_the_sliding_window_is_not_read(backend):
    """Pages and tiles that no query sees may hold anything, NaN scales too."""
    if backend[0] == "torch":
        pytest.skip("plain torch computes all scores and then hides them")
    q, cache = make_case(OLD_CASE, torch.float16, backend[1])
    want, got = attend(q, cache, OLD_CASE), attend(q, without_old(cache), OLD_CASE)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sinks_are_a_token_with_value_zero():
    """gpt-oss's definition: softmax over the scores and one more logit, which is then dropped."""
    case = replace(OPTIONS_CASE, sliding=0)
    q, cache = make_case(case, torch.float32, "cpu")
    out, lse = attend(q, cache, case)
    for b in range(2):
        k, v = (t[b].float().repeat_interleave(2, 0) for t in (cache.k, cache.v))
        logits = torch.einsum("thd,hld->thl", q[b], k) * 64**-0.5
        all_of_them = torch.cat([logits, cache.sinks.view(1, 4, 1)], -1)
        want = torch.einsum("thl,hld->thd", all_of_them.softmax(-1)[..., :-1], v)
        torch.testing.assert_close(out[b], want, rtol=1e-5, atol=1e-5)  # fp32 in another order
        torch.testing.assert_close(lse[b], all_of_them.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_equals_plain_attention_without_pages():
    """16-bit segments alone are ordinary causal attention."""
    case = replace(KV4_CASES[4], segments=((128, 0, 64), (0, 0, 30)))
    q, cache = make_case(case, torch.float32, "cpu")
    out, _ = ops.attention_kv4(q, *cache.parts())
    for b in range(2):
        k, v = cache.k[b].float(), cache.v[b].float()
        mask = torch.ones(8, k.shape[1]).tril(k.shape[1] - 8).bool()
        want = torch.nn.functional.scaled_dot_product_attention(
            q[b].transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(out[b].transpose(0, 1)[None], want, rtol=1e-5, atol=1e-5)  # fp32 in another order


def test_strided_queries_and_an_empty_sequence(backend):
    q, cache = make_case(FAULTY_CASE, torch.float16, backend[1])
    want, _ = ops.attention_kv4(q, *cache.parts())
    wide = torch.randn(2, 4, 1, 65, device=backend[1]).half()[..., :64].transpose(1, 2).copy_(q)
    assert torch.equal(ops.attention_kv4(wide, *cache.parts())[0], want)
    segments = cache.segments.clone()
    segments[0] = 0
    out, lse = ops.attention_kv4(q, *cache.parts()[:3], segments)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert (
        mismatch(out[1:], want_kv4(q[1:], replace(cache, k=cache.k[1:], v=cache.v[1:]), FAULTY_CASE, q.dtype, True)[0])
        is None
    )
    assert ops.attention_kv4(q[:, :0], *cache.parts())[0].shape == (2, 0, 4, 64)


Q, CACHE = make_case(FAULTY_CASE, torch.float16, "cpu")
ARGUMENTS = dict(zip(("q", "prompt", "pages", "window", "segments"), (Q, *CACHE.parts()), strict=True))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"q": Q[0]}, r"q must be \[B, T, Hq, D\], got shape \(1, 4, 64\)"),
        ({"q": Q.int()}, "q must be bfloat16, float16 or float32, not torch.int32"),
        ({"q": Q[:, :, :3]}, "3 query heads do not divide over 2 KV heads"),
        ({"q": Q.bfloat16()}, "prompt must be torch.bfloat16, not torch.float16"),
        ({"q": Q[..., :40]}, "head size 40 must be a multiple of 16"),
        (
            {"pages": CACHE.pages[..., :-2]},
            r"pages must be \[2, 2, n, 2560 or 3584 or 4608 or 8704\] for head size 64, got \(2, 2, 3, 4606\)",
        ),
        ({"pages": CACHE.pages.int()}, "pages must be torch.uint8, not torch.int32"),
        ({"window": CACHE.window[:, :, :0]}, "the window's ring has no tiles"),
        ({"window": CACHE.window.transpose(1, 2).contiguous().transpose(1, 2)}, "window must be contiguous"),
        ({"prompt": CACHE.prompt.repeat(2, 1, 1, 1)}, r"prompt must be \[1 or 2, 2, n, 2048\]"),
        ({"segments": CACHE.segments.long()}, r"segments must be contiguous int32 \[2, 3\], got torch.int64"),
        ({"segments": CACHE.segments.to("meta")}, "segments is on meta, the first argument on cpu"),
        ({"segments": CACHE.segments + 1000}, r"segments of sequence 0 \(prompt 1017, pages 1002, length"),
        ({"sliding_window": -1}, r"sliding_window=-1 must be 0 \(none\) or positive"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\], one a query head, got \(3,\)"),
        ({"sinks": torch.zeros(4).int()}, "sinks must be bfloat16, float16 or float32, not torch.int32"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta, the first argument on cpu"),
        ({"softcap": -1.0}, r"softcap=-1.0 must be 0 \(none\) or positive"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_attention_refuses(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.attention_kv4(**{**ARGUMENTS, **changes})


def test_no_gradient():
    with pytest.raises(ValueError, match="attention_kv4: has no gradient"):
        ops.attention_kv4(Q.clone().requires_grad_(), *CACHE.parts())
    with torch.no_grad():
        ops.attention_kv4(Q.clone().requires_grad_(), *CACHE.parts())
