"""``python -m benchmarks.kv_end_to_end [--out FILE]``: tokens/s of an 8B Llama shape with long contexts, 4-bit and plain cache.

Weights are random and in 4 bits, group 128; texts are random too. Both arms run through ``model.generate`` after
``prepare_for_inference``, one of them with ``kv_bits=4`` (128 tokens at either end in 16 bits): the difference of calls with
many and with one new token, over the steps, so that the prompt does not count. Nothing is timed unless the captured step
over a 4-bit cache gives the logits that transformers gives over the same cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path

import torch
from torch import nn

import pyquant
from benchmarks.end_to_end import build, decode_pyquant, relative
from benchmarks.timing import meta
from pyquant.integrations.inference import undo
from pyquant.integrations.kv_cache import NAME
from pyquant.integrations.read_decoder import read_decoder
from pyquant.nn.kv_cache import KVSettings

SHAPES = ((1, 4096), (8, 4096), (1, 32768), (8, 32768))
GATE = 0.05  # bf16 logits by two orders of the same sums: some hundredths through two layers


def gate() -> float:
    """Relative difference of a few steps' logits: the fused step, and transformers' forward over a KVCache."""
    model, ids = build("pyquant", 2), torch.randint(0, 1000, (2, 600), device="cuda")
    first, kv = 590, KVSettings(4, 128, 128)
    model.set_attn_implementation(NAME)
    cache = pyquant.KVCache(model.config, kv.bits, kv.prompt_tokens, kv.window)
    with torch.inference_mode():
        wants = [model(ids[:, :first], past_key_values=cache).logits[:, -1]]
        wants += [model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(first, 600)]
        decoder = read_decoder(model, 16)
        state = decoder.new_state(2, 640, kv)
        state.begin(ids[:, :first])
        gots = [decoder.prefill(state, ids[:, :first])]
        for i in range(first, 600):
            state.advance(ids[:, i])
            gots.append(decoder.step(state))
        error = max(relative(got, want) for got, want in zip(gots, wants, strict=True))
    if not error < GATE:
        raise SystemExit(
            f"the fused step over a 4-bit cache is wrong: relative difference {error:.3g}; nothing is timed"
        )
    return error


def run(model: nn.Module, bits: int, batch: int, context: int, args: argparse.Namespace) -> dict[str, float]:
    """Decode over ``context`` tokens a sequence, and the bytes of the cache."""
    pyquant.prepare_for_inference(model, kv_bits=bits)
    try:
        found = decode_pyquant(model, batch, context - args.new, args.new, args.repeats, False)
        state = model.generate.args[1]._state
        kept = sum(layer.nbytes for layer in state.kv or ())
        found["cache_gb"] = (kept or sum(t.untyped_storage().nbytes() for kv in state.cache for t in kv)) / 1e9
        return found
    finally:
        undo(model)
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="*", default=[f"{b}x{c}" for b, c in SHAPES], help="BATCHxCONTEXT")
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 16], choices=(16, 8, 4, 3, 2))
    parser.add_argument("--new", type=int, default=128, help="tokens that are generated")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--commit", help="the commit that is measured, where the folder is no git checkout")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks need a CUDA device")
    torch.manual_seed(0)
    about = meta()
    about["commit"] = args.commit or os.environ.get("PYQUANT_COMMIT") or about["commit"]
    about["gate"] = gate()
    print(json.dumps(about), flush=True)
    model, rows = build("pyquant", args.layers), []
    for shape in args.shapes:
        batch, context = (int(n) for n in shape.split("x"))
        for bits in args.bits:
            row: dict = {"op": "decode", "impl": f"W4 KV{bits}", "batch": batch, "context": context}
            try:
                row |= run(model, bits, batch, context, args)
            except torch.cuda.OutOfMemoryError as error:
                row["failed"] = str(error).splitlines()[0]
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({"meta": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
