"""From the rows of an analysis (:mod:`pyquant.integrations.signals`) to tables, sentences, pictures and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyquant.analysis.verdict import EXCESS, attention_kinds, by_kind, geometric, suggestion, verdict
from pyquant.integrations.spread import spread
from pyquant.report import Panels, Report, panel_figure, save_figure, write_report

COLUMNS = [
    "arm",
    "projection",
    "||g||²",
    "ratio",
    "cosine",
    "deviation",
    "excess",
    "SNR, dB",
    "mean",
    "variance",
    "spike",
]


def signal_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line an arm and kind of projection: means over seeds of :func:`pyquant.analysis.verdict.by_kind`, and the highest
    spike of a layer in training."""
    cells = []
    for arm, found in _arms(rows).items():
        kinds = [by_kind(row["layers"]) for row in found]
        for kind in kinds[0]:
            values = [
                _number([k[kind][key] for k in kinds], digits)
                for key, digits in (
                    ("norm_sq", "3g"), ("ratio", "3f"), ("cosine", "3f"), ("deviation", "3f"), ("excess", "2f"),
                    ("snr_db", "1f"), ("mean", "4f"), ("variance", "3g"),
                )
            ]  # fmt: skip
            cells.append([arm, kind, *values, _number([_highest(row, kind) for row in found], "2f")])
    return list(COLUMNS), cells


def loss_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line an arm: losses on the probe, mean over seeds with half of the 95 % interval, and seconds."""
    cells = []
    for arm, found in _arms(rows).items():
        values = []
        for key in ("kl", "ce"):
            cell = spread([row["loss"][key] for row in found])
            values.append(f"{cell['mean']:.4f}" + ("" if cell["half"] is None else f" ± {cell['half']:.4f}"))
        seconds = sum(row["seconds"] for row in found) / len(found)
        cells.append([arm, str(len(found)), *values, f"{seconds:.0f}"])
    return ["arm", "seeds", "KL to full precision", "cross entropy", "seconds"], cells


def conclusions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences: the claim about v and o, test by test, the projections that stand out, and what to freeze."""
    arms = _arms(rows)
    tests = verdict(rows)
    lines = [f"{_capital(t['test'])}: {t['holds']} ({t['figures']})." for t in tests]
    layers = next(iter(arms.values()))[0]["layers"]
    if not attention_kinds(layers):
        lines.append("This model has no separate v_proj and o_proj, so the claim about them cannot be tested.")
    if "ptq" in arms:
        seeds = [by_kind(row["layers"]) for row in arms["ptq"]]
        order = sorted(seeds[0], key=lambda k: -sum(s[k]["excess"] or 0 for s in seeds))
        shares = ", ".join(f"{k} {sum(s[k]['excess'] or 0 for s in seeds) / len(seeds):.2f}" for k in order)
        lines.append(
            f"Share of the gradients' deviation over share of the weights, quantized and untrained: {shares} (1: no more than "
            "its size)."
        )
        chosen = suggestion(seeds)
        lines.append(
            f"To freeze, by this measurement: --freeze {','.join(chosen)}." if chosen
            else f"By this measurement nothing needs to be frozen: no kind of projection bears {EXCESS} times its share in "
            "every seed."
        )  # fmt: skip
        lines.append(overall(rows))
    return lines


def overall(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: are v and o the vulnerable projections on this model?"""
    tests = [t for t in verdict(rows) if "untrained" in t["test"] or "spikes" in t["test"]]
    good = sum(t["holds"] == "yes" for t in tests)
    if not tests:
        return "Whether v_proj and o_proj are the vulnerable ones was not measured."
    answer = "are" if good == len(tests) else "are not" if not good else "are only partly"
    return (
        f"On this model v_proj and o_proj {answer} the vulnerable projections that the claim says: {good} of {len(tests)} "
        "tests of vulnerability hold in every seed."
    )


def pictures(rows: Sequence[Mapping[str, Any]]) -> list[Panels]:
    """Squared gradient norms by block, their deviation, SNR by block, and norms over training; means over seeds."""
    arms = _arms(rows)
    out = []
    for key, title, caption, log in (
        ("norm_sq", "Squared gradient norms", "||dL/dW||² on the probe windows, geometric mean over seeds.", True),
        ("deviation", "Gradients against full precision", "||g - g_fp||² / ||g_fp||², mean over seeds.", False),
        ("snr_db", "Outputs against full precision", "Signal over noise of each projection's output, in dB.", False),
    ):
        panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for arm, found in arms.items():
            places: dict[str, dict[int, list[float]]] = {}
            for row in found:
                for layer in row["layers"]:
                    if layer[key] is not None:
                        places.setdefault(layer["kind"], {}).setdefault(layer["block"], []).append(layer[key])
            for kind, blocks in places.items():
                y = [geometric(v) if log else sum(v) / len(v) for v in blocks.values()]
                panels.setdefault(kind, {})[arm] = (list(blocks), y)
        if panels:
            out.append(Panels(title, caption, "block", {"norm_sq": "norm²", "snr_db": "dB"}.get(key, key), panels, log))
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for arm, found in arms.items():
        for kind in found[0]["curves"]:
            values = [geometric(v) for v in zip(*(row["curves"][kind] for row in found), strict=False)]
            curves.setdefault(kind, {})[arm] = (list(range(1, len(values) + 1)), values)
    if curves:
        caption = (
            "||dL/dW||² at each step before clipping, geometric mean over blocks and seeds; the same batches for all."
        )
        out.append(Panels("Squared gradient norms over training", caption, "step", "norm²", curves, True))
    return out


def write_pages(held: Mapping[str, Any], out: Path, title: str, command: str = "") -> list[str]:
    """``report.html`` and the pictures as SVG files; the names of what was written."""
    meta, rows = held["meta"], held["rows"]
    columns, cells = loss_table(rows)
    figures = pictures(rows)
    report = Report(
        title=f"Signal propagation of {title}",
        lead=[
            f"{meta['spec']}; probe of {meta['probe_batches']} x {meta['batch_size']} windows of {meta['seq_len']} tokens; "
            f"training of {meta['steps']} steps of {meta['batch_size']} such windows; {meta['versions']['device']}.",
            "Gradients are those of the cross entropy on the probe; ratio, cosine, deviation and SNR are against the "
            "untrained full-precision model on the same windows.",
        ],
        heading="Losses on the probe",
        columns=columns,
        rows=cells,
        cost=(),
        notes=conclusions(rows),
        tables=[("Signals by kind of projection", *signal_table(rows))],
        pictures=figures,
        config={k: v for k, v in meta.items() if k != "versions"},
        versions=meta["versions"],
        command=command,
    )
    write_report(report, out / "report.html")
    names = ["report.html"]
    for figure in figures:
        names.append(figure.title.lower().replace(" ", "-") + ".svg")
        save_figure(panel_figure(figure), out / names[-1])
    return names


def _arms(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def _highest(row: Mapping[str, Any], kind: str) -> float | None:
    kinds = {r["name"]: r["kind"] for r in row["layers"]}
    return max((v for n, v in row["spikes"].items() if kinds[n] == kind and v is not None), default=None)


def _number(values: Sequence[float | None], digits: str) -> str:
    known = [v for v in values if v is not None]
    return f"{sum(known) / len(known):.{digits}}" if known else "-"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
