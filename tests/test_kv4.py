"""Attention over a cache in mixed precision: format, reference and kernel against fp64, with faults that must be noticed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from kv4_cases import FAULTY_CASE, KV4_CASES, KV4_FAULTS, make_case, make_tokens, page_values, want_kv4

from cases import RESULT_FAULTS, mismatch
from pyquant import ops
from pyquant.formats import kv4
from pyquant.ops import _registry

pytestmark = pytest.mark.usefixtures("poison")

HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
FLOATS = [*HALVES, pytest.param(torch.float32, id="fp32")]
CASES = [pytest.param(c, id=str(c), marks=[pytest.mark.small] if c.batch <= 2 else []) for c in KV4_CASES]


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


@pytest.mark.parametrize("size", [16, *kv4.HEAD_SIZES])
def test_tiles_and_pages_give_back_what_they_hold(size):
    k, v = (make_tokens(2, 3, 128, size, torch.bfloat16, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(kv4.unpack_tiles(kv4.pack_tiles(k, v), size), (k, v), strict=True))
    pages = kv4.pack_pages(k, v)
    assert pages.shape == (2, 3, 2, kv4.page_bytes(size))
    got = kv4.unpack_pages(pages, size)
    assert torch.equal(got[0].double(), page_values(k, True)), (
        "differences of codes times fp16 scales are exact in fp32"
    )
    assert torch.equal(got[1].double(), page_values(v, False))


@pytest.mark.parametrize("size", kv4.HEAD_SIZES)
def test_words_are_what_the_kernels_take_apart(size):
    """Decoded as csrc/attention_kv4.cu does, by masks and a turn of 8, and placed by the picture of a fragment."""
    codes = torch.randint(0, 16, (kv4.PAGE, size), dtype=torch.uint8)
    lane, register, half = torch.meshgrid(torch.arange(32), torch.arange(4), torch.arange(2), indexing="ij")
    row, column = lane // 4 + 8 * (register % 2), 2 * (lane % 4) + half + 8 * (register // 2)
    for which, order in enumerate(kv4._page_order(size)):
        words = kv4.pack_codes(codes, order).view(torch.int32).long() & 0xFFFFFFFF
        turned = (words >> 8 | words << 24) & 0xFFFFFFFF
        fields = [words & 0x03C003C0, turned & 0x03C003C0, words & 0x003C003C, turned & 0x003C003C]
        pairs = torch.stack(fields, -1) | 0x3C003C00
        halves = torch.stack([pairs & 0xFFFF, pairs >> 16], -1).short().view(torch.float16).float()
        got = (halves - 1) * torch.tensor([16.0, 16.0, 256.0, 256.0]).view(4, 1)  # [words, 4, 2]
        at = 0
        for block, first in itertools.product(range(4), range(0, size // 16, 4)):
            count = min(4, size // 16 - first)
            mine = got[at : at + 32 * count].view(32, count, 4, 2)
            for piece in range(count):
                token, channel = (row, column) if which == 0 else (column, row)
                assert torch.equal(mine[:, piece], codes[16 * block + token, 16 * (first + piece) + channel].float())
            at += 32 * count
        assert at == len(words)


def test_a_page_errs_by_half_a_step():
    """One scale and zero a channel of K: half a step of range / 15, and an eighth of a step for zeros on a grid of 1/4."""
    k = make_tokens(1, 1, 64, 64, torch.float32, "cpu")
    step = (k.amax(-2) - k.amin(-2)) / 15
    got, _ = kv4.unpack_pages(kv4.pack_pages(k, k), 64)
    assert ((got - k).abs().amax(-2) <= 0.64 * step).all()  # 1/2 + 1/8, and the rounding of the scale to fp16
    assert ((got - k).abs().amax(-2) > 0.3 * step).float().mean() > 0.9, "4 bits cannot be better than that"


def test_pages_take_what_is_hard():
    """All-equal channels, one large outlier, values far from zero: finite, and as close as the scales allow."""
    k = torch.zeros(1, 1, 64, 64)
    k[..., 1], k[..., 2], k[..., 3] = 7.0, 1000.0, torch.linspace(500, 501, 64)
    k[0, 0, 5, 4] = 3e4
    got, v = kv4.unpack_pages(kv4.pack_pages(k, k / 1000), 64)
    assert got.isfinite().all() and v.isfinite().all()
    size = k.abs().amax(-2)
    assert ((got - k).abs().amax(-2) <= size / 240 + (k.amax(-2) - k.amin(-2)) / 15 * 0.64 + 1e-4).all()


def test_bits_are_reported_with_scales():
    assert kv4.bits_per_value(128) == 8 * (64 * 128 * 2 * 0.5 + 4 * 128 + 4 * 64) / (64 * 128 * 2) == 4.375


# ------------------------------------------------------------------------------------------------ attention


def check_attention(backend, case, dtype):
    q, cache = make_case(case, dtype, backend[1])
    out, lse = ops.attention_kv4(q, *cache.parts(), softcap=case.softcap)
    want, want_lse = want_kv4(q, cache, case.softcap, dtype, backend[0] == "cuda")
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
        mismatch(out[1:], want_kv4(q[1:], replace(cache, k=cache.k[1:], v=cache.v[1:]), 0.0, q.dtype, True)[0]) is None
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
        ({"pages": CACHE.pages[..., :-2]}, r"pages must be \[2, 2, n, 4608\] for head size 64, got \(2, 2, 3, 4606\)"),
        ({"pages": CACHE.pages.int()}, "pages must be torch.uint8, not torch.int32"),
        ({"window": CACHE.window[:, :, :0]}, "the window's ring has no tiles"),
        ({"window": CACHE.window.transpose(1, 2).contiguous().transpose(1, 2)}, "window must be contiguous"),
        ({"prompt": CACHE.prompt.repeat(2, 1, 1, 1)}, r"prompt must be \[1 or 2, 2, n, 2048\]"),
        ({"segments": CACHE.segments.long()}, r"segments must be contiguous int32 \[2, 3\], got torch.int64"),
        ({"segments": CACHE.segments.to("meta")}, "segments is on meta, the first argument on cpu"),
        ({"segments": CACHE.segments + 1000}, r"segments of sequence 0 \(prompt 1017, pages 1002, length"),
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
