"""``python -m benchmarks.tables``: write README's number tables from the files in ``results/``; ``--check`` only compares.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; what is between the marks is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.kv_needle import DEPTHS
from benchmarks.kv_needle import summary as summary_of_needles
from benchmarks.tables_bisup import bisup_table
from benchmarks.tables_kernels import attention_table, w4a8_table
from benchmarks.tables_plan import plan_table
from benchmarks.tables_qat import best_table, large_table, qat_table
from benchmarks.tables_several import several_table
from pyquant.integrations.ablate import ARMS
from pyquant.integrations.spread import summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _about(meta: dict) -> str:
    ceilings = meta["ceilings"]
    return (
        f"{meta['gpu']}, torch {meta['torch']}, {meta['date']}, commit {meta['commit'][:12]}; measured ceilings: "
        f"read {ceilings['read_tbps']} TB/s, bf16 {ceilings['bf16_tflops']:.0f} TFLOP/s."
    )


LINEAR_PEERS = {
    "cublas-bf16": "cuBLAS bf16",
    "tinygemm": "torch tinygemm int4",
    "torchao": "torchao int4",
    "bitsandbytes-nf4": "bitsandbytes NF4",
    "bitsandbytes-fp4": "bitsandbytes FP4",
    "gemlite": "gemlite",
    "humming": "humming",
}


def linear() -> str:
    """Microseconds of linear_w4a16 and the peers that were there, a row a shape and token count."""
    return linear_table(_load("h200/linear.json"), LINEAR_PEERS)


def linear_backward() -> str:
    """Microseconds of the gradient to x, what a backward takes and its two ways, a row a shape and token count."""
    ways = {
        "fused": "from 4 bits",
        "expand": "expanded",
        "expand-24MB": "expanded, 24 MB at a time",
        "cublas-bf16": "cuBLAS bf16",
    }
    return linear_table(_load("h200/linear_backward.json"), ways)


def linear_table(found: dict, peers: dict[str, str]) -> str:
    """Roof, pyquant, and a column for each of these peers (impl -> heading) that the results have."""
    cells: dict[tuple[int, int, int], dict[str, float]] = {}
    roofs = {}
    for row in found["rows"]:
        key = (row["K"], row["N"], row["M"])
        cells.setdefault(key, {})[row["impl"]] = row["us"]
        roofs[key] = row["roof_us"]
    there = [impl for impl in peers if any(impl in us for us in cells.values())]
    rows = []
    for (k, n, m), us in cells.items():
        ours = us["pyquant"]
        rows.append(
            [f"{k} x {n}", str(m), f"{roofs[k, n, m]:.1f}", f"**{ours:.1f}**"]
            + [f"{us[i]:.1f}" if i in us else "-" for i in there]
            + [f"{us['cublas-bf16'] / ours:.2f}x"]
        )
    head = ["K x N", "M", "roof", "pyquant", *(peers[i] for i in there), "over cuBLAS"]
    return _about(found["meta"]) + "\n\n" + _table(head, rows)


def _of_kernels(name: str, make: Callable[[dict], tuple[list[str], list[list[str]]]]) -> str:
    found = _load(f"h200/{name}.json")
    return _about(found["meta"]) + "\n\n" + _table(*make(found))


def fake_quant() -> str:
    """Microseconds of fake_quant beside torch.compile and torch eager, a row a mode, direction and shape."""
    found = _load("h200/fake_quant.json")
    cells: dict[tuple, dict[str, dict]] = {}
    for row in found["rows"]:
        cells.setdefault((row.get("mode", "LSQ"), row["op"], row["N"], row["K"], row["group"]), {})[row["impl"]] = row
    rows = []
    for (mode, op, n, k, group), impls in cells.items():
        others = [f"{impls[i]['us']:.0f}" if i in impls else "-" for i in ("torch-compile", "torch-eager")]
        width = "per channel" if group == -1 else f"g{group}"
        ours = impls["pyquant"]
        shape, what = f"{n} x {k}", op.removeprefix("fake_quant ")
        rows.append([mode, what, shape, width, f"{ours['roof_us']:.0f}", f"**{ours['us']:.0f}**", *others])
    head = ["", "", "N x K", "scales", "roof", "pyquant", "torch.compile", "torch eager"]
    return _about(found["meta"]) + "\n\n" + _table(head, rows)


def distill(found: dict | None = None) -> str:
    """Milliseconds, memory and error of the distillation loss and its peers."""
    found = found or _load("h200/distill.json")
    names = {
        "pyquant": "**pyquant**", "torch-eager": "torch eager", "torch-compile": "torch.compile",
        "liger-fused-jsd": "Liger LigerFusedLinearJSD", "liger-chunked-jsd": "Liger chunked JSD",
        "liger-fused-kl": "Liger LigerFusedLinearKLDivLoss",
    }  # fmt: skip
    labels = {"distill kl": "KL", "distill jsd": "JSD", "distill kl+ce": "KL + CE"}
    rows = []
    for row in found["rows"]:
        if row["op"] == "four products":
            about = "four matrix products alone"
            rows.append(["", about, f"{row['us'] / 1e3:.1f}", "", "", ""])
        elif row["op"] in labels:
            errors = [f"{1e3 * row[name]:.1f}e-3" for name in ("rel_err", "rel_err_weight")]
            rows.append(
                [
                    labels[row["op"]],
                    names[row["impl"]],
                    f"{row['us'] / 1e3:.1f}",
                    f"{row['peak_extra_gib']:.2f}",
                    *errors,
                ]
            )
    head = ["", "", "ms", "peak GiB beside the inputs", "error of grad_x", "error of grad_weight"]
    return _about(found["meta"]) + "\n\n" + _table(head, rows)


def ptq() -> str:
    """Perplexities before and after post-training quantization, from the reports of ``pyquant quantize``."""
    found = _load("cpu/ptq.json")
    texts = found["meta"]["texts"]
    rows = [
        [
            r["recipe"],
            *(f"{r['perplexity'][t]['quantized' if r['recipe'] != 'full precision' else 'fp']:.2f}" for t in texts),
        ]
        for r in found["rows"]
    ]
    about = f"{found['meta']['about']} {found['meta']['gpu']}, commit {found['meta']['commit'][:12]}."
    return about + "\n\n" + _table(["recipe", *texts], rows)


def end_to_end(found: dict | None = None) -> str:
    """Decode and prefill of the 8B shape, from benchmarks/end_to_end.py."""
    found = found or _load("h200/end_to_end.json")
    impls = {"pyquant": "pyquant", "bf16": "bf16", "tinygemm": "torch tinygemm int4"}
    decode: dict[int, dict[str, float]] = {}
    first: dict[str, float] = {}
    for row in found["rows"]:
        if row["op"] == "prefill":
            first[row["impl"]] = row["ms"]
        else:  # of several ways to run a peer the faster one
            speeds = decode.setdefault(row["batch"], {})
            speeds[row["impl"]] = max(row["tok_s"], speeds.get(row["impl"], 0.0))
    rows = [
        [f"decode, batch {batch}, tokens/s", *(f"{speeds[i]:.0f}" if i in speeds else "-" for i in impls)]
        for batch, speeds in sorted(decode.items())
    ]
    length = next((r["context"] for r in found["rows"] if r["op"] == "prefill"), None)
    if first:
        rows.append([f"prefill of {length}, ms", *(f"{first[i]:.1f}" if i in first else "-" for i in impls)])
    return _about(found["meta"]) + "\n\n" + _table(["", *impls.values()], rows)


def arms(model: str, texts: tuple[str, ...] = ("books", "wikitext2", "tinystories")) -> str:
    """Every format and arm of ``benchmarks.ptq`` (and of ``benchmarks.peers_ptq``, where its file is there): means over
    seeds with half of the 95 % interval."""
    found = _measured(f"ptq-{model}")
    rows = list(found["rows"])
    if any((RESULTS / f"{on}/peers-{model}.json").is_file() for on in PLACES):
        rows += _measured(f"peers-{model}")["rows"]
    cells = []
    order = list(ARMS)
    for row in sorted(
        summary(rows),
        key=lambda r: (_FORMATS.index(r["spec"]), order.index(r["arm"]) if r["arm"] in ARMS else len(order)),
    ):
        values = []
        for text in texts:
            mean, half = row["texts"][text]["mean"], row["texts"][text]["half"]
            values.append(f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}")
        cells.append([row["spec"].removesuffix(" symmetric"), row["arm"], *values, f"{row['seconds']:.1f}"])
    meta = found["meta"]
    full = meta.get("full_precision")
    if full:
        cells.insert(0, ["full precision", "", *(f"{full[text]:.2f}" for text in texts), ""])
    about = (
        f"{meta['model']}, {meta['calibration_tokens']:,} calibration tokens, {meta['eval_windows']} windows of each text, "
        f"mean over seeds ± half of the 95 % interval. {meta['gpu']}, commit {meta['commit'][:12]}."
    )
    return about + "\n\n" + _table(["format", "arm", *texts, "seconds"], cells)


def _from(parts: tuple[str, list[str], list[list[str]]]) -> str:
    about, columns, cells = parts
    return about + "\n\n" + _table(columns, cells)


PLACES = ("h200", "h100", "cpu")  # folders of results, the first that has a file
_FORMATS = ["W4 per channel symmetric", "W4 g128 symmetric", "W3 per channel symmetric", "W3 g128 symmetric"]
_FORMATS += ["W2 g64 symmetric", "W2 g64 asymmetric"]


def _measured(name: str) -> dict:
    """A file of results by its GPU where it was measured on one, else by the CPU."""
    return _load(next(p for p in (f"{on}/{name}.json" for on in PLACES) if (RESULTS / p).is_file()))


def signals() -> str:
    """Signals by kind of projection, from ``benchmarks.signals``."""
    found = _measured("signals")
    meta = found["meta"]
    arms = {row["arm"]: row["kinds"] for row in found["rows"]}
    full, quantized = arms["fp"], arms["ptq"]
    trained = ["fp, trained", "kd-qat", "kd-qat, frozen v_proj,o_proj"]
    cells = []
    for kind, q in quantized.items():
        spikes = [f"{arms[arm][kind]['spike']:.2f}" for arm in trained]
        numbers = [
            f"{q[key]:.{digits}f}" for key, digits in (("ratio", 2), ("cosine", 3), ("deviation", 2), ("excess", 2))
        ]
        norms = [f"{cell[kind]['norm_sq']:.2g}" for cell in (full, quantized)]
        cells.append([kind, *norms, *numbers, f"{q['snr_db']:.1f}", *spikes])
    about = (
        f"{meta['model']}, {meta['spec']}, {found['rows'][0]['seeds']} seeds; probe of {meta['probe_batches']} x "
        f"{meta['batch_size']} windows of {meta['seq_len']} tokens; {meta['steps']} steps of {meta['batch_size']} such "
        f"windows. {meta['gpu']}, commit {meta['commit'][:12]}."
    )
    head = ["projection", "norm² fp", "norm² W4", "ratio", "cosine", "deviation", "excess", "SNR, dB"]
    head += ["spike fp", "spike KD-QAT", "spike ov-freeze"]
    return about + "\n\n" + _table(head, cells)


def signal_tests() -> str:
    """The claim about value and output projections, test by test, with the conclusion."""
    found = _measured("signals")
    cells = [[t["test"][0].upper() + t["test"][1:], t["holds"], t["figures"]] for t in found["tests"]]
    frozen = f"`--freeze {','.join(found['freeze'])}`" if found["freeze"] else "nothing"
    about = f"{found['overall']} What the measurement suggests to freeze: {frozen}."
    return about + "\n\n" + _table(["test", "holds", "means over seeds"], cells)


def signal_losses() -> str:
    """Losses on the probe of each arm of ``benchmarks.signals``."""
    cells = []
    for row in _measured("signals")["rows"]:
        values = [row["loss"][key] for key in ("kl", "ce")]
        shown = [f"{v['mean']:.4f}" + ("" if v["half"] is None else f" ± {v['half']:.4f}") for v in values]
        cells.append([row["arm"], *shown])
    return "Nats a token, mean over seeds ± half of the 95 % interval.\n\n" + _table(
        ["arm", "KL to full precision", "cross entropy"], cells
    )


def tasks() -> str:
    """Scores of full precision and of W4 on the local task sets, from ``benchmarks.tasks``."""
    found = _measured("tasks")
    meta = found["meta"]
    cells = []
    for r in found["rows"]:
        scale, digits = (100, 2) if r["unit"] == "points" else (1, 3)
        values = []
        for which in "ab":
            error = r[f"{which}_stderr"]
            spread = "" if error is None else f" ± {scale * error:.{digits}f}"
            values.append(f"{scale * r[which]:.{digits}f}{spread}")
        half = "" if r["half"] is None else f" ± {r['half']:.2f}"
        cells.append(
            [r["task"], r["metric"], *values, f"{r['difference']:+.2f}{half} {r['unit']}", str(r["documents"])]
        )
    limit = "all documents" if meta["limit"] is None else f"at most the first {meta['limit']} documents of each set"
    about = (
        f"{meta['model']}, {meta['spec']}, {limit}, 0-shot, {meta['dtype']}; ± one standard error, and for the paired "
        f"difference half of its 95 % interval. {meta['gpu']}, commit {meta['commit'][:12]}."
    )
    return about + "\n\n" + _table(["task", "metric", "full precision", "W4", "difference", "documents"], cells)


def kv_quality() -> str:
    """Perplexity over a cache of few bits and greedy tokens equal to those of a 16-bit one, a row an arm."""
    found = _measured("kv_quality")
    meta, rows = found["meta"], []
    texts = list(found["rows"][0]["perplexity"])
    for r in found["rows"]:
        equal = [f"{100 * r['equal']:.0f} %", f"{r['before']:.0f}"] if "equal" in r else ["", ""]
        rows.append([str(r["bits"]), _kept(r), *(f"{r['perplexity'][t]:.2f}" for t in texts), *equal])
    about = (
        f"{meta['model']}, {meta['length']} tokens a window, {meta['windows']} windows of each text; {meta['prompts']} "
        f"prompts of {meta['prompt']} tokens, {meta['new']} greedy tokens each. {meta['gpu'].split(',')[0]}, {meta['dtype']}, "
        f"{meta['date']}, commit {meta['commit'][:12]}."
    )
    head = ["bits", "kept in 16 bits", *texts, "tokens equal", "before the first other"]
    return about + "\n\n" + _table(head, rows)


def _kept(row: dict) -> str:
    return "everything" if row["bits"] == 16 else f"first {row['prompt']}, newest {row['window']}"


def kv_needle() -> str:
    """Retrieval by bits, protection and depth, from ``benchmarks.kv_quality``."""
    found = _measured("kv_quality")
    meta, cells = found["meta"], []
    for (bits, prompt, window), gains, first in summary_of_needles(found["needles"]):
        kept = _kept({"bits": bits, "prompt": prompt, "window": window})
        sign = "" if bits == 16 else "+"
        shown = [f"{g['mean']:{sign}.2f} ± {g['half']:.2f}" for g in gains]
        cells.append([str(bits), kept, *shown, f"{first['mean']:.0f} ± {first['half']:.0f} %"])
    seeds = len({r["seed"] for r in found["needles"]})
    about = (
        f"{meta['model']}, texts of {meta['needle_length']} tokens, {seeds} seeds of {found['needles'][0]['needles']} names; "
        "nats that the sentence adds to a piece of the name by the share of text before it: in 16 bits, and as change against "
        f"them; mean over seeds ± half of the 95 % interval. {meta['gpu'].split(',')[0]}, {meta['dtype']}, {meta['date']}, "
        f"commit {meta['commit'][:12]}."
    )
    depths = [f"{100 * d:.0f} %" for d in DEPTHS]
    return about + "\n\n" + _table(["bits", "kept in 16 bits", *depths, "first of 16"], cells)


TABLES: dict[str, Callable[[], str]] = {
    "kv_quality": kv_quality,
    "kv_needle": kv_needle,
    "linear": linear,
    "linear_backward": linear_backward,
    "attention_kv4": lambda: _of_kernels("attention_kv4", attention_table),
    "linear_w4a8": lambda: _of_kernels("linear_w4a8", w4a8_table),
    "fake_quant": fake_quant,
    "distill": distill,
    "ptq": ptq,
    "end_to_end": end_to_end,
    "signals": signals,
    "signal_tests": signal_tests,
    "signal_losses": signal_losses,
    "tasks": tasks,
}
TABLES |= {
    "qat": lambda: _from(qat_table(_measured("qat"))),
    "qat_best": lambda: _from(best_table(_measured("qat_best"), _measured("qat"))),
    "qat_large": lambda: _from(large_table(_load("h200/qat_large.json"))),
    "plan": lambda: _from(plan_table()),
    "several_gpus": lambda: _from(several_table(_measured("several_gpus"))),
}
TABLES |= {
    f"bisup_{short}": lambda name=name: _from(bisup_table([_measured(f"bisup-{name}-{s}") for s in ("w3a3", "w4a4")]))
    for short, name in (("28m", "classics-llama-28m"), ("260k", "stories260K"))
}
TABLES |= {"arms_28m": partial(arms, "classics-llama-28m"), "arms_260k": partial(arms, "stories260K")}


def fill(readme: str) -> str:
    """README with every marked table made anew.

    Raises:
        ValueError: for a mark that names no table.
    """

    def one(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"README marks a table {name!r}; known: {', '.join(TABLES)}")
        return f"<!-- table {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", one, readme, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when README does not match the results")
    args = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = fill(old)
    if args.check and new != old:
        raise SystemExit("README's tables do not match benchmarks/results: run python -m benchmarks.tables")
    path.write_text(new)


if __name__ == "__main__":
    main()
