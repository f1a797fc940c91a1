"""The demo and the script that trains its model, shrunk to seconds."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from trained import make_tiny_model, tiny_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pyquant.cli import app
from pyquant.integrations import train_demo
from pyquant.integrations.demo import DemoConfig, run, sample
from pyquant.integrations.evaluate import perplexity
from pyquant.integrations.transformers import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # hidden 128: the demo's RTN row has groups of 128
    return make_tiny_model(tmp_path_factory.mktemp("demo") / "model", hidden=128, ffn=128)


def config(model, out, **changes):
    how = {"steps": 40, "batch_size": 4, "length": 48, "train_windows": 160, "eval_windows": 32}
    how |= {"lr": 1e-4, "scale_lr": 1e-4}
    return DemoConfig(out=out, model=str(model), prompt="the old red", **(how | changes))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "demo"
    return out, run(config(model, out))


def test_the_table(finished):
    _, result = finished
    assert [row[0] for row in result.rows] == [
        "full precision (bf16)",
        "RTN W4 g128",
        "RTN W3 per channel",
        "KD-QAT W3 per channel",
        "KD-QAT W3 per channel, ov-freeze",
    ]
    floor = result.facts["full_precision"]
    w4, w3, kd, ov = (variant["perplexity"] for variant in result.facts["variants"])
    assert floor < w4 < w3
    assert max(kd, ov) < w3, "training pays"
    for row, value in zip(result.rows[1:], (w4, w3, kd, ov), strict=True):
        assert row[1] == f"{value:.3f}"
        assert row[-1] == f"{math.log(value / floor):.4f}"
    assert "full-precision row is the floor" in result.lines[0]


def test_the_files(finished, model):
    out, result = finished
    assert not (out / "train.work").exists()
    tokens = load_file(out / "sampled.safetensors")["tokens"].long()
    assert tokens.shape == (192, 48)
    checkpoint = load_model(out / "checkpoint", torch.float32)
    measured = perplexity(checkpoint, tokens[:32], 16)
    assert measured == pytest.approx(result.facts["variants"][-1]["perplexity"], rel=1e-6), "the row is the checkpoint"
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"https?://", page)
    assert result.rows[-1][1] in page
    assert result.facts["sentence"].startswith("the old red")
    assert len(result.facts["sentence"]) > len("the old red") + 10
    sizes = result.facts["bytes"]
    assert sizes["checkpoint"] == (out / "checkpoint" / "model.safetensors").stat().st_size < sizes["full_precision"]


def test_sampled_text_is_kept_and_follows_the_seed(finished, model, tmp_path):
    out, _ = finished
    again, stages = DemoConfig(**{**vars(config(model, out)), "steps": 1}), []
    before = (out / "sampled.safetensors").stat().st_mtime_ns
    run(again, lambda event: stages.append(event.stage))
    assert (out / "sampled.safetensors").stat().st_mtime_ns == before
    assert "train KD-QAT W3 per channel" in stages
    assert not any("writes" in stage for stage in stages)


def test_samples_come_from_the_model(model):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def draw(seed):
        return sample(loaded, 0, 64, 24, torch.Generator().manual_seed(seed))

    tokens = draw(1)
    assert tokens.shape == (64, 24)
    assert torch.equal(tokens, draw(1))
    assert not torch.equal(tokens, draw(2))
    assert (tokens[:, 0] == 0).all()
    with torch.inference_mode():  # sampled without a bug in the cache, its loss is the model's entropy
        logits = loaded(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(-1).mean().item()
    assert math.log(perplexity(loaded, tokens)) == pytest.approx(entropy, rel=0.08)
    shuffled = tokens[:, torch.randperm(24)]
    assert math.log(perplexity(loaded, shuffled)) > 1.5 * entropy


def test_with_a_text_of_ones_own(model, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(tiny_text(400, seed=5))
    result = run(config(model, tmp_path / "out", steps=1, text=str(text)))
    assert "mine.txt" in result.lines[0]
    assert "KL, nats/token" not in result.columns
    assert not (tmp_path / "out" / "sampled.safetensors").exists()
    text.write_text("the old red fox")
    with pytest.raises(ValueError, match="too few"):
        run(config(model, tmp_path / "out", text=str(text)))


def test_the_command(model, tmp_path):
    absent = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "x"), "--model", str(tmp_path / "none")])
    assert absent.exit_code == 1
    assert "holds no model" in absent.stderr
    assert not (tmp_path / "x").exists()


def test_train_demo_writes_a_model_that_loads(tmp_path, capsys):
    (tmp_path / "books.txt").write_text("<|endoftext|>".join(tiny_text(150, seed=i) for i in range(4)))
    args = ["--text", str(tmp_path / "books.txt"), "--vocab", "300", "--steps", "3", "--batch", "2", "--length", "32"]
    train_demo.main([*args, "--held-out", "0.1", "--device", "cpu", "--out", str(tmp_path / "a")])
    train_demo.main([*args, "--held-out", "0.1", "--device", "cpu", "--out", str(tmp_path / "b")])
    torch.use_deterministic_algorithms(False)
    assert "held-out PPL" in capsys.readouterr().out
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a), "the same text and seed give the same model"
    assert all(t.dtype == torch.bfloat16 for t in a.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert sum(p.numel() for p in loaded.parameters()) == sum(t.numel() for t in a.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    words = "the old red fox<|endoftext|>a river"
    assert tokenizer.decode(tokenizer(words)["input_ids"]) == words


def test_the_demo_model_stays_small():
    parameters = sum(p.numel() for p in train_demo.build_model(2048).parameters())
    assert parameters == 3_672_320
    assert 2 * parameters < 8_000_000
