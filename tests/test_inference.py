"""prepare_for_inference: the same tokens and logits as before, by the fused step, from a plain ``model.generate``."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from prepared import KINDS, SHARED, Collect, left_padded, make
from tiny import VOCAB, byte_tokenizer, some_tokens
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import pyquant
from pyquant import QLinear, QuantSpec
from pyquant.integrations import inference
from pyquant.integrations.read_decoder import read_decoder


def both(model, seed=None, **arguments):
    """(before, after) preparing: what generate returns."""
    results = []
    for prepare in (False, True):
        if prepare:
            pyquant.prepare_for_inference(model)
        if seed is not None:
            torch.manual_seed(seed)
        results.append(model.generate(**arguments))
    return results


# ------------------------------------------------------------------------------------------------ same results


@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 5, 11)], ids=["full", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens(no_fallback, kind, padding):
    model = make(kind.split()[0], **KINDS[kind])
    inputs = left_padded(some_tokens(3, 17), padding)
    before, after = both(model, **inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(before, after)
    assert len({tuple(row[17:].tolist()) for row in after}) == 3, "the prompts matter"


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits(kind):
    """Prompt and steps against the whole sequence in one forward pass; a planted fault does not pass."""
    model = make(kind.split()[0], **KINDS[kind])
    ids, prompt = some_tokens(2, 30), 13
    want = model(ids).logits
    decoder = read_decoder(model)
    fused = decoder.layers[0].qkv
    assert (fused.weight is not None) and fused.copied == ("shared" not in kind and "head_dim" not in KINDS[kind])

    def run():
        state = decoder.new_state(2, 64)
        logits = [decoder.prefill(state, ids[:, :prompt])]
        for i in range(prompt, 30):
            state.advance(ids[:, i])
            logits.append(decoder.step(state))
        return torch.stack(logits, 1)

    def off(got):
        return float((got - want[:, prompt - 1 :]).norm() / want[:, prompt - 1 :].norm())

    # fp32 throughout: sums of up to 200 terms in another order, some 20 layers of them
    assert off(run()) < 1e-5
    layer = decoder.layers[1]
    for name, wrong in (("before_mlp", layer.before_mlp.roll(1)), ("window", 3), ("qkv", decoder.layers[0].qkv)):
        right = getattr(layer, name)
        setattr(layer, name, wrong)
        assert off(run()) > 1e-3, f"a wrong {name} went unnoticed"
        setattr(layer, name, right)
    assert off(run()) < 1e-5


class Ban(LogitsProcessor):
    """Forbids what the text already holds: depends on the ids it is given, and on nothing else."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, -torch.inf)


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "repetition_penalty": 1.5, "min_new_tokens": 5},
        {"do_sample": False, "logits_processor": LogitsProcessorList([Ban()])},
        {"do_sample": False, "eos_token_id": list(range(2, 100))},
        {"do_sample": True, "eos_token_id": list(range(2, 60)), "min_new_tokens": 3},
        {"do_sample": False, "eos_token_id": None},
        {"generation_config": GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=1)},
        {"do_sample": False, "max_length": 17},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=lambda a: "-".join(f"{k}" for k in a),
)
def test_same_tokens_whatever_is_asked_for(no_fallback, arguments):
    model = make("qwen3", **SHARED)
    inputs = left_padded(some_tokens(4, 16), (0, 3, 0, 7))
    if "generation_config" not in arguments and "max_length" not in arguments:
        arguments = {"max_new_tokens": 20, **arguments}
    before, after = both(model, seed=5, **inputs, **arguments)
    assert torch.equal(before, after)


def test_ends_where_all_sequences_end(no_fallback):
    """Every token as the end of text, and two of three: stops at the first, pads those that ended earlier."""
    model = make(**SHARED)
    inputs = left_padded(some_tokens(3, 10), (0, 0, 0))
    before, after = both(model, **inputs, max_new_tokens=20, eos_token_id=list(range(VOCAB)))
    assert torch.equal(before, after)
    assert after.shape == (3, 11)
    before, after = both(model, **inputs, max_new_tokens=60, eos_token_id=list(range(20, 200)))
    assert torch.equal(before, after)
    assert (after[:, -1] == 1).any(), "rows that ended early are padded"


def test_one_state_serves_shorter_calls_and_grows_for_longer_ones(no_fallback):
    model = make(**SHARED)
    prompts = [
        some_tokens(2, 9, seed=3),
        some_tokens(2, 40, seed=4),
        some_tokens(3, 5, seed=5),
        some_tokens(2, 9, seed=6),
    ]
    lengths = [10, 300, 7, 30]
    want = [
        model.generate(p, max_new_tokens=n, do_sample=False) for p, n in zip(prompts, lengths, strict=True)
    ]  # fmt: skip
    pyquant.prepare_for_inference(model)
    plan = model.generate.args[1]
    states = []
    for p, n, w in zip(prompts, lengths, want, strict=True):
        assert torch.equal(model.generate(p, max_new_tokens=n, do_sample=False), w)
        states.append(plan._state)
    assert states[0].capacity == 256
    assert states[1].capacity == 512
    again = model.generate(prompts[3], max_new_tokens=lengths[3], do_sample=False)
    assert torch.equal(again, want[3])
    assert plan._state is states[3]


@pytest.mark.parametrize("eos", [None, list(range(2, 120))])
def test_streamers_get_what_transformers_gives_them(no_fallback, eos, capsys):
    model, ids = make(**SHARED), some_tokens(1, 8)
    streams = []
    for prepare in (False, True):
        if prepare:
            pyquant.prepare_for_inference(model)
        streams.append(Collect())
        model.generate(ids, max_new_tokens=15, do_sample=False, eos_token_id=eos, streamer=streams[-1])
    assert streams[1].over
    assert streams[0].got == streams[1].got
    model.generate(ids, max_new_tokens=15, streamer=TextStreamer(byte_tokenizer()), do_sample=False)
    assert capsys.readouterr().out


def test_time_runs_out(no_fallback):
    model = pyquant.prepare_for_inference(make(**SHARED))
    stop = StoppingCriteriaList([MaxTimeCriteria(max_time=0.0)])
    out = model.generate(some_tokens(1, 8), max_new_tokens=200, stopping_criteria=stop, do_sample=False)
    assert 9 <= out.shape[1] < 12


# ------------------------------------------------------------------------------------------------ what is left alone


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


HOLES = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"use_cache": False}, "use_cache=False"),
        ({"stopping_criteria": StoppingCriteriaList([Never()])}, "the stopping criterion Never"),
        ({"attention_mask": HOLES}, "zeros that are no padding on the left"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size=4"),
    ],
    ids=lambda a: a if isinstance(a, str) else "-".join(a),
)
def test_other_calls_run_as_before_with_one_warning(arguments, why, caplog):
    model, ids = make(**SHARED), some_tokens(1, 8)
    arguments = {"max_new_tokens": 6, "do_sample": False, **arguments}
    before = model.generate(ids, **arguments)
    pyquant.prepare_for_inference(model)
    with caplog.at_level(logging.WARNING, "pyquant"):
        after = [model.generate(ids, **arguments) for _ in range(2)]
    if hasattr(before, "sequences"):
        before, after = before.sequences, [a.sequences for a in after]
    assert all(torch.equal(before, a) for a in after)
    assert [r.getMessage() for r in caplog.records if why in r.getMessage()] == [caplog.records[-1].getMessage()]


def test_custom_generate_and_training_mode_are_respected(caplog):
    model = pyquant.prepare_for_inference(make(**SHARED))
    assert model.generate(some_tokens(1, 4), custom_generate=lambda model, input_ids, **kwargs: "theirs") == "theirs"
    model.train()
    with caplog.at_level(logging.WARNING, "pyquant"):
        model.generate(some_tokens(1, 4), max_new_tokens=2, do_sample=False)
    assert "training mode" in caplog.text


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def wrap_one(model):
    model.model.layers[1].mlp.up_proj = Wrapped(model.model.layers[1].mlp.up_proj)
    return model


def hook_one(model):
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: nn.Linear(4, 4), "Linear is none of LlamaForCausalLM"),
        (lambda: make(hidden_act="gelu"), "its activation is gelu, not silu"),
        (lambda: make(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
        (lambda: wrap_one(make()), "layer 1.up_proj is a Wrapped"),
        (lambda: hook_one(make()), "layer 0.q_proj has hooks"),
    ],
    ids=["class", "activation", "rope", "wrapped", "hook"],
)
def test_other_models_are_left_as_they_are(build, why, caplog):
    model = build()
    with caplog.at_level(logging.WARNING, "pyquant"):
        assert pyquant.prepare_for_inference(model) is model
    assert "generate" not in vars(model)
    assert [r for r in caplog.records if why in r.getMessage()] == caplog.records


def test_refuses_other_head_bits():
    with pytest.raises(ValueError, match="lm_head_bits=8 must be 16 or 4"):
        pyquant.prepare_for_inference(make(), lm_head_bits=8)


# ------------------------------------------------------------------------------------------------ a model stays a model


@pytest.mark.parametrize("kind", ["llama", "llama shared"])
def test_files_and_forward_stay_the_same(tmp_path, kind):
    model = make(**KINDS[kind])
    ids = some_tokens(2, 12)
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(ids).logits
    pyquant.prepare_for_inference(model)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(model(ids).logits, logits)
    other = make(**KINDS[kind], quantized=False)
    pyquant.swap(other, QuantSpec(4, 32))
    other.load_state_dict(after)
    pyquant.prepare_for_inference(other)
    assert torch.equal(other(ids).logits, logits)
    model.load_state_dict(before)  # replaces what was fused
    assert torch.equal(
        model.generate(ids, max_new_tokens=9, do_sample=False), other.generate(ids, max_new_tokens=9, do_sample=False)
    )


def test_changes_after_preparing_are_noticed():
    model, ids = make(**SHARED), some_tokens(2, 12)
    pyquant.prepare_for_inference(model)
    first = model.generate(ids, max_new_tokens=9, do_sample=False)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(ids, max_new_tokens=9, do_sample=False), first)
    assert twin.generate.args[0] is twin
    down = model.model.layers[0].mlp.down_proj
    other = nn.Linear(down.in_features, down.out_features, bias=False)
    model.model.layers[0].mlp.down_proj = QLinear.from_linear(other, QuantSpec(4, 32)).requires_grad_(False)
    changed = model.generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(changed, type(model).generate(model, ids, max_new_tokens=9, do_sample=False))
    assert not torch.equal(changed, first)
    assert torch.equal(twin.generate(ids, max_new_tokens=9, do_sample=False), first)
    model.bfloat16()
    assert model.generate(ids, max_new_tokens=9, do_sample=False).shape == (2, 21)
    assert model.generate.args[1]._state.cache[0][0].dtype == torch.bfloat16
    inference.undo(model)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2 unshared"])
def test_weights_written_after_preparing_are_noticed(kind):
    """Fused biases, and weights that had to be tiled anew, are copies."""
    fields = SHARED if kind == "qwen2" else {}
    model, ids = make("qwen2", **fields), some_tokens(2, 12)
    pyquant.prepare_for_inference(model)
    first = model.generate(ids, max_new_tokens=9, do_sample=False)
    for _ in range(2):
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.bias.add_(1)
        second = model.generate(ids, max_new_tokens=9, do_sample=False)
        assert torch.equal(second, type(model).generate(model, ids, max_new_tokens=9, do_sample=False))
        assert not torch.equal(first, second)
        first = second
    state = model.state_dict()
    for name in state:
        if "up_proj.weight_packed" in name:
            state[name] = state[name].flip(0)
    model.load_state_dict(state)
    third = model.generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(third, type(model).generate(model, ids, max_new_tokens=9, do_sample=False))
    assert not torch.equal(second, third)


def test_inference_mode_leaves_no_traces():
    """What the first call makes under inference_mode serves later calls, and training, outside of it."""
    model, ids = make(**SHARED), some_tokens(2, 12)
    with torch.inference_mode():
        pyquant.prepare_for_inference(model)
        first = model.generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), first)
    x = torch.randn(3, model.config.hidden_size, requires_grad=True)
    model.model.layers[0].self_attn.q_proj(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_unquantized_layers_are_served_too(no_fallback):
    model = make(quantized=False, **SHARED)
    assert torch.equal(*both(model, input_ids=some_tokens(2, 12), max_new_tokens=9, do_sample=False))
    mixed = make(quantized=False, **SHARED)
    pyquant.swap(mixed, QuantSpec(4, 32), exclude=["lm_head", "v_proj", "layers.0.*"])
    assert torch.equal(*both(mixed, input_ids=some_tokens(2, 12), max_new_tokens=9, do_sample=False))


def test_a_head_of_4_bits():
    model = make(tie_word_embeddings=True, **SHARED)
    head = model.lm_head.weight.clone()
    ids = some_tokens(2, 12)
    pyquant.prepare_for_inference(model, lm_head_bits=4)
    decoder = model.generate.args[1].decoder(model)
    got = decoder.prefill(decoder.new_state(2, 64), ids)
    want = model(ids).logits[:, -1]
    assert torch.equal(model.lm_head.weight, head), "the model keeps its own"
    error = float((got - want).norm() / want.norm())
    assert 0.01 < error < 0.2  # 4 bits of random weights: steps of about a third of their deviation
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (2, 17)


def test_llama_is_not_changed_for_everyone():
    pyquant.prepare_for_inference(make())
    assert "generate" not in vars(LlamaForCausalLM)
