"""From the facts of a run (``report.json``) to the page and the lines that a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyquant.report import Report


def change(fp: float, quantized: float) -> str:
    """``+4.0 %``."""
    return f"{100 * (quantized / fp - 1):+.1f} %"


def duration(seconds: float) -> str:
    """``3 min 12 s``; tenths below ten seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def accuracy_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the perplexity table."""
    columns = ["text", "windows", "full precision", "quantized", "change"]
    rows = [
        [
            Path(row["text"]).name,
            f"{row['windows']} x {row['length']}",
            f"{row['fp']:.3f}",
            f"{row['quantized']:.3f}",
            change(row["fp"], row["quantized"]),
        ]
        for row in result["rows"]
    ]
    return columns, rows


def cost_lines(result: Mapping[str, Any]) -> list[str]:
    """What the run cost in time, memory and accuracy, in sentences."""
    sizes, seconds, memory = result["sizes"], result["seconds"], result["memory"]
    total = sum(seconds.values())
    slowest = max(seconds, key=seconds.get)
    lines = [
        f"The weights went from {sizes['fp_bytes'] / 1e6:.1f} MB to {sizes['quantized_bytes'] / 1e6:.1f} MB on disk, "
        f"{sizes['bits_per_weight']:.2f} bits for each of {sizes['parameters']:,} parameters; "
        f"{sizes['quantized_percent']:.1f} % of them are quantized.",
    ]
    if sizes["container_bits"] and sizes["container_bits"] != result["config"]["bits"]:
        lines.append(
            f"Weights of {result['config']['bits']} bits are stored in fields of {sizes['container_bits']} bits, "
            "which loaders understand; the file is no smaller than a 4-bit one."
        )
    for row in result["rows"]:
        lines.append(
            f"Perplexity on {Path(row['text']).name} went from {row['fp']:.3f} to {row['quantized']:.3f} "
            f"({change(row['fp'], row['quantized'])})."
        )
    if trained := [row for row in result.get("blocks", []) if row["steps"] and row["before"]]:
        shares = sorted(row["best"] / row["before"] for row in trained)
        lines.append(
            f"Training brought the error of held-out windows down to {100 * shares[len(shares) // 2]:.0f} % of what it was at "
            f"its start (the median of {len(shares)} windows of blocks, {100 * shares[0]:.0f} % to {100 * shares[-1]:.0f} %)."
        )
    if result["layers"]:
        worst = max(result["layers"], key=lambda row: row["relative_error"])
        lines.append(
            f"The layer furthest from its original weight is {worst['name']}, by {100 * worst['relative_error']:.1f} %."
        )
    device = result["versions"]["device"]
    memories = f"{memory['host_gib']:.1f} GiB of host memory"
    if "gpu_gib" in memory:
        memories += f" and {memory['gpu_gib']:.1f} GiB of GPU memory"
    lines.append(
        f"It took {duration(total)} ({duration(seconds[slowest])} of it: {slowest}), at its peak {memories} ({device})."
    )
    return lines


def to_report(result: Mapping[str, Any], command: str = "") -> Report:
    """The page of one ``pyquant quantize``."""
    config, sizes = result["config"], result["sizes"]
    columns, rows = accuracy_table(result)
    lead = [f"recipe {config['recipe']}, range {config['range']}, format {config['format']}"]
    if result["frozen"]:
        patterns = ", ".join(config["kd"]["freeze"])
        lead.append(f"{len(result['frozen'])} layers frozen at their quantized values ({patterns})")
    lead.append(f"loaded back and compared: largest logit difference {result['max_difference']:g}")
    tiles = [
        (f"{sizes['quantized_bytes'] / 1e6:.1f} MB", f"was {sizes['fp_bytes'] / 1e6:.1f} MB"),
        (f"{sizes['bits_per_weight']:.2f}", "bits per weight, all in all"),
        (f"{sizes['quantized_percent']:.1f} %", "of the weights quantized"),
    ]
    tiles += [(change(r["fp"], r["quantized"]), f"perplexity, {Path(r['text']).name}") for r in result["rows"][:2]]
    label = f"{config['recipe']} {result['spec']}"
    return Report(
        title=f"{Path(config['model']).name} in {result['spec']}",
        lead=lead,
        tiles=tiles,
        columns=columns,
        rows=rows,
        cost=cost_lines(result),
        kept=result["kept"],
        layers={label: result["layers"]},
        curves={label: result["history"]},
        notes=result["notes"],
        config=config,
        versions=result["versions"],
        command=command,
    )
