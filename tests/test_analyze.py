"""``pyquant analyze`` on a tiny model: every arm, resuming, refusals, and a report that says what was measured."""

import json
import math

import pytest
import torch
from tiny import learnable_tokens, tiny_llama
from trained import make_tiny_model, tiny_text
from typer.testing import CliRunner

from benchmarks.signals import summarize
from pyquant.analysis.signal import gradients, projections
from pyquant.cli import app
from pyquant.integrations.commands import load_any
from pyquant.integrations.data import windows
from pyquant.integrations.signals import SignalConfig, train_watched
from pyquant.integrations.signals_report import conclusions, overall, pictures, signal_table
from pyquant.recipes.kd_qat import KDLoss, kd_loss
from pyquant.report import Panels, panel_figure, save_figure

FROZEN = "kd-qat, frozen v_proj,o_proj"
ARMS = ["fp", "ptq", "fp, trained", "kd-qat", FROZEN]


def pyquant(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyze")
    make_tiny_model(folder / "model")
    (folder / "text.txt").write_text(tiny_text(600, seed=2))
    pyquant("quantize", folder / "model", "--recipe", "rtn", "--bits", "3", "--group-size", "-1", "--range", "mse",
            "--out", folder / "w3", "--device", "cpu")  # fmt: skip
    return folder


def flags(work, out, *more):
    sizes = (
        "--bits",
        "3",
        "--steps",
        "3",
        "--seeds",
        "2",
        "--batch-size",
        "2",
        "--seq-len",
        "24",
        "--probe-batches",
        "2",
    )
    return (
        "analyze",
        work / "model",
        "--calibration",
        work / "text.txt",
        "--out",
        out,
        "--device",
        "cpu",
        *sizes,
        *more,
    )


@pytest.fixture(scope="module")
def ran(work):
    printed = pyquant(*flags(work, work / "out", "--checkpoint", f"w3={work / 'w3'}")).stdout
    return printed, json.loads((work / "out" / "rows.json").read_text())


def test_every_arm_and_what_must_hold_between_them(ran):
    _, held = ran
    rows = {(r["arm"], r["seed"]): r for r in held["rows"]}
    assert list(rows) == [(arm, seed) for seed in (0, 1) for arm in [*ARMS, "w3"]]
    for seed in (0, 1):
        fp, ptq, packed = (rows[arm, seed] for arm in ("fp", "ptq", "w3"))
        assert all(r["ratio"] == 1 and r["deviation"] == 0 and r["snr_db"] is None for r in fp["layers"])
        assert fp["loss"]["kl"] == 0
        assert all(r["deviation"] > 0 and r["snr_db"] < 40 for r in ptq["layers"])
        # the exported rtn checkpoint is ptq but for scales in 16 bits (2^-9 relative, and the codes that this moves)
        assert packed["loss"]["ce"] == pytest.approx(ptq["loss"]["ce"], rel=1e-2)
        for arm in ARMS[2:]:
            trained = rows[arm, seed]
            assert len(trained["losses"]) == 3 and len(trained["curves"]["q_proj"]) == 3
            assert trained["spikes"].keys() == {r["name"] for r in trained["layers"]}  # frozen ones too
            assert all(v >= 1 for v in trained["spikes"].values())
        assert not fp["spikes"] and not ptq["curves"]
        # the first step of both is taken by the same model on the same batch, but for the frozen scales' rounding
        assert rows["kd-qat", seed]["losses"][0] == pytest.approx(rows[FROZEN, seed]["losses"][0], rel=1e-2)
        # no distillation loss in the control's first step: 0.5 of the cross entropy is less than the student's
        assert rows["fp, trained", seed]["losses"][0] < rows["kd-qat", seed]["losses"][0]
    assert rows["ptq", 0]["layers"] != rows["ptq", 1]["layers"]  # other windows


def test_what_is_printed_and_written(ran, work):
    printed, held = ran
    page = (work / "out" / "report.html").read_text()
    for line in conclusions(held["rows"]):
        assert line in printed
    assert overall(held["rows"]) in printed
    assert "Squared gradient norms over training" in page and "v_proj" in page
    assert {p.name for p in (work / "out").glob("*.svg")} == {
        f"{p.title.lower().replace(' ', '-')}.svg" for p in pictures(held["rows"])
    }
    columns, cells = signal_table(held["rows"])
    assert len(cells) == 7 * 6 and all(len(line) == len(columns) for line in cells)


def test_the_summary_of_the_benchmark(ran):
    _, held = ran
    found = summarize(held, {"commit": "c"})
    assert [row["arm"] for row in found["rows"]] == [*ARMS, "w3"]
    ptq = [r for r in held["rows"] if r["arm"] == "ptq"]
    kl = sum(r["loss"]["kl"] for r in ptq) / 2
    assert found["rows"][1]["loss"]["kl"]["mean"] == pytest.approx(kl)
    snr = [layer["snr_db"] for r in ptq for layer in r["layers"] if layer["kind"] == "v_proj"]
    assert found["rows"][1]["kinds"]["v_proj"]["snr_db"] == pytest.approx(sum(snr) / len(snr), rel=1e-4)
    spikes = [
        max(v for n, v in r["spikes"].items() if n.endswith("v_proj")) for r in held["rows"] if r["arm"] == "kd-qat"
    ]
    assert found["rows"][3]["kinds"]["v_proj"]["spike"] == pytest.approx(sum(spikes) / 2)
    assert found["rows"][0]["kinds"]["v_proj"]["spike"] is None
    assert len(found["tests"]) == 9 and found["overall"] in found["conclusions"]


def test_it_goes_on_where_it_stopped(ran, work):
    _, held = ran
    out = work / "again"
    out.mkdir()
    cut = {**held, "rows": [r for r in held["rows"] if r["arm"] not in ("kd-qat", "w3")]}
    (out / "rows.json").write_text(json.dumps(cut))
    pyquant(*flags(work, out))
    again = json.loads((out / "rows.json").read_text())["rows"]
    assert len(again) == 10
    for row in again:
        if row["arm"] == "kd-qat":  # computed anew, and to the same numbers
            same = next(r for r in held["rows"] if (r["arm"], r["seed"]) == ("kd-qat", row["seed"]))
            assert {**row, "seconds": 0} == {**same, "seconds": 0}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--seq-len", "4000"), "longer than the model's context"),
        (("--steps", "5000"), "needs 10004"),
        (("--freeze", "nothing"), "freeze='nothing' matches none of the 14 projections"),
        (("--checkpoint", "w3"), "--checkpoint 'w3' must be NAME=FOLDER"),
        (("--checkpoint", "ptq=x"), "is the name of an arm"),
        (("--checkpoint", "a=missing-folder"), "missing-folder"),
        (("--lr", "-1"), "lr=-1.0 must not be negative"),
    ],
)
def test_refusals_come_before_work(work, more, sentence):
    result = pyquant(*flags(work, work / "refused", *more), code=1)
    assert sentence in result.stderr
    assert not (work / "refused").exists()


def test_another_run_in_the_folder_is_refused(ran, work):
    result = pyquant(*flags(work, work / "out", "--lr", "0.5"), code=1)
    assert "lr was 0.0001, is 0.5" in result.stderr


def test_training_is_watched_and_trains():
    student, teacher = tiny_llama(), tiny_llama()
    config = SignalConfig("m", "t", lr=3e-3, warmup_steps=1, max_grad_norm=0.0)
    batches = list(learnable_tokens(24).split(4)) * 3
    norms, losses = train_watched(student, teacher, batches, config)
    assert losses[-1] < 0.8 * losses[0]
    assert norms.keys() == projections(student).keys() and all(len(v) == 18 for v in norms.values())
    # the first step's norm is that of autograd on an untouched copy
    copy = tiny_llama()
    logits = copy(input_ids=batches[0]).logits
    target = batches[0][:, 1:].reshape(-1)
    (0.5 * torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), target)).backward()
    for name, found in norms.items():
        assert found[0] == pytest.approx(copy.get_submodule(name).weight.grad.square().sum().item(), rel=1e-4)
    with pytest.raises(FloatingPointError, match="at step 1"):
        teacher.lm_head.weight.data[0, 0] = math.nan
        train_watched(tiny_llama(), teacher, batches[:1], config)


def test_a_checkpoint_is_measured_as_it_is(ran, work):
    model, tokenizer, quantized = load_any(str(work / "w3"), "cpu", "float32")
    full = load_any(str(work / "model"), "cpu", "float32")[0]
    tokens = windows(tokenizer, (work / "text.txt").read_text(), 24)
    probe = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))[:4]].split(2)
    expected = gradients(model, full, probe, lambda y, _, t: kd_loss(y, y, t, KDLoss(kl=0.0, ce=1.0))[0])[0]
    found = next(r for r in ran[1]["rows"] if (r["arm"], r["seed"]) == ("w3", 1))["layers"]
    assert quantized and len(found) == len(expected) == 14
    for row in found:  # the file holds 6 digits
        assert row["norm_sq"] == pytest.approx(expected[row["name"]].square().sum().item(), rel=1e-5)


def test_panels_are_written_the_same_twice(tmp_path):
    what = Panels(
        "t", "c", "x", "y", {"a": {"one": ([0, 1], [1.0, 10.0])}, "b": {"two": ([0, 1], [2.0, 3.0])}}, log=True
    )
    for name in ("1.svg", "2.svg"):
        save_figure(panel_figure(what), tmp_path / name)
    text = (tmp_path / "1.svg").read_text()
    assert text == (tmp_path / "2.svg").read_text()
    assert ">one<" in text and ">two<" in text
