"""README's tables of the attention over a low-bit cache and of the product with 8-bit activations."""

from __future__ import annotations

from typing import Any

Parts = tuple[list[str], list[list[str]]]
PEERS = {"torch-cudnn-bf16": "SDPA cuDNN, bf16", "torch-flash-bf16": "SDPA flash, bf16"}
FLASHINFER = {  # the fastest of its kernels that ran
    "flashinfer, bf16": ("flashinfer-bf16", "flashinfer-tc-bf16", "flashinfer-xqa-bf16"),
    "flashinfer, e4m3": ("flashinfer-e4m3", "flashinfer-xqa-e4m3"),
}


def attention_table(found: dict[str, Any]) -> Parts:
    """Columns and rows: microseconds of a decode step's attention by heads, batch and context."""
    cells: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        if row["op"] != "attention_kv4" or row.get("sliding_window"):
            continue
        key = row["heads"], row["kv_heads"], row["D"], row["B"], row["context"]
        name = f"{row['bits']} bit" if row["impl"] == "pyquant" else row["impl"]
        cells.setdefault(key, {})[name] = row
    rows = []
    others = {head: impls for head, impls in FLASHINFER.items() if any(i in by for by in cells.values() for i in impls)}
    for (heads, kv_heads, size, batch, context), by in cells.items():
        ours = by["4 bit"]
        us = [f"{by[i]['us']:.1f}" if i in by else "-" for i in ("8 bit", "3 bit", "2 bit", *PEERS)]
        for impls in others.values():
            theirs = [by[i]["us"] for i in impls if i in by]
            us.append(f"{min(theirs):.1f}" if theirs else "-")
        best = min(by[i]["us"] for i in PEERS if i in by)
        shape = [f"{heads}/{kv_heads}, {size}", f"{batch} x {context:,}"]
        rows.append([*shape, f"{ours['roof_us']:.1f}", f"**{ours['us']:.1f}**", *us, f"{best / ours['us']:.1f}x"])
    head = ["query/KV heads, D", "batch x context", "roof, 4 bit", "4 bit", "8 bit", "3 bit", "2 bit", *PEERS.values()]
    return [*head, *others, "over the faster SDPA" if others else "over the faster"], rows


def w4a8_table(found: dict[str, Any]) -> Parts:
    """Columns and rows: microseconds of linear_w4a8 by shape and tokens, with the activation's quantization beside it."""
    cells: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        cells.setdefault((row["K"], row["N"], row["M"]), {})[row["impl"]] = row
    names = {
        "pyquant-int8": "int8", "pyquant-e4m3": "e4m3", "quantize_activation-int8": "quantize_activation",
        "cublas-bf16": "cuBLAS bf16",
    }  # fmt: skip
    peers = {"humming-int8": "humming int8", "humming-e4m3": "humming e4m3"}
    names |= {i: name for i, name in peers.items() if any(i in by for by in cells.values())}
    rows = []
    for (k, n, m), by in cells.items():
        us = [f"{by[i]['us']:.1f}" if i in by else "-" for i in names]
        over = by["cublas-bf16"]["us"] / by["pyquant-int8"]["us"]
        rows.append([f"{k} x {n}", str(m), f"{by['pyquant-int8']['roof_us']:.1f}", *us, f"{over:.2f}x"])
    return ["K x N", "M", "roof", *names.values(), "over cuBLAS"], rows
