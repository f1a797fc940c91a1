"""``python -m benchmarks.run --family linear [--out FILE]``: time an op family against its peers, behind a correctness gate."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.attention_kv4 import HEADS, attention_kv4_rows
from benchmarks.distill import distill_rows
from benchmarks.fake_quant import fake_quant_rows
from benchmarks.linear import backward_rows, linear_rows
from benchmarks.linear_w4a8 import linear_w4a8_rows
from benchmarks.timing import meta

SHAPES = [(4096, 4096), (4096, 6144), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672)]  # (K, N)
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]

FAMILIES = {
    "fake_quant": fake_quant_rows,
    "distill": distill_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=["linear", "linear_w4a8", "attention_kv4", *FAMILIES], required=True)
    parser.add_argument("--out", type=Path, help="results file; printed only when absent")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--shapes", nargs="*", default=[f"{k}x{n}" for k, n in SHAPES], help="KxN")
    parser.add_argument("--commit", help="the commit that is measured, where the folder is no git checkout")
    parser.add_argument("--backward", action="store_true", help="with --family linear: the gradient to x instead")
    parser.add_argument(
        "--peers", nargs="*", choices=[*peers.LINEAR, *peers.A8], help="of linear or linear_w4a8: these and ours only"
    )
    parser.add_argument(
        "--heads", type=int, default=len(HEADS), help="of attention_kv4: the first so many kinds of heads"
    )
    args = parser.parse_args()
    if args.backward and args.family != "linear":
        raise SystemExit(f"--backward belongs to --family linear, not to {args.family}, which times its own backward")
    known = {"linear": peers.LINEAR, "linear_w4a8": peers.A8}.get(args.family, {})
    if args.peers and not set(args.peers) <= set(known):
        raise SystemExit(f"--family {args.family} knows the peers {', '.join(known) or '(none)'}")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks need a CUDA device")
    torch.manual_seed(0)
    about = meta()
    about["commit"] = args.commit or os.environ.get("PYQUANT_COMMIT") or about["commit"]
    print(json.dumps(about))
    shapes = [tuple(int(v) for v in s.split("x")) for s in args.shapes]
    if args.backward:
        rows = backward_rows(about["ceilings"], args.tokens, shapes)
    elif args.family == "linear":
        about["peers"] = peers.versions()
        chosen = peers.available(None if args.peers is None else [*dict.fromkeys([*peers.OWN, *args.peers])])
        rows = linear_rows(about["ceilings"], args.tokens, shapes, chosen)
    elif args.family == "linear_w4a8":
        about["peers"] = peers.versions()
        chosen = peers.available(args.peers, makers=peers.A8)
        rows = linear_w4a8_rows(about["ceilings"], args.tokens, shapes, chosen)
    elif args.family == "attention_kv4":
        about["peers"] = peers.versions()
        rows = attention_kv4_rows(about["ceilings"], args.heads)
    else:
        rows = FAMILIES[args.family](about["ceilings"])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"meta": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
