"""Quantization-aware training from the command line, whole runs on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
from trained import make_tiny_model, tiny_text
from typer.testing import CliRunner

from pyquant.cli import app
from pyquant.integrations.ablate_qat import grid


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat")
    make_tiny_model(folder / "model")
    (folder / "train.txt").write_text(tiny_text(600, seed=2))
    (folder / "eval.txt").write_text(tiny_text(300, seed=1))
    return folder


def pyquant(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    return result


def training(work, recipe, *more):
    return (
        *("quantize", work / "model", "--recipe", recipe, "--bits", "2", "--group-size", "32", "--device", "cpu"),
        *(
            "--calibration",
            work / "train.txt",
            "--steps",
            "30",
            "--batch-size",
            "4",
            "--seq-len",
            "32",
            "--warmup",
            "2",
        ),
        *("--lr", "2e-3", "--scale-lr", "1e-3", "--eval", work / "eval.txt", "--eval-length", "32", *more),
    )


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("kd-qat", ("--set", "kd.activation_bits=8", "--set", "kd.head_bits=8", "--set", "kd.embedding_bits=8")),
        (
            "kd-qat",
            ("--freeze", "0.v_proj,1.o_proj", "--freeze-at", "10", "--set", "kd.weights=bf16", "--set", "kd.jsd=1"),
        ),
        ("soft-qat", ("--rounding", "sigmoid-b", "--set", "soft.schedule=linear", "--set", "soft.end=8")),
        ("soft-qat", ("--set", "soft.soft_forward=true", "--set", "soft.beta=8", "--kl", "1", "--ov-freeze")),
    ],
    ids=["eight-bits", "freeze-at", "soft", "soft-forward"],
)
def test_what_is_reported_is_loaded(work, tmp_path, recipe, more):
    pyquant(*training(work, recipe, *more, "--out", tmp_path / "q"))
    facts = json.loads((tmp_path / "q" / "report.json").read_text())
    (row,) = facts["rows"]
    assert facts["max_difference"] == 0
    again = pyquant("eval", tmp_path / "q", work / "eval.txt", "--length", "32", "--device", "cpu", "--json")
    assert json.loads(again.stdout)["rows"][0]["perplexity"] == pytest.approx(row["quantized"], rel=1e-6)
    history = facts["history"]
    assert len(history) == 30
    assert ("kl" in history[0]) == ("--kl" in more or recipe == "kd-qat")
    assert ("jsd" in history[0]) == ("kd.jsd=1" in more)
    rtn = pyquant(*training(work, "rtn", "--out", tmp_path / "r"))
    untrained = json.loads((tmp_path / "r" / "report.json").read_text())["rows"][0]["quantized"]
    losses = [r["loss"] for r in history]
    assert sum(losses[-5:]) < sum(losses[:5])
    if "kl" in history[0]:  # thirty steps of cross entropy on a few sentences end above it
        assert row["quantized"] < untrained, rtn.output
    if "--freeze" in more:
        assert facts["frozen"] == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.o_proj"]
    assert any("16-bit inputs" in note for note in facts["notes"]) == ("kd.activation_bits=8" in more)
    if "--ov-freeze" in more:
        assert len(facts["frozen"]) == 4


def test_arithmetic_in_bf16_keeps_the_positions(work, tmp_path):
    """Rotary frequencies are no weights: rounded with them, positions would be others than those that a loader computes."""
    pyquant(*training(work, "rtn", "--dtype", "bfloat16", "--out", tmp_path / "q"))
    facts = json.loads((tmp_path / "q" / "report.json").read_text())
    assert facts["max_difference"] == 0
    shown = pyquant("eval", tmp_path / "q", work / "eval.txt", "--length", "32", "--dtype", "bfloat16", "--json")
    assert json.loads(shown.stdout)["rows"][0]["perplexity"] == pytest.approx(facts["rows"][0]["quantized"], rel=1e-6)


def test_wrong_requests_are_sentences(work, tmp_path):
    for more, words in (
        (("--set", "kd.head_bits=8"), "embeddings and head are one tensor"),
        (("--set", "kd.head_bits=4"), "kd.head_bits=4"),
        (("--optim", "adamw_8bit"), "needs the package bitsandbytes"),
        (("--set", "kd.feature_layers=[7]", "--set", "kd.features=1"), "no block 7 among 2"),
    ):
        ran = pyquant(*training(work, "kd-qat", *more, "--overwrite", "--out", tmp_path / "q"), code=1)
        assert words in ran.stderr, ran.stderr
        assert not (tmp_path / "q").exists()


def test_ablate_qat(work, tmp_path):
    args = ("ablate", work / "model", "--recipe", "qat", "--calibration", work / "train.txt", "--out", tmp_path / "o")
    args += ("--eval", work / "eval.txt", "--bits", "2", "--group-size", "32", "--seeds", "2", "--steps", "12")
    args += ("--calibration-length", "32", "--batch-size", "4", "--eval-windows", "4", "--device", "cpu")
    args += (
        "--arm",
        "kd",
        "--arm",
        "rtn",
        "--arm",
        "slow=kd,lr:1e-4",
        "--grid",
        "lr=1e-3,3e-3",
        "--grid",
        "loss.ce=0,1",
    )
    ran = pyquant(*args)
    rows = json.loads((tmp_path / "o" / "rows.json").read_text())["rows"]
    assert len(rows) == 2 * 8 + 1
    assert {r["arm"] for r in rows if r["arm"].startswith("kd")} == {
        f"kd lr:{lr} loss.ce:{ce}" for lr in ("1e-3", "3e-3") for ce in (0, 1)
    }
    assert "against kd lr:1e-3 loss.ce:0" in ran.output
    assert "quantization-aware training" in (tmp_path / "o" / "report.html").read_text()
    assert torch.tensor([r["perplexity"]["eval"] for r in rows]).unique().numel() == 9, (
        "slow is kd where lr is the grid's"
    )
    before = (tmp_path / "o" / "rows.json").read_bytes()
    pyquant(*args)
    assert (tmp_path / "o" / "rows.json").read_bytes() == before
    assert "no arms; known: blockwise, qat" in pyquant(*args, "--recipe", "gptq", code=1).stderr


def test_grids():
    assert grid(["kd"], []) == ["kd"]
    assert grid(["kd", "a=kd,lr:1"], ["loss.kl=0,1"]) == [
        "kd loss.kl:0=kd,loss.kl:0", "kd loss.kl:1=kd,loss.kl:1",
        "a loss.kl:0=kd,lr:1,loss.kl:0", "a loss.kl:1=kd,lr:1,loss.kl:1",
    ]  # fmt: skip
    assert (
        grid(["kd"], ['freeze=[],["v_proj","o_proj"]'])[1]
        == 'kd freeze:["v_proj","o_proj"]=kd,freeze:["v_proj","o_proj"]'
    )
    with pytest.raises(ValueError, match="write key=value"):
        grid(["kd"], ["lr"])
