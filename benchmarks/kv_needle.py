"""Retrieval over a long context, as far as a small language model can: a made-up name, given once, is asked for at the end.

A text of a book, somewhere in it one sentence more, and at the end that sentence's beginning again::

    ... The stranger was called Bor|win|gate. ...            ... The stranger was called Bor -> win -> gate

The pieces of the name are drawn at random, so that nothing but the sentence tells them. Two figures, over the two pieces that
follow the first: **gain**, how many nats their log-probability lies above that in the same text without the sentence; and
**first of 16**, how often the right piece gains more than each of 15 others drawn at random.

The text is a prompt: attended to in 16 bits, packed afterwards, and read by the question through the cache. So all caches of
one text hold the same keys and values, and their differences are those of bits alone. Texts, places and names of a seed are
the same for every cache.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pyquant.integrations.kv_cache import NAME, KVCache
from pyquant.integrations.spread import spread
from pyquant.nn.kv_cache import MOST_AT_ONCE

SENTENCE = " The stranger was called"
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the needle in the text
OTHERS = 15


@dataclass(frozen=True)
class Needle:
    """A text with a needle at each depth, the question, and what is right.

    Attributes:
        texts: int64 ``[depths, L]``; bare: the text without the needle, int64 ``[L']``.
        question: int64 ``[n]``; the logits of its last two tokens are looked at.
        right: the two tokens that should follow; others: those they are compared with, ``[2][15]``.
    """

    texts: Tensor
    bare: Tensor
    question: Tensor
    right: list[int]
    others: list[list[int]]


def pieces(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that begin a name, and tokens that go on with it."""
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    begin = [
        i for i, w in enumerate(words) if w[:1] == " " and w[1:].isalpha() and w[1:].istitle() and 3 <= len(w) <= 5
    ]
    goes_on = [i for i, w in enumerate(words) if w.isalpha() and w.islower() and 3 <= len(w) <= 6]
    return begin, goes_on


def make_needle(
    tokenizer: Any, ids: list[int], seed: int, number: int, length: int, depths: tuple[float, ...] = DEPTHS
) -> Needle:
    """The needle that a seed and a number stand for.

    Args:
        tokenizer: of the model.
        ids: tokens of a book, more than ``length``.
        seed, number: draw text, name and others.
        length: tokens of text, needle and question together.
        depths: shares of the text before the needle.
    """
    draw = random.Random(1000 * seed + number)
    begin, goes_on = pieces(tokenizer)
    name = [draw.choice(begin), *draw.sample(goes_on, 2)]
    sentence = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    stop = tokenizer(".", add_special_tokens=False)["input_ids"]
    question, needle = [*sentence, *name[:2]], [*sentence, *name, *stop]
    size = length - len(needle) - len(question)
    at = draw.randrange(len(ids) - size)
    hay = ids[at : at + size]
    texts = [[*hay[: int(d * size)], *needle, *hay[int(d * size) :]] for d in depths]
    others = [draw.sample([t for t in goes_on if t != right], OTHERS) for right in name[1:]]
    return Needle(*(torch.tensor(t) for t in (texts, hay, question)), name[1:], others)


def filled(model: nn.Module, computed: DynamicCache, bits: int, prompt: int, window: int) -> KVCache:
    """A cache that was given computed keys and values by one call."""
    cache = KVCache(model.config, bits, prompt, window)
    for layer, given in zip(cache.layers, computed.layers, strict=True):
        layer.lazy_initialization(given.keys, given.values)
        layer.kept.add(given.keys, given.values)
    return cache


def score(logits: Tensor, needle: Needle, bare: Tensor) -> dict[str, list[float]]:
    """Gain and share of first places at each depth, from a question's logits ``[depths, n, V]`` and the bare text's
    ``[n, V]``."""
    gain = logits[:, -2:].float().log_softmax(-1) - bare[-2:].float().log_softmax(-1)
    right = torch.stack([gain[:, i, t] for i, t in enumerate(needle.right)], 1)
    most = torch.stack([gain[:, i, t].amax(-1) for i, t in enumerate(needle.others)], 1)
    return {"gain": right.mean(1).tolist(), "first": (right > most).double().mean(1).tolist()}


@torch.no_grad()
def ask(model: nn.Module, needle: Needle, arms: list[tuple[int, int, int]]) -> list[dict[str, list[float]]]:
    """Gain and share of first places at each depth, for each arm ``(bits, prompt, window)``.

    Raises:
        ValueError: a question of more tokens than one step takes.
    """
    device = next(model.parameters()).device
    if len(needle.question) > MOST_AT_ONCE:
        raise ValueError(f"a question of {len(needle.question)} tokens is longer than a step of {MOST_AT_ONCE}")
    texts, question = needle.texts.to(device), needle.question.to(device)[None]
    model.set_attn_implementation("sdpa")
    bare = model(torch.cat([needle.bare.to(device)[None], question], 1), use_cache=False, logits_to_keep=2).logits[0]
    computed = DynamicCache(config=model.config)
    model(texts, past_key_values=computed, logits_to_keep=1)
    model.set_attn_implementation(NAME)
    found = []
    for arm in arms:
        cache = filled(model, computed, *arm)
        found.append(score(model(question.expand(len(texts), -1), past_key_values=cache).logits, needle, bare))
    return found


def measure(
    model: nn.Module,
    tokenizer: Any,
    ids: list[int],
    arms: list[tuple[int, int, int]],
    seed: int,
    count: int,
    length: int,
) -> list[dict[str, Any]]:
    """Means over the needles of one seed, a row an arm."""
    found = [ask(model, make_needle(tokenizer, ids, seed, n, length), arms) for n in range(count)]
    return [
        {"bits": bits, "prompt": prompt, "window": window, "seed": seed, "needles": count}
        | {what: [sum(f[i][what][d] for f in found) / count for d in range(len(DEPTHS))] for what in ("gain", "first")}
        for i, (bits, prompt, window) in enumerate(arms)
    ]


def summary(rows: list[dict[str, Any]]) -> Iterator[tuple[tuple[int, int, int], list[dict], dict]]:
    """Of each arm: gains at each depth, of arms below 16 bits as change against 16 bits of the same seed, and the share of
    first places over all depths; mean and half of the 95 % interval over seeds."""
    groups: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: r["seed"]):
        groups.setdefault((row["bits"], row["prompt"], row["window"]), []).append(row)
    base = {r["seed"]: r["gain"] for key, found in groups.items() if key[0] == 16 for r in found}
    for key, found in groups.items():
        gains = [
            spread([r["gain"][d] - (0.0 if key[0] == 16 else base[r["seed"]][d]) for r in found])
            for d in range(len(DEPTHS))
        ]
        yield key, gains, spread([100 * sum(r["first"]) / len(DEPTHS) for r in found])
