"""The tables of weight-activation quantization: columns, order, and the share of a gap that is closed."""

from __future__ import annotations

import pytest

from benchmarks.tables_bisup import bisup_table

TEXTS = ("books", "wikitext2", "tinystories")


def row(arm, seed, host, value, behind, storage="none"):
    values = dict.fromkeys(TEXTS, value) | {f"{text}, prompt": behind for text in TEXTS}
    settings = {"host": host, "storage": storage}
    return {
        "arm": arm,
        "spec": "W3 g128 symmetric",
        "seed": seed,
        "settings": settings,
        "perplexity": values,
        "seconds": 1.0,
    }


@pytest.fixture
def found():
    meta = {
        "model": "m", "spec": "w3a3", "calibration_tokens": 2048, "eval_windows": 2, "prompt_tokens": 8, "gpu": "G",
        "commit": "c" * 40, "full_precision": dict.fromkeys(TEXTS, 10.0) | {f"{t}, prompt": 10.0 for t in TEXTS},
    }  # fmt: skip
    rows = [
        row("quarot+both", 0, "quarot", 20.0, 20.0, "both"),
        row("rtn", 0, "rtn", 1000.0, 1000.0),
        row("quarot", 0, "quarot", 40.0, 80.0),
        row("rtn+vertical", 0, "rtn", 90.0, 500.0),
        row("rtn+vertical", 1, "rtn", 110.0, 500.0),
    ]
    return {"meta": meta, "rows": rows}


def test_arms_stand_in_order_with_the_share_of_the_gap(found):
    about, head, cells = bisup_table([found])
    assert "mean over 2 seeds" in about
    assert len(head) == len(cells[0]) == 9
    assert [c[1] for c in cells] == ["full precision", "rtn", "rtn+vertical", "quarot", "quarot+both"]
    assert cells[2][2] == "100.00 ± 127.06"
    shares = [c[8] for c in cells]
    assert shares == ["", "", "50 %", "", "67 %"]  # ln(1000/100) of ln(1000/10); ln(80/20) of ln(80/10)
