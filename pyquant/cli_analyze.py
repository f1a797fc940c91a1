"""``pyquant analyze``: what quantization does to the signals of a model, forward and backward, and what to freeze."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pyquant.cli import command, typed
from pyquant.cli_output import Progress, table


@command
def analyze(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a full-precision model.")],
    calibration: Annotated[str, typer.Option(help="Text for probe and training; each seed draws its own windows.")],
    out: Annotated[
        Path, typer.Option(help="Folder for rows.json, report.html and SVGs; rows there are not run again.")
    ],
    bits: Annotated[int, typer.Option(min=2, max=4)] = 4,
    group_size: Annotated[int, typer.Option(help="32, 64, 128, or -1 for one scale per channel.")] = -1,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric")] = True,
    steps: Annotated[int, typer.Option(min=0, help="Of each training; 0 looks at the untrained models only.")] = 60,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    seq_len: Annotated[int, typer.Option(min=2)] = 256,
    probe_batches: Annotated[int, typer.Option(min=1, help="Batches that are measured on.")] = 4,
    lr: Annotated[float, typer.Option(help="Of weights.")] = 1e-4,
    scale_lr: Annotated[float, typer.Option(help="Of scales and zeros.")] = 1e-4,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Patterns, comma-separated, frozen in an arm of its own (repeatable; v_proj,o_proj)."),
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a trained model to measure beside them (repeatable).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    errors: Annotated[
        bool, typer.Option("--errors", help="Of low-bit weights and inputs: error by depth and from token to token.")
    ] = False,
    host: Annotated[
        list[str] | None, typer.Option(help="Of --errors: rtn, atom or quarot (repeatable; rtn and quarot).")
    ] = None,
    act_bits: Annotated[int, typer.Option(min=2, max=16, help="Of --errors: bits of inputs.")] = 4,
    kv_bits: Annotated[int | None, typer.Option(min=2, max=16, help="Of --errors: of K and V (--act-bits).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Gradients and outputs of every projection in full precision, quantized, and in KD-QAT with and without freezing."""
    from pyquant.integrations.signals import SignalConfig, analyze
    from pyquant.integrations.signals_report import conclusions, loss_table, signal_table, write_pages

    if errors:
        from pyquant.formats.spec import QuantSpec
        from pyquant.integrations.errors import error_table
        from pyquant.integrations.errors_run import analyze_errors

        spec = QuantSpec(bits, group_size, symmetric)
        with Progress() as progress:
            curves = analyze_errors(
                model, calibration, out, spec, host or ("rtn", "quarot"), act_bits, kv_bits, steps, batch_size, seq_len,
                16 * batch_size, probe_batches * batch_size, device, 0, typed(context), progress,
            )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(curves, indent=1))
            return
        table(*error_table(curves))
        typer.echo(f"\n{out}/report.html and errors.svg have the curves.")
        return
    given: dict[str, Any] = {}
    if freeze is not None:
        given["freezes"] = tuple(tuple(filter(None, patterns.split(","))) for patterns in freeze)
    for entry in checkpoint or ():
        name, _, folder = entry.partition("=")
        if not name or not folder:
            raise ValueError(f"--checkpoint {entry!r} must be NAME=FOLDER")
        given.setdefault("checkpoints", {})[name] = folder
    config = SignalConfig(
        model, calibration, bits, group_size, symmetric, steps=steps, batch_size=batch_size, seq_len=seq_len,
        probe_batches=probe_batches, lr=lr, scale_lr=scale_lr, seeds=seeds, device=device, **given,
    )  # fmt: skip
    with Progress() as progress:
        held = analyze(config, out, progress)
    write_pages(held, out, Path(model).name, typed(context))
    if as_json:
        typer.echo(json.dumps(held, indent=1))
        return
    table(*signal_table(held["rows"]))
    typer.echo("")
    table(*loss_table(held["rows"]))
    for line in conclusions(held["rows"]):
        typer.echo(f"\n{line}")
    typer.echo(f"\n{out}/report.html has the details.")
