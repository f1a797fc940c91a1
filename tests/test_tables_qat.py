"""README's table of the best training arms: rows of two files, without the tuning text, over one bar."""

from __future__ import annotations

from benchmarks.tables_qat import TEXTS, best_table


def row(arm, spec, seed, books, tuning=None):
    values = dict.fromkeys(TEXTS, 50.0) | {"books": books} | ({} if tuning is None else {"tuning": tuning})
    return {"arm": arm, "spec": spec, "seed": seed, "perplexity": values, "seconds": 1.0}


def test_best_arms_stand_beside_equal_parts_and_the_control():
    meta = {
        "model": "m", "steps": 600, "tokens_a_step": 4096, "eval_windows": 64, "gpu": "G", "commit": "c" * 40,
        "full_precision": dict.fromkeys(TEXTS, 33.0) | {"tuning": 38.0},
    }  # fmt: skip
    w3, w4 = "W3 per channel symmetric", "W4 per channel symmetric"
    found = {"meta": meta, "rows": [row("mine", w3, seed, 32.0 + seed, tuning=40.0) for seed in (0, 1)]}
    measured = {"rows": [
        row("control", "not quantized", 0, 32.0), row("kd", w3, 0, 34.0), row("kd", w4, 0, 33.0), row("kd-ov", w3, 0, 33.0),
    ]}  # fmt: skip
    _, head, cells = best_table(found, measured)
    assert head == ["format", "arm", "seeds", *TEXTS, "books, over"]
    assert [c[1] for c in cells] == ["", "control: trained without quantization", "KD-QAT: KL + CE", "mine"]
    assert [c[-1] for c in cells] == ["+3.1 %", "+0.0 %", "+6.2 %", "+1.6 %"]
    assert cells[3][3] == "32.50 ± 0.71"
