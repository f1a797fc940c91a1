"""Write a quantized model for others to load: compressed-tensors (default) or GPTQ, safetensors only, all or nothing.

The folder is written shard by shard beside its final place, flushed to disk, and renamed when it is complete; until
then a previous folder stays as it is. What each format holds:

* ``compressed-tensors``: ``pack-quantized``, every width 2..4 in its own bits, symmetric or not (see
  :mod:`pyquant.formats.int4`).
* ``gptq``: symmetric, version 1: ``qweight`` int32 ``[K*b/32, N]`` (the packed rows, transposed), ``scales`` fp16
  ``[K/G, N]``, ``qzeros`` int32 ``[K/G, N*b/32]`` holding ``2^(b-1) - 1``, ``g_idx`` int32 ``[K]``.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.act_config import common_act, input_activations
from pyquant.integrations.checkpoint import INDEX, SINGLE, local_folder, read_config
from pyquant.integrations.evaluate import probe_logits
from pyquant.integrations.files import flush
from pyquant.integrations.gptq import check_gptq, gptq_config, gptq_tensors, load_gptq
from pyquant.integrations.transformers import compressed_tensors_config, load_model
from pyquant.nn.linear import QLinear

FORMATS = ("compressed-tensors", "gptq")
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
    "chat_template*", "generation_config.json", "LICENSE*",
)  # fmt: skip
_SHORT = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class ExportMismatch(RuntimeError):
    """The written folder does not compute what was evaluated."""


@dataclass
class ExportInfo:
    """What was written.

    Attributes:
        files: names in the folder, sorted.
        bytes: their size together.
        container_bits: width of a stored code.
        note: what a user of the folder must know, or "".
    """

    files: list[str]
    bytes: int
    container_bits: int
    note: str


def export(
    model: nn.Module,
    tokenizer: Any,
    source: str | Path,
    out: str | Path,
    spec: QuantSpec,
    fmt: str = "compressed-tensors",
    overwrite: bool = False,
    extra: dict[str, str] | None = None,
    max_shard_size: int = 5_000_000_000,
) -> ExportInfo:
    """Write a model with QLinear layers as a folder that other tools load.

    Args:
        model: the quantized model; its floating tensors are stored in the source's dtype (bf16 for an fp32 source) where
            that holds them exactly, as after :func:`~pyquant.recipes.rtn.rtn` and
            :func:`~pyquant.recipes.kd_qat.convert`; otherwise all in fp32 (and the note says so).
        tokenizer: saved when the source folder has no tokenizer files to copy; may be None.
        source: folder (or Hub name) of the full-precision model: its config, tokenizer, generation config and licence
            go along.
        out: the folder to write.
        spec: how the layers are quantized.
        fmt: ``compressed-tensors`` or ``gptq``.
        overwrite: replace an existing model folder, once the new one is complete.
        extra: further text files, name -> content.
        max_shard_size: bytes a weights file holds at most (a larger tensor gets its own).

    Returns:
        files, bytes, stored width and a note.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is False, or it is no model folder.
        ValueError: an unknown format, a model that is not quantized as ``spec`` says, or that the format cannot hold.
        OSError: the disk is full, or another write error; nothing is left behind and an old folder is whole.
    """
    source, out = local_folder(source), Path(out).expanduser().absolute()
    _check_target(source, out, overwrite)
    _check_model(model, spec, fmt)
    dtype, note = _stored_dtype(model, read_config(source))
    kept = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if fmt == "gptq":
        config = gptq_config(spec, [name for name, m in model.named_modules() if isinstance(m, QLinear)], kept)
        tensors = _tensors(model, dtype, lambda _, layer: gptq_tensors(layer))
    else:
        config = compressed_tensors_config(spec, kept, common_act(model))
        tensors = _tensors(model, dtype, lambda _, layer: _packed(layer, dtype))
    notes = [note] if note else []
    if fmt == "compressed-tensors" and not spec.symmetric:
        notes.append(
            "asymmetric: transformers 5.23 with compressed-tensors 0.18 to 0.20 refuses it (weight_zero_point size "
            "mismatch) unless CompressedTensorsConfig(dequantize=True) is given, which rounds weights to the file's "
            "dtype; pyquant and transformers 5.17 load it as it is"
        )
    if spec.bits < 4:
        notes.append(f"codes are stored in {spec.bits} bits; servers' fast kernels are written for 4")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _check_room(partial, sum(t.numel() * t.element_size() for m in model.modules() for _, t in _own(m)))
        _write_shards(partial, tensors, max_shard_size)
        _write_texts(partial, source, tokenizer, config, dtype, extra or {})
        for file in partial.iterdir():
            flush(file)
        flush(partial)
        _put_in_place(partial, out)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error).lower():
            raise OSError(errno.ENOSPC, f"the disk of {out.parent} is full; {out.name} was not written") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = sorted(p for p in out.rglob("*") if p.is_file())
    names, size = [str(p.relative_to(out)) for p in files], sum(p.stat().st_size for p in files)
    return ExportInfo(names, size, spec.bits, "; ".join(notes))


def verify(
    out: str | Path,
    tokens: Tensor,
    expected_logits: Tensor,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> float:
    """Load an exported folder back and compare what it computes with what was evaluated.

    Args:
        out: the folder.
        tokens: int64 ``[B, T]``.
        expected_logits: fp32 ``[B, T, V]`` of the model that was evaluated, in ``dtype`` on ``device``, for the same
            batch (:func:`~pyquant.integrations.evaluate.probe_logits`).

    Returns:
        the largest absolute difference, which is 0.

    Raises:
        ExportMismatch: the logits are not equal.
    """
    folder = local_folder(out)
    method = read_config(folder).get("quantization_config", {}).get("quant_method")
    model = load_gptq(folder, dtype, device) if method == "gptq" else load_model(folder, dtype, device)
    logits = probe_logits(model, tokens)
    if logits.shape != expected_logits.shape:
        raise ExportMismatch(f"{out} gives logits {tuple(logits.shape)}, expected {tuple(expected_logits.shape)}")
    difference = (logits - expected_logits).abs().max().item()
    if not torch.equal(logits, expected_logits):
        raise ExportMismatch(f"{out} does not compute what was evaluated: the logits differ by up to {difference:.3g}")
    return difference


# ------------------------------------------------------------------------------------------------ checks


def _check_target(source: Path, out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists; choose another folder, or overwrite it on purpose")
    if source.resolve() == out.resolve() or out.resolve() in source.resolve().parents:
        raise FileExistsError(f"{out} holds the source model {source}; it cannot be overwritten")
    if not out.is_dir() or out.is_symlink() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise FileExistsError(f"{out} is no model folder (it has no config.json); it is not overwritten")


def _check_model(model: nn.Module, spec: QuantSpec, fmt: str) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known: {', '.join(FORMATS)}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}
    if not layers:
        raise ValueError("the model has no QLinear layer: quantize it before exporting")
    for name, layer in layers.items():
        if layer.spec != spec:
            raise ValueError(f"{name} is {layer.spec}, not {spec}")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, QLinear) and getattr(model.config, "tie_word_embeddings", False):
        raise ValueError("the output layer is quantized but the config ties it to the embedding; exclude it")
    act = common_act(model)
    if fmt == "gptq" and act is not None:
        raise ValueError(f"inputs are quantized as {act}, for which gptq has no place; write compressed-tensors")
    input_activations(act)
    if fmt == "gptq":
        for name, layer in layers.items():  # before anything is written
            check_gptq(name, layer)


def _stored_dtype(model: nn.Module, config: dict[str, Any]) -> tuple[torch.dtype, str]:
    """The source's dtype if it holds every floating tensor exactly, else fp32 and a note.

    From an fp32 source, bf16 where that is exact, as it is after the pipeline's rounding.
    """
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    first = {v: k for k, v in _SHORT.items()}.get(name, torch.float32)
    for dtype in (first,) if first != torch.float32 else (torch.bfloat16, torch.float32):
        why = _loses(model, dtype)
        if not why:
            return dtype, ""
    return torch.float32, f"stored as float32: {why}"


def _loses(model: nn.Module, dtype: torch.dtype) -> str:
    """Which tensor a dtype does not hold exactly, or ""."""
    for module_name, module in model.named_modules():
        for own, t in _own(module):
            if t.is_floating_point() and not torch.equal(t.to(dtype).to(t.dtype), t):
                return f"{module_name}.{own} has values that {_SHORT[dtype]} does not hold"
    return ""


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size:,} bytes are needed, {free:,} are free")


# ------------------------------------------------------------------------------------------------ tensors


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers that a module itself holds."""
    yield from ((n, p) for n, p in module._parameters.items() if p is not None)
    passing = module._non_persistent_buffers_set
    yield from ((n, b) for n, b in module._buffers.items() if b is not None and n not in passing)


def _packed(layer: QLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    state = layer.portable()
    state["weight_scale"] = state["weight_scale"].to(dtype)
    return state


def _tensors(
    model: nn.Module, dtype: torch.dtype, pack: Callable[[str, QLinear], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) of all that is stored, one at a time, tied tensors once, as the checkpoint names them."""
    tied = getattr(model, "all_tied_weights_keys", {})
    sources = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}
    conversions = getattr(model, "_weight_conversions", None)

    def walk() -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            if isinstance(module, QLinear):
                for own, t in pack(name, module).items():
                    yield prefix + own, t.contiguous().cpu()
                if module.bias is not None:
                    yield f"{prefix}bias", module.bias.detach().to(dtype).cpu()
                continue
            for own, t in _own(module):
                if id(t) not in seen and not (prefix + own in tied and id(t) in sources):
                    seen.add(id(t))
                    t = t.detach()
                    yield prefix + own, (t.to(dtype) if t.is_floating_point() else t).contiguous().cpu()

    if conversions:  # the checkpoint's names differ from the model's: transformers knows the way back, all at once
        from transformers.core_model_loading import revert_weight_conversion

        yield from revert_weight_conversion(model, dict(walk())).items()
    else:
        yield from walk()


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    """One shard in memory at a time; files get their final names when their number is known."""
    shard: dict[str, Tensor] = {}
    size, total, names = 0, 0, []

    def flush() -> None:
        file = folder / f"shard-{len(names)}"
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(folder.stat().st_mode & 0o666)  # save_file leaves 0600, and servers often run as another user
        names.append(list(shard))

    for name, t in tensors:
        here = t.numel() * t.element_size()
        if shard and size + here > limit:
            flush()
            shard, size = {}, 0
        shard[name] = t
        size, total = size + here, total + here
    flush()
    if len(names) == 1:
        os.rename(folder / "shard-0", folder / SINGLE)
        return
    weight_map = {}
    for i, held in enumerate(names):
        file = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
        os.rename(folder / f"shard-{i}", folder / file)
        weight_map.update(dict.fromkeys(held, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_texts(
    folder: Path, source: Path, tokenizer: Any, quantization: dict[str, Any], dtype: torch.dtype, extra: dict[str, str]
) -> None:
    config = read_config(source)
    config["quantization_config"] = quantization
    config["dtype"] = _SHORT[dtype]
    if "torch_dtype" in config:
        config["torch_dtype"] = _SHORT[dtype]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if quantization["quant_method"] == "gptq":
        (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=2) + "\n")
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if tokenizer is not None and not any(folder.glob("tokenizer*")):
        tokenizer.save_pretrained(folder)
    for name, text in extra.items():
        if Path(name).name != name:
            raise ValueError(f"extra file {name!r} must be a plain file name")
        (folder / name).write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ files


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename; an old folder steps aside first and comes back if the rename fails."""
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    had = os.path.lexists(out)
    if had:
        os.rename(out, old)
    try:
        os.rename(partial, out)
    except BaseException:
        if had:
            os.rename(old, out)
        raise
    flush(out.parent)
    if had:
        shutil.rmtree(old, ignore_errors=True)
