"""``python -m benchmarks.kv_quality DATA --out FILE``: perplexity, greedy tokens and retrieval with low-bit keys and values.

DATA holds ``models/`` and ``data/`` (the shared data). Each finished row is in FILE at once, and a killed run goes on.

**Perplexity** of a window as a decode step by step would give it, computed for all tokens at once: with P protected tokens
and a window of W, the query at position i sees page j (64 tokens from P + 64 j on) in few bits where
``i + 1 - P - W >= 64 (j + 1)``, which is the rule of :mod:`pyquant.nn.kv_cache`, and in 16 bits before. Keys and values are
quantized and read back by :mod:`pyquant.formats.kv4`, and later layers see what earlier ones made of them, as in a decode.
``tests/test_kv_quality.py`` holds this against the cache itself.

**Equal tokens**: the share of greedily generated tokens equal to those of a 16-bit cache, position by position. After the
first difference texts go their own ways, so the mean number of tokens before it is given too.

**Retrieval**: a name given once is asked for at the end, see :mod:`benchmarks.kv_needle`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from benchmarks.kv_needle import measure
from pyquant.formats.kv4 import PAGE, pack_pages, unpack_pages
from pyquant.integrations.data import load_text, windows
from pyquant.integrations.evaluate import perplexity
from pyquant.integrations.files import write_atomic
from pyquant.integrations.kv_cache import NAME, KVCache
from pyquant.integrations.machine import quiet, versions
from pyquant.integrations.transformers import load_causal_lm

MODEL, LENGTH = "classics-llama-28m", 1024
TEXTS = {"books": ("classics/valid.txt", 400_000), "wikitext2": ("wikitext2/wiki.test.raw", 0)}
PROTECTED = ((0, 128), (128, 128))  # (prompt, window)
ARMS: tuple[tuple[int, int, int], ...] = (
    (16, 0, 0),
    *((8, *kept) for kept in PROTECTED),
    *((4, *kept) for kept in ((0, 0), (128, 0), (0, 128), (128, 128))),
    *((bits, *kept) for bits in (3, 2) for kept in PROTECTED),
)  # (bits, prompt, window)
NEEDLE_ARMS = ((16, 0, 0), *((bits, *kept) for bits in (8, 4, 3, 2) for kept in PROTECTED))
NEEDLE_LENGTH = 768  # tokens: further back the model finds little even in 16 bits
PROMPT, NEW = 512, 200  # tokens given and generated, of the comparison of tokens


def in_pages(length: int, prompt: int, window: int, device: torch.device) -> Tensor:
    """Whether the query at i sees the token at j in few bits, bool ``[length, length]``."""
    at = torch.arange(length, device=device)
    pages = ((at + 1 - prompt - window).clamp(min=0)) // PAGE
    return (at >= prompt) & ((at - prompt) // PAGE < pages[:, None])


def emulated_attention(
    bits: int,
    prompt: int,
    window: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a whole text whose tokens are seen as a decode with such a cache would."""
    if attention_mask is not None:
        raise ValueError("the emulation is for texts without padding")
    batch, heads, length, size = query.shape
    low = in_pages(length, prompt, window, query.device)
    full = int(low[-1].sum()) // PAGE
    span = slice(prompt, prompt + PAGE * full)
    packed = pack_pages(key[:, :, span], value[:, :, span], bits)
    low_k, low_v = key.clone(), value.clone()
    if full:
        low_k[:, :, span], low_v[:, :, span] = (t.to(key.dtype) for t in unpack_pages(packed, size))
    q = query.view(batch, key.shape[1], -1, length, size)
    score = torch.where(low, q @ low_k[:, :, None].mT, q @ key[:, :, None].mT) * (scaling or size**-0.5)
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    p = score.float().masked_fill(~causal, -torch.inf).softmax(-1).to(query.dtype)
    out = (p * low) @ low_v[:, :, None] + (p * ~low) @ value[:, :, None]
    return out.view(batch, heads, length, size).transpose(1, 2).contiguous(), None


def emulate(model: nn.Module, prompt: int, window: int, bits: int = 4) -> None:
    """Let a model's forward without a cache see its keys and values as a decode over such a cache would."""
    AttentionInterface.register("kv4-emulated", partial(emulated_attention, bits, prompt, window))
    AttentionMaskInterface.register("kv4-emulated", sdpa_mask)
    model.set_attn_implementation("kv4-emulated")


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, new: int, **settings: Any) -> Tensor:
    """The new tokens of each prompt."""
    model.set_attn_implementation(NAME)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
        past_key_values=KVCache(model.config, **settings),
    )  # fmt: skip
    return out[:, ids.shape[1] :]


def compare(got: Tensor, want: Tensor) -> dict[str, float]:
    """Share of equal tokens, and how many come before the first difference on average."""
    same = got == want
    return {"equal": same.double().mean().item(), "before": same.long().cumprod(1).sum(1).double().mean().item()}


def keep(out: Path, found: dict[str, Any], what: str, rows: list[dict[str, Any]]) -> None:
    """Add finished rows to the results, on disk before this returns."""
    found[what] += rows
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16, help="of each text")
    parser.add_argument("--prompts", type=int, default=20, help="to continue; 0 leaves the comparison of tokens out")
    parser.add_argument("--needles", type=int, default=8, help="of each seed; 0 leaves retrieval out")
    parser.add_argument("--seeds", type=int, default=5, help="of retrieval")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    found: dict[str, Any] = {"meta": {}, "rows": [], "needles": []}
    found |= json.loads(args.out.read_text()) if args.out.exists() else {}
    found["meta"] = {
        "model": MODEL, "length": LENGTH, "windows": args.windows, "prompts": args.prompts, "prompt": PROMPT, "new": NEW,
        "commit": commit or "unknown", "date": datetime.date.today().isoformat(), "gpu": versions(args.device)["device"],
        "torch": torch.__version__, "dtype": "float32", "needles": args.needles, "needle_length": NEEDLE_LENGTH,
    }  # fmt: skip
    done = {(r["bits"], r["prompt"], r["window"]) for r in found["rows"]}
    quiet()
    model, tokenizer = load_causal_lm(str(args.data / "models" / MODEL), torch.float32, args.device)
    cut = {
        name: windows(tokenizer, load_text(str(args.data / "data" / file), skip_chars=skip), LENGTH, args.windows, name)
        for name, (file, skip) in TEXTS.items()
    }
    file, skip = TEXTS["books"]
    book = load_text(str(args.data / "data" / file), skip_chars=skip)[:400_000]
    tokens = tokenizer(book, add_special_tokens=False, verbose=False)["input_ids"] if args.needles else []
    for seed in range(args.seeds if args.needles else 0):
        if all(r["seed"] != seed for r in found["needles"]):
            rows = measure(model, tokenizer, tokens, list(NEEDLE_ARMS), seed, args.needles, NEEDLE_LENGTH)
            keep(args.out, found, "needles", rows)
    ids = cut["books"][: args.prompts, :PROMPT].to(args.device)
    base = greedy(model, ids, NEW, bits=16) if args.prompts else None
    for bits, prompt, window in ARMS:
        if (bits, prompt, window) in done:
            continue
        row: dict[str, Any] = {"bits": bits, "prompt": prompt, "window": window, "perplexity": {}}
        if bits == 16:
            model.set_attn_implementation("sdpa")
        else:
            emulate(model, prompt, window, bits)
        for name, tokens in cut.items():
            row["perplexity"][name] = perplexity(model, tokens, 1)
        if base is not None and bits != 16:
            row |= compare(greedy(model, ids, NEW, bits=bits, prompt_tokens=prompt, window=window), base)
        keep(args.out, found, "rows", [row])


if __name__ == "__main__":
    main()
