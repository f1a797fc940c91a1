"""Weight-activation quantization as it is run: the grid of arms, the benchmark, the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny import learnable_tokens, shared, some_tokens, tiny_llama
from trained import make_tiny_model, tiny_text
from transformers import AutoModelForCausalLM, AutoTokenizer
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
from pyquant.integrations.bisup import apply_activations, run_activations
from pyquant.integrations.blockwise import Windows
from pyquant.integrations.config import BiSupSettings, load_config
from pyquant.integrations.data import windows
from pyquant.integrations.evaluate import perplexity
from pyquant.integrations.pipeline import quantize
from pyquant.integrations.transformers import load_model
from pyquant.nn import QLinear
from pyquant.recipes.bisup import BiSup
from pyquant.recipes.rtn import dequantize_model

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
    assert len(resolve_bisup(list(benchmark.TUNE))) == len(benchmark.TUNE)
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


def config(work: Path, out: Path, **changes):
    fields = {
        "model": str(work / "model"), "out": str(out), "recipe": "bisup", "bits": 3, "group_size": 32,
        "calibration": str(work / "calibration.txt"), "eval": (str(work / "evaluation.txt"),), "eval_windows": 8,
        "eval_length": 32, "bisup.steps": 8, "bisup.windows": 16, "bisup.seq_len": 24, "bisup.batch_size": 4,
        "bisup.act_bits": 3, **changes,
    }  # fmt: skip
    return load_config(None, fields)


def test_sections_are_the_recipes():
    mine = BiSupSettings().model_dump(exclude={"windows", "seq_len", "prompt", "kv_bits", "storage"})
    theirs = asdict(BiSup())
    theirs.pop("seed")
    assert mine == theirs


def test_from_a_checkpoint_to_a_folder_and_back(work, tmp_path):
    """The folder is that of any weights-only recipe; with activations.json it is the measured model, exactly."""
    made = quantize(config(work, tmp_path / "a", **{"bisup.prompt": "the old red fox", "bisup.kv_bits": 4}))
    bare = quantize(config(work, tmp_path / "b", **{"bisup.parts": "", "bisup.steps": 0}))
    assert made.max_difference == 0
    assert made.rows[0]["quantized"] < bare.rows[0]["quantized"]
    assert "behind" in made.rows[1]["text"]
    assert made.rows[1]["quantized"] > made.rows[1]["fp"]
    assert any("3 bits" in note and "activations.json" in note for note in made.notes)
    assert [row["blocks"] for row in made.blocks] == [[0, 0], [1, 1]]
    model = load_model(tmp_path / "a", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    rows = windows(tokenizer, (work / "evaluation.txt").read_text(), 32, 8)
    without = perplexity(model, rows)
    hooks = apply_activations(model, tmp_path / "a")
    assert perplexity(model, rows) == pytest.approx(made.rows[0]["quantized"], rel=1e-6)
    assert without < perplexity(model, rows)
    for hook in hooks:
        hook.remove()
    assert perplexity(model, rows) == without
    assert run_activations(model, tmp_path / "a") == 14
    # the same codes; fp32 sums in another order move a perplexity by far less than rounding inputs does
    assert perplexity(model, rows) == pytest.approx(made.rows[0]["quantized"], rel=1e-5)
    for layer in model.modules():
        if isinstance(layer, QLinear):
            layer.act = None
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    dequantize_model(model)
    with torch.no_grad():
        assert torch.equal(model(rows).logits, theirs(rows).logits)
    with pytest.raises(FileNotFoundError, match=r"no activations\.json"):
        apply_activations(model, work / "model")


def test_a_killed_run_goes_on(work, tmp_path, monkeypatch):
    whole = quantize(config(work, tmp_path / "whole"))
    save = Windows.save

    def dying(self, index, tensors, row):
        save(self, index, tensors, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(Windows, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize(config(work, tmp_path / "cut"))
    monkeypatch.setattr(Windows, "save", save)
    again = quantize(config(work, tmp_path / "cut", resume=True))
    assert again.rows[0]["quantized"] == whole.rows[0]["quantized"]
    a, b = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("whole", "cut"))
    assert [f.read_bytes() for f in a] == [f.read_bytes() for f in b]
    with pytest.raises(ValueError, match=r"bisup\.rank was 16, is 4"):
        monkeypatch.setattr(Windows, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            quantize(config(work, tmp_path / "other"))
        quantize(config(work, tmp_path / "other", resume=True, **{"bisup.rank": 4}))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"bisup.host": "quarot"}, "host quarot rotates inputs"),
        ({"bisup.host": "atom"}, "host atom keeps some channels"),
        ({"symmetric": False}, "symmetric weights only"),
        ({"calibration": None}, "needs text"),
    ],
)
def test_what_no_folder_holds_is_refused_before_work(work, tmp_path, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        quantize(config(work, tmp_path / "x", **wrong))
    assert not list(tmp_path.iterdir())


def test_the_command_line(work, tmp_path):
    args = ["quantize", work / "model", "--recipe", "bisup", "--calibration", work / "calibration.txt", "--out"]
    args += [tmp_path / "o", "--bits", 4, "--group-size", 32, "--act-bits", 8, "--parts", "clip,smooth", "--steps", 2]
    args += ["--calibration-windows", 4, "--calibration-length", 24, "--batch-size", 4, "--prompt", "the old"]
    args += ["--eval", work / "evaluation.txt", "--eval-windows", 2, "--eval-length", 32, "--set", "bisup.rank=4"]
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    assert "behind" in done.output
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["config"]["bisup"]["parts"] == ["clip", "smooth"]
    assert json.loads((tmp_path / "o" / "activations.json").read_text())["bits"] == 8


def test_analyze_errors(work, tmp_path):
    args = ["analyze", work / "model", "--errors", "--calibration", work / "calibration.txt", "--out", tmp_path / "o"]
    args += ["--bits", 3, "--group-size", 32, "--act-bits", 3, "--kv-bits", 16, "--steps", 12, "--batch-size", 2]
    args += ["--seq-len", 24, "--probe-batches", 4]
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    curves = json.loads((tmp_path / "o" / "errors.json").read_text())["curves"]
    assert list(curves) == ["rtn", "quarot", "rtn + BiSup", "quarot + BiSup"]
    for host in ("rtn", "quarot"):
        assert curves[f"{host} + BiSup"]["total"][-1] < curves[host]["total"][-1]
    assert (tmp_path / "o" / "errors.svg").is_file()
    assert "Error by depth" in (tmp_path / "o" / "report.html").read_text()
    done = CliRunner().invoke(app, [str(a) for a in [*args, "--host", "awq"]])
    assert done.exit_code == 1
    assert "host='awq'" in done.output
