"""Small models made on the spot, and the way to the shared data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # the models are too small for more, and waking threads costs more than the work

VOCAB = 288
HIDDEN = 64


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two layers, hidden 64, grouped heads, tied embeddings: each layer divides into groups of 32."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.2,  # weights large enough that every logit depends on every layer
    }
    return LlamaConfig(**{**fields, **changes})


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A random Llama; random norms too, so that a lost norm shows."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p)) if "norm" in name else p.normal_()
    return model.to(dtype)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: ids 1..256, 0 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_tiny(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A model folder as a user has it."""
    tiny_llama(dtype=dtype, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def some_tokens(n: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random tokens ``[n, length]``."""
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def learnable_tokens(n: int = 24, length: int = 16, seed: int = 2) -> torch.Tensor:
    """Sequences that count upwards from a random start, so that there is something to learn."""
    start = torch.randint(0, 200, (n, 1), generator=torch.Generator().manual_seed(seed))
    return start + torch.arange(length)


def shared(*parts: str) -> Path:
    """A path of the shared data (``PYQUANT_DATA``, or ``../shared`` beside the repository); skips where absent."""
    root = Path(os.environ.get("PYQUANT_DATA") or Path(__file__).resolve().parents[2] / "shared")
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the shared data (PYQUANT_DATA)")
    return path
