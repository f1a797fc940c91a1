"""Signal propagation: gradients and statistics against autograd and plain formulas, and what is concluded from them."""

import copy
import math

import pytest
import torch
from tiny import some_tokens, tiny_llama
from torch import nn

from pyquant.analysis.signal import compare, gradients, projections, watch
from pyquant.analysis.verdict import attention_kinds, by_kind, spike, suggestion, verdict
from pyquant.formats.spec import QuantSpec
from pyquant.nn.swap import swap
from pyquant.recipes.kd_qat import KDLoss, freeze, kd_loss, prepare


def task(student, teacher, tokens):
    return kd_loss(student, teacher, tokens, KDLoss(kl=0.0, ce=1.0))[0]


BATCHES = [some_tokens(2, 24, seed=5), some_tokens(2, 24, seed=6)]
SPEC = QuantSpec(3, -1)


def autograd(model, batches=BATCHES):
    """name -> gradient of the mean loss with respect to each projection's own weight."""
    model = copy.deepcopy(model).requires_grad_(True)
    loss = sum(task(model(input_ids=b).logits, model(input_ids=b).logits, b) for b in batches) / len(batches)
    loss.backward()
    return {name: model.get_submodule(name).weight.grad for name in projections(model)}


def as_dense(model):
    """The model with each quantized weight written into a plain layer."""
    dense = tiny_llama()
    dense.load_state_dict(model.state_dict(), strict=False)
    for name in projections(dense):
        layer = model.get_submodule(name)
        weight = layer.quantized_weight() if hasattr(layer, "quantized_weight") else layer.dequantize()
        dense.get_submodule(name).weight.data.copy_(weight.detach())
    return dense


def quantized(kind):
    model = tiny_llama()
    if kind == "packed":
        swap(model, SPEC)
    else:
        prepare(model, SPEC)
        if kind == "frozen":
            freeze(model, ("v_proj", "o_proj"))
    return model


def close(found, expected):
    # fp32 sums of 48 products and of two batches in another order: a few units of 2^-24 of the largest element
    return all((found[n] - e).abs().max() <= 1e-5 * e.abs().max() for n, e in expected.items())


@pytest.mark.parametrize("kind", ["fp", "fake", "frozen", "packed"])
def test_gradients_are_those_of_the_weight_that_is_multiplied_with(kind):
    model = tiny_llama() if kind == "fp" else quantized(kind)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = autograd(model if kind == "fp" else as_dense(model))
    found, _ = gradients(model, tiny_llama(), BATCHES, task)
    assert found.keys() == expected.keys() and len(found) == 14
    assert close(found, expected)
    assert not close(found, {n: 1.001 * g for n, g in expected.items()})  # planted
    assert not close(found, autograd(tiny_llama(seed=1)))  # planted: another model's
    # nothing of the model has changed, and no parameter has collected a gradient
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_outputs_against_full_precision():
    model, teacher = quantized("fake"), tiny_llama()
    name = "model.layers.1.self_attn.o_proj"
    outputs = []
    for m in (model, teacher):
        got = []
        hook = m.get_submodule(name).register_forward_hook(lambda _, args, y, got=got: got.append(y.detach().double()))
        for batch in BATCHES:
            m(input_ids=batch)
        hook.remove()
        outputs.append(torch.cat(got))
    y, r = outputs
    signals = gradients(model, teacher, BATCHES, task)[1]
    row = signals[name]
    snr = 10 * torch.log10(r.square().sum() / (y - r).square().sum()).item()
    assert row["mean"] == pytest.approx(y.mean().item(), rel=1e-9, abs=1e-12)
    assert row["variance"] == pytest.approx(y.var(correction=0).item(), rel=1e-9)
    assert row["snr_db"] == pytest.approx(snr, rel=1e-9)
    assert signals["model.layers.0.self_attn.q_proj"]["snr_db"] > row["snr_db"]  # errors add up on the way
    assert gradients(teacher, teacher, BATCHES, task)[1][name]["snr_db"] is None  # no noise, no ratio


def test_compare():
    places = {"layers.0.v_proj": (0, "v_proj"), "layers.1.v_proj": (1, "v_proj")}
    r = torch.tensor([[3.0, 4.0]])
    same, turned = compare(
        {"layers.0.v_proj": r, "layers.1.v_proj": torch.tensor([[8.0, -6.0]])}, dict.fromkeys(places, r), places
    )
    assert (same["ratio"], same["cosine"], same["deviation"]) == (1.0, 1.0, 0.0)
    assert (turned["norm_sq"], turned["ratio"], turned["cosine"], turned["deviation"]) == (100.0, 4.0, 0.0, 5.0)
    assert (turned["block"], turned["kind"], turned["weights"]) == (1, "v_proj", 2)
    none = compare({"layers.0.v_proj": r}, {"layers.0.v_proj": 0 * r}, {"layers.0.v_proj": (0, "v_proj")})[0]
    assert (none["ratio"], none["cosine"], none["deviation"]) == (None, None, None)


def test_watch_during_training_sees_what_the_weights_receive():
    model = tiny_llama()
    seen = {}
    with watch(model, list(projections(model)), gradient=seen.__setitem__):
        task(model(input_ids=BATCHES[0]).logits, model(input_ids=BATCHES[0]).logits.detach(), BATCHES[0]).backward()
    assert close(seen, {name: model.get_submodule(name).weight.grad for name in projections(model)})


def test_refusals():
    with pytest.raises(ValueError, match="no linear layers in numbered blocks"):
        projections(nn.Sequential())
    with pytest.raises(ValueError, match="no batches"):
        gradients(tiny_llama(), tiny_llama(), [], task)
    with pytest.raises(ValueError, match=r"no layer model.layers.2"):
        gradients(tiny_llama(num_hidden_layers=3), tiny_llama(), BATCHES, task)
    broken = tiny_llama()
    broken.model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="loss of the measured model is nan"):
        gradients(broken, tiny_llama(), BATCHES, task)


# ------------------------------------------------------------------------------------------------ conclusions


def layer(kind, block=0, norm_sq=1.0, deviation=0.1, ratio=1.0, weights=100, snr=20.0):
    parent = "self_attn" if kind[0] in "qkvo" else "mlp"
    row = {"name": f"layers.{block}.{parent}.{kind}", "block": block, "kind": kind, "weights": weights}
    row |= {"norm_sq": norm_sq, "ratio": ratio, "cosine": 0.9, "deviation": deviation}
    return row | {"snr_db": snr, "mean": 0.0, "variance": 1.0}


KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")


def measured(arm, seed, loud=("v_proj", "o_proj"), **changes):
    layers = [
        layer(k, **({"norm_sq": 9.0, "ratio": 2.0, "deviation": 0.5} if k in loud else {}), **changes) for k in KINDS
    ]
    spikes = {r["name"]: 7.0 if r["kind"] in loud else 2.0 for r in layers}
    curves = {k: [1.0, 2.0 if arm == "kd-qat" else 1.5 if "frozen" in arm else 1.2] for k in KINDS}
    return {"arm": arm, "seed": seed, "layers": layers, "spikes": spikes, "curves": curves}


def test_by_kind_and_excess():
    rows = [
        layer("v_proj", 0, norm_sq=1.0, deviation=0.4),
        layer("v_proj", 1, norm_sq=4.0),
        layer("up_proj", weights=200),
    ]
    cells = by_kind(rows)
    assert cells["v_proj"]["norm_sq"] == pytest.approx(2.0)  # geometric
    assert cells["v_proj"]["deviation"] == pytest.approx(0.25)
    assert cells["v_proj"]["weights"] == 200
    # noise: 0.4 * 1 + 0.1 * 4 = 0.8 of 0.9 on half of the weights
    assert cells["v_proj"]["excess"] == pytest.approx(0.8 / 0.9 / 0.5)
    assert cells["up_proj"]["excess"] == pytest.approx(0.1 / 0.9 / 0.5)


def test_spike():
    assert spike([1.0, 2.0, 8.0]) == 4.0
    assert spike([1.0, 2.0, 4.0, 9.0]) == 3.0
    assert spike([]) is None and spike([0.0, 0.0, 5.0]) is None


def test_suggestion_follows_the_measurement():
    loud = [by_kind(measured("ptq", s)["layers"]) for s in range(2)]
    assert set(suggestion(loud)) == {"v_proj", "o_proj"}
    assert suggestion([by_kind(measured("ptq", 0, loud=("up_proj",))["layers"])]) == ["up_proj"]
    assert suggestion([by_kind(measured("ptq", 0, loud=())["layers"])]) == []
    assert suggestion([loud[0], by_kind(measured("ptq", 1, loud=())["layers"])]) == []  # not in every seed


def test_verdict_can_go_either_way():
    frozen = "kd-qat, frozen v_proj,o_proj"
    rows = []
    for seed in range(3):
        rows += [measured("fp", seed), measured("ptq", seed), measured("fp, trained", seed, loud=())]
        rows += [measured("kd-qat", seed, snr=20.0), measured(frozen, seed, snr=25.0)]
    found = {row["test"]: row["holds"] for row in verdict(rows)}
    assert len(found) == 9
    assert sum(holds == "yes" for holds in found.values()) == 8
    gradients_closer = next(t for t in found if "gradients of the other projections" in t)
    assert found[gradients_closer] == "no"  # equal is not closer
    against = [measured("ptq", seed, loud=("q_proj", "o_proj")) for seed in range(3)]
    assert {row["holds"] for row in verdict(against)} == {"no"}
    mixed = [*against[:2], measured("ptq", 2)]
    assert {row["holds"] for row in verdict(mixed)} == {"in 1 of 3 seeds"}
    other = [{**r, "layers": [x for x in r["layers"] if x["kind"] != "v_proj"]} for r in against]
    assert attention_kinds(other[0]["layers"]) == [] and verdict(other) == []
