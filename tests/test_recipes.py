"""rtn and the pure functions of KD-QAT."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import some_tokens, tiny_llama
from torch import nn

from pyquant import reference
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.evaluate import perplexity, probe_logits
from pyquant.nn import FakeQuantLinear, QLinear
from pyquant.quantizers.ranges import round_scale
from pyquant.recipes.kd_qat import KDLoss, convert, freeze, kd_loss, parameter_groups, prepare
from pyquant.recipes.rtn import dequantize_model, layer_errors, rtn


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, -1), QuantSpec(2, 32, False)], ids=str)
@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_rtn_and_back(spec, rule):
    model = tiny_llama()
    before = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen = []
    report = rtn(model, spec, rule, on_layer=seen.append)
    assert len(report.changed) == 14
    assert seen == report.changed
    assert report.kept == {"lm_head": "excluded by name"}
    logits = probe_logits(model, some_tokens())
    errors = layer_errors(before, model)
    assert [row["name"] for row in errors] == report.changed
    for row in errors:
        w, w_hat = before[row["name"]], model.get_submodule(row["name"]).dequantize()
        expected = float((w_hat - w).norm() / w.norm())
        assert row["relative_error"] == pytest.approx(expected, rel=1e-5)
        assert 0.01 < expected < 0.9
        assert row["sqnr_db"] == pytest.approx(-20 * math.log10(expected), rel=1e-5)
        scale = model.get_submodule(row["name"]).scale
        assert torch.equal(scale, scale.bfloat16().float())
        assert scale.dtype == torch.float32
    assert dequantize_model(model) == 14
    assert not any(isinstance(m, QLinear) for m in model.modules())
    assert torch.equal(probe_logits(model, some_tokens()), logits)


def test_mse_is_no_worse_than_minmax_in_each_layer():
    errors = {}
    for rule in ("minmax", "mse"):
        model = tiny_llama()
        before = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        rtn(model, QuantSpec(3, -1), rule)
        errors[rule] = [row["relative_error"] for row in layer_errors(before, model)]
    assert all(a < b for a, b in zip(errors["mse"], errors["minmax"], strict=True))


def test_rtn_refuses():
    with pytest.raises(ValueError, match="bits=8: deployable weights have 2, 3 or 4 bits"):
        rtn(tiny_llama(), QuantSpec(8, 32))
    with pytest.raises(ValueError, match="K=64 must be a multiple of group_size=128"):
        rtn(tiny_llama(), QuantSpec(4, 128))
    with pytest.raises(ValueError, match="unknown range rule 'best'"):
        rtn(tiny_llama(), QuantSpec(4, 32), "best")
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: the weight has NaN"):
        rtn(model, QuantSpec(4, 32))
    assert not any(isinstance(m, QLinear) for m in model.modules())


def test_kd_loss_is_the_written_formula():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 2] = labels[1, 4] = -100
    temperature = 2.0
    loss, parts = kd_loss(student, teacher, labels, KDLoss(0.7, 0.3, temperature))
    kl, ce, count = 0.0, 0.0, 0
    for b in range(2):
        for t in range(4):
            if labels[b, t + 1] == -100:
                continue
            count += 1
            ce -= math.log(torch.softmax(student[b, t], 0)[labels[b, t + 1]])
            p, q = torch.softmax(teacher[b, t] / temperature, 0), torch.softmax(student[b, t] / temperature, 0)
            kl += sum(float(p[v]) * math.log(p[v] / q[v]) for v in range(7))
    kl, ce = kl / count * temperature**2, ce / count
    assert count == 6
    assert float(parts["kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(parts["ce"]) == pytest.approx(ce, rel=1e-5)
    assert float(loss) == pytest.approx(0.7 * kl + 0.3 * ce, rel=1e-5)


def test_kd_loss_gradients_go_to_the_student_only():
    student = torch.randn(1, 4, 6, requires_grad=True)
    teacher = torch.randn(1, 4, 6, requires_grad=True)
    labels = torch.tensor([[1, 2, -100, 3]])
    kd_loss(student, teacher, labels)[0].backward()
    assert teacher.grad is None
    assert student.grad[0, [1, 3]].abs().max() == 0
    assert student.grad[0, [0, 2]].abs().min() > 0
    same = torch.randn(1, 4, 6)
    assert kd_loss(same, same, labels, KDLoss(1, 0))[0].abs() < 1e-6
    assert kd_loss(same, teacher, torch.full((1, 4), -100))[0] == 0


def test_kd_loss_refuses():
    logits = torch.zeros(1, 4, 6)
    with pytest.raises(ValueError, match=r"\(1, 4, 6\) and teacher logits \(1, 4, 7\)"):
        kd_loss(logits, torch.zeros(1, 4, 7), torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels"):
        kd_loss(logits, logits, torch.zeros(1, 3, dtype=torch.int64))
    for fields in ({"kl": -1.0}, {"kl": 0.0, "ce": 0.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            KDLoss(**fields)


def test_groups_cover_each_parameter_once():
    model = tiny_llama(attention_bias=True)
    prepare(model, QuantSpec(4, 32, False))
    names = freeze(model, ["layers.0.*.v_proj"])
    assert names == ["model.layers.0.self_attn.v_proj"]
    groups = {g["name"]: g for g in parameter_groups(model, 1e-3, 1e-4, 0.1)}
    assert [(n, g["lr"], g["weight_decay"]) for n, g in groups.items()] == [
        ("weights", 1e-3, 0.1), ("vectors", 1e-3, 0.0), ("scales", 1e-4, 0.0)
    ]  # fmt: skip
    by_id = {id(p): n for n, p in model.named_parameters()}
    found = {n: sorted(by_id[id(p)] for p in g["params"]) for n, g in groups.items()}
    assert sorted(name for names in found.values() for name in names) == sorted(
        n for n, p in model.named_parameters() if p.requires_grad
    )
    assert all(n.endswith(("quantizer.scale", "quantizer.zero")) for n in found["scales"])
    assert len(found["scales"]) == 26
    assert all("norm" in n or n.endswith("bias") for n in found["vectors"])
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model.requires_grad_(False), 1e-3, 1e-4, 0.0)


@pytest.mark.parametrize("quantizer", ["lsq", "ste"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_frozen_layers_deploy_their_frozen_values(quantizer, symmetric):
    model = tiny_llama()
    prepare(model, QuantSpec(3, 32, symmetric), quantizer, "minmax")
    expected = {}
    for name, m in model.named_modules():
        if isinstance(m, FakeQuantLinear):
            scale, zero = m.quantizer.range(m.weight)
            expected[name] = reference.fake_quant(m.weight, round_scale(scale, torch.bfloat16), zero, 32, 3).detach()
    frozen = {n: model.get_submodule(n).weight.clone() for n in freeze(model)}
    assert len(frozen) == 4
    for name, w in frozen.items():
        assert torch.equal(w, expected[name])
    report = convert(model)
    assert len(report.changed) == 14
    assert 0 < report.percent < 100
    for name, w in frozen.items():
        assert torch.equal(model.get_submodule(name).dequantize(), w)
    for p in model.parameters():
        assert torch.equal(p, p.bfloat16().float())


def test_convert_refuses():
    with pytest.raises(ValueError, match="prepare it first"):
        convert(tiny_llama())
    model = tiny_llama()
    prepare(model, QuantSpec(4, 32))
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    with pytest.raises(ValueError, match=r"model\.norm\.weight has NaN or Inf"):
        convert(model)


def test_perplexity_is_the_written_formula():
    model = tiny_llama()
    tokens = some_tokens(5, 12)
    logits = probe_logits(model, tokens).double()
    nll = [-torch.log_softmax(logits[b, t], 0)[tokens[b, t + 1]] for b in range(5) for t in range(11)]
    expected = math.exp(float(torch.stack(nll).mean()))
    calls = []
    assert perplexity(model, tokens, 2, lambda *a: calls.append(a)) == pytest.approx(expected, rel=1e-5)
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert perplexity(copy.deepcopy(model), tokens, 5) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"got \(5, 1\)"):
        perplexity(model, tokens[:, :1])
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        perplexity(model, tokens)


def test_convolutions_are_not_experts():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(64, 32))
    assert rtn(model, QuantSpec(4, 32)).changed == ["1"]
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(2, 64, 32))
    model.fc = nn.Linear(64, 32)
    with pytest.raises(ValueError, match=r"experts \(2, 64, 32\)"):
        rtn(model, QuantSpec(4, 32))
