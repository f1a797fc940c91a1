"""``python -m benchmarks.qat_large --out FILE``: one KD-QAT step of an 8B-shaped model on one GPU, four ways.

Llama-3.1-8B's shape with random weights, teacher and student on the GPU, micro-batches of one sequence of 2,048 random
tokens, W4 g128 with learned scales. What is measured is time and memory, of the whole step: teacher, student, loss,
backward, clipping, optimizer.

=========  =====================================================================================================
none       the same step with plain linear layers
pyquant    ``set_up``, ``Distillation`` and ``parameter_groups`` of this package, the op ``fake_quant``
eager      learned scales in plain torch operations, differentiated by autograd; the rest as pyquant's
torchao    torchao's QAT (``IntxFakeQuantizeConfig``, min-max scales found anew at each step), where it is installed
=========  =====================================================================================================

Memory, for P = 8.03e9 parameters, 7.0e9 of them in the quantized layers, in GB (1e9 bytes):

    teacher bf16                                                     16.1
    student bf16, gradients bf16                                     32.1
    ``--optimizer bf16``: moments in bf16, no copies                 32.1    together 80.3
    ``adamw_8bit`` / ``adamw_torch_8bit``: fp32 copies, 8-bit        32.1 + 16.1, together 96.4
    (fp32 copies and fp32 moments: 96.4, together 144.6, do not fit)
    scales of g128, fp32, with gradient and moments: 7.0e9 / 128 x 16 bytes    0.9
    w_hat of every layer, kept for the gradient to x (not with checkpointing)  14.0
    activations of 2,048 tokens, about 220 KB a token and layer                14.4   (0.5 + one layer's with checkpointing)
    logits: 0.5 in chunks by the fused loss; as a whole 2,048 x 128,256 x (2 + 4 + 4 + ..) bytes, 5 to 8

So every way but eager fits a GPU of 141 GB without checkpointing; eager keeps several fp32 copies of each weight for its
backward pass, 28 GB each over all layers, and runs only with it. The default is bf16 moments without copies, the one that
torch itself has; it is the same in all four, and cheap, so the share of quantization is not made to look small.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.blockwise_large import SHAPES
from benchmarks.ptq import commit
from pyquant.formats import int4
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.files import write_atomic
from pyquant.integrations.machine import quiet, versions
from pyquant.integrations.trainer import optimizer_class
from pyquant.nn import FakeQuantLinear
from pyquant.nn.swap import matches
from pyquant.quantizers import LSQ
from pyquant.recipes.clip import clip_gradients
from pyquant.recipes.kd_loss import Distillation, KDLoss
from pyquant.recipes.kd_qat import parameter_groups, set_up
from pyquant.recipes.kd_settings import KDConfig

VARIANTS = ("none", "pyquant", "eager", "torchao")


class EagerLSQ(LSQ):
    """Learned scales as one writes them in torch: the same values and gradients as the op, up to rounding."""

    def forward(self, w: Tensor) -> Tensor:
        spec = self.spec
        scale = self.scale * self.grad_scale + (self.scale * (1 - self.grad_scale)).detach()
        scale = int4.expand_groups(scale.clamp_min(1e-8), w.shape[1], spec.group_size)
        v = w / scale
        q = v.clamp(spec.qmin, spec.qmax)
        q = q + (torch.round(q) - q).detach()
        return (q * scale).to(w.dtype)


def variant(name: str, student: nn.Module, config: KDConfig, spec: QuantSpec) -> None:
    """Make a student quantize its weights in the named way, in place."""
    if name in ("pyquant", "eager"):
        set_up(student, config, spec)
    if name == "eager":
        for m in student.modules():
            if isinstance(m, FakeQuantLinear):
                m.quantizer.__class__ = EagerLSQ
    if name == "torchao":
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        weight = IntxFakeQuantizeConfig(torch.int4, group_size=spec.group_size, is_symmetric=True)
        quantize_(
            student,
            QATConfig(weight_config=weight, step="prepare"),
            filter_fn=lambda m, n: isinstance(m, nn.Linear) and not matches(n, ["lm_head"]),
        )


def build(shape: str, device: str, layers: int | None = None) -> nn.Module:
    """The teacher: random weights in bf16; with another number of layers where one is given."""
    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(**sizes, tie_word_embeddings=False, max_position_embeddings=8192)
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(was)
    return model.eval().requires_grad_(False)


def measure(
    name: str, teacher: nn.Module, checkpointing: bool, capture: bool, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: milliseconds a step, tokens a second, the peak of GPU memory; or what was in the way."""
    device = args.device
    config = KDConfig(
        loss=KDLoss(), lr=1e-6, scale_lr=1e-6, seq_len=args.length, weights="bf16", optim="adamw_torch",
        gradient_checkpointing=checkpointing, fused_loss=None if args.fused else False, rule=args.rule,
    )  # fmt: skip
    row: dict[str, Any] = {"variant": name, "checkpointing": checkpointing, "captured": capture}
    vocabulary = teacher.config.vocab_size  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(1)
    batches = torch.randint(0, vocabulary, (args.warmup + args.steps, 1, args.length), generator=draw).to(device)
    try:
        student = copy.deepcopy(teacher).requires_grad_(True).train()
        variant(name, student, config, QuantSpec(4, 128 if args.shape == "8b" else 64))
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        objective = Distillation(student, teacher, config.loss, config.fused_loss)
        groups = parameter_groups(student, config.lr, config.scale_lr)
        optimizer = make_optimizer(groups, args.optimizer, device, capture)
        params = [p for p in student.parameters() if p.requires_grad]

        def step(ids: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss, _ = objective(ids)
            loss.backward()
            clip_gradients(params, 1.0)
            optimizer.step()
            return loss.detach()

        if capture:
            step = captured(step, batches[0], args.warmup)
        for ids in batches[: args.warmup]:
            step(ids)
        milliseconds, losses = timed(step, batches[args.warmup :], device)
        row |= {"ms": milliseconds, "tokens_s": args.length / milliseconds * 1000, "loss": float(losses[-1])}
        row["fused_loss"] = objective.fused
    except (ImportError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
        row["failed"] = str(error).splitlines()[0]
    if device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def make_optimizer(
    groups: list[dict[str, Any]], name: str, device: str, capture: bool = False
) -> torch.optim.Optimizer:
    """``bf16``: AdamW whose moments have the dtype of the weights; others by transformers' names, with fp32 copies."""
    if name == "bf16":
        return torch.optim.AdamW(groups, fused=device == "cuda", capturable=capture)
    kind, flags = optimizer_class(KDConfig(weights="bf16", optim=name))
    return kind(groups, **flags)


def captured(
    step: Callable[[Tensor], Tensor], example: Tensor, warmup: int, mode: str = "global"
) -> Callable[[Tensor], Tensor]:
    """The step as one CUDA graph, as :mod:`pyquant.recipes.qat_loop` runs it: the host launches nothing else. ``mode`` is
    ``thread_local`` where other threads use the GPU meanwhile."""
    ids, side = example.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step(ids)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        loss = step(ids)

    def replay(given: Tensor) -> Tensor:
        ids.copy_(given)
        graph.replay()
        return loss.clone()

    return replay


def timed(step: Callable[[Tensor], Tensor], batches: Tensor, device: str) -> tuple[float, list[Tensor]]:
    """Mean milliseconds of a step over the batches, on the GPU's clock, and the losses."""
    if device != "cuda":
        began = time.monotonic()
        losses = [step(ids) for ids in batches]
        return (time.monotonic() - began) * 1000 / len(batches), losses
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    losses = [step(ids) for ids in batches]
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / len(batches), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON; written after every row")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--checkpointing", choices=("off", "on", "both"), default="both")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--optimizer", choices=("bf16", "adamw_8bit", "adamw_torch_8bit"), default="bf16")
    parser.add_argument("--rule", choices=("minmax", "mse"), default="minmax", help="minmax sets up faster")
    parser.add_argument("--capture", choices=("off", "on", "both"), default="off", help="each step one CUDA graph")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True, help="the fused loss")
    parser.add_argument("--commit", help="of the working tree, where git does not know it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    quiet()
    teacher = build(args.shape, args.device)
    meta = {
        "shape": args.shape, "length": args.length, "optimizer": args.optimizer, "gpu": versions(args.device)["device"],
        "torch": torch.__version__, "commit": args.commit or commit(),
        "parameters": sum(p.numel() for p in teacher.parameters()),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    ways = {"off": [False], "on": [True], "both": [False, True]}
    for checkpointing, capture, name in itertools.product(ways[args.checkpointing], ways[args.capture], args.variants):
        if name == "eager" and not checkpointing and args.shape == "8b":
            continue  # several times 28 GB of saved tensors: known not to fit
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = measure(name, teacher, checkpointing, capture, args)
        alike = {"variant": "none", "checkpointing": checkpointing, "captured": capture}
        base = next((r for r in rows if alike.items() <= r.items()), {})
        if "ms" in row and "ms" in base:
            row["over_none"] = row["ms"] / base["ms"]
        rows.append(row)
        write_atomic(args.out, json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
