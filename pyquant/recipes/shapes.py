"""The sizes of a decoder that plans are made from: read from the fields of a ``config.json``, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder of equal blocks: attention with grouped heads, a gated MLP or experts of such.

    Attributes:
        hidden, layers, heads, kv_heads, head_size, vocabulary: H, blocks, Hq, Hkv, D, V.
        mlp: features between the projections of the MLP, or of one expert.
        experts, active: experts of a block (0: a plain MLP), and how many a token takes.
        tied: head and embedding are one matrix.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    mlp: int
    experts: int = 0
    active: int = 0
    tied: bool = False

    @property
    def linears(self) -> list[tuple[str, int, int]]:
        """(name, N, K) of the linear layers of a block; each expert's are there once for all."""
        q, kv, h = self.heads * self.head_size, self.kv_heads * self.head_size, self.hidden
        attention = [("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, q)]
        return [*attention, ("gate_proj", self.mlp, h), ("up_proj", self.mlp, h), ("down_proj", h, self.mlp)]

    def repeats(self, name: str) -> int:
        """How often a block has the layer: once, or once an expert."""
        return self.experts or 1 if name in MLP else 1

    def _count(self, experts: int) -> int:
        return sum(n * k * (experts if name in MLP else 1) for name, n, k in self.linears)

    @property
    def used(self) -> int:
        """Quantized parameters of a block that one token is multiplied with."""
        return self._count(self.active or 1)

    @property
    def block(self) -> int:
        """Quantized parameters of a block."""
        return self._count(self.experts or 1)

    @property
    def quantized(self) -> int:
        """Parameters in the layers that a recipe quantizes."""
        return self.layers * self.block

    @property
    def rest(self) -> int:
        """Other parameters: embedding, head, norms, routers."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.layers * self._small + self.hidden

    @property
    def _small(self) -> int:
        return 2 * self.hidden + self.experts * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.quantized + self.rest

    @property
    def multiplied(self) -> int:
        """Parameters that one token is multiplied with: active experts, the head, no embedding."""
        return self.layers * self.used + self.vocabulary * self.hidden

    @property
    def largest(self) -> int:
        """Elements of the largest linear layer."""
        return max(n * k for _, n, k in self.linears)


MLP = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # one field by the models that have it


def read_shape(config: dict[str, Any]) -> Shape:
    """The shape that a ``config.json`` describes.

    Raises:
        ValueError: fields are missing (all are named), or blocks that are not all alike.
    """
    config = config.get("text_config", config)
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    missing = [name for name in wanted if not isinstance(config.get(name), int)]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}: not a decoder whose size can be told")
    experts = next((config[n] for n in EXPERTS if config.get(n)), 0)
    for name in ("first_k_dense_replace", "mlp_only_layers", "n_shared_experts", "shared_expert_intermediate_size"):
        if config.get(name):
            raise ValueError(
                f"config.json has {name}={config[name]}: blocks that differ, or shared experts, are not planned"
            )
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    mlp = config["intermediate_size"]
    return Shape(
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        vocabulary=config["vocab_size"],
        mlp=(config.get("moe_intermediate_size") or mlp) if experts else mlp,
        experts=experts,
        active=config.get("num_experts_per_tok", 1) if experts else 0,
        tied=bool(config.get("tie_word_embeddings", False)),
    )
