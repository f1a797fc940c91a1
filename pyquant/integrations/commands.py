"""What the smaller commands do: evaluate, generate, convert to another format, time the kernel on a model's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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
from pyquant.nn.linear import QLinear
from pyquant.nn.swap import matches
from pyquant.ops import linear_w4a16


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


def linear_shapes(path: str, exclude: Sequence[str] = ("lm_head",)) -> list[tuple[int, int]]:
    """The distinct ``(N, K)`` of a model's linear layers, from its config alone, most frequent first."""
    config = AutoConfig.from_pretrained(local_folder(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts: dict[tuple[int, int], int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not matches(name, exclude):
            shape = (module.out_features, module.in_features)
            counts[shape] = counts.get(shape, 0) + 1
    return sorted(counts, key=counts.get, reverse=True)


def bench(
    path: str, tokens: Sequence[int] = (1, 16, 256), group_size: int = 128, on_event: OnEvent | None = None
) -> list[dict[str, Any]]:
    """Time ``linear_w4a16`` against torch's bf16 linear for the shapes of a model, on the present GPU.

    Weights are rotated through 256 MB, so that they come from memory as they do in a model; CUDA graphs, median of 5.

    Returns:
        rows ``{"N", "K", "M", "us", "bf16_us", "speedup"}``.

    Raises:
        ValueError: no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench times GPU kernels and torch sees no GPU here (pyquant doctor says why)")
    rows = []
    work = [(n, k, m) for n, k in linear_shapes(path) for m in tokens]
    with Clock(on_event)("bench") as tick:
        for i, (n, k, m) in enumerate(work):
            group = group_size if k % group_size == 0 else -1
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(_copies(2 * n * k))]
            layer = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
            layer.weight.data = dense[0]
            q = QLinear.from_linear(layer, QuantSpec(4, group, True))
            packed = [q.qweight.clone() for _ in range(_copies(n * k // 2))]
            us = _median_us([partial(linear_w4a16, x, w, q.scale, None, None, n, group) for w in packed])
            bf16 = _median_us([partial(nn.functional.linear, x, w) for w in dense])
            rows.append({"N": n, "K": k, "M": m, "us": us, "bf16_us": bf16, "speedup": bf16 / us})
            tick(i + 1, len(work), f"{n}x{k}, {m} tokens")
    return rows


def _copies(size: int) -> int:
    return max(1, min(64, -(-256_000_000 // size)))


def _median_us(calls: list[Any], rounds: int = 5) -> float:
    """Microseconds a call, the calls captured one after another in a CUDA graph."""
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        repeat = max(1, 32 // len(calls))
        with torch.cuda.graph(graph):
            for _ in range(repeat):
                for call in calls:
                    call()
        times = []
        for _ in range(rounds + 1):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end) / (repeat * len(calls)))
    return float(Tensor(times[1:]).median())  # the first replay warms up
