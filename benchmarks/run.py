"""``python -m benchmarks.run --family linear [--out FILE]``: time an op family against its peers, behind a correctness gate."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.attention_kv4 import attention_kv4_rows
from benchmarks.distill import distill_rows
from benchmarks.fake_quant import fake_quant_rows
from benchmarks.linear_w4a8 import linear_w4a8_rows
from benchmarks.timing import chain_us, copies_for, meta

SHAPES = [(4096, 4096), (4096, 6144), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672)]  # (K, N)
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
GROUP = 128
# Error of a correct result: rounding y to bf16 costs 2^-9 of each element in the worst case, half of that RMS.
GATE = 2.0**-8


def linear_rows(ceilings: dict[str, float], tokens: list[int], shapes: list[tuple[int, int]]) -> list[dict]:
    """linear_w4a16 (bf16, group 128, symmetric) at every (K, N) and M, with its peers, each in a chain of calls."""
    rows: list[dict] = []
    for k, n in shapes:
        copies = copies_for(n * k // 2, most=32)
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5 for _ in range(copies)]
        made = {}
        for name, maker in peers.LINEAR.items():
            made[name] = [maker(w, GROUP) for w in weights]
        for m in tokens:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            ours = made["pyquant"][0]
            exact = x.float() @ ours.dequantize(torch.float32).T
            error = float((ours(x).float() - exact).norm() / exact.norm())
            if not error < GATE:
                raise SystemExit(
                    f"linear_w4a16 is wrong at M={m} N={n} K={k}: relative error {error:.2e}; nothing is timed"
                )
            roof = max(
                (n * k * (0.5 + 2 / GROUP) + 2 * m * (n + k)) / ceilings["read_tbps"] / 1e6,
                2 * m * n * k / ceilings["bf16_tflops"] / 1e6,
            )
            times = {}
            for name, layers in made.items():
                if name == "tinygemm" and m > 256:
                    continue  # grows with M: milliseconds that say nothing new
                calls = max(16, copies) if m <= 256 else 4
                times[name] = chain_us(layers, x, calls, hand_on=name != "tinygemm")
            for name, us in times.items():
                rows.append(
                    {
                        "op": "linear_w4a16", "impl": name, "dtype": "bfloat16", "M": m, "N": n, "K": k, "group": GROUP,
                        "us": round(us, 2), "roof_us": round(roof, 2), "baseline": "cublas-bf16",
                        "baseline_us": round(times["cublas-bf16"], 2),
                        "rel_err": error if name == "pyquant" else None,
                    }
                )  # fmt: skip
            print(
                f"K={k} N={n} M={m}: roof {roof:.1f} " + " ".join(f"{a} {b:.1f}" for a, b in times.items()), flush=True
            )
    return rows


FAMILIES = {
    "linear": linear_rows,
    "linear_w4a8": linear_w4a8_rows,
    "fake_quant": fake_quant_rows,
    "distill": distill_rows,
    "attention_kv4": attention_kv4_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--out", type=Path, help="results file; printed only when absent")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--shapes", nargs="*", default=[f"{k}x{n}" for k, n in SHAPES], help="KxN")
    parser.add_argument("--commit", help="the commit that is measured, where the folder is no git checkout")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks need a CUDA device")
    torch.manual_seed(0)
    about = meta()
    about["commit"] = args.commit or os.environ.get("PYQUANT_COMMIT") or about["commit"]
    print(json.dumps(about))
    shapes = [tuple(int(v) for v in s.split("x")) for s in args.shapes]
    extra = (args.tokens, shapes) if args.family in ("linear", "linear_w4a8") else ()
    rows = FAMILIES[args.family](about["ceilings"], *extra)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"meta": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
