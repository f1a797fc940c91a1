"""What a model folder holds, checked before anything is loaded: one sentence for each way it can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a repository on the Hub; never pickles


def local_folder(path: str | Path) -> Path:
    """The folder of a model: itself, or fetched from the Hub when it is no path but a name like ``org/name``.

    Raises:
        FileNotFoundError: neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{path} is a file; give the folder of the model")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise FileNotFoundError(f"{path} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=WANTED))
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{path} is no folder here and the Hugging Face Hub does not give it: {why}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as a dict.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object")
    return config


def check_causal(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what ``AutoModelForCausalLM`` cannot load or would load with an invented head.

    Raises:
        ValueError: with the architecture.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if kind not in NAMES:
        raise ValueError(f"{folder} is not a causal language model that transformers knows (model_type {kind!r})")
    known = NAMES[kind] if isinstance(NAMES[kind], (list, tuple)) else (NAMES[kind],)
    if architectures and not set(architectures) & set(known):
        raise ValueError(f"{folder} is a {architectures[0]}, not a causal language model ({', '.join(known)})")


def check_weights(folder: Path) -> list[Path]:
    """The weight files of a folder, each opened once: present, complete, safetensors.

    Raises:
        ValueError: none, pickles only, or a file that is missing or damaged (named).
    """
    index = folder / INDEX
    wanted: dict[str, str] = {}
    if index.is_file():
        try:
            wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is damaged: {error!r}") from None
        files = sorted({folder / name for name in wanted.values()})
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    else:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} has its weights as pickles only ({pickles[0]}), which can run code when opened; "
                "save the model again with save_pretrained, which writes safetensors"
            )
        raise ValueError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    held: set[str] = set()
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder}: the weights file {file.name} is missing")
        try:
            with safe_open(file, framework="pt") as tensors:
                held.update(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or incomplete: {error}") from None
    if lacking := sorted(set(wanted) - held):
        raise ValueError(f"{folder}: the tensor {lacking[0]} is in {INDEX} but in none of its files")
    return files
