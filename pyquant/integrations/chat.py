"""A conversation over one KV cache: the system prompt computed once (or read from a file), then turn after turn.

Every turn renders the whole conversation by the tokenizer's chat template, as if nothing were cached, and keeps of the cache
what still agrees: tokens after the first difference (a template that rewrites earlier turns, an answer that was cut off) are
cropped away and computed again. A tokenizer without a template gets :data:`PLAIN`, which is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import TextStreamer

from pyquant.integrations import kv_file
from pyquant.integrations.kv_cache import NAME, KVCache
from pyquant.nn.kv_cache import KVSettings

log = logging.getLogger("pyquant")

# The system prompt and a blank line, then turns; the model's turn ends where it begins one of the user's.
PLAIN = (
    "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% else %}"
    "{{ 'User: ' if m.role == 'user' else 'Assistant: ' }}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
STOP = "\nUser:"
PROBES = ("a", "The", "7", "(x", "\nz")  # first turns; what tokens of all of them have in common stands before any


@dataclass
class Chat:
    """A conversation.

    Attributes:
        model, tokenizer: of transformers; the model's attention is ``"pyquant"``.
        cache: holds ``ids``, the tokens that it was given so far.
        messages: roles and contents, the system prompt first where there is one.
    """

    model: nn.Module
    tokenizer: Any
    cache: KVCache
    ids: list[int]
    messages: list[dict[str, str]] = field(default_factory=list)


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Tokens of a conversation and of the beginning of the next answer.

    A template that knows no system prompt gets it in front of the first turn.
    """
    template = None if getattr(tokenizer, "chat_template", None) else PLAIN
    how = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(messages, **how)
    except TemplateError:
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise
        first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        text = tokenizer.apply_chat_template([first, *messages[2:]], **how)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def agreeing(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def system_ids(tokenizer: Any, system: str) -> list[int]:
    """The tokens of a system prompt that stand before every conversation, whatever the first turn says.

    Raises:
        ValueError: there are none.
    """
    texts = [
        render(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": probe}])
        for probe in PROBES
    ]
    common = texts[0][: min(agreeing(texts[0], other) for other in texts[1:])]
    if not common:
        raise ValueError(f"the chat template puts no token of the system prompt {system[:40]!r} before the first turn")
    return common


def start(
    model: nn.Module,
    tokenizer: Any,
    system: str | None = None,
    kv: KVSettings | None = None,
    file: Path | None = None,
) -> Chat:
    """Begin a conversation.

    Args:
        model, tokenizer: any that :class:`KVCache` serves; the model's attention becomes ``"pyquant"``.
        system: the system prompt, kept in 16 bits. None takes that of ``file``, or none.
        kv: how the cache keeps what comes after it; 16 bits by default. Its ``prompt_tokens`` counts only where there is no
            system prompt.
        file: where the system prompt's keys and values are read from; if nothing is there, they are computed and written.

    Raises:
        FileNotFoundError: no such file, and no system prompt to make it from.
        ValueError: a file of another model or prompt; a system prompt longer than the model's context.
    """
    kv = kv or KVSettings(bits=16)
    model.set_attn_implementation(NAME)
    if not getattr(tokenizer, "chat_template", None):
        log.warning(
            "the tokenizer has no chat template: turns become lines 'User: ..' and 'Assistant: ..' after the system prompt"
        )
    if system is None and file is not None:
        system = kv_file.header(file).text
    if not system:
        if file is not None:
            raise ValueError(f"{file} holds no text of a system prompt: give the prompt too")
        return Chat(model, tokenizer, KVCache(model.config, kv.bits, kv.prompt_tokens, kv.window, kv.capacity), [])
    ids = system_ids(tokenizer, system)
    _check_length(model, len(ids), 1, "the system prompt")
    tokens = torch.tensor([ids])
    messages = [{"role": "system", "content": system}]
    if file is not None and Path(file).exists():
        cache = KVCache.load(file, model, tokens, bits=kv.bits, window=kv.window, capacity=kv.capacity)
        log.info("%d tokens of the system prompt were read from %s", len(ids), file)
        return Chat(model, tokenizer, cache, ids, messages)
    cache = KVCache(model.config, kv.bits, None, kv.window, kv.capacity)
    with torch.inference_mode():
        model(input_ids=tokens.to(next(model.parameters()).device), past_key_values=cache, logits_to_keep=1)
    if file is not None:
        cache.save(file, model, tokens, system)
        log.info("%d tokens of the system prompt were written to %s", len(ids), file)
    return Chat(model, tokenizer, cache, ids, messages)


def _check_length(model: nn.Module, held: int, new: int, what: str) -> None:
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and held + new > most:
        raise ValueError(
            f"{what} has {held} tokens and {new} new ones would not fit the model's context of {most}: a shorter one, or "
            "fewer --max-new-tokens"
        )


def answer(
    chat: Chat, text: str, max_new_tokens: int = 256, how: dict[str, Any] | None = None, streamer: Any = None
) -> str:
    """The model's answer to the user's next turn; both become part of the conversation.

    Args:
        chat: changed in place.
        text: what the user says.
        max_new_tokens: at most so many; fewer where the model ends its turn.
        how: arguments of ``generate`` about the choice of tokens.
        streamer: of transformers, told of tokens as they come.

    Raises:
        ValueError: the conversation would leave the model's context; nothing is changed then.
    """
    messages = [*chat.messages, {"role": "user", "content": text}]
    ids = render(chat.tokenizer, messages)
    _check_length(chat.model, len(ids), max_new_tokens, "the conversation")
    keep = min(agreeing(chat.ids, ids), len(ids) - 1)
    if keep < len(chat.ids):
        chat.cache.crop(keep - len(chat.ids))
    tokens = torch.tensor([ids], device=next(chat.model.parameters()).device)
    stop = {} if getattr(chat.tokenizer, "chat_template", None) else {"stop_strings": [STOP]}
    with torch.inference_mode():
        out = chat.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, past_key_values=chat.cache,
            pad_token_id=_pad(chat), streamer=streamer, tokenizer=chat.tokenizer, **(how or {}), **stop,
        )  # fmt: skip
    chat.ids = out[0].tolist()
    held = chat.cache.get_seq_length()  # the last token was not given to the model, or one more step was on its way
    if held > len(chat.ids):
        chat.cache.crop(len(chat.ids) - held)
    chat.ids = chat.ids[:held]
    said = chat.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    said = said.split(STOP)[0].strip() if stop else said.strip()
    chat.messages = [*messages, {"role": "assistant", "content": said}]
    return said


def _pad(chat: Chat) -> int:
    return next(t for t in (chat.tokenizer.pad_token_id, chat.tokenizer.eos_token_id, 0) if t is not None)


def answers(chat: Chat, turns: Iterable[str], streamed: bool, seed: int = 0, **how: Any) -> Iterator[str]:
    """The answer to every turn that is not blank, of one random sequence; with ``streamed`` also printed as they come."""
    torch.manual_seed(seed)
    for text in turns:
        if text.strip():
            yield answer(chat, text.strip(), streamer=Streamer(chat.tokenizer) if streamed else None, **how)


class Streamer(TextStreamer):
    """Prints an answer as it comes, up to where it would begin the user's next turn."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = "" if getattr(tokenizer, "chat_template", None) else STOP
        self.waiting, self.over = "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.waiting += text
        if self.stop and self.stop in self.waiting:
            self.waiting, stream_end = self.waiting.split(self.stop)[0], True
        ready = len(self.waiting) if stream_end or not self.stop else len(self.waiting) - held_back(self.waiting)
        if not self.over:
            print(self.waiting[:ready], end="\n" if stream_end else "", flush=True)
        self.waiting, self.over = self.waiting[ready:], self.over or stream_end


def held_back(text: str) -> int:
    """Characters at the end of a text that may be the beginning of :data:`STOP`."""
    return next((n for n in range(len(STOP) - 1, 0, -1) if text.endswith(STOP[:n])), 0)
