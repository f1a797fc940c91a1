"""``python -m benchmarks.bisup DATA --out FILE``: weight-activation quantization on the two small models.

Hosts round to nearest, Atom and QuaRot, each bare, with BiSup's vertical parts, with the prompt's K and V in 16 bits, and with
both, over seeds; each vertical part alone, and the prompt's four storages. DATA holds ``models/`` and ``data/``. As in
:mod:`benchmarks.ptq` each finished row is in FILE at once, a killed run goes on after it, ``--part I/N`` shares jobs out and
``--merge`` puts their rows together. ``--tune`` measures other texts, to choose settings.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ptq import MODELS, TEXTS, TUNE_TEXTS, bench_of, commit, merge
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.ablate import jobs, run_jobs
from pyquant.integrations.ablate_bisup import BISUP_ARMS, MAIN, BiSupBench, by_model, is_seedless, resolve_bisup
from pyquant.integrations.machine import quiet, versions
from pyquant.integrations.prompt import SYSTEM, prompt_tokens
from pyquant.integrations.transformers import load_causal_lm

SPECS = {"w4a4": (4, 4), "w3a3": (3, 3), "w4a8": (4, 8)}  # bits of weights and inputs
GROUP = {"classics-llama-28m": 128, "stories260K": 32}  # stories260K is 64 wide; its last group of 172 is short
PROMPT = {"classics-llama-28m": 64, "stories260K": 32}  # tokens of the prompt, at most
# Settings looked for on other texts: rates, the low-rank term's size, and what each choice of ours adds.
TUNE = tuple(
    f"{host}-{name}={host}+vertical,{changes}"
    for host in ("rtn", "quarot")
    for name, changes in (
        ("same", "steps:320"),
        ("long", "steps:1000"),
        ("clip-slow", "lr_clip:0.003"),
        ("clip-fast", "lr_clip:0.03,lr_act_clip:0.03"),
        ("rank-slow", "lr_low_rank:0.0001"),
        ("rank-fast", "lr_low_rank:0.002"),
        ("rank-faster", "lr_low_rank:0.005"),
        ("rank-64", "rank:64,alpha:8"),
        ("rank-64-fast", "rank:64,alpha:8,lr_low_rank:0.002"),
        ("smooth-fast", "lr_smooth:0.02"),
        ("target-fp", "target:fp"),
        ("weights-only-clip", "act_clipping:false"),
        ("host-start", "clip_start:host"),
    )
)


def bisup_bench(
    root: Path, name: str, device: str, count: int, eval_windows: int, batch: int, measured: dict[str, tuple[str, int]]
) -> BiSupBench:
    """A model of the shared data with the prompt."""
    plain = bench_of(root, name, device, count, eval_windows, batch, False, measured)
    _, tokenizer = load_causal_lm(root / "models" / name, dtype="auto", device="cpu")
    prompt = prompt_tokens(tokenizer, SYSTEM, PROMPT[name])
    return BiSupBench(plain.model, plain.calibration, plain.count, plain.texts, prompt, plain.batch)


def main() -> None:
    """Run the arms, or merge files."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--specs", nargs="+", default=["w3a3", "w4a4"], choices=list(SPECS))
    parser.add_argument("--arms", nargs="+", help="names, or NAME=BASE,key:value,..; hosts x parts by default")
    parser.add_argument("--ablation", action="store_true", help="each vertical part alone, storages, searched ranges")
    parser.add_argument("--tune", action="store_true", help="measure other texts, to choose settings; other arms")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth quantized model, from the Ith on")
    parser.add_argument("--merge", type=Path, nargs="+", help="put the rows of these files into FILE, and stop")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="gradient steps of each block (320)")
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
    began = time.monotonic()
    part, parts = map(int, args.part.split("/"))
    rest = [arm for arm in BISUP_ARMS if arm not in MAIN]
    names = args.arms or (list(TUNE) if args.tune else rest if args.ablation else list(MAIN))
    texts = TUNE_TEXTS if args.tune else TEXTS
    args.out.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"calibration_tokens": args.calibration_windows * 1024, "eval_windows": args.eval_windows}
    facts |= {"batch_tokens": args.batch * 1024, "gpu": versions(args.device)["device"]}
    facts |= {"commit": args.commit or commit(), "torch": torch.__version__}
    benches = {
        name: bisup_bench(args.data, name, args.device, args.calibration_windows, args.eval_windows, args.batch, texts)
        for name in args.models
    }
    print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
    for seed in range(args.seeds):
        for name, bench in benches.items():
            for spec in args.specs:
                bits, act_bits = SPECS[spec]
                common = {"act_bits": act_bits} | ({"steps": args.steps} if args.steps else {})
                arms = resolve_bisup(names, common)
                seedless = [arm for arm, fields in arms.items() if is_seedless(fields)]
                found = [j for j in jobs(arms, [QuantSpec(bits, GROUP[name])], args.seeds, seedless) if j.seed == seed]
                todo = [job for group in by_model(found, arms)[part::parts] for job in group]
                file = args.out.with_name(f"{args.out.stem}-{name}-{spec}.json")
                meta = {"model": name, "spec": spec, "prompt_tokens": len(bench.prompt), **facts}
                if seed == 0 and not file.is_file():
                    meta["full_precision"] = bench.measure()
                    print(name, "full precision", meta["full_precision"], flush=True)
                deadline = began + args.budget_seconds
                if not run_jobs(
                    bench, todo, arms, file, meta, deadline,
                    lambda line, n=name, s=spec: print(n, s, line, flush=True),  # type: ignore[misc]
                ):  # fmt: skip
                    return
    print("all rows are there")


if __name__ == "__main__":
    main()
