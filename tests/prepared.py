"""Small models of each family for the tests of prepare_for_inference, and what watches a call of generate."""

from __future__ import annotations

import torch
from tiny import tiny_config, tiny_llama
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.streamers import BaseStreamer

import pyquant
from pyquant import QuantSpec

FIELDS = {k: v for k, v in tiny_config(max_position_embeddings=512).to_dict().items() if k in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "initializer_range",
)}  # fmt: skip
SHARED = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 2, "head_dim": 32}


def make(kind: str = "llama", quantized: bool = True, **changes):
    """A random model with random norms and biases, its linear layers 4 bits."""
    torch.manual_seed(1)
    fields = {**FIELDS, **changes}
    if kind == "llama":
        model = tiny_llama(**{"max_position_embeddings": 512, **changes})
    else:
        config, cls = {
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
        }[kind]
        model = cls(config(**fields)).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() == 1:
                    p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else 0.2 * torch.randn_like(p))
    if quantized:
        pyquant.swap(model, QuantSpec(4, 32))
    model.generation_config.pad_token_id = 1
    return model.requires_grad_(False)


KINDS = {
    "llama": {},
    "llama shared": SHARED,
    "llama rope": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "qwen2": SHARED,
    "qwen2 window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, **SHARED},
    "qwen3": SHARED,
    "mistral": {"sliding_window": None, **SHARED},
    "mistral window": {"sliding_window": 7, **SHARED},
}  # fmt: skip


def left_padded(ids, padding):
    mask = torch.ones_like(ids)
    for row, n in enumerate(padding):
        ids[row, :n], mask[row, :n] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


class Collect(BaseStreamer):
    def __init__(self):
        self.got, self.over = [], False

    def put(self, value):
        assert value.device.type == "cpu"
        self.got.append(value.tolist())

    def end(self):
        self.over = True
