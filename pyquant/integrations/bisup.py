"""``--recipe bisup`` on a checkpoint: settings, finished blocks on disk, and what its folder says about activations.

The folder holds weights in a format that others load. What the inputs of each layer become stands beside them in
``activations.json``: no checkpoint format has learned clips, so :func:`apply_activations` puts them back after loading::

    model = pyquant.load_model(folder)
    apply_activations(model, folder)      # logits of the evaluated model, exactly
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import ActSpec, QuantSpec
from pyquant.integrations.blockwise import Windows, split_report
from pyquant.integrations.checkpoint import local_folder
from pyquant.integrations.config import QuantizeConfig
from pyquant.integrations.events import Clock
from pyquant.integrations.machine import batch_for
from pyquant.integrations.prompt import SYSTEM, prompt_cache, prompt_tokens, prompted_perplexity
from pyquant.integrations.work import checkpoint_digest, tensor_digest
from pyquant.nn.linear import QLinear
from pyquant.nn.swap import SwapReport, swap
from pyquant.recipes.act_linear import ActLinear, Inputs
from pyquant.recipes.bisup import BiSup, bisup
from pyquant.recipes.blocks import find_blocks

FILE = "activations.json"
ELSEWHERE = ("windows", "seq_len", "prompt", "kv_bits", "storage")  # of the section, no fields of the recipe


@dataclass
class Activations:
    """The rounding of inputs of a deployed model: hooks on its layers, what ``activations.json`` says, and the rows that
    were measured behind the prompt."""

    hooks: list[Any] = field(default_factory=list)
    text: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def remove(self) -> None:
        """Leave the weights alone, as a loader of the folder has them."""
        for hook in self.hooks:
            hook.remove()


def bisup_settings(config: QuantizeConfig) -> BiSup:
    """The recipe's settings of a run.

    Raises:
        ValueError: settings that cannot be, or a host whose layers no checkpoint format here holds.
    """
    how = BiSup(**config.bisup.model_dump(exclude=set(ELSEWHERE)), seed=config.seed)
    why = {
        "atom": "keeps some channels of each layer in 8 bits",
        "quarot": "rotates inputs of layers while it runs",
    }.get(how.host)
    if why:
        raise ValueError(
            f"host {how.host} {why}, which no checkpoint format here holds: measure it with pyquant ablate --recipe bisup, or "
            "take host rtn"
        )
    return how


def apply_bisup(
    config: QuantizeConfig,
    spec: QuantSpec,
    model: nn.Module,
    tokenizer: Any,
    texts: list[tuple[str, Tensor]],
    tokens: Tensor,
    stored: torch.dtype,
    folder: Path,
    resumed: bool,
    clock: Clock,
    result: Any,
) -> tuple[nn.Module, SwapReport, Activations]:
    """Run the recipe.

    Args:
        config, spec: the run.
        model: in full precision, on its device; left as it is.
        texts: (name, windows) to measure behind the prompt too.
        tokens: calibration windows.
        stored: dtype of scales in the file.
        folder, resumed: finished blocks, and whether to use what is there.
        clock, result: of the pipeline; blocks and notes are entered.

    Returns:
        the model with QLinear layers and hooks, what became of its layers, and the hooks.
    """
    how = bisup_settings(config)
    root, _ = find_blocks(model)
    report = swap(model, spec, lambda _, linear: linear, config.include, config.exclude, config.skip_experts)
    chosen = split_report(report, model, root)
    p = next(model.parameters())
    run = {
        "spec": spec.to_dict(), "settings": asdict(how), "tokens": tensor_digest(tokens), "layers": len(chosen),
        "model": checkpoint_digest(local_folder(config.model)), "device": p.device.type, "dtype": str(p.dtype),
        "torch": torch.__version__,
    }  # fmt: skip
    with clock("quantize") as stage:
        made = bisup(model, tokens, spec, how, chosen, stored, Windows(folder, run, resumed), stage)
    inputs = deploy(made.model, spec)
    with torch.no_grad():
        for q in made.model.parameters():
            q.copy_(q.to(stored))
    found = Activations(attach(made.model, inputs), describe(inputs))
    result.blocks, result.notes = made.rows, result.notes + made.notes
    group = "each token" if spec.group_size == -1 else f"{spec.group_size} values of each token"
    if how.act_bits != 16:
        result.notes.append(
            f"Layer inputs were measured at {how.act_bits} bits, {group} with a scale found as it runs. The folder holds "
            f"weights, and the clip of each layer's inputs in {FILE}: whoever loads it without these computes with "
            "16-bit inputs."
        )
    if config.bisup.prompt is not None or config.bisup.kv_bits is not None:
        found.rows = _behind_prompt(config, how, spec, model, made.model.eval(), tokenizer, texts, clock)
    return made.model.eval(), report, found


def _behind_prompt(
    config: QuantizeConfig, how: BiSup, spec: QuantSpec, full: nn.Module, model: nn.Module, tokenizer: Any,
    texts: list[tuple[str, Tensor]], clock: Clock,
) -> list[dict[str, Any]]:  # fmt: skip
    own = config.bisup
    prompt, bits = prompt_tokens(tokenizer, own.prompt or SYSTEM), own.kv_bits or how.act_bits
    rows = []
    for name, windows in texts:
        if len(prompt) > windows.shape[1] - 2:
            raise ValueError(f"the prompt of {len(prompt)} tokens leaves nothing of windows of {windows.shape[1]}")
        short = windows[:, : windows.shape[1] - len(prompt)]
        with clock(f"evaluate behind the prompt on {Path(name).name}"):
            exact = prompt_cache(full, full, prompt, 16)
            pairs = prompt_cache(model, full, prompt, bits, own.storage, spec.group_size)
            a = prompted_perplexity(full, short, exact, 16, batch_size=batch_for(short))
            b = prompted_perplexity(model, short, pairs, bits, spec.group_size, batch_size=batch_for(short))
        label = f"{Path(name).name} behind {len(prompt)} tokens, K and V in {bits} bits, prompt {own.storage}"
        rows.append({"text": label, "windows": len(short), "length": short.shape[1], "fp": a, "quantized": b})
    return rows


def deploy(model: nn.Module, spec: QuantSpec) -> dict[str, Inputs]:
    """Replace finished layers by QLinear, in place; what their inputs become, by name."""
    found = {}
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, ActLinear)]:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, QLinear.from_range(plain, spec, layer.scale, None).train(False))
        found[name] = layer.inputs
    return found


def attach(model: nn.Module, inputs: dict[str, Inputs]) -> list[Any]:
    """Let layers see rounded inputs; the hooks."""
    return [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, own=own: (own(args[0]), *args[1:]))
        for name, own in inputs.items()
    ]


def describe(inputs: dict[str, Inputs]) -> str:
    """``activations.json``: ``{"bits", "group_size", "layers": {name: clip}}``, symmetric, a scale for each group of each
    token."""
    first = next(iter(inputs.values()))
    layers = {name: float(own.clip) for name, own in inputs.items()}
    return json.dumps({"bits": first.bits, "group_size": first.group_size, "layers": layers}, indent=1) + "\n"


def apply_activations(model: nn.Module, folder: str | Path) -> list[Any]:
    """Round the inputs of a loaded model as the folder's ``activations.json`` says.

    Returns:
        the hooks, to be removed for 16-bit inputs.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: it names a layer that the model lacks.
    """
    facts, modules = _read(folder), dict(model.named_modules())
    for name in facts["layers"]:
        if name not in modules:
            raise ValueError(f"{FILE} of {folder} names the layer {name!r}, which the model lacks")
    device = next(model.parameters()).device
    inputs = {n: Inputs(facts["bits"], facts["group_size"], clip).to(device) for n, clip in facts["layers"].items()}
    return attach(model, inputs)


def run_activations(model: nn.Module, folder: str | Path) -> int:
    """Let the layers of a loaded model quantize their inputs in the kernels of ``linear_w4a8`` as the folder's
    ``activations.json`` says: the codes of :func:`apply_activations`, products up to fp32 sums.

    Returns:
        how many layers.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: it names a layer that the model lacks, or that holds no 4-bit weight.
    """
    facts, modules = _read(folder), dict(model.named_modules())
    for name, clip in facts["layers"].items():
        layer = modules.get(name)
        if not isinstance(layer, QLinear):
            raise ValueError(
                f"{FILE} of {folder} names {name!r}, which is {type(layer).__name__} in the model, no QLinear"
            )
        layer.act = ActSpec(facts["bits"], facts["group_size"], clip) if facts["bits"] != 16 else None
    return len(facts["layers"])


def _read(folder: str | Path) -> dict[str, Any]:
    file = local_folder(str(folder)) / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}: only pyquant quantize --recipe bisup writes one")
    return json.loads(file.read_text())
