"""The tensor-parallel decode of :mod:`benchmarks.several_gpus`: a W4 g128 model on one GPU, and cut over all of a host.

Random codes and scales, the same on every process; embedding and head in bf16, whole everywhere. Decode is timed as a user
has it, ``generate`` of a model after ``prepare_for_inference`` (a step is one captured CUDA graph, its sums over GPUs
included): the difference of calls with many new tokens and with one. Logits are compared over a prompt and steps after it that
are given the same tokens. Both sides round to bf16 at the same places, but sum in another order, and 32 layers carry that
on; how far this goes without any cut is what the fused step and the plain modules of one GPU differ by.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import pyquant
from benchmarks.blockwise_large import SHAPES
from benchmarks.end_to_end import fused_logits, random_qlinear, relative
from benchmarks.several_training import free
from pyquant.integrations.inference import undo
from pyquant.nn.parallel import parallelize

PROMPT = 33  # tokens of the prompt whose logits are compared, then 7 steps


def build(shape: str, device: str, layers: int | None = None) -> LlamaForCausalLM:
    """The same random model on every process, made where it runs; with another number of layers where one is given."""
    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(
        **sizes, tie_word_embeddings=False, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = random_qlinear(module.out_features, module.in_features, device)
            setattr(model.get_submodule(parent), own, layer)
        elif isinstance(module, nn.Linear | nn.Embedding):
            size = module.weight.shape
            made = torch.randn(size, device=device, dtype=torch.bfloat16)
            module.weight = nn.Parameter(made / size[1] ** 0.5 if name == "lm_head" else made)
        elif type(module).__name__.endswith("RMSNorm"):
            module.weight = nn.Parameter(torch.ones(module.weight.shape, device=device, dtype=torch.bfloat16))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def seconds(call: Any, repeats: int, device: str) -> float:
    """Median wall time of a call that ends with the device idle."""
    times = []
    for _ in range(repeats):
        dist.barrier()
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def speed(model: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of all sequences, and the first call's seconds."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, model.config.vocab_size, (batch, args.prompt), generator=draw).to(args.device)

    def run(new: int) -> Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)

    first = seconds(lambda: run(args.new), 1, args.device)
    one, many = (seconds(lambda n=n: run(n), args.repeats, args.device) for n in (1, args.new))
    ms = (many - one) / (args.new - 1) * 1e3
    return {"ms": ms, "tokens_s": batch / ms * 1e3, "first_call_s": first, "prompt": args.prompt}


@torch.no_grad()
def decode(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one GPU and of all, by batch, then one that compares their logits."""
    size, device = dist.get_world_size(), args.device
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (2, PROMPT + 7), generator=draw).to(device)
    logits: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    noise = 0.0
    for gpus in (1, size):
        free(device)
        model = build(args.shape, device)
        if gpus > 1:
            parallelize(model, dist.get_rank(), size)
        else:
            plain = model(ids).logits[:, PROMPT - 1 :]
        logits.append(fused_logits(model, ids, PROMPT).float())
        if gpus == 1:
            noise = relative(plain, logits[0])
        pyquant.prepare_for_inference(model)
        if "generate" not in vars(model):
            raise RuntimeError("prepare_for_inference left the model as it is")
        for batch in args.batches:
            row = {"op": "decode", "way": "tensor parallel" if gpus > 1 else "one", "gpus": gpus, "batch": batch}
            row |= speed(model, batch, args)
            if device == "cuda":
                row["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            rows.append(row)
        undo(model)
        del model
    one, cut = logits
    same = cut.clone()
    dist.broadcast(same, 0)
    rows.append({
        "op": "logits", "way": "tensor parallel", "gpus": size, "relative": relative(cut, one), "noise": noise,
        "largest_difference": float((cut - one).abs().max()), "largest": float(one.abs().max()),
        "same_token": float((cut.argmax(-1) == one.argmax(-1)).float().mean()),
        "alike_on_all": bool(torch.equal(same, cut)),
    })  # fmt: skip
    return rows
