"""Text and windows."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny import byte_tokenizer

from pyquant.integrations.data import load_text, windows


def test_files_folders_and_jsonl(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first é")
    (tmp_path / "c.jsonl").write_text('{"text": "third", "n": 1}\n\n{"text": "fourth\\nline"}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert load_text(str(tmp_path / "b.txt")) == "second"
    assert load_text(str(tmp_path / "b.txt"), skip_chars=3) == "ond"
    assert load_text(str(tmp_path / "c.jsonl")) == "third\n\nfourth\nline"
    assert load_text(str(tmp_path)) == "first é\n\nsecond\n\nthird\n\nfourth\nline"


def test_refusals_are_sentences(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "ok"}\n{"story": "no"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "ok"}\n{"text": \n')
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "x.pdf").write_bytes(b"")
    (tmp_path / "short.txt").write_text("12345")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("x.jsonl", r"x\.jsonl line 2 has no text field 'text' \(text fields: story\)"),
        ("broken.jsonl", r"line 2 is not JSON"),
        ("latin.txt", r"not UTF-8 text: byte 3"),
        ("x.pdf", r"x\.pdf is not text: use \.txt"),
        ("empty", r"has no \.txt"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_text(str(tmp_path / name))
    with pytest.raises(ValueError, match="has 5 characters: nothing is left after skipping 5"):
        load_text(str(tmp_path / "short.txt"), skip_chars=5)
    for missing in (str(tmp_path / "nothing.txt"), "some/dir/nothing", "corpus/nothing.txt"):
        with pytest.raises(FileNotFoundError, match="neither a file, nor a folder, nor the name of a dataset"):
            load_text(missing)


def test_datasets_are_named_and_optional(tmp_path, monkeypatch):
    calls = []

    class Rows(dict):
        column_names = ("text",)

    class Fake:
        @staticmethod
        def load_dataset(name, config, split):
            calls.append((name, config, split))
            return Rows(text=["a", "b"])

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert load_text("org/name:conf", split="test") == "a\n\nb"
    assert load_text("org/name") == "a\n\nb"
    assert calls == [("org/name", "conf", "test"), ("org/name", None, "train")]
    with pytest.raises(ValueError, match=r"no text field 'story' \(columns: text\)"):
        load_text("org/name", field="story")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_text("org/name")


def test_real_datasets_reads_a_local_repository(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "set").mkdir(parents=True)
    (tmp_path / "org" / "set" / "train.json").write_text(json.dumps({"text": "row"}) + "\n")
    from pyquant.integrations.data import _read_dataset

    assert _read_dataset("org/set", "text", "train") == "row"


def test_windows():
    tokenizer = byte_tokenizer()
    text = "".join(chr(65 + i % 26) for i in range(50))
    all_ids = tokenizer(text)["input_ids"]
    assert len(all_ids) == 50
    w = windows(tokenizer, text, 8)
    assert w.dtype == torch.int64
    assert w.shape == (6, 8)
    assert w.flatten().tolist() == all_ids[:48]
    assert torch.equal(windows(tokenizer, text, 8, 2), w[:2])
    assert windows(tokenizer, text, 8, 99).shape == (6, 8)
    with pytest.raises(ValueError, match=r"novel has 50 tokens \(50 characters\), too few for one window of 64"):
        windows(tokenizer, text, 64, source="novel")
    for length, count in ((1, None), (8, 0)):
        with pytest.raises(ValueError, match="at least"):
            windows(tokenizer, text, length, count)
