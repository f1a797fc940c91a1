"""How much memory block-wise quantization needs, told before the work begins."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from pyquant.recipes.settings import Settings

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes on the compute device and on the host, by what needs them."""

    device: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    disk: float = 0.0

    def __str__(self) -> str:
        def line(parts: dict[str, float]) -> str:
            shown = [f"{name} {size / GIB:.2f}" for name, size in parts.items() if size >= 0.005 * GIB]
            return f"{sum(parts.values()) / GIB:.2f} GiB" + (f" ({', '.join(shown)})" if shown else "")

        return f"device {line(self.device)}; host {line(self.host)}"


def estimate(
    block: nn.Module,
    rest: int,
    vocabulary: int,
    windows: int,
    length: int,
    hidden: int,
    settings: Settings,
    width: int,
    place: str,
    count: int,
) -> Estimate:
    """What a run will hold at its peak.

    Args:
        block: one block (on the meta device will do); all are taken to be like it.
        rest: parameters outside the blocks.
        vocabulary: V.
        windows, length, hidden: n, S, H of the calibration windows of this process.
        settings: of the run; ``batch_size`` is this process' share.
        width: bytes of a weight and of a hidden value.
        place: where hidden states are: ``device``, ``host`` or ``disk``.
        count: blocks of the model.
    """
    how = settings
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    elements = sum(p.numel() for p in block.parameters())
    quantized = sum(m.weight.numel() for m in linears)
    trains = how.steps + how.polish > 0
    opened = count if how.polish else min(how.window, count)
    ahead = count if how.lookahead == "end" or how.polish else how.window + int(how.lookahead)
    ahead = max(1, min(ahead, count) - how.window)
    # offset, its best, its gradient, the move, the scales spread out, the adjusted weight: fp32; w_hat in the width
    per_weight = (6 * 4 + width + (8 if how.optimizer == "adamw" else 0)) if trains else 3 * 4
    tokens = how.batch_size * length
    # what backward keeps: inputs and outputs of each linear layer, and about as much again in norms and activations
    kept = 2 * sum(m.in_features + m.out_features for m in linears) * tokens * width
    chain = min(how.window, count) + (ahead if how.lookahead not in (0,) or how.polish else 0)
    to_logits = how.lookahead == "end" or how.polish > 0
    widest = max((m.in_features for m in linears), default=0)
    streams = 3 if how.target == "fp" and not how.local else 4
    states = streams * windows * length * hidden * width
    device = {
        "embeddings and head": rest * width,
        "blocks being trained": opened * (elements * width + quantized * per_weight),
        "full-precision blocks": ahead * elements * width,
        "activations of a step": (kept * chain if trains else kept) + 4 * tokens * hidden * width,
        "logits": 6 * tokens * vocabulary * 4 if to_logits and trains else 0,
        "second moments": 3 * 4 * widest**2 + sum(4 * m.in_features**2 for m in linears)
        if how.start in ("gptq", "awq")
        else 0,
        "hidden states": states if place == "device" else 0,
        "CUDA and slack": 0.75 * GIB,
    }
    host = {
        "finished blocks": count * quantized * 0.6,
        "hidden states": states if place == "host" else 0,
        "python and torch": 1.5 * GIB,
    }
    return Estimate(device, host, states if place == "disk" else 0.0)


def check(need: Estimate, device_limit: float | None, host_limit: float | None, disk_limit: float | None) -> None:
    """Refuse a run that will not fit, saying what to change.

    Args:
        need: from :func:`estimate`.
        device_limit, host_limit, disk_limit: bytes; None is no limit.

    Raises:
        ValueError: it does not fit.
    """
    total = sum(need.device.values())
    if device_limit is not None and total > device_limit:
        largest = max(need.device, key=lambda name: need.device[name])
        advice = {
            "hidden states": "--activations host or disk",
            "logits": "a smaller --batch-size, or --lookahead below end",
            "activations of a step": "a smaller --batch-size or --calibration-length",
            "blocks being trained": "a smaller --window, no --polish, or --learn clip",
            "full-precision blocks": "a smaller --lookahead",
        }.get(largest, "a smaller --batch-size")
        raise ValueError(
            f"this run needs about {total / GIB:.1f} GiB of device memory and may use {device_limit / GIB:.1f} GiB; "
            f"most of it is {largest} ({need.device[largest] / GIB:.1f} GiB): try {advice}"
        )
    total = sum(need.host.values())
    if host_limit is not None and total > host_limit:
        raise ValueError(
            f"this run needs about {total / GIB:.1f} GiB of host memory and {host_limit / GIB:.1f} GiB are free: "
            "try fewer --calibration-windows, or --activations disk"
        )
    if disk_limit is not None and need.disk > disk_limit:
        raise ValueError(
            f"the hidden states need {need.disk / GIB:.1f} GiB of disk and {disk_limit / GIB:.1f} GiB are free: "
            "try fewer --calibration-windows"
        )
