"""What KD-QAT can mix and switch: divergences, hidden states, 8-bit inputs and vocabulary, masters, temperatures."""

from __future__ import annotations

import copy
import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from tiny import learnable_tokens, some_tokens, tiny_llama
from torch import nn

from pyquant import reference
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.evaluate import probe_logits
from pyquant.integrations.trainer import KDConfig, optimizer_class, train_kd
from pyquant.nn import FakeQuantLinear, QLinear
from pyquant.nn.swap import matches
from pyquant.quantizers import make_quantizer
from pyquant.recipes.kd_loss import Distillation, KDLoss, feature_loss, find_head, kd_loss
from pyquant.recipes.kd_qat import convert, prepare, set_up
from pyquant.recipes.master import with_masters
from pyquant.recipes.qat_loop import train
from pyquant.recipes.soft_qat import SoftQAT, share_temperature
from pyquant.recipes.vocabulary import fake_quant_tokens, prepare_vocabulary, quantize_inputs

SPEC = QuantSpec(3, 32)
CONFIG = KDConfig(steps=6, batch_size=3, seq_len=16, lr=2e-3, scale_lr=1e-3, warmup_steps=1, save_steps=3)


# ------------------------------------------------------------------------------------------------ the loss


def mixed(student, teacher, labels, how):
    """The loss as it is written down, position by position, in fp64."""
    total, count, t = 0.0, 0, how.temperature
    for b in range(student.shape[0]):
        for i in range(student.shape[1] - 1):
            if labels[b, i + 1] == -100:
                continue
            count += 1
            p, q = torch.softmax(teacher[b, i] / t, 0), torch.softmax(student[b, i] / t, 0)
            m = how.jsd_beta * p + (1 - how.jsd_beta) * q
            pair = how.kl * (p * (p / q).log()).sum() + how.reverse_kl * (q * (q / p).log()).sum()
            pair += how.jsd * (
                how.jsd_beta * (p * (p / m).log()).sum() + (1 - how.jsd_beta) * (q * (q / m).log()).sum()
            )
            total += float(t * t * pair - how.ce * torch.log_softmax(student[b, i], 0)[labels[b, i + 1]])
    return total / count


@pytest.mark.parametrize("name", ["kl", "ce", "reverse_kl", "jsd", "mix"])
def test_each_term_is_the_written_formula(name):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64), torch.randn(2, 6, 9, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 6))
    labels[0, 3] = labels[1, 5] = -100
    none = {"kl": 0.0, "ce": 0.0}
    weights = {"kl": 0.4, "ce": 0.3, "reverse_kl": 0.2, "jsd": 0.7} if name == "mix" else {**none, name: 1.0}
    how = KDLoss(**weights, temperature=1.7, jsd_beta=0.3)
    expected = mixed(student, teacher, labels, how)
    assert float(kd_loss(student, teacher, labels, how)[0]) == pytest.approx(expected, rel=1e-10)
    if name != "ce":  # the planted fault: teacher and student exchanged
        assert float(kd_loss(teacher, student, labels, how)[0]) != pytest.approx(expected, rel=1e-3)


def test_the_gradient_is_that_of_the_loss():
    torch.manual_seed(1)
    teacher, labels = torch.randn(1, 4, 5, dtype=torch.float64), torch.tensor([[1, 2, -100, 3]])
    how = KDLoss(0.4, 0.3, 1.5, 0.2, 0.7, 0.3)
    student = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, teacher, labels, how)[0], (student,))


def test_feature_loss():
    torch.manual_seed(2)
    s, t = [torch.randn(2, 3, 8) for _ in range(2)], [torch.randn(2, 3, 8) for _ in range(2)]
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    each = [
        float((a[b, i] - c[b, i]).square().sum() / c[b, i].square().sum())
        for a, c in zip(s, t, strict=True) for b in range(2) for i in range(3) if mask[b, i]
    ]  # fmt: skip
    assert float(feature_loss(s, t, mask)) == pytest.approx(sum(each) / len(each), rel=1e-6)
    assert float(feature_loss(t, t, mask)) == 0
    t[0][:, :, :] *= 100  # a token of large norm weighs no more than another
    s[0][:, :, :] *= 100
    assert float(feature_loss(s, t, mask)) == pytest.approx(sum(each) / len(each), rel=1e-5)


@pytest.mark.parametrize("layers", [(), (1,), (-1, 0)])
def test_features_are_the_outputs_of_blocks(layers):
    student, teacher, ids = tiny_llama(1), tiny_llama(), some_tokens()
    how = KDLoss(0.0, 0.0, features=1.0, feature_layers=layers)
    loss, parts = Distillation(student, teacher, how)(ids)
    with torch.no_grad():
        theirs = [
            m(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states for m in (student, teacher)
        ]
        first = {
            "s": theirs[0][1],
            "t": theirs[1][1],
        }  # hidden_states holds the embeddings first, and the last one normed
    only = Distillation(student, teacher, replace(how, feature_layers=(0,)))(ids)[0]
    assert float(only.detach()) == pytest.approx(
        float(feature_loss([first["s"]], [first["t"]], torch.ones(2, 24))), rel=1e-5
    )
    assert float(parts["features"]) == float(loss.detach()) > 0
    every = float(Distillation(student, teacher, KDLoss(0.0, 0.0, features=1.0))(ids)[1]["features"])
    assert (float(parts["features"]) == pytest.approx(every)) == (layers != (1,))
    loss.backward()
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="no block 2 among 2"):
        Distillation(student, teacher, replace(how, feature_layers=(2,)))


def test_the_head_is_found_and_checked():
    model = tiny_llama()
    head = find_head(model)
    hidden = model.model(input_ids=some_tokens(), use_cache=False).last_hidden_state
    assert torch.allclose(head.logits(hidden), probe_logits(model, some_tokens()), rtol=1e-4, atol=1e-4)
    model.config.logit_scale = 2.0  # claims what the forward does not do
    assert find_head(model) is None
    biased = tiny_llama(tie_word_embeddings=False)
    biased.lm_head.bias = nn.Parameter(torch.zeros(biased.lm_head.out_features))
    assert find_head(biased) is None
    with pytest.raises(ValueError, match="the student's head is no plain linear layer"):
        Distillation(biased, model, KDLoss(0.0, 1.0), fused=True)


def test_fused_and_plain_losses_agree():
    student, teacher, ids = tiny_llama(1, tie_word_embeddings=False), tiny_llama(), some_tokens()
    how = KDLoss(0.4, 0.3, 1.5, 0.2, 0.7, 0.3)
    labels = ids.clone()
    labels[0, 5:9] = -100
    found = []
    for fused in (False, None):
        objective = Distillation(student, teacher, how, fused)
        loss, parts = objective(ids, labels)
        assert objective.fused == (fused is None)
        student.zero_grad()
        loss.backward()
        grads = [p.grad.clone() for p in student.parameters()]
        found.append((loss.detach(), parts, grads))
    assert found[0][1].keys() == found[1][1].keys() == {"kl", "ce", "reverse_kl", "jsd"}
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    for name, part in found[0][1].items():
        assert torch.allclose(part, found[1][1][name], rtol=1e-4), name
    for a, b in zip(found[0][2], found[1][2], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max() + 1e-12))


def test_losses_that_cannot_be():
    for fields in ({"kl": -1.0}, {"kl": 0.0, "ce": 0.0}, {"jsd": math.nan}):
        with pytest.raises(ValueError, match="must not be negative, nor all 0"):
            KDLoss(**fields)
    with pytest.raises(ValueError, match="jsd_beta=1"):
        KDLoss(jsd_beta=1.0)
    with pytest.raises(ValueError, match="needs a teacher"):
        Distillation(tiny_llama(), None)
    assert Distillation(tiny_llama(), tiny_llama(), KDLoss(0.0, 1.0)).teacher is None


# ------------------------------------------------------------------------------------------------ the model


def test_inputs_are_rounded_token_by_token():
    torch.manual_seed(3)
    x = torch.randn(2, 3, 16) * torch.tensor([1e-3, 1.0, 1e3])[None, :, None]
    y = fake_quant_tokens(x, 8)
    for b in range(2):
        for i in range(3):
            step = x[b, i].abs().max() / 127
            codes = y[b, i] / step
            assert (codes - codes.round()).abs().max() < 1e-3
            assert (y[b, i] - x[b, i]).abs().max() <= 0.5001 * step
            assert codes.round().abs().max() == 127
    assert torch.equal(fake_quant_tokens(torch.zeros(1, 4)), torch.zeros(1, 4))
    x.requires_grad_()
    weight = torch.randn_like(x)
    (fake_quant_tokens(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    model = tiny_llama()
    with pytest.raises(ValueError, match="no quantized layer"):
        quantize_inputs(model)
    prepare(model, SPEC)
    before = probe_logits(model, some_tokens())
    hooks = quantize_inputs(model, 8)
    assert len(hooks) == 14
    eight = probe_logits(model, some_tokens())
    assert 1e-4 < (eight - before).norm() / before.norm() < 0.1
    convert(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("tied", [True, False])
def test_an_eight_bit_vocabulary(tied):
    model = tiny_llama(tie_word_embeddings=tied)
    plain = copy.deepcopy(model)
    config = replace(CONFIG, embedding_bits=8, head_bits=8, exclude=("lm_head",))
    set_up(model, config, SPEC)
    rows = model.model.embed_tokens.weight.detach()
    expected = reference.fake_quant(rows, (2 * rows.abs().amax(1) / 255)[:, None], None, -1, 8)
    ids = some_tokens()
    assert torch.allclose(model.model.embed_tokens(ids), expected[ids], rtol=1e-6, atol=1e-7)
    assert isinstance(model.lm_head, FakeQuantLinear)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    Distillation(model, plain)(ids)[0].backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    report = convert(model)
    assert len(report.changed) == 14
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for weight, old in (
        (model.lm_head.weight, plain.lm_head.weight),
        (model.model.embed_tokens.weight, plain.model.embed_tokens.weight),
    ):
        step = (2 * old.abs().amax(1) / 255)[:, None].bfloat16().float()
        # Half a step, a quarter more at the clipped end where the scale was rounded down, and bf16 of the product.
        assert ((weight - old).abs() <= 0.75 * step + 2**-8 * old.abs()).all()
        codes = weight / step
        assert (codes - codes.round()).abs().max() <= 127 * 2**-8  # of bf16; codes between the steps would show 0.5
        assert codes.round().abs().max() >= 127
        assert torch.equal(weight, weight.bfloat16().float())


def test_vocabularies_that_cannot_be():
    with pytest.raises(ValueError, match="one tensor: embedding_bits=8 and head_bits=16"):
        prepare_vocabulary(tiny_llama(), 8, 16)
    with pytest.raises(ValueError, match="head_bits=4 must be 8 or 16"):
        prepare_vocabulary(tiny_llama(), 16, 4)
    model = tiny_llama(tie_word_embeddings=False)
    prepare_vocabulary(model, train_embeddings=False)
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_range_learning_is_the_written_gradient():
    torch.manual_seed(4)
    w = torch.randn(5, 64, requires_grad=True)
    grad = torch.randn(5, 64)
    q = make_quantizer("range", w, QuantSpec(4, -1))
    scale, zero = q.range(w)
    assert zero is None
    (q(w) * grad).sum().backward()
    v = w.detach() / scale.detach()
    codes = v.round().clamp(-8, 7)
    inside = (v.round() >= -8) & (v.round() <= 7)
    expected = ((codes - torch.where(inside, v, torch.zeros(()))) * grad).sum(1, keepdim=True) / 7
    assert torch.allclose(q.high.grad, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(w.grad, torch.where(inside, grad, torch.zeros(())))
    for symmetric in (True, False):  # it starts from the rule's range
        spec = QuantSpec(3, 32, symmetric)
        a, b = make_quantizer("range", w, spec, "mse"), make_quantizer("lsq", w, spec, "mse")
        for x, y in zip(a.range(w), b.range(w), strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert torch.allclose(x, y, rtol=1e-6)


def test_a_block_by_its_number():
    assert matches("model.layers.3.self_attn.v_proj", ["3.v_proj"])
    assert not matches("model.layers.13.self_attn.v_proj", ["3.v_proj"])
    assert not matches("model.layers.3.self_attn.o_proj", ["3.v_proj"])


# ------------------------------------------------------------------------------------------------ the optimizer


def test_masters_step_in_fp32():
    torch.manual_seed(5)
    start = torch.randn(40, 8).bfloat16()
    p, scale = nn.Parameter(start.clone()), nn.Parameter(torch.ones(4))
    wide, other = nn.Parameter(start.float()), nn.Parameter(torch.ones(4))
    groups = [{"params": [p], "lr": 1e-4, "weight_decay": 0.1}, {"params": [scale], "lr": 1e-3, "weight_decay": 0.0}]
    mine = with_masters(torch.optim.AdamW)(groups)
    theirs = torch.optim.AdamW([{**groups[0], "params": [wide]}, {**groups[1], "params": [other]}])
    for i in range(30):
        grad = torch.randn(40, 8).bfloat16()
        p.grad, wide.grad = grad, grad.float()
        scale.grad, other.grad = torch.full((4,), 0.1 * i), torch.full((4,), 0.1 * i)
        mine.step()
        theirs.step()
    assert torch.equal(p, wide.bfloat16())
    assert torch.equal(scale, other)
    assert not torch.equal(p, start)
    saved = copy.deepcopy(mine.state_dict())
    q, fresh = nn.Parameter(p.detach().clone()), nn.Parameter(scale.detach().clone())
    again = with_masters(torch.optim.AdamW)([{**groups[0], "params": [q]}, {**groups[1], "params": [fresh]}])
    again.load_state_dict(saved)
    for optimizer, a, b in ((mine, p, scale), (again, q, fresh)):
        a.grad, b.grad = torch.ones(40, 8).bfloat16(), torch.ones(4)
        for _ in range(20):
            optimizer.step()
    assert torch.equal(p, q)
    assert torch.equal(scale, fresh)
    p.grad = None
    frozen = p.detach().clone()
    with torch.no_grad():
        p.mul_(2)
    mine.step()
    assert torch.equal(p, 2 * frozen), "a weight without a gradient is not the optimizer's to write"


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "bf16", "freeze": ("v_proj",), "freeze_at": 4},
        {"activation_bits": 8, "embedding_bits": 8, "head_bits": 8},
        {"quantizer": "range", "loss": KDLoss(0.5, 0.0, features=0.5), "train_embeddings": False, "train_head": False},
        {"gradient_checkpointing": True, "loss": KDLoss(0.5, 0.5, features=0.5), "weights": "bf16"},
        {"quantizer": "soft", "soft": SoftQAT(schedule="cosine", start=2.0, end=8.0)},
        {"quantizer": "soft", "soft": SoftQAT(soft_forward=True), "freeze": ("v_proj",), "freeze_at": 4},
        {"optim": "adamw_torch_8bit"},
        {"optim": "adamw_torch_8bit", "weights": "bf16"},
    ],
    ids=["bf16", "eight", "range", "checkpointing", "soft", "soft-forward", "torchao", "torchao-bf16"],
)
def test_options_resume_bit_by_bit(tmp_path, changes):
    if "optim" in changes:
        pytest.importorskip("torchao")
    config = replace(CONFIG, **changes)
    tokens = learnable_tokens()
    whole, part = tiny_llama(), tiny_llama()
    history = train_kd(whole, tiny_llama(), tokens, config, SPEC, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt, match="in the fourth"):
        train_kd(part, tiny_llama(), tokens, config, SPEC, tmp_path / "b", on_log=stop_at(4))
    part = tiny_llama()
    again = train_kd(part, tiny_llama(), tokens, config, SPEC, tmp_path / "b", resume=True)
    assert again == history
    for (name, a), b in zip(whole.state_dict().items(), part.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    convert(part)
    assert sum(isinstance(m, QLinear) for m in part.modules()) == 14


def stop_at(step):
    def on_log(row):
        if row["step"] == step:
            raise KeyboardInterrupt("in the fourth")

    return on_log


def test_optimizers_by_name():
    assert optimizer_class(KDConfig())[0] is torch.optim.AdamW
    assert optimizer_class(KDConfig(weights="bf16"))[0].__name__ == "MasterAdamW"
    with pytest.raises(ValueError, match="unknown optim 'adam'"):
        optimizer_class(KDConfig(optim="adam"))
    for name, package in (("adamw_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ImportError, match=f"optim='{name}' needs the package {package}"):
                optimizer_class(KDConfig(optim=name))


# ------------------------------------------------------------------------------------------------ soft


def test_temperatures():
    for schedule, middle in (("constant", 2.0), ("linear", 5.0), ("cosine", 5.0), ("exponential", 4.0)):
        soft = SoftQAT(schedule=schedule, start=2.0, end=8.0)
        values = [soft.temperature(i, 5) for i in range(5)]
        assert values[0] == 2.0
        assert values[2] == pytest.approx(middle)
        assert values[4] == pytest.approx(2.0 if schedule == "constant" else 8.0)
        assert values == sorted(values)
    assert SoftQAT(schedule="cosine", start=2, end=8).temperature(1, 5) < SoftQAT(
        schedule="linear", start=2, end=8
    ).temperature(1, 5)
    for fields in ({"rounding": "hard"}, {"clamp": "soft"}, {"schedule": "step"}, {"beta": 0.0}, {"start": -1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            SoftQAT(**fields)
    with pytest.raises(ValueError, match="go together"):
        KDConfig(soft=SoftQAT())


@pytest.mark.parametrize("rounding", ["ste", "sigmoid-a", "sigmoid-b"])
@pytest.mark.parametrize("clamp", ["hard", "sigmoid", "phi"])
def test_every_cell_trains_and_hardens_exactly(rounding, clamp):
    model, teacher, tokens = tiny_llama(), tiny_llama(), learnable_tokens()
    soft = SoftQAT(rounding, clamp, soft_forward=True, schedule="exponential", start=2.0, end=8.0)
    config = replace(CONFIG, steps=30, batch_size=8, lr=1e-3, quantizer="soft", soft=soft, loss=KDLoss(1.0, 0.0))
    run = train(model, teacher, tokens, config, SPEC)
    assert run.losses[-3:, 0].mean() < 0.9 * run.losses[:3, 0].mean(), "three steps see all windows"
    temperatures = {float(m.temperature) for m in model.modules() if getattr(m, "temperature", None) is not None}
    assert sorted(temperatures) == pytest.approx([] if rounding == "ste" else [8.0])
    with torch.no_grad():  # the scales as they will be stored, so that nothing but the hardening is between
        for m in model.modules():
            if isinstance(m, FakeQuantLinear):
                m.quantizer.scale.copy_(m.quantizer.scale.bfloat16())
        for p in model.parameters():
            if p.dim() == 1 or p is model.lm_head.weight:
                p.copy_(p.bfloat16())
    ids = some_tokens()
    with torch.no_grad():
        soft_logits = model.train()(input_ids=ids).logits
    exact = probe_logits(model.eval(), ids)
    convert(model)
    assert torch.equal(probe_logits(model, ids), exact)
    assert (rounding, clamp) == ("ste", "hard") or not torch.equal(soft_logits, exact)


def test_one_temperature_for_all_layers():
    model = tiny_llama()
    prepare(model, SPEC, "soft", options=SoftQAT().options())
    shared = share_temperature(model)
    shared.fill_(7.5)
    found = [m.temperature for m in model.modules() if hasattr(m, "temperature")]
    assert len(found) == 14
    assert all(t is shared for t in found)
    assert share_temperature(tiny_llama()) is None


def test_the_hard_cell_is_lsq():
    tokens = learnable_tokens()
    runs = []
    for changes in ({}, {"quantizer": "soft", "soft": SoftQAT("ste", "hard")}):
        runs.append(train(tiny_llama(), tiny_llama(), tokens, replace(CONFIG, **changes), SPEC).losses)
    assert torch.equal(*runs)
    other = replace(CONFIG, quantizer="soft", soft=SoftQAT("sigmoid-b", "hard"))
    assert not torch.equal(runs[0], train(tiny_llama(), tiny_llama(), tokens, other, SPEC).losses)
