"""From a transformers model to the parts of a :class:`pyquant.nn.decoder.Decoder`, or the reason why not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.nn.decoder import Decoder, Layer
from pyquant.nn.fused import FusedLinear
from pyquant.nn.linear import QLinear
from pyquant.nn.parallel import RowQLinear

log = logging.getLogger("pyquant")

CLASSES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")
# Rotary tables that depend on the position alone; others ("dynamic", "longrope") change with the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
PACKED = (QLinear, RowQLinear)  # a subclass of another kind may compute something else


class Unsupported(Exception):
    """Why a model, or a call of generate, is left to transformers."""


def need(condition: bool, reason: str) -> None:
    """Raise Unsupported(reason) unless condition."""
    if not condition:
        raise Unsupported(reason)


def read_decoder(model: nn.Module, head_bits: int = 16) -> Decoder:
    """The parts of a causal language model; q, k, v and gate, up become one weight each (see FusedLinear).

    Args:
        model: a transformers model.
        head_bits: 16 uses the head as it is; 4 rounds a copy of it to 4 bits in groups of 128.

    Raises:
        Unsupported: for anything but Llama, Qwen2, Qwen3 and Mistral as transformers builds them, in words.
    """
    config = getattr(model, "config", None)
    need(type(model).__name__ in CLASSES, f"{type(model).__name__} is none of {', '.join(CLASSES)}")
    need(config.hidden_act == "silu", f"its activation is {config.hidden_act}, not silu")
    rope = model.model.rotary_emb.rope_type
    need(rope in ROPE_TYPES, f"its rotary embedding is {rope!r}, none of {', '.join(ROPE_TYPES)}")
    tensors = list(weights(model))
    devices = sorted({str(t.device) for t in tensors})
    need(len(devices) == 1 and devices[0] != "meta", f"its weights are on {', '.join(devices)}, not on one device")
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    need(len(dtypes) == 1, f"its weights have several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    layers = [_read_layer(layer, i) for i, layer in enumerate(model.model.layers)]
    copied = sum(layer.qkv.copied + layer.gate_up.copied for layer in layers)
    if copied:
        log.info("%d fused projections keep a second copy of their weights: their sizes are no multiples of 64", copied)
    attention = model.model.layers[0].self_attn
    return Decoder(
        embed=model.model.embed_tokens,
        layers=layers,
        norm=model.model.norm.weight,
        head=_head(model.lm_head, head_bits),
        rotary=_tables(model.model.rotary_emb, model.model.norm.weight, attention.head_dim),
        kv_heads=attention.k_proj.out_features // attention.head_dim,  # of this process, where heads are shared out
        size=attention.head_dim,
        scaling=attention.scaling,
        eps=model.model.norm.variance_epsilon,
    )


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model by its name, packed ones as they lie in memory."""
    for name, module in model.named_modules():
        for own, t in _tensors(module).items():
            yield f"{name}.{own}", t


def weights(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that the fused step reads from the model's modules."""
    return (t for _, t in named_weights(model))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    held = {**module._parameters, **(module._buffers if type(module) in PACKED else {})}
    return {name: t for name, t in held.items() if t is not None}


class Snapshot:
    """Which modules and tensors a model holds, to notice when it is moved, cast, written to, or given other modules.

    The check walks flat lists, as it stands before every call of generate: 0.2 ms for 32 layers. The tensors are kept, so
    that no address is given away meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self.links: list[tuple[dict[str, Any], str, Any]] = []
        self.tensors: list[tuple[Tensor, int, int]] = []
        for module in model.modules():
            self.links += [(module._modules, name, child) for name, child in module._modules.items()]
            for name, t in _tensors(module).items():
                self.links.append((module._parameters if name in module._parameters else module._buffers, name, t))
                self.tensors.append((t, t.data_ptr(), _version(t)))

    def holds(self) -> bool:
        """Whether all is as it was."""
        return all(held.get(name) is value for held, name, value in self.links) and all(
            t.data_ptr() == address and _version(t) == version for t, address, version in self.tensors
        )


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # inference tensors count none


def _read_layer(layer: nn.Module, index: int) -> Layer:
    attention, mlp, where = layer.self_attn, layer.mlp, f"layer {index}"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        _check_linear(getattr(attention, name), f"{where}.{name}")
    for name in ("gate_proj", "up_proj", "down_proj"):
        _check_linear(getattr(mlp, name), f"{where}.{name}")
    eps = {layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon}
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    for norm in (q_norm, k_norm):
        if norm is not None:
            eps.add(norm.variance_epsilon)
    need(len(eps) == 1, f"{where} has norms of several eps: {sorted(eps)}")
    window = getattr(attention, "sliding_window", None)
    if type(attention).__name__ == "MistralAttention":  # keeps it in the config only
        window = getattr(attention.config, "sliding_window", None)
    return Layer(
        qkv=FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj]),
        o=attention.o_proj,
        gate_up=FusedLinear([mlp.gate_proj, mlp.up_proj]),
        down=mlp.down_proj,
        before_attention=layer.input_layernorm.weight,
        before_mlp=layer.post_attention_layernorm.weight,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        window=window or 0,
    )


def _check_linear(module: nn.Module, name: str) -> None:
    need(type(module) in (*PACKED, nn.Linear), f"{name} is a {type(module).__name__}, neither QLinear nor nn.Linear")
    need(type(module) is nn.Linear or module.prepared, f"{name} holds no weight yet")
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    need(not hooked, f"{name} has hooks, which fused layers would pass by")


def _head(head: nn.Module, bits: int) -> Callable[[Tensor], Tensor]:
    if bits == 16 or type(head) is QLinear:
        return head
    spec = QuantSpec(bits=4, group_size=128)
    need(spec.misfit(head.in_features) is None, f"its head cannot be 4 bits: {spec.misfit(head.in_features)}")
    return QLinear.from_linear(head, spec, rule="mse").requires_grad_(False)


def _tables(rotary: nn.Module, like: Tensor, size: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Rotary tables as the model makes them, rounding to its dtype included."""

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(torch.empty(0, dtype=like.dtype, device=like.device), positions[None])
        need(cos.shape[-1] == size, f"its rotary embedding covers {cos.shape[-1]} of {size} dimensions")
        return cos[0, :, : size // 2].float().contiguous(), sin[0, :, : size // 2].float().contiguous()

    return tables
