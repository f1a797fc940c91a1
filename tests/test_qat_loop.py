"""The fast loop against the Trainer, and the grid of arms on top of it."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from tiny import learnable_tokens, some_tokens, tiny_llama
from transformers import get_scheduler

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.ablate import jobs, run_jobs
from pyquant.integrations.ablate_qat import (
    QAT_ARMS,
    QAT_SEEDLESS,
    UNQUANTIZED,
    QATBench,
    config_of,
    resolve_qat,
    teaching_of,
    unmasked_attention,
)
from pyquant.integrations.config import KDSettings
from pyquant.integrations.evaluate import perplexity, probe_logits
from pyquant.integrations.trainer import train_kd
from pyquant.nn import FakeQuantLinear, QLinear
from pyquant.quantizers import LSQ
from pyquant.recipes.clip import clip_gradients
from pyquant.recipes.kd_loss import KDLoss
from pyquant.recipes.kd_qat import convert
from pyquant.recipes.kd_settings import SCHEDULES, KDConfig
from pyquant.recipes.qat_loop import Teaching, data_order, fused_norms, train

SPEC = QuantSpec(3, 32)
CONFIG = KDConfig(steps=8, batch_size=3, seq_len=16, grad_accum=2, lr=2e-3, scale_lr=1e-3, warmup_steps=2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_those_of_transformers(schedule):
    config = KDConfig(steps=17, warmup_steps=5, schedule=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, 5, 17)
    for step in range(17):
        assert config.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"freeze": ("v_proj", "1.o_proj")},
        {"freeze": ("o_proj",), "freeze_at": 4},
        {"loss": KDLoss(0.3, 0.2, reverse_kl=0.2, jsd=0.3, features=0.1)},
        {"weights": "bf16", "quantizer": "range"},
        {"reuse_fake_quant": True, "grad_accum": 3, "freeze": ("o_proj",), "freeze_at": 4},
    ],
    ids=["plain", "freeze", "freeze-at", "mix", "bf16", "reuse"],
)
def test_trains_what_the_trainer_trains(tmp_path, changes):
    config = replace(CONFIG, **changes)
    teacher, tokens = tiny_llama(), learnable_tokens()
    one, two = tiny_llama(), tiny_llama()
    history = train_kd(one, teacher, tokens, config, SPEC, tmp_path)
    run = train(two, teacher, tokens, config, SPEC)
    assert not run.graph
    assert ["loss", *run.names] == [k for k in ("loss", *run.names) if k in history[0]]
    for i, name in enumerate(["loss", *run.names]):
        # The same numbers up to the order of a sum: the Trainer divides the loss, not the mean, by grad_accum.
        expected = torch.tensor([row[name] for row in history])
        assert torch.allclose(run.losses[:, i], expected, rtol=2e-3 if config.weights == "bf16" else 2e-5, atol=1e-6), (
            name
        )
    frozen = [n for n, m in two.named_modules() if getattr(m, "frozen", False)]
    assert frozen == [n for n, m in one.named_modules() if getattr(m, "frozen", False)]
    assert bool(frozen) == bool(config.freeze)
    assert run.losses[-1, 0] < run.losses[0, 0]


def test_reused_weights_are_quantized_once_a_step(monkeypatch):
    calls = []
    forward = LSQ.forward
    monkeypatch.setattr(LSQ, "forward", lambda self, w: calls.append(1) or forward(self, w))
    losses = []
    for reuse in (False, True):
        calls.clear()
        run = train(tiny_llama(), tiny_llama(), learnable_tokens(), replace(CONFIG, reuse_fake_quant=reuse), SPEC)
        losses.append(run.losses)
        # 14 layers, 8 steps; two passes a step, and the look at the head before the first
        assert len(calls) == 14 * (8 if reuse else 16) + 28
    assert torch.allclose(*losses, rtol=1e-4)


def test_kept_teaching_changes_nothing():
    teacher, tokens = tiny_llama(), learnable_tokens()
    teaching = Teaching(teacher, tokens, batch=5, autocast=False)
    assert teaching.hidden is not None
    one, two = tiny_llama(), tiny_llama()
    a = train(one, teacher, tokens, CONFIG, SPEC)
    b = train(two, teacher, tokens, CONFIG, SPEC, teaching)
    assert torch.allclose(a.losses, b.losses, rtol=1e-4, atol=1e-6)
    teaching.hidden = teaching.hidden.roll(1, 0)  # of another window: the comparison has to see it
    c = train(tiny_llama(), teacher, tokens, CONFIG, SPEC, teaching)
    assert not torch.allclose(a.losses, c.losses, rtol=1e-2)


def test_an_unquantized_control_and_a_broken_run():
    tokens = learnable_tokens()
    model = tiny_llama()
    run = train(model, None, tokens, replace(CONFIG, loss=KDLoss(0.0, 1.0)), None)
    assert run.names == ["ce"]
    assert not any(isinstance(m, FakeQuantLinear) for m in model.modules())
    assert run.losses[-1, 0] < 0.9 * run.losses[0, 0]
    with pytest.raises(FloatingPointError, match=r"at step \d+; lower lr=1e\+30"):
        train(tiny_llama(), tiny_llama(), tokens, replace(CONFIG, lr=1e30, scale_lr=1e30), SPEC)
    with pytest.raises(ValueError, match="needs a teacher"):
        train(tiny_llama(), None, tokens, CONFIG, SPEC)


def test_data_order_visits_every_window_once_a_round():
    order = data_order(7, 20, 3)
    assert sorted(order[:7].tolist()) == sorted(order[7:14].tolist()) == list(range(7))
    assert order[:7].tolist() != order[7:14].tolist()
    assert torch.equal(order, data_order(7, 20, 3))
    assert not torch.equal(order, data_order(7, 20, 4))


def test_unmasked_attention_is_causal_attention():
    model = tiny_llama()
    expected = probe_logits(model, some_tokens())
    unmasked_attention(model)
    assert model.config._attn_implementation == "unmasked_sdpa"
    assert torch.allclose(probe_logits(model, some_tokens()), expected, rtol=1e-5, atol=1e-5)


def test_norms_that_are_others_stay(monkeypatch):
    class OnePlus(torch.nn.Module):  # as Gemma's: the weight is what is added to 1
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.zeros(64)), 1e-5

        def forward(self, x):
            return torch.nn.functional.rms_norm(x, (64,), 1 + self.weight, self.eps)

    model = tiny_llama()
    expected = probe_logits(model, some_tokens())
    norms = [m for m in model.modules() if hasattr(m, "variance_epsilon")]
    calls = []
    real = torch.nn.functional.rms_norm
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *a: calls.append(1) or real(*a))
    with fused_norms(model) as count:
        calls.clear()
        assert count == len(norms) > 2
        assert torch.allclose(probe_logits(model, some_tokens()), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == count
    calls.clear()
    assert torch.equal(probe_logits(model, some_tokens()), expected)
    assert not calls
    with fused_norms(torch.nn.Sequential(OnePlus())) as count:
        assert count == 0


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_of_mixed_dtypes(max_norm):
    generator = torch.Generator().manual_seed(0)
    params = [torch.zeros(n, dtype=d) for n, d in ((50, torch.bfloat16), (30, torch.float32), (7, torch.bfloat16))]
    unused = torch.zeros(3)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    before = [p.grad.float().clone() for p in params]
    norm = sum(float(g.square().sum()) for g in before) ** 0.5
    assert float(clip_gradients([*params, unused], max_norm)) == pytest.approx(
        norm, rel=2**-8
    )  # norms of bf16 are bf16
    for p, old in zip(params, before, strict=True):
        assert p.grad.dtype == p.dtype
        # the factor and the product are rounded to the dtype
        assert torch.allclose(p.grad.float(), old * min(1.0, max_norm / norm), rtol=2**-6)
    assert unused.grad is None


def bench() -> QATBench:
    texts = {"a": learnable_tokens(6, 16, 5), "b": some_tokens(4, 16)}
    rates = {"lr": 3e-3, "scale_lr": 1e-3}
    return QATBench(tiny_llama(), learnable_tokens(), texts, {str(SPEC): {"ce": rates, "kl": rates, "kl+ce": rates}})


def test_the_grid(tmp_path):
    common = {"steps": 6, "batch_size": 4, "warmup_steps": 1}
    definitions = [
        "rtn",
        "control",
        "kd",
        "kd-ov",
        'mine=kd-pure,lr:5e-4,freeze:["0.v_proj","mlp.*"],loss.temperature:2',
    ]
    arms = resolve_qat(definitions, common)
    assert arms["rtn"] == {"steps": 0}
    assert arms["mine"]["freeze"] == ["0.v_proj", "mlp.*"]
    todo = jobs(arms, [SPEC], 2, QAT_SEEDLESS)
    assert [j.key() for j in todo if j.arm == "rtn"] == ["rtn | W3 g32 symmetric | seed 0"]
    said: list[str] = []
    file = tmp_path / "rows.json"
    assert run_jobs(bench(), todo, arms, file, {"a": 1}, say=said.append)
    rows = {(r["arm"], r["seed"]): r for r in json.loads(file.read_text())["rows"]}
    assert len(rows) == len(todo) == 9
    assert rows["control", 0]["spec"] == UNQUANTIZED
    assert rows["kd", 0]["lr"] == 3e-3
    assert rows["mine", 0]["lr"] == 5e-4
    assert rows["kd", 0]["perplexity"] != rows["kd", 1]["perplexity"]
    assert rows["kd", 0]["perplexity"]["a"] < rows["rtn", 0]["perplexity"]["a"]
    assert set(rows["kd", 0]["losses"]) == {"loss", "kl", "ce"}
    again: list[str] = []
    assert run_jobs(bench(), todo, arms, file, {"a": 1}, say=again.append)
    assert not again


def test_a_row_is_the_perplexity_of_the_converted_model():
    b = bench()
    fields = {"steps": 5, "batch_size": 4, "warmup_steps": 1, "freeze": ["v_proj"]}
    row = b.run(fields, SPEC, 1)
    student = copy.deepcopy(b.model)
    train(student, b.model, b.tokens, b.settings(fields, SPEC, 1), SPEC, b.teaching)
    convert(student, torch.bfloat16)
    student.eval()
    assert sum(isinstance(m, QLinear) for m in student.modules()) == 14
    assert all(torch.equal(p, p.bfloat16().float()) for p in student.parameters())
    for name, rows in b.texts.items():
        assert row["perplexity"][name] == pytest.approx(perplexity(student, rows), rel=1e-6)


def test_an_arm_that_diverges_is_a_row():
    row = bench().run({"steps": 4, "batch_size": 4, "warmup_steps": 0, "lr": 1e30, "scale_lr": 1e30}, SPEC, 0)
    assert row["perplexity"] == {"a": math.inf, "b": math.inf}
    assert "the loss is" in row["notes"][0]


def test_what_an_arm_learns_from():
    assert [teaching_of(QAT_ARMS[arm]) for arm in ("control", "qat-ce", "soft-both", "kd", "kd-ov", "kd-pure")] == [
        "control", "ce", "ce", "kl+ce", "kl+ce", "kl",
    ]  # fmt: skip
    rates = {str(SPEC): {"kl": {"lr": 7e-4}, "ce": {"lr": 5e-4}}}
    b = QATBench(tiny_llama(), learnable_tokens(), {}, rates, share=False)
    found = {arm: b.settings(QAT_ARMS[arm], SPEC, 0).lr for arm in ("kd-pure", "qat-ce", "kd")}
    assert found == {"kd-pure": 7e-4, "qat-ce": 5e-4, "kd": KDConfig().lr}


def test_the_recipes_default_is_an_arm_of_the_grid():
    assert config_of(QAT_ARMS["kd-4to1"]) == replace(KDConfig(), steps=1) == config_of({})
    assert config_of(QAT_ARMS["kd"]).loss == KDLoss(kl=0.5, ce=0.5) != KDLoss()
    assert KDSettings(kl=2.0, ce=0.5).scale_lr == KDConfig().scale_lr < KDConfig().lr


def test_arms_that_cannot_be():
    for fields in QAT_ARMS.values():
        config_of(fields)
    with pytest.raises(ValueError, match=r"'loss.kll' is no setting"):
        config_of({"loss.kll": 1.0})
    with pytest.raises(ValueError, match="unknown schedule 'never'"):
        resolve_qat(["a=kd,schedule:never"])
    with pytest.raises(ValueError, match="arm 'best' is unknown"):
        resolve_qat(["best"])
