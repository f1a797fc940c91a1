"""Which tiles are fastest on the GPU at hand: the work behind ``pyquant bench --tune``.

Each tile of :data:`pyquant.kernels.tiles.CANDIDATES` is timed beside the table's own at every shape, and chosen where it
takes less time than the table's by :data:`MARGIN` in the geometric mean over shapes and tokens. A tile that does not
compile, needs more than the GPU has, or computes something else than the table's tile is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton

from pyquant.formats import int4
from pyquant.kernels.linear import linear_w4a16
from pyquant.kernels.linear_backward import linear_w4a16_backward
from pyquant.kernels.tiles import CANDIDATES, TABLE, Row, Tile

MARGIN = 0.97  # of the table's time: less of a gain is within what one run differs from another
# Tokens at which the tile of a range is timed, by the most tokens of the range.
TOKENS: dict[tuple[str, int | None], tuple[int, ...]] = {
    ("forward", 16): (1, 16),
    ("forward", 32): (32,),
    ("forward", 64): (64,),
    ("forward", None): (256,),
    ("backward", 16): (1, 16),
    ("backward", 32): (32,),
    ("backward", None): (64,),
}
# The same sum in another order: results are rounded once, by at most 2^-8 of themselves in bf16.
SAME = 2.0**-8

Shape = tuple[int, int]  # (N, K)
Timer = Callable[[list[Callable[[], object]]], float]  # microseconds a call
Measure = Callable[[str, int, Shape, Tile], float]  # kernel, tokens, shape, tile


def tune(
    measure: Measure, shapes: Sequence[Shape], kind: str, tick: Callable[..., None] = lambda *args: None
) -> tuple[dict[str, list[Row]], list[dict[str, object]]]:
    """Choose tiles for a kind of GPU.

    Args:
        measure: microseconds of one call; raises RuntimeError or triton's errors for a tile that cannot be used.
        shapes: ``(N, K)`` of the weights.
        kind: ``sm90`` or ``other``, as in the table of tiles.
        tick: told (done, total, what) after each tile.

    Returns:
        kernel -> rows for :func:`pyquant.kernels.tiles.save`, and what was measured, a row ``{"kernel", "tokens" (the most,
        or None), "tile", "table_tile", "ratio" (time over the table's), "tried", "failed"}`` for each range.

    Raises:
        RuntimeError: when the table's own tile cannot be run.
    """
    chosen: dict[str, list[Row]] = {}
    report: list[dict[str, object]] = []
    ranges = [(kernel, most, tile) for (kernel, k), rows in TABLE.items() if k == kind for most, tile in rows]
    total, done = sum(len(CANDIDATES[kernel][most]) + 1 for kernel, most, _ in ranges), 0
    for kernel, most, own in ranges:
        cells = [(m, shape) for shape in shapes for m in TOKENS[kernel, most]]
        base = [measure(kernel, m, shape, own) for m, shape in cells]
        done += 1
        best, best_ratio, failed = own, 1.0, 0
        for tile in CANDIDATES[kernel][most]:
            ratio = math.inf if tile == own else _ratio(measure, kernel, cells, base, tile)
            failed += math.isinf(ratio) and tile != own
            if ratio < min(best_ratio, MARGIN):
                best, best_ratio = tile, ratio
            done += 1
            tick(done, total, f"{kernel}, {most or 'more'} tokens")
        chosen.setdefault(kernel, []).append((most, best))
        report.append(
            {
                "kernel": kernel, "tokens": most, "tile": tuple(best), "table_tile": tuple(own), "ratio": best_ratio,
                "tried": len(CANDIDATES[kernel][most]), "failed": failed,
            }
        )  # fmt: skip
    return chosen, report


def _ratio(measure: Measure, kernel: str, cells: list[tuple[int, Shape]], base: list[float], tile: Tile) -> float:
    """Time over the table's, geometric mean; infinite for a tile that cannot be used."""
    try:
        times = [measure(kernel, m, shape, tile) for m, shape in cells]
    except (RuntimeError, triton.TritonError) as error:
        if "out of memory" in str(error).lower():
            raise  # not the tile's fault
        return math.inf
    return math.exp(sum(math.log(us / own) for us, own in zip(times, base, strict=True)) / len(cells))


def measurer(
    timer: Timer, device: torch.device, dtype: torch.dtype, group_size: int, kind: str, cold_bytes: int = 256_000_000
) -> Measure:
    """Times a tile over random packed weights, rotated through ``cold_bytes`` so that they come from memory.

    Args:
        timer: microseconds a call of a list of calls.
        device, dtype: where and in what (bf16, fp16) to multiply.
        group_size: 64, 128 or -1; -1 where K is no multiple of it.
        kind: whose table's tile says what is right.
        cold_bytes: how many bytes of weights to rotate through.
    """
    weights: dict[Shape, tuple] = {}
    right: dict[tuple[str, int, Shape], torch.Tensor] = {}

    def weight(shape: Shape) -> tuple:
        if shape not in weights:
            weights.clear()  # one shape at a time in memory
            n, k = shape
            group = group_size if group_size > 0 and k % group_size == 0 else -1
            copies = max(1, min(64, -(-cold_bytes // (n * k // 2 or 1))))
            tiled = int4.tiled_shape(n, k)
            words = [torch.randint(-(2**31), 2**31, tiled, dtype=torch.int32, device=device) for _ in range(copies)]
            scale = torch.rand(int4.tiled_scale_shape(n, k, group), device=device).add_(0.5).to(dtype) * 0.01
            weights[shape] = words, scale, group
        return weights[shape]

    def measure(kernel: str, m: int, shape: Shape, tile: Tile) -> float:
        (n, k), (words, scale, group) = shape, weight(shape)
        generator = torch.Generator(device).manual_seed(m)
        width, out_width = (k, n) if kernel == "forward" else (n, k)
        x = torch.randn(m, width, device=device, generator=generator).to(dtype)

        def call(packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            if kernel == "forward":
                linear_w4a16(out, x, packed, scale, None, None, group, tile)
            else:
                linear_w4a16_backward(out, x, packed, scale, None, group, tile)
            return out

        got = call(words[0], x.new_empty(m, out_width)).float()
        own = next(t for most, t in TABLE[kernel, kind] if most is None or m <= most)
        if tile == own:
            right[kernel, m, shape] = got
        error = float((got - right[kernel, m, shape]).norm() / right[kernel, m, shape].norm())
        if not error < SAME:
            raise RuntimeError(
                f"{kernel} of {m} tokens over {n}x{k} with {tile}: off by {error:.1e} from the table's tile"
            )
        out = x.new_empty(m, out_width)
        return timer([lambda packed=packed: call(packed, out) for packed in words])

    return measure
