"""A model folder small enough to be trained in a test (tiny.py has untrained ones), and text that is nobody's."""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path

import torch

from pyquant.integrations.train_demo import build_model, encode, save, train, train_tokenizer

WORDS = ["the", "old", "red", "fox", "sat", "by", "a", "river", "and", "saw", "seven", "small", "boats", "pass"]
WORDS += ["under", "that", "low", "bridge", "at", "noon", "in", "rain"]


def tiny_text(sentences: int, seed: int = 0) -> str:
    """Sentences of three to nine words; a word is followed by one of three, so that there is something to learn."""
    draw = random.Random(seed)
    lines = []
    for _ in range(sentences):
        places = [draw.randrange(len(WORDS))]
        for _ in range(draw.randint(2, 8)):
            places.append((places[-1] * 2 + draw.choice((1, 3, 8))) % len(WORDS))
        lines.append(" ".join(WORDS[i] for i in places) + ".")
    return "\n".join(lines)


def make_tiny_model(folder: Path, seed: int = 0, steps: int = 150, hidden: int = 64, ffn: int = 96) -> Path:
    """A Llama trained for seconds: every K a multiple of 32, 2 layers, tied embeddings."""
    torch.set_num_threads(1)  # so small that threads only wait for each other
    torch.manual_seed(seed)
    text = tiny_text(1500, seed)
    tokenizer = train_tokenizer([text], 300)
    model = build_model(len(tokenizer), hidden=hidden, ffn=ffn, layers=2)
    tokens = encode(tokenizer, [text])
    how = Namespace(steps=steps, batch=8, length=48, lr=5e-3, seed=seed, compile=False, log_every=10**9)
    train(model, tokens, tokens, how)
    save(model, tokenizer, folder)
    return folder
