"""The measurement of several GPUs, on two CPU processes: its numbers about time mean nothing there, the others do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from pyquant.recipes.replicas import Averaging

ROOT = Path(__file__).resolve().parents[1]


def test_small_run(tmp_path: Path):
    out = tmp_path / "several.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "benchmarks.several_gpus", "--small", "--out", str(out), "--commit", "c" * 40]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text())
    assert len(found["meta"]["commit"]) == 40 and len(found["meta"]["gpus"]) == 2
    rows = found["rows"]
    assert not [r for r in rows if "failed" in r]
    steps = {r["way"]: r for r in rows if r["op"] == "kd_qat_step"}
    assert len(steps) == 8
    for way in ("replicas", "replicas, captured", "fsdp", "fsdp, gathered"):
        # bf16 weights and moments: 2^-9 a rounding; measured 3e-8 and 4e-5
        assert steps[way]["loss_difference"] < 1e-3
        assert {"speedup", "over_best", "over_same_batch"} <= steps[way].keys()
    alone, whole = steps["one"]["losses"], steps["one, all windows"]["losses"]
    assert (
        max(abs(a - b) / b for a, b in zip(alone[:3], whole[:3], strict=True)) > 1e-3
    )  # other windows are seen by this
    (logits,) = (r for r in rows if r["op"] == "logits")
    assert logits["relative"] < 1.5 * logits["noise"] < 2e-2
    assert logits["alike_on_all"]
    decoded = {(r["gpus"], r["batch"]): r for r in rows if r["op"] == "decode"}
    assert decoded.keys() == {(1, 1), (1, 3), (2, 1), (2, 3)}


def averaged(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    net, x = network()
    averaging = Averaging(net.parameters(), large=64)
    averaging.on = False
    (net(x[rank, 0]).square().mean() / size).backward()
    assert not averaging.works
    averaging.on = True
    (net(x[rank, 1]).square().mean() / size).backward()
    assert len(averaging.works) == 2  # two weights; biases go together
    averaging.finish()
    torch.save([p.grad for p in net.parameters()], f"{folder}/{rank}.pt")
    averaging.close()
    net.zero_grad()
    net(x[rank, 0]).square().mean().backward()
    assert not averaging.works
    dist.destroy_process_group()


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8, bias=False), nn.LayerNorm(8)).double()
    return net, torch.randn(2, 2, 4, 8, dtype=torch.float64)


def test_gradients_are_means_over_processes(tmp_path: Path):
    multiprocessing.spawn(averaged, (2, str(tmp_path)), nprocs=2)
    net, x = network()
    for passes in x.transpose(0, 1):  # both passes of both processes
        (sum(net(one).square().mean() for one in passes) / 2).backward()
    for rank in range(2):
        for got, p in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), net.parameters(), strict=True):
            # the first pass of an accumulated step stays in the gradient and is sent with the last one
            assert p.grad is not None
            torch.testing.assert_close(got, p.grad, rtol=1e-12, atol=1e-14)  # fp64, another order of four summands
