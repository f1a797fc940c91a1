"""Decode attention of flashinfer, by name, over a cache of pages in bf16 or e4m3: what attention_kv4 is timed beside.

The calls were read from the code of flashinfer 0.6.13. It compiles a module for each kind of head, cache and page at the first
call (half a minute to three minutes each), so it is asked for :data:`HEADS` only; modules under its ``data/aot`` are taken as
they are. What cannot be made or called here is left out, and a line says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import attempt
from benchmarks.timing import copies_for, graph_us

HEADS = (32, 8, 128)  # query heads, KV heads, D
PAGE = 64  # tokens; its pages are [KV heads, PAGE, D] ("HND")
WORKSPACE = 256 << 20  # bytes, zeros at first: 8 MB of semaphores of xqa, partial results of the parts of a sequence
FP8 = torch.float8_e4m3fn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, heads, D], pages of K and of V -> [B, heads, D]
Maker = Callable[[Tensor, tuple[int, int, int], torch.dtype], Attend]  # table [B, pages], heads, dtype of the cache


def wrapper(tensor_cores: bool) -> Maker:
    """``BatchDecodeWithPagedKVCacheWrapper``, planned here, so outside of what is timed."""

    def make(table: Tensor, heads: tuple[int, int, int], dtype: torch.dtype) -> Attend:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        batch, pages = table.shape
        indices = table.flatten()
        begins = pages * torch.arange(batch + 1, dtype=torch.int32, device=table.device)
        last = torch.full((batch,), PAGE, dtype=torch.int32, device=table.device)
        decode = BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(WORKSPACE, dtype=torch.uint8, device=table.device),
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=torch.empty_like(begins),
            paged_kv_indices_buffer=torch.empty_like(indices),
            paged_kv_last_page_len_buffer=torch.empty_like(last),
        )
        decode.plan(begins, indices, last, *heads, PAGE, q_data_type=torch.bfloat16, kv_data_type=dtype)
        return lambda q, k, v: decode.run(q, (k, v))

    return make


def xqa(table: Tensor, heads: tuple[int, int, int], dtype: torch.dtype) -> Attend:
    """Its TensorRT-LLM kernel, which needs no plan; with an e4m3 cache it multiplies in e4m3 on Hopper."""
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    batch, pages = table.shape
    lengths = torch.full((batch,), pages * PAGE, dtype=torch.int32, device=table.device)
    work = torch.zeros(WORKSPACE, dtype=torch.uint8, device=table.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return xqa_batch_decode_with_kv_cache(
            q, (k, v), work, table, lengths, pages * PAGE, bmm1_scale=heads[2] ** -0.5, kv_layout="HND"
        )

    return attend


# Name: how it is made, dtype of the cache, and how far a right result may be from SDPA's over the same numbers. Probabilities
# and results in bf16 cost 2^-9 of each, at both; queries and probabilities in e4m3, 3 bits of mantissa, 0.025 each.
PEERS: dict[str, tuple[Maker, torch.dtype, float]] = {
    "flashinfer-bf16": (wrapper(tensor_cores=False), torch.bfloat16, 2.0**-7),
    "flashinfer-tc-bf16": (wrapper(tensor_cores=True), torch.bfloat16, 2.0**-7),
    "flashinfer-xqa-bf16": (xqa, torch.bfloat16, 2.0**-7),
    "flashinfer-e4m3": (wrapper(tensor_cores=False), FP8, 2.0**-7),
    "flashinfer-xqa-e4m3": (xqa, FP8, 0.06),
}


def cache_bytes(name: str, batch: int, context: int, heads: tuple[int, int, int]) -> int:
    """Bytes of K and V that a call must read."""
    return 2 * batch * context * heads[1] * heads[2] * PEERS[name][1].itemsize


def available(device: str = "cuda", say: Callable[[str], None] = print) -> list[str]:
    """The peers that can be made and called here and are right on a small cache; ``say`` is told who is left out and why."""
    return [name for name in PEERS if attempt(name, functools.partial(_ready, name, 2, 512, HEADS, device), say)]


def times(
    names: list[str], batch: int, context: int, device: str = "cuda", say: Callable[[str], None] = print
) -> dict[str, tuple[float, float]]:
    """(microseconds a call, relative error to SDPA) by name: one query token a sequence, pages in random order, all full."""
    found = {}
    for name in names:
        where = f"{name} at B={batch} {context}"
        made = attempt(where, functools.partial(_timed, name, batch, context, HEADS, device), say)
        if made is not None:
            found[name] = made
    return found


def _timed(name: str, batch: int, context: int, heads: tuple[int, int, int], device: str) -> tuple[float, float]:
    calls, error = _ready(name, batch, context, heads, device)
    return graph_us(calls), error


def _ready(
    name: str, batch: int, context: int, heads: tuple[int, int, int], device: str
) -> tuple[list[Callable[[], Tensor]], float]:
    """A call a cache of their own, more bytes than an L2 holds, and the error of the first.

    Raises:
        RuntimeError: when it is larger than a right result's.
    """
    maker, dtype, gate = PEERS[name]
    pages = batch * context // PAGE
    table = torch.randperm(pages, device=device).int().view(batch, -1)
    attend = maker(table, heads, dtype)
    shape = (pages, heads[1], PAGE, heads[2])
    copies = copies_for(cache_bytes(name, batch, context, heads), most=16)
    caches = [[torch.randn(shape, dtype=torch.bfloat16, device=device).to(dtype) for _ in "kv"] for _ in range(copies)]
    q = torch.randn(batch, heads[0], heads[2], dtype=torch.bfloat16, device=device)
    if q.is_cuda:
        torch.cuda.synchronize()  # what was planned is there before another stream asks for it
    error = far(attend(q, *caches[0]), q, *caches[0], table)
    if not error < gate:
        raise RuntimeError(f"off by {error:.4f} from SDPA, at most {gate:.4f} is right")
    return [functools.partial(attend, q, *cache) for cache in caches], error


def far(got: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> float:
    """Relative error against torch's attention in bf16 over the same pages, laid out one after the other."""
    k, v = (t[table.long()].to(q.dtype).transpose(1, 2).flatten(2, 3) for t in (k, v))  # [B, KV heads, context, D]
    want = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0].float()
    return float((got.float() - want).norm() / want.norm())
