"""Tensor parallelism on two CPU processes: the logits of one, with K and V cut by heads."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, some_tokens, tiny_llama
from torch import distributed as dist
from torch import multiprocessing, nn

import pyquant
from pyquant.formats.spec import ActSpec, QuantSpec
from pyquant.integrations.config import QuantizeConfig
from pyquant.integrations.pipeline import quantize
from pyquant.nn import QLinear
from pyquant.nn.parallel import cut, parallelize
from pyquant.recipes.rtn import rtn


def model(symmetric: bool = True) -> nn.Module:
    made = tiny_llama(intermediate_size=128)
    rtn(made, QuantSpec(4, 32, symmetric))
    return made


def compute(made: nn.Module) -> dict[str, torch.Tensor]:
    """Logits without a cache, and of three decode steps over the 4-bit one, its head count beside them."""
    tokens = some_tokens(2, 24)
    with torch.no_grad():
        cache = pyquant.KVCache(made.config, bits=4, prompt_tokens=8, window=8)
        made.set_attn_implementation("pyquant")
        steps = [made(tokens[:, :21], past_key_values=cache).logits[:, -1]]
        steps += [made(tokens[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(21, 24)]
        found = {"plain": made(tokens, use_cache=False).logits, "cached": torch.stack(steps)}
        made.set_attn_implementation("sdpa")
        theirs = made.generate(tokens, max_new_tokens=6, do_sample=False)
        pyquant.prepare_for_inference(made)
        assert "generate" in vars(made)  # not left as it was
        found["generated"] = made.generate(tokens, max_new_tokens=6, do_sample=False)
        assert torch.equal(found["generated"], theirs)
        return found


def process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    for symmetric in (True, False):
        made = model(symmetric)
        assert len(parallelize(made, rank, size)) == 14
        assert made.model.layers[0].self_attn.k_proj.out_features == 16  # one of two KV heads
        assert made.model.layers[0].mlp.down_proj.in_features == 64
        torch.save(compute(made), f"{folder}/{symmetric}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_logits_of_one(tmp_path: Path):
    multiprocessing.spawn(process, (2, str(tmp_path)), nprocs=2)
    for symmetric in (True, False):
        want = compute(model(symmetric))
        for rank in range(2):
            got = torch.load(tmp_path / f"{symmetric}-{rank}.pt", weights_only=True)
            top = want["plain"].abs().max()
            assert (got["plain"] - want["plain"]).abs().max() < 1e-5 * top  # fp32 sums in two parts
            # a K or V whose code a rounding turns over moves by a step of 1/15 of its range
            assert (got["cached"] - want["cached"]).abs().max() < 2e-2 * top
            assert torch.equal(got["generated"], want["generated"])
            assert (got["plain"].roll(1, 1) - want["plain"]).abs().max() > 1e-2 * top


def load_cut(rank: int, size: int, folder: str) -> None:
    """What torchrun gives a process, and the checkpoint by transformers' own plan."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    made = pyquant.load_model(f"{folder}/model", torch.float32, tp_plan="auto")
    attention, mlp = made.model.layers[0].self_attn, made.model.layers[1].mlp
    assert (attention.k_proj.out_features, attention.o_proj.in_features, mlp.down_proj.in_features) == (16, 32, 64)
    with torch.no_grad():
        logits = made(some_tokens(2, 24), use_cache=False).logits
    pyquant.prepare_for_inference(made)
    assert "generate" in vars(made)
    chosen = made.generate(some_tokens(2, 24), max_new_tokens=6, do_sample=False)
    torch.save({"logits": logits, "generated": chosen}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_transformers_plan_cuts_a_quantized_checkpoint(tmp_path: Path, monkeypatch):
    save_tiny(tmp_path / "plain", intermediate_size=128, tie_word_embeddings=False)
    quantize(QuantizeConfig(model=str(tmp_path / "plain"), out=tmp_path / "model", group_size=32, device="cpu"))
    whole = pyquant.load_model(tmp_path / "model", torch.float32)
    assert "model.layers.*.self_attn.q_proj" in whole.tp_plan  # nothing is lost from a model that is not cut
    with torch.no_grad():
        want = whole(some_tokens(2, 24), use_cache=False).logits
        generated = whole.generate(some_tokens(2, 24), max_new_tokens=6, do_sample=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    multiprocessing.spawn(load_cut, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (got["logits"] - want).abs().max() < 1e-5 * want.abs().max()  # fp32 sums in two parts
        assert torch.equal(got["generated"], generated)


@pytest.mark.parametrize(("group", "symmetric", "bits"), [(32, True, 4), (64, False, 4), (-1, True, 3)])
def test_cuts_are_slices_of_the_weight(group, symmetric, bits):
    linear = nn.Linear(256, 96)
    whole = QLinear.from_linear(linear, QuantSpec(bits, group, symmetric))
    w = whole.dequantize()
    columns = [cut(whole, "colwise", r, 2) for r in range(2)]
    rows = [cut(whole, "rowwise", r, 2) for r in range(2)]
    assert torch.equal(torch.cat([c.dequantize() for c in columns]), w)
    assert torch.equal(torch.cat([c.bias for c in columns]), whole.bias)
    assert torch.equal(torch.cat([c.dequantize() for c in rows], 1), w)
    assert torch.equal(sum(c.bias for c in rows), whole.bias)


def test_cuts_that_do_not_divide_are_refused():
    layer = QLinear.from_linear(nn.Linear(192, 96), QuantSpec(4, 64))
    with pytest.raises(ValueError, match="192 input features over 2 processes are 96 each, which cuts a group of 64"):
        cut(layer, "rowwise", 0, 2)
    with pytest.raises(ValueError, match="96 output features do not divide by 5"):
        cut(layer, "colwise", 0, 5)
    with pytest.raises(ValueError, match="num_key_value_heads=2"):
        parallelize(model(), 0, 4)
    layer = QLinear.from_linear(nn.Linear(256, 96), QuantSpec(4, 64))
    layer.act = ActSpec(8, 64)
    assert cut(layer, "rowwise", 1, 2).act == cut(layer, "colwise", 1, 2).act == layer.act
    layer.act = ActSpec(8)
    assert cut(layer, "colwise", 0, 2).act == layer.act
    with pytest.raises(ValueError, match="quantized by a whole token, and 128 of its 256 input features"):
        cut(layer, "rowwise", 0, 2)
    narrow = tiny_llama()  # 96 channels over two processes are 48: half a group
    rtn(narrow, QuantSpec(4, 32))
    with pytest.raises(ValueError, match="down_proj: 96 input features over 2 processes"):
        parallelize(narrow, 0, 2)
    assert narrow.model.layers[0].self_attn.q_proj.out_features == 64
