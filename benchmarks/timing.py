"""How times are taken: replays of a CUDA graph over weights that come from memory, on random data; the median counts."""

from __future__ import annotations

import datetime
import statistics
import subprocess
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 256 << 20  # weights are rotated through at least this much, several times any L2


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls, in order, in one CUDA graph; the first two are run before, so that what they set up is there."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Microseconds a call: all calls are captured into one graph, in order, and the graph is replayed.

    Args:
        calls: the same work on different (cold) data; their number is how often the data repeats.
        replays: timed replays; the median is returned.
    """
    graph = capture(calls)
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    return statistics.median(times)


def chain_us(
    layers: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, calls: int, hand_on: bool
) -> float:
    """Microseconds a call in a chain, as the products of a decode step stand in one.

    Each call has another weight, so that weights come from memory, and takes what the one before returned: its first K
    columns. Where a call returns fewer, or ``hand_on`` is False, each takes x, and the stream alone keeps the order: a
    kernel that starts early waits for the one ahead of it all the same.

    Args:
        layers: ``[M, K] -> [M, N]`` with weights of their own, used in turn, that keep values near the size of x's.
        x: ``[M, K]``, the first input.
        calls: length of the chain.
        hand_on: whether results become inputs; a peer that takes no row stride cannot be handed a part of wider rows.

    Raises:
        RuntimeError: when the chain ends in numbers far from x's size, or not finite: such a time says nothing.
    """
    k, results = x.shape[1], {}

    def link(i: int) -> None:
        before = results.get("y") if i and hand_on else None
        results["y"] = layers[i % len(layers)](x if before is None or before.shape[1] < k else before[:, :k])

    us = graph_us([lambda i=i: link(i) for i in range(calls)])
    size = float(results["y"].float().square().mean().sqrt())
    if not 1e-2 < size < 1e2:
        raise RuntimeError(f"a chain of {calls} calls ends in values of size {size}")
    return us


def copies_for(bytes_each: int, most: int = 64) -> int:
    """How many copies of a weight make a cold rotation."""
    return max(2, min(most, -(-COLD_BYTES // max(1, bytes_each))))


def ceilings() -> dict[str, float]:
    """What this card reaches today on random data: read bandwidth (TB/s) of a large sum, bf16 matrix rate (TFLOP/s).

    The matrix rate is the best of three sizes: the largest product runs longest and so into the card's power limit.
    """
    numbers = 1 << 30
    big = torch.randn(numbers, device="cuda")
    read = graph_us([big.sum] * 4)
    del big
    rates = []
    for m, n, k in [(4096, 8192, 8192), (1024, 28672, 8192), (8192, 8192, 8192)]:
        a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        us = graph_us([lambda a=a, b=b: torch.nn.functional.linear(a, b)] * 4)
        rates.append(2 * m * n * k / us / 1e6)
    return {"read_tbps": round(4 * numbers / read / 1e6, 3), "bf16_tflops": round(max(rates), 1)}


def meta() -> dict[str, object]:
    """The machine and the commit that a results file speaks of."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "ceilings": ceilings(),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")
