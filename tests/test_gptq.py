"""GPTQ against its definition, and the walk over a decoder's blocks."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn

from pyquant import reference
from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import QLinear
from pyquant.quantizers import find_range
from pyquant.recipes.blocks import find_blocks, first_calls, run_block
from pyquant.recipes.gptq import Hessian, gptq, gptq_weight, inverse_factor
from pyquant.recipes.rtn import rtn

SPECS = [QuantSpec(4, 32), QuantSpec(3, -1), QuantSpec(2, 64, False)]


def correlated(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Inputs whose columns are correlated and differ in size, as activations are."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=make) / k**0.5 + torch.eye(k)
    return torch.randn(tokens, k, generator=make) @ mix * torch.exp(torch.randn(k, generator=make))


def problem(spec: QuantSpec, n: int = 24, k: int = 192) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(w, H, scale, zero)."""
    torch.manual_seed(1)
    w = torch.randn(n, k)
    hessian = Hessian(k, torch.device("cpu"))
    hessian.see(correlated(500, k).view(5, 100, k))
    return w, hessian.value(), *find_range(w, spec, "mse")


def by_definition(w: Tensor, h: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, damp: float) -> Tensor:
    """Column by column in fp64: round, then move all later columns to the optimum, with a new inverse each time."""
    w, k = w.double().clone(), w.shape[1]
    h = h.double() + damp * h.double().diagonal().mean() * torch.eye(k, dtype=torch.float64)
    out = torch.empty_like(w)
    for i in range(k):
        group = 0 if spec.group_size == -1 else i // spec.group_size
        z = None if zero is None else zero[:, group : group + 1].double()
        column = w[:, i : i + 1]
        out[:, i : i + 1] = reference.fake_quant(column, scale[:, group : group + 1].double(), z, -1, spec.bits)
        inverse = torch.linalg.inv(h[i:, i:])
        w[:, i:] -= (column - out[:, i : i + 1]) / inverse[0, 0] * inverse[0]
    return out


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_the_definition(spec):
    w, h, scale, zero = problem(spec)
    got = gptq_weight(w, h, scale, zero, spec, act_order=False, damp=0.01)
    want = by_definition(w, h, scale, zero, spec, 0.01)
    same = (got - want).abs() < 1e-4 * want.abs().max()
    assert same.float().mean() > 0.99  # in fp32 a value at a boundary may fall the other way, and its row follows


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_are_on_the_grid_and_the_error_falls(spec, act_order):
    w, h, scale, zero = problem(spec)
    got = gptq_weight(w, h, scale, zero, spec, act_order)
    assert torch.equal(reference.fake_quant(got, scale, zero, spec.group_size, spec.bits), got)
    nearest = reference.fake_quant(w, scale, zero, spec.group_size, spec.bits)

    def loss(v: Tensor) -> float:
        return ((v - w) @ h * (v - w)).sum().item()

    assert loss(got) < 0.75 * loss(nearest)  # 2 bits gain the least: many weights are clipped either way


def test_inputs_without_correlation_leave_nothing_to_make_up_for():
    spec = QuantSpec(4, 32)
    w, _, scale, zero = problem(spec)
    h = torch.diag(torch.rand(192) + 0.1)
    nearest = reference.fake_quant(w, scale, zero, spec.group_size, spec.bits)
    assert torch.equal(gptq_weight(w, h, scale, zero, spec), nearest)


def test_dead_inputs_and_a_singular_hessian():
    spec = QuantSpec(4, 32)
    w, _, scale, zero = problem(spec)
    x = correlated(50, 192)  # fewer tokens than columns: singular
    x[:, 7] = 0
    hessian = Hessian(192, x.device)
    hessian.see(x)
    got = gptq_weight(w, hessian.value(), scale, zero, spec)
    assert torch.isfinite(got).all()
    assert (got[:, 7] == 0).all()


def test_inverse_factor_raises_the_damping_and_then_gives_up():
    h = torch.randn(16, 16)
    h = h @ h.T
    upper = inverse_factor(h, 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(16)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(16), rtol=1e-3, atol=1e-3)
    bent = h - 0.05 * h.diagonal().mean() * torch.eye(16)
    assert torch.linalg.eigvalsh(bent).min() < 0
    assert torch.isfinite(inverse_factor(bent, 0.001)).all()
    with pytest.raises(ValueError, match="not positive definite, even with damping 1"):
        inverse_factor(h - 4 * h.diagonal().mean() * torch.eye(16), 0.01)
    h[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        inverse_factor(h, 0.01)


def test_hessian_is_the_mean_over_all_tokens():
    x = correlated(60, 8)
    whole, parts = Hessian(8, x.device), Hessian(8, x.device)
    whole.see(x)
    parts.see(x[:10].view(2, 5, 8))
    parts.see(x[10:])
    torch.testing.assert_close(whole.value(), parts.value())
    torch.testing.assert_close(whole.value(), 2 * x.T @ x / 60)


# ------------------------------------------------------------------------------------------------ blocks


def tokens(n: int = 8, length: int = 48) -> Tensor:
    return torch.randint(0, 288, (n, length), generator=torch.Generator().manual_seed(5))


def test_blocks_are_found_and_carry_the_hidden_states():
    model = tiny_llama()
    name, blocks = find_blocks(model)
    assert name == "model.layers"
    batch = tokens()
    (call,) = first_calls(model, blocks, [batch])
    want = model(batch, output_hidden_states=True).hidden_states
    assert torch.equal(call.hidden, want[0])
    call.hidden = run_block(blocks[0], call)
    torch.testing.assert_close(call.hidden, want[1])
    torch.testing.assert_close(model.model.norm(run_block(blocks[1], call)), want[2])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no blocks to walk: looked for an nn\.ModuleList"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="no calibration batches"):
        gptq(tiny_llama(), [], QuantSpec(4, 32))


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, 32), QuantSpec(2, 32, False)], ids=str)
def test_gptq_keeps_more_of_a_block_than_rtn(spec):
    model, batch = tiny_llama(), tokens(16)
    _, blocks = find_blocks(model)
    (call,) = first_calls(model, blocks, [batch])
    want = run_block(blocks[0], call)
    errors = {}
    for name in ("rtn", "gptq"):
        model = tiny_llama()
        _, blocks = find_blocks(model)
        if name == "rtn":
            report = rtn(model, spec, "mse")
        else:
            seen: list[str] = []
            report = gptq(model, batch.split(4), spec, on_layer=seen.append)
            assert sorted(seen) == sorted(report.changed)
        assert len(report.changed) == 14
        assert report.kept == {"lm_head": "excluded by name"}
        errors[name] = (run_block(blocks[0], call) - want).norm().item()
    # random weights on random tokens: hardly any correlation for the method to use, so a tenth is what there is to gain
    assert errors["gptq"] < 0.95 * errors["rtn"], errors


def test_later_blocks_see_what_quantized_blocks_produce(monkeypatch):
    hidden = []
    whole = run_block

    def watched(block, call):
        hidden.append(call.hidden.clone())
        return whole(block, call)

    monkeypatch.setattr("pyquant.recipes.gptq.run_block", watched)
    model, batch = tiny_llama(), tokens()
    _, blocks = find_blocks(model)
    gptq(model, [batch], QuantSpec(2, 32))
    (call,) = first_calls(model, blocks, [batch])
    assert isinstance(blocks[0].mlp.up_proj, QLinear)
    torch.testing.assert_close(hidden[-1], whole(blocks[0], call))  # the second block's input: from QLinear weights


def test_layers_outside_the_blocks_are_left_and_said_so():
    model = tiny_llama(tie_word_embeddings=False)
    report = gptq(model, [tokens()], QuantSpec(4, 32), exclude=["k_proj"])
    assert report.kept["lm_head"] == "outside the decoder's blocks"
    assert report.kept["model.layers.0.self_attn.k_proj"] == "excluded by name"
    assert len(report.changed) == 12


def test_broken_inputs_name_the_layer():
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: .*NaN or Inf"):
        gptq(model, [tokens()], QuantSpec(4, 32))
