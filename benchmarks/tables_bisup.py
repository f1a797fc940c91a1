"""README's tables of weight-activation quantization, from the files of ``benchmarks.bisup``."""

from __future__ import annotations

import math
from typing import Any

from pyquant.integrations.ablate_bisup import BISUP_ARMS
from pyquant.integrations.spread import summary

TEXTS = ("books", "wikitext2", "tinystories")


def bisup_table(files: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """About, columns and rows: perplexity on each text and behind the prompt, and the share of a host's gap that is closed.

    The share is of log perplexity, of the mean over seeds: ``(host - arm) / (host - full precision)``, on books, for an arm
    whose prompt is in 16 bits measured behind the prompt, else without it.
    """
    cells: list[list[str]] = []
    order = list(BISUP_ARMS)
    for found in files:
        full, bits = found["meta"]["full_precision"], found["meta"]["spec"].upper()
        columns = [*TEXTS, *(f"{text}, prompt" for text in TEXTS)]
        cells.append([bits, "full precision", *(f"{full[text]:.2f}" for text in columns), ""])
        groups = sorted(
            summary(found["rows"]), key=lambda r: order.index(r["arm"]) if r["arm"] in order else len(order)
        )
        hosts = {r["arm"]: r["texts"] for r in groups}
        settings = {row["arm"]: row["settings"] for row in found["rows"]}
        for row in groups:
            values = []
            for text in columns:
                mean, half = row["texts"][text]["mean"], row["texts"][text]["half"]
                values.append(f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}")
            fields = settings[row["arm"]]
            on = "books" if fields.get("storage", "none") == "none" else "books, prompt"
            host = hosts.get(fields["host"])
            share = ""
            if host is not None and row["arm"] != fields["host"]:
                bare, now, best = (math.log(v) for v in (host[on]["mean"], row["texts"][on]["mean"], full[on]))
                share = f"{100 * (bare - now) / (bare - best):.0f} %"
            cells.append([bits, row["arm"], *values, share])
    meta = files[0]["meta"]
    seeds = max(row["seed"] for found in files for row in found["rows"]) + 1
    about = (
        f"{meta['model']}, {meta['calibration_tokens']:,} calibration tokens, {meta['eval_windows']} windows of each text, "
        f"plain and behind a prompt of {meta['prompt_tokens']} tokens (K and V rounded to the bits of the inputs), mean over "
        f"{seeds} seeds ± half of the 95 % interval. {meta['gpu']}, commit {meta['commit'][:12]}."
    )
    return about, ["format", "arm", *TEXTS, *(f"{text}, prompt" for text in TEXTS), "gap closed"], cells
