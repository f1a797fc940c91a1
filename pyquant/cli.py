"""The command line: ``pyquant quantize | ablate | analyze | eval | generate | export | plan | bench | doctor | demo``.

Thin: each command reads its flags, calls one function of :mod:`pyquant.integrations` (imported then, so that ``--help``
is quick) and prints what comes back. Results go to stdout, progress and errors to stderr. An expected error is one
sentence and exit code 1; ``--debug`` shows the traceback; Ctrl-C is exit code 130 and says how to go on.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shlex
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from pyquant.cli_output import Progress, table
from pyquant.integrations.config import (
    SECTIONS,
    BiSupSettings,
    BlockwiseSettings,
    KDSettings,
    QuantizeConfig,
    load_config,
    settings_of,
)

# Threads that wait for their siblings by spinning cost a busy machine most of its time: up to ten times the work was
# measured on two shared cores with small matrices. OpenMP reads this when torch is imported, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class _Group(typer.core.TyperGroup):
    """Remembers the arguments as typed, for reports and for the hint on how to resume."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = list(args)
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    name="pyquant",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="4-bit language models: quantize, train, measure, export.",
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command, with ``--debug`` and with errors as sentences."""

    @functools.wraps(function)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (KeyboardInterrupt, Exception) as error:
            if debug and not isinstance(error, typer.Exit):
                traceback.print_exc()
            raise _exit_for(error, kwargs) from None

    hints = get_type_hints(function, include_extras=True)
    hints["debug"] = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
    given = inspect.signature(function).parameters.values()
    parameters = [p.replace(annotation=hints[p.name]) for p in given]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("debug", keyword, default=False, annotation=hints["debug"]))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = hints
    return app.command(name=function.__name__.removesuffix("_"))(run)


def _exit_for(error: BaseException, kwargs: dict[str, Any]) -> BaseException:
    """Print what a person needs to know about an error; returns what to raise."""
    if isinstance(error, typer.Exit | typer.Abort):
        return error
    if isinstance(error, KeyboardInterrupt):
        step = getattr(error, "step", None)
        where = "" if step is None else f" at step {step}"
        typer.echo(f"\nstopped{where}", err=True)
        out = kwargs.get("out")
        context = kwargs.get("context")
        if context is not None and out is not None and out.with_name(f"{out.name}.work").exists():
            args = [arg for arg in context.find_root().obj if arg not in ("--resume", "--overwrite")]
            typer.echo(f"continue with: {shlex.join(['pyquant', *args, '--resume'])}", err=True)
        return typer.Exit(130)
    sentence = str(error).strip() or type(error).__name__
    if "out of memory" in sentence.lower():
        sentence = (
            f"out of memory: a smaller batch (--batch-size) or shorter windows need less ({sentence.splitlines()[0]})"
        )
    elif not isinstance(error, ValueError | OSError | ImportError | RuntimeError):
        sentence = f"{type(error).__name__}: {sentence} (--debug shows where)"
    typer.echo(f"error: {' '.join(sentence.split())}", err=True)
    return typer.Exit(1)


def typed(context: typer.Context) -> str:
    """The command line as it was typed."""
    return shlex.join(["pyquant", *context.find_root().obj])


# ------------------------------------------------------------------------------------------------ quantize


def _option(field: str, *flags: str, text: str, panel: str | None = None) -> Any:
    """A flag of ``quantize`` whose default is the configuration's, so that a YAML file can stand between the two."""
    section, _, own = field.rpartition(".")
    info = (SECTIONS[section] if section else QuantizeConfig).model_fields[own]
    default = info.get_default(call_default_factory=True, validated_data={})
    shown = "all" if default is None and field == "eval_windows" else default
    shown = ",".join(shown) if isinstance(shown, tuple) else shown
    choices = getattr(info.annotation, "__args__", ()) if "Literal" in str(info.annotation) else ()
    what = f"{text} {'|'.join(map(str, choices))}" if choices else text
    note = "" if info.is_required() or shown in (None, "", False) else f" (default {shown})"
    return typer.Option(*flags, help=f"{what}{note}".strip(), rich_help_panel=panel, show_default=False)


_KD = "Training (--recipe kd-qat and soft-qat)"
_GPTQ = "Calibration (--recipe gptq and blockwise)"
_BLOCK = "Training of blocks (--recipe blockwise; and --steps, --batch-size, --lr, --kl, --scale-lr relative to --lr)"
_BISUP = "Low-bit inputs (--recipe bisup; and --steps, --batch-size, --calibration-windows)"
_EVAL = "Evaluation"
_HOW = "Format of the weights"


@command
def quantize(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder (or Hub name) of the full-precision model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    recipe: Annotated[str | None, _option("recipe", "--recipe", text="")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these settings; flags override it.")
    ] = None,
    calibration: Annotated[
        str | None, _option("calibration", "--calibration", text="Text of gptq, blockwise, bisup, kd-qat.")
    ] = None,
    file_format: Annotated[str | None, _option("format", "--format", text="")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace --out, start anew.")] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Continue interrupted work.")] = None,
    device: Annotated[str | None, _option("device", "--device", text="")] = None,
    dtype: Annotated[str | None, _option("dtype", "--dtype", text="Arithmetic.")] = None,
    seed: Annotated[int | None, _option("seed", "--seed", text="")] = None,
    bits: Annotated[int | None, _option("bits", "--bits", text="2, 3 or 4.", panel=_HOW)] = None,
    group_size: Annotated[int | None, _option("group_size", "--group-size", text="", panel=_HOW)] = None,
    symmetric: Annotated[bool | None, _option("symmetric", "--symmetric/--asymmetric", text="", panel=_HOW)] = None,
    weight_range: Annotated[str | None, _option("range", "--range", text="First range:", panel=_HOW)] = None,
    include: Annotated[
        list[str] | None, _option("include", "--include", text="Layers to quantize (pattern, repeatable).", panel=_HOW)
    ] = None,
    exclude: Annotated[
        list[str] | None, _option("exclude", "--exclude", text="Layers to leave (pattern, repeatable).", panel=_HOW)
    ] = None,
    skip_experts: Annotated[
        bool | None, typer.Option("--skip-experts", help="Leave fused experts as they are.", rich_help_panel=_HOW)
    ] = None,
    evals: Annotated[
        list[str] | None,
        _option("eval", "--eval", text="Text to measure perplexity on, before and after (repeatable).", panel=_EVAL),
    ] = None,
    eval_windows: Annotated[
        int | None, _option("eval_windows", "--eval-windows", text="Windows of each text.", panel=_EVAL)
    ] = None,
    eval_length: Annotated[
        int | None,
        _option("eval_length", "--eval-length", text="Tokens in a window (the context, <= 2048).", panel=_EVAL),
    ] = None,
    eval_skip_chars: Annotated[
        int | None,
        _option("eval_skip_chars", "--eval-skip-chars", text="Characters of each text to skip.", panel=_EVAL),
    ] = None,
    calibration_windows: Annotated[
        int | None, _option("gptq.windows", "--calibration-windows", text="Windows of text.", panel=_GPTQ)
    ] = None,
    calibration_length: Annotated[
        int | None,
        _option("gptq.seq_len", "--calibration-length", text="Tokens in one (the context, <= 2048).", panel=_GPTQ),
    ] = None,
    act_order: Annotated[
        bool | None,
        _option("gptq.act_order", "--act-order/--no-act-order", text="Largest inputs first.", panel=_GPTQ),
    ] = None,
    damp: Annotated[float | None, _option("gptq.damp", "--damp", text="Of the Hessian.", panel=_GPTQ)] = None,
    window: Annotated[int | None, _option("blockwise.window", "--window", text="Blocks at once.", panel=_BLOCK)] = None,
    stride: Annotated[
        int | None, _option("blockwise.stride", "--stride", text="Of windows (the window).", panel=_BLOCK)
    ] = None,
    lookahead: Annotated[
        str | None, _option("blockwise.lookahead", "--lookahead", text="Blocks further on, or end.", panel=_BLOCK)
    ] = None,
    target: Annotated[str | None, _option("blockwise.target", "--target", text="", panel=_BLOCK)] = None,
    start: Annotated[str | None, _option("blockwise.start", "--start", text="", panel=_BLOCK)] = None,
    learn: Annotated[str | None, _option("blockwise.learn", "--learn", text="", panel=_BLOCK)] = None,
    optimizer: Annotated[str | None, _option("blockwise.optimizer", "--optimizer", text="", panel=_BLOCK)] = None,
    polish: Annotated[
        int | None, _option("blockwise.polish", "--polish", text="Joint steps of all blocks at the end.", panel=_BLOCK)
    ] = None,
    polish_lr: Annotated[
        float | None, _option("blockwise.polish_lr", "--polish-lr", text="Of those steps.", panel=_BLOCK)
    ] = None,
    ranges: Annotated[
        bool | None, _option("blockwise.ranges", "--ranges/--no-ranges", text="Train scales.", panel=_BLOCK)
    ] = None,
    reach: Annotated[float | None, _option("blockwise.reach", "--reach", text="Of roundings.", panel=_BLOCK)] = None,
    end_mse: Annotated[
        float | None, _option("blockwise.end_mse", "--end-mse", text="Weight beside KL at the end.", panel=_BLOCK)
    ] = None,
    local: Annotated[
        float | None, _option("blockwise.local", "--local", text="Weight of the window's own error.", panel=_BLOCK)
    ] = None,
    keep_best: Annotated[
        bool | None, _option("blockwise.keep_best", "--keep-best/--keep-last", text="State to keep.", panel=_BLOCK)
    ] = None,
    graphs: Annotated[
        bool | None, _option("blockwise.graphs", "--graphs/--no-graphs", text="CUDA graphs.", panel=_BLOCK)
    ] = None,
    autocast: Annotated[
        bool | None, _option("blockwise.autocast", "--autocast/--no-autocast", text="bf16 on GPUs.", panel=_BLOCK)
    ] = None,
    activations: Annotated[
        str | None, _option("blockwise.activations", "--activations", text="Place of states.", panel=_BLOCK)
    ] = None,
    gpu_memory: Annotated[
        float | None, _option("blockwise.gpu_memory", "--gpu-memory", text="GiB to stay within.", panel=_BLOCK)
    ] = None,
    stream: Annotated[
        bool | None, _option("blockwise.stream", "--stream/--no-stream", text="Read block by block.", panel=_BLOCK)
    ] = None,
    steps: Annotated[int | None, _option("kd.steps", "--steps", text="", panel=_KD)] = None,
    batch_size: Annotated[int | None, _option("kd.batch_size", "--batch-size", text="", panel=_KD)] = None,
    seq_len: Annotated[int | None, _option("kd.seq_len", "--seq-len", text="", panel=_KD)] = None,
    grad_accum: Annotated[int | None, _option("kd.grad_accum", "--grad-accum", text="", panel=_KD)] = None,
    lr: Annotated[float | None, _option("kd.lr", "--lr", text="Of weights.", panel=_KD)] = None,
    scale_lr: Annotated[
        float | None, _option("kd.scale_lr", "--scale-lr", text="Of scales and zeros.", panel=_KD)
    ] = None,
    weight_decay: Annotated[float | None, _option("kd.weight_decay", "--weight-decay", text="", panel=_KD)] = None,
    warmup_steps: Annotated[
        int | None, _option("kd.warmup_steps", "--warmup-steps", "--warmup", text="", panel=_KD)
    ] = None,
    schedule: Annotated[str | None, _option("kd.schedule", "--schedule", text="", panel=_KD)] = None,
    max_grad_norm: Annotated[float | None, _option("kd.max_grad_norm", "--max-grad-norm", text="", panel=_KD)] = None,
    kl: Annotated[float | None, _option("kd.kl", "--kl", text="Weight of KL(teacher || student).", panel=_KD)] = None,
    ce: Annotated[float | None, _option("kd.ce", "--ce", text="Weight of the cross entropy.", panel=_KD)] = None,
    temperature: Annotated[
        float | None, _option("kd.temperature", "--temperature", text="Of the KL.", panel=_KD)
    ] = None,
    freeze: Annotated[
        str | None, _option("kd.freeze", "--freeze", text="Layers to freeze, comma-separated patterns.", panel=_KD)
    ] = None,
    ov_freeze: Annotated[
        bool, typer.Option("--ov-freeze", help="The same as --freeze v_proj,o_proj.", rich_help_panel=_KD)
    ] = False,
    freeze_at: Annotated[
        int | None, _option("kd.freeze_at", "--freeze-at", text="Step to freeze at.", panel=_KD)
    ] = None,
    quantizer: Annotated[str | None, _option("kd.quantizer", "--quantizer", text="", panel=_KD)] = None,
    rounding: Annotated[str | None, _option("soft.rounding", "--rounding", text="Of soft-qat.", panel=_KD)] = None,
    clamp: Annotated[str | None, _option("soft.clamp", "--clamp", text="Of soft-qat.", panel=_KD)] = None,
    optim: Annotated[str | None, _option("kd.optim", "--optim", text="", panel=_KD)] = None,
    save_steps: Annotated[int | None, _option("kd.save_steps", "--save-steps", text="", panel=_KD)] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, slower.", rich_help_panel=_KD)
    ] = None,
    host: Annotated[str | None, _option("bisup.host", "--host", text="", panel=_BISUP)] = None,
    act_bits: Annotated[int | None, _option("bisup.act_bits", "--act-bits", text="Of inputs.", panel=_BISUP)] = None,
    parts: Annotated[
        str | None, _option("bisup.parts", "--parts", text="Vertical parts, comma-separated.", panel=_BISUP)
    ] = None,
    prompt: Annotated[
        str | None,
        _option("bisup.prompt", "--prompt", text="Measure behind this text too, K and V in few bits.", panel=_BISUP),
    ] = None,
    kv_bits: Annotated[int | None, _option("bisup.kv_bits", "--kv-bits", text="Of K and V.", panel=_BISUP)] = None,
    other: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of a recipe file (repeatable).")
    ] = None,
) -> None:
    """Quantize a model, measure what it costs, and write a folder that transformers, vLLM and SGLang load."""
    if ov_freeze and freeze is not None:
        raise ValueError("give --ov-freeze or --freeze, not both")
    frozen = ("v_proj", "o_proj") if ov_freeze else None if freeze is None else tuple(filter(None, freeze.split(",")))
    given = dict(locals())
    flags = {name: given[name] for name in QuantizeConfig.model_fields if name in given}
    flags |= {"format": file_format, "range": weight_range, "eval": evals}
    if recipe in ("blockwise", "bisup"):
        given |= {"windows": calibration_windows, "seq_len": calibration_length}
        given["lookahead"] = int(lookahead) if lookahead and lookahead.isdigit() else lookahead
        section: Any = BlockwiseSettings if recipe == "blockwise" else BiSupSettings
        flags |= {f"{recipe}.{name}": given[name] for name in section.model_fields if name in given}
    else:
        flags |= {f"kd.{name}": given[name] for name in KDSettings.model_fields if name in given}
        flags |= {"soft.rounding": rounding, "soft.clamp": clamp}
        flags |= {"gptq.windows": calibration_windows, "gptq.seq_len": calibration_length}
        flags |= {"gptq.act_order": act_order, "gptq.damp": damp, "kd.freeze": frozen}
    settings = load_config(config, flags | settings_of(other or []))

    from pyquant.integrations.pipeline import quantize as run
    from pyquant.integrations.summary import accuracy_table, cost_lines

    with Progress() as progress:
        result = run(settings, progress, typed(context)).to_dict()
    if not result["out"]:  # one of several processes, and not the first
        return
    typer.echo("")
    if result["rows"]:
        table(*accuracy_table(result))
        typer.echo("")
    for line in [*cost_lines(result), *result["notes"]]:
        typer.echo(line)
    typer.echo(f"\n{settings.out}/report.html has the details.")


# ------------------------------------------------------------------------------------------------ the others


Device = Annotated[str, typer.Option(help="auto|cpu|cuda")]
Dtype = Annotated[str, typer.Option(help="Arithmetic: auto|float32|bfloat16|float16")]


@command
def export(
    model: Annotated[str, typer.Argument(help="Folder of a quantized model.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    file_format: Annotated[str, typer.Option("--format", help="compressed-tensors|gptq")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
) -> None:
    """Write a quantized folder in another format; the weights stay the same."""
    from pyquant.integrations.commands import reexport

    with Progress():
        info = reexport(model, out, file_format, overwrite)
    typer.echo(f"{out}: {len(info.files)} files, {info.bytes / 1e6:.1f} MB")
    if info.note:
        typer.echo(info.note)


@command
def bench(
    model: Annotated[str | None, typer.Argument(help="Folder of a model; only its config is read.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="NxK instead of a model's, repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Rows of the activation, repeatable.")] = None,
    group_size: Annotated[int, typer.Option()] = 128,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="First choose tiles of the Triton kernels on this GPU and keep them (minutes)."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the 4-bit linear layer against torch's bf16 one on this GPU, for the shapes of a model or your own."""
    from pyquant.integrations import bench as work

    shapes = work.find_shapes(model, shape or ())
    found: dict[str, Any] = {}
    with Progress() as progress:
        if tune:
            found["tiles"], found["file"] = work.tune(shapes, group_size, progress)
        found["rows"] = work.bench(shapes, tokens or (1, 16, 256), group_size, progress)
    if as_json:
        typer.echo(json.dumps(found if tune else found["rows"], indent=1, default=str))
        return
    if tune:
        cells = [
            [
                r["kernel"],
                str(r["tokens"] or "more"),
                str(r["tile"]),
                f"{r['ratio']:.2f}",
                f"{r['failed']}/{r['tried']}",
            ]
            for r in found["tiles"]
        ]
        table(["kernel", "up to tokens", "tile", "time over the table's", "unusable"], cells)
        typer.echo(f"kept in {found['file']}\n")
    cells = [
        [f"{r['N']}x{r['K']}", str(r["M"]), f"{r['us']:.1f}", f"{r['bf16_us']:.1f}", f"{r['speedup']:.2f}"]
        for r in found["rows"]
    ]
    table(["weight", "tokens", "4 bits, us", "bf16, us", "speed-up"], cells)


@command
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What is installed, which GPU is found, and which backend serves each op."""
    from pyquant import doctor as facts

    found = facts.report()
    typer.echo(json.dumps(found, indent=1) if as_json else facts.format(found))


@command
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for texts, checkpoint and report.")] = Path("demo-out"),
    text: Annotated[str | None, typer.Option(help="Your own text, instead of text that the demo model writes.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each KD-QAT run.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    model: Annotated[str | None, typer.Option(help="Another small model instead of the bundled one.")] = None,
) -> None:
    """Quantize the small model that comes with pyquant, several ways, and report. A few minutes on two CPU cores."""
    from pyquant.integrations.demo import DemoConfig, run

    chosen: dict[str, Any] = {"steps": steps, "model": model, "text": text}
    settings = DemoConfig(out=out, seed=seed, **{key: value for key, value in chosen.items() if value is not None})
    with Progress() as progress:
        result = run(settings, progress, typed(context))
    typer.echo("")
    table(result.columns, result.rows)
    for line in result.lines:
        typer.echo(f"\n{line}")
    typer.echo(f"\n{out}/report.html has the details.")


from pyquant import cli_ablate, cli_analyze, cli_eval, cli_generate, cli_plan  # noqa: E402, F401 (register their commands)


def main() -> None:
    """Entry point of the ``pyquant`` script."""
    app()


if __name__ == "__main__":
    main()
