"""prepare_for_inference on a GPU: the captured step, the loop that runs ahead of what the host knows."""

from __future__ import annotations

import copy

import pytest
import torch
from prepared import Collect, left_padded, make
from tiny import some_tokens

import pyquant
from pyquant import QuantSpec
from pyquant.integrations.read_decoder import read_decoder
from pyquant.nn.decoder import Captured

pytestmark = pytest.mark.gpu

FIELDS = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8,
          "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.05}  # fmt: skip


def build(kind="llama", dtype=torch.bfloat16, **changes):
    model = make(kind, quantized=False, **{**FIELDS, **changes}).to("cuda", dtype)
    pyquant.swap(model, QuantSpec(4, 128))
    return model.requires_grad_(False)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_captured_step_gives_the_logits_of_the_model(kind, dtype, batch):
    model = build(kind, dtype)
    exact = copy.deepcopy(model).float()
    ids, prompt = some_tokens(batch, 90).cuda(), 70
    want = exact(ids).logits[:, prompt - 1 :]
    plain = model(ids).logits[:, prompt - 1 :].float()
    decoder = read_decoder(model)
    state = decoder.new_state(batch, 128)
    captured = Captured(lambda: decoder.step(state), ids.device)
    got = [decoder.prefill(state, ids[:, :prompt]).float()]
    for i in range(prompt, 90):
        state.advance(ids[:, i])
        got.append(captured().float().clone())
    off = [float((t - want).norm() / want.norm()) for t in (torch.stack(got, 1), plain)]
    # Both round activations to 16 bits at about the same places: the fused one may not be worse than 1.5 times.
    assert off[0] < 1.5 * off[1] + 1e-3
    assert off[0] < (0.06 if dtype == torch.bfloat16 else 0.01)


def test_generate_is_the_step_by_step_choice(no_fallback):
    """Tokens of the run-ahead loop equal a loop that waits for each step; ends, padding and streams included."""
    model = pyquant.prepare_for_inference(build())
    decoder = model.generate.args[1].decoder(model)
    inputs = {k: v.cuda() for k, v in left_padded(some_tokens(3, 40), (0, 9, 20)).items()}
    state = decoder.new_state(3, 256)
    state.begin(inputs["input_ids"])
    start = torch.tensor([0, 9, 20], dtype=torch.int32, device="cuda")
    chosen = [decoder.prefill(state, inputs["input_ids"], start).argmax(-1)]
    for _ in range(99):
        state.advance(chosen[-1])
        torch.cuda.synchronize()
        chosen.append(decoder.step(state).argmax(-1))
        torch.cuda.synchronize()
    want = torch.stack(chosen, 1)
    for _ in range(3):
        got = model.generate(**inputs, max_new_tokens=100, do_sample=False, eos_token_id=None)
        assert torch.equal(got[:, 40:], want)
    ends = want[:, 30].unique()
    first = (want[:, :, None] == ends).any(-1).int().argmax(1)  # each row ends at its first of them
    got = model.generate(**inputs, max_new_tokens=100, do_sample=False, eos_token_id=ends.tolist())
    assert got.shape[1] == 40 + int(first.max()) + 1
    for row, last in enumerate(first.tolist()):
        assert torch.equal(got[row, 40 : 40 + last + 1], want[row, : last + 1])
        assert (got[row, 40 + last + 1 :] == 1).all()
    stream = Collect()
    one = model.generate(inputs["input_ids"][:1], max_new_tokens=50, do_sample=False, streamer=stream)
    assert [t for part in stream.got[1:] for t in part] == one[0, 40:].tolist()


def test_sampling_follows_the_seed(no_fallback):
    model = pyquant.prepare_for_inference(build())
    ids = some_tokens(2, 20).cuda()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(ids, max_new_tokens=60, do_sample=True, top_p=0.9))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
