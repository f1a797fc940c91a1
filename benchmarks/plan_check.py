"""``python -m benchmarks.plan_check --out FILE --work FOLDER``: what recipes take on a GPU, beside what ``pyquant plan`` says.

The 8B shape with random weights and ``--layers`` blocks (the sums are those of any number; all 32 check them at the size that
counts), each recipe as ``pyquant quantize`` calls it: the model in bf16 on the GPU, few steps and windows. GPU memory is
``torch.cuda.max_memory_allocated`` while the recipe runs (on a CPU the tensors alive are counted, which says something of the
recipes that plain torch computes: gptq, bisup, rtn); times beside the planned ones are for the work that was done here.
``--work`` holds the checkpoint that blockwise streams (4 GB with 4 blocks, 16 GB with 32).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor, nn

from benchmarks.blockwise_large import SHAPES, make
from benchmarks.live import Live
from benchmarks.ptq import commit
from benchmarks.qat_large import build, make_optimizer
from benchmarks.several_decode import build as build_quantized
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.blockwise import quantize_blocks
from pyquant.integrations.files import write_atomic
from pyquant.integrations.inference import prepare_for_inference
from pyquant.integrations.machine import quiet, versions
from pyquant.integrations.streaming import Streamed
from pyquant.recipes.bisup import BiSup, bisup
from pyquant.recipes.clip import clip_gradients
from pyquant.recipes.gptq import gptq
from pyquant.recipes.kd_loss import Distillation, KDLoss
from pyquant.recipes.kd_qat import parameter_groups, set_up
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.plan import RECIPES, Work, kd_memory, kd_step, plan
from pyquant.recipes.plan_constants import GIB
from pyquant.recipes.rtn import layer_errors, rtn
from pyquant.recipes.settings import Settings
from pyquant.recipes.shapes import Shape, read_shape
from pyquant.recipes.soft_qat import SoftQAT


class Meter:
    """Memory and seconds of what runs inside; what stood there before counts."""

    def __init__(self, device: str) -> None:
        self.device, self.gib, self.seconds = device, math.nan, math.nan
        self.held: list[Tensor] = []

    def over(self, model: nn.Module) -> Meter:
        """Say what stands there before."""
        self.held = [*model.parameters(), *model.buffers()]
        return self

    def __enter__(self) -> Meter:
        gc.collect()
        self.live = Live(self.held)
        self.held = []
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live.__enter__()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.gib = torch.cuda.max_memory_allocated() / GIB
        else:
            self.live.__exit__(None, None, None)
            self.gib = self.live.peak / GIB
        self.seconds = time.perf_counter() - self.began


def tokens_of(args: argparse.Namespace, windows: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, SHAPES[args.shape]["vocab_size"], (windows, args.length), generator=draw)


def run_rtn(args: argparse.Namespace, meter: Meter) -> None:
    model = build(args.shape, args.device, args.layers)
    with meter.over(model), torch.no_grad():
        before = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        rtn(model, args.spec)
        layer_errors(before, model)


def run_gptq(args: argparse.Namespace, meter: Meter) -> None:
    model = build(args.shape, args.device, args.layers)
    tokens = tokens_of(args, args.windows).to(args.device)
    with meter.over(model), torch.no_grad():
        before = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        gptq(model, tokens.split(4), args.spec)
        layer_errors(before, model)


def run_blockwise(args: argparse.Namespace, meter: Meter) -> None:
    folder = args.work / f"{args.shape}-{args.layers}"
    make(folder, SHAPES[args.shape] | {"num_hidden_layers": args.layers})
    shutil.rmtree(args.work / "blocks", ignore_errors=True)
    streamed = Streamed(folder, args.device)
    layers = [n for n, m in streamed.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    settings = Settings(target="both", start="gptq", steps=args.steps, batch_size=args.batch)
    with meter.over(streamed.model):
        quantize_blocks(
            streamed.model, streamed, tokens_of(args, args.windows), args.spec, settings, layers, streamed.stored,
            "plan_check", args.work / "blocks", False, "host", None, lambda done, total, note: None,
        )  # fmt: skip


def run_bisup(args: argparse.Namespace, meter: Meter) -> None:
    model = build(args.shape, args.device, args.layers)
    with meter.over(model):
        bisup(model, tokens_of(args, args.windows), args.spec, BiSup(steps=args.steps, batch_size=args.batch))


def training_config(args: argparse.Namespace, soft: bool) -> KDConfig:
    """bf16 weights with fp32 copies, one window a step."""
    config = KDConfig(
        batch_size=1,
        seq_len=args.length,
        weights="bf16",
        optim="adamw_torch_fused",
        rule="minmax",
        loss=KDLoss(0.5, 0.5),
    )
    return replace(config, quantizer="soft", soft=SoftQAT(), loss=KDLoss(0, 1)) if soft else config


def run_training(args: argparse.Namespace, meter: Meter, soft: bool) -> None:
    teacher = build(args.shape, args.device, args.layers)
    config = training_config(args, soft)
    name = config.optim if args.device == "cuda" else "adamw_torch"
    with meter.over(teacher):
        student = copy.deepcopy(teacher).requires_grad_(True).train()
        set_up(student, config, args.spec)
        objective = Distillation(student, teacher, config.loss)
        optimizer = make_optimizer(parameter_groups(student, 1e-5, 1e-5), name, args.device)
        for ids in tokens_of(args, args.training_steps).to(args.device).split(1):
            optimizer.zero_grad(set_to_none=True)
            objective(ids)[0].backward()
            clip_gradients(student.parameters(), 1.0)
            optimizer.step()


def run_serve(args: argparse.Namespace, meter: Meter) -> None:
    model: Any = build_quantized(args.shape, args.device, args.layers)
    prepare_for_inference(model)
    ids = tokens_of(args, args.batch).to(args.device)
    with meter.over(model), torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new, do_sample=False)


RUNS: dict[str, Callable[[argparse.Namespace, Meter], None]] = {
    "rtn": run_rtn,
    "gptq": run_gptq,
    "blockwise": run_blockwise,
    "bisup": run_bisup,
    "kd-qat": lambda args, meter: run_training(args, meter, False),
    "soft-qat": lambda args, meter: run_training(args, meter, True),
    "serve": run_serve,
}


def planned(recipe: str, shape: Shape, args: argparse.Namespace) -> tuple[dict[str, float], float]:
    """GPU memory by what needs it, and seconds, for the work that is done here."""
    work = Work(length=args.length, batch=args.batch, windows=args.windows, steps=args.steps)
    if recipe in ("kd-qat", "soft-qat"):
        config = training_config(args, recipe == "soft-qat")
        one = kd_step(shape, replace(work, batch=1), config, recipe == "soft-qat")
        return kd_memory(shape, config, 1), one * args.training_steps
    made = plan(shape, recipe, replace(work, steps=args.new) if recipe == "serve" else work)
    return dict(made.need.device), made.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON; written after every recipe")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint that blockwise streams")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of a block in blockwise and bisup")
    parser.add_argument("--training-steps", type=int, default=4)
    parser.add_argument("--new", type=int, default=64, help="tokens that serve generates")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--commit", help="of the working tree, where git does not know it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    quiet()
    args.spec = QuantSpec(4, args.group_size)
    sizes = SHAPES[args.shape] | {"num_hidden_layers": args.layers}
    shape = read_shape(sizes)
    about = versions(args.device)
    meta = {
        "gpu": about["device"], "torch": about["torch"], "commit": args.commit or commit(), "shape": asdict(shape),
        "length": args.length, "windows": args.windows, "batch": args.batch, "steps": args.steps,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    for recipe in args.recipes:
        parts, seconds = planned(recipe, shape, args)
        row: dict[str, Any] = {"recipe": recipe, "planned_gib": sum(parts.values()) / GIB, "planned_s": seconds}
        row["parts"] = {name: size / GIB for name, size in parts.items()}
        meter = Meter(args.device)
        try:
            RUNS[recipe](args, meter)
            row |= {"seconds": meter.seconds, "gib": meter.gib, "over": row["planned_gib"] / meter.gib}
        except (RuntimeError, ValueError) as error:  # out of memory among them
            row["failed"] = str(error).splitlines()[0]
        rows.append(row)
        write_atomic(args.out, json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    print(f"\n{about['device']}, {args.layers} blocks of {args.shape}")
    for row in rows:
        told = row.get("failed") or f"{row['gib']:8.2f} GiB measured ({row['over']:.3f}) {row['seconds']:8.1f} s"
        print(f"{row['recipe']:10} {row['planned_gib']:8.2f} GiB planned {row['planned_s']:8.1f} s   {told}")


if __name__ == "__main__":
    main()
