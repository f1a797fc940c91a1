"""README's tables of quantization-aware training, from the files of ``benchmarks.qat`` and ``benchmarks.qat_large``."""

from __future__ import annotations

from typing import Any

from pyquant.integrations.spread import summary

TEXTS = ("books", "wikitext2", "tinystories")
FORMATS = (
    "not quantized",
    "W4 per channel",
    "W4 g128",
    "W3 per channel",
    "W3 g128",
    "W2 g64",
    "W2 g128",
    "W2 per channel",
)
NAMES = {
    "rtn": "RTN, MSE clip", "control": "control: trained without quantization", "qat-ce": "QAT: CE, STE, hard clamp",
    "kd": "KD-QAT: KL + CE", "kd-pure": "KD-QAT: KL alone", "kd-ov": "KD-QAT: KL + CE, ov-freeze",
    "kd-pure-ov": "KD-QAT: KL alone, ov-freeze", "soft-round": "soft-qat: CE, sigmoid, hard clamp",
    "soft-clamp": "soft-qat: CE, STE, soft clamp", "soft-both": "soft-qat: CE, sigmoid, soft clamp",
    "soft-kd": "soft-qat: KL + CE", "soft-kd-pure": "soft-qat: KL alone", "soft-kd-ov": "soft-qat: KL + CE, ov-freeze",
    "soft-kd-pure-ov": "soft-qat: KL alone, ov-freeze",
}  # fmt: skip


def qat_table(found: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """What the numbers are, columns, and rows: perplexities, mean over seeds and standard deviation; and how far books is
    from the better of full precision and the control."""
    meta, rows = found["meta"], summary(found["rows"])
    full = meta["full_precision"]
    control = [r["texts"]["books"]["mean"] for r in rows if r["arm"] == "control"]
    bar = min([full["books"], *control])

    def place(row: dict[str, Any]) -> tuple[int, int]:
        names = list(NAMES)
        arm = names.index(row["arm"]) if row["arm"] in NAMES else len(names)
        return FORMATS.index(row["spec"].removesuffix(" symmetric")), arm

    cells = [
        ["full precision", "", "", *(f"{full[t]:.2f}" for t in TEXTS), f"{100 * (full['books'] / bar - 1):+.1f} %"]
    ]
    for row in sorted(rows, key=place):
        values = []
        for text in TEXTS:
            mean, sd = row["texts"][text]["mean"], row["texts"][text]["sd"]
            values.append(f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}")
        over = f"{100 * (row['texts']['books']['mean'] / bar - 1):+.1f} %"
        arm = NAMES.get(row["arm"], row["arm"])
        cells.append([row["spec"].removesuffix(" symmetric"), arm, str(row["seeds"]), *values, over])
    tokens = meta["tokens_a_step"]
    about = (
        f"{meta['model']}: {meta['steps']:,} steps of {tokens:,} tokens of other books, {meta['eval_windows']} windows of "
        f"each text, perplexity, mean ± standard deviation over seeds where there are several; symmetric, "
        f"embeddings and head in 16 bits; the last column is books over the better of full precision and the control. "
        f"{meta['gpu']}, commit {meta['commit'][:12]}."
    )
    return about, ["format", "arm", "seeds", *TEXTS, "books, over"], cells


def best_table(found: dict[str, Any], measured: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """:func:`qat_table` of arms that were looked for, beside KL + CE and the control of the main table."""
    beside = [r for r in measured["rows"] if r["arm"] in ("control", "kd", "soft-kd")]
    specs = {r["spec"] for r in found["rows"]} | {"not quantized"}
    rows = found["rows"] + [r for r in beside if r["spec"] in specs]
    rows = [{**r, "perplexity": {t: r["perplexity"][t] for t in TEXTS}} for r in rows]  # no tuning text
    return qat_table({"meta": found["meta"], "rows": rows})


def large_table(found: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """A KD-QAT step of the 8B shape, a row for each way."""
    meta = found["meta"]
    cells = []
    for row in found["rows"]:
        if "ms" in row:
            over = f"{row['over_none']:.2f}x" if "over_none" in row else "-"
            values = [f"{row['ms']:.1f}", f"{row['tokens_s']:,.0f}", f"{row['peak_gib']:.1f}", over]
        else:
            values = ["out of memory" if "memory" in row["failed"] else "not installed", "-", "-", "-"]
        launched = "one graph" if row.get("captured") else "kernel by kernel"
        name = row["variant"] + (" *" if "commit" in row else "")
        cells.append([name, "on" if row["checkpointing"] else "off", launched, *values])
    about = (
        f"{meta['parameters'] / 1e9:.2f} B parameters, {meta['length']:,} tokens, teacher and student resident, bf16 "
        f"weights, AdamW with {'bf16' if meta['optimizer'] == 'bf16' else '8-bit'} moments. {meta['gpu']}, torch "
        f"{meta['torch']}, commit {meta['commit'][:12]}."
    )
    older = sorted({row["commit"][:12] for row in found["rows"] if "commit" in row})
    if older:
        about += f" * at commit {', '.join(older)}."
    return about, ["weights", "checkpointing", "launched", "ms a step", "tokens/s", "peak GiB", "over none"], cells
