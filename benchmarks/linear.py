"""linear_w4a16 and its gradient at the shapes of known models, beside their peers, behind a correctness gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.timing import chain_us, copies_for, graph_us
from pyquant.nn.linear import QLinear
from pyquant.ops.linear import FUSED_BACKWARD_TOKENS

GROUP = 128
# Error of a correct result: rounding y to bf16 costs 2^-9 of each element in the worst case, half of that RMS; a weight
# that is rounded to bf16 costs as much again.
GATE = 2.0**-8


def random_weights(n: int, k: int, copies: int) -> list[Tensor]:
    """bf16 ``[N, K]`` that keep values at their size, so that a chain of products stays finite."""
    return [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5 for _ in range(copies)]


def roof_us(m: int, n: int, k: int, ceilings: dict[str, float]) -> float:
    """The larger of bytes over the measured bandwidth and operations over the measured rate."""
    moved = n * k * (0.5 + 2 / GROUP) + 2 * m * (n + k)
    return max(moved / ceilings["read_tbps"] / 1e6, 2 * m * n * k / ceilings["bf16_tflops"] / 1e6)


def check(what: str, got: Tensor, exact: Tensor, gate: float = GATE) -> float:
    """Relative error of a result.

    Raises:
        SystemExit: when it is larger than a right result's.
    """
    error = float((got.float() - exact).norm() / exact.norm())
    if not error < gate:
        raise SystemExit(f"{what} is wrong: relative error {error:.2e}, at most {gate:.2e} is right; nothing is timed")
    return error


def linear_rows(
    ceilings: dict[str, float], tokens: list[int], shapes: list[tuple[int, int]], present: dict[str, peers.Maker]
) -> list[dict]:
    """linear_w4a16 (bf16, group 128, symmetric) at every (K, N) and M, with its peers, each in a chain of calls."""
    rows: list[dict] = []
    for k, n in shapes:
        copies = copies_for(n * k // 2, most=32)
        weights = random_weights(n, k, copies)
        made = {name: _made(name, maker, weights) for name, maker in present.items()}
        for m in tokens:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            ours = made["pyquant"][0]
            exact = x.float() @ ours.dequantize(torch.float32).T
            error = check(f"linear_w4a16 at M={m} N={n} K={k}", ours(x), exact)
            calls = max(16, copies) if m <= 256 else 4
            times = {}
            for name, layers in made.items():
                if not layers or (name in ("tinygemm", "torchao") and m > 256):
                    continue  # the latter grow with M: milliseconds that say nothing new
                us = _peer_us(name, layers, weights[0], x, calls)
                if us is not None:
                    times[name] = us
            rows += _rows("linear_w4a16", times, m, n, k, roof_us(m, n, k, ceilings), "cublas-bf16", error)
    return rows


def _made(name: str, maker: peers.Maker, weights: list[Tensor]) -> list[Callable[[Tensor], Tensor]]:
    """A layer a weight; none where a peer's code fails."""

    def work() -> list[Callable[[Tensor], Tensor]]:
        return [maker(w, GROUP) for w in weights]

    n, k = weights[0].shape
    return work() if name in peers.OWN else peers.attempt(f"{name} at N={n} K={k}", work) or []


def _peer_us(name: str, layers: list[Callable[[Tensor], Tensor]], w: Tensor, x: Tensor, calls: int) -> float | None:
    """Microseconds a call in a chain. A peer has to compute the product first; None where it fails at this shape."""

    def work() -> float:
        if name not in peers.OWN:
            peers.looks_right(name, layers[0], w, x)
        return chain_us(layers, x, calls, hand_on=name in peers.TAKES_ROW_STRIDES)

    where = f"{name} at M={len(x)} N={w.shape[0]} K={w.shape[1]}"
    return work() if name in peers.OWN else peers.attempt(where, work)


def backward_rows(ceilings: dict[str, float], tokens: list[int], shapes: list[tuple[int, int]]) -> list[dict]:
    """The gradient to x, dX = dY @ W_hat, at every (K, N) and M, beside cuBLAS over a bf16 weight.

    ``pyquant`` is what a backward runs; ``fused`` (Triton over the packed weight) and ``expand`` (the weight in 16 bits,
    then cuBLAS) are its two ways at any number of tokens, for the choice between them, and ``expand-24MB`` the second in parts
    that the L2 cache holds.
    """
    rows: list[dict] = []
    for k, n in shapes:
        copies = copies_for(n * k // 2, most=32)
        weights = random_weights(n, k, copies)
        layers = [peers.pyquant(w, GROUP) for w in weights]
        for m in tokens:
            grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
            exact = grad.float() @ layers[0].dequantize(torch.float32)
            error, times = 0.0, {}
            for name, way in backward_ways(grad.device.type).items():
                if name == "fused" and m > 4 * FUSED_BACKWARD_TOKENS:
                    continue  # unpacks everything again for each 64 tokens
                error = max(error, check(f"{name} gradient at M={m} N={n} K={k}", way(layers[0], grad), exact))
                times[name] = graph_us([partial(way, layer, grad) for layer in layers])
            times["cublas-bf16"] = graph_us([partial(torch.mm, grad, w) for w in weights])
            rows += _rows("linear_w4a16_backward", times, m, n, k, roof_us(m, n, k, ceilings), "cublas-bf16", error)
    return rows


def backward_ways(device: str = "cuda") -> dict[str, Callable[[QLinear, Tensor], Tensor]]:
    """(layer, dY ``[M, N]``) -> dX ``[M, K]``, by name: what a backward takes, and each of its ways alone."""
    from pyquant.ops import linear
    from pyquant.ops._registry import kernels, unavailable

    def taken(layer: QLinear, grad: Tensor) -> Tensor:
        own = layer.qweight, layer.scale, layer.zero
        return torch.ops.pyquant.linear_w4a16_backward(grad, *own, layer.in_features, layer.spec.group_size)

    def by(fill: Callable[..., None]) -> Callable[[QLinear, Tensor], Tensor]:
        def way(layer: QLinear, grad: Tensor) -> Tensor:
            out = grad.new_empty(len(grad), layer.in_features)
            fill(out, grad, layer.qweight, layer.scale, layer.zero, layer.spec.group_size)
            return out

        return way

    ways = {
        "pyquant": taken,
        "expand": by(linear._backward_expand),
        "expand-24MB": by(
            partial(linear._backward_expand, part_bytes=24 << 20)
        ),  # a part stays in the L2 cache of Hopper
    }
    if unavailable("triton", device) is None:
        ways["fused"] = by(kernels("linear_backward").linear_w4a16_backward)
    return ways


def _rows(
    op: str, times: dict[str, float], m: int, n: int, k: int, roof: float, baseline: str, error: float
) -> list[dict]:
    print(f"{op} K={k} N={n} M={m}: roof {roof:.1f} " + " ".join(f"{a} {b:.1f}" for a, b in times.items()), flush=True)
    return [
        {
            "op": op, "impl": name, "dtype": "bfloat16", "M": m, "N": n, "K": k, "group": GROUP, "us": round(us, 2),
            "roof_us": round(roof, 2), "baseline": baseline, "baseline_us": round(times[baseline], 2),
            "rel_err": error if name == "pyquant" else None,
        }
        for name, us in times.items()
    ]  # fmt: skip
