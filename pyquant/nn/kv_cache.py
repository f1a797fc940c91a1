"""The cache of one attention layer in mixed precision: a 16-bit prompt, low-bit pages, a 16-bit window of the newest tokens.

Where tokens go is decided by one rule, whether they come one by one or as a prompt: the first ``prompt_tokens`` of the first
call stay in 16 bits; of the others the oldest 64 become a page as soon as ``window + 64`` or more are not in pages. The
layout is that of :mod:`pyquant.formats.kv4`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyquant import reference
from pyquant.formats.kv4 import PAGE, TILE, pack_pages, pack_tiles, page_bytes, unpack_tiles
from pyquant.ops.attention_kv4 import append_kv4, attention_kv4

BITS = (2, 3, 4, 8, 16)
MOST_AT_ONCE = 8  # tokens that a ring has room for beside its window; more go through the way of a prompt
VALUES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class KVSettings:
    """How a cache keeps its tokens.

    Args:
        bits: of the tokens between prompt and window: 2, 3, 4, 8, or 16 to keep everything as it is.
        prompt_tokens: how many of the first tokens stay in 16 bits; None for all of the first call.
        window: how many of the newest stay in 16 bits at least.
        capacity: tokens to allocate for at once, beyond the prompt; 0 grows as needed, by an eighth at a time.
        static: nothing is allocated after the first call and lengths live on the device alone, as captured graphs and compiled
            steps need; capacity then counts all tokens of a sequence, and more are refused or, within a graph, lost.

    Raises:
        ValueError: values out of range, one sentence.
    """

    bits: int = 4
    prompt_tokens: int | None = 128
    window: int = 128
    capacity: int = 0
    static: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} of a KV cache must be 2, 3, 4, 8, or 16 to keep everything as it is")
        for name in ("prompt_tokens", "window", "capacity"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if self.static and not self.capacity:
            raise ValueError("a static KV cache needs a capacity: the most tokens of a sequence")

    @property
    def keep(self) -> int:
        """As :func:`pyquant.ops.append_kv4` takes it."""
        return -1 if self.bits == 16 else self.window


class KVLayer:
    """Keys and values of one layer. Lengths are known on the host too, so that nothing here waits for a GPU; but of a static
    layer the device alone knows them, and asking for ``held`` waits.

    Args:
        settings: how tokens are kept.
        batch, kv_heads, head_size: B, Hkv, D; D a multiple of 16.
        dtype, device: of the 16-bit segments (fp32 works, in plain torch).
    """

    def __init__(
        self, settings: KVSettings, batch: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.settings, self.kv_heads, self.size, self.dtype = settings, kv_heads, head_size, dtype
        self.device = torch.device(device)
        pages, ring = -(-settings.capacity // PAGE), settings.window + PAGE + MOST_AT_ONCE
        if settings.static:  # of all tokens the window's are in no page
            pages = max(0, settings.capacity - settings.window) // PAGE
        self.bits = settings.bits if settings.bits < 16 else 4  # of pages; there are none of 16
        if settings.bits == 16:
            pages, ring = 0, max(settings.capacity, ring)
        kept = min(settings.prompt_tokens or 0, settings.capacity) if settings.static else 0
        self.prompt = self._empty(batch, -(-kept // TILE))
        self.window = self._empty(batch, -(-ring // TILE))
        size = page_bytes(head_size, self.bits)
        self.pages = torch.zeros(batch, kv_heads, pages, size, dtype=torch.uint8, device=device)
        self.segments = torch.zeros(batch, 3, dtype=torch.int32, device=device)
        self._held: list[tuple[int, int, int]] = [(0, 0, 0)] * batch
        self.filled = False  # tokens were given
        self.padding = [0] * batch  # tokens on the left that were given and not kept

    def reserve_prompt(self, tokens: int) -> None:
        """Room for a prompt that then stays where it is, as captured graphs need; empties the cache."""
        self.reset()
        self.prompt = self._empty(self.batch, -(-tokens // TILE))

    @property
    def held(self) -> list[tuple[int, int, int]]:
        """Segments of each sequence: prompt tokens, pages, length."""
        if not self.settings.static:
            return self._held
        return [(kept, full, length) for kept, full, length in self.segments.tolist()]

    @held.setter
    def held(self, held: list[tuple[int, int, int]]) -> None:
        self._held, self.filled = held, any(length for _, _, length in held)

    def reset(self) -> None:
        """Forget all tokens and keep the memory."""
        self.held, self.padding = [(0, 0, 0)] * self.batch, [0] * self.batch
        self.segments.zero_()

    def _empty(self, batch: int, tiles: int) -> Tensor:
        return torch.zeros(batch, self.kv_heads, tiles, 2 * TILE * self.size, dtype=self.dtype, device=self.device)

    @property
    def batch(self) -> int:
        return len(self.segments)

    @property
    def length(self) -> int:
        """Tokens given so far, padding included: the same for every sequence."""
        return self.held[0][2] + self.padding[0] if self.held else 0

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prompt, pages, window and segments, as the ops take them."""
        return self.prompt, self.pages, self.window, self.segments

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this layer holds, spare room included."""
        return sum(t.untyped_storage().nbytes() for t in self.parts())

    # ---------------------------------------------------------------------------------------- tokens in

    def add(self, k: Tensor, v: Tensor, padding: list[int] | None = None) -> None:
        """New tokens ``k, v [B, Hkv, L, D]``, keys rotated; a few by :func:`append_kv4`, many as a prompt.

        Args:
            padding: tokens on the left of each sequence that are none and are not kept; in the first call only.

        Raises:
            ValueError: another batch, or padding later on.
        """
        if k.shape[0] != self.batch:
            raise ValueError(f"the cache holds {self.batch} sequences, keys came for {k.shape[0]}")
        tokens, first = k.shape[2], not self.filled
        if padding is not None and any(padding):
            if not first:
                raise ValueError("padding can only come with the first tokens")
            self.padding = list(padding)
        if tokens == 0:
            return
        if not first and tokens <= MOST_AT_ONCE:
            self.push(k, v) if self.settings.static else self._append(k, v)
        else:
            self._fill(k, v, first)

    def _append(self, k: Tensor, v: Tensor) -> None:
        tokens, keep, held = k.shape[2], self.settings.keep, []
        for kept, full, length in self.held:
            new = length + tokens
            held.append((kept, full + int(keep >= 0 and new - kept - PAGE * full >= keep + PAGE), new))
        self._room(max(full for _, full, _ in held), max(n - p for p, _, n in held) if keep < 0 else 0)
        self.push(k, v)
        self.held = held

    def push(self, k: Tensor, v: Tensor) -> None:
        """The device's part of adding a few tokens ``[B, Hkv, L, D]`` to those there are: room for them is up to the caller.

        What a captured graph holds of a step; of a layer that is not static, ``held`` then no longer says what is there.
        """
        append_kv4(k.transpose(1, 2), v.transpose(1, 2), self.pages, self.window, self.segments, self.settings.keep)

    def _room(self, pages: int, tokens: int) -> None:
        """At least this many pages, and where everything is kept at least so many tokens in the ring."""
        tiles = -(-tokens // TILE)
        if self.settings.static and (pages > self.pages.shape[2] or tiles > self.window.shape[2]):
            raise ValueError(f"more tokens than the {self.settings.capacity} that the static KV cache was made for")
        if pages > self.pages.shape[2]:
            more = max(pages, self.pages.shape[2] * 9 // 8 + 1)
            grown = self.pages.new_zeros((self.batch, self.kv_heads, more, self.pages.shape[3]))
            grown[:, :, : self.pages.shape[2]] = self.pages
            self.pages = grown
        if tiles > self.window.shape[2]:  # nothing has gone round it yet, as nothing was packed
            ring = self._empty(self.batch, max(tiles, self.window.shape[2] * 9 // 8 + 1))
            ring[:, :, : self.window.shape[2]] = self.window
            self.window = ring

    def _fill(self, k: Tensor, v: Tensor, first: bool) -> None:
        """Many tokens at once: what was not packed yet and what is new, divided among the segments as the rule says."""
        tokens, keep, now = k.shape[2], self.settings.keep, self.held
        late, held = self._late(), []
        skip = self.padding if first else [0] * self.batch
        counts = [length - kept - PAGE * full + tokens - s for (kept, full, length), s in zip(now, skip, strict=True)]
        prompts = [kept for kept, _, _ in now]
        if first:
            most = self.settings.prompt_tokens
            prompts = [count if most is None else min(most, count) for count in counts]
        # `all_k, all_v`: old tokens of the window, then the new ones; sequence b's begin at from_[b]
        widest = late[0].shape[2]
        all_k, all_v = (torch.cat([old, new.to(old.dtype)], 2) for old, new in zip(late, (k, v), strict=True))
        begins = [widest + tokens - count for count in counts]
        new_pages = []
        for (_, full, length), count, kept, s in zip(now, counts, prompts, skip, strict=True):
            rest = count - (kept if first else 0)
            new_pages.append(max(0, rest - keep) // PAGE if keep >= 0 else 0)
            held.append((kept, full + new_pages[-1], length + tokens - s))
        if first:
            self._keep_prompt(all_k, all_v, begins, prompts)
            begins = [b + p for b, p in zip(begins, prompts, strict=True)]
        self._room(max(full for _, full, _ in held), max(n - p for p, _, n in held) if keep < 0 else 0)
        # Packing takes some thirty bytes a value: so many pages of all heads at a time.
        step = max(1, min(VALUES_AT_ONCE // (self.batch * self.kv_heads * PAGE * self.size), max(new_pages)))
        for page in range(0, max(new_pages), step):
            body = self._gather(
                all_k, all_v, [b + PAGE * page for b in begins], [PAGE * step] * self.batch, PAGE * step
            )
            packed = pack_pages(*body, self.bits)
            for b, n in enumerate(new_pages):
                here, at = max(0, min(step, n - page)), held[b][1] - n + page
                self.pages[b, :, at : at + here] = packed[b, :, :here]
        ring = TILE * self.window.shape[2]
        slots = torch.tensor([PAGE * full for _, full, _ in held], device=self.device)
        order = (torch.arange(ring, device=self.device) - slots[:, None]) % ring  # of the window's tokens, by slot
        begins = [b + PAGE * n for b, n in zip(begins, new_pages, strict=True)]
        left = [n - kept - PAGE * full for kept, full, n in held]
        self.window.copy_(pack_tiles(*self._gather(all_k, all_v, begins, left, ring, order)))
        self.held = held
        self.segments.copy_(torch.tensor(held, dtype=torch.int32))

    def _gather(
        self, k: Tensor, v: Tensor, begins: list[int], counts: list[int], width: int, order: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``begins[b] + order`` of each sequence, zeros from ``counts[b]`` on: ``[B, Hkv, width, D]`` each."""
        begin, count = (torch.tensor(t, device=self.device)[:, None] for t in (begins, counts))
        order = torch.arange(width, device=self.device)[None] if order is None else order
        index = (begin + order).clamp(max=k.shape[2] - 1)[:, None, :, None].expand(-1, self.kv_heads, -1, self.size)
        live = (order < count)[:, None, :, None]
        found = [torch.where(live, t.gather(2, index), 0.0).to(self.dtype) for t in (k, v)]
        return found[0], found[1]

    def _keep_prompt(self, k: Tensor, v: Tensor, begins: list[int], counts: list[int]) -> None:
        tiles = -(-max(counts) // TILE)
        if tiles > self.prompt.shape[2] or len(self.prompt) != self.batch:
            self.prompt = self._empty(self.batch, tiles)
        if tiles:
            self.prompt[:, :, :tiles] = pack_tiles(*self._gather(k, v, begins, counts, TILE * tiles))

    def _late(self) -> tuple[Tensor, Tensor]:
        """Tokens of the window in their order, ending together on the right: ``[B, Hkv, longest, D]`` each."""
        held = self.held
        left = [n - kept - PAGE * full for kept, full, n in held]
        width, ring = max(left), TILE * self.window.shape[2]
        if width == 0:
            nothing = torch.empty(self.batch, self.kv_heads, 0, self.size, dtype=self.dtype, device=self.device)
            return nothing, nothing
        last = torch.tensor([n - kept for kept, _, n in held], device=self.device)[:, None]
        slots = (last - width + torch.arange(width, device=self.device)) % ring
        index = slots[:, None, :, None].expand(-1, self.kv_heads, -1, self.size)
        k, v = (t.gather(2, index) for t in unpack_tiles(self.window, self.size))
        return k, v

    # ---------------------------------------------------------------------------------------- tokens out

    def attend(
        self,
        q: Tensor,
        scaling: float | None = None,
        softcap: float = 0.0,
        sliding_window: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the newest tokens ``q [B, T, Hq, D]``, which were added before: ``[B, T, Hq, D]``. The other arguments
        are those of :func:`pyquant.ops.attention_kv4`."""
        return attention_kv4(
            q, self.prompt, self.pages, self.window, self.segments, scaling, softcap, False, sliding_window, sinks
        )[0]

    def values(self) -> tuple[Tensor, Tensor]:
        """All tokens dequantized to the cache's dtype, ``[B, Hkv, length, D]`` each, padding as zeros."""
        k, v = (self.prompt.new_zeros((self.batch, self.kv_heads, self.length, self.size)) for _ in range(2))
        for b, padding in enumerate(self.padding):
            segments = torch.tensor(self.held, dtype=torch.int32)
            found = reference.kv4_values(self.prompt, self.pages, self.window, segments, b)
            k[b, :, padding:], v[b, :, padding:] = (t.to(self.dtype) for t in found)
        return k, v

    # ---------------------------------------------------------------------------------------- batch and length

    def select(self, index: Tensor) -> None:
        """Sequences ``index`` int64 ``[n]`` and no others, in this order (beams, contrastive search); a shared prompt stays."""
        rows, index = index.tolist(), index.to(self.device)
        if self.settings.static:
            if len(rows) != self.batch:
                raise ValueError(f"a static KV cache of {self.batch} sequences cannot become one of {len(rows)}")
            for t in (self.pages, self.window, self.segments, *([self.prompt] if len(self.prompt) > 1 else [])):
                t.copy_(t[index])
            self.padding = [self.padding[b] for b in rows]
            return
        if self.prompt.shape[0] == self.batch and self.batch > 1:
            self.prompt = self.prompt[index]
        self.pages, self.window, self.segments = self.pages[index], self.window[index], self.segments[index]
        self.held, self.padding = [self.held[b] for b in rows], [self.padding[b] for b in rows]

    def repeat(self, times: int) -> None:
        """Every sequence ``times`` times in a row. From a single sequence on, its prompt is kept once for the batch."""
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens. Those that are back in the window's reach come back from their page as it holds them.

        Raises:
            ValueError: more tokens than there are.
        """
        if tokens <= 0:
            return
        if tokens > min(length for _, _, length in self.held):
            raise ValueError(
                f"cannot take {tokens} tokens off a cache whose sequences hold {self.held} (prompt, pages, all)"
            )
        if all(length - kept - PAGE * full >= tokens for kept, full, length in self.held):
            self.held = [(kept, full, length - tokens) for kept, full, length in self.held]
            self.segments[:, 2] -= tokens
            return
        self._crop_far(tokens)

    def _crop_far(self, tokens: int) -> None:
        """Cut into pages or prompt: the page that is cut becomes tokens of the window again."""
        ring, held = TILE * self.window.shape[2], list(self.held)
        before = torch.tensor(held)
        for b, (kept, full, length) in enumerate(held):
            new = length - tokens
            k, v = reference.kv4_values(self.prompt, self.pages, self.window, before, b)
            full = min(full, max(0, new - kept) // PAGE)
            kept = min(kept, new)
            start = kept + PAGE * full
            late = torch.zeros(2, self.kv_heads, ring, self.size, dtype=self.dtype, device=self.device)
            slots = (torch.arange(new - start, device=self.device) + PAGE * full) % ring
            late[0][:, slots], late[1][:, slots] = (t[:, start:new].to(self.dtype) for t in (k, v))
            self.window[b] = pack_tiles(*late)
            held[b] = kept, full, new
        self.held = held
        self.segments.copy_(torch.tensor(held, dtype=torch.int32))
