"""Block-wise quantization on a GPU: captured steps are the eager ones, and runs repeat to the bit."""

from __future__ import annotations

import pytest
import torch
from tiny import some_tokens, tiny_llama

from pyquant.formats.spec import QuantSpec
from pyquant.quantizers.ranges import find_range
from pyquant.recipes.blockwise import Result, blockwise
from pyquant.recipes.gptq import Hessian, gptq_weight
from pyquant.recipes.settings import Settings
from pyquant.recipes.train_window import rates, train

pytestmark = pytest.mark.gpu


def run(length: int = 32, **changes) -> Result:
    fields = {"batch_size": 4, "steps": 16, **changes}
    model = tiny_llama(initializer_range=0.1, num_hidden_layers=3).cuda()
    return blockwise(model, some_tokens(16, length), QuantSpec(3, 32), Settings(**fields))


def share_of_equal_codes(a: Result, b: Result) -> float:
    pairs = [(x.codes, b.blocks[i].layers[n].codes) for i, r in a.blocks.items() for n, x in r.layers.items()]
    return sum(int((x == y.to(x.device)).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


def test_a_captured_step_is_the_eager_step():
    found = {}
    for graphs in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 32, device="cuda"))
        data, x = torch.randn(8, 32, device="cuda"), torch.empty(2, 32, device="cuda")
        order = torch.arange(8, device="cuda").view(4, 2).repeat(8, 1)
        outcome = train(
            [p], [1.0], lambda p=p, x=x: (x @ p.T - 1).square().mean(),
            lambda i, d=data, x=x: torch.index_select(d, 0, i, out=x), lambda: None,
            order, order[:1], rates(32, 0.05, "adamw").cuda(), "adamw", graphs=graphs,
        )  # fmt: skip
        assert outcome.best < 0.5 * outcome.before
        found[graphs] = p.detach().clone(), outcome
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-6)
    assert found[True][1].best == pytest.approx(found[False][1].best, rel=1e-4)


@pytest.mark.parametrize("arm", [{}, {"window": 2, "stride": 1}, {"lookahead": "end", "end_mse": 1.0}], ids=str)
def test_runs_repeat_to_the_bit_and_graphs_change_nothing(arm):
    first = run(**arm)
    assert all(row["best"] <= row["before"] and not row["failed"] for row in first.rows)
    assert share_of_equal_codes(first, run(**arm)) == 1.0
    # other kernels may be chosen under capture; a code at a boundary follows the last bit of a gradient's sign
    assert share_of_equal_codes(first, run(**arm, graphs=False)) > 0.98
    assert share_of_equal_codes(first, run(**arm, seed=5)) < 0.98


def test_attention_over_long_windows_repeats_to_the_bit():
    first = run(length=512, steps=48)  # long enough for backward passes that add up in any order, if allowed
    assert share_of_equal_codes(first, run(length=512, steps=48)) == 1.0


def test_bf16_products_come_close_to_fp32():
    a, b = run(autocast=False), run()
    assert share_of_equal_codes(a, b) > 0.7
    assert b.rows[-1]["best"] == pytest.approx(a.rows[-1]["best"], rel=0.1)


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(2, -1, False)], ids=str)
def test_gptq_from_graphs_is_the_cpus(spec):
    torch.manual_seed(0)
    w, x = torch.randn(24, 192), torch.randn(400, 192) @ (torch.eye(192) + 0.05 * torch.randn(192, 192))
    hessian = Hessian(192, x.device)
    hessian.see(x)
    scale, zero = find_range(w, spec, "mse")
    want = gptq_weight(w, hessian.value(), scale, zero, spec)
    moved = torch.empty(24, 192, device="cuda")
    arguments = (hessian.value().cuda(), scale.cuda(), None if zero is None else zero.cuda(), spec)
    got = gptq_weight(w.cuda(), *arguments, moved=moved)
    assert ((got.cpu() - want).abs() < 1e-4).float().mean() > 0.98  # ties at a boundary may fall the other way
    assert torch.equal(got, gptq_weight(w.cuda(), *arguments))
