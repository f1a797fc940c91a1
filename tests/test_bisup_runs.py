"""Weight-activation quantization as it is run: the grid of arms, the benchmark, the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import learnable_tokens, shared, some_tokens, tiny_llama
from trained import make_tiny_model, tiny_text
from typer.testing import CliRunner

from benchmarks import bisup as benchmark
from pyquant.cli import app
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.ablate import jobs, run_jobs
from pyquant.integrations.ablate_bisup import (
    BISUP_ARMS,
    MAIN,
    BiSupBench,
    bisup_of,
    by_model,
    is_seedless,
    resolve_bisup,
)

QUICK = {"steps": 6, "batch_size": 4}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A trained model and texts."""
    folder = tmp_path_factory.mktemp("bisup")
    make_tiny_model(folder / "model", steps=60)
    (folder / "calibration.txt").write_text(tiny_text(400, 1))
    (folder / "evaluation.txt").write_text(tiny_text(100, 2))
    return folder


def test_arms_of_one_model_quantize_once(tmp_path):
    model = tiny_llama()
    bench = BiSupBench(model, learnable_tokens(12, 24), 8, {"text": some_tokens(4, 24)}, some_tokens(1, 5)[0], 4)
    arms = resolve_bisup(["rtn", "rtn+horizontal", "rtn+vertical", "rtn+both"], {**QUICK, "act_bits": 3})
    todo = jobs(arms, [QuantSpec(3, 32)], 1, [arm for arm, fields in arms.items() if is_seedless(fields)])
    assert [[job.arm for job in group] for group in by_model(todo, arms)] == [
        ["rtn", "rtn+horizontal"],
        ["rtn+vertical", "rtn+both"],
    ]
    assert run_jobs(bench, todo, arms, tmp_path / "rows.json", {"full_precision": bench.measure()}, say=lambda _: None)
    held = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["arm"]: row["perplexity"] for row in held["rows"]}
    assert set(held["meta"]["full_precision"]) == {"text", "text, prompt"}
    assert rows["rtn"]["text"] == rows["rtn+horizontal"]["text"]  # plainly they are one model
    assert rows["rtn"]["text, prompt"] != rows["rtn+horizontal"]["text, prompt"]
    assert rows["rtn+vertical"]["text"] == rows["rtn+both"]["text"] != rows["rtn"]["text"]


def test_arms_and_what_is_refused():
    assert set(MAIN) < set(BISUP_ARMS)
    assert resolve_bisup(["x=quarot+both,rank:4"])["x"]["rank"] == 4
    assert bisup_of({"parts": "clip+smooth"}).parts == ("clip", "smooth")
    for wrong in ("x=quarot,ranks:4", "x=quarot,storage:half", "quorot", "x=rtn,parts:turn"):
        with pytest.raises(ValueError, match=r"ranks|storage='half'|quorot|turn"):
            resolve_bisup([wrong])
    with pytest.raises(ValueError, match="the prompt of 30 tokens leaves nothing of windows of 24"):
        BiSupBench(
            tiny_llama(), learnable_tokens(4), 4, {"t": some_tokens(2, 24)}, torch.zeros(30, dtype=torch.int64), 4
        )


def test_ablate_bisup(work, tmp_path):
    args = ["ablate", work / "model", "--recipe", "bisup", "--calibration", work / "calibration.txt", "--seeds", 1]
    args += [
        "--eval",
        work / "evaluation.txt",
        "--out",
        tmp_path / "o",
        "--bits",
        3,
        "--group-size",
        32,
        "--act-bits",
        3,
    ]
    args += ["--steps", 4, "--calibration-windows", 8, "--calibration-length", 32, "--batch-size", 4]
    args += ["--eval-windows", 2, "--prompt", "the old red fox", "--arm", "rtn", "--arm", "quarot+both"]
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    assert "quarot+both against rtn" in done.output
    assert "weight-activation" in (tmp_path / "o" / "report.html").read_text()


def test_the_benchmark_runs_on_the_small_model(tmp_path, monkeypatch, capsys):
    """stories260K with its own sizes: width 64, 172 = 4 x 43, groups of 32 with a short last one."""
    root = shared("models", "stories260K").parents[1]
    file = tmp_path / "bisup.json"
    args = ["bisup", str(root), "--out", str(file), "--models", "stories260K", "--specs", "w3a3", "--device", "cpu"]
    args += ["--seeds", "1", "--steps", "2", "--calibration-windows", "4", "--eval-windows", "1", "--batch", "1"]
    monkeypatch.setattr(sys, "argv", [*args, "--arms", "rtn", "quarot+both", "atom+horizontal"])
    benchmark.main()
    assert "all rows are there" in capsys.readouterr().out
    held = json.loads((tmp_path / "bisup-stories260K-w3a3.json").read_text())
    assert len(held["rows"]) == 3
    assert held["meta"]["prompt_tokens"] <= 32
    full = held["meta"]["full_precision"]["tinystories"]
    assert all(row["perplexity"]["tinystories"] > full for row in held["rows"])
