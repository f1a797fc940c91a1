"""``pyquant eval``: perplexity on texts, and the tasks of lm-evaluation-harness, one model or two compared."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pyquant.cli import Device, Dtype, command, typed
from pyquant.cli_output import Progress, table

_TASKS = "Tasks of lm-evaluation-harness (pip install lm_eval)"


@command
def eval_(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder of a full-precision or quantized model.")] = None,
    text: Annotated[list[str] | None, typer.Argument(help="Texts: files, folders or data set names.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of each text; all by default.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window; the context, at most 2048, by default.")
    ] = None,
    skip_chars: Annotated[int, typer.Option(help="Characters of each text to skip.")] = 0,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Names, comma-separated, or all (with --data).", rich_help_panel=_TASKS),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of local sets; without it the harness fetches its own.", rich_help_panel=_TASKS),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            help="Instead of MODEL: two models, or folders of earlier --out; prints differences.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents of each task; all by default.", rich_help_panel=_TASKS)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests at once.", rich_help_panel=_TASKS)] = 16,
    seed: Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=_TASKS)] = 0,
    fewshot: Annotated[
        int | None, typer.Option(help="Examples before a question; the task's own number.", rich_help_panel=_TASKS)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for tasks.json, report.html, task files.", rich_help_panel=_TASKS)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity of a model on texts, or its scores on tasks."""
    if compare is None and model is None:
        raise ValueError("give a model, or two with --compare")
    if compare is not None and model is not None:
        raise ValueError(f"give MODEL ({model}) or --compare, not both")
    if tasks or compare:
        if text:
            raise ValueError(f"give texts ({text[0]}) or --tasks, not both")
        names = [name for entry in tasks or () for name in entry.split(",") if name]
        how = {
            "limit": limit,
            "batch_size": batch_size,
            "seed": seed,
            "fewshot": fewshot,
            "device": device,
            "dtype": dtype,
        }
        _tasks(context, [model] if model else list(compare), names, data, out, how, as_json)
        return
    if not text:
        raise ValueError("give a text to measure perplexity on, or --tasks")
    from pyquant.integrations.commands import evaluate

    with Progress() as progress:
        result = evaluate(model, text, length, windows, skip_chars, device, dtype, progress)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    rows = [[Path(r["text"]).name, f"{r['windows']} x {r['length']}", f"{r['perplexity']:.3f}"] for r in result["rows"]]
    table(["text", "windows", "perplexity"], rows)


def _tasks(
    context: typer.Context,
    models: list[str],
    names: list[str],
    data: Path | None,
    out: Path | None,
    how: dict[str, Any],
    as_json: bool,
) -> None:
    """Evaluate one model, or two of which either may be an earlier result, and print."""
    from pyquant.integrations.compare import compare_table, compare_tasks, score_table
    from pyquant.integrations.harness import evaluate_tasks
    from pyquant.integrations.tasks_report import RESULT, keep, names_of, read_or_run, write_page

    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        files = (out or Path(scratch)) / "tasks"
        run: Any = partial(evaluate_tasks, tasks=names, data=data, out=files, on_event=progress, **how)
        found = []
        for place, model in enumerate(models):
            found.append(run(model) if len(models) == 1 else read_or_run(model, run))
            if out is not None:
                keep(found[-1], out / (RESULT if len(models) == 1 else f"{'ab'[place]}/{RESULT}"))
    differences = compare_tasks(*found) if len(found) == 2 else []
    if out is not None:
        write_page(found, out / "report.html", typed(context))
    if as_json:
        typer.echo(json.dumps({"differences": differences, "results": found} if differences else found[0], indent=1))
    elif differences:
        table(*compare_table(differences, names_of(*found)))
    else:
        table(*score_table(found[0]))
    if out is not None and not as_json:
        typer.echo(f"\n{out}/report.html has the details.")
