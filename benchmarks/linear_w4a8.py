"""The rows of ``benchmarks.run --family linear_w4a8``: int8 and e4m3 activations, in chains of calls, beside cuBLAS in bf16.

``python -m benchmarks.linear_w4a8`` checks every tile and cut of the kernels on small shapes and times them on one large shape.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.timing import copies_for, graph_us
from pyquant import reference
from pyquant.formats import act8, int4
from pyquant.ops import linear_w4a8, quantize_activation, quantize_int4
from pyquant.ops.linear_a8 import _launch

GROUP = 128
# A result differs from that of exact sums by its rounding to bf16, 2^-9 of each element in the worst case; e4m3's sums keep
# about 13 bits of the largest of 32 terms, and codes are corrected by 8: an error of about 2^-8.
GATE = {torch.int8: 2.0**-8, act8.FP8: 2.0**-7}
NAMES = {torch.int8: "int8", act8.FP8: "e4m3"}
TILES = {  # of csrc/linear_w4a8.cu: (name, cut)
    "symmetric": [(t, c) for t in (16, 32, 64, 192064, 192128, 256) for c in ((0, 1, 2) if t <= 64 else (0, 1))]
    + [(8, 0)],
    "zeros": [(t, c) for t in (16, 64, 192128) for c in ((0, 1, 2) if t <= 64 else (0, 1))] + [(8, 0)],
    "fine": [(t, c) for t in (16, 64) for c in (0, 1, 2)] + [(8, 0)],
}
SHAPES = [
    (1, 64, 64),
    (3, 200, 1096),
    (17, 130, 640),
    (64, 384, 4096),
    (70, 1000, 840),
    (130, 129, 1024),
    (300, 130, 2056),
]


def product(
    codes: Tensor, act_scale: Tensor, sums: Tensor | None, weight: tuple[Tensor, ...], n: int, k: int, group: int,
    act_group: int, dtype: torch.dtype, tile: tuple[int, int],
) -> Tensor:  # fmt: skip
    """One launch of one tile, cut one way, into memory full of NaN."""
    qweight, scale, zero = weight
    y = torch.full((codes.shape[0], n), float("nan"), dtype=dtype, device="cuda")
    _launch(y, codes, act_scale, sums, qweight, scale, zero, None, n, k, group, act_group, *tile)
    return y


def check_case(
    m: int,
    n: int,
    k: int,
    kind: str,
    group: int,
    act_group: int,
    zeros: bool,
    dtype: torch.dtype,
    tile: tuple[int, int],
) -> str | None:
    """Exact sums with scales of one, then random scales against fp64; what is wrong, or None."""
    x = torch.randn(m, k, device="cuda").bfloat16()
    w = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    groups = 1 if group == -1 else -(-k // group)
    zero = torch.randint(0, 16, (n, groups), dtype=torch.uint8, device="cuda") if zeros else None
    tiled_zero = None if zero is None else int4.tile_scale(zero, k, group)
    size = act8.sum_size(group, act_group)
    made = quantize_activation(x, 8, act_group, 1.0, dtype, size)
    want = reference.quantize_activation(x, 8, act_group, 1.0, dtype, size)
    for name, a, b in zip(("codes", "scale", "sums"), made, want, strict=True):
        same = torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if name == "codes" else torch.allclose(a, b, 1e-6)
        if not same:
            where = (a.float() != b.float()).nonzero()[0].tolist()
            return f"quantize_activation: {name} differ, first at {where}: {a[tuple(where)]} {b[tuple(where)]}"
    codes, act_scale, sums = made
    for name in ("ones", "random"):
        scale = torch.ones(n, groups, device="cuda") if name == "ones" else torch.rand(n, groups, device="cuda") + 0.5
        scale = scale.bfloat16()
        s_a = torch.ones_like(act_scale) if name == "ones" else act_scale
        weight = int4.tile_codes(w), int4.tile_scale(scale, k, group), tiled_zero
        got = product(codes, s_a, sums, weight, n, k, group, act_group, torch.float32, tile)
        steps = w.double() - (8 if zero is None else int4.expand_groups(zero.double(), k, group))
        wide = act8.plain_codes(codes, k).double() * int4.expand_groups(s_a.double().reshape(m, -1), k, act_group)
        exact = wide @ (steps * int4.expand_groups(scale.double(), k, group)).T
        l2 = (wide.square() @ (steps * int4.expand_groups(scale.double(), k, group)).square().T).sqrt()
        if name == "ones" and dtype == torch.int8 and float(exact.abs().max()) < 2**24:
            bad = got.double() != exact
        else:
            bad = ~((got.double() - exact).abs() <= (1e-5 if dtype == torch.int8 else 2e-3) * (l2 + exact.abs()) + 1e-6)
        if bad.any():
            at = bad.nonzero()[0].tolist()
            rows = bad.any(1).nonzero().flatten().tolist()
            columns = bad.any(0).nonzero().flatten().tolist()
            return (
                f"{name}: {int(bad.sum())} of {bad.numel()} wrong, first at {at}: got {float(got[tuple(at)])}, want "
                f"{float(exact[tuple(at)])}; tokens {rows[:6]}..{rows[-1]}, features {columns[:6]}..{columns[-1]}"
            )
        half = product(codes, s_a, sums, weight, n, k, group, act_group, torch.bfloat16, tile)
        if not torch.equal(half, got.bfloat16()):
            return f"{name}: bf16 results are not the rounded fp32 ones"
    return None


def check_all(seconds: float) -> int:
    """Every kind, tile and cut on shapes in turn; prints what is wrong. Returns the number of failures."""
    kinds = [  # kind, group, act_group, zeros, dtype
        ("symmetric", 128, -1, False, torch.int8),
        ("symmetric", -1, -1, False, torch.int8),
        ("zeros", 128, -1, True, torch.int8),
        ("zeros", -1, -1, True, torch.int8),
        ("zeros", 128, 128, False, torch.int8),
        ("fine", 128, 128, True, torch.int8),
        ("fine", -1, 64, True, act8.FP8),
        ("zeros", 128, -1, False, act8.FP8),
        ("fine", 32, -1, True, torch.int8),
        ("fine", 64, 32, False, torch.int8),
        ("fine", 64, -1, False, act8.FP8),
    ]
    failed, done, began = 0, 0, time.monotonic()
    for number, (kind, group, act_group, zeros, dtype) in enumerate(kinds):
        for i, tile in enumerate(TILES[kind]):
            if tile[0] == 8 and dtype != torch.int8:
                continue
            for j in (i + number, i + number + 3):
                shape = SHAPES[j % len(SHAPES)]
                name = f"{kind} {NAMES[dtype]} g{group} a{act_group} {'zero' if zeros else 'sym'} tile {tile} {shape}"
                print(f"  {name}", end="\r", flush=True)
                why = check_case(*shape, kind, group, act_group, zeros, dtype, tile)
                torch.cuda.synchronize()
                done += 1
                if why:
                    failed += 1
                    print(f"WRONG {name}: {why}", flush=True)
            if time.monotonic() - began > seconds:
                print(f"stopped after {seconds:.0f} s", flush=True)
                return failed
    print(f"{done} checks, {failed} failed, {time.monotonic() - began:.1f} s" + " " * 60, flush=True)
    return failed


def time_tiles(k: int, n: int, tokens: list[int], kinds: list[str]) -> None:
    """Microseconds of every tile and cut, of quantize_activation, and of cuBLAS in bf16."""
    copies = copies_for(n * k // 2, most=8)
    ws = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5 for _ in range(copies)]
    weights = [pack(w) for w in ws]
    zeros = [torch.full_like(scale, 8, dtype=torch.uint8) for _, scale in weights]
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        calls = max(8, copies) if m <= 256 else 4
        y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        cublas = graph_us([lambda i=i, x=x: torch.nn.functional.linear(x, ws[i % copies]) for i in range(calls)], 5)
        quant = graph_us([lambda x=x: quantize_activation(x)] * 8, 5)
        print(f"K={k} N={n} M={m}: cublas {cublas:.1f}, quantize_activation {quant:.1f}", flush=True)
        for kind in kinds:
            dtype = act8.FP8 if kind == "e4m3" else torch.int8
            act_group = 128 if kind == "grouped" else -1
            codes, act_scale, sums = quantize_activation(x, 8, act_group, 1.0, dtype, 128)
            line = []
            for tile in [(0, -1), *TILES["symmetric" if kind == "symmetric" else "zeros"]]:
                if (tile[0] == 8 and (m > 64 or kind == "e4m3")) or (
                    tile[0] and not m / 16 <= tile[0] % 1000 < max(2 * m, 17)
                ):
                    continue

                def one(i: int, tile: tuple[int, int] = tile, codes: Tensor = codes, act_scale: Tensor = act_scale,
                        sums: Tensor = sums, kind: str = kind, y: Tensor = y, act_group: int = act_group) -> None:  # fmt: skip
                    (qweight, scale), zero = weights[i % copies], zeros[i % copies] if kind == "zeros" else None
                    _launch(y, codes, act_scale, sums, qweight, scale, zero, None, n, k, GROUP, act_group, *tile)

                us = graph_us([lambda i=i: one(i) for i in range(calls)], 5)
                line.append(f"{tile[0]}/{tile[1]} {us:.1f} ({2e-6 * m * n * k / us:.0f})")
            print(
                f"  {kind}: " + ", ".join(line) + "   [tile/cut us (TOP/s); 0/-1 is the kernel's own choice]",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------ the family


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """Tiled codes and scales of a weight, symmetric."""
    n, k = w.shape
    scale = (w.view(n, -1, GROUP).abs().amax(2) / 7).to(w.dtype)
    return quantize_int4(w, scale, None, GROUP, 4), int4.tile_scale(scale, k, GROUP)


def linear_w4a8_rows(
    ceilings: dict[str, float],
    tokens: list[int],
    shapes: list[tuple[int, int]],
    present: dict[str, Callable[[Tensor, int], peers.HummingA8]],
) -> list[dict]:
    """linear_w4a8 (group 128, symmetric, one scale a token) at every (K, N) and M: the product alone on codes that are there,
    the pair with quantize_activation, and cuBLAS, each over cold weights in one captured graph; of the peers (:data:`peers.A8`)
    the product alone and, as ``+quantize``, with their own quantization of x."""
    rows: list[dict] = []
    for k, n in shapes:
        copies = copies_for(n * k // 2, most=32)
        ws = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5 for _ in range(copies)]
        weights = [pack(w) for w in ws]
        made = {
            name: peers.attempt(name, lambda maker=maker, ws=ws: [maker(w, GROUP) for w in ws])
            for name, maker in present.items()
        }
        for m in tokens:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            calls = max(16, copies) if m <= 256 else 4
            times, errors = _times(x, ws, weights, calls)
            for name, layers in made.items():
                where = f"{name} at M={m} N={n} K={k}"
                found = layers and peers.attempt(where, functools.partial(_peer_times, name, layers, x, calls))
                if found:
                    times |= found[0]
                    errors[name] = found[1]
            roof = max(
                (n * k * (0.5 + 2 / GROUP) + m * k + 2 * m * n) / ceilings["read_tbps"] / 1e6,
                m * n * k / ceilings["bf16_tflops"] / 1e6,  # 8-bit operands at twice the rate
            )
            for name, us in times.items():
                rows.append(
                    {
                        "op": "linear_w4a8", "impl": name, "dtype": "bfloat16", "M": m, "N": n, "K": k, "group": GROUP,
                        "us": round(us, 2), "roof_us": round(roof, 2), "baseline": "cublas-bf16",
                        "baseline_us": round(times["cublas-bf16"], 2), "rel_err": errors.get(name),
                    }
                )  # fmt: skip
            print(
                f"K={k} N={n} M={m}: roof {roof:.1f} " + " ".join(f"{a} {b:.1f}" for a, b in times.items()), flush=True
            )
    return rows


def _times(
    x: Tensor, ws: list[Tensor], weights: list[tuple[Tensor, Tensor]], calls: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds by name, and the relative error of ours by name; a wrong result ends the benchmark."""
    (n, k), copies = ws[0].shape, len(ws)
    times = {"cublas-bf16": graph_us([lambda i=i: torch.nn.functional.linear(x, ws[i % copies]) for i in range(calls)])}
    errors = {}

    def multiply(i: int, made: tuple[Tensor, ...]) -> Tensor:
        return linear_w4a8(*made, *weights[i % copies], None, None, n, k, GROUP)

    for dtype, short in NAMES.items():
        size = act8.sum_size(GROUP, -1) if act8.needs_sums(True, dtype) else 0
        quantize = functools.partial(quantize_activation, x, 8, -1, 1.0, dtype, size)
        name, made = f"pyquant-{short}", quantize()
        exact = (act8.plain_codes(made[0], k).double() * made[1]) @ dequantized(weights[0], n, k).double().T
        error = float((multiply(0, made).double() - exact).norm() / exact.norm())
        if not error < GATE[dtype]:
            raise SystemExit(f"linear_w4a8 is wrong at M={len(x)} N={n} K={k}, {short}: relative error {error:.2e}")
        errors[name] = error
        times[name] = graph_us([functools.partial(multiply, i, made) for i in range(calls)])
        times[f"{name}+quantize"] = graph_us([lambda i=i, q=quantize: multiply(i, q()) for i in range(calls)])
        times[f"quantize_activation-{short}"] = graph_us([quantize] * max(8, calls))
    return times, errors


def _peer_times(name: str, layers: list[peers.HummingA8], x: Tensor, calls: int) -> tuple[dict[str, float], float]:
    """Microseconds of the product alone and of the pair, and the error against the product with the same 4-bit weight."""
    most, first = peers.LOOKS_RIGHT_A8[layers[0].name], layers[0]
    w, made = first.rounded(), first.quantize(x)
    error = peers.looks_right(f"{name}, both in one call,", first, w, x, most)
    peers.looks_right(name, lambda _: first.multiply(*made), w, x, most)
    taken = [layers[i % len(layers)] for i in range(calls)]
    times = {
        name: graph_us([functools.partial(layer.multiply, *made) for layer in taken]),
        f"{name}+quantize": graph_us([functools.partial(layer, x) for layer in taken]),
    }
    return times, error


def dequantized(weight: tuple[Tensor, Tensor], n: int, k: int) -> Tensor:
    """w_hat fp32 ``[N, K]``."""
    return reference.dequantize_int4(*weight, None, n, k, GROUP, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check-seconds", type=float, default=40)
    parser.add_argument("--shape", default="8192x28672", help="KxN")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--kinds", nargs="*", default=["symmetric", "grouped", "zeros", "e4m3"])
    args = parser.parse_args()
    torch.manual_seed(0)
    failed = check_all(args.check_seconds) if args.check_seconds else 0
    k, n = (int(v) for v in args.shape.split("x"))
    if args.tokens:
        time_tiles(k, n, args.tokens, args.kinds)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
