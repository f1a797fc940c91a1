"""``python -m benchmarks.qat DATA --out FILE``: quantization-aware training, arm by arm, on classics-llama-28m.

DATA holds ``models/`` and ``data/`` (the shared data). All arms train on the same windows of books in the same order, at
the same number of steps, from the same model; what is measured is the converted model in fp32, with every value rounded as
the file would hold it. One seed of everything comes first, then the others; a finished row is in FILE at once, and a killed
run goes on after it. Arms: :data:`pyquant.integrations.ablate_qat.QAT_ARMS`, or new ones, ``--arms "mine=kd,lr:3e-4"``.

``--tune`` measures on held-out books that no result is measured on (the part of the text before the measured one): that is
where learning rates were chosen. ``--jobs N`` shares the rows out over N processes on the GPUs that are seen: while one sets
up, captures or measures, others train.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ptq import SPECS, TEXTS, commit
from pyquant.formats.spec import QuantSpec
from pyquant.integrations import ablate_qat
from pyquant.integrations.ablate import jobs, run_jobs
from pyquant.integrations.ablate_qat import QAT_ARMS, QAT_SEEDLESS, UNQUANTIZED, QATBench, resolve_qat
from pyquant.integrations.data import load_text, windows
from pyquant.integrations.files import write_atomic
from pyquant.integrations.machine import quiet, versions
from pyquant.integrations.transformers import load_causal_lm

MODEL, LENGTH = "classics-llama-28m", 1024
TRAINING = "classics/calibration.txt"
TUNING = ("classics/valid.txt", 400_000)  # characters from the start: the measured part begins behind them
SPECS = {**SPECS, "w2": (2, -1, True), "w2g128": (2, 128, True)}
DEFAULT_SPECS = ("w3", "w4", "w2g64", "w3g128", "w4g128", "w2g128", "w2")
DEFAULT_ARMS = (
    "rtn", "control", "qat-ce", "kd", "kd-pure", "kd-ov", "soft-round", "soft-clamp", "soft-both", "soft-kd", "soft-kd-ov",
)  # fmt: skip
# Learning rates by bits and by what an arm learns from; chosen with --tune. --rates takes them from such a run instead.
RATES: dict[int, dict[str, float]] = {
    4: {"control": 2.5e-5, "ce": 2.5e-5, "kl+ce": 1e-4, "kl": 2e-4},
    3: {"ce": 1e-4, "kl+ce": 2e-4, "kl": 2e-4},
    2: {"ce": 1e-4, "kl+ce": 2e-4, "kl": 4e-4},
}

# What --tune runs for each format: rates of weights and scales for each kind of arm.
TUNE: dict[str, dict[str, tuple[float, ...]]] = {
    "w4": {"control": (1e-5, 2.5e-5), "qat-ce": (1e-5, 2.5e-5, 1e-4), "kd": (2.5e-5, 1e-4), "kd-pure": (1e-4, 2e-4)},
    "w3": {"qat-ce": (2.5e-5, 1e-4), "kd": (1e-4, 2e-4), "kd-pure": (2e-4, 4e-4)},
    "w2g64": {"qat-ce": (1e-4, 4e-4), "kd": (2e-4, 6e-4), "kd-pure": (4e-4, 8e-4)},
}


def tuning(spec: str) -> list[str]:
    """Definitions of the arms of --tune for a format."""
    return [
        f"{spec} {arm}-{lr:g}={arm},lr:{lr},scale_lr:{lr}"
        for place in range(max(map(len, TUNE[spec].values())))
        for arm, found in TUNE[spec].items()
        for lr in found[place : place + 1]
    ]


def chosen(file: Path | None) -> dict[int, dict[str, float]]:
    """:data:`RATES` with those that were best in a --tune run in their places."""
    rates = {bits: dict(found) for bits, found in RATES.items()}
    best: dict[tuple[int, str], float] = {}
    for row in [] if file is None else json.loads(file.read_text())["rows"]:
        spec, value = row["key"].split()[0], row["perplexity"]["tuning"]
        at = SPECS[spec][0], ablate_qat.teaching_of(row["settings"])
        if value < best.get(at, float("inf")):
            best[at] = value
            rates[at[0]][at[1]] = row["settings"]["lr"]
    for bits in (3, 2):
        rates[bits]["control"] = rates[4]["control"]
    return rates


def load(args: argparse.Namespace) -> QATBench:
    """The model with its training windows and measured texts."""
    data = args.data / "data"
    model, tokenizer = load_causal_lm(args.data / "models" / MODEL, dtype="auto", device="cpu")
    model = model.to(args.device, torch.float32).eval()
    texts = {}
    if args.tune or args.and_tuning:
        file, most = TUNING
        texts["tuning"] = windows(tokenizer, load_text(str(data / file))[:most], LENGTH, args.eval_windows, "tuning")
    if not args.tune:
        texts |= {
            name: windows(tokenizer, load_text(str(data / file), skip_chars=skip), LENGTH, args.eval_windows, name)
            for name, (file, skip) in TEXTS.items()
        }
    text = load_text(str(data / TRAINING))
    tokens = windows(tokenizer, text[: args.training_chars], args.seq_len, None, "training")
    rates = {
        str(QuantSpec(*s)): {kind: {"lr": lr, "scale_lr": lr} for kind, lr in chosen(args.rates)[s[0]].items()}
        for s in SPECS.values()
    }
    return QATBench(model, tokens, texts, rates, share=args.device == "cuda")


def children(args: argparse.Namespace, began: float) -> None:
    """N processes with a part of the rows each, every part in a file of its own; then all rows in one."""
    parts = [args.out.with_suffix(f".part{k}.json") for k in range(args.jobs)]
    held = gather([args.out, *sorted(args.out.parent.glob(f"{args.out.stem}.part*.json"))])
    for part in parts:
        if held is not None:
            write_atomic(part, json.dumps(held))
        else:
            part.unlink(missing_ok=True)
    given = sys.argv[1:]
    left = args.budget_seconds - (time.monotonic() - began)
    gpus = torch.cuda.device_count()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.qat", *given, "--part", str(k), "--budget-seconds", str(left)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(k % gpus)} if gpus > 1 else None,
        )
        for k in range(args.jobs)
    ]
    codes = [p.wait() for p in running]
    held = gather([args.out, *parts])
    if held is not None:
        write_atomic(args.out, json.dumps(held, indent=1) + "\n")
    if any(codes):
        raise SystemExit(f"processes ended with {codes}; the rows of all are in {args.out}")
    for part in parts:
        part.unlink(missing_ok=True)


def gather(files: list[Path]) -> dict[str, Any] | None:
    """The rows of all files, later files first where two have a row of one key; None without a file."""
    meta: dict[str, Any] | None = None
    rows: dict[str, Any] = {}
    for file in files:
        if file.is_file():
            held = json.loads(file.read_text())
            meta = {**held["meta"], **(meta or {})}
            rows |= {row["key"]: row for row in held["rows"]}
    return None if meta is None else {"meta": meta, "rows": list(rows.values())}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with models/ and data/")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--specs", nargs="+", choices=list(SPECS), help=f"default {' '.join(DEFAULT_SPECS)}")
    parser.add_argument("--arms", nargs="+", help=f"default {' '.join(DEFAULT_ARMS)}; known {' '.join(QAT_ARMS)}")
    parser.add_argument("--tune", action="store_true", help="learning rates, measured on text of its own")
    parser.add_argument("--and-tuning", action="store_true", help="measure the text of --tune beside the others")
    parser.add_argument(
        "--rates", type=Path, help="result of a --tune run: take the learning rates that were best there"
    )
    parser.add_argument("--seeds", type=int, help="3, or 1 with --tune")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=64, help="of each text")
    parser.add_argument("--training-chars", type=int, help="only the beginning of the training text")
    parser.add_argument("--jobs", type=int, default=1, help="processes, on all GPUs that are seen")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--commit", help="of the working tree, where git does not know it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.specs = args.specs or (tuple(TUNE) if args.tune else DEFAULT_SPECS)
    args.seeds = args.seeds or (1 if args.tune else 3)
    return args


def main() -> None:
    began = time.monotonic()
    args = parse()
    quiet()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    common = {"steps": args.steps, "batch_size": args.batch_size, "warmup_steps": min(50, args.steps // 10)}
    common["weights"] = "bf16"  # with fp32 copies: everything between the products moves half of the bytes
    if args.tune and not args.arms:
        named = {spec: tuning(spec) for spec in args.specs}
        arms = resolve_qat([arm for group in named.values() for arm in group], common)
    else:
        named = {}
        arms = resolve_qat(list(args.arms or DEFAULT_ARMS), common)
    if args.jobs > 1 and args.part is None:
        children(args, began)
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    specs = [QuantSpec(*SPECS[name]) for name in args.specs]
    todo = jobs(arms, specs, args.seeds, QAT_SEEDLESS)
    if named:
        todo = [
            job for job in todo if any(job.spec == QuantSpec(*SPECS[s]) for s in named if job.arm.startswith(f"{s} "))
        ]
    controls = {name for name, fields in arms.items() if fields.get("quantizer") == "none"}
    todo = [job for job in todo if job.arm not in controls or job.spec == specs[0]]  # no format matters to them
    file = args.out
    if args.part is not None:
        todo, file = todo[args.part :: args.jobs], args.out.with_suffix(f".part{args.part}.json")
        torch.set_num_threads(2 if args.device == "cuda" else 1)
    bench = load(args)
    print(f"ready after {time.monotonic() - began:.0f} s: {len(bench.tokens):,} windows, {len(todo)} rows", flush=True)
    meta: dict[str, Any] = {
        "model": MODEL, "training_windows": len(bench.tokens), "tokens_a_step": args.batch_size * args.seq_len,
        "steps": args.steps, "eval_windows": args.eval_windows, "tuning": args.tune, "gpu": versions(args.device)["device"],
        "commit": args.commit or commit(), "torch": torch.__version__,
    }  # fmt: skip
    held = gather([file])
    meta["full_precision"] = (held or {"meta": {}})["meta"].get("full_precision") or bench.measure()
    print("full precision", meta["full_precision"], f"({UNQUANTIZED})", flush=True)
    done = run_jobs(bench, todo, arms, file, meta, began + args.budget_seconds, lambda line: print(line, flush=True))
    print(f"{'all rows are there' if done else 'stopped'} after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
