"""A Llama-like decoder as a chain of fused kernels over a static cache, one captured graph a step.

A step of one token a sequence is, for each layer, eight launches::

    rms_norm (+ residual) -> q,k,v -> rotate + append + attend -> o -> rms_norm + residual -> gate,up -> silu * -> down

The modules of a model are read, not replaced: :class:`Decoder` refers to their weights. What knows transformers is in
:mod:`pyquant.integrations.inference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyquant import reference
from pyquant.nn.fused import FusedLinear
from pyquant.nn.kv_cache import KVLayer, KVSettings
from pyquant.nn.linear import QLinear
from pyquant.ops import (
    add_rms_norm,
    attention_decode,
    greedy_append,
    rms_norm,
    rope_append,
    silu_and_mul,
)


@dataclass
class Layer:
    """One decoder layer: projections, norm weights, and the window of its attention (0: none)."""

    qkv: FusedLinear
    o: nn.Module
    gate_up: FusedLinear
    down: nn.Module
    before_attention: Tensor
    before_mlp: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int = 0

    def mlp(self, y: Tensor) -> Tensor:
        """``down(silu(gate) * up)`` of the normed hidden states."""
        gate_up = self.gate_up(y)
        return self.down.after_silu(gate_up) if type(self.down) is QLinear else self.down(silu_and_mul(gate_up))


@dataclass
class Decoder:
    """The parts of a decoder-only model.

    Attributes:
        embed: token ids to ``[..., hidden]``.
        layers, norm, head: the layers, the weight of the last norm, hidden to logits.
        rotary: ``positions [P]`` to ``(cos, sin)``, fp32 ``[P, D/2]``.
        kv_heads, size, scaling, eps: KV heads, head size, factor of the scores, eps of every norm.
    """

    embed: nn.Module
    layers: list[Layer]
    norm: Tensor
    head: Callable[[Tensor], Tensor]
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]]
    kv_heads: int
    size: int
    scaling: float
    eps: float

    def prefill(self, state: State, ids: Tensor, start: Tensor | None = None) -> Tensor:
        """Run prompts through the model and fill the cache from slot 0.

        Args:
            state: memory for at least L tokens a sequence.
            ids: int64 ``[B, L]``, padded on the left.
            start: int32 ``[B]``, how many tokens of each prompt are padding; None for none.

        Returns:
            logits of the last tokens, ``[B, V]``.
        """
        length = ids.shape[1]
        state.slot.zero_()
        state.start.zero_() if start is None else state.start.copy_(start)
        x = self.embed(ids)
        y = rms_norm(x, self.layers[0].before_attention, self.eps)
        masks: dict[int, Tensor | None] = {}
        if state.kv is not None:  # one layer's keys and values at a time; they are packed when they were attended to
            shape = (ids.shape[0], self.kv_heads, length, self.size)
            scratch = self.norm.new_empty(shape), self.norm.new_empty(shape)
            padding = None if start is None else start.tolist()
        for i, layer in enumerate(self.layers):
            k, v = state.cache[i] if state.kv is None else scratch
            q = rope_append(
                layer.qkv(y), state.cos, state.sin, k, v, state.slot, state.start, layer.q_norm, layer.k_norm, self.eps
            )
            window = layer.window if layer.window < length else 0
            if window not in masks:
                masks[window] = prompt_mask(length, state.start, window, start is not None)
            a = attend(q, k[:, :, :length], v[:, :, :length], masks[window], self.scaling)
            if state.kv is not None:
                state.kv[i].add(k, v, padding)
            y, x = add_rms_norm(layer.o(a), x, layer.before_mlp, self.eps)
            if i + 1 == len(self.layers):  # of the last layer only the last token counts
                y, x = y[:, -1], x[:, -1]
            y = layer.mlp(y)
            y, x = add_rms_norm(y, x, self.norm_after(i), self.eps)
        state.slot.fill_(length - 1)
        return self.head(y)

    def step(self, state: State) -> Tensor:
        """One token a sequence: ``state.ids`` goes to ``state.slot``; returns the logits ``[B, V]``."""
        x = self.embed(state.ids)
        y = rms_norm(x, self.layers[0].before_attention, self.eps)
        if state.kv is not None:
            torch.sub(state.start, state.slot, out=state.behind)
        for i, layer in enumerate(self.layers):
            a = self.attend_to_one(state, i, layer.qkv(y))
            y, x = add_rms_norm(layer.o(a), x, layer.before_mlp, self.eps)
            y = layer.mlp(y)
            y, x = add_rms_norm(y, x, self.norm_after(i), self.eps)
        return self.head(y)

    def attend_to_one(self, state: State, i: int, qkv: Tensor) -> Tensor:
        """Layer i's attention ``[B, Hq D]`` of one new token a sequence, whose key and value join the cache."""
        layer = self.layers[i]
        if state.kv is None:
            # Early: slot, start and the cache before slot are final since before this step began.
            return attention_decode(
                qkv, state.cos, state.sin, *state.cache[i], state.slot, state.start, layer.q_norm,
                layer.k_norm, self.eps, self.scaling, layer.window, True,
            )  # fmt: skip
        # rope_append writes to a cache of one slot, at position slot - start = 0 - behind.
        kept, (k, v) = state.kv[i], state.one
        q = rope_append(
            qkv[:, None], state.cos, state.sin, k, v, state.zero, state.behind, layer.q_norm, layer.k_norm, self.eps
        )
        kept.push(k, v)
        return kept.attend(q, self.scaling, sliding_window=layer.window).flatten(1)

    def norm_after(self, i: int) -> Tensor:
        """Weight of the norm that follows layer i."""
        return self.norm if i + 1 == len(self.layers) else self.layers[i + 1].before_attention

    def new_state(self, batch: int, capacity: int, kv: KVSettings | None = None, prompt: int = 0) -> State:
        """Memory for ``batch`` sequences of ``capacity`` tokens.

        Args:
            kv: how keys and values are kept, or None for a plain cache in the model's dtype.
            prompt: the longest first call, where ``kv`` keeps all of it.
        """
        w = self.norm
        cos, sin = self.rotary(torch.arange(capacity, device=w.device))
        tokens = torch.zeros(batch, capacity + 1, dtype=torch.int64, device=w.device)
        if kv is None:
            shape = (batch, self.kv_heads, capacity, self.size)
            return State([(w.new_zeros(shape), w.new_zeros(shape)) for _ in self.layers], cos, sin, tokens)
        state = State([], cos, sin, tokens)
        state.room = capacity if kv.prompt_tokens is None and not prompt else prompt
        settings, shape = replace(kv, capacity=capacity, static=True), (batch, self.kv_heads, 1, self.size)
        state.kv = [KVLayer(settings, batch, self.kv_heads, self.size, w.dtype, w.device) for _ in self.layers]
        for layer in state.kv:
            layer.reserve_prompt(state.room if kv.prompt_tokens is None else kv.prompt_tokens)
        state.one = w.new_zeros(shape), w.new_zeros(shape)
        return state


class State:
    """What a batch of sequences keeps between steps.

    Attributes:
        cache: (k, v) ``[B, Hkv, S, D]`` of each layer.
        cos, sin: rotary tables, fp32 ``[S, D/2]``.
        tokens: int64 ``[B, S + 1]``, prompt and generated tokens by slot.
        ids: int64 ``[B]``, the next step's input; slot: int32 ``[B]``, where it goes; start: int32 ``[B]``.
        unfinished: int64 ``[B]``, 1 until a sequence has ended.
        length: int64 ``[B]``, tokens of each sequence up to the one that ended it.
        kv: instead of ``cache``, the layers of a cache in mixed precision, with ``one``, ``zero`` and ``behind`` to rotate a
            token by; room: the longest prompt that such a cache can keep whole.
    """

    kv: list[KVLayer] | None = None
    one: tuple[Tensor, Tensor]
    room = 0

    def __init__(self, cache: list[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor, tokens: Tensor) -> None:
        self.cache, self.cos, self.sin, self.tokens = cache, cos, sin, tokens
        batch, device = tokens.shape[0], tokens.device
        self.report = torch.zeros(2, batch, dtype=torch.int64, device=device)  # one copy tells the host of both
        self.ids, self.unfinished = self.report[0], self.report[1]
        self.slot = torch.zeros(batch, dtype=torch.int32, device=device)
        self.start = torch.zeros(batch, dtype=torch.int32, device=device)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.zero, self.behind = torch.zeros_like(self.slot), torch.zeros_like(self.slot)
        self.graphs: dict[object, Captured] = {}

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1] - 1

    def begin(self, ids: Tensor) -> None:
        """Take up new prompts ``[B, L]``."""
        self.tokens[:, : ids.shape[1]] = ids
        self.unfinished.fill_(1)
        self.length.fill_(ids.shape[1])
        for layer in self.kv or ():
            layer.reset()

    def advance(self, chosen: Tensor, eos: Tensor | None = None, pad: int = 0) -> None:
        """Append the chosen tokens ``[B]``; sequences that have ended get ``pad``, those that choose one of ``eos`` end."""
        reference.append(chosen, self.tokens, self.ids, self.slot, self.unfinished, self.length, eos, pad)

    def advance_greedily(self, logits: Tensor, eos: Tensor | None = None, pad: int = 0) -> None:
        """Append the likeliest tokens of ``logits [B, V]``."""
        greedy_append(logits, self.tokens, self.ids, self.slot, self.unfinished, self.length, eos, pad)


class Captured:
    """A function of no arguments as a CUDA graph (called as it is on the CPU); ``result`` is what it returned."""

    def __init__(self, run: Callable[[], Tensor | None], device: torch.device) -> None:
        self.run, self.graph, self.result = run, None, None
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # libraries allocate what they need outside of the capture
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: a program that streams text may use the GPU from another thread meanwhile
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.result = run()

    def __call__(self) -> Tensor | None:
        if self.graph is None:
            self.result = self.run()
        else:
            self.graph.replay()
        return self.result


def prompt_mask(length: int, start: Tensor, window: int, padded: bool) -> Tensor | None:
    """``[B, 1, L, L]`` or ``[1, 1, L, L]``, True where a token attends; None for plain causal attention.

    Padding attends to itself, so that no row is empty.
    """
    if not padded and not window:
        return None
    at = torch.arange(length, device=start.device)
    mask = at[None, :] <= at[:, None]
    if window:
        mask = mask & (at[None, :] > at[:, None] - window)
    mask = mask[None, None]
    if padded:
        mask = mask & (at >= start[:, None])[:, None, None]
    return mask | torch.eye(length, dtype=torch.bool, device=start.device)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of a prompt: q ``[B, L, Hq, D]``, k and v ``[B, Hkv, L, D]``; returns ``[B, L, Hq D]``."""
    attention = nn.functional.scaled_dot_product_attention
    if mask is None:
        out = attention(q.transpose(1, 2), k, v, is_causal=True, scale=scaling, enable_gqa=True)
    else:  # the fused kernels that take a mask do not take grouped heads
        group = q.shape[2] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).flatten(2)
