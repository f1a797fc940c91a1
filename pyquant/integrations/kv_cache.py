"""``pyquant.KVCache`` for transformers' models, and the attention ``"pyquant"`` that reads it as it is.

The keys that a layer of the cache returns carry a mark, by which the attention function finds the layer again: a prompt is
attended to as it comes, in 16 bits, and stored afterwards; a decode step stores its token and runs
:func:`pyquant.ops.attention_kv4`; a chunk of a long prompt gets the tokens before it dequantized. Importing this module
registers the attention: from then on ``from_pretrained`` and ``model.set_attn_implementation`` know it.
"""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pyquant.formats.kv4 import HEAD_SIZES
from pyquant.nn.kv_cache import MOST_AT_ONCE, KVLayer, KVSettings
from pyquant.ops.attention_kv4 import MAX_BATCH, max_rows

log = logging.getLogger("pyquant")

NAME = "pyquant"
KNOWN_LAYERS = ("full_attention", "sliding_attention")


class KVCache(Cache):
    """A KV cache in mixed precision for ``model.generate(past_key_values=KVCache(model.config))``.

    The first tokens and the newest stay in 16 bits, those between take ``bits`` (0.375 more with scales and zeros if D = 128):
    after BiSup (arXiv 2405.15346, its abstract; the rest is our reading), which keeps the prompt, and KIVI (arXiv 2402.02750),
    which keeps a window. Layers of a sliding window keep all tokens and see the newest; sinks as of gpt-oss count. Fast with
    ``model.set_attn_implementation("pyquant")``; with any other attention all tokens are dequantized for every layer and step,
    which a line in the log says. Beams, assisted decoding (crop), contrastive search and left padding work. A cache that was
    filled for one sequence serves a batch after ``batch_repeat_interleave(n)``, and keeps its prompt once.

    Args:
        config: the model's.
        bits: 8, 4, 3 or 2, or 16 to keep everything as it is.
        prompt_tokens: tokens at the beginning that stay in 16 bits; None for all of the first call.
        window: newest tokens that stay in 16 bits (64 to 127 more may, until their page is full).
        capacity: tokens to allocate for at once; 0 grows as needed.
        static: allocate all of ``capacity``, the most tokens of a sequence, by the first call, and keep lengths on the device:
            a step can then be captured in a CUDA graph or compiled (not by ``generate`` on GPUs), the attention must be
            ``"pyquant"``, and a mask is read only by calls that are neither: within a graph it is that of the first call.

    Raises:
        ValueError: values out of range, or layers that are no attention over keys and values.
    """

    ids: Tensor | None = None  # of the prompt, where a file gave it

    def __init__(
        self,
        config: Any,
        bits: int = 4,
        prompt_tokens: int | None = 128,
        window: int = 128,
        capacity: int = 0,
        static: bool = False,
    ) -> None:
        settings = KVSettings(bits, prompt_tokens, window, capacity, static)
        config = config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        if other := sorted(set(kinds) - set(KNOWN_LAYERS)):
            raise ValueError(f"KVCache serves {' and '.join(KNOWN_LAYERS)} layers, this model has {', '.join(other)}")
        self.settings, self.config, self.warned = settings, config, set[str]()
        super().__init__(layers=[CacheLayer(self) for _ in range(config.num_hidden_layers)])

    def warn(self, why: str) -> None:
        """Say once why tokens are dequantized."""
        if why not in self.warned:
            self.warned.add(why)
            log.warning("the KV cache is dequantized for torch's attention: %s", why)

    def save(self, path: str | Path, model: nn.Module, ids: Tensor, text: str = "") -> None:
        """Write the keys and values of the prompt that the cache was filled with, for :meth:`load` at the next start.

        Made for a system prompt: fill a cache of ``prompt_tokens=None`` for one sequence by one call, and save it before or
        after it is used further. The file is the old one or the new one, also after a crash.

        Args:
            path: a .safetensors file; :mod:`pyquant.integrations.kv_file` says what is in it.
            model: whose cache it is; its config and weights are fingerprinted, which reads all of them once.
            ids: the prompt's tokens, int64 ``[P]`` or ``[1, P]``; the first P tokens of the first sequence are written.
            text: what the tokens say, to be kept beside them.

        Raises:
            ValueError: no tokens, more than the cache keeps in 16 bits, or padded sequences.
        """
        from pyquant.integrations import kv_file

        kv_file.save(self, Path(path), model, ids, text)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, ids: Tensor | None = None, **settings: Any) -> KVCache:
        """A cache for one sequence that begins with a saved prompt, as if the model had just computed it.

        Args:
            path: a file of :meth:`save`.
            model: the model that made it, on any device.
            ids: int64 ``[P]`` or ``[1, P]``: the prompt that is expected; None takes whatever the file holds.
            settings: those of the class other than ``config`` and ``prompt_tokens``; by default what the file says.

        Returns:
            the cache, with the prompt's tokens int64 ``[P]`` as ``ids``.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: no such file, or one of another model, dtype or prompt, saying which.
        """
        from pyquant.integrations import kv_file

        return kv_file.load(Path(path), model, ids, **settings)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache holds, spare room included."""
        return sum(layer.kept.nbytes for layer in self.layers if layer.kept is not None)


class CacheLayer(CacheLayerMixin):
    """One layer of a :class:`KVCache`; ``kept`` holds its tokens."""

    is_sliding, is_croppable, supports_early_init = False, True, False

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self.settings, self.config = cache.settings, cache.config
        # generate compiles with the graph trees of inductor on GPUs, which refuse memory that ops keep between calls
        self.is_compileable = cache.settings.static and not torch.cuda.is_available()
        self.kept: KVLayer | None = None
        self.plain: DynamicLayer | None = None  # where the format cannot hold the heads
        self.new: tuple[Tensor, Tensor] | None = None  # given to update, not stored yet

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": None}

    def warn(self, why: str) -> None:
        cache = self._cache() if self._cache is not None else None
        (cache.warn if cache is not None else log.warning)(why)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, size = key_states.shape
        if self.settings.static and (size % 16 or value_states.shape[-1] != size):
            raise ValueError(f"a static KV cache does not hold heads of {size} and {value_states.shape[-1]} channels")
        self.is_initialized = True
        if size % 16 or value_states.shape[-1] != size:
            self.warn(
                f"heads of {size} and {value_states.shape[-1]} channels have no 4-bit format, so 16 bits are kept"
            )
            self.plain = DynamicLayer()
            return
        with torch.inference_mode(False):  # what is kept serves calls outside of that mode too
            self.kept = KVLayer(self.settings, batch, heads, size, key_states.dtype, key_states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys with a mark for the attention ``"pyquant"``; for any other, all tokens dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.plain is not None:
            return self.plain.update(key_states, value_states)
        if self.config._attn_implementation == NAME:
            self.new = key_states, value_states
            marked = key_states.view_as(key_states)
            marked._pyquant_layer = self  # type: ignore[attr-defined]
            return marked, value_states
        if self.settings.static:
            raise ValueError(
                f'a static KV cache works with the attention "{NAME}" alone, and the model has '
                f"{self.config._attn_implementation!r}: model.set_attn_implementation"
            )
        if self.kept.filled and self.settings.bits != 16:
            self.warn(
                f'the attention is {self.config._attn_implementation!r}; see model.set_attn_implementation("{NAME}")'
            )
        return self.store(key_states, value_states)

    def store(self, k: Tensor, v: Tensor, padding: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Store new tokens, and return all there are for torch's attention.

        A few new ones come back as the kernel would see them; those of a prompt or of a chunk of one as they are, after the
        dequantized tokens before them.
        """
        first = not self.kept.filled
        old = self.kept.values() if not first and k.shape[2] > MOST_AT_ONCE else None
        few = not first and old is None
        self.kept.add(k.detach(), v.detach(), padding)
        if first and self.settings.static:
            for t in self.kept.parts():  # or torch.compile would copy them, and leave graphs out
                torch._dynamo.mark_static_address(t)
        if few:
            return self.kept.values()
        return (k, v) if old is None else (torch.cat([old[0], k], 2), torch.cat([old[1], v], 2))

    def get_seq_length(self) -> int:
        """Tokens so far; of a static cache int64 ``[]`` on its device, which a graph can hold."""
        if self.plain is not None:
            return self.plain.get_seq_length()
        if self.kept is None or not self.settings.static:
            return self.kept.length if self.kept is not None else 0
        return self.kept.segments[0, 2].long() + self.kept.padding[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.settings.capacity if self.settings.static else self.get_seq_length() + query_length), 0

    def get_max_length(self) -> int:
        return self.settings.capacity if self.settings.static else -1

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first."""
        if self.plain is not None:
            return self.plain.keys.shape[0]
        return self.kept.batch if self.kept is not None else -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the tokens to remove as a negative number")
        if self.plain is not None:
            self.plain.crop(tokens_to_remove)
        elif self.kept is not None:
            with torch.inference_mode():
                self.kept.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.plain is not None:
            self.plain.batch_select_indices(indices)
        elif self.kept is not None:
            self.kept.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.plain is not None:
            self.plain.batch_repeat_interleave(repeats)
        elif self.kept is not None:
            self.kept.repeat(repeats)

    def reset(self) -> None:
        if self.settings.static and self.kept is not None:
            self.kept.reset()  # where it is
            return
        self.kept = self.plain = self.new = None
        self.is_initialized = False


# ------------------------------------------------------------------------------------------------ masks

_looked_at = WeakIdKeyDictionary()  # masks, and what they said


def left_padding(
    mask: Tensor, reach: int = 0, known: list[int] | None = None, static: KVLayer | None = None
) -> list[int] | None:
    """Padding on the left of each sequence, of a causal mask bool ``[B, 1, T, S]``; None for any other mask.

    Layers share a mask, so it is read once a step: one wait for the GPU.

    Args:
        reach: the layer's sliding window, which the mask then has too; 0 for none.
        known: the padding, where earlier tokens told it: behind a sliding window a mask does not show it any more.
        static: a static layer: S is its capacity, and what lies beyond the tokens there are and T more must not be seen.

    Raises:
        ValueError: T more tokens do not fit the static layer.
    """
    asked = reach, None if known is None else tuple(known)
    before, found = _looked_at.get(mask, (None, None))
    if before == asked:
        return found
    found = None
    if mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1:
        tokens, slots = mask.shape[2:]
        if static is not None:
            slots = static.length + tokens
            if slots > mask.shape[3]:
                raise ValueError(f"{slots} tokens are more than the {mask.shape[3]} of the static KV cache")
        seen, device = mask[:, 0, :, :slots], mask.device
        if known is not None:
            padding = torch.tensor(known, device=device)
        elif reach:  # a token of padding does not see itself
            padding = (~seen.diagonal(slots - tokens, 1, 2)).sum(-1)
        else:
            padding = seen[:, -1].int().argmax(-1)
        column, own = (torch.arange(n, device=device) for n in (slots, tokens))
        own = own[:, None] + slots - tokens
        causal = (column <= own) & (column > own - (reach or slots))
        same = (seen == (causal & (column >= padding[:, None, None]))).all() & ~mask[..., slots:].any()
        if same:
            found = padding.tolist()
    _looked_at[mask] = asked, found
    return found


# ------------------------------------------------------------------------------------------------ attention


def pyquant_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query ``[B, Hq, L, D]``, result ``[B, L, Hq, D]``.

    Without a :class:`KVCache` it is torch's ``scaled_dot_product_attention``.
    """
    layer: CacheLayer | None = getattr(key, "_pyquant_layer", None)
    if layer is None:
        return _torch_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    (k, v), layer.new = layer.new, None
    kept, static, reach = layer.kept, layer.settings.static, kwargs.get("sliding_window") or 0
    if kept.filled and query.shape[2] <= MOST_AT_ONCE:
        why = _why_not(layer, query, attention_mask, **kwargs)
        if why is None:
            kept.add(k, v)
            how = kwargs.get("softcap") or 0.0, reach, kwargs.get("s_aux")
            return kept.attend(query.transpose(1, 2), scaling, *how), None
        if static and _in_graph(query):
            raise ValueError(f"this step over a static KV cache cannot be captured or compiled: {why}")
        layer.warn(why)
    padding = None
    if not kept.filled and attention_mask is not None:
        padding = left_padding(attention_mask, reach, None, kept if static else None)
    before = kept.filled
    all_k, all_v = layer.store(k, v, padding)
    tokens, slots = query.shape[2], all_k.shape[2]
    if static and attention_mask is not None:
        plain = padding is not None and not any(padding) and not reach  # then torch need not read a mask
        attention_mask = None if plain else attention_mask[..., :slots]
    if before and attention_mask is None and tokens > 1:  # torch's is_causal would align on the other end
        seen = torch.ones(tokens, slots, dtype=torch.bool, device=query.device).tril(slots - tokens)
        attention_mask = seen[None, None]
    return _torch_attention(module, query, all_k, all_v, attention_mask, scaling, dropout, **kwargs)


def _in_graph(t: Tensor) -> bool:
    """Whether what runs is being captured or compiled, so that the host cannot look at numbers."""
    return torch.compiler.is_compiling() or (t.is_cuda and torch.cuda.is_current_stream_capturing())


def _why_not(layer: CacheLayer, query: Tensor, mask: Tensor | None, **kwargs: Any) -> str | None:
    """Why the kernel on the packed cache cannot serve this step, or None."""
    kept = layer.kept
    if kwargs.get("output_attentions"):
        return "attention weights are asked for (output_attentions)"
    if kwargs.get("position_bias") is not None:
        return "the model adds a bias to the scores"
    if torch.is_grad_enabled() and query.requires_grad:
        return "a gradient is wanted"
    if query.is_cuda:
        rows = query.shape[1] // kept.kv_heads * query.shape[2]
        if query.dtype == torch.float32 or kept.size not in HEAD_SIZES:
            return f"there is no kernel for heads of {kept.size} channels in {query.dtype}"
        if rows > max_rows(kept.size) or kept.batch > MAX_BATCH:
            return f"there is no kernel for {rows} query rows a KV head and {kept.batch} sequences"
    if layer.settings.static and _in_graph(query):
        return None
    static, reach = layer.settings.static, kwargs.get("sliding_window") or 0
    if mask is None:
        padding = [0] * kept.batch
    else:
        padding = left_padding(mask, reach, kept.padding if reach else None, kept if static else None)
    if padding != kept.padding:
        return "the attention mask is not that of the first call's padding on the left"
    return None


def _torch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """torch's own, or its equation in full where capped scores, weights or sinks (``s_aux [Hq]``) are wanted."""
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if not softcap and sinks is None and not kwargs.get("output_attentions"):
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    groups, tokens, slots = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    score = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if mask is None and tokens > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(tokens, slots, dtype=torch.bool, device=query.device).tril(slots - tokens)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask
    if sinks is not None:  # a score that no value belongs to
        score = torch.cat([score, sinks.to(score.dtype).view(1, -1, 1, 1).expand(*score.shape[:3], 1)], -1)
    weights = score.softmax(-1, dtype=torch.float32).nan_to_num().to(query.dtype)  # rows of padding see nothing
    weights = weights[..., :slots]
    dropped = nn.functional.dropout(weights, dropout, module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, pyquant_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
