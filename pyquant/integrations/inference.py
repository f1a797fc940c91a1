"""prepare_for_inference: ``model.generate`` on fused kernels, each decode step one captured CUDA graph.

transformers' ``generate`` still does all that surrounds the loop: it prepares inputs, logits processors, stopping criteria
and lengths. Only its innermost loop is replaced, through its own ``custom_generate`` hook, for greedy search and sampling.
The loop here keeps ids, lengths and the end of sequences on the GPU, so that the host never waits for the step that runs:
it looks at what a step said while the next one is under way, and drops that one when all sequences had ended (as
transformers itself does from 5.17 on).
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from pyquant.formats.kv4 import HEAD_SIZES
from pyquant.integrations.read_decoder import Snapshot, Unsupported, need, read_decoder
from pyquant.nn.decoder import Captured, Decoder, State
from pyquant.nn.kv_cache import KVSettings
from pyquant.ops._registry import unavailable
from pyquant.ops.attention_kv4 import MAX_BATCH

log = logging.getLogger("pyquant")

ROUND = 256  # slots of a cache are a multiple of this, so that prompts of other lengths reuse its graph
MAX_GRAPHS = 4  # of one state: one for sampling, one for each set of end tokens of greedy search


def prepare_for_inference(
    model: nn.Module,
    lm_head_bits: int = 16,
    kv_bits: int = 16,
    kv_prompt_tokens: int | None = 128,
    kv_window: int = 128,
) -> nn.Module:
    """Make ``model.generate`` fast, in place; its results stay what they were up to rounding.

    q, k, v and gate, up projections become one product each; norms, rotary embedding, cache append, attention and activation
    run in fused kernels; a decode step is one captured CUDA graph over a static cache. Greedy search and sampling use it,
    with any logits processors, left padding, end-of-sequence tokens and streamers. Calls that ask for more (beams,
    ``return_dict_in_generate``, a cache of their own, other stopping criteria) run as before, with one warning that names
    the reason. ``forward``, ``state_dict`` and ``save_pretrained`` are untouched.

    The first ``generate`` with another batch size, or a longer text, allocates a cache and captures its graph, which
    takes a fraction of a second.

    Args:
        model: Llama, Qwen2, Qwen3 or Mistral of transformers, its linear layers :class:`~pyquant.QLinear` or ``nn.Linear``, on
            one device. Anything else is left as it is, with one line in the log that says why.
        lm_head_bits: 16 uses the head as it is; 4 rounds a copy of it to 4 bits in groups of 128, which saves about 0.2 ms a
            step of an 8B model on an H200 and costs some accuracy.
        kv_bits: 8, 4, 3 or 2 keeps keys and values in mixed precision (:class:`pyquant.KVCache` says how):
            ``kv_prompt_tokens`` at the beginning (None: all of the prompt) and ``kv_window`` at the end in 16 bits, the others
            in so many. 16 is a plain cache.

    Returns:
        the model.

    Raises:
        ValueError: for other ``lm_head_bits`` or ``kv_bits``, or negative numbers of tokens.
    """
    if lm_head_bits not in (4, 16):
        raise ValueError(f"lm_head_bits={lm_head_bits} must be 16 or 4")
    kv = KVSettings(kv_bits, kv_prompt_tokens, kv_window)
    plan = Plan(lm_head_bits, kv if kv_bits != 16 else None)
    try:
        plan.decoder(model)
    except Unsupported as why:
        log.warning("prepare_for_inference leaves the model as it is: %s", why)
        return model
    model.generate = functools.partial(_generate, model, plan)
    return model


def undo(model: nn.Module) -> nn.Module:
    """Give ``model.generate`` back to transformers and free the cache; fused weights stay shared, which costs nothing."""
    prepared = vars(model).pop("generate", None)
    for part in getattr(prepared, "args", ()):
        if isinstance(part, Plan):
            part.free()
    return model


class Plan:
    """What a prepared model keeps: its parts, and the state of the last batch. A copy of the model starts anew."""

    def __init__(self, head_bits: int, kv: KVSettings | None = None) -> None:
        self.head_bits, self.kv = head_bits, kv
        self._decoder: Decoder | None = None
        self._snapshot: Snapshot | None = None
        self._state: State | None = None
        self.warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self.head_bits, self.kv)

    def decoder(self, model: nn.Module) -> Decoder:
        """The model's parts, read again when it was moved, cast or changed."""
        if self._decoder is None or not self._snapshot.holds():
            self.free()
            self._decoder, self._snapshot = None, None
            with torch.inference_mode(False), torch.no_grad():  # what is kept serves calls outside of that mode too
                self._decoder = read_decoder(model, self.head_bits)
            self._snapshot = Snapshot(model)  # fusing has moved weights
        return self._decoder

    def state(self, decoder: Decoder, batch: int, prompt: int, new: int) -> State:
        """Memory for a batch: the last one where it fits."""
        state, whole = self._state, self.kv is not None and self.kv.prompt_tokens is None
        short = state is not None and (state.capacity < prompt + new or (whole and state.room < prompt))
        if state is None or state.batch != batch or short:
            self.free()  # before the new one is allocated
            slots, room = (-(-n // ROUND) * ROUND for n in (prompt + new, prompt))
            with torch.inference_mode(False), torch.no_grad():
                self._state = decoder.new_state(batch, slots, self.kv, room)
        return self._state

    def free(self) -> None:
        """Drop the state; its graphs refer back to it."""
        if self._state is not None:
            self._state.graphs.clear()
        self._state = None

    def warn(self, why: str) -> None:
        """Say once why calls are left to transformers."""
        if why not in self.warned:
            self.warned.add(why)
            log.warning("generate runs without the fused decode step: %s", why)


# ------------------------------------------------------------------------------------------------ what is left alone


def _generate(model: nn.Module, plan: Plan, *args: Any, **kwargs: Any) -> Any:
    """``model.generate``: transformers' own, with the fused loop as its decoding method where that can serve the call."""
    theirs = type(model).generate
    given = inspect.signature(theirs).bind(model, *args, **kwargs).arguments
    if given.get("custom_generate") is not None:
        return theirs(model, *args, **kwargs)
    try:
        _check_call(model, given)
        decoder = plan.decoder(model)
    except Unsupported as why:
        plan.warn(str(why))
        return theirs(model, *args, **kwargs)
    # generate passes neither streamer nor mode arguments on to a callable
    loop = functools.partial(_decode, plan, decoder, given.get("streamer"))
    return theirs(model, *args, **kwargs, custom_generate=loop)


# Settings that ask for another decoding method or for more than token ids, with the values that do not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "stop_strings": (None,),
    "return_dict_in_generate": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True),
    "cache_implementation": (None, "static", "dynamic"),
    "prefill_chunk_size": (None,),
}
THEIRS = ("past_key_values", "inputs_embeds", "position_ids", "token_type_ids")


def _check_call(model: nn.Module, given: dict[str, Any]) -> None:
    """Raise Unsupported for arguments of generate that the fused loop does not serve."""
    more = given.get("kwargs", {})
    for name in ("assistant_model", "synced_gpus", "negative_prompt_ids"):
        need(not given.get(name), f"{name} is given")
    for name in THEIRS:
        need(more.get(name) is None, f"{name} is given")
    for name, plain in PLAIN.items():
        sources = (more.get(name), getattr(given.get("generation_config"), name, None))
        value = next((v for v in sources if v is not None), getattr(model.generation_config, name, None))
        need(value in plain, f"{name}={value}")
    known = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
    for criteria in given.get("stopping_criteria") or ():
        need(type(criteria) in known, f"the stopping criterion {type(criteria).__name__} is not known to it")
    need(not model.training, "the model is in training mode")


def _padding(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """How many tokens on the left of each prompt are padding, int32 ``[B]``; None where there are none.

    Raises:
        Unsupported: for a mask with holes.
    """
    if mask is None:
        return None
    need(mask.shape == ids.shape, f"attention_mask {tuple(mask.shape)} is not that of ids {tuple(ids.shape)}")
    live = mask != 0
    start = (~live).sum(1)
    left = live == (torch.arange(ids.shape[1], device=ids.device) >= start[:, None])
    any_padding, only_left = torch.stack([start.any(), left.all()]).tolist()  # one wait for the GPU
    need(only_left, "attention_mask has zeros that are no padding on the left")
    return start.int() if any_padding else None


def _check_kv(decoder: Decoder, ids: Tensor) -> None:
    """Raise Unsupported for what the ops on a cache in mixed precision do not serve within a captured graph."""
    need(decoder.size % 16 == 0, f"heads of {decoder.size} channels have no low-bit format")
    if ids.is_cuda:
        need(decoder.size in HEAD_SIZES, f"there is no kernel for low-bit heads of {decoder.size} channels")
        need(len(ids) <= MAX_BATCH, f"there is no kernel for {len(ids)} sequences of low-bit keys and values")
        need(decoder.norm.dtype != torch.float32, "there is no kernel for float32 with low-bit keys and values")
        why = unavailable("cuda", "cuda")
        need(why is None, f"low-bit keys and values need the extension: {why}")


# ------------------------------------------------------------------------------------------------ the loop


def _decode(
    plan: Plan,
    decoder: Decoder,
    streamer: Any,
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    **model_kwargs: Any,
) -> Tensor:
    """transformers' ``_sample`` for a decoder-only model, returning token ids ``[B, length]``."""
    try:
        need(input_ids.device == decoder.norm.device, f"input_ids are on {input_ids.device}")
        need(stopping_criteria.max_length is not None, "no length is given at which it stops")
        if plan.kv is not None:
            _check_kv(decoder, input_ids)
        start = _padding(model_kwargs.get("attention_mask"), input_ids)
    except Unsupported as why:
        plan.warn(str(why))
        return type(model)._sample(
            model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
            generation_config=generation_config, streamer=streamer, **model_kwargs,
        )  # fmt: skip
    batch, prompt = input_ids.shape
    new = max(1, stopping_criteria.max_length - prompt)
    eos = next((c.eos_token_id.to(input_ids.device) for c in stopping_criteria if hasattr(c, "eos_token_id")), None)
    pad = 0 if eos is None else int(generation_config._pad_token_tensor)
    until = min((c.initial_timestamp + c.max_time for c in stopping_criteria if hasattr(c, "max_time")), default=None)
    sample, plain = generation_config.do_sample, not generation_config.do_sample and not len(logits_processor)

    def greedy() -> None:
        """A whole step on the GPU."""
        state.advance_greedily(decoder.step(state), eos, pad)

    def choose(logits: Tensor, length: int) -> Tensor:
        """The next tokens ``[B]``, as transformers chooses them."""
        scores = logits.to(copy=True, dtype=torch.float32)
        scores = logits_processor(state.tokens[:, :length], scores)
        if not sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)

    state = plan.state(decoder, batch, prompt, new)
    key = (None if eos is None else tuple(eos.tolist()), pad) if plain else "logits"
    if new > 1 and key not in state.graphs:  # before the prompt: the run before the capture writes into the state
        state.slot.zero_()
        if len(state.graphs) == MAX_GRAPHS:
            state.graphs.clear()
        state.graphs[key] = Captured(greedy if plain else lambda: decoder.step(state), input_ids.device)
    step = state.graphs.get(key)

    state.begin(input_ids)
    logits = decoder.prefill(state, input_ids, start)
    if plain:
        state.advance_greedily(logits, eos, pad)
    else:
        state.advance(choose(logits, prompt), eos, pad)
    watch = Watch(state, streamer) if eos is not None or streamer is not None or until is not None else None
    for n in range(1, new):
        if (watch and watch.finished()) or (until is not None and time.time() > until):
            break
        if plain:
            step()
        else:
            state.advance(choose(step(), prompt + n), eos, pad)
        if watch:
            watch.note()
    if watch:
        watch.drain()
    if streamer is not None:
        streamer.end()
    return state.tokens[:, : int(state.length.max())].clone()


class Watch:
    """What the host knows of the steps: one step late on a GPU, so that it never waits for the one that runs."""

    def __init__(self, state: State, streamer: Any) -> None:
        self.state, self.streamer, self.ended = state, streamer, False
        self.on_gpu = state.report.is_cuda
        self.spare = [torch.empty_like(state.report, device="cpu", pin_memory=self.on_gpu) for _ in range(3)]
        self.notes: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.note()

    def note(self) -> None:
        """Send for the tokens of the step that was just started, and whether sequences go on."""
        host = self.spare.pop()
        report = self.state.report
        host.copy_(report, non_blocking=self.on_gpu)
        event = None
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(report.device))
        self.notes.append((host, event))

    def finished(self) -> bool:
        """Read all notes but the newest (on the CPU all of them); True once every sequence has ended."""
        while len(self.notes) > (1 if self.on_gpu else 0) and not self.ended:
            self._read()
        return self.ended

    def drain(self) -> None:
        """Read what is left, up to the end of the last sequence."""
        while self.notes and not self.ended:
            self._read()

    def _read(self) -> None:
        host, event = self.notes.popleft()
        if event is not None:
            event.synchronize()
        if self.streamer is not None:
            self.streamer.put(host[0].clone())
        self.ended = not host[1].any()
        self.spare.append(host)
