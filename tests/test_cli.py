"""The command line: whole runs on a tiny model, and every refusal as one sentence."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained import make_tiny_model, tiny_text
from typer.testing import CliRunner

from pyquant.cli import app
from pyquant.integrations.config import (
    BiSupSettings,
    BlockwiseSettings,
    KDSettings,
    QuantizeConfig,
    SoftSettings,
    known_keys,
    load_config,
    settings_of,
)
from pyquant.integrations.pipeline import kd_config
from pyquant.recipes.kd_loss import KDLoss
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.settings import Settings
from pyquant.recipes.soft_qat import SoftQAT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "eval.txt").write_text(tiny_text(300, seed=1))
    (folder / "train.txt").write_text(tiny_text(600, seed=2))
    (folder / "short.txt").write_text("the old red fox")
    return folder


def pyquant(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    return result


def refused(*args):
    """The one line that a refused command prints."""
    lines = [line for line in pyquant(*args, code=1).stderr.splitlines() if not line.endswith("...")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def small(texts):
    """Flags of a short training."""
    return (
        *("--recipe", "kd-qat", "--bits", "3", "--group-size", "-1", "--calibration", texts / "train.txt"),
        *("--steps", "6", "--batch-size", "2", "--seq-len", "32", "--lr", "1e-3", "--warmup", "1", "--save-steps", "2"),
        *("--device", "cpu", "--seed", "3"),
    )


# ------------------------------------------------------------------------------------------------ whole runs


def test_rtn_end_to_end(model, texts, tmp_path):
    out = tmp_path / "q"
    args = ("quantize", model, "--out", out, "--group-size", "32", "--eval", texts / "eval.txt", "--eval-length", "64")
    result = pyquant(*args, "--eval-windows", "6", "--device", "cpu")
    facts = json.loads((out / "report.json").read_text())
    (row,) = facts["rows"]
    assert row["windows"] == 6
    assert row["length"] == 64
    assert f"{row['quantized']:.3f}" in result.stdout
    assert row["fp"] != row["quantized"]
    assert facts["max_difference"] == 0
    assert facts["kept"] == {"lm_head": "excluded by name"}
    assert len(facts["layers"]) == 14
    assert all(0.03 < layer["relative_error"] < 0.2 for layer in facts["layers"]), "4 bits are neither exact nor lost"
    assert facts["sizes"]["quantized_bytes"] == (out / "model.safetensors").stat().st_size
    assert facts["sizes"]["quantized_bytes"] < facts["sizes"]["fp_bytes"]
    assert "model.layers.0.mlp.down_proj.weight_packed" in load_file(out / "model.safetensors")
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert f"{row['quantized']:.3f}" in page
    assert "pyquant quantize" in page
    assert not (tmp_path / "q.work").exists()

    again = pyquant("eval", out, texts / "eval.txt", "--length", "64", "--windows", "6", "--device", "cpu", "--json")
    measured = json.loads(again.stdout)
    assert measured["quantized"] is True
    assert measured["rows"][0]["perplexity"] == pytest.approx(row["quantized"], rel=1e-6), "what was reported is loaded"
    source = json.loads(pyquant("eval", model, texts / "eval.txt", "--length", "64", "--windows", "6", "--json").stdout)
    assert source["quantized"] is False
    assert source["rows"][0]["perplexity"] == pytest.approx(row["fp"], rel=1e-6)

    words = pyquant("generate", out, "the old", "--max-new-tokens", "8", "--seed", "1", "--device", "cpu").stdout
    same = pyquant("generate", out, "the old", "--max-new-tokens", "8", "--seed", "1", "--device", "cpu").stdout
    other = pyquant("generate", out, "the old", "--max-new-tokens", "8", "--seed", "2", "--device", "cpu").stdout
    assert words.startswith("the old")
    assert words == same != other

    cached = pyquant("generate", out, "the old", "--max-new-tokens", "8", "--seed", "1", "--device", "cpu",
                     "--kv-bits", "16", "--kv-prompt", "all", "--kv-window", "0").stdout  # fmt: skip
    assert cached == words, "a cache that keeps everything changes nothing"

    pyquant("export", out, "--format", "gptq", "--out", tmp_path / "gptq")
    packed, gptq = load_file(out / "model.safetensors"), load_file(tmp_path / "gptq" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(packed[f"{name}.weight_packed"].T, gptq[f"{name}.qweight"])
    regained = pyquant("eval", tmp_path / "gptq", texts / "eval.txt", "--length", "64", "--windows", "6", "--json")
    assert json.loads(regained.stdout)["rows"][0]["perplexity"] == pytest.approx(row["quantized"], rel=1e-6)


def test_kd_qat_trains_freezes_and_beats_rtn(model, texts, tmp_path):
    evaluation = ("--eval", texts / "eval.txt", "--eval-length", "64", "--eval-windows", "8")
    out = tmp_path / "kd"
    flags = [*small(texts), "--ov-freeze", "--kl", "1", "--ce", "0", "--scale-lr", "1e-3", "--save-steps", "100"]
    flags += ["--steps", "40", "--batch-size", "4", "--seq-len", "48"]
    pyquant("quantize", model, "--out", out, *flags, *evaluation)
    kd = json.loads((out / "report.json").read_text())
    assert [row["step"] for row in kd["history"]] == list(range(1, 41))
    kl = [row["kl"] for row in kd["history"]]
    assert sum(kl[-5:]) < 0.5 * sum(kl[:5]), "it learns"
    assert len(kd["frozen"]) == 4
    assert all(name.endswith(("v_proj", "o_proj")) for name in kd["frozen"])
    assert kd["max_difference"] == 0

    plain = ("--bits", "3", "--group-size", "-1", "--device", "cpu")
    pyquant("quantize", model, "--out", tmp_path / "rtn", *plain, *evaluation)
    rtn = json.loads((tmp_path / "rtn" / "report.json").read_text())
    assert kd["rows"][0]["fp"] == rtn["rows"][0]["fp"]
    gap = [math.log(r["rows"][0]["quantized"] / r["rows"][0]["fp"]) for r in (kd, rtn)]
    assert gap[1] > 0.005, "3 bits hurt"
    assert gap[0] < 0.6 * gap[1], gap
    trained, rounded = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "rtn"))
    equal = {}
    for kind in ("v_proj", "q_proj"):
        name = f"model.layers.0.self_attn.{kind}.weight_packed"
        equal[kind] = (trained[name] == rounded[name]).float().mean().item()
    assert equal["v_proj"] > 0.9, "frozen as rounded (a rare code differs: there the range was searched in bf16)"
    assert equal["q_proj"] < 0.8, "trained"


def test_gptq_loses_less_than_rtn(model, texts, tmp_path):
    evaluation = ("--eval", texts / "eval.txt", "--eval-length", "64", "--device", "cpu")
    low = ("--bits", "2", "--group-size", "32")
    calibration = ("--calibration", texts / "train.txt", "--calibration-length", "64", "--calibration-windows", "32")
    pyquant("quantize", model, "--out", tmp_path / "rtn", *low, *evaluation)
    pyquant("quantize", model, "--out", tmp_path / "gptq", "--recipe", "gptq", *low, *calibration, *evaluation)
    rtn, gptq = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("rtn", "gptq"))
    assert gptq["max_difference"] == 0
    gap = [math.log(r["rows"][0]["quantized"] / r["rows"][0]["fp"]) for r in (gptq, rtn)]
    assert 0 < gap[0] < 0.8 * gap[1], gap
    assert [row["name"] for row in gptq["layers"]] == [row["name"] for row in rtn["layers"]]
    assert all(0 < row["relative_error"] < 1 for row in gptq["layers"])


def test_an_interrupted_run_resumes_to_the_same_weights(model, texts, tmp_path, monkeypatch):
    from pyquant.integrations import pipeline

    evaluation = ("--eval", texts / "eval.txt", "--eval-length", "64", "--eval-windows", "4")
    args = ("quantize", model, *small(texts), *evaluation)
    pyquant(*args, "--out", tmp_path / "whole")

    train, calls = pipeline.train_kd, []

    def stop_at_three(*given):
        *head, on_log = given

        def log(row):
            on_log(row)
            if row["step"] == 3:
                raise KeyboardInterrupt

        return train(*head, log)

    measure = pipeline.perplexity
    monkeypatch.setattr(pipeline, "perplexity", lambda *given: calls.append(1) or measure(*given))
    monkeypatch.setattr(pipeline, "train_kd", stop_at_three)
    out = tmp_path / "halves"
    stopped = pyquant(*args, "--out", out, code=130)
    assert re.search(r"continue with: pyquant quantize .*--resume", stopped.stderr)
    assert not out.exists()
    assert (tmp_path / "halves.work" / "trainer" / "checkpoint-2").is_dir()
    monkeypatch.setattr(pipeline, "train_kd", train)

    assert "--resume continues it" in refused(*args, "--out", out)
    assert "kd.lr was 0.001, is 0.01" in refused(*args, "--out", out, "--resume", "--lr", "1e-2")
    assert len(calls) == 1, "the full-precision model was measured"
    pyquant(*args, "--out", out, "--resume")
    assert len(calls) == 2, "and not again"
    assert not (tmp_path / "halves.work").exists()
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    history = [json.loads((tmp_path / n / "report.json").read_text())["history"] for n in ("whole", "halves")]
    assert [r["loss"] for r in history[0]] == [r["loss"] for r in history[1]]


def test_without_a_text_only_weight_errors_are_reported(model, tmp_path):
    out = pyquant("quantize", model, "--out", tmp_path / "q", "--group-size", "32", "--asymmetric").stdout
    assert "accuracy was not measured" in out
    facts = json.loads((tmp_path / "q" / "report.json").read_text())
    assert facts["rows"] == []
    assert len(facts["layers"]) == 14
    assert facts["spec"] == "W4 g32 asymmetric"


def test_a_float32_source_is_stored_in_16_bits(model, texts, tmp_path):
    source = tmp_path / "fp32"
    shutil.copytree(model, source)
    wide = {k: t.float() * (1 + 1e-4) for k, t in load_file(model / "model.safetensors").items()}
    save_file(wide, source / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}))
    flags = ("--group-size", "32", "--eval", texts / "eval.txt", "--eval-length", "64", "--eval-windows", "2")
    pyquant("quantize", source, "--out", tmp_path / "q", *flags)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.bfloat16}
    assert json.loads((tmp_path / "q" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "q" / "report.json").read_text())["max_difference"] == 0


def test_overwrite_replaces(model, tmp_path):
    out = tmp_path / "q"
    flags = ("--group-size", "32", "--exclude", "lm_head", "--exclude", "v_proj")
    pyquant("quantize", model, "--out", out, *flags)
    assert "--overwrite replaces it" in refused("quantize", model, "--out", out, *flags)
    before = json.loads((out / "report.json").read_text())
    pyquant("quantize", model, "--out", out, "--group-size", "32", "--overwrite")
    after = json.loads((out / "report.json").read_text())
    assert len(before["kept"]) == 3
    assert len(after["kept"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q"]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("grop_size: 64", ["unknown key 'grop_size'", "did you mean group_size?"]),
        ("kd: {warmup: 3}", ["unknown key 'kd.warmup'", "kd.warmup_steps"]),
        ("steps: 3", ["unknown key 'steps'", "kd.steps"]),
        ("bits: 5", ["bits=5", "less than or equal to 4"]),
        ("group_size: 100", ["group_size=100", "-1, 32, 64 or 128"]),
        ("recipe: awq", ["recipe='awq'", "'rtn', 'gptq', 'blockwise', 'bisup', 'kd-qat' or 'soft-qat'"]),
        ("- 1", ["must hold keys and values"]),
        ("kd: 3", ["kd must hold keys"]),
        ("a: [", ["is not YAML"]),
    ],
)
def test_a_wrong_recipe_file_is_named(yaml, words, model, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml)
    line = refused("quantize", model, "--out", tmp_path / "q", "--config", tmp_path / "recipe.yaml")
    assert "recipe.yaml" in line
    for word in words:
        assert word in line


def test_requests_that_cannot_be_met(model, texts, tmp_path):
    out = tmp_path / "q"
    head = ("quantize", model, "--out", out)
    assert "nowhere" in refused("quantize", tmp_path / "nowhere", "--out", out)
    assert "out is missing" in refused("quantize", model)
    assert "K=64 must be a multiple of group_size=128" in refused(*head)
    fits = (*head, "--group-size", "32")
    line = refused(*fits, "--eval", texts / "short.txt", "--eval-length", "64")
    assert "short.txt has" in line
    assert "too few" in line
    assert "absent.txt" in refused(*fits, "--eval", texts / "absent.txt")
    assert "context of 512" in refused(*fits, "--eval", texts / "eval.txt", "--eval-length", "1024")
    assert "calibration" in refused(*fits, "--recipe", "kd-qat")
    assert "calibration" in refused(*fits, "--recipe", "gptq")
    line = refused(*fits, "--recipe", "gptq", "--calibration", texts / "train.txt", "--calibration-length", "1024")
    assert "gptq.seq_len=1024 is longer than the model's context of 512" in line
    assert "no linear layer matches" in refused(*fits, "--include", "nothing")
    assert "symmetric" in refused(*fits, "--asymmetric", "--format", "gptq")
    assert "freeze='x_proj' matches none" in refused(*head, *small(texts), "--freeze", "x_proj")
    assert "freeze_at=6 is never reached" in refused(*head, *small(texts), "--freeze", "v_proj", "--freeze-at", "6")
    assert "not both" in refused(*head, *small(texts), "--freeze", "v_proj", "--ov-freeze")
    assert list(tmp_path.iterdir()) == [], "nothing was written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_needs_a_gpu_says_so(model, tmp_path):
    assert "no GPU" in refused("quantize", model, "--out", tmp_path / "q", "--group-size", "32", "--device", "cuda")
    assert "no GPU" in refused("bench", model)
    assert "no GPU" in refused("bench", "--shape", "64x128", "--tune")
    assert "is not NxK" in refused("bench", "--shape", "64")


def test_a_failed_check_publishes_nothing(model, texts, tmp_path, monkeypatch):
    from pyquant.integrations import pipeline

    logits = pipeline.probe_logits
    monkeypatch.setattr(pipeline, "probe_logits", lambda *given: logits(*given) + 1e-3)
    flags = ("--group-size", "32", "--eval", texts / "eval.txt", "--eval-length", "64", "--eval-windows", "2")
    line = refused("quantize", model, "--out", tmp_path / "q", *flags)
    assert "does not compute what was evaluated" in line
    assert not (tmp_path / "q").exists()


def test_debug_shows_the_traceback(tmp_path):
    plain = pyquant("quantize", tmp_path / "nowhere", "--out", tmp_path / "q", code=1)
    debug = pyquant("quantize", tmp_path / "nowhere", "--out", tmp_path / "q", "--debug", code=1)
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr


# ------------------------------------------------------------------------------------------------ settings


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: a\nout: b\nbits: 3\neval: one.txt\nkd: {steps: 7, lr: 0.1}\n")
    config = load_config(file, {"bits": 2, "group_size": None, "kd.steps": 9})
    assert (config.bits, config.group_size, config.kd.steps, config.kd.lr) == (2, 128, 9, 0.1)
    assert config.eval == ("one.txt",)


def test_the_training_settings_are_the_trainers():
    ours, theirs = KDSettings().model_dump(), KDConfig()
    elsewhere = {"loss", "rule", "include", "exclude", "skip_experts", "soft", "seed"}
    assert ours.keys() == (theirs.__dataclass_fields__.keys() - elsewhere) | KDLoss.__dataclass_fields__.keys()
    config = QuantizeConfig(model="m", out="o", recipe="kd-qat", calibration="t")
    assert kd_config(config) == KDConfig()
    assert SoftSettings().model_dump() == asdict(SoftQAT())
    soft = kd_config(QuantizeConfig(model="m", out="o", recipe="soft-qat", calibration="t"))
    assert soft == KDConfig(loss=KDLoss(0.0, 1.0), quantizer="soft", soft=SoftQAT())
    with pytest.raises(ValueError, match="quantizer of its own, not 'ste'"):
        kd_config(QuantizeConfig(model="m", out="o", recipe="soft-qat", calibration="t", kd={"quantizer": "ste"}))


def test_any_setting_by_name():
    found = settings_of(["kd.jsd=0.5", "soft.start=2", "kd.feature_layers=[0, -1]", "kd.freeze=[3.v_proj]"])
    config = load_config(None, {"model": "m", "out": "o", "recipe": "soft-qat", "calibration": "t", **found})
    assert (config.kd.jsd, config.soft.start, config.kd.feature_layers) == (0.5, 2.0, (0, -1))
    assert config.kd.freeze == ("3.v_proj",)
    with pytest.raises(ValueError, match=r"unknown key 'kd\.jds'; did you mean kd\.jsd"):
        load_config(None, {"model": "m", "out": "o", **settings_of(["kd.jds=1"])})
    with pytest.raises(ValueError, match=r"--set kd\.jsd: write KEY=VALUE"):
        settings_of(["kd.jsd"])


def test_the_settings_of_blocks_are_the_recipes():
    ours, theirs = BlockwiseSettings().model_dump(), Settings(start="gptq", target="both")
    elsewhere = {"windows", "seq_len", "activations", "gpu_memory", "stream"}
    assert ours.keys() - elsewhere == Settings.__dataclass_fields__.keys() - {"seed"}
    for name in ours.keys() - elsewhere:
        assert getattr(theirs, name) == ours[name], name


def test_every_setting_has_a_flag():
    words = pyquant("quantize", "--help").stdout
    named = {"gptq.windows": "calibration-windows", "gptq.seq_len": "calibration-length"}
    named |= {"blockwise.windows": "calibration-windows", "blockwise.seq_len": "calibration-length"}
    assert "--set" in words
    rare = {"kd.bf16", "gptq.batch_size"}  # of a recipe file, or --set
    rare |= {f"kd.{name}" for name in ("reverse_kl", "jsd", "jsd_beta", "features", "feature_layers", "fused_loss")}
    rare |= {f"kd.{name}" for name in ("activation_bits", "embedding_bits", "head_bits", "weights", "reuse_fake_quant")}
    rare |= {f"kd.{name}" for name in ("train_embeddings", "train_head", "shard_teacher", "keep_gathered")}
    rare |= {f"soft.{name}" for name in ("beta", "soft_forward", "schedule", "start", "end")}
    flagged = {"host", "act_bits", "parts", "prompt", "kv_bits", "steps", "batch_size"}
    rare |= {f"bisup.{name}" for name in BiSupSettings.model_fields if name not in flagged}
    for key in set(known_keys()) - {"kd", "soft", "gptq", "blockwise", "bisup", "model"} - rare:
        flag = "--" + named.get(key, key.rpartition(".")[2].replace("_", "-"))
        assert flag in words, key


def test_settings_that_decide_the_weights_are_fixed():
    rtn = QuantizeConfig(model="m", out="o").fixed()
    assert {"bits", "group_size", "range", "seed"} <= rtn.keys()
    assert not {"out", "eval", "device", "kd.lr"} & rtn.keys()
    for recipe in ("kd-qat", "soft-qat"):
        assert {"kd.lr", "soft.clamp"} <= QuantizeConfig(
            model="m", out="o", recipe=recipe, calibration="t"
        ).fixed().keys()
    gptq = QuantizeConfig(model="m", out="o", recipe="gptq", calibration="t").fixed()
    assert "gptq.damp" in gptq
    assert "kd.lr" not in gptq
    blockwise = QuantizeConfig(model="m", out="o", recipe="blockwise", calibration="t").fixed()
    assert "blockwise.lookahead" in blockwise
    assert not {"blockwise.activations", "blockwise.stream", "blockwise.gpu_memory"} & blockwise.keys()


# ------------------------------------------------------------------------------------------------ the rest


def test_doctor():
    pytest.importorskip("pyquant.doctor")
    assert "linear_w4a16" in pyquant("doctor").stdout
    assert json.loads(pyquant("doctor", "--json").stdout)["ops"]


def test_help_is_quick_and_imports_nothing_heavy():
    began = time.perf_counter()
    shown = subprocess.run([sys.executable, "-m", "pyquant", "--help"], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    for name in ("quantize", "eval", "generate", "export", "bench", "doctor", "demo"):
        assert name in shown.stdout
    assert seconds < 3, "a second on an idle machine; the imports below are the sharp test"
    code = "import sys, pyquant.cli; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
