"""Several processes, on a CPU: sharded KD-QAT is the training of one process, and resumes on another number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_run import SPEC, process
from tiny import learnable_tokens, save_tiny, tiny_llama
from torch import distributed as dist
from torch import multiprocessing

from pyquant.integrations.sharded import train_sharded
from pyquant.integrations.trainer import train_kd
from pyquant.recipes.kd_loss import KDLoss
from pyquant.recipes.kd_qat import convert
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.soft_qat import SoftQAT

CONFIG = KDConfig(
    steps=20, batch_size=4, seq_len=16, grad_accum=2, lr=2e-3, scale_lr=1e-3, warmup_steps=2, save_steps=8,
    weight_decay=0.01, max_grad_norm=0.5, bf16=False, loss=KDLoss(0.5, 0.5),
)  # fmt: skip
# Sums over two halves of a batch instead of one: fp32 rounding, 6e-8 a sum, which 20 steps of Adam carry on.
TOLERANCE = 1e-5


def spawn(
    folder: Path, config: KDConfig, resume: bool = False, die_at: int | None = None, size: int = 2
) -> list[float]:
    """Losses of a run on ``size`` processes."""
    multiprocessing.spawn(process, (size, str(folder), config, resume, die_at), nprocs=size)
    return [row["loss"] for row in json.loads((folder / "history.json").read_text())]


def single(folder: Path, config: KDConfig) -> tuple[list[float], torch.nn.Module]:
    """Losses and deployed model of the same run in one process, by transformers' Trainer."""
    student = tiny_llama()
    history = train_kd(student, tiny_llama(), learnable_tokens(), config, SPEC, folder / "single")
    convert(student)
    return [row["loss"] for row in history], student


def worst(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


VARIANTS = {
    "kd": replace(CONFIG, shard_teacher=True),
    "freeze": replace(CONFIG, freeze=("v_proj", "o_proj"), freeze_at=10, loss=KDLoss(0.5, 0.5, features=0.1)),
    "checkpointing": replace(CONFIG, gradient_checkpointing=True, keep_gathered=True, steps=8),
    "soft": replace(CONFIG, quantizer="soft", soft=SoftQAT(schedule="linear", end=8.0), grad_accum=1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_as_one(name, tmp_path):
    config = VARIANTS[name]
    losses = spawn(tmp_path, config)
    expected, model = single(tmp_path, config)
    assert len(losses) == config.steps and worst(losses, expected) < TOLERANCE
    got, want = torch.load(tmp_path / "state.pt", weights_only=True), model.state_dict()
    assert got.keys() == want.keys()
    for key, t in want.items():
        if t.is_floating_point():  # after 20 steps of Adam, whose moves of tiny gradients follow rounding
            assert (got[key] - t).abs().max() <= 2e-2 * t.abs().max(), key
    other = single(tmp_path / "other", replace(config, seed=1))[0]
    assert worst(losses, other) > 100 * TOLERANCE  # other windows are seen by this measure


@pytest.mark.parametrize("size", [1, 2])
def test_killed_on_two_resumes_on(size, tmp_path):
    config = replace(CONFIG, freeze=("v_proj",), freeze_at=4)
    with pytest.raises(multiprocessing.ProcessExitedException):
        spawn(tmp_path, config, die_at=11)
    assert sorted(p.name for p in (tmp_path / "work").glob("checkpoint-*")) == ["checkpoint-8"]
    assert not [p for p in (tmp_path / "work").rglob("*") if p.suffix in (".pt", ".bin", ".distcp", ".metadata")]
    losses = spawn(tmp_path, config, resume=True, size=size)
    expected = single(tmp_path, config)[0]
    assert worst(losses, expected) < TOLERANCE


def test_bf16_shards_keep_fp32_masters(tmp_path):
    config = replace(CONFIG, weights="bf16", lr=1e-4, scale_lr=1e-4)
    losses = spawn(tmp_path, config)
    expected = single(tmp_path, config)[0]
    assert worst(losses, expected) < 2e-2  # bf16 has 8 bits: 4e-3 a rounding, and gradients are summed in fp32 here
    assert worst(losses, expected) > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 3}, "multiple of their number, 2"),
        ({"reuse_fake_quant": True}, "reuse_fake_quant"),
        ({"optim": "adamw_8bit"}, "adamw_8bit"),
    ],
)
def test_what_cannot_be_sharded_is_refused(change, sentence):
    from pyquant.recipes.sharding import check_shardable

    with pytest.raises(ValueError, match=sentence):
        check_shardable(replace(CONFIG, **change), 2)


def test_one_process_alone_needs_no_launcher(tmp_path):
    try:
        config = replace(CONFIG, steps=2)
        found = train_sharded(tiny_llama(), tiny_llama(), learnable_tokens(), config, SPEC, tmp_path / "a")
        expected = single(tmp_path, config)[0]
        assert worst([row["loss"] for row in found.history], expected) < TOLERANCE
    finally:
        dist.destroy_process_group()


def quantize(folder: Path, *flags: str, size: int) -> dict[str, Any]:
    """``pyquant quantize`` as a user starts it; its report."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"] if size > 1 else []
    out = folder / f"out-{size}"
    command = [sys.executable, *launcher, "-m", "pyquant", "quantize", str(folder / "model"), "--out", str(out)]
    text = folder / "text.txt"
    command += ["--calibration", str(text), "--eval", str(text), "--eval-windows", "4", "--eval-length", "32"]
    command += ["--group-size", "32", "--device", "cpu", *flags]
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize(
    "flags",
    [
        "--recipe kd-qat --steps 6 --batch-size 4 --seq-len 32 --lr 1e-3 --scale-lr 1e-3",
        "--recipe blockwise --steps 8 --batch-size 4 --calibration-windows 8 --calibration-length 32 --set blockwise.start=mse",
        "--recipe bisup --steps 4 --batch-size 4 --calibration-windows 8 --calibration-length 32",
    ],
    ids=["kd-qat", "blockwise", "bisup"],
)
def test_command_started_twice_makes_what_one_makes(flags, tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    two, one = (quantize(tmp_path, *flags.split(), size=size) for size in (2, 1))
    for a, b in zip(two["rows"], one["rows"], strict=True):
        assert a["fp"] == b["fp"]
        # codes that sums in another order turn over move the perplexity of a random model by less than training does
        assert abs(a["quantized"] / b["quantized"] - 1) < 5e-3
    assert two["max_difference"] == 0.0
    if two["history"]:
        assert worst([r["loss"] for r in two["history"]], [r["loss"] for r in one["history"]]) < TOLERANCE
