"""Decode attention over a low-bit KV cache beside torch's attention over a bf16 one: rows for ``benchmarks.run``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers_attention
from benchmarks.timing import copies_for, graph_us
from pyquant import ops, reference
from pyquant.formats import kv4

PROMPT, WINDOW = 128, 128  # tokens in 16 bits at both ends
HEADS = (
    (32, 8, 128),
    (32, 8, 64),
    (16, 8, 256),
    (8, 8, 128),
    (64, 8, 128),
    (64, 4, 128),
)  # query heads, KV heads, D; the first in full
SHAPES = (
    (1, 4096),
    (8, 4096),
    (32, 4096),
    (1, 32768),
    (8, 32768),
    (32, 32768),
    (1, 131072),
    (8, 131072),
)  # batch, context
FEW = ((1, 4096), (8, 4096), (1, 32768), (8, 32768))
SLIDING = 1024  # tokens; one row of the first heads, at the last of FEW
PEERS = {"torch-flash-bf16": SDPBackend.FLASH_ATTENTION, "torch-cudnn-bf16": SDPBackend.CUDNN_ATTENTION}
GATE = 2.0**-8  # rounding the result to bf16 costs half of that, probabilities and queries the rest


@dataclass
class Cache:
    """Random bits that are a valid cache of one layer."""

    prompt: Tensor
    pages: Tensor
    window: Tensor
    segments: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.prompt, self.pages, self.window, self.segments


def make_cache(batch: int, context: int, kv_heads: int, d: int, spare: int = 0, bits: int = 4) -> Cache:
    """Codes of every kind, scales and zeros that give values of about size 1."""
    full = (context - PROMPT - WINDOW) // kv4.PAGE
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    size, codes = kv4.page_bytes(d, bits), 8 * bits * d
    pages = torch.randint(0, 256, (batch, kv_heads, full + spare, size), dtype=torch.uint8, device="cuda")
    for numbers in (pages[..., codes : codes + 4 * d], pages[..., 2 * codes + 4 * d :]):
        scale, zero = numbers.view(torch.float16).chunk(2, -1)
        scale.fill_(3.2 / 2**bits)
        zero.fill_(2 ** (bits - 1))
    return Cache(
        torch.randn(batch, kv_heads, PROMPT // kv4.TILE, kv4.tile_values(d), **half),
        pages,
        torch.randn(batch, kv_heads, (WINDOW + 64 + 8) // kv4.TILE + 1, kv4.tile_values(d), **half),
        torch.tensor([[PROMPT, full, context]] * batch, dtype=torch.int32, device="cuda"),
    )


def check(heads: int, kv_heads: int, d: int, bits: int = 4) -> float:
    """Relative error against the meaning of the op; nothing is timed where it is large."""
    cache = make_cache(2, 1024, kv_heads, d, bits=bits)
    q = torch.randn(2, 1, heads, d, dtype=torch.bfloat16, device="cuda")
    want, _ = reference.attention_kv4(
        q.float(), *(t.float() if t.dtype == q.dtype else t for t in cache.parts), d**-0.5, 0.0, False
    )
    error = float((ops.attention_kv4(q, *cache.parts)[0].float() - want).norm() / want.norm())
    if not error < GATE:
        raise SystemExit(
            f"attention_kv4 is wrong for {heads} heads, {kv_heads} KV heads, D={d}, {bits} bits: relative error {error:.2e}"
        )
    return error


def append_us(batch: int, context: int, kv_heads: int, d: int, copies: int) -> float:
    """One token a sequence into the window. Fill levels are spread evenly, so that one sequence in 64 packs a page."""
    caches = [make_cache(batch, context, kv_heads, d, spare=1) for _ in range(copies)]
    for i, cache in enumerate(caches):
        level = (torch.arange(batch, device="cuda") * copies + i) * 64 // (batch * copies)
        cache.segments[:, 2] += level.int()
    new = torch.randn(batch, 1, kv_heads, d, dtype=torch.bfloat16, device="cuda")
    return graph_us([lambda c=c: ops.append_kv4(new, new, c.pages, c.window, c.segments, WINDOW) for c in caches])


def peers_us(batch: int, context: int, heads: int, kv_heads: int, d: int, copies: int) -> dict[str, float]:
    """torch's attention of one query token over a bf16 cache, by backend; one that refuses is left out, saying why."""
    shape = (2, batch, kv_heads, context, d)
    kv = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    q = torch.randn(batch, heads, 1, d, dtype=torch.bfloat16, device="cuda")

    def attend(t: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, t[0], t[1], enable_gqa=True)

    times = {}
    for name, backend in PEERS.items():
        with sdpa_kernel(backend):
            try:
                times[name] = graph_us([lambda t=t: attend(t) for t in kv])
            except RuntimeError as refusal:
                print(f"{name}: {str(refusal).splitlines()[0]}")
    return times


def attention_us(batch: int, context: int, heads: int, kv_heads: int, d: int, bits: int = 4, sliding: int = 0) -> float:
    """One query token a sequence, in a chain: each call takes what the one before returned, as the layers of a step do."""
    copies = copies_for(cache_bytes(batch, context, kv_heads, d, bits, sliding))
    caches = [make_cache(batch, context, kv_heads, d, bits=bits) for _ in range(copies)]
    tokens = [torch.randn(batch, 1, heads, d, dtype=torch.bfloat16, device="cuda")]

    def step(cache: Cache) -> None:
        tokens[0] = ops.attention_kv4(tokens[0], *cache.parts, early=True, sliding_window=sliding)[0]

    return graph_us([lambda c=c: step(c) for c in caches])


def cache_bytes(batch: int, context: int, kv_heads: int, d: int, bits: int = 4, sliding: int = 0) -> int:
    """Bytes that a call must read."""
    kept, seen = PROMPT + WINDOW, context - PROMPT - WINDOW
    if sliding:
        kept, seen = WINDOW, sliding - WINDOW
    return batch * kv_heads * (-(-seen // kv4.PAGE) * kv4.page_bytes(d, bits) + kept * 4 * d)


def attention_kv4_rows(ceilings: dict[str, float], heads_kinds: int = len(HEADS)) -> list[dict]:
    """Microseconds of attention_kv4 (one query token, bf16), of append_kv4, of torch's attention over a bf16 cache and, for the
    first heads, of flashinfer's (:mod:`benchmarks.peers_attention`). The baseline is the faster of torch's.

    Args:
        ceilings: of this card.
        heads_kinds: how many of :data:`HEADS` are measured.
    """
    rows: list[dict] = []
    others = peers_attention.available()
    read = ceilings["read_tbps"] * 1e6

    def add(op: str, impl: str, shape: tuple, us: float, size: int, best: tuple | None, **more: object) -> None:
        batch, context, heads, kv_heads, d = shape
        rows.append(
            {
                "op": op, "impl": impl, "dtype": "bfloat16", "B": batch, "context": context, "heads": heads,
                "kv_heads": kv_heads, "D": d, "us": round(us, 2), "roof_us": round(size / read, 2),
                "baseline": best[0] if best else None, "baseline_us": round(best[1], 2) if best else None,
                "rel_err": None, **more,
            }
        )  # fmt: skip

    for number, (heads, kv_heads, d) in enumerate(HEADS[:heads_kinds]):
        errors = {bits: check(heads, kv_heads, d, bits) for bits in kv4.BITS}
        for batch, context in SHAPES if number == 0 else FEW:
            shape = (batch, context, heads, kv_heads, d)
            size = 4 * batch * kv_heads * context * d
            copies = min(16, copies_for(cache_bytes(batch, context, kv_heads, d)))
            times = {4: attention_us(*shape)}
            torch.cuda.empty_cache()
            append = append_us(batch, context, kv_heads, d, copies)
            torch.cuda.empty_cache()
            peers = peers_us(*shape, copies_for(size, most=16))
            torch.cuda.empty_cache()
            best = min(peers.items(), key=lambda item: item[1]) if peers else None
            if number == 0 and (batch, context) in FEW:
                for bits in (8, 3, 2):
                    times[bits] = attention_us(*shape, bits=bits)
                    torch.cuda.empty_cache()
            for bits, us in times.items():
                need = cache_bytes(batch, context, kv_heads, d, bits)
                add("attention_kv4", "pyquant", shape, us, need, best, bits=bits, rel_err=errors[bits])
            if number == 0 and (batch, context) == FEW[-1]:
                us = attention_us(*shape, sliding=SLIDING)
                need = cache_bytes(batch, context, kv_heads, d, sliding=SLIDING)
                add(
                    "attention_kv4", "pyquant", shape, us, need, None, bits=4, sliding_window=SLIDING, rel_err=errors[4]
                )
            add("append_kv4", "pyquant", shape, append, 0, None)
            for name, us in peers.items():
                add("attention_kv4", name, shape, us, size, best)
            if shape[2:] == peers_attention.HEADS:
                for name, (us, error) in peers_attention.times(others, batch, context).items():
                    need = peers_attention.cache_bytes(name, batch, context, shape[2:])
                    add("attention_kv4", name, shape, us, need, best, rel_err=error)
                    peers[name] = us
                torch.cuda.empty_cache()
            shown = " ".join(f"{bits} bit {us:.1f}" for bits, us in times.items())
            shown += f" append {append:.1f} " + " ".join(f"{n} {us:.1f}" for n, us in peers.items())
            roof = cache_bytes(batch, context, kv_heads, d) / read
            print(f"{heads}/{kv_heads} D={d} B={batch} {context}: roof {roof:.1f} {shown}", flush=True)
    return rows
