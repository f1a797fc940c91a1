"""What ``pyquant ablate`` reads and shows: the model with its texts, the table of arms, and what it says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.ablate import Bench
from pyquant.integrations.ablate_bisup import BiSupBench
from pyquant.integrations.ablate_qat import QATBench
from pyquant.integrations.checkpoint import local_folder
from pyquant.integrations.data import load_text, windows
from pyquant.integrations.machine import pick_device, versions, window_length
from pyquant.integrations.prompt import SYSTEM, prompt_tokens
from pyquant.integrations.spread import differences, summary
from pyquant.integrations.transformers import load_causal_lm
from pyquant.integrations.work import checkpoint_digest, tensor_digest
from pyquant.report import Report, write_report


def load_bench(
    model: str,
    calibration: str,
    evals: Sequence[str],
    spec: QuantSpec,
    count: int,
    length: int | None,
    batch: int,
    eval_windows: int | None,
    eval_skip_chars: int,
    device: str,
    recipe: str = "blockwise",
    prompt: str = SYSTEM,
) -> tuple[Bench | QATBench | BiSupBench, dict[str, Any]]:
    """A model in fp32 with its texts, and the facts that all rows have in common.

    Args:
        model, calibration, evals: folder and texts (see :func:`pyquant.integrations.data.load_text`).
        spec: checked against the model's layers by the arms themselves.
        count, length: calibration windows of a seed, and tokens in one (None: the context, at most 2048; 512 of qat, which
            trains on all windows).
        batch: windows at once.
        eval_windows, eval_skip_chars: of each evaluation text.
        device: ``auto``, ``cpu`` or ``cuda``.
        recipe: ``blockwise``, ``qat`` or ``bisup``.
        prompt: of bisup, the text before every window.

    Raises:
        FileNotFoundError, ValueError: as their parts.
    """
    where, folder = pick_device(device), local_folder(model)
    texts = {source: load_text(source, skip_chars=eval_skip_chars) for source in evals}
    text = load_text(calibration)
    net, tokenizer = load_causal_lm(folder, dtype="auto", device="cpu")
    net = net.to(where, torch.float32).eval()
    length = min(512, window_length(net, None)) if recipe == "qat" and length is None else length
    size = window_length(net, length, "calibration_length")
    measured = {
        Path(source).stem: windows(tokenizer, t, window_length(net, None), eval_windows, source)
        for source, t in texts.items()
    }
    drawn = windows(tokenizer, text, size, source=calibration)
    bench: Bench | QATBench | BiSupBench
    before: Tensor | None = None
    if recipe == "qat":
        bench, count = QATBench(net, drawn, measured, share=where == "cuda"), len(drawn)
    elif recipe == "bisup":
        before = prompt_tokens(tokenizer, prompt)
        bench = BiSupBench(net, drawn, count, measured, before, batch)
    else:
        bench = Bench(net, drawn, count, measured, batch, share=True)
    facts: dict[str, Any] = {
        "recipe": recipe,
        "model": checkpoint_digest(folder),
        "calibration": tensor_digest(drawn),
        "texts": {name: tensor_digest(rows) for name, rows in measured.items()},
        "spec": str(spec),
        "calibration_tokens": count * size,
        "batch": batch,
        "device": versions(where)["device"],
    }
    if before is not None:
        facts["prompt"] = tensor_digest(before[None])
    return bench, facts


def cell(found: dict[str, float | None], digits: int = 3) -> str:
    """``39.01 ± 0.12``: the mean and half of its 95 % interval, the mean alone for one seed."""
    mean = f"{found['mean']:.{digits}f}"
    return mean if found["half"] is None else f"{mean} ± {found['half']:.{digits}f}"


def mean_table(
    rows: Iterable[dict[str, Any]], full: dict[str, float] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: perplexity of each arm on each text, mean over seeds with the 95 % interval."""
    found = summary(rows)
    names = list(found[0]["texts"]) if found else list(full or {})
    columns = ["arm", "seeds", *names, "seconds"]
    cells = [["full precision", "-", *(f"{full[name]:.3f}" for name in names), "-"]] if full else []
    for row in found:
        values = [cell(row["texts"][name]) for name in names]
        cells.append([row["arm"], str(row["seeds"]), *values, f"{row['seconds']:.1f}"])
    return columns, cells


def conclusion(rows: Iterable[dict[str, Any]], base: str) -> list[str]:
    """Sentences: which arms are better or worse than ``base`` beyond their 95 % interval over seeds, which are not."""
    lines = []
    for row in differences(rows, base):
        for text, found in row["texts"].items():
            mean, half = found["mean"], found["half"]
            if half is None:
                verdict = "one seed, so no interval"
            elif abs(mean) <= half:
                verdict = "no difference beyond the 95 % interval"
            else:
                verdict = "better" if mean < 0 else "worse"
            width = "" if half is None else f" ± {half:.2f}"
            lines.append(f"{row['spec']}, {text}: {row['arm']} against {base}: {mean:+.2f}{width} % ({verdict}).")
    return lines


def write_page(meta: dict[str, Any], rows: list[dict[str, Any]], base: str, path: Path) -> None:
    """``report.html`` of a comparison."""
    columns, cells = mean_table(rows, meta.get("full_precision"))
    notes = [note for row in rows for note in row["notes"]]
    qat, bisup = meta.get("recipe") == "qat", meta.get("recipe") == "bisup"
    blocks = "Ways of weight-activation quantization compared" if bisup else "Ways of block-wise quantization compared"
    report = Report(
        title="Ways of quantization-aware training compared" if qat else blocks,
        lead=[
            f"{meta['spec']}; {meta['calibration_tokens']:,} {'training tokens' if qat else 'calibration tokens a seed'}; "
            f"{meta['device']}",
            "Perplexity, mean over seeds with the 95 % interval of the mean; equal gradient steps of each "
            f"{'arm' if qat else 'block'}.",
        ],
        columns=columns,
        rows=cells,
        cost=conclusion(rows, base),
        notes=notes,
        config={row["arm"]: row["settings"] for row in rows},
        versions={"device": meta["device"], "torch": torch.__version__},
    )
    write_report(report, path)
