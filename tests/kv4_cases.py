"""Caches in mixed precision in the open, references in fp64, tolerances and planted faults of the ops on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cases import U32, Want, unit_roundoff
from pyquant import ops
from pyquant.formats import kv4


@dataclass(frozen=True)
class Kv4Case:
    """Shape of one call; segments are (prompt tokens, pages, window tokens), repeated over the batch."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    size: int
    segments: tuple[tuple[int, int, int], ...]
    softcap: float = 0.0
    shared: bool = False  # one prompt for the batch
    bits: int = 4
    sliding: int = 0
    sinks: bool = False

    def __str__(self) -> str:
        text = f"b{self.batch}-t{self.tokens}-h{self.heads}/{self.kv_heads}-d{self.size}-" + "-".join(
            map(str, self.segments[0])
        )
        text += ("-cap" if self.softcap else "") + ("-shared" if self.shared else "")
        text += f"-{self.bits}bit" if self.bits != 4 else ""
        return text + (f"-last{self.sliding}" if self.sliding else "") + ("-sinks" if self.sinks else "")


KV4_CASES = (
    Kv4Case(1, 1, 2, 1, 64, ((0, 0, 1),)),
    Kv4Case(2, 1, 4, 2, 64, ((17, 2, 64), (0, 1, 100))),
    Kv4Case(1, 1, 5, 1, 80, ((16, 3, 65),)),
    Kv4Case(3, 2, 4, 2, 96, ((15, 2, 130), (1, 0, 2), (0, 3, 63)), softcap=20.0),
    Kv4Case(2, 8, 4, 1, 128, ((128, 1, 64), (0, 2, 8))),
    Kv4Case(2, 1, 16, 1, 256, ((33, 2, 70),), shared=True),
    Kv4Case(4, 3, 8, 2, 128, ((40, 4, 127), (40, 0, 3), (40, 1, 64), (40, 2, 190)), shared=True),
)
# What else there is: pages of other bits, a sliding window that ends in each of the segments, attention sinks.
KV4_MORE = (
    Kv4Case(2, 1, 4, 2, 64, ((17, 2, 64), (0, 3, 100)), bits=8),
    Kv4Case(2, 2, 4, 2, 80, ((17, 2, 64), (0, 3, 100)), bits=2),
    Kv4Case(2, 1, 4, 2, 96, ((17, 2, 64), (0, 3, 100)), bits=3),
    Kv4Case(1, 8, 4, 1, 128, ((5, 4, 64),), bits=8, softcap=20.0, sinks=True),
    Kv4Case(2, 3, 4, 1, 128, ((16, 3, 70), (0, 2, 3)), bits=2, sliding=100),
    Kv4Case(2, 1, 16, 1, 256, ((33, 2, 70),), bits=8, shared=True, sinks=True),
    Kv4Case(1, 1, 2, 1, 256, ((0, 3, 65),), bits=3, sliding=80),
    Kv4Case(2, 2, 4, 2, 64, ((40, 3, 70), (0, 2, 100)), sliding=1),
    Kv4Case(2, 3, 4, 2, 64, ((40, 3, 70), (0, 2, 100)), sliding=72, sinks=True),
    Kv4Case(3, 1, 8, 1, 64, ((100, 3, 70), (0, 5, 30), (0, 0, 128)), sliding=128, sinks=True),
    Kv4Case(2, 2, 4, 2, 128, ((100, 2, 70), (90, 1, 100)), sliding=240, softcap=30.0, shared=False),
    Kv4Case(2, 1, 4, 2, 96, ((40, 3, 70), (0, 2, 100)), sliding=5000, sinks=True, shared=True),
)


@dataclass(frozen=True)
class Cache:
    """The arguments of the ops and, independently, what they say: k and v fp64 ``[Hkv, length, D]`` of each sequence."""

    prompt: Tensor
    pages: Tensor
    window: Tensor
    segments: Tensor
    k: list[Tensor]
    v: list[Tensor]
    sinks: Tensor | None = None  # fp32 [Hq]

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.prompt, self.pages, self.window, self.segments


def make_tokens(batch: int, kv_heads: int, tokens: int, size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Keys or values whose channels differ in size and offset."""
    x = torch.randn(batch, kv_heads, tokens, size, device=device) * (0.5 + 2 * torch.rand(size, device=device))
    return (x + 2 * torch.randn(size, device=device)).to(dtype)


def page_values(x: Tensor, of_k: bool, bits: int = 4) -> Tensor:
    """What pages of ``x [..., 64 n, D]`` stand for, from codes, scales and zeros, fp64."""
    x = x.unflatten(-2, (-1, kv4.PAGE))
    k_codes, v_codes, numbers = kv4.quantize_page(x, x, bits)
    k_scale, k_zero, v_scale, v_zero = (t.double() for t in numbers)
    if of_k:
        return ((k_codes.double() - k_zero[..., None, :]) * k_scale[..., None, :]).flatten(-3, -2)
    return ((v_codes.double() - v_zero[..., None]) * v_scale[..., None]).flatten(-3, -2)


def make_cache(
    segments: list[tuple[int, int, int]],
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    device: str,
    shared: bool = False,
    spare: int = 1,
    bits: int = 4,
) -> Cache:
    """Random tokens in every segment; NaN where no token lies, and ``spare`` tiles more than needed in the ring."""
    batch, one = len(segments), 1 if shared else len(segments)
    most = [max(s[i] for s in segments) for i in range(3)]
    tiles, ring = -(-most[0] // 16), max(1, -(-most[2] // 16)) + spare
    halves = []
    for of_k in (True, False):
        early = make_tokens(one, kv_heads, 16 * tiles, size, dtype, device)
        body = make_tokens(batch, kv_heads, 64 * most[1], size, dtype, device)
        late = make_tokens(batch, kv_heads, 16 * ring, size, dtype, device)
        values, exact = [], page_values(body, of_k, bits)
        for b, (kept, full, new) in enumerate(segments):
            slots = (torch.arange(new, device=device) + 64 * full) % (16 * ring)
            first = early[b % one, :, :kept].double()
            values.append(torch.cat([first, exact[b, :, : 64 * full], late[b][:, slots].double()], 1))
            dead = torch.ones(16 * ring, dtype=torch.bool, device=device)
            dead[slots] = False
            late[b, :, dead] = float("nan")
            early[b % one, :, max(s[0] for s in segments) if shared else kept :] = float("nan")
        halves.append((early, body, late, values))
    (ek, bk, lk, k), (ev, bv, lv, v) = halves
    lengths = [[p, n, p + 64 * n + w] for p, n, w in segments]
    return Cache(
        kv4.pack_tiles(ek, ev),
        kv4.pack_pages(bk, bv, bits),
        kv4.pack_tiles(lk, lv),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        k,
        v,
    )


def make_case(case: Kv4Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Cache]:
    """(q, cache) of a case."""
    segments = [case.segments[b % len(case.segments)] for b in range(case.batch)]
    cache = make_cache(segments, case.kv_heads, case.size, dtype, device, case.shared, bits=case.bits)
    q = 1.5 * torch.randn(case.batch, case.tokens, case.heads, case.size, device=device)
    if case.sinks:  # from what weighs nothing to more than all tokens
        cache = replace(cache, sinks=torch.linspace(-3.0, 15.0, case.heads, device=device))
    return q.to(dtype), cache


def attend(q: Tensor, cache: Cache, case: Kv4Case, **changes) -> tuple[Tensor, Tensor]:
    """The op's (out, log-sum-exp) of a case."""
    options = {"softcap": case.softcap, "sliding_window": case.sliding, "sinks": cache.sinks}
    return ops.attention_kv4(q, *cache.parts(), **(options | changes))


def want_kv4(q: Tensor, cache: Cache, case: Kv4Case, dtype: torch.dtype, by_kernel: bool) -> tuple[Want, Want]:
    """(out, log-sum-exp) in fp64 and how far a right result may be from them.

    A right kernel errs by

    * the last rounding, u |out|;
    * weights rounded to 16 bits: at most u p |v| each, or in fp16, of a page, twice: also after the factor V's scale;
    * a query that is scaled for 4-bit pages and rounded to fp16: D independent errors of deviation 2^-11 / sqrt(3) |q k|
      in a score, of which six deviations are allowed;
    * sums in fp32: 1 + code / u stands 36 times above what is left when the zero is taken off (1024 + code of 8 bits 10
      times, 1 + code / 32 of 2 bits 32 times), and tensor cores cut off 2^-23 of the largest term: 64 * 2^-23 * |q| max |k|,
      and in the 4 products of a page with V 4 * 36 * 2^-23 p |v|;
    * a fast exponential and its sums: 50 + sqrt(length) roundings.

    Plain torch errs by the first and the last.
    """
    (batch, tokens, heads, _), scaling, softcap = q.shape, q.shape[-1] ** -0.5, case.softcap
    u, narrow = unit_roundoff(dtype), 2.0**-11 if by_kernel else 4 * U32
    value, worst = (torch.zeros_like(q, dtype=torch.float64) for _ in range(2))
    sums, off = (torch.zeros(batch, tokens, heads, dtype=torch.float64, device=q.device) for _ in range(2))
    steepest = 0.0
    for b, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        length, group = k.shape[1], heads // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        score = torch.einsum("thd,hld->thl", q[b].double(), k) * scaling
        ds = 6 * (2 / 3) ** 0.5 * narrow * torch.einsum("thd,hld->thl", q[b].double().square(), k.square()).sqrt()
        ds = (ds.amax(-1) + 128 * U32 * torch.einsum("thd,hd->th", q[b].double().abs(), k.abs().amax(1))) * scaling
        if softcap:
            score = softcap * torch.tanh(score / softcap)
            ds = ds + 16 * U32 * softcap
        at = torch.arange(length, device=q.device)
        behind = length - tokens + torch.arange(tokens, device=q.device)[:, None] - at
        score = score.masked_fill(((behind < 0) | (behind >= (case.sliding or length)))[:, None], -torch.inf)
        if cache.sinks is None:
            p = score.softmax(-1)
        else:  # a column more, whose value is 0
            sink = cache.sinks.double().expand(tokens, -1).unsqueeze(-1)
            p = torch.cat([score, sink], -1).softmax(-1)[..., :-1]
            score = torch.cat([score, sink], -1)
        out = torch.einsum("thl,hld->thd", p, v)
        spread = torch.einsum("thl,thld->thd", p, (v[None] - out[:, :, None]).abs())
        size_of = torch.einsum("thl,hld->thd", p, v.abs())
        value[b], sums[b] = out, score.logsumexp(-1)
        roundings = (max(u, 2 * narrow) + 288 * U32 if by_kernel else 0.0) + (50 + length**0.5) * U32
        worst[b] = u * out.abs() + ds[..., None] * spread + roundings * size_of
        off[b] = ds + roundings + 4 * U32 * sums[b].abs()
        steepest = max(steepest, float(ds.max()))
    rms = u + 2 * (u + steepest / 6) + 70 * U32
    tiny = torch.finfo(dtype).tiny
    return Want(value, worst + tiny, rms), Want(sums, off, float(off.norm() / sums.norm().clamp_min(1e-300)))


# ------------------------------------------------------------------------------------------------ planted faults


def _code_bytes(cache: Cache) -> tuple[int, int]:
    """(head size, bytes of a page's codes of K)."""
    d = cache.window.shape[-1] // 32
    return d, 8 * d * kv4.bits_of(cache.pages.shape[-1], d)


def _swap_pages(cache: Cache) -> Cache:
    """The keys of two pages exchanged (keys and values together would change nothing: attention knows no order)."""
    d, codes = _code_bytes(cache)
    pages, keys = cache.pages.clone(), codes + 4 * d
    pages[:, :, :2, :keys] = pages[:, :, :2, :keys].flip(2)
    return replace(cache, pages=pages)


def _swap_heads(cache: Cache) -> Cache:
    return replace(cache, pages=cache.pages.flip(1))


def _shift_k_scales(cache: Cache) -> Cache:
    """Every channel of K takes the scale of its neighbour in memory."""
    pages, (d, codes) = cache.pages.clone(), _code_bytes(cache)
    pages[..., codes : codes + 2 * d] = pages[..., codes : codes + 2 * d].roll(2, -1)
    return replace(cache, pages=pages)


def _swap_nibbles(cache: Cache) -> Cache:
    pages, (d, count) = cache.pages.clone(), _code_bytes(cache)
    codes = pages[..., count + 4 * d : 2 * count + 4 * d]
    pages[..., count + 4 * d : 2 * count + 4 * d] = (codes << 4) | (codes >> 4)
    return replace(cache, pages=pages)


def _ring_off_by_one(cache: Cache) -> Cache:
    """Every token of the window lies one slot later."""
    k, v = kv4.unpack_tiles(cache.window, cache.window.shape[-1] // 32)
    moved = kv4.pack_tiles(k.nan_to_num().roll(1, -2), v.nan_to_num().roll(1, -2))
    return replace(cache, window=moved)


def _prompt_one_shorter(cache: Cache) -> Cache:
    segments = cache.segments.clone()
    segments[:, 0] -= 1
    segments[:, 2] -= 1
    return replace(cache, segments=segments)


KV4_FAULTS: dict[str, Callable[[Cache], Cache]] = {
    "keys of two pages swapped": _swap_pages,
    "pages of another head": _swap_heads,
    "scale of a channel's neighbour": _shift_k_scales,
    "nibbles swapped": _swap_nibbles,
    "ring off by one": _ring_off_by_one,
    "prompt one token shorter": _prompt_one_shorter,
}
FAULTY_CASE = Kv4Case(2, 1, 4, 2, 64, ((17, 2, 64), (5, 3, 100)))
# Changes of the arguments that a right kernel must show, in this case.
OPTIONS_CASE = replace(FAULTY_CASE, sliding=90, sinks=True, segments=((17, 2, 50), (5, 3, 60)))
OPTION_FAULTS: dict[str, Callable[[Cache], dict]] = {
    "sliding window one token wider": lambda cache: {"sliding_window": OPTIONS_CASE.sliding + 1},
    "sliding window one token narrower": lambda cache: {"sliding_window": OPTIONS_CASE.sliding - 1},
    "no sliding window": lambda cache: {"sliding_window": 0},
    "no sinks": lambda cache: {"sinks": None},
    "sink of another head": lambda cache: {"sinks": cache.sinks.roll(1)},
    "sinks in base 2": lambda cache: {"sinks": cache.sinks / 1.4426950408889634},
}


# Two query tokens and a window of 80: the prompt and the first three pages of both sequences lie before it.
OLD_CASE = replace(OPTIONS_CASE, segments=((64, 4, 70), (80, 3, 100)), tokens=2, sliding=80)


def without_old(cache: Cache) -> Cache:
    """The cache of OLD_CASE with NaN, also as scales, in what no query sees."""
    pages = cache.pages.clone()
    pages[:, :, :3] = 0xFF
    return replace(cache, prompt=torch.full_like(cache.prompt, float("nan")), pages=pages)


# ------------------------------------------------------------------------------------------------ arguments for opcheck


def sample_calls(device: str) -> dict[str, list[tuple]]:
    """Argument tuples for each op of this file."""
    calls: dict[str, list[tuple]] = {"attention_kv4": [], "append_kv4": []}
    for case in (KV4_CASES[1], replace(KV4_CASES[1], tokens=2, shared=True, segments=((9, 1, 70),))):
        for dtype in (torch.float16, torch.float32):
            q, cache = make_case(case, dtype, device)
            calls["attention_kv4"].append((q, *cache.parts(), 0.125, case.softcap, False, 0, None))
    q, cache = make_case(replace(OPTIONS_CASE, bits=8), torch.float16, device)
    calls["attention_kv4"].append((q, *cache.parts(), 0.125, 0.0, False, 90, cache.sinks))
    for dtype, keep in ((torch.float16, 64), (torch.float32, -1)):
        cache = make_cache([(5, 0, 127), (0, 1, 100)], 2, 64, dtype, device, spare=2)
        pages = torch.cat([cache.pages, cache.pages], 2)
        new = make_tokens(2, 2, 3, 64, dtype, device).transpose(1, 2)
        calls["append_kv4"].append((new, new + 1, pages, cache.window, cache.segments, keep, None, None))
        turn = torch.rand(2, 3, 64, device=device)
        parts = (pages.clone(), cache.window.clone(), cache.segments.clone())
        calls["append_kv4"].append((new, new + 1, *parts, keep, turn.cos(), turn[:, :1].expand(2, 3, 64).sin()))
    return calls
