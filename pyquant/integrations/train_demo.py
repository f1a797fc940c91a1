"""Train the model that ``pyquant demo`` quantizes: a byte-level BPE and a 3.7 M parameter Llama, from one text file.

    python -m pyquant.integrations.train_demo --text books.txt --out pyquant/demo

The text is plain English with ``<|endoftext|>`` between documents; the model that ships with pyquant was trained on
public-domain books. 6000 steps of 64 x 512 tokens take a few minutes on one data-centre GPU; a CPU does a few steps a
minute, enough to try the script (``--steps 5 --batch 4``). The same text, seed and machine give the same model.

Why this shape: every K (256, 768) is a multiple of every group size, grouped-query attention and tied embeddings are
both there because real models have them, and in bf16 it stays under 8 MB.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
CONTEXT = 512


def train_tokenizer(documents: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab`` entries, entry 0 being ``<|endoftext|>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents as one row of tokens, int64 ``[T]``, each document preceded by ``<|endoftext|>``."""
    rows = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor([tokenizer.bos_token_id, *row]) for row in rows])


def build_model(vocab: int, hidden: int = 256, ffn: int = 768, layers: int = 4) -> LlamaForCausalLM:
    """The untrained model, fp32."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def loss_of(model: torch.nn.Module, batch: Tensor) -> Tensor:
    """Mean next-token cross entropy of tokens ``[B, T + 1]``, in fp32."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_perplexity(model: torch.nn.Module, tokens: Tensor, length: int, batch: int, most: int = 256) -> float:
    """exp of the mean loss over at most ``most`` windows from the start of ``tokens``."""
    count = min(most, (len(tokens) - 1) // length)
    if count < 1:
        raise ValueError(f"the held-out text has {len(tokens)} tokens, too few for one window of {length} + 1")
    rows = torch.stack([tokens[i * length : (i + 1) * length + 1] for i in range(count)])
    model.eval()
    total = sum(loss_of(model, part).item() * len(part) for part in rows.split(batch))
    model.train()
    return math.exp(total / count)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine that ends at 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, tokens: Tensor, held_out: Tensor, args: argparse.Namespace) -> None:
    """The loop. Windows are drawn at random places of ``tokens``, which live on the model's device."""
    device = tokens.device
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    run = torch.compile(model) if args.compile else model
    generator = torch.Generator().manual_seed(args.seed)
    window = torch.arange(args.length + 1, device=device)
    warmup = min(200, max(1, args.steps // 10))
    model.train()
    began = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, warmup)
        start = torch.randint(0, len(tokens) - args.length, (args.batch,), generator=generator)
        batch = tokens[start.to(device, non_blocking=True)[:, None] + window]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(run, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or step == 0 or last:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}/{args.steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)
        if (step + 1) % 1000 == 0 and not last:
            print(
                f"step {step + 1}  held-out PPL {held_out_perplexity(model, held_out, args.length, 16):.3f}", flush=True
            )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """bf16 safetensors, config, generation config and tokenizer into ``out``."""
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, do_sample=True, temperature=0.8, top_p=0.95
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which a package must not ship


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, required=True, help="UTF-8 text, <|endoftext|> between documents")
    p.add_argument("--out", type=Path, required=True, help="folder for the model; existing files are replaced")
    p.add_argument("--steps", type=int, default=6000)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--length", type=int, default=CONTEXT, help="tokens in a training window")
    p.add_argument("--lr", type=float, default=3e-3, help="peak of the cosine")
    p.add_argument("--vocab", type=int, default=2048)
    p.add_argument("--held-out", type=float, default=0.03, help="share of the text, from its end, kept for measuring")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--log-every", type=int, default=100)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Tokenizer, training, held-out perplexity of the saved bf16 weights."""
    args = parse(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products on a GPU ask for
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(args.seed)
    text = args.text.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - args.held_out))
    parts = [[d.strip("\n") for d in half.split(END) if d.strip()] for half in (text[:cut], text[cut:])]
    began = time.perf_counter()
    tokenizer = train_tokenizer(parts[0], args.vocab)
    tokens, held_out = (encode(tokenizer, part).to(args.device) for part in parts)
    print(
        f"{len(tokens):,} training tokens, {len(held_out):,} held out, {time.perf_counter() - began:.0f} s", flush=True
    )
    if len(tokens) <= args.length:
        raise SystemExit(f"{args.text} has {len(tokens)} tokens, too few for windows of {args.length} + 1")
    model = build_model(len(tokenizer)).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.device}", flush=True)
    train(model, tokens, held_out, args)
    save(model, tokenizer, args.out)
    model.float()  # what was saved, rounded to bf16, computed in fp32
    perplexity = held_out_perplexity(model, held_out, args.length, 16)
    size = sum(f.stat().st_size for f in args.out.iterdir()) / 1e6
    print(f"held-out PPL {perplexity:.3f} after rounding to bf16; {size:.1f} MB in {args.out}", flush=True)


if __name__ == "__main__":
    main()
