"""One run of ``pyquant quantize``: check, measure, quantize, measure again, export, load back, report.

Everything that can be wrong with the request is found before any work begins. What is measured is what is written: the
quantized model is evaluated with the rounded values that the file holds, exported into the work folder, loaded
back from there and compared logit by logit; only then does the output folder appear, complete, with its report.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.bisup import FILE, Activations, apply_bisup, bisup_settings
from pyquant.integrations.blockwise import quantize_blocks, split_report, streams
from pyquant.integrations.checkpoint import local_folder
from pyquant.integrations.config import FREE_OF_BLOCKWISE, TRAINED, QuantizeConfig, load_config
from pyquant.integrations.data import load_text, windows
from pyquant.integrations.evaluate import perplexity, probe_logits
from pyquant.integrations.events import Clock, Event, OnEvent
from pyquant.integrations.export import export, verify
from pyquant.integrations.files import write_atomic
from pyquant.integrations.machine import (
    batch_for,
    cast,
    peak_memory,
    pick_device,
    pick_dtype,
    stored_dtype,
    versions,
    weight_bytes,
    window_length,
)
from pyquant.integrations.processes import joined
from pyquant.integrations.sharded import TENSORS, train_sharded
from pyquant.integrations.streaming import Streamed
from pyquant.integrations.summary import to_report
from pyquant.integrations.trainer import optimizer_class, train_kd
from pyquant.integrations.transformers import load_causal_lm
from pyquant.integrations.work import BLOCKS, TRAINER, Work, checkpoint_digest, model_digest, tensor_digest
from pyquant.nn.swap import SwapReport, matches, swap
from pyquant.recipes.blocks import find_blocks
from pyquant.recipes.gptq import gptq
from pyquant.recipes.kd_loss import KDLoss
from pyquant.recipes.kd_qat import convert
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.ranks import Ranks
from pyquant.recipes.rtn import layer_errors, rtn
from pyquant.recipes.settings import Settings
from pyquant.recipes.sharding import check_shardable
from pyquant.recipes.soft_qat import SoftQAT
from pyquant.report import write_report

SPREAD = (*TRAINED, "blockwise", "bisup")  # recipes that several processes run together

__all__ = ["EvaluationText", "Event", "QuantizeConfig", "Result", "load_config", "quantize"]


@dataclass(frozen=True)
class EvaluationText:
    """A text cut for measuring: windows ``[n, length]`` and where they came from."""

    source: str
    windows: Tensor


@dataclass
class Result:
    """What a run found; :meth:`to_dict` is ``report.json``.

    Attributes:
        config: the settings of the run, complete.
        rows: ``{"text", "windows", "length", "fp", "quantized"}``, perplexities.
        history: ``{"step", "loss", "kl", "ce", "lr"}`` of kd-qat and soft-qat, with what else the loss mixes.
        layers: ``{"name", "relative_error", "sqnr_db"}``, weight errors.
        blocks: of blockwise, a row for each window, see :class:`pyquant.recipes.blockwise.Result`.
        sizes: ``fp_bytes, quantized_bytes, bits_per_weight, container_bits, quantized_percent, parameters``.
        kept: linear layer -> why it was left.
        frozen: layers fixed by ov-freeze.
        seconds: stage -> time.
        memory: ``host_gib`` and ``gpu_gib``, the peaks of the process.
        max_difference: largest logit difference between the evaluated model and the one loaded back (0 is the aim).
        notes: caveats, in sentences.
        versions: packages and machine.
        out: the folder.
    """

    config: dict[str, Any]
    spec: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    max_difference: float = float("nan")
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    out: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def quantize(config: QuantizeConfig, on_event: OnEvent | None = None, command: str = "") -> Result:
    """Quantize a model as configured.

    Args:
        config: see :class:`QuantizeConfig`.
        on_event: receives progress.
        command: the command line, for the report.

    Returns:
        the result, also in ``out/report.json`` and ``out/report.html``.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: the request cannot be met; nothing was written.
        pyquant.integrations.export.ExportMismatch: the exported model is not the evaluated one; nothing was published.
        KeyboardInterrupt: stopped; what was finished is kept for ``resume``.

    Started by ``torchrun`` or ``accelerate launch``, kd-qat and soft-qat shard the student over the processes; blockwise and
    bisup share out the calibration windows. The first process does everything else; the results of the others are empty.
    """
    with joined(pick_device(config.device)) as ranks:
        if ranks.size > 1 and config.recipe not in SPREAD:
            raise ValueError(
                f"recipe {config.recipe} runs in one process, not {ranks.size}; {', '.join(SPREAD)} run in several"
            )
        return _quantize(config, on_event if ranks.rank == 0 else None, command, ranks)


def _quantize(config: QuantizeConfig, on_event: OnEvent | None, command: str, ranks: Ranks) -> Result:
    say = on_event or (lambda event: None)
    spec = QuantSpec(config.bits, config.group_size, config.symmetric)
    clock = Clock(say)
    work = Work(config)
    if config.format == "gptq" and not config.symmetric:
        raise ValueError("format gptq holds symmetric weights only; asymmetric ones need compressed-tensors")
    if config.recipe in TRAINED:
        if config.kd.freeze and config.kd.freeze_at >= config.kd.steps:
            raise ValueError(f"kd.freeze_at={config.kd.freeze_at} is never reached in kd.steps={config.kd.steps}")
        if ranks.size > 1:
            check_shardable(kd_config(config), ranks.size)
        else:
            optimizer_class(kd_config(config))
    if config.recipe == "bisup":
        bisup_settings(config)
        if not config.symmetric:
            raise ValueError("recipe bisup has symmetric weights only; asymmetric ones belong to blockwise")
    if config.recipe != "rtn" and config.calibration is None:
        raise ValueError(f"recipe {config.recipe} needs text: give a calibration file (--calibration)")
    sources = {source: load_text(source, skip_chars=config.eval_skip_chars) for source in config.eval}
    training_text = load_text(config.calibration) if config.calibration and config.recipe != "rtn" else ""

    device, folder = pick_device(config.device), local_folder(config.model)
    how = config.blockwise
    settings = blockwise_settings(config) if config.recipe == "blockwise" else None
    streamed = None
    with clock("load the model"):
        if settings is not None and streams(how.stream, folder, device, how.gpu_memory):
            streamed = Streamed(folder, device)
            model, tokenizer = streamed.model, streamed.tokenizer
        else:
            model, tokenizer = load_causal_lm(folder, dtype="auto", device="cpu")
    stored = stored_dtype(model)
    compute = pick_dtype(config.dtype, stored, device)
    length = window_length(model, config.eval_length)
    _check_layers(config, spec, model)
    with clock("tokenize"):
        texts = [
            EvaluationText(source, windows(tokenizer, text, length, config.eval_windows, source))
            for source, text in sources.items()
        ]
        tokens = None
        if config.recipe != "rtn":
            tokens = _training_windows(tokenizer, training_text, model, config)
    _check_disk(config, model)

    result = Result(config=config.model_dump(mode="json"), spec=str(spec), versions=versions(device))
    if streamed is not None:
        streamed.set_dtype(compute)
    else:
        cast(model, device, compute)
    acts: Activations | None = None
    ranks.wait()  # all have seen what work there is
    if ranks.rank == 0:
        work.open()
    ranks.wait()
    if ranks.rank:
        texts = []  # the first process measures
    try:
        whole = streamed or model
        fp = [_measure(work, whole, text, "full precision", checkpoint_digest(folder), clock) for text in texts]
        if settings is not None:
            assert tokens is not None
            report = _apply_blocks(config, spec, settings, model, streamed, tokens, stored, work, clock, result)
        elif config.recipe == "bisup":
            assert tokens is not None
            pairs = [(text.source, text.windows) for text in texts]
            model, report, acts = apply_bisup(
                config, spec, model, tokenizer, pairs, tokens, stored, work.path / BLOCKS, work.resumed, clock, result
            )
        else:
            model, report = _apply(config, spec, model, tokens, stored, work, clock, result, ranks)
        if ranks.rank:
            return result
        digest = model_digest(model) if texts else ""
        quantized = [_measure(work, model, text, "quantized", digest, clock) for text in texts]
        result.rows = [
            {"text": t.source, "windows": len(t.windows), "length": t.windows.shape[1], "fp": a, "quantized": b}
            for t, a, b in zip(texts, fp, quantized, strict=True)
        ]
        if acts is not None:
            acts.remove()
            result.rows += acts.rows
        result.kept = report.kept
        extra = {} if acts is None else {FILE: acts.text}
        _finish(config, spec, model, tokenizer, texts, report, work, clock, result, command, extra)
    except BaseException:
        if ranks.rank == 0:
            work.close_after_failure()
        raise
    return result


# ------------------------------------------------------------------------------------------------ stages


def _apply(
    config: QuantizeConfig,
    spec: QuantSpec,
    model: nn.Module,
    tokens: Tensor | None,
    stored: torch.dtype,
    work: Work,
    clock: Clock,
    result: Result,
    ranks: Ranks,
) -> tuple[nn.Module, SwapReport]:
    """The recipe: the quantized model (QLinear, values as they will be stored) and what became of its layers."""
    chosen: dict[str, Any] = {"include": config.include, "exclude": config.exclude, "skip_experts": config.skip_experts}
    before = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if config.recipe not in TRAINED:
        with clock("quantize") as stage:
            count, done = len(before), iter(range(1, len(before) + 1))
            chosen |= {"scale_dtype": stored, "on_layer": lambda _: stage(next(done), count)}
            if tokens is None:
                report = rtn(model, spec, config.range, **chosen)
            else:
                before = {name: w.detach().clone() for name, w in before.items()}  # gptq moves them on its way
                batches, how = tokens.split(config.gptq.batch_size), config.gptq
                report = gptq(model, batches, spec, config.range, **chosen, act_order=how.act_order, damp=how.damp)
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(p.to(stored))
    else:
        assert tokens is not None
        compute = next(model.parameters()).dtype
        spread = ranks.size > 1 or any((work.path / TRAINER).glob(f"checkpoint-*/{TENSORS}"))
        device = next(model.parameters()).device
        with clock("train") as stage:
            student = copy.deepcopy(model)
            teacher = model.eval().requires_grad_(False)
            report = swap(student, spec, lambda _, linear: linear, **chosen)
            steps, folder = config.kd.steps, work.path / TRAINER
            kd, resumed = kd_config(config), work.resumed

            def tell(row: dict[str, Any]) -> None:
                stage(int(row["step"]), steps, f"loss {row['loss']:.4f}")

            if spread:
                if config.kd.shard_teacher:
                    before = {}  # the whole weights are let go
                    result.notes.append("The teacher was sharded, so the errors of single layers were not measured.")
                found = train_sharded(student.cpu(), teacher, tokens, kd, spec, folder, resumed, tell)
                result.history = found.history
            else:
                result.history = train_kd(student, teacher, tokens, kd, spec, folder, resumed, tell)
        if config.kd.activation_bits != 16:
            result.notes.append(
                f"Layer inputs had {config.kd.activation_bits} bits in training. The folder holds weights only: its "
                "perplexities, and what loads it, are those of 16-bit inputs."
            )
        result.frozen = [name for name, m in student.named_modules() if getattr(m, "frozen", False)]
        if spread:
            gathered = found.gather(stored)
            if gathered is None:
                return model, report
            student = gathered
        else:
            convert(student, stored)
        model = cast(student, device, compute)
    model.eval()
    result.layers = layer_errors(before, model) if before else []
    return model, report


def _apply_blocks(
    config: QuantizeConfig,
    spec: QuantSpec,
    settings: Settings,
    model: nn.Module,
    streamed: Streamed | None,
    tokens: Tensor,
    stored: torch.dtype,
    work: Work,
    clock: Clock,
    result: Result,
) -> SwapReport:
    """The recipe blockwise, in place; what became of the layers."""
    how, folder = config.blockwise, work.path / BLOCKS
    before = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    root, _ = find_blocks(model)
    report = swap(model, spec, lambda _, linear: linear, config.include, config.exclude, config.skip_experts)
    chosen = split_report(report, model, root)
    digest = checkpoint_digest(local_folder(config.model))
    with clock("quantize") as stage:
        found, memory = quantize_blocks(
            model, streamed, tokens, spec, settings, chosen, stored, digest, folder, work.resumed,
            how.activations, how.gpu_memory, stage,
        )  # fmt: skip
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.to(stored))
    model.eval()
    result.layers = layer_errors(before, model) if streamed is None else streamed.layers
    result.blocks = found.rows
    result.notes += [*found.notes, memory]
    return report


def _finish(
    config: QuantizeConfig,
    spec: QuantSpec,
    model: nn.Module,
    tokenizer: Any,
    texts: list[EvaluationText],
    report: SwapReport,
    work: Work,
    clock: Clock,
    result: Result,
    command: str,
    extra: dict[str, str],
) -> None:
    """Export into the work folder, load back and compare, write the reports, publish."""
    checkpoint = work.path / "checkpoint"
    probe = texts[0].windows[:1, :64] if texts else torch.arange(16).remainder(model.config.vocab_size)[None]
    expected = probe_logits(model, probe)
    with clock("export"):
        info = export(model, tokenizer, local_folder(config.model), checkpoint, spec, config.format, True, extra)
    with clock("load back and compare"):
        p = next(model.parameters())
        result.max_difference = verify(checkpoint, probe, expected, p.dtype, p.device)
    size = weight_bytes(checkpoint)
    result.sizes = {
        "fp_bytes": weight_bytes(local_folder(config.model)),
        "quantized_bytes": size,
        "bits_per_weight": 8 * size / report.total,
        "container_bits": info.container_bits,
        "quantized_percent": report.percent,
        "parameters": report.total,
    }
    if info.note:
        result.notes.append(info.note)
    if not texts:
        result.notes.append("No evaluation text was given, so accuracy was not measured: only weight errors are known.")
    result.seconds = clock.seconds
    result.memory = peak_memory()
    result.out = str(config.out)
    write_atomic(checkpoint / "report.json", json.dumps(result.to_dict(), indent=1))
    write_report(to_report(result.to_dict(), command), checkpoint / "report.html")
    work.publish(checkpoint)


def _measure(
    work: Work, model: nn.Module | Streamed, text: EvaluationText, who: str, digest: str, clock: Clock
) -> float:
    """Perplexity of one text, from the finished evaluations where it is there."""
    p = next((model.model if isinstance(model, Streamed) else model).parameters())
    key = f"{who} {digest} {tensor_digest(text.windows)} {p.dtype} {p.device.type}"
    key = hashlib.sha256(key.encode()).hexdigest()
    with clock(f"evaluate {who} on {Path(text.source).name}") as stage:
        if key not in work.evaluations:
            batch = batch_for(text.windows)
            if isinstance(model, Streamed):
                value = model.perplexity(text.windows, batch, "host", work.path)
            else:
                value = perplexity(model, text.windows, batch, stage)
            work.remember(key, value)
    return work.evaluations[key]


# ------------------------------------------------------------------------------------------------ choices


def kd_config(config: QuantizeConfig) -> KDConfig:
    """The trainer's configuration of a run."""
    fields, soft = config.kd.model_dump(), config.recipe == "soft-qat"
    terms = {name: fields.pop(name) for name in KDLoss.__dataclass_fields__}
    for name, usual in (("kl", 0.0 if soft else 2.0), ("ce", 1.0 if soft else 0.5)):
        terms[name] = usual if terms[name] is None else terms[name]
    loss = KDLoss(**terms)
    if soft:
        if fields["quantizer"] not in ("lsq", "soft"):
            raise ValueError(f"recipe soft-qat has a quantizer of its own, not {fields['quantizer']!r}")
        fields["quantizer"] = "soft"
    if fields["quantizer"] == "soft":
        fields["soft"] = SoftQAT(**config.soft.model_dump())
    chosen: dict[str, Any] = {"include": config.include, "exclude": config.exclude, "skip_experts": config.skip_experts}
    return KDConfig(**fields, **chosen, loss=loss, rule=config.range, seed=config.seed)


def blockwise_settings(config: QuantizeConfig) -> Settings:
    """The recipe's settings of a run; what pydantic cannot see (a stride that does not divide) is refused here."""
    elsewhere = {"windows", "seq_len", *FREE_OF_BLOCKWISE}
    return Settings(**config.blockwise.model_dump(exclude=elsewhere), seed=config.seed)


def _check_layers(config: QuantizeConfig, spec: QuantSpec, model: nn.Module) -> None:
    """Everything that swap and the file format would refuse after hours of training."""
    report = swap(model, spec, lambda _, linear: linear, config.include, config.exclude, config.skip_experts)
    if config.format == "gptq":
        for name in report.changed:
            n, k = model.get_submodule(name).weight.shape
            if n % 32 or k % 32:
                raise ValueError(f"{name} has N={n}, K={k}; format gptq needs multiples of 32, use compressed-tensors")
    if config.kd.freeze and config.recipe in TRAINED:
        for pattern in config.kd.freeze:
            if not any(matches(name, [pattern]) for name in report.changed):
                raise ValueError(f"freeze={pattern!r} matches none of the {len(report.changed)} layers to quantize")


def _training_windows(tokenizer: Any, text: str, model: nn.Module, config: QuantizeConfig) -> Tensor:
    if config.recipe in ("gptq", "blockwise", "bisup"):
        how: Any = {"gptq": config.gptq, "blockwise": config.blockwise, "bisup": config.bisup}[config.recipe]
        length = window_length(model, how.seq_len, f"{config.recipe}.seq_len")
        return windows(tokenizer, text, length, how.windows, str(config.calibration))
    context = getattr(model.config, "max_position_embeddings", None)
    if context and config.kd.seq_len > context:
        raise ValueError(f"kd.seq_len={config.kd.seq_len} is longer than the model's context of {context} tokens")
    return windows(tokenizer, text, config.kd.seq_len, source=str(config.calibration))


def _check_disk(config: QuantizeConfig, model: nn.Module) -> None:
    """Room for the checkpoint and, in training, for weights, optimizer and their replacement."""
    parameters = sum(p.numel() for p in model.parameters())
    need = parameters * (
        2 + 2 * 12 if config.recipe in TRAINED else 4 if config.recipe in ("blockwise", "bisup") else 2
    )
    folder = next(p for p in (config.out.parent, *config.out.parent.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free; this run may need {need / 1e9:.1f} GB")
