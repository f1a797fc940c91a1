"""A prompt's K and V in high precision, everyone else's in few bits: BiSup's horizontal part, and perplexity under it.

After arXiv 2405.15346 (its abstract; the rest is our reading): errors spread from token to token through attention, and the
tokens that all others attend to are those of the system prompt. So the full-precision model computes K and V of the prompt
once, they stay as they are, and every other token's K and V are rounded::

    attn(q) = softmax(q [K_P ; K^]^T / sqrt(d)) [V_P ; V^]

K is rounded after its rotary embedding, each token in groups along all its heads. Under rotations each head is rotated by
the same Hadamard matrix, rounded and rotated back, which is what rotating queries too would compute.

==============  ==========================  =========================
storage         who computes the prompt     its K and V are kept in
==============  ==========================  =========================
``none``        the quantized model         ``kv_bits``, like others
``computed``    the full-precision model    ``kv_bits``
``stored``      the quantized model         16 bits
``both``        the full-precision model    16 bits (the method)
==============  ==========================  =========================

Every arm of a comparison sees the same prompt before the same windows, and only positions of the window count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from pyquant.integrations.evaluate import exp_mean
from pyquant.recipes.rotate import hadamard
from pyquant.recipes.vocabulary import fake_quant_tokens

STORAGES = ("none", "computed", "stored", "both")
SYSTEM = (
    "You are reading a book. Read every sentence with care, keep in mind who is speaking and what has happened so far, "
    "and go on in the same words and in the same manner."
)  # the prompt where none is given: ours


class RoundedLayer(DynamicLayer):
    """A cache layer that rounds what it is given from now on.

    Args:
        bits: 2..8, or 16 for none.
        group_size: along all heads of a token.
        rotated: round each head after a rotation of it.
    """

    def __init__(self, bits: int, group_size: int = 128, rotated: bool = False) -> None:
        super().__init__()
        self.bits, self.group_size, self.rotated = bits, group_size, rotated

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key_states, value_states = (
            round_kv(t, self.bits, self.group_size, self.rotated) for t in (key_states, value_states)
        )
        return super().update(key_states, value_states, *args, **kwargs)


def round_kv(t: Tensor, bits: int, group_size: int = 128, rotated: bool = False) -> Tensor:
    """K or V ``[B, heads, S, D]`` rounded token by token, in groups along heads x D (16 bits: as it is)."""
    if bits == 16:
        return t
    x = hadamard(t) if rotated else t
    b, heads, s, d = x.shape
    x = fake_quant_tokens(x.transpose(1, 2).reshape(b, s, heads * d), bits, group_size)
    x = x.view(b, s, heads, d).transpose(1, 2)
    return hadamard(x, inverse=True) if rotated else x


def prompt_tokens(tokenizer: Any, text: str = SYSTEM, at_most: int | None = None) -> Tensor:
    """The prompt, int64 ``[P]``: the first token of texts (BOS where the tokenizer has one, else EOS) and the text.

    Raises:
        ValueError: a tokenizer without both and an empty text.
    """
    first = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    ids = [] if first is None else [first]
    ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty: the tokenizer has no BOS, and the text has no token")
    return torch.tensor(ids[:at_most], dtype=torch.int64)


@torch.inference_mode()
def prompt_cache(
    model: nn.Module, full: nn.Module, prompt: Tensor, kv_bits: int, storage: str = "both", group_size: int = 128,
    rotated: bool = False,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """K and V of a prompt as they will be kept, a pair ``[1, Hkv, P, D]`` for each layer.

    Args:
        model, full: the quantized and the full-precision model.
        prompt: int64 ``[P]``.
        kv_bits, group_size, rotated: of rounded K and V.
        storage: see above.

    Raises:
        ValueError: an unknown storage.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r} must be one of {', '.join(STORAGES)}")
    who = full if storage in ("computed", "both") else model
    bits = 16 if storage == "stored" else kv_bits
    kept = 16 if who is full else bits  # what the prompt's own tokens attend to while it is computed
    cache = empty_cache(full, kept, group_size, rotated)
    device = next(who.parameters()).device
    who(input_ids=prompt[None].to(device), past_key_values=cache, use_cache=True)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    if storage == "computed":
        pairs = [tuple(round_kv(t, kv_bits, group_size, rotated) for t in pair) for pair in pairs]  # type: ignore[misc]
    return pairs


@torch.inference_mode()
def prompted_perplexity(
    model: nn.Module,
    windows: Tensor,
    pairs: list[tuple[Tensor, Tensor]],
    kv_bits: int = 16,
    group_size: int = 128,
    rotated: bool = False,
    batch_size: int = 4,
) -> float:
    """Perplexity of windows behind a prompt whose K and V are given; its positions do not count.

    Args:
        model: a causal LM.
        windows: int64 ``[n, T]``, prompt and window within the model's context; T - 1 predictions each, as without a prompt.
        pairs: of :func:`prompt_cache`.
        kv_bits, group_size, rotated: of the K and V of the windows' tokens.
        batch_size: windows at once.

    Raises:
        ValueError: NaN logits.
    """
    device = next(model.parameters()).device
    sums = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(windows), batch_size):
        tokens = windows[start : start + batch_size].to(device)
        cache = filled(model, pairs, len(tokens), kv_bits, group_size, rotated)
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        for row, target in zip(logits[:, :-1], tokens[:, 1:], strict=True):
            sums += nn.functional.cross_entropy(row.float(), target, reduction="sum").double()
    return exp_mean(sums.item(), windows)


def filled(
    model: nn.Module,
    pairs: list[tuple[Tensor, Tensor]],
    batch: int,
    kv_bits: int = 16,
    group_size: int = 128,
    rotated: bool = False,
) -> Cache:
    """A cache that begins with the given pairs, exactly, for each of a batch, and rounds what comes after."""
    cache = empty_cache(model, 16, group_size, rotated)
    for layer, (keys, values) in zip(cache.layers, pairs, strict=True):
        layer.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1))
        layer.bits = kv_bits
    return cache


def empty_cache(model: nn.Module, bits: int, group_size: int = 128, rotated: bool = False) -> Cache:
    """A cache for a model, of layers that round what they are given."""
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    return Cache(layers=[RoundedLayer(bits, group_size, rotated) for _ in range(count)])
