"""The numbers in README are those in benchmarks/results, and the files there say where they come from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks.ptq import merge
from benchmarks.tables import end_to_end

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


def test_readme_tables_are_generated():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_results_name_machine_and_commit(path):
    found = json.loads(path.read_text())
    assert len(found["meta"]["commit"]) == 40
    assert found["meta"]["gpu"]
    assert found["rows"]


def test_linear_is_faster_than_cublas_for_one_token():
    rows = json.loads((ROOT / "benchmarks/results/h200/linear.json").read_text())["rows"]
    single = [r for r in rows if r["impl"] == "pyquant" and r["M"] == 1]
    assert len(single) == 6
    assert all(r["us"] < r["baseline_us"] for r in single)


def test_the_picture_is_that_of_the_results():
    folder = ROOT / "benchmarks/results/h200"
    found = json.loads((folder / "linear.json").read_text())
    assert plots.draw(found) == (folder / "linear.svg").read_text(), "run python -m benchmarks.plots"
    found["rows"][0]["us"] *= 2
    assert plots.draw(found) != (folder / "linear.svg").read_text()


def test_end_to_end_table():
    rows = [
        {"op": "decode", "impl": "bf16", "batch": 8, "tok_s": 10.0},
        {"op": "decode", "impl": "pyquant", "batch": 1, "tok_s": 31.6},
        {"op": "decode", "impl": "bf16", "batch": 8, "tok_s": 20.0},
        {"op": "prefill", "impl": "pyquant", "batch": 1, "context": 2048, "ms": 7.25},
    ]
    meta = {"gpu": "G", "torch": "2", "date": "d", "commit": "c" * 40, "ceilings": {"read_tbps": 1, "bf16_tflops": 2}}
    lines = end_to_end({"meta": meta, "rows": rows}).splitlines()
    assert lines[-3:] == [
        "| decode, batch 1, tokens/s | 32 | - | - |",
        "| decode, batch 8, tokens/s | - | 20 | - |",
        "| prefill of 2048, ms | 7.2 | - | - |",
    ]


def test_parts_of_a_run_become_one_file(tmp_path):
    def part(i, commit="a"):
        file = tmp_path / f"part{i}.json"
        rows = [{"key": f"arm {i}", "perplexity": {}}, {"key": "in both", "perplexity": {}}]
        file.write_text(json.dumps({"meta": {"model": "m", "commit": commit}, "rows": rows}))
        return file

    merge(tmp_path / "all.json", [part(0), part(1)])
    held = json.loads((tmp_path / "all.json").read_text())
    assert held["meta"] == {"model": "m", "commit": "a"}
    assert [row["key"] for row in held["rows"]] == ["arm 0", "in both", "arm 1"]
    with pytest.raises(ValueError, match="is of another run"):
        merge(tmp_path / "all.json", [part(0), part(1, "b")])
