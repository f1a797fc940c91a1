"""Perplexity, and the logits that say whether two models are the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.inference_mode()
def perplexity(
    model: nn.Module, windows: Tensor, batch_size: int = 4, on_batch: Callable[[int, int], None] | None = None
) -> float:
    """``exp`` of the mean next-token cross-entropy, every window scored alone, log-softmax in fp32.

    Args:
        model: a causal LM: ``model(input_ids=...)`` has ``.logits [B, T, V]``.
        windows: int64 ``[n, T]``, T >= 2 (see :func:`pyquant.integrations.data.windows`); T - 1 predictions each.
        batch_size: windows at once; the result does not depend on it beyond rounding.
        on_batch: called with (windows done, windows) after each batch.

    Raises:
        ValueError: for windows of another shape, or NaN logits.
    """
    if windows.dim() != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [n >= 1, T >= 2] tokens, got {tuple(windows.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for start in range(0, len(windows), batch_size):
            tokens = windows[start : start + batch_size].to(device)
            logits = model(input_ids=tokens, use_cache=False).logits
            for row, target in zip(logits[:, :-1], tokens[:, 1:], strict=True):  # fp32 for one window at a time
                sums += nn.functional.cross_entropy(row.float(), target, reduction="sum").double()
            if on_batch is not None:
                on_batch(min(start + batch_size, len(windows)), len(windows))
    finally:
        model.train(training)
    return exp_mean(sums.item(), windows)  # the only synchronisation with a GPU


def exp_mean(total: float, windows: Tensor) -> float:
    """Perplexity from the summed cross-entropy of windows ``[n, T]``; infinite where it overflows.

    Raises:
        ValueError: for NaN.
    """
    if math.isnan(total):
        raise ValueError("the model's logits are NaN: its perplexity is undefined")
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


@torch.inference_mode()
def probe_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of a small batch as fp32 on the CPU, computed on the model's own device and in its own dtype.

    Args:
        model: a causal LM.
        tokens: int64 ``[B, T]``.

    Returns:
        fp32 ``[B, T, V]``.
    """
    training = model.training
    model.eval()
    try:
        return model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()
    finally:
        model.train(training)
