"""``python -m benchmarks.end_to_end [--out FILE]``: decode and prefill of an 8B Llama shape with random weights.

Arms: ``pyquant`` (QLinear, group 128, after ``prepare_for_inference``), ``pyquant w4a8`` (the same with its inputs in int8),
``bf16`` and ``tinygemm`` (torch's int4 kernel). Decode of pyquant is timed through a plain ``model.generate``: the difference
of calls with many and with one new token, over the steps. For the peers, whose ``generate`` is bound by the host, the better
figure counts: a step over a static cache captured in a CUDA graph (with ``--compile`` also compiled, about a minute for each
arm and batch). Nothing is timed unless the fused step gives the model's logits.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import pyquant
from benchmarks.timing import graph_us, meta
from pyquant import QLinear, QuantSpec, ops
from pyquant.formats import int4
from pyquant.formats.spec import ActSpec
from pyquant.integrations.inference import undo
from pyquant.integrations.read_decoder import read_decoder

GROUP = 128
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ models


def random_linear(n: int, k: int) -> nn.Linear:
    """bf16 weights of deviation 1 / sqrt(K)."""
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5, requires_grad=False)
    return layer


def random_qlinear(n: int, k: int, device: str = "cuda") -> QLinear:
    """Random codes (deviation 4.6) and a scale of its own for each group: weights of deviation about 1 / sqrt(K)."""
    layer = QLinear(k, n, False, QuantSpec(4, GROUP), "meta", torch.bfloat16)
    shape = int4.tiled_scale_shape(n, k, GROUP)
    scale = (0.75 + torch.rand(shape, device=device) / 2) / (4.6 * k**0.5)
    words = torch.randint(-(2**31), 2**31 - 1, int4.tiled_shape(n, k), dtype=torch.int32, device=device)
    layer._register({"qweight": words, "scale": scale.bfloat16(), "zero": None})
    return layer


class Tinygemm(nn.Module):
    """torch's int4 layer: bf16, scales and zeros by group."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        self.n, self.packed = n, torch._convert_weight_to_int4pack(codes, 8)
        scale = (0.75 + torch.rand(k // GROUP, n, 2, device="cuda") / 2) / (4.6 * k**0.5)
        scale[..., 1] = 0
        self.scales = scale.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        y = torch._weight_int4pack_mm(x.reshape(-1, x.shape[-1]), self.packed, GROUP, self.scales)
        return y.view(*x.shape[:-1], self.n)


def random_w4a8(n: int, k: int) -> QLinear:
    """The same with inputs in int8, a scale a token."""
    layer = random_qlinear(n, k)
    layer.act = ActSpec(8)
    return layer


MAKERS: dict[str, Callable[[int, int], nn.Module]] = {
    "pyquant": random_qlinear,
    "pyquant w4a8": random_w4a8,
    "bf16": random_linear,
    "tinygemm": Tinygemm,
}


def build(arm: str, layers: int) -> LlamaForCausalLM:
    """The shape with random weights of an arm; embedding and head in bf16. Nothing is searched or converted."""
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        if isinstance(module, nn.Linear):
            make = random_linear if name == "lm_head" else MAKERS[arm]
            setattr(parent, name.rpartition(".")[2], make(module.out_features, module.in_features))
        elif isinstance(module, nn.Embedding):
            made = torch.randn(module.weight.shape, device="cuda", dtype=torch.bfloat16)
            module.weight = nn.Parameter(made, requires_grad=False)
        elif type(module).__name__.endswith("RMSNorm"):
            made = torch.ones(module.weight.shape, device="cuda", dtype=torch.bfloat16)
            module.weight = nn.Parameter(made, requires_grad=False)
    with torch.device("cuda"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def prompts(batch: int, length: int) -> dict[str, Tensor]:
    """Random prompts as a tokenizer gives them."""
    ids = torch.randint(0, SHAPE["vocab_size"], (batch, length), device="cuda")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ------------------------------------------------------------------------------------------------ clocks


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call that ends with the GPU idle."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def gpu_ms(call: Callable[[], object], repeats: int) -> float:
    """Median GPU time of a call between two events."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


# ------------------------------------------------------------------------------------------------ correctness gate


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def fused_logits(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the fused prompt and steps, ``[B, L - prompt + 1, V]``."""
    decoder = read_decoder(model)
    state = decoder.new_state(ids.shape[0], 256)
    logits = [decoder.prefill(state, ids[:, :prompt])]
    for i in range(prompt, ids.shape[1]):
        state.advance(ids[:, i])
        logits.append(decoder.step(state))
    return torch.stack(logits, 1)


def gate(arm: str, layers: int) -> dict[str, float]:
    """The fused step against the plain model: exactly (fp32) with two layers, and against bf16 with all.

    Both the fused and the plain step round activations to bf16 at about the same places, so the fused one may be off from
    fp32 by 1.5 times what the plain one is (it takes one rounding less in norms and activation).
    """
    small = build(arm, min(2, layers))
    ids, prompt = prompts(2, 40)["input_ids"], 33
    exact = copy.deepcopy(small).float()(ids).logits[:, prompt - 1 :]
    plain, fused = (
        relative(small(ids).logits[:, prompt - 1 :], exact),
        relative(fused_logits(small, ids, prompt), exact),
    )
    if not fused < 1.5 * plain + 1e-3:
        raise SystemExit(
            f"the fused step is wrong: off by {fused:.2e} where the model is off by {plain:.2e}; not timed"
        )
    return {"rel_err": fused, "rel_err_plain": plain}


# ------------------------------------------------------------------------------------------------ arms


def decode_pyquant(
    model: nn.Module, batch: int, prompt: int, new: int, repeats: int, profile: bool
) -> dict[str, float]:
    """Tokens/s through generate, the graph alone, and what the host adds."""
    inputs = prompts(batch, prompt)

    def run(tokens: int) -> Tensor:
        return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)

    first = seconds(lambda: run(new), 1)  # captures the graph
    one, many = seconds(lambda: run(1), repeats), seconds(lambda: run(new), repeats)
    state = model.generate.args[1]._state
    step = next(iter(state.graphs.values()))
    state.slot.fill_(prompt)
    steps = min(new, 60)
    graph_ms = gpu_ms(step, steps)
    state.slot.fill_(prompt)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        step()
    launch_us = (time.perf_counter() - begin) / 20 * 1e6
    torch.cuda.synchronize()
    if profile:
        state.slot.fill_(prompt)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as kept:
            step()
            torch.cuda.synchronize()
        print(kept.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=70))
    ms = (many - one) / (new - 1) * 1e3
    return {
        "ms": ms, "tok_s": batch / ms * 1e3, "graph_ms": graph_ms, "host_ms": ms - graph_ms, "launch_us": launch_us,
        "generate_s": many, "generate_tok_s": batch * new / many, "first_call_s": first,
    }  # fmt: skip


def parts(model: nn.Module, batch: int, context: int) -> dict[str, float]:
    """Microseconds a call of each kernel of a step, as a chain of itself in a graph, every layer's data once (cold)."""
    decoder = model.generate.args[1].decoder(model)
    state = decoder.new_state(batch, context + 256)
    state.slot.fill_(context)
    layers, eps = decoder.layers, decoder.eps
    x = torch.randn(batch, SHAPE["hidden_size"], device="cuda").bfloat16()
    qkv, gate_up = layers[0].qkv(x), layers[0].gate_up(x)
    middle, logits = ops.silu_and_mul(gate_up), decoder.head(x)

    def attend(layer, cache):
        return ops.attention_decode(qkv, state.cos, state.sin, *cache, state.slot, state.start, early=True)

    calls = {
        "rms_norm": [lambda w=m.before_mlp: ops.rms_norm(x, w, eps) for m in layers],
        "add_rms_norm": [lambda w=m.before_mlp: ops.add_rms_norm(x, x, w, eps) for m in layers],
        "silu_and_mul": [lambda: ops.silu_and_mul(gate_up) for _ in layers],
        "attention": [lambda m=m, c=c: attend(m, c) for m, c in zip(layers, state.cache, strict=True)],
        "qkv": [lambda m=m: m.qkv(x) for m in layers],
        "o": [lambda m=m: m.o(x) for m in layers],
        "gate_up": [lambda m=m: m.gate_up(x) for m in layers],
        "down": [lambda m=m: m.down(middle) for m in layers],
        "head": [lambda: decoder.head(x)] * 4,
        "greedy_append": [lambda: state.advance_greedily(logits)] * 16,
    }
    return {name: graph_us(each) for name, each in calls.items()}


def decode_peer(model: nn.Module, batch: int, prompt: int, new: int, repeats: int, compiled: bool) -> dict[str, float]:
    """A step over a static cache, captured. The cache's contents are zeros: they do not matter to the time."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=prompt + 256)
    cache.early_initialization(
        batch, config.num_key_value_heads, config.hidden_size // config.num_attention_heads, torch.bfloat16,
        torch.device("cuda"),
    )  # fmt: skip
    for layer in cache.layers:
        layer.cumulative_length = layer.cumulative_length.cuda()
        layer.cumulative_length.fill_(prompt)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    position = torch.full((batch, 1), prompt, device="cuda")
    forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward

    def step() -> None:
        out = forward(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
        ids.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    graph_ms = gpu_ms(graph.replay, 30)
    return {"ms": graph_ms, "tok_s": batch / graph_ms * 1e3, "graph_ms": graph_ms, "host_ms": 0.0}


def prefill(model: nn.Module, arm: str, tokens: int, repeats: int) -> dict[str, float]:
    """Time to the first token of one prompt: through generate for pyquant and bf16, one forward pass for tinygemm."""
    inputs = prompts(1, tokens)
    if arm == "tinygemm":

        def run() -> object:
            return model(inputs["input_ids"], use_cache=True, logits_to_keep=1)

        repeats = 1
    else:

        def run() -> object:
            return model.generate(**inputs, max_new_tokens=1, do_sample=False)

    seconds(run, 1)
    row = {"ms": seconds(run, repeats) * 1e3}
    if arm == "bf16":  # no generate around it: the strictest baseline
        row["forward_ms"] = gpu_ms(lambda: model(inputs["input_ids"], use_cache=True, logits_to_keep=1), repeats)
    if arm.startswith("pyquant"):
        plan = model.generate.args[1]
        decoder, state = plan.decoder(model), plan._state
        row["forward_ms"] = gpu_ms(lambda: decoder.prefill(state, inputs["input_ids"]), repeats)
    return row


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def guarded(what: str, failed: list[str], call: Callable[[], dict[str, float]]) -> dict[str, float] | None:
    """The result of one measurement; a failure is printed and kept, and costs no other."""
    begin = time.perf_counter()
    try:
        row = call()
    except Exception as error:
        failed.append(f"{what}: {first_line(error)}")
        traceback.print_exc()
        print(f"{what}: FAILED", flush=True)
        return None
    shown = " ".join(f"{k} {v:.4g}" for k, v in row.items())
    print(f"{what}: {shown}   ({time.perf_counter() - begin:.1f} s)", flush=True)
    return row


def run_arm(arm: str, args: argparse.Namespace, failed: list[str]) -> list[dict]:
    """All measurements of one arm."""
    rows = []
    model = build(arm, args.layers)
    ours = arm.startswith("pyquant")
    if ours:
        pyquant.prepare_for_inference(model, lm_head_bits=args.lm_head_bits)
        if "generate" not in vars(model):
            raise RuntimeError("prepare_for_inference left the model as it is")
    about = {"impl": arm, "layers": args.layers, "lm_head_bits": args.lm_head_bits if ours else 16}
    for batch in args.batches:
        common = (model, batch, args.prompt, args.new, args.repeats)
        ways = {"graph": lambda c=common: decode_peer(*c, compiled=False)}
        if args.compile:
            ways["compiled graph"] = lambda c=common: decode_peer(*c, compiled=True)
        if ours:
            ways = {"generate": lambda c=common: decode_pyquant(*c, args.profile)}
        for way, call in ways.items():
            torch._dynamo.reset()
            if row := guarded(f"{arm} decode batch {batch} ({way})", failed, call):
                rows.append({"op": "decode", **about, "way": way, "batch": batch, "context": args.prompt, **row})
        if args.parts and ours:
            guarded(f"{arm} parts batch {batch}, us", failed, lambda b=batch: parts(model, b, args.prompt))
    if args.prefill and (
        row := guarded(f"{arm} prefill {args.prefill}", failed, lambda: prefill(model, arm, args.prefill, args.repeats))
    ):
        rows.append({"op": "prefill", **about, "batch": 1, "context": args.prefill, **row})
    undo(model)
    return rows


def table(rows: list[dict]) -> str:
    """What was measured, in a few lines."""
    lines = []
    for row in rows:
        what = f"{row['op']:8} {row['impl']:9} batch {row['batch']:<3} {row.get('way', ''):15} {row['ms']:9.3f} ms"
        if row["op"] == "decode":
            what += f" {row['tok_s']:9.0f} tok/s   graph {row['graph_ms']:.3f} ms, host {row['host_ms']:+.3f} ms"
        elif "forward_ms" in row:
            what += f"   forward {row['forward_ms']:.2f} ms"
        lines.append(what)
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="results file, e.g. benchmarks/results/h200/end_to_end.json")
    parser.add_argument("--arms", nargs="*", choices=MAKERS, default=["pyquant", "bf16", "tinygemm"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt before decoding")
    parser.add_argument("--new", type=int, default=128, help="tokens that are generated")
    parser.add_argument(
        "--prefill", type=int, default=2048, help="tokens of the prompt whose prefill is timed; 0 for none"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lm-head-bits", type=int, default=16, choices=(4, 16))
    parser.add_argument("--compile", action="store_true", help="also time the peers under torch.compile")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step of pyquant")
    parser.add_argument("--parts", action="store_true", help="also time each kernel of a step of pyquant by itself")
    parser.add_argument("--commit", help="the commit that is measured, where the folder is no git checkout")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks need a CUDA device")
    torch.manual_seed(0)
    begin = time.perf_counter()
    about = meta()
    about["commit"] = args.commit or os.environ.get("PYQUANT_COMMIT") or about["commit"]
    print(json.dumps(about), flush=True)
    rows: list[dict] = []
    failed: list[str] = []
    for arm in args.arms:
        if arm.startswith("pyquant"):
            about["gate" if arm == "pyquant" else f"gate {arm}"] = found = gate(arm, args.layers)
            print(f"gate {arm}: {found}", flush=True)
    for arm in args.arms:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            rows += run_arm(arm, args, failed)
        except Exception as error:  # e.g. the arm's model does not fit
            traceback.print_exc()
            failed.append(f"{arm}: {first_line(error)}")
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"meta": about, "failed": failed, "rows": rows}, indent=1) + "\n")
    print(f"\n{about['gpu']}, {args.layers} layers, {time.perf_counter() - begin:.0f} s\n{table(rows)}")
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
