"""A prompt's keys and values in a file, computed once and read at every later start (``KVCache.save``, ``KVCache.load``).

One safetensors file::

    ids               int64          [P]            the tokens of the prompt
    layers.N.key      model's dtype  [Hkv, P, D]    of layer N, as attention sees them: after norm and rotary embedding
    layers.N.value    model's dtype  [Hkv, P, D]

and as metadata, all of it text: ``format``, ``pyquant`` (version), ``config``, ``weights`` and ``ids`` (fingerprints),
``dtype``, ``settings`` (JSON of :class:`pyquant.nn.kv_cache.KVSettings`), ``text``. A file serves
the model that made it and no other: fingerprints cover every value of every weight, and every setting of the config that is
not about housekeeping. They find mistakes, not forgeries.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pyquant
from pyquant.formats.kv4 import unpack_tiles
from pyquant.integrations.files import flush
from pyquant.integrations.kv_cache import CacheLayer, KVCache
from pyquant.integrations.read_decoder import named_weights
from pyquant.nn.kv_cache import KVSettings

FORMAT = "pyquant kv prompt 1"
# Settings of a config that say nothing about what a layer computes.
HOUSEKEEPING = {
    "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache",
    "quantization_config", "id2label", "label2id", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp",
    "initializer_range", "_attn_implementation", "attn_implementation", "_commit_hash", "problem_type",
}  # fmt: skip
WORDS = 1 << 24  # summed at once


@dataclass(frozen=True)
class Saved:
    """What a file says of itself: tokens int64 ``[P]``, their text if it was given, and the metadata."""

    ids: Tensor
    text: str
    about: dict[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(self.about["settings"])


# ------------------------------------------------------------------------------------------------ fingerprints


@torch.no_grad()
def _sums(t: Tensor) -> Tensor:
    """Two sums of a tensor's bytes as 32-bit words, int64 ``[n, 2]``: plain, and weighted by position; each wraps around.

    Integers, so that order and device do not matter.
    """
    data = t.detach().contiguous().reshape(-1).view(torch.uint8)
    if rest := -data.numel() % 4:
        data = torch.cat([data, data.new_zeros(rest)])
    found = []
    for words in data.view(torch.int32).split(WORDS):
        wide = words.long()
        place = torch.arange(1, len(wide) + 1, device=wide.device) * 2_654_435_761
        found.append(torch.stack([wide.sum(), (wide * place).sum()]))
    return torch.stack(found) if found else torch.zeros(0, 2, dtype=torch.int64, device=t.device)


def weights_fingerprint(model: nn.Module) -> str:
    """Of every value of a model's weights, 32 hexadecimal digits: a pass over the memory that they take."""
    digest, sums, known = hashlib.sha256(), [], set[tuple[int, int]]()
    for name, t in named_weights(model):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        if (where := (t.data_ptr(), t.numel())) not in known:
            known.add(where)
            sums.append(_sums(t))
    for device in sorted({str(s.device) for s in sums}):  # one wait for each
        digest.update(str(torch.cat([s for s in sums if str(s.device) == device]).tolist()).encode())
    return digest.hexdigest()[:32]


def config_fingerprint(config: Any) -> str:
    """Of what a model's config says about its layers, 32 hexadecimal digits."""
    kept = {k: v for k, v in config.to_dict().items() if k not in HOUSEKEEPING and v is not None}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:32]


def ids_fingerprint(ids: Tensor) -> str:
    """Of tokens int64 ``[P]``, 32 hexadecimal digits."""
    return hashlib.sha256(str(ids.tolist()).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------ out and in


def _kept(layer: CacheLayer, tokens: int) -> tuple[Tensor, Tensor]:
    """K and V ``[Hkv, tokens, D]`` of the first sequence, from the part that is kept as it came.

    Raises:
        ValueError: the layer keeps fewer tokens so, or left out padding.
    """
    if layer.plain is not None:
        held, padded = layer.plain.get_seq_length(), False
    elif layer.kept is not None:
        held, padded = layer.kept.held[0][0], any(layer.kept.padding)
    else:
        held, padded = 0, False
    if padded:
        raise ValueError("a cache whose sequences were padded has no single prompt to save")
    if held < tokens:
        raise ValueError(
            f"{tokens} tokens are to be saved and the cache keeps {held} in 16 bits: fill one with prompt_tokens=None by "
            "a single call"
        )
    if layer.plain is not None:
        k, v = layer.plain.keys[0], layer.plain.values[0]
    else:
        k, v = (t[0] for t in unpack_tiles(layer.kept.prompt[:1], layer.kept.size))
    return k[:, :tokens], v[:, :tokens]


def save(cache: KVCache, path: Path, model: nn.Module, ids: Tensor, text: str = "") -> None:
    """See :meth:`KVCache.save`."""
    ids = ids.reshape(-1).cpu().long()
    if not len(ids):
        raise ValueError("a prompt of no tokens cannot be saved")
    tensors = {"ids": ids}
    for i, layer in enumerate(cache.layers):
        for name, t in zip(("key", "value"), _kept(layer, len(ids)), strict=True):
            tensors[f"layers.{i}.{name}"] = t.cpu().contiguous()
    about = {
        "format": FORMAT, "pyquant": pyquant.__version__, "config": config_fingerprint(cache.config),
        "weights": weights_fingerprint(model), "ids": ids_fingerprint(ids),
        "dtype": str(tensors["layers.0.key"].dtype).removeprefix("torch."),
        "settings": json.dumps(asdict(cache.settings)), "text": text,
    }  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=about)
    flush(partial)
    os.replace(partial, path)


def header(path: Path) -> Saved:
    """What a file holds, without its keys and values.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no file of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} is no file of a prompt's keys and values (format {about.get('format')!r})")
            return Saved(file.get_tensor("ids"), about.get("text", ""), about)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def check(path: Path, saved: Saved, model: nn.Module, ids: Tensor | None = None) -> None:
    """Raise ValueError, saying what differs, unless a file was made by this model (for these tokens)."""
    dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    config = model.config.get_text_config(decoder=True)
    what = None
    if config_fingerprint(config) != saved.about["config"]:
        what = "a model of another config"
    elif saved.about["dtype"] != dtype:
        what = f"a model in {saved.about['dtype']}, and this one computes in {dtype}"
    elif ids is not None and ids_fingerprint(ids.reshape(-1)) != saved.about["ids"]:
        what = f"other tokens ({len(saved.ids)} of them, this prompt has {ids.numel()})"
    elif ids_fingerprint(saved.ids) != saved.about["ids"]:
        what = "something that changed its tokens afterwards"
    elif weights_fingerprint(model) != saved.about["weights"]:
        what = "a model of other weights"
    if what is not None:
        raise ValueError(f"{path} was made for {what}; delete it, or name another file")


def load(path: Path, model: nn.Module, ids: Tensor | None = None, **settings: Any) -> KVCache:
    """See :meth:`KVCache.load`."""
    saved = header(path)
    check(path, saved, model, ids)
    known = {name: value for name, value in saved.settings.items() if name in KVSettings.__dataclass_fields__}
    given = {name: value for name, value in settings.items() if value is not None}
    cache = KVCache(model.config, **{**known, **given, "prompt_tokens": None})
    device = next(model.parameters()).device
    with safe_open(path, framework="pt") as file:
        for i, layer in enumerate(cache.layers):
            k, v = (file.get_tensor(f"layers.{i}.{name}")[None].to(device) for name in ("key", "value"))
            layer.lazy_initialization(k, v)
            (layer.store if layer.plain is None else layer.plain.update)(k, v)
    cache.ids = saved.ids
    return cache
