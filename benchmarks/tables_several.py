"""README's table of several GPUs, from the file of ``benchmarks.several_gpus``."""

from __future__ import annotations

from typing import Any

NAMES = {"kd_qat_step": "KD-QAT step", "decode": "W4 decode"}


def several_table(found: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """About, columns and rows; what the logits of a cut model are off by stands in the sentence."""
    meta, cells, said = found["meta"], [], []
    for row in found["rows"]:
        if row["op"] == "logits":
            said.append(
                f"Logits of the cut model are off by {row['relative']:.1e} of their norm, where two ways of one GPU differ by "
                f"{row['noise']:.1e}."
            )
        elif row["op"] == "all_reduce" and row["bytes"] > 1 << 20:
            said.append(f"A sum over the GPUs of {row['bytes'] / 2**30:.0f} GiB moves {row['gb_s']:.0f} GB/s.")
        if row["op"] not in NAMES:
            continue
        what = NAMES[row["op"]] + (f", batch {row['batch']}" if "batch" in row else "")
        if "failed" in row:
            cells.append([what, row["way"], str(row["gpus"]), *["-"] * 5])
            continue
        times = [f"{row[n]:.2f}x" if n in row else "-" for n in ("speedup", "over_best")]
        memory = f"{row['allocated_gib']:.1f}" if "allocated_gib" in row else "-"
        cells.append(
            [what, row["way"], str(row["gpus"]), f"{row['ms']:.2f}", f"{row['tokens_s']:,.0f}", memory, *times]
        )
    about = (
        f"{len(meta['gpus'])} x {meta['gpu']}, torch {meta['torch']}, NCCL {meta.get('nccl', '-')}, {meta['date']}, commit "
        f"{meta['commit'][:12]}; the {meta['shape'].upper()} shape with random weights. {' '.join(said)}"
    )
    head = [
        "what",
        "way",
        "GPUs",
        "ms",
        "tokens/s",
        "GiB a GPU",
        "over the like way of one GPU",
        "over the best of one",
    ]
    return about.strip(), head, cells
