"""``pyquant demo``: the bundled 3.7 M parameter model, quantized several ways on a CPU, with a report.

No text ships with pyquant. The full-precision model writes its own, sampled at temperature 1 from an empty start (the
data-free idea of LLM-QAT, Liu et al. 2023): one part to train on, a separate part to measure on. On such text the
model's own perplexity is ``exp(H)``, its entropy, and a quantized model's is ``exp(H + KL)``: the full-precision row is
the floor, and a row divided by it is ``exp(KL)``. With ``text`` the user's text is split into the two parts instead.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

import pyquant
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.commands import generate, start_token
from pyquant.integrations.data import load_text, windows
from pyquant.integrations.evaluate import perplexity, probe_logits
from pyquant.integrations.events import Clock, OnEvent
from pyquant.integrations.export import export, verify
from pyquant.integrations.files import write_atomic
from pyquant.integrations.machine import peak_memory, versions, weight_bytes
from pyquant.integrations.summary import change, duration
from pyquant.integrations.trainer import KDConfig, train_kd
from pyquant.integrations.transformers import load_causal_lm, load_model
from pyquant.integrations.work import checkpoint_digest
from pyquant.recipes.kd_qat import KDLoss, convert
from pyquant.recipes.rtn import layer_errors, rtn
from pyquant.report import Report, write_report

BUNDLED = Path(pyquant.__file__).parent / "demo"
OV = ("v_proj", "o_proj")
AT_ONCE = 64  # windows sampled together: more only move a larger cache


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults fit two CPU cores and a few minutes.

    Attributes:
        out: folder for the sampled text, the checkpoint and the report.
        model: a small full-precision model.
        text: a text to use instead of sampled text; its last tenth is measured on.
        steps, batch_size: of each training run.
        length: tokens in a window.
        train_windows, eval_windows: how much text to sample (and the most that is used of ``text``).
        lr, scale_lr: peak learning rates of weights, and of scales.
        prompt: what the quantized model continues.
        seed: of sampling, training and generation.
    """

    out: Path
    model: str = str(BUNDLED)
    text: str | None = None
    steps: int = 64
    batch_size: int = 8
    length: int = 256
    train_windows: int = 512  # steps * batch_size: each is seen once
    eval_windows: int = 64
    lr: float = 2e-4
    scale_lr: float = 1e-4
    prompt: str = "It was a dark evening, and the old man"
    seed: int = 0


@dataclass
class DemoResult:
    """The table (``columns``, ``rows``), remarks (``lines``), and the facts behind them (``facts``, JSON-ready)."""

    columns: list[str]
    rows: list[list[str]]
    lines: list[str]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Variant:
    """One quantized model and what is known of it."""

    name: str
    spec: QuantSpec
    model: nn.Module
    perplexity: float
    layers: list[dict[str, Any]]
    history: list[dict[str, float]]

    @property
    def error(self) -> float:
        return sum(row["relative_error"] for row in self.layers) / len(self.layers)


def run(config: DemoConfig, on_event: OnEvent | None = None, command: str = "pyquant demo") -> DemoResult:
    """Run the demo.

    Returns:
        the table that is also in ``out/report.html``; the checkpoint is in ``out/checkpoint``.

    Raises:
        FileNotFoundError: the model or the text is not there.
        ValueError: the text is too short.
    """
    clock = Clock(on_event)
    source = Path(config.model)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no model; give one with --model")
    text = None if config.text is None else load_text(config.text)
    with clock("load the model"):
        model, tokenizer = load_causal_lm(source, torch.bfloat16)
        model = model.float().requires_grad_(False)
    config.out.mkdir(parents=True, exist_ok=True)
    if text is None:
        train, measure = _sampled(model, tokenizer, config, clock)
    else:
        train, measure = _split(tokenizer, text, config)
    variants = _variants(config, model, train, measure, clock)
    with clock("evaluate full precision") as tick:
        floor = perplexity(model, measure, 16, tick)
    best = variants[-1]
    with clock("export and load back"):
        checkpoint = config.out / "checkpoint"
        probe = measure[:1, :64]
        expected = probe_logits(best.model, probe)
        export(best.model, tokenizer, source, checkpoint, best.spec, overwrite=True)
        verify(checkpoint, probe, expected)
    with clock("generate"):
        sentence = generate(load_model(checkpoint, torch.float32), tokenizer, config.prompt, 48, 0.7, config.seed)
    return _publish(config, model, variants, floor, train, measure, sentence, clock, command)


# ------------------------------------------------------------------------------------------------ text


@torch.no_grad()
def sample(model: nn.Module, start: int, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Windows that the model writes, each from ``start``, temperature 1, nothing cut off: int64 ``[count, length]``."""
    tokens = torch.full((count, 1), start)
    cache, last = DynamicCache(config=model.config), tokens
    for _ in range(1, length):
        logits = model(input_ids=last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        last = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, last], 1)
    return tokens


def _sampled(model: nn.Module, tokenizer: Any, config: DemoConfig, clock: Clock) -> tuple[Tensor, Tensor]:
    """Training and evaluation windows that the model wrote, from ``out`` when the same ones were written before."""
    count, file = config.train_windows + config.eval_windows, config.out / "sampled.safetensors"
    what = (checkpoint_digest(Path(config.model)), config.seed, config.length, count)
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    mark = config.out / "sampled.json"
    if not (file.is_file() and mark.is_file() and json.loads(mark.read_text())["key"] == key):
        generator = torch.Generator().manual_seed(config.seed)
        start, parts = start_token(model, tokenizer), []
        with clock("the model writes its training and evaluation text") as tick:
            for done in range(0, count, AT_ONCE):
                parts.append(sample(model, start, min(AT_ONCE, count - done), config.length, generator))
                tick(min(count, done + AT_ONCE), count)
        tokens = torch.cat(parts)
        save_file({"tokens": tokens.to(torch.int32)}, file)
        texts = tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        write_atomic(config.out / "sampled_train.txt", "\n\n".join(texts[config.eval_windows :]))
        write_atomic(config.out / "sampled_eval.txt", "\n\n".join(texts[: config.eval_windows]))
        write_atomic(mark, json.dumps({"key": key}))
    tokens = load_file(file)["tokens"].long()
    return tokens[config.eval_windows :], tokens[: config.eval_windows]


def _split(tokenizer: Any, text: str, config: DemoConfig) -> tuple[Tensor, Tensor]:
    """Training and evaluation windows of the user's text; the last tenth is for evaluation."""
    cut = len(text) * 9 // 10
    train = windows(tokenizer, text[:cut], config.length, source=f"{config.text} (first nine tenths)")
    measure = windows(tokenizer, text[cut:], config.length, source=f"{config.text} (last tenth)")
    return train[: config.train_windows], measure[: config.eval_windows]


# ------------------------------------------------------------------------------------------------ models


def _variants(config: DemoConfig, model: nn.Module, train: Tensor, measure: Tensor, clock: Clock) -> list[_Variant]:
    """RTN at 4 and 3 bits, KD-QAT at 3 bits without and with ov-freeze, all with ranges of least squared error."""
    w4, w3 = QuantSpec(4, 128), QuantSpec(3, -1)
    before = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    variants = []

    def enter(name: str, spec: QuantSpec, made: nn.Module, history: list[dict[str, float]]) -> None:
        with clock(f"evaluate {name}") as tick:
            value = perplexity(made, measure, 16, tick)
        variants.append(_Variant(name, spec, made.eval(), value, layer_errors(before, made), history))

    for spec, name in ((w4, "RTN W4 g128"), (w3, "RTN W3 per channel")):
        made = copy.deepcopy(model)
        rtn(made, spec, "mse")
        enter(name, spec, made, [])
    for freeze, name in (((), "KD-QAT W3 per channel"), (OV, "KD-QAT W3 per channel, ov-freeze")):
        made = copy.deepcopy(model).requires_grad_(True)
        work = config.out / "train.work"
        shutil.rmtree(work, ignore_errors=True)
        with clock(f"train {name}") as tick:
            history = train_kd(made, model, train, kd(config, freeze), w3, work, False, _logger(tick, config.steps))
        shutil.rmtree(work, ignore_errors=True)
        convert(made)
        enter(name, w3, made, history)
    return variants


def kd(config: DemoConfig, freeze: tuple[str, ...]) -> KDConfig:
    """The training of the demo: pure KL on text that the teacher wrote, where the text itself adds only noise."""
    return KDConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        seq_len=config.length,
        lr=config.lr,
        scale_lr=config.scale_lr,
        warmup_steps=max(1, config.steps // 10),
        save_steps=config.steps,
        seed=config.seed,
        freeze=freeze,
        loss=KDLoss(kl=1.0, ce=0.0),
        rule="mse",
    )


def _logger(tick: Any, steps: int) -> Any:
    return lambda row: tick(int(row["step"]), steps, f"loss {row['loss']:.4f}")


# ------------------------------------------------------------------------------------------------ result


def _publish(
    config: DemoConfig,
    model: nn.Module,
    variants: list[_Variant],
    floor: float,
    train: Tensor,
    measure: Tensor,
    sentence: str,
    clock: Clock,
    command: str,
) -> DemoResult:
    own = config.text is None
    columns = ["model", "perplexity", "change", "weight error"] + (["KL, nats/token"] if own else [])
    rows = [["full precision (bf16)", f"{floor:.3f}", "", ""] + ([""] if own else [])]
    for v in variants:
        row = [v.name, f"{v.perplexity:.3f}", change(floor, v.perplexity), f"{100 * v.error:.1f} %"]
        rows.append(row + ([f"{math.log(v.perplexity / floor):.4f}"] if own else []))
    sizes = weight_bytes(Path(config.model)), weight_bytes(config.out / "checkpoint")
    if own:
        about = (
            f"Measured on {measure.numel():,} tokens that the full-precision model wrote itself (temperature 1, seed "
            f"{config.seed}); trained on {train.numel():,} others. Perplexity is exp(H + KL) there: the full-precision "
            "row is the floor, and a row says how close its model stays to that one, not how well it knows English."
        )
    else:
        about = (
            f"Trained on {train.numel():,} tokens of {config.text}, measured on {measure.numel():,} of its last tenth."
        )
    seconds = sum(clock.seconds.values())
    cost = [
        f"The weights of the last row take {sizes[1] / 1e6:.2f} MB on disk instead of {sizes[0] / 1e6:.2f} MB; the "
        "embedding stays in 16 bits.",
        f"Each KD-QAT run took {config.steps} steps of {config.batch_size} x {config.length} tokens.",
        f"The whole demo took {duration(seconds)} and {peak_memory()['host_gib']:.1f} GiB of memory.",
    ]
    last = variants[-1].name
    report = Report(
        title="pyquant demo: one small model, four ways to fewer bits",
        lead=[about, "All ranges are those of least squared error; weights are symmetric."],
        tiles=[(f"{v.perplexity:.2f}", v.name) for v in variants],
        columns=columns,
        rows=rows,
        cost=cost,
        layers={v.name: v.layers for v in variants},
        curves={v.name: v.history for v in variants if v.history},
        samples=[(f"Written by {last}, loaded from its checkpoint", sentence)],
        config={**asdict(config), "loss": "KL(teacher || student), temperature 1"},
        versions=versions("cpu"),
        command=command,
    )
    write_report(report, config.out / "report.html")
    facts = {
        "full_precision": floor,
        "variants": [{"name": v.name, "perplexity": v.perplexity, "weight_error": v.error} for v in variants],
        "sentence": sentence,
        "seconds": clock.seconds,
        "bytes": {"full_precision": sizes[0], "checkpoint": sizes[1]},
    }
    write_atomic(config.out / "report.json", json.dumps(facts, indent=1))
    return DemoResult(columns, rows, [about, *cost, f"{last} writes: {sentence}"], facts)
