"""append_kv4: window and pages against the tokens that went in, bit by bit."""

from __future__ import annotations

import pytest
import torch
from kv4_cases import make_tokens
from test_kv4 import FLOATS, backend, kernels_skip  # noqa: F401 (a fixture)

from pyquant import ops
from pyquant.formats import kv4

pytestmark = pytest.mark.usefixtures("poison")


# head size, tokens that stay, tokens at once, bits, whether keys come unrotated
APPENDS = [
    (64, 128, 1, 4, False),
    (80, 64, 3, 4, True),
    (96, 0, 8, 8, False),
    (128, 65, 64, 4, False),
    (256, 1, 8, 8, True),
    (64, 10, 30, 3, True),
    (80, 0, 20, 2, False),
    (128, 5, 8, 3, False),
    (96, 64, 7, 2, True),
]


def rotated(k, cos, sin):
    """Keys ``[B, Hkv, T, D]`` as two rotations of halves, each product and sum rounded to fp32, then to k's dtype."""
    x, (low, high) = k.float(), k.float().chunk(2, -1)
    c, s = cos.float()[:, None], sin.float()[:, None]
    half = k.shape[-1] // 2
    first = x[..., :half] * c[..., :half] - high * s[..., :half]
    second = x[..., half:] * c[..., half:] + low * s[..., half:]
    return torch.cat([first, second], -1).to(k.dtype)


class Story:
    """A cache and, on the CPU, all tokens that its window and pages got: k, v ``[B, Hkv, tokens, D]``."""

    def __init__(
        self, held, keep, kv_heads, size, dtype, device, tokens=400, most=1, spare=0, bits=4, rope=False, wide=True
    ):
        batch = len(held)
        self.keep, self.size, self.bits, self.held = keep, size, bits, list(held)
        self.k, self.v = (make_tokens(batch, kv_heads, tokens, size, dtype, "cpu") for _ in range(2))
        self.k[:, 0, :, 3] = 0  # a channel that never moves
        self.raw, self.cos, self.sin = self.k, None, None  # what is appended; k is what the cache then holds
        if rope:
            angle = torch.rand(batch, tokens, size) * 6.3
            self.cos, self.sin = (t.float() if wide else t.to(dtype) for t in (angle.cos(), angle.sin()))
            self.k = rotated(self.raw, self.cos, self.sin)
        ring = -(-(max(keep, max(held)) + 63 + most) // 16) + spare
        self.window = torch.full((batch, kv_heads, ring, 32 * size), float("nan"), dtype=dtype, device=device)
        self.pages = torch.zeros(
            batch, kv_heads, tokens // 64, kv4.page_bytes(size, bits), dtype=torch.uint8, device=device
        )
        self.prompts = [7 * b for b in range(batch)]
        rows = [[p, 0, p] for p in self.prompts]
        self.segments = torch.tensor(rows, dtype=torch.int32, device=device)
        for b, count in enumerate(held):  # what is there before, one sequence at a time
            for i in range(count):
                self._append(b, i)
        self.packed = [0] * batch

    def _append(self, b, i):
        one = slice(b, b + 1)
        new = (t[one, :, i : i + 1].transpose(1, 2).to(self.window.device) for t in (self.k, self.v))
        ops.append_kv4(*new, self.pages[one], self.window[one], self.segments[one], -1)

    def append(self, tokens):
        at = [torch.arange(h, h + tokens) for h in self.held]
        k, v = (torch.stack([t[b, :, i] for b, i in enumerate(at)]).transpose(1, 2) for t in (self.raw, self.v))
        turn = ()
        if self.cos is not None:
            angles = (torch.stack([t[b, i] for b, i in enumerate(at)]) for t in (self.cos, self.sin))
            turn = tuple(t.to(self.window.device) for t in angles)
        new = (t.to(self.window.device) for t in (k, v))
        ops.append_kv4(*new, self.pages, self.window, self.segments, self.keep, *turn)
        for b in range(len(self.held)):
            self.held[b] += tokens
            if self.keep >= 0 and self.held[b] - 64 * self.packed[b] >= self.keep + 64:
                self.packed[b] += 1

    def check(self):
        want = [[p, n, p + h] for p, n, h in zip(self.prompts, self.packed, self.held, strict=True)]
        assert self.segments.tolist() == want
        k, v = kv4.unpack_tiles(self.window.cpu(), self.size)
        for b, (full, held) in enumerate(zip(self.packed, self.held, strict=True)):
            body = (t[b, :, : 64 * full] for t in (self.k, self.v))
            assert torch.equal(self.pages[b, :, :full].cpu(), kv4.pack_pages(*body, self.bits)), "pages differ in bits"
            slots = torch.arange(64 * full, held) % k.shape[2]
            assert torch.equal(k[b][:, slots], self.k[b, :, 64 * full : held])
            assert torch.equal(v[b][:, slots], self.v[b, :, 64 * full : held])


@pytest.mark.small
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", APPENDS, ids=lambda s: "-".join(map(str, s)))
def test_append(backend, dtype, shape):  # noqa: F811
    """Sequences of other lengths pass the end of the ring and pack at other times."""
    kernels_skip(backend, dtype)
    size, keep, most, bits, rope = shape
    story = Story((0, 63, 40), keep, 2, size, dtype, backend[1], most=most, spare=1, bits=bits, rope=rope)
    while max(story.held) + most <= 330:
        story.append(most)
        if max(story.held) > 250 or most > 1:
            story.check()
    story.check()
    assert min(story.packed) >= 2


def test_append_notices_faults(backend):  # noqa: F811
    story = Story((0, 70), 64, 2, 64, torch.float16, backend[1], most=8)
    for _ in range(20):
        story.append(8)
    story.check()
    story.pages[1, 1, 0, 5] ^= 16
    with pytest.raises(AssertionError, match="pages differ in bits"):
        story.check()
    story.pages[1, 1, 0, 5] ^= 16
    story.window.copy_(story.window.roll(1, -1))
    with pytest.raises(AssertionError):
        story.check()


@pytest.mark.small
def test_keys_rotated_by_16_bit_angles_of_one_sequence(backend):  # noqa: F811
    """cos and sin in k's dtype, the same for the batch; and the comparison notices angles of another token."""
    story = Story((0, 0), 64, 2, 64, torch.bfloat16, backend[1], most=5, rope=True, wide=False)
    story.cos, story.sin = story.cos[:1], story.sin[:1]
    story.k = rotated(story.raw, story.cos, story.sin)
    for at in range(0, 150, 5):
        k, v = (t[:, :, at : at + 5].transpose(1, 2).to(backend[1]) for t in (story.raw, story.v))
        turn = (t[:, at : at + 5].to(backend[1]) for t in (story.cos, story.sin))
        ops.append_kv4(k, v, story.pages, story.window, story.segments, 64, *turn)
    story.held, story.packed = [150, 150], [1, 1]
    story.check()
    story.k = rotated(story.raw, story.cos.roll(1, 1), story.sin.roll(1, 1))
    with pytest.raises(AssertionError):
        story.check()


def test_nothing_is_packed_for_minus_one(backend):  # noqa: F811
    story = Story((3,), -1, 1, 64, torch.bfloat16, backend[1], spare=20)
    for _ in range(200):
        story.append(1)
    story.check()
    assert story.packed == [0]


def test_attention_of_what_was_appended(backend):  # noqa: F811
    """The two ops agree on where tokens are: pages, ring and segments after 300 tokens against the tokens themselves."""
    story = Story((0, 31), 64, 2, 64, torch.float16, backend[1])
    story.segments -= torch.tensor([[p, 0, p] for p in story.prompts], dtype=torch.int32, device=backend[1])
    story.prompts = [0, 0]
    for _ in range(300):
        story.append(1)
    story.check()
    q = torch.randn(2, 1, 4, 64).half().to(backend[1])
    prompt = torch.empty(2, 2, 0, 32 * 64, dtype=torch.float16, device=backend[1])
    out, _ = ops.attention_kv4(q, prompt, story.pages, story.window, story.segments)
    for b, (full, held) in enumerate(zip(story.packed, story.held, strict=True)):
        body = kv4.unpack_pages(kv4.pack_pages(*(t[b, :, : 64 * full] for t in (story.k, story.v))), 64)
        k, v = (
            torch.cat([m, t[b, :, 64 * full : held].float()], 1) for m, t in zip(body, (story.k, story.v), strict=True)
        )
        want = torch.nn.functional.scaled_dot_product_attention(
            q[b].float().cpu().transpose(0, 1)[None], k[None], v[None], enable_gqa=True
        )[0].transpose(0, 1)
        error = (out[b].float().cpu() - want).norm() / want.norm()
        assert error <= 2e-3, "roundings of fp16, 2^-11, of the result, of probabilities and of queries"


K, TURN = torch.randn(2, 1, 2, 64).half(), torch.ones(2, 1, 64)
PAGES = torch.zeros(2, 2, 1, kv4.page_bytes(64), dtype=torch.uint8)
WINDOW, SEGMENTS = torch.zeros(2, 2, 8, 32 * 64).half(), torch.tensor([[0, 0, 0], [0, 0, 0]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((K[0], K[0], PAGES, WINDOW, SEGMENTS, 64), r"k must be \[B, T, Hkv, D\], got shape \(1, 2, 64\)"),
        (
            (K, K.float(), PAGES, WINDOW, SEGMENTS, 64),
            r"v must be torch.float16 \(2, 1, 2, 64\) like k, got torch.float32",
        ),
        (
            (K, K, PAGES, WINDOW, SEGMENTS, 65),
            "a ring of 128 tokens cannot keep 65, wait for a page of 64 and take 1 new",
        ),
        ((K, K, PAGES, WINDOW, SEGMENTS, -2), r"keep=-2 must be -1 \(nothing is packed\)"),
        ((K, K, PAGES[:, :1], WINDOW, SEGMENTS, 64), r"pages must be \[2, 2, n, 2560 or 3584 or 4608 or 8704\]"),
        (
            (K.expand(2, 65, 2, 64), K.expand(2, 65, 2, 64), PAGES, WINDOW, SEGMENTS, -1),
            "65 tokens at once are more than 64",
        ),
        ((K, K, PAGES, WINDOW, SEGMENTS + 128, -1), "the window of sequence 0 holds -8192 tokens"),
        ((K, K, PAGES, WINDOW, SEGMENTS, 64, TURN, None), "cos and sin come together or not at all"),
        ((K, K, PAGES, WINDOW, SEGMENTS, 64, TURN[..., :32], TURN[..., :32]), r"cos must be torch.float16 or float32"),
        ((K, K, PAGES, WINDOW, SEGMENTS, 64, TURN, TURN[:1]), "cos and sin must be alike"),
        ((K, K, PAGES[:, :, :0], WINDOW, SEGMENTS + torch.tensor([0, 0, 127]).int(), 64), "all 0 pages of sequence 0"),
    ],
)
def test_append_refuses(arguments, sentence):
    with pytest.raises(ValueError, match="append_kv4: .*" + sentence):
        ops.append_kv4(*(t.clone() if isinstance(t, torch.Tensor) else t for t in arguments))


@pytest.mark.gpu
def test_append_in_a_captured_graph(monkeypatch):
    """One graph, 300 steps, each after the last: the same bits as calls one by one."""
    monkeypatch.setenv("PYQUANT_BACKEND", "cuda")
    story = Story((0, 20, 63), 64, 4, 128, torch.bfloat16, "cuda")
    k, v = (torch.empty(3, 1, 4, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.append_kv4(k, v, story.pages, story.window, story.segments, 64)

    def replay(new_k, new_v, *args):
        k.copy_(new_k)
        v.copy_(new_v)
        graph.replay()

    monkeypatch.setattr(ops, "append_kv4", replay)
    for _ in range(300):
        story.append(1)
    story.check()
