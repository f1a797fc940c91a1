"""``pyquant ablate``: which arm of block-wise quantization, of quantization-aware training, or of weight-activation
quantization is the best for a model, with intervals over seeds."""

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
        int | None, typer.Option(min=1, help="Gradient steps of each block (200; bisup 320), or of qat (1000).")
    ] = None,
    calibration_windows: Annotated[int, typer.Option(min=1)] = 128,
    calibration_length: Annotated[int | None, typer.Option(help="Tokens in one (the context, <= 2048).")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    eval_windows: Annotated[int | None, typer.Option(help="At most this many of each text.")] = None,
    eval_skip_chars: Annotated[int, typer.Option(help="Characters of each text to skip.")] = 0,
    budget_seconds: Annotated[float | None, typer.Option(help="Begin no arm that would end later.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    base: Annotated[
        str | None, typer.Option(help="The arm that the others are compared with (single; else the first).")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Whose arms: blockwise, qat or bisup.")] = "blockwise",
    grid: Annotated[
        list[str] | None, typer.Option(help="Of qat: key=value,value,..: every arm at every value (repeatable).")
    ] = None,
    act_bits: Annotated[int, typer.Option(min=2, max=16, help="Of bisup: bits of inputs (16: none).")] = 4,
    prompt: Annotated[str | None, typer.Option(help="Of bisup: the text before every window.")] = None,
) -> None:
    """Compare ways to quantize: arms x seeds, equal data and gradient steps, one table with intervals."""
    from pyquant.formats.spec import QuantSpec
    from pyquant.integrations.ablate import ARMS, SEEDLESS, jobs, resolve, run_jobs
    from pyquant.integrations.ablate_bisup import BISUP_ARMS, is_seedless, resolve_bisup
    from pyquant.integrations.ablate_qat import QAT_SEEDLESS, UNQUANTIZED, resolve_qat
    from pyquant.integrations.ablate_qat import grid as points
    from pyquant.integrations.ablate_report import conclusion, load_bench, mean_table, write_page
    from pyquant.integrations.prompt import SYSTEM

    if recipe not in ("blockwise", "qat", "bisup"):
        raise ValueError(f"recipe {recipe!r} has no arms; known: blockwise, qat, bisup")
    spec = QuantSpec(bits, group_size, symmetric)
    seedless: tuple[str, ...] = SEEDLESS
    if recipe == "qat":
        common = {"steps": steps or 1000, "batch_size": batch_size}
        settings = resolve_qat(points(arms or ["kd", "qat-ce", "kd-ov", "control", "rtn"], grid or []), common)
        base, seedless = base or next(iter(settings)), QAT_SEEDLESS
    elif grid:
        raise ValueError("--grid belongs to --recipe qat; other arms are NAME=BASE,key:value,..")
    elif recipe == "bisup":
        settings = resolve_bisup(arms or list(BISUP_ARMS), {"act_bits": act_bits} | ({"steps": steps} if steps else {}))
        base, seedless = base or next(iter(settings)), tuple(n for n, f in settings.items() if is_seedless(f))
    else:
        settings = resolve(arms or list(ARMS), steps)
        base = base or "single"
    if base not in settings:
        raise ValueError(f"base {base!r} is none of the arms {', '.join(settings)}")
    began = time.monotonic()
    with Progress():
        bench, facts = load_bench(
            model, calibration, evals, spec, calibration_windows, calibration_length, batch_size, eval_windows,
            eval_skip_chars, device, recipe, SYSTEM if prompt is None else prompt,
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        file = out / "rows.json"
        if not file.is_file():
            facts["full_precision"] = bench.measure()
        deadline = float("inf") if budget_seconds is None else began + budget_seconds
        todo = jobs(settings, [spec], seeds, seedless)
        complete = run_jobs(bench, todo, settings, file, facts, deadline, lambda line: typer.echo(line, err=True))
    held = json.loads(file.read_text())
    rows = [r for r in held["rows"] if r["arm"] in settings and r["spec"] in (str(spec), UNQUANTIZED)]
    columns, cells = mean_table(rows, held["meta"].get("full_precision"))
    table(columns, cells)
    for line in conclusion(rows, base):
        typer.echo(f"\n{line}")
    write_page(held["meta"], rows, base, out / "report.html")
    typer.echo(f"\n{out}/report.html has the details." + ("" if complete else " Not all arms were run."))
