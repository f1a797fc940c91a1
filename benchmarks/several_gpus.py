"""``torchrun --nproc_per_node 2 -m benchmarks.several_gpus --out FILE``: an 8B shape on one GPU and on several of one host.

Two things: tokens a second of the KD-QAT step (:mod:`benchmarks.several_training`), and of tensor-parallel decode of the
4-bit model (:mod:`benchmarks.several_decode`). Random weights, made on the GPUs. Rows of one GPU are measured on all GPUs at
once, each for itself, and the fastest counts; of a row of several GPUs the slowest process counts. Each row is written when
it is there; a row that fails on all processes costs no other, one that fails on some ends the run after ``--patience``.

``--small`` runs all of it on CPU processes (gloo) with a tiny shape: what is measured means nothing, losses and logits do.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor
from torch import distributed as dist

from benchmarks.ptq import commit
from benchmarks.qat_large import build, timed
from benchmarks.several_decode import decode
from benchmarks.several_training import LIKE, MANY, ONE, free, train
from pyquant.integrations.files import write_atomic
from pyquant.integrations.machine import quiet, versions
from pyquant.recipes.replicas import LARGE

SMALL: dict[str, Any] = {
    "shape": "tiny", "device": "cpu", "length": 32, "first": 3, "steps": 2, "group_size": 64, "batches": [1, 3],
    "prompt": 12, "new": 4, "repeats": 1, "large": 4096,
}  # fmt: skip


def agree(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row from those of all processes: the fastest of one GPU, the slowest of several; the most memory of any."""
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, rows)
    found = []
    for alike in zip(*held, strict=True):
        row = dict(alike[0])
        if "ms" in row:
            pick = max if row["gpus"] > 1 else min
            chosen = pick(alike, key=lambda r: r["ms"])
            row |= {key: chosen[key] for key in ("ms", "tokens_s")}
        for key in ("allocated_gib", "reserved_gib"):
            if key in row:
                row[key] = max(r[key] for r in alike)
        found.append(row)
    return found


def guarded(what: str, call: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of one measurement, or one that says what was in the way."""
    began = time.monotonic()
    try:
        rows = call()
    except Exception as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        rows = [{"op": what.split(":")[0], "way": what, "gpus": 0, "failed": f"{type(error).__name__}: {first}"}]
    rows = agree(rows)
    if dist.get_rank() == 0:
        for row in rows:
            print(json.dumps(row), flush=True)
        print(f"# {what}: {time.monotonic() - began:.1f} s", flush=True)
    return rows


def links(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the links carry: GB/s of a bf16 sum over all GPUs (twice the bytes of a share), and microseconds of a small one."""
    size, rows = dist.get_world_size(), []
    for elements in (1 << 12, 1 << 29 if args.device == "cuda" else 1 << 16):
        t = torch.zeros(elements, dtype=torch.bfloat16, device=args.device)

        def add(_: Tensor, t: Tensor = t) -> Tensor:
            dist.all_reduce(t)
            return t

        timed(add, torch.zeros(3), args.device)
        ms, _ = timed(add, torch.zeros(10), args.device)
        sent = 2 * (size - 1) / size * t.numel() * 2
        rows.append({"op": "all_reduce", "way": "bf16", "gpus": size, "bytes": 2 * elements, "ms": ms, "tokens_s": 0.0})
        rows[-1]["gb_s"] = sent / ms / 1e6
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Put beside rows of several GPUs what they are to those of one: ``speedup`` over the like way, ``over_best`` over the
    best of one GPU with one window a step, ``over_same_batch`` over the same windows on one GPU; ``loss_difference``, the
    largest of the first steps relative to one GPU with the same windows."""
    steps = {r["way"]: r for r in rows if r["op"] == "kd_qat_step" and "ms" in r}
    single = [steps[w]["tokens_s"] for w in ONE if w in steps and w != "one, all windows"]
    whole = steps.get("one, all windows")
    for way in MANY:
        if way not in steps:
            continue
        row = steps[way]
        if LIKE[way] in steps:
            row["speedup"] = row["tokens_s"] / steps[LIKE[way]]["tokens_s"]
        if single:
            row["over_best"] = row["tokens_s"] / max(single)
        if whole:
            row["over_same_batch"] = row["tokens_s"] / whole["tokens_s"]
            pairs = zip(row["losses"], whole["losses"], strict=True)
            row["loss_difference"] = max(abs(a - b) / abs(b) for a, b in list(pairs)[:3])
    decoded = {(r["gpus"] > 1, r["batch"]): r for r in rows if r["op"] == "decode" and "ms" in r}
    for (several, batch), row in decoded.items():
        if several and (False, batch) in decoded:
            row["speedup"] = row["tokens_s"] / decoded[False, batch]["tokens_s"]


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured, a line a row."""
    lines = []
    for row in rows:
        what = f"{row['op']:12} {row['way']:22} GPUs {row['gpus']}"
        if "failed" in row:
            what += f"  FAILED {row['failed']}"
        elif row["op"] == "logits":
            what += f"  relative {row['relative']:.2e}, without a cut {row['noise']:.2e}"
            what += f", same token {row['same_token']:.3f}"
        elif row["op"] == "all_reduce":
            what += f"  {row['bytes']} bytes {row['ms'] * 1e3:.1f} us {row['gb_s']:.0f} GB/s"
        else:
            batch = f"batch {row['batch']}" if "batch" in row else ""
            what += f" {batch:9} {row['ms']:9.2f} ms {row['tokens_s']:9.0f} tokens/s"
        names = ("speedup", "over_best", "over_same_batch", "loss_difference", "allocated_gib")
        lines.append(what + "".join(f"  {n} {row[n]:.4g}" for n in names if n in row))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON; written after every row")
    parser.add_argument("--small", action="store_true", help="tiny shapes on CPU processes")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--ways", nargs="*", choices=(*ONE, *MANY), default=[*ONE, *MANY])
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--first", type=int, default=3, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=128, help="of the training; decode takes 128")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=int, default=60, help="seconds that a process waits for the others")
    parser.add_argument("--commit", help="of the working tree, where git does not know it")
    parser.set_defaults(device="cuda", large=LARGE)
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
        torch.set_num_threads(1)
    if "WORLD_SIZE" not in os.environ:
        raise SystemExit("start it with torchrun --nproc_per_node N -m benchmarks.several_gpus ..")
    rank, began = int(os.environ["RANK"]), time.monotonic()
    if args.device == "cuda":
        if torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
            raise SystemExit(f"{os.environ['WORLD_SIZE']} processes and {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=args.patience))
    quiet()
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, versions(args.device)["device"])
    meta = {
        "shape": args.shape, "length": args.length, "gpu": names[0], "gpus": names, "date": date.today().isoformat(),
        "torch": torch.__version__, "transformers": versions(args.device)["transformers"],
        "commit": args.commit or commit(),
    }  # fmt: skip
    if args.device == "cuda":
        meta["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    rows: list[dict[str, Any]] = []

    def keep(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        compare(rows)
        if rank == 0:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(args.out, json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")

    def measure(ways: list[str]) -> None:
        if ways:
            free(args.device)
            teacher = build(args.shape, args.device)
            for way in ways:
                keep(guarded(f"kd_qat_step: {way}", lambda way=way: [train(way, teacher, args)]))

    keep(guarded("links", lambda: links(args)))
    last = "replicas, captured"  # the one that could hang: sums between GPUs inside a captured graph
    measure([way for way in args.ways if way != last])
    if not args.no_decode:
        keep(guarded("decode", lambda: decode(args)))
    measure([way for way in args.ways if way == last])
    if rank == 0:
        print(f"\n{', '.join(names)}, {time.monotonic() - began:.0f} s\n{table(rows)}", flush=True)
    free(args.device)  # captured sums hold the communicator
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
