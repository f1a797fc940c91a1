"""README's page of sizes: what ``pyquant plan`` says of three shapes on 1, 8 and 64 GPUs."""

from __future__ import annotations

from pyquant.integrations.plan import duration, load_shape, plans
from pyquant.recipes.plan import RECIPES, Plan, Work

SHOWN = {"llama-3.1-8b": "Llama-3.1-8B", "llama-3.1-70b": "Llama-3.1-70B", "moe-235b": "a 235B mixture of experts"}
ONE_GPU = ("rtn", "gptq")  # recipes that more GPUs do not help


def _cell(made: Plan) -> str:
    sizes = " / ".join(f"{size / 1e9:.0f}" for size in (made.device, made.host))
    if any("does not fit" in note for note in made.notes):
        return f"**{sizes}**, does not fit"
    return f"{sizes}, {duration(made.seconds)}"


def _settings(made: list[Plan]) -> str:
    """What was chosen so that it fits, by number of GPUs."""
    wanted = ("optim", "gradient_checkpointing", "shard_teacher", "keep_gathered")
    said = []
    for p in made:
        names = [p.settings[n] if n == "optim" else n for n in wanted if n in p.settings]
        names = [n for n in names if n != "adamw_torch_fused"]
        if names and not any("does not fit" in note for note in p.notes):
            said.append(f"{p.gpus}: {', '.join(names)}")
    return "; ".join(said)


def plan_table() -> tuple[str, list[str], list[list[str]]]:
    """About, head and rows."""
    rows = []
    for name, label in SHOWN.items():
        shape = load_shape(name)
        for recipe in RECIPES:
            gpus = (1,) if recipe in ONE_GPU else (1, 8, 64)
            made = plans(shape, [recipe], gpus, Work())
            cells = [_cell(p) for p in made] + ["as 1"] * (3 - len(made))
            rows.append(
                [
                    f"{label}, {shape.parameters / 1e9:.1f}B" if recipe == RECIPES[0] else "",
                    recipe,
                    *cells,
                    _settings(made),
                ]
            )
    about = (
        "GB of each GPU / GB of each host (8 GPUs a host), time. H200 rates, 141 GB; windows of 2,048 tokens, 8 a step of all "
        "GPUs together (64 on 64), 128 for calibration; 1,000 steps of kd-qat and soft-qat, 200 a block of blockwise, 320 of "
        "bisup; serve: 8 (64) prompts of 2,048 and 256 new tokens. Times leave out reading and writing files."
    )
    return about, ["model", "recipe", "1 GPU", "8 GPUs", "64 GPUs", "chosen so that it fits (bf16 weights)"], rows
