"""``python -m benchmarks.tasks DATA --out FILE``: all local task sets on the 28 M parameter model, full precision and W4.

DATA holds ``models/`` and ``data/`` (the shared data); the package lm_eval is needed. W4 is round to nearest over MSE
ranges, on the kernels that serve the machine. A finished task is in FILE's folder at once, and a killed run goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ptq import commit
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.compare import compare_tasks
from pyquant.integrations.files import write_atomic
from pyquant.integrations.harness import harness, score
from pyquant.integrations.machine import quiet, versions
from pyquant.integrations.tasks import TASKS, write_tasks
from pyquant.integrations.transformers import load_causal_lm
from pyquant.recipes.rtn import rtn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with models/ and data/")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--model", default="classics-llama-28m")
    parser.add_argument("--tasks", nargs="+", default=["all"], choices=["all", *TASKS])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin no task later")
    parser.add_argument("--commit", help="of the working tree, where git does not know it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    began = time.monotonic()
    quiet()
    harness()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    work = args.out.with_suffix(".work")
    names = write_tasks(args.tasks, args.data / "data" / "tasks", work / "tasks")
    spec = QuantSpec(args.bits, args.group_size, True)
    dtype = getattr(torch, args.dtype)
    facts = [args.model, str(spec), args.limit, args.batch_size, args.dtype, args.device]
    for arm in ("full precision", str(spec)):
        model, tokenizer = load_causal_lm(args.data / "models" / args.model, dtype="auto", device="cpu")
        model = model.to(args.device, dtype)
        if arm != "full precision":
            rtn(model, spec, "mse", scale_dtype=torch.bfloat16)
        for task in names:
            file = work / f"{arm} {task}.json".replace(" ", "-")
            if file.is_file() and json.loads(file.read_text())["facts"] == facts:
                continue
            if time.monotonic() - began > args.budget_seconds:
                print("out of time; run the same command again")
                return
            start = time.monotonic()
            found = score(model, tokenizer, [task], work / "tasks", args.limit, args.batch_size)
            found |= {"facts": facts, "seconds": round(time.monotonic() - start, 1)}
            write_atomic(file, json.dumps(found) + "\n")
            shown = "  ".join(f"{r['metric']} {r['value']:.4f}" for r in found["rows"])
            print(f"{arm}  {task}  {shown}  {found['seconds']} s", flush=True)
    sides = []
    for arm in ("full precision", str(spec)):
        side: dict[str, Any] = {"rows": [], "documents": {}, "seconds": 0.0}
        for task in names:
            found = json.loads((work / f"{arm} {task}.json".replace(" ", "-")).read_text())
            side["rows"] += found["rows"]
            side["documents"] |= found["documents"]
            side["seconds"] += found["seconds"]
        sides.append(side)
    meta = {
        "model": args.model, "spec": str(spec), "limit": args.limit, "batch_size": args.batch_size, "dtype": args.dtype,
        "gpu": versions(args.device)["device"], "torch": torch.__version__, "commit": args.commit or commit(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    errors = [{(r["task"], r["metric"]): r["stderr"] for r in side["rows"]} for side in sides]
    rows = compare_tasks(*sides)
    for row in rows:
        row |= {f"{which}_stderr": e.get((row["task"], row["metric"])) for which, e in zip("ab", errors, strict=True)}
    meta["seconds"] = {which: round(side["seconds"], 1) for which, side in zip("ab", sides, strict=True)}
    args.out.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
