"""``pyquant plan``: memory and time of a recipe, before anything is fetched or loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pyquant.cli import command
from pyquant.cli_output import table


@command
def plan(
    model: Annotated[
        str | None, typer.Argument(help="Folder or config.json of a model, its name on the Hub, or a shape's name.")
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="rtn, gptq, blockwise, bisup, kd-qat, soft-qat or serve (repeatable; all by default)."),
    ] = None,
    gpus: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable; 1, 8 and 64 by default.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a window, or a prompt of serve.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Windows a step of all GPUs; sequences of serve.")] = 8,
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    steps: Annotated[
        int | None, typer.Option(help="Training steps (of a block in blockwise and bisup); new tokens of serve.")
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="GB of a GPU; settings are chosen to fit.")] = 141.0,
    kv_bits: Annotated[int, typer.Option(help="Of the cache of serve: 16, 8, 4, 3 or 2.")] = 16,
    constants: Annotated[bool, typer.Option("--constants", help="Print what plans rest on, and from where.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the parts of each sum.")] = False,
) -> None:
    """GPU and host memory and time that a recipe would take, from the model's config.json alone."""
    from pyquant.integrations import plan as plans
    from pyquant.recipes.plan import Work

    if constants:
        table(["constant", "value", "unit", "basis", "source"], plans.constants())
        return
    if model is None:
        raise ValueError(f"give a model: a folder, a config.json, or one of {', '.join(plans.known())}")
    if kv_bits not in (16, 8, 4, 3, 2):
        raise ValueError(f"kv_bits={kv_bits} must be 16, 8, 4, 3 or 2")
    shape = plans.load_shape(model)
    work = Work(1, seq_len, batch_size, windows, 1, gpu_memory * 1e9, kv_bits)
    made = plans.plans(shape, recipe or (), gpus or (1, 8, 64), work, steps)
    if as_json:
        typer.echo(json.dumps([plans.to_dict(p) for p in made], indent=1))
        return
    typer.echo(f"{model}: {shape.parameters / 1e9:.2f} billion parameters, {shape.quantized / 1e9:.2f} quantized\n")
    table(plans.HEAD, [plans.cells(p) for p in made])
    if len(made) == 1:
        parts = [("GPU", made[0].need.device), ("host", made[0].need.host)]
        rows = [[where, name, f"{size / 1e9:.2f}"] for where, held in parts for name, size in held.items() if size]
        typer.echo("")
        table(["where", "what", "GB"], rows)
