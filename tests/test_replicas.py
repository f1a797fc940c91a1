"""Whole students on two CPU processes: gradients are means, and the loop trains what one process trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import learnable_tokens, tiny_llama
from torch import distributed as dist
from torch import multiprocessing, nn

from pyquant.formats.spec import QuantSpec
from pyquant.recipes.kd_loss import KDLoss
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.qat_loop import Run
from pyquant.recipes.qat_loop import train as qat
from pyquant.recipes.replicas import Averaging

SPEC = QuantSpec(3, 32)
CONFIG = KDConfig(steps=20, batch_size=4, seq_len=16, grad_accum=2, lr=2e-3, scale_lr=1e-3, warmup_steps=2, bf16=False)
VARIANTS = {
    "accumulated": replace(CONFIG, freeze=("v_proj",), freeze_at=10, loss=KDLoss(0.5, 0.5, features=0.1)),
    "reused": replace(CONFIG, reuse_fake_quant=True),
}


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


def run(config: KDConfig) -> tuple[Run, dict[str, torch.Tensor]]:
    student = tiny_llama()
    found = qat(student, tiny_llama(), learnable_tokens(), config, SPEC)
    return found, student.state_dict()


def train(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    for name, config in VARIANTS.items():
        found, state = run(config)
        torch.save({"losses": found.losses, **state}, f"{folder}/{name}-{rank}.pt")
    with pytest.raises(ValueError, match="batch_size=3 must be a multiple of the 2 processes"):
        run(replace(CONFIG, batch_size=3))
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path):
    multiprocessing.spawn(train, (2, str(tmp_path)), nprocs=2)
    for name, config in VARIANTS.items():
        a, b = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(a[key], b[key]) for key in a)  # the processes end with the same weights
        found, state = run(config)
        # halves of a batch instead of one: fp32 rounding, 6e-8 a sum, which 20 steps of Adam carry on
        torch.testing.assert_close(a["losses"], found.losses, rtol=1e-5, atol=1e-7)
        for key, want in state.items():
            if want.is_floating_point():  # Adam's moves of tiny gradients follow rounding
                assert (a[key] - want).abs().max() <= 2e-2 * want.abs().max().clamp_min(1e-6), key
        other, _ = run(replace(config, seed=1))
        assert ((a["losses"] - other.losses) / found.losses).abs().max() > 1e-3  # other windows are seen by this
