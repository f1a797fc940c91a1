"""``pyquant ablate``: which arm of block-wise quantization, or of quantization-aware training, is the best for a model,
with intervals over seeds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from pyquant.cli import command
from pyquant.cli_output import Progress, table


@command
def ablate(
    model: Annotated[str, typer.Argument(help="Folder of a full-precision model.")],
    calibration: Annotated[str, typer.Option(help="Text to calibrate on; each seed draws its own windows.")],
    evals: Annotated[list[str], typer.Option("--eval", help="Text to measure perplexity on (repeatable).")],
    out: Annotated[Path, typer.Option(help="Folder for rows.json and report.html; rows there are not run again.")],
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", help="A name, or NAME=BASE,key:value,.. for a new one (repeatable; all by default)."),
    ] = None,
    bits: Annotated[int, typer.Option(min=2, max=4)] = 4,
    group_size: Annotated[int, typer.Option(help="32, 64, 128, or -1 for one scale per channel.")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric")] = True,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Gradient steps of each block (200), or of qat (1000).")
    ] = None,
    calibration_windows: Annotated[int, typer.Option(min=1)] = 128,
    calibration_length: Annotated[int | None, typer.Option(help="Tokens in one (the context, <= 2048).")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    eval_windows: Annotated[int | None, typer.Option(help="At most this many of each text.")] = None,
    eval_skip_chars: Annotated[int, typer.Option(help="Characters of each text to skip.")] = 0,
    budget_seconds: Annotated[float | None, typer.Option(help="Begin no arm that would end later.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    base: Annotated[
        str | None, typer.Option(help="The arm that the others are compared with (single; of qat the first).")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Whose arms: blockwise or qat.")] = "blockwise",
    grid: Annotated[
        list[str] | None, typer.Option(help="Of qat: key=value,value,..: every arm at every value (repeatable).")
    ] = None,
) -> None:
    """Compare ways to quantize: arms x seeds, equal data and gradient steps, one table with intervals."""
    from pyquant.formats.spec import QuantSpec
    from pyquant.integrations.ablate import ARMS, SEEDLESS, jobs, resolve, run_jobs
    from pyquant.integrations.ablate_qat import QAT_SEEDLESS, UNQUANTIZED, resolve_qat
    from pyquant.integrations.ablate_qat import grid as points
    from pyquant.integrations.ablate_report import conclusion, load_bench, mean_table, write_page

    if recipe not in ("blockwise", "qat"):
        raise ValueError(f"recipe {recipe!r} has no arms; known: blockwise, qat")
    spec = QuantSpec(bits, group_size, symmetric)
    if recipe == "qat":
        common = {"steps": steps or 1000, "batch_size": batch_size}
        settings = resolve_qat(points(arms or ["kd", "qat-ce", "kd-ov", "control", "rtn"], grid or []), common)
        base = base or next(iter(settings))
    else:
        if grid:
            raise ValueError("--grid belongs to --recipe qat; arms of blockwise are NAME=BASE,key:value,..")
        settings = resolve(arms or list(ARMS), steps)
        base = base or "single"
    if base not in settings:
        raise ValueError(f"base {base!r} is none of the arms {', '.join(settings)}")
    began = time.monotonic()
    with Progress():
        bench, facts = load_bench(
            model, calibration, evals, spec, calibration_windows, calibration_length, batch_size, eval_windows,
            eval_skip_chars, device, recipe,
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        file = out / "rows.json"
        if not file.is_file():
            facts["full_precision"] = bench.measure()
        deadline = float("inf") if budget_seconds is None else began + budget_seconds
        todo = jobs(settings, [spec], seeds, QAT_SEEDLESS if recipe == "qat" else SEEDLESS)
        complete = run_jobs(bench, todo, settings, file, facts, deadline, lambda line: typer.echo(line, err=True))
    held = json.loads(file.read_text())
    rows = [r for r in held["rows"] if r["arm"] in settings and r["spec"] in (str(spec), UNQUANTIZED)]
    columns, cells = mean_table(rows, held["meta"].get("full_precision"))
    table(columns, cells)
    for line in conclusion(rows, base):
        typer.echo(f"\n{line}")
    write_page(held["meta"], rows, base, out / "report.html")
    typer.echo(f"\n{out}/report.html has the details." + ("" if complete else " Not all arms were run."))
