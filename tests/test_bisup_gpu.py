"""Weight-activation quantization on a GPU: captured steps end where eager ones do, in fp32 and under autocast."""

from __future__ import annotations

import pytest
import torch
from tiny import learnable_tokens, some_tokens, tiny_llama

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.prompt import prompt_cache, prompted_perplexity
from pyquant.recipes.bisup import BiSup, bisup

pytestmark = [pytest.mark.gpu]
SPEC = QuantSpec(3, 32)


@pytest.mark.parametrize("host", ["rtn", "atom", "quarot"])
@pytest.mark.parametrize("autocast", [False, True])
def test_captured_training_is_eager_training(host, autocast):
    model, tokens = tiny_llama().cuda(), learnable_tokens(16, 24)
    fields = {"host": host, "act_bits": 3, "steps": 16, "batch_size": 4, "autocast": autocast}
    eager, captured = (bisup(model, tokens, SPEC, BiSup(**fields, graphs=graphs)) for graphs in (False, True))
    for (name, a), b in zip(eager.model.state_dict().items(), captured.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(row["best"] < row["before"] for row in captured.rows[:1])


def test_the_cpu_agrees():
    """Bare hosts have no training in which rounding errors could grow: the same weights but for scales on a threshold."""
    tokens = learnable_tokens(8, 24)
    for host in ("rtn", "quarot"):
        how = BiSup(host=host, act_bits=4, parts=(), batch_size=4, autocast=False)
        on_cpu = bisup(tiny_llama(), tokens, QuantSpec(4, 32), how).model
        on_gpu = bisup(tiny_llama().cuda(), tokens, QuantSpec(4, 32), how).model
        a, b = (m(tokens.to(d)).logits.float().cpu() for m, d in ((on_cpu, "cpu"), (on_gpu, "cuda")))
        assert (a - b).norm() < 0.05 * a.norm()  # an input on a threshold moves by a whole step of 4 bits


def test_the_prompt_on_a_gpu():
    model, prompt = tiny_llama().cuda(), some_tokens(1, 7)[0]
    made = bisup(model, learnable_tokens(8, 24), SPEC, BiSup(act_bits=3, parts=(), batch_size=4))
    values = [
        prompted_perplexity(made.model, some_tokens(4, 24), prompt_cache(made.model, model, prompt, 3, s, 32), 3, 32)
        for s in ("none", "both")
    ]
    assert values[0] != values[1]
    assert all(v < 1e6 for v in values)
