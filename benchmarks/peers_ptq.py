"""``python -m benchmarks.peers_ptq DATA --out FILE``: other packages on the same calibration windows and evaluation.

Each package quantizes the same linear layers of the same model with the same windows of tokens as the arms of
``benchmarks.ptq`` (same seed, same draw), its dequantized weights are put into our fp32 copy of the model, and that is
measured as everything else is. Packages that are not installed are named and left out. ``datasets``, which some import
for their own data, may be absent: a module that refuses use stands in, since the windows are given here.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ptq import MODELS, SPECS, bench_of, commit
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.ablate import calibration_windows
from pyquant.integrations.files import write_atomic
from pyquant.integrations.machine import quiet, versions
from pyquant.integrations.transformers import load_causal_lm
from pyquant.recipes.blocks import find_blocks

Peer = Callable[[Path, QuantSpec, Tensor, str, int], nn.Module]  # (folder, spec, windows, device, seed) -> model


def auto_round(folder: Path, spec: QuantSpec, tokens: Tensor, device: str, seed: int) -> nn.Module:
    """AutoRound, 200 iterations, batches of 8 windows, its other defaults."""
    from auto_round import AutoRound

    model, tokenizer = load_causal_lm(folder, dtype=torch.bfloat16, device="cpu")
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in tokens], batch_size=8)
    tool = AutoRound(
        model, tokenizer, bits=spec.bits, group_size=spec.group_size, sym=spec.symmetric, iters=200,
        nsamples=len(tokens), seqlen=tokens.shape[1], batch_size=8, dataset=loader, seed=seed, device_map=device,
    )  # fmt: skip
    return tool.quantize()[0]


def hqq(folder: Path, spec: QuantSpec, tokens: Tensor, device: str, seed: int) -> nn.Module:
    """HQQ along K, optimized, without data; asymmetric, as it always is."""
    from hqq.core.quantize import Quantizer

    model, _ = load_causal_lm(folder, dtype=torch.float32, device="cpu")
    _, blocks = find_blocks(model)
    for layer in blocks.modules():
        if isinstance(layer, nn.Linear):
            group = layer.in_features if spec.group_size == -1 else spec.group_size
            codes, meta = Quantizer.quantize(
                layer.weight.data, nbits=spec.bits, group_size=group, axis=1, optimize=True, device=device,
                round_zero=spec.bits == 4, compute_dtype=torch.float32,
            )  # fmt: skip
            layer.weight.data = Quantizer.dequantize(codes, meta).float().cpu().view_as(layer.weight)
    return model


def _llmcompressor(folder: Path, modifier: Any, tokens: Tensor, device: str) -> nn.Module:
    from llmcompressor import oneshot

    model, tokenizer = load_causal_lm(folder, dtype=torch.bfloat16, device="cpu")
    model.to(device)
    loader = torch.utils.data.DataLoader(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=1
    )
    oneshot(model=model, tokenizer=tokenizer, dataset=loader, recipe=[modifier], num_calibration_samples=len(tokens))
    return model


def _scheme(spec: QuantSpec) -> dict[str, Any]:
    """A config group of compressed-tensors."""
    kind = {"strategy": "channel"} if spec.group_size == -1 else {"strategy": "group", "group_size": spec.group_size}
    weights = {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "observer": "mse", **kind}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def llmcompressor_gptq(folder: Path, spec: QuantSpec, tokens: Tensor, device: str, seed: int) -> nn.Module:
    """llm-compressor's GPTQ with MSE ranges."""
    from llmcompressor.modifiers.quantization import GPTQModifier

    return _llmcompressor(folder, GPTQModifier(**_scheme(spec)), tokens, device)


def llmcompressor_awq(folder: Path, spec: QuantSpec, tokens: Tensor, device: str, seed: int) -> nn.Module:
    """llm-compressor's AWQ, asymmetric as its recipes are."""
    from llmcompressor.modifiers.awq import AWQModifier

    return _llmcompressor(folder, AWQModifier(**_scheme(QuantSpec(spec.bits, spec.group_size, False))), tokens, device)


def gptqmodel(folder: Path, spec: QuantSpec, tokens: Tensor, device: str, seed: int) -> nn.Module:
    """GPTQModel: activation order per channel, its group-aware order otherwise."""
    from gptqmodel import GPTQModel, QuantizeConfig

    channel = spec.group_size == -1
    config = QuantizeConfig(
        bits=spec.bits, group_size=spec.group_size, sym=spec.symmetric, desc_act=channel, act_group_aware=not channel,
        format="gptq_v2",  # zeros as they are: dequantize_weight before a reload takes them so, the first format has z - 1
        offload_to_disk=False,  # weights stay here, not on the meta device with their values in files
    )  # fmt: skip
    tool = GPTQModel.load(str(folder), config)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    tool.quantize(rows, batch_size=4)
    return tool.model


PEERS: dict[str, tuple[str, Peer]] = {
    "auto-round": ("auto_round", auto_round),
    "hqq": ("hqq", hqq),
    "llm-compressor gptq": ("llmcompressor", llmcompressor_gptq),
    "llm-compressor awq": ("llmcompressor", llmcompressor_awq),
    "gptqmodel": ("gptqmodel", gptqmodel),
}


def dense(module: nn.Module) -> Tensor:
    """The weight ``[N, K]`` of a layer of any of these packages."""
    if hasattr(module, "quantization_scheme"):
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize

        zero = getattr(module, "weight_zero_point", None)
        return fake_quantize(module.weight, module.weight_scale, zero, module.quantization_scheme.weights)
    if isinstance(getattr(module, "weight", None), Tensor):
        return module.weight  # already rounded to the grid
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().T
    raise ValueError(f"no weight in {type(module).__name__}")


def transplant(theirs: nn.Module, ours: nn.Module) -> tuple[nn.Module, str]:
    """A copy of our model with the weights of theirs (quantized layers, and what was folded into other parameters), and
    how many of its linear layers that changed: some packages leave shapes that they have no kernel for."""
    copied = copy.deepcopy(ours)
    mine, root = dict(copied.named_modules()), find_blocks(copied)[0]
    changed = 0
    for name, module in theirs.named_modules():
        place = name.removeprefix("model.") if name not in mine else name
        if not place.startswith(root) or place not in mine:
            continue
        own = mine[place]
        if isinstance(own, nn.Linear):
            w = dense(module).detach().float().to(own.weight.device)
            changed += int(not torch.equal(w, own.weight))
            own.weight.data.copy_(w)
        elif isinstance(getattr(own, "weight", None), Tensor):
            own.weight.data.copy_(module.weight.detach().float())
    linears = sum(isinstance(m, nn.Linear) for n, m in mine.items() if n.startswith(root))
    if not changed:
        raise ValueError(f"none of {linears} linear layers was quantized")
    return copied, f"{changed} of {linears}"


def stand_in_for_datasets() -> None:
    """Where the package is absent, let it be imported and refuse to be used."""
    if importlib.util.find_spec("datasets") is not None:
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("the package datasets is not installed; the calibration windows are given")

    def name_of(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": refuse, "__call__": refuse})

    parts = ("", ".formatting", ".formatting.formatting", ".utils", ".arrow_dataset")
    for path in (f"datasets{part}" for part in parts):
        module = types.ModuleType(path)
        module.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
        module.__path__ = []
        module.__getattr__ = name_of  # type: ignore[method-assign]
        sys.modules[path] = module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with models/ and data/")
    parser.add_argument("--out", type=Path, required=True, help="JSON; rows there are not run again")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--model", default="classics-llama-28m", choices=list(MODELS))
    parser.add_argument("--specs", nargs="+", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration-windows", type=int, default=128, help="of 1,024 tokens")
    parser.add_argument("--eval-windows", type=int, default=64)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--commit", help="of the working tree, where git does not know it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    quiet()
    stand_in_for_datasets()
    deadline = time.monotonic() + args.budget_seconds
    bench = bench_of(args.data, args.model, args.device, args.calibration_windows, args.eval_windows, 8, False)
    held: dict[str, Any] = {"meta": {}, "rows": []}
    if args.out.is_file():
        held = json.loads(args.out.read_text())
    tools = {name: importlib.metadata.version(name) for name in _installed()}
    held["meta"] = {
        "model": args.model,
        "gpu": versions(args.device)["device"],
        "versions": tools,
        "commit": args.commit or commit(),
    }
    done = {(r["arm"], r["spec"], r["seed"]) for r in held["rows"]}
    for seed in range(args.seeds):
        for short in args.specs:
            spec = QuantSpec(*SPECS[short])
            for name in args.peers:
                package, peer = PEERS[name]
                if (name, str(spec), seed) in done or (seed and name == "hqq") or time.monotonic() > deadline:
                    continue
                if importlib.util.find_spec(package) is None:
                    print(f"{name}: the package {package} is not installed", flush=True)
                    continue
                tokens = calibration_windows(bench.calibration, bench.count, seed)
                began = time.monotonic()
                try:
                    torch.manual_seed(seed)
                    theirs = peer(args.data / "models" / args.model, spec, tokens, args.device, seed)
                    seconds = time.monotonic() - began
                    model, layers = transplant(theirs, bench.model)
                    found = bench.measure(model)
                except Exception as error:
                    print(f"{name} {spec} seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    continue
                row = {"arm": name, "spec": str(spec), "seed": seed, "perplexity": found, "seconds": seconds}
                row["layers"] = layers
                held["rows"].append(row)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(args.out, json.dumps(held, indent=1) + "\n")
                print(name, spec, f"seed {seed}", found, f"{layers} layers", f"{seconds:.1f} s", flush=True)


def _installed() -> list[str]:
    wanted = ["auto-round", "hqq", "llmcompressor", "compressed-tensors", "gptqmodel", "transformers", "torch"]
    known = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}
    return [name for name in wanted if name in known]


if __name__ == "__main__":
    main()
