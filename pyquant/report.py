"""``report.html``: what a run did, what it cost, and how to repeat it, in one file that needs nothing else.

The pictures are PNGs inside the page, on a transparent ground and in greys that read on white and on black.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLOURS = ("#2f81f7", "#e3832b", "#2da44e", "#a371f7", "#db61a2", "#6e7781", "#b59f00", "#17a2b8")
GREY = "#808890"

_CSS = """
:root { color-scheme: light dark; --fg: #1c2128; --soft: #59636e; --line: #d8dee4; --card: #f6f8fa; --bg: #fff;
        --accent: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e6edf3; --soft: #9198a1; --line: #30363d; --card: #161b22; --bg: #0d1117; --accent: #58a6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--bg); color: var(--fg);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .42rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
.plain td { text-align: left; overflow-wrap: anywhere; } .plain td:first-child { color: var(--soft); width: 30%; }
img { width: 100%; height: auto; display: block; }
ul { padding-left: 1.2rem; margin: .4rem 0; }
blockquote { margin: .6rem 0; padding: .3rem .9rem; border-left: 3px solid var(--accent); white-space: pre-wrap; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--accent); }
code, pre { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; overflow-x: auto; }
"""


@dataclass(frozen=True)
class Panels:
    """A picture of small panels that share their axes' meaning: ``panels[title][line] = (x, y)``, y positive if ``log``."""

    title: str
    caption: str
    xlabel: str
    ylabel: str
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
    log: bool = False


@dataclass
class Report:
    """What :func:`write_report` shows. Every text is plain; it is escaped here.

    Attributes:
        title, lead: heading and the sentences under it.
        tiles: the few numbers to see first, ``(number, what it is)``.
        columns, rows: the table under ``heading``, cells already formatted.
        tables: further ones, ``(heading, columns, rows)``.
        cost: what the run cost, in sentences.
        kept: layer -> why it was left unquantized.
        layers: label -> rows ``{"name", "relative_error", ...}``, the weight errors.
        curves: label -> rows ``{"step", "loss", ...}``, the training losses.
        pictures: panels, each under its title.
        samples: ``(label, text)`` written by the model.
        notes: caveats, in sentences.
        config, versions: for repeating the run.
        command: the command line, if there was one.
    """

    title: str
    lead: Sequence[str] = ()
    tiles: Sequence[tuple[str, str]] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    heading: str = "Accuracy"
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    cost: Sequence[str] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    pictures: Sequence[Panels] = ()
    samples: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""


def write_report(report: Report, path: Path) -> None:
    """Write ``report`` as one self-contained HTML file, replacing an older one whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(report), encoding="utf-8")
    os.replace(partial, path)


def render(report: Report) -> str:
    """The page as text."""
    parts = [f"<h1>{_e(report.title)}</h1>", *(f'<p class="soft">{_e(line)}</p>' for line in report.lead)]
    if report.tiles:
        tiles = "".join(f'<div class="tile"><b>{_e(n)}</b><span>{_e(what)}</span></div>' for n, what in report.tiles)
        parts.append(f'<div class="tiles">{tiles}</div>')
    if report.rows:
        parts += [f"<h2>{_e(report.heading)}</h2>", _table(report.columns, report.rows)]
    for heading, columns, rows in report.tables:
        parts += [f"<h2>{_e(heading)}</h2>", _table(columns, rows)]
    if report.notes:
        parts += ["<ul>", *(f"<li>{_e(note)}</li>" for note in report.notes), "</ul>"]
    if report.cost:
        parts += ["<h2>What it cost</h2>", *(f"<p>{_e(line)}</p>" for line in report.cost)]
    for label, text in report.samples:
        parts += [f"<h2>{_e(label)}</h2>", f"<blockquote>{_e(text)}</blockquote>"]
    if any(report.layers.values()):
        caption = "Relative weight error of each quantized layer, |w_hat - w| / |w| against the original weight."
        picture = _picture(layer_figure(report.layers), "weight error of each layer")
        parts += ["<h2>Error by layer</h2>", f'<p class="soft">{caption}</p>', picture]
    if any(report.curves.values()):
        parts += ["<h2>Training loss</h2>", _picture(loss_figure(report.curves), "loss over steps")]
    for panels in report.pictures:
        parts += [f"<h2>{_e(panels.title)}</h2>", f'<p class="soft">{_e(panels.caption)}</p>']
        parts.append(_picture(panel_figure(panels), panels.title))
    if report.kept:
        parts += ["<h2>Left unquantized</h2>", _pairs(report.kept, fold=12)]
    parts.append("<h2>To repeat it</h2>")
    if report.command:
        parts.append(f"<pre>{_e(report.command)}</pre>")
    for name, facts in (("Configuration", report.config), ("Versions", report.versions)):
        if facts:
            parts.append(f"<details><summary>{name}</summary>{_pairs(facts)}</details>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{_e(report.title)}</title><style>{_CSS}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


# ------------------------------------------------------------------------------------------------ pictures


def layer_figure(layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Weight error by layer: one line per kind of projection for a single run, one per run when there are several."""
    figure, axes = _figure()
    if len(layers) == 1:
        kinds: dict[str, list[tuple[int, float]]] = {}
        for position, row in enumerate(next(iter(layers.values()))):
            block = re.search(r"\.(\d+)\.", row["name"])
            kind = row["name"].rpartition(".")[2]
            kinds.setdefault(kind, []).append((int(block[1]) if block else position, row["relative_error"]))
        for i, (kind, points) in enumerate(kinds.items()):
            x, y = [place for place, _ in points], [error for _, error in points]
            axes.plot(x, y, "o-", color=COLOURS[i % len(COLOURS)], label=kind, markersize=4, linewidth=1.2)
        axes.set_xlabel("block")
    else:
        for i, (label, rows) in enumerate(layers.items()):
            y = [row["relative_error"] for row in rows]
            axes.plot(range(len(y)), y, "o-", color=COLOURS[i % len(COLOURS)], label=label, markersize=4, linewidth=1.2)
        axes.set_xlabel("layer, in the order of the model")
    axes.set_ylabel("relative error")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes)
    return figure


def loss_figure(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Loss over steps: loss, kl and ce for a single run, the loss of each run when there are several."""
    figure, axes = _figure()
    curves = {label: rows for label, rows in curves.items() if rows}
    if len(curves) == 1:
        rows = next(iter(curves.values()))
        steps = [row["step"] for row in rows]
        shown = [key for key in ("loss", "kl", "ce") if all(key in row for row in rows)]
        lines = {key: (steps, [row[key] for row in rows]) for key in shown}
    else:
        lines = {label: ([r["step"] for r in rows], [r["loss"] for r in rows]) for label, rows in curves.items()}
    for i, (label, (x, y)) in enumerate(lines.items()):
        axes.plot(x, y, color=COLOURS[i % len(COLOURS)], label=label, linewidth=1.6, marker="o" if len(x) < 3 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    _legend(axes)
    return figure


def panel_figure(what: Panels) -> Any:
    """Panels four a row on one vertical scale, one legend above all; each line has one colour everywhere."""
    from matplotlib.ticker import NullFormatter

    columns = min(4, len(what.panels))
    rows = -(-len(what.panels) // columns)
    figure = _canvas(2.5 * columns, 2.1 * rows + 0.5)
    names = list(dict.fromkeys(name for lines in what.panels.values() for name in lines))
    for place, (title, lines) in enumerate(what.panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1, sharey=figure.axes[0] if figure.axes else None)
        _soften(axes, 8)
        axes.set_title(title, color=GREY, fontsize=9)
        for name, (x, y) in lines.items():
            few = {"marker": "o", "markersize": 3} if len(x) <= 12 else {}
            axes.plot(x, y, color=COLOURS[names.index(name) % len(COLOURS)], label=name, linewidth=1.2, **few)
        if what.log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if place % columns == 0:
            axes.set_ylabel(what.ylabel, fontsize=8)
        else:
            axes.tick_params(labelleft=False)
        if place >= len(what.panels) - columns:
            axes.set_xlabel(what.xlabel, fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    first = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        first.values(), first.keys(), loc="outside upper center", frameon=False, labelcolor=GREY, fontsize=8, ncols=3
    )
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same figure."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pyquant"}):
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def _canvas(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure() -> tuple[Any, Any]:
    figure = _canvas(6.8, 3.4)
    axes = figure.add_subplot()
    _soften(axes, 10)
    return figure, axes


def _soften(axes: Any, size: int) -> None:
    axes.grid(color=GREY, alpha=0.25, linewidth=0.7)
    axes.tick_params(colors=GREY, labelsize=size)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)


def _legend(axes: Any) -> None:
    labels = axes.get_legend_handles_labels()[1]
    columns = min(len(labels), 4 if max(map(len, labels)) <= 12 else 2)  # a wider legend would squeeze the axes
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axes.legend(frameon=False, labelcolor=GREY, fontsize=10, ncols=columns, **place)


def _picture(figure: Any, what: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160, transparent=True)
    return f'<img alt="{_e(what)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


# ------------------------------------------------------------------------------------------------ pieces


def _e(text: object) -> str:
    return html.escape(str(text))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_e(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _pairs(facts: Mapping[str, Any], fold: int = 0) -> str:
    """Two columns; more than ``fold`` rows are folded away (0: never)."""
    body = "".join(f"<tr><td>{_e(key)}</td><td>{_e(_plain(value))}</td></tr>" for key, value in facts.items())
    table = f'<table class="plain"><tbody>{body}</tbody></table>'
    if fold and len(facts) > fold:
        return f"<details><summary>{len(facts)} layers</summary>{table}</details>"
    return table


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)
