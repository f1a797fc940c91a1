"""Where and in which arithmetic to compute, what that machine is, and what it took."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import pyquant

LONGEST_WINDOW = 2048  # tokens of an evaluation window when nothing is asked for and the model could take more


def quiet() -> None:
    """No progress bars and remarks of transformers between ours."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def pick_device(name: str) -> str:
    """``auto`` to the GPU if torch sees one.

    Raises:
        ValueError: ``cuda`` without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, and torch sees no GPU (pyquant doctor says why)")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def stored_dtype(model: nn.Module) -> torch.dtype:
    """What scales and unquantized tensors are stored in: the checkpoint's 16-bit dtype, bf16 for an fp32 checkpoint."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def pick_dtype(name: str, stored: torch.dtype, device: str) -> torch.dtype:
    """The arithmetic of evaluation: ``auto`` is the stored dtype on a GPU, float32 on a CPU (faster there)."""
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device == "cpu" else stored


def cast(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a model and put it into a dtype, in place, as a loader would: buffers that no checkpoint holds, such as rotary
    frequencies, keep their dtype. ``Module.to`` rounds them, and a frequency in bf16 is another position."""
    kept = [
        (m, name, m._buffers[name])
        for m in model.modules()
        for name in m._non_persistent_buffers_set
        if m._buffers.get(name) is not None
    ]
    model.to(device, dtype)
    for m, name, buffer in kept:
        assert buffer is not None
        m._buffers[name] = buffer.to(device)
    return model


def window_length(model: nn.Module, asked: int | None, setting: str = "eval_length") -> int:
    """Tokens in a window: as asked for by the named setting, or the context, at most 2048.

    Raises:
        ValueError: longer than the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None) or LONGEST_WINDOW
    if asked is not None and asked > context:
        raise ValueError(f"{setting}={asked} is longer than the model's context of {context} tokens")
    return asked or min(context, LONGEST_WINDOW)


def batch_for(rows: Tensor) -> int:
    """Windows at once: about 4096 tokens."""
    return max(1, 4096 // rows.shape[1])


def weight_bytes(folder: Path) -> int:
    """Size of a checkpoint's weights on disk."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def versions(device: str) -> dict[str, str]:
    """What to name in a report."""
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "pyquant": getattr(pyquant, "__version__", "unknown"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": machine,
    }


def peak_memory() -> dict[str, float]:
    """Peaks of this process in GiB."""
    peaks = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        peaks["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peaks
