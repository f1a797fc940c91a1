"""What the smaller commands do: evaluate, generate, convert to another format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.checkpoint import local_folder, read_config
from pyquant.integrations.data import load_text, windows
from pyquant.integrations.evaluate import perplexity
from pyquant.integrations.events import Clock, OnEvent
from pyquant.integrations.export import ExportInfo, export
from pyquant.integrations.gptq import load_gptq
from pyquant.integrations.machine import batch_for, cast, pick_device, pick_dtype, stored_dtype, window_length
from pyquant.integrations.transformers import load_causal_lm, load_model, spec_of
from pyquant.nn.kv_cache import KVSettings


def load_any(path: str, device: str = "auto", dtype: str = "auto") -> tuple[nn.Module, Any, bool]:
    """A model folder, full precision or quantized, on the asked device and dtype.

    Returns:
        model, tokenizer, whether it is quantized.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_causal_lm` and :func:`load_model`.
    """
    folder, device = local_folder(path), pick_device(device)
    quantized = bool(read_config(folder).get("quantization_config"))
    model, tokenizer = _load_quantized(folder)[:2] if quantized else load_causal_lm(folder)
    return cast(model, device, pick_dtype(dtype, stored_dtype(model), device)), tokenizer, quantized


def _load_quantized(folder: Path) -> tuple[nn.Module, Any, QuantSpec]:
    quantization = read_config(folder)["quantization_config"]
    if quantization.get("quant_method") == "gptq":
        model, spec = load_gptq(folder), QuantSpec(quantization["bits"], quantization["group_size"])
    else:
        model, spec = load_model(folder), spec_of(quantization, str(folder))
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True), spec


def evaluate(
    path: str,
    texts: Sequence[str],
    length: int | None = None,
    count: int | None = None,
    skip_chars: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Perplexity of a full-precision or quantized model.

    Args:
        path: model folder.
        texts: sources for :func:`load_text`, at least one.
        length, count, skip_chars: tokens a window, windows a text (None: all), characters to skip.
        device, dtype: as in :class:`pyquant.integrations.config.QuantizeConfig`.
        on_event: receives progress.

    Returns:
        ``{"model", "quantized", "device", "dtype", "rows": [{"text", "windows", "length", "perplexity"}]}``.
    """
    clock = Clock(on_event)
    sources = {text: load_text(text, skip_chars=skip_chars) for text in texts}
    with clock("load the model"):
        model, tokenizer, quantized = load_any(path, device, dtype)
    length = window_length(model, length)
    cut = {source: windows(tokenizer, text, length, count, source) for source, text in sources.items()}
    rows = []
    for source, tokens in cut.items():
        with clock(f"evaluate on {Path(source).name}") as tick:
            value = perplexity(model, tokens, batch_for(tokens), tick)
        rows.append({"text": source, "windows": len(tokens), "length": length, "perplexity": value})
    p = next(model.parameters())
    kind = {"quantized": quantized, "device": p.device.type, "dtype": str(p.dtype).removeprefix("torch.")}
    return {"model": path, **kind, "rows": rows}


def kv_settings(bits: int, prompt: str, window: int, has_system: bool = False) -> KVSettings:
    """Settings of a KV cache as the command line gives them.

    Raises:
        ValueError: a prompt that is neither a number of tokens, ``all``, ``none`` nor ``system`` (where there is a system
            prompt); values out of range.
    """
    if prompt == "system" and not has_system:
        raise ValueError("--kv-prompt system needs a system prompt (--chat --system-prompt)")
    if prompt not in ("all", "none", "system") and not prompt.isdigit():
        raise ValueError(f"--kv-prompt {prompt!r} must be a number of tokens, all, none or system")
    kept = {"all": None, "system": None, "none": 0}
    return KVSettings(bits, kept[prompt] if prompt in kept else int(prompt), window)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    seed: int = 0,
    streamer: Any = None,
    kv: KVSettings | None = None,
) -> str:
    """Continue a prompt; temperature 0 takes the most likely token each time.

    With ``kv`` the model's attention becomes ``"pyquant"`` and its cache a :class:`pyquant.KVCache` of these settings.

    Raises:
        ValueError: a negative temperature.
    """
    device = next(model.parameters()).device
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if tokens.shape[1] == 0:  # an empty prompt begins a document
        tokens = torch.tensor([[start_token(model, tokenizer)]])
    tokens = tokens.to(device)
    how = sampling(temperature)
    if kv is not None:
        from pyquant.integrations.kv_cache import NAME, KVCache

        model.set_attn_implementation(NAME)
        how["past_key_values"] = KVCache(model.config, kv.bits, kv.prompt_tokens, kv.window, kv.capacity)
    torch.manual_seed(seed)
    with torch.inference_mode():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            pad_token_id=start_token(model, tokenizer),
            streamer=streamer,
            **how,
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def sampling(temperature: float) -> dict[str, Any]:
    """Arguments of ``generate`` for a temperature; 0 takes the most likely token each time.

    Raises:
        ValueError: a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def token_streamer(tokenizer: Any) -> Any:
    """Prints tokens to stdout as they come."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_special_tokens=True)


def start_token(model: nn.Module, tokenizer: Any) -> int:
    """The token a document begins with: bos, else eos, else 0."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id, 0)
    return next(token for token in known if token is not None)


def reexport(path: str, out: Path, fmt: str, overwrite: bool = False) -> ExportInfo:
    """Write a quantized folder in another format; the codes stay the same.

    Raises:
        FileExistsError: out exists and overwrite is False.
        ValueError: not quantized, or a format that cannot hold it.
    """
    folder = local_folder(path)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; --overwrite replaces it")
    if not read_config(folder).get("quantization_config"):
        raise ValueError(f"{folder} is not quantized; pyquant quantize makes such a folder")
    model, tokenizer, spec = _load_quantized(folder)
    return export(model, tokenizer, folder, out, spec, fmt, overwrite)


# ------------------------------------------------------------------------------------------------ bench
