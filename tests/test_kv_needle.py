"""The retrieval test of benchmarks/kv_needle.py: its texts, its figures, and that a cache answers as it should."""

from __future__ import annotations

import pytest
import torch
from kv_models import make
from tiny import some_tokens

from benchmarks import kv_needle
from benchmarks.kv_needle import DEPTHS, Needle, ask, make_needle, score, summary


class Words:
    """A tokenizer of whole words."""

    def __init__(self):
        self.words = [" The", " stranger", " was", " called", ".", " Bor", " Ada", "win", "gate"]
        self.words += [f"q{c}x" for c in "abcdefghijklmnopqrst"]

    def __len__(self):
        return len(self.words)

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)

    def __call__(self, text, **how):
        ids = []
        while text:
            i = next(i for i, w in enumerate(self.words) if text.startswith(w))
            ids.append(i)
            text = text[len(self.words[i]) :]
        return {"input_ids": ids}


def test_a_needle():
    """The sentence stands at its depth in an unchanged text, the question is its beginning, and seeds draw others."""
    words, book = Words(), [100 + i for i in range(500)]
    found = make_needle(words, book, 1, 2, 300)
    needle = [*found.question.tolist(), found.right[1], words.words.index(".")]
    assert words.decode(needle[:4]) == kv_needle.SENTENCE
    assert found.question[-1] == found.right[0] and len(found.question) == 6
    assert found.texts.shape == (len(DEPTHS), 300 - 6) and found.bare.shape == (300 - 6 - 8,)
    for row, depth in zip(found.texts.tolist(), DEPTHS, strict=True):
        at = int(depth * len(found.bare))
        assert row[at : at + 8] == needle and row[:at] + row[at + 8 :] == found.bare.tolist()
    for right, others in zip(found.right, found.others, strict=True):
        assert len(set(others)) == 15 and right not in others
    same, other = make_needle(words, book, 1, 2, 300), make_needle(words, book, 2, 2, 300)
    assert torch.equal(same.texts, found.texts) and same.right == found.right
    assert not torch.equal(other.bare, found.bare)


def test_scores():
    """A token that gains two nats is worth two and comes first; one that was likely before and gains nothing does not."""
    bare = torch.zeros(2, 50)
    bare[:, 40:] = 3.0
    needle = Needle(
        torch.zeros(1, 1), torch.zeros(1), torch.zeros(6), [7, 8], [list(range(10, 25)), list(range(30, 45))]
    )
    logits = bare.expand(2, 2, 50).clone()
    logits[0, 0, 7] += 2
    logits[0, 1, 8] += 4
    logits[1, :, 40] += 5
    found = score(torch.cat([torch.randn(2, 4, 50), logits], 1), needle, bare)
    norms = bare.logsumexp(-1) - logits.logsumexp(-1)
    assert found["gain"] == pytest.approx([(6 + norms[0].sum().item()) / 2, norms[1].sum().item() / 2], abs=1e-5)
    assert found["first"] == [1.0, 0.0]


@pytest.fixture(scope="module")
def tiny():
    ids = some_tokens(6, 300)
    return make("llama"), Needle(ids[:3], ids[4, :290], ids[5, :6], [3, 5], [list(range(10, 25)), list(range(30, 45))])


def test_a_cache_answers_as_the_whole_text_does(tiny):
    """16 bits, and few bits under a protected prompt that holds everything: the figures of a forward without a cache."""
    model, needle = tiny
    exact, protected, few, fewer = ask(model, needle, [(16, 0, 0), (2, 300, 0), (8, 0, 0), (2, 0, 0)])
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        whole = [model(torch.cat([t, needle.question])[None]).logits[0] for t in (*needle.texts, needle.bare)]
    want = score(torch.stack([t[-6:] for t in whole[:3]]), needle, whole[3])
    assert exact["gain"] == pytest.approx(want["gain"], abs=1e-3)  # fp32 in another order, logits of size ten
    assert exact["first"] == want["first"]
    assert protected == exact
    off = [max(abs(a - b) for a, b in zip(t["gain"], exact["gain"], strict=True)) for t in (few, fewer)]
    assert off[0] < 0.2 < off[1], off


def test_questions_are_one_step(tiny):
    model, needle = tiny
    long = Needle(needle.texts, needle.bare, needle.texts[0, :9], needle.right, needle.others)
    with pytest.raises(ValueError, match="a question of 9 tokens is longer than a step of 8"):
        ask(model, long, [(16, 0, 0)])


def test_summary_pairs_seeds():
    row = lambda bits, seed, gain: {  # noqa: E731
        "bits": bits, "prompt": 0, "window": 128, "seed": seed, "gain": [gain] * len(DEPTHS), "first": [0.5] * len(DEPTHS)
    }  # fmt: skip
    rows = [row(16, 0, 5.0), row(4, 1, 0.9), row(4, 0, 4.9), row(16, 1, 1.0)]
    (_, base, _), (key, change, first) = summary(rows)
    assert base[0]["mean"] == 3.0 and base[0]["half"] > 20
    assert key == (4, 0, 128)
    assert change[2]["mean"] == pytest.approx(-0.1) and change[2]["half"] == pytest.approx(0, abs=1e-6)
    assert first["mean"] == 50
