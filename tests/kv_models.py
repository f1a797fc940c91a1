"""Small models of the families that KVCache serves, and two ways to run them over a cache."""

from __future__ import annotations

import torch
from tiny import tiny_config, tiny_llama
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LENGTH = 512


def make(family, **changes):
    torch.manual_seed(0)
    changes = {"max_position_embeddings": LENGTH, "num_hidden_layers": 2, **changes}
    if family == "llama":
        return tiny_llama(**changes)
    fields = {**tiny_config(**changes).to_dict(), "head_dim": 16, **changes}
    for name in ("model_type", "architectures", "layer_types"):
        fields.pop(name, None)
    kind, config = {
        "qwen3": (Qwen3ForCausalLM, Qwen3Config),
        "mistral": (MistralForCausalLM, MistralConfig),
        "gpt-oss": (GptOssForCausalLM, GptOssConfig),
    }[family]
    if family == "gpt-oss":  # sinks, a sliding window in every other layer
        fields |= {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 60,
            "intermediate_size": 64,
            **changes,
        }
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    if family == "mistral":
        fields.setdefault("sliding_window", None)
    return kind(config(**fields)).eval()


def run(model, ids, cache=None, new=40, attention="pyquant", **how):
    model.set_attn_implementation(attention)
    how = {"attention_mask": torch.ones_like(ids), **how}
    with torch.no_grad():
        return model.generate(
            ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, past_key_values=cache, **how
        )


def logits_of(model, ids, cache, attention, prompt, chunk=1):
    """Logits of all tokens after the prompt, ``chunk`` tokens a call."""
    model.set_attn_implementation(attention)
    found = []
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        for i in range(prompt, ids.shape[1], chunk):
            found.append(model(ids[:, i : i + chunk], past_key_values=cache).logits)
    return torch.cat(found, 1)
