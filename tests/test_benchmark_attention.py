"""The peers of attention_kv4 on a machine without a GPU: flashinfer's calls on a stub of them, and what is left out."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from benchmarks import peers_attention
from benchmarks.tables_kernels import attention_table


def softmax_over(q: Tensor, k: Tensor, v: Tensor, pages: Tensor, scale: float) -> Tensor:
    """One query token ``[heads, D]`` over these pages ``[KV heads, PAGE, D]`` of a cache, fp32."""
    k, v = (t[pages.long()].float().transpose(0, 1).flatten(1, 2) for t in (k, v))
    weights = torch.einsum("hgd,htd->hgt", q.float().unflatten(0, (len(k), -1)), k).mul(scale).softmax(-1)
    return torch.einsum("hgt,htd->hgd", weights, v).flatten(0, 1)


class Wrapper:
    """flashinfer's, as far as it is called."""

    def __init__(self, work, layout, use_cuda_graph, use_tensor_cores, **buffers):
        assert layout == "HND"
        assert use_cuda_graph
        assert not work.any()
        self.buffers = buffers

    def plan(self, begins, indices, last, heads, kv_heads, d, page, q_data_type, kv_data_type):
        self.begins, self.indices, self.dtype = begins.tolist(), indices, kv_data_type
        assert [t.shape for t in self.buffers.values()] == [begins.shape, indices.shape, last.shape]
        assert (heads, kv_heads, d) == peers_attention.HEADS
        assert last.eq(page).all()

    def run(self, q, kv):
        assert kv[0].dtype == self.dtype
        parts = [self.indices[a:b] for a, b in zip(self.begins[:-1], self.begins[1:], strict=True)]
        return torch.stack(
            [softmax_over(*t, t[0].shape[-1] ** -0.5) for t in zip(q, *[[x] * len(q) for x in kv], parts, strict=True)]
        ).bfloat16()


def xqa_like(q, kv, work, table, lengths, longest, bmm1_scale, kv_layout):
    assert kv_layout == "HND"
    assert lengths.tolist() == [longest] * len(q)
    return torch.stack([softmax_over(x, *kv, pages, bmm1_scale) for x, pages in zip(q, table, strict=True)]).bfloat16()


@pytest.fixture
def flashinfer(monkeypatch):
    decode = types.SimpleNamespace(xqa_batch_decode_with_kv_cache=xqa_like)
    package = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper, decode=decode)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", decode)
    monkeypatch.setattr(peers_attention, "graph_us", lambda calls: (calls[1](), 7.0)[1])
    monkeypatch.setattr(peers_attention, "copies_for", lambda size, most: 2)
    monkeypatch.setattr(peers_attention, "WORKSPACE", 64)
    torch.manual_seed(0)
    return decode


def test_every_peer_is_right_on_pages_in_any_order(flashinfer):
    said: list[str] = []
    assert peers_attention.available("cpu", said.append) == list(peers_attention.PEERS)
    assert said == []
    found = peers_attention.times(["flashinfer-bf16", "flashinfer-xqa-e4m3"], 3, 128, "cpu", said.append)
    assert {name: us for name, (us, _) in found.items()} == {"flashinfer-bf16": 7.0, "flashinfer-xqa-e4m3": 7.0}
    assert all(1e-4 < error < 2.0**-7 for _, error in found.values())
    assert peers_attention.cache_bytes("flashinfer-xqa-e4m3", 3, 128, (32, 8, 128)) == 2 * 3 * 128 * 8 * 128


def test_a_peer_that_is_wrong_is_left_out(flashinfer):
    flashinfer.xqa_batch_decode_with_kv_cache = lambda q, kv, work, table, *rest, **kw: xqa_like(
        q, kv, work, table.flip(0), *rest, **kw
    )
    said: list[str] = []
    assert peers_attention.available("cpu", said.append) == [n for n in peers_attention.PEERS if "xqa" not in n]
    assert [line.split(":")[0] for line in said] == [f"{n} is left out" for n in peers_attention.PEERS if "xqa" in n]
    assert all("from SDPA" in line for line in said)


def test_without_flashinfer_nothing_is_timed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", None)
    said: list[str] = []
    assert peers_attention.available("cpu", said.append) == []
    assert len(said) == len(peers_attention.PEERS)
    assert all("ModuleNotFoundError" in line for line in said)


def test_the_table_names_flashinfer_where_it_ran():
    shape = {"op": "attention_kv4", "heads": 32, "kv_heads": 8, "D": 128, "roof_us": 1.0}
    ours = {"impl": "pyquant", "bits": 4, "us": 4.0}
    theirs = [{"impl": i, "us": us} for i, us in (("flashinfer-bf16", 13.0), ("flashinfer-xqa-bf16", 11.0))]
    rows = [{**shape, "B": 1, "context": 4096, **r} for r in (ours, {"impl": "torch-cudnn-bf16", "us": 12.0}, *theirs)]
    rows += [{**shape, "B": 8, "context": 4096, **r} for r in (ours, {"impl": "torch-cudnn-bf16", "us": 12.0})]
    head, cells = attention_table({"rows": rows})
    assert head[-2:] == ["flashinfer, bf16", "over the faster SDPA"]
    assert [line[-2:] for line in cells] == [["11.0", "3.0x"], ["-", "3.0x"]]
    assert "flashinfer, bf16" not in attention_table({"rows": rows[-2:]})[0]
