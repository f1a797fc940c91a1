"""``python -m benchmarks.ptq DATA --out FILE``: post-training quantization, arm by arm, on the two small models.

DATA holds ``models/`` and ``data/`` (the shared data). One seed of everything comes first, then the others; each finished
row is in FILE at once and a killed run goes on after it. Arms and what they share: :mod:`pyquant.integrations.ablate`.

The models are small, so one process leaves most of a GPU idle: ``--part 0/4`` .. ``--part 3/4``, each with its own FILE,
share the jobs out, and ``--merge PART.json ..`` puts their rows into one file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.ablate import ARMS, Bench, Job, jobs, resolve, run_jobs
from pyquant.integrations.data import load_text, windows
from pyquant.integrations.files import write_atomic
from pyquant.integrations.machine import quiet, versions
from pyquant.integrations.transformers import load_causal_lm

SPECS: dict[str, tuple[int, int, bool]] = {
    "w4": (4, -1, True), "w4g128": (4, 128, True), "w3": (3, -1, True), "w3g128": (3, 128, True), "w2g64": (2, 64, True),
    "w2g64-asym": (2, 64, False),
}  # fmt: skip
MODELS = {"classics-llama-28m": 1024, "stories260K": 512}  # -> tokens a window: the model's context
TEXTS = {
    "books": ("classics/valid.txt", 400_000),  # what comes before was looked at while the model was trained
    "wikitext2": ("wikitext2/wiki.test.raw", 0),
    "tinystories": ("tinystories/stories_1000.jsonl", 0),
}
TUNE_TEXTS = {  # settings are chosen on these, never on what is reported
    "books": ("classics/valid.txt", 0),
    "wikitext2": ("wikitext2/wiki.valid.tokens", 0),
    "tinystories": ("tinystories/stories_1000.jsonl", 260_000),
}
# Text of the kind that each model was trained on; of the stories, what lies far behind the measured windows.
CALIBRATION = {
    "classics-llama-28m": ("classics/calibration.txt", 0),
    "stories260K": ("tinystories/stories_1000.jsonl", 400_000),
}

# Where the arm "best" was looked for: what an objective at the logits, a joint end and other starts add.
TUNE = (
    "g-polish=single,start:gptq,polish:400,polish_lr:0.005",
    "g-polish-both=single,start:gptq,target:both,polish:400,polish_lr:0.005",
    "g-both=single,start:gptq,target:both,scale_lr:0.3",
    "g-polish-slow=single,start:gptq,target:both,polish:400,polish_lr:0.0025,scale_lr:0.3",
    "g-polish-only=gptq,polish:400,polish_lr:0.0025,scale_lr:0.3",
    "g-slow=single,start:gptq,target:both,lr:0.002,scale_lr:0.3",
    "g-end=ahead-end,start:gptq",
    "g-end-both=ahead-end,start:gptq,target:both,scale_lr:0.3",
    "m-polish=single,polish:400,polish_lr:0.005",
    "g-polish-long=single,start:gptq,target:both,polish:1200,polish_lr:0.005",
    "g-polish-far=single,start:gptq,target:both,polish:1200,polish_lr:0.005,reach:1.0",
    "g-polish-kl=single,start:gptq,end_mse:0,polish:400,polish_lr:0.005",
    "end-kl=ahead-end,end_mse:0",
    "w-polish=single,start:gptq,learn:weights,optimizer:adamw,polish:400,polish_lr:0.005",
)


def bench_of(
    root: Path,
    name: str,
    device: str,
    count: int,
    eval_windows: int,
    batch: int,
    share: bool,
    measured: dict[str, tuple[str, int]] = TEXTS,
) -> Bench:
    """A model of the shared data, ready to run arms."""
    length = MODELS[name]
    model, tokenizer = load_causal_lm(root / "models" / name, dtype="auto", device="cpu")
    model = model.to(device, torch.float32).eval()

    def tokens(text: str, file: str, skip: int, at_most: int | None = None) -> Tensor:
        """Windows of a text, kept in ``root / tokens`` where that folder exists: several processes want them."""
        kept = root / "tokens" / f"{name}-{text}-{skip}-{at_most}.safetensors"
        if kept.is_file():
            return load_file(kept)["windows"].long()
        found = windows(tokenizer, load_text(str(root / "data" / file), skip_chars=skip), length, at_most, text)
        if kept.parent.is_dir():
            save_file({"windows": found.int()}, kept)
        return found

    texts = {text: tokens(text, file, skip, eval_windows) for text, (file, skip) in measured.items()}
    calibration = tokens("calibration", *CALIBRATION[name])
    return Bench(model, calibration, count * 1024 // length, texts, batch * 1024 // length, share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with models/ and data/")
    parser.add_argument("--out", type=Path, required=True, help="JSON; one file for each model, -MODEL is added")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--specs", nargs="+", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--arms", nargs="+", help="names, or NAME=BASE,key:value,..")
    parser.add_argument("--tune", action="store_true", help="measure other texts, to choose settings; other arms")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth job, from the Ith on")
    parser.add_argument("--merge", type=Path, nargs="+", help="put the rows of these files into FILE, and stop")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="gradient steps of each block (200)")
    parser.add_argument("--calibration-windows", type=int, default=128, help="of 1,024 tokens")
    parser.add_argument("--eval-windows", type=int, default=64, help="of each text")
    parser.add_argument("--batch", type=int, default=8, help="windows of 1,024 tokens a step")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--commit", help="of the working tree, where git does not know it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    quiet()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.merge:
        merge(args.out, args.merge)
        return
    deadline = time.monotonic() + args.budget_seconds
    part, parts = map(int, args.part.split("/"))
    arms = resolve(args.arms or (TUNE if args.tune else list(ARMS)), args.steps)
    measured = TUNE_TEXTS if args.tune else TEXTS
    share = args.device == "cuda" or args.calibration_windows <= 128
    benches = {
        name: bench_of(
            args.data, name, args.device, args.calibration_windows, args.eval_windows, args.batch, share, measured
        )
        for name in args.models
    }
    print(f"ready after {args.budget_seconds - (deadline - time.monotonic()):.0f} s", flush=True)
    facts = {"calibration_tokens": args.calibration_windows * 1024, "eval_windows": args.eval_windows}
    facts |= {"batch_tokens": args.batch * 1024}
    specs = [QuantSpec(*SPECS[name]) for name in args.specs]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    todo = jobs(arms, specs, args.seeds)[part::parts]
    for seed in range(args.seeds):
        for name, bench in benches.items():
            file = args.out.with_name(f"{args.out.stem}-{name}.json")
            meta: dict[str, Any] = {"model": name, **facts, "gpu": versions(args.device)["device"]}
            meta |= {"commit": args.commit or commit(), "torch": torch.__version__}
            mine: list[Job] = [job for job in todo if job.seed == seed]
            if seed == 0 and not file.is_file():
                meta["full_precision"] = bench.measure()
                print(name, "full precision", meta["full_precision"], flush=True)
            if not run_jobs(bench, mine, arms, file, meta, deadline, lambda line, n=name: print(n, line, flush=True)):  # type: ignore[misc]
                return
            bench.stream = None
    print("all rows are there")


def merge(out: Path, files: list[Path]) -> None:
    """One file of the rows of several, in the order of their keys.

    Raises:
        ValueError: files of different runs.
    """
    held = [json.loads(file.read_text()) for file in files]
    for file, one in zip(files, held, strict=True):
        if any(one["meta"].get(k) != v for k, v in held[0]["meta"].items() if k != "full_precision"):
            raise ValueError(f"{file} is of another run than {files[0]}")
    rows = {row["key"]: row for one in held for row in one["rows"]}
    write_atomic(out, json.dumps({"meta": held[0]["meta"], "rows": list(rows.values())}, indent=1) + "\n")


def commit() -> str:
    """The commit of the working tree, or ``unknown``."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
