"""Text from files or from the Hugging Face Hub, cut into windows of tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXT_SUFFIXES = (".txt", ".md", ".raw", ".tokens")
JOINT = "\n\n"  # between documents, the convention of WikiText perplexities


def load_text(source: str, field: str = "text", split: str = "train", skip_chars: int = 0) -> str:
    """Read one long text.

    Args:
        source: a text file (.txt, .md, .raw, .tokens, UTF-8), a .jsonl file, a folder of such files (read in the order
            of their names), or a dataset of the Hub, ``"org/name"`` or ``"org/name:config"``. Documents (files, lines
            of a .jsonl, rows of a dataset) are joined by a blank line.
        field: column of a .jsonl or dataset that holds the text.
        split: split of a dataset.
        skip_chars: characters to drop from the beginning.

    Raises:
        FileNotFoundError: nothing there, and not the name of a dataset.
        ValueError: an unknown suffix, text that is not UTF-8, a broken line or missing field, or fewer than
            ``skip_chars`` characters.
        ImportError: a dataset is asked for and the package ``datasets`` is absent.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (*TEXT_SUFFIXES, ".jsonl"))
        if not files:
            raise ValueError(f"{source} has no {', '.join(TEXT_SUFFIXES)} or .jsonl file")
        text = JOINT.join(_read(p, field) for p in files)
    elif path.is_file():
        text = _read(path, field)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) and path.suffix not in (*TEXT_SUFFIXES, ".jsonl"):
        text = _read_dataset(source, field, split)
    else:
        raise FileNotFoundError(
            f"{source} is neither a file, nor a folder, nor the name of a dataset (org/name[:config])"
        )
    if skip_chars < 0:
        raise ValueError(f"skip_chars={skip_chars} must not be negative")
    if skip_chars >= len(text):
        raise ValueError(f"{source} has {len(text):,} characters: nothing is left after skipping {skip_chars:,}")
    return text[skip_chars:]


def _read(path: Path, field: str) -> str:
    if path.suffix not in (*TEXT_SUFFIXES, ".jsonl"):
        raise ValueError(f"{path} is not text: use {', '.join(TEXT_SUFFIXES)} or .jsonl")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is invalid") from None
    if path.suffix != ".jsonl":
        return text
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        documents.append(_field(row, field, f"{path} line {number}"))
    return JOINT.join(documents)


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        known = ", ".join(k for k, v in row.items() if isinstance(v, str)) if isinstance(row, dict) else "none"
        raise ValueError(f"{where} has no text field {field!r} (text fields: {known})")
    return row[field]


def _read_dataset(source: str, field: str, split: str) -> str:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{source} is not a local file; reading it from the Hub needs: pip install datasets"
        ) from None
    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        raise FileNotFoundError(f"the dataset {source} (split {split!r}) cannot be loaded: {error}") from error
    if field not in rows.column_names:
        raise ValueError(f"{source} has no text field {field!r} (columns: {', '.join(rows.column_names)})")
    return JOINT.join(rows[field])


def windows(tokenizer: Any, text: str, length: int, count: int | None = None, source: str = "text") -> Tensor:
    """Cut a text into windows of tokens, from its beginning, one after another; the rest that fills no window is
    dropped.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        text: the text, tokenized as one piece.
        length: tokens a window, at least 2.
        count: how many windows; None takes all.
        source: what the text is called in errors.

    Returns:
        int64 ``[n, length]``; n is smaller than count where the text ends before.

    Raises:
        ValueError: when the text does not fill one window, with the numbers.
    """
    if length < 2 or (count is not None and count < 1):
        raise ValueError(f"length={length} must be at least 2 and count={count} at least 1")
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    n = len(ids) // length
    if n == 0:
        raise ValueError(
            f"{source} has {len(ids):,} tokens ({len(text):,} characters), too few for one window of {length:,}"
        )
    n = n if count is None else min(n, count)
    return torch.tensor(ids[: n * length], dtype=torch.int64).view(n, length)
