"""QLinear with quantized inputs: what it computes, fused layers, the configuration, and a checkpoint written and read."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import save_tiny, some_tokens, tiny_llama

from pyquant.formats.spec import ActSpec, QuantSpec
from pyquant.integrations.act_config import act_of, common_act, input_activations, set_act
from pyquant.integrations.evaluate import probe_logits
from pyquant.integrations.export import export, verify
from pyquant.integrations.read_decoder import read_decoder
from pyquant.integrations.transformers import PyQuantConfig, compressed_tensors_config, load_causal_lm, load_model
from pyquant.nn import QLinear
from pyquant.nn.fused import FusedLinear
from pyquant.ops import silu_and_mul
from pyquant.recipes.rtn import rtn
from pyquant.recipes.vocabulary import fake_quant_tokens

ACTS = [ActSpec(8), ActSpec(4, 32), ActSpec(3, 64, 0.9), ActSpec(8, kind="float")]
SPEC = QuantSpec(4, 32)


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(4, 64), QuantSpec(4, -1, False), QuantSpec(3, 32)], ids=str)
def test_layer_multiplies_rounded_inputs(spec, act):
    """The same as rounding inputs and multiplying by w_hat, up to fp32 sums; not the same as without rounding."""
    linear = torch.nn.Linear(192, 70)
    layer = QLinear.from_linear(linear, spec)
    layer.act = act
    x = torch.randn(2, 5, 192)
    with torch.no_grad():
        got = layer(x)
        if act.kind == "int":
            rounded = fake_quant_tokens(x, act.bits, act.group_size, act.clip)
        else:
            scale = x.abs().amax(-1, keepdim=True) / 448
            rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
        want = torch.nn.functional.linear(rounded.double(), layer.dequantize().double(), linear.bias.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)  # fp32: 192 terms of size about 1
    layer.act = None
    with torch.no_grad():
        assert (layer(x) - got).abs().max() > 1e-3
    assert str(act) not in str(layer)


def test_layer_is_for_inference():
    layer = QLinear.from_linear(torch.nn.Linear(64, 64), SPEC)
    layer.act = ActSpec(8)
    with pytest.raises(ValueError, match=r"has no gradient; call it under torch\.no_grad"):
        layer(torch.randn(2, 64, requires_grad=True))
    assert "A8 a token" in str(layer)


def test_fused_layers_share_one_way():
    layers = [QLinear.from_linear(torch.nn.Linear(64, n), SPEC) for n in (64, 70)]
    for layer in layers:
        layer.act = ActSpec(4, 32)
    x = torch.randn(3, 64)
    with torch.no_grad():
        want = torch.cat([layer(x) for layer in layers], -1)
        fused = FusedLinear(layers)
        assert fused.why is None
        assert torch.equal(fused(x), want)
    layers[1].act = ActSpec(8)
    assert "act differ" in (FusedLinear(layers).why or "")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bits": 9}, "act_bits=9 must be between 2 and 8"),
        ({"group_size": 48}, "act_group_size=48 must be one of"),
        ({"clip": 0.0}, r"act_clip=0 must be in \(0, 1\]"),
        ({"bits": 4, "kind": "float"}, r"act_kind='float' must be 'int', or 'float' with 8 bits \(act_bits=4\)"),
    ],
)
def test_spec_refuses(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ActSpec(**fields)


@pytest.mark.parametrize("act", [None, *ACTS], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_product_after_silu_is_that_of_its_parts(act, symmetric):
    layer = QLinear.from_linear(torch.nn.Linear(192, 70, dtype=torch.bfloat16), QuantSpec(4, 64, symmetric))
    layer.act = act
    gate_up = torch.randn(3, 2, 384).bfloat16()
    with torch.no_grad():
        got = layer.after_silu(gate_up)
        assert torch.equal(got, layer(silu_and_mul(gate_up)))
        assert not torch.equal(got, layer.after_silu(gate_up.flip(-1)))


def test_prepared_model_with_quantized_inputs_gives_the_models_logits():
    model = tiny_llama()
    rtn(model, SPEC)
    ids = some_tokens()
    with torch.no_grad():
        other = model(ids).logits[:, 19:]
        set_act(model, ActSpec(8))
        want = model(ids).logits[:, 19:]
        decoder = read_decoder(model)
        state = decoder.new_state(2, 64)
        logits = [decoder.prefill(state, ids[:, :20])]
        for i in range(20, 24):
            state.advance(ids[:, i])
            logits.append(decoder.step(state))
    error = (torch.stack(logits, 1) - want).norm() / want.norm()
    assert error < 1e-4
    assert (other - want).norm() / want.norm() > 10 * error


@pytest.mark.parametrize("act", [None, *(a for a in ACTS if a.clip == 1)], ids=str)
def test_config_round_trip(act):
    written = json.loads(json.dumps(compressed_tensors_config(SPEC, ["lm_head"], act)))
    config = PyQuantConfig.from_compressed_tensors(written)
    assert config.act == act
    assert config.to_dict() == written
    assert act_of(written["config_groups"]["group_0"]["input_activations"]) == act


def test_config_refuses():
    with pytest.raises(ValueError, match=r"act_clip=0.9: compressed-tensors has no place for the clip"):
        input_activations(ActSpec(8, clip=0.9))
    found = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    with pytest.raises(ValueError, match="its inputs are quantized symmetric, strategy 'tensor', dynamic False"):
        act_of(found)
    model = tiny_llama()
    rtn(model, SPEC)
    set_act(model, ActSpec(8))
    model.model.layers[0].mlp.up_proj.act = None
    with pytest.raises(ValueError, match=r"are quantized as A8 a token, of model.layers.0.mlp.up_proj as None"):
        common_act(model)


@pytest.mark.parametrize("act", [ActSpec(8), ActSpec(4, 32), ActSpec(8, kind="float")], ids=str)
def test_checkpoint_written_and_read(tmp_path, act):
    source = save_tiny(tmp_path / "fp")
    model, tokenizer = load_causal_lm(source, torch.float32)
    rtn(model, SPEC)
    plain = probe_logits(model, some_tokens())
    assert set_act(model, act) == 14
    expected = probe_logits(model, some_tokens())
    assert (expected - plain).abs().max() > 1e-3
    export(model, tokenizer, source, tmp_path / "out", SPEC)
    assert verify(tmp_path / "out", some_tokens(), expected) == 0.0
    read = load_model(tmp_path / "out", torch.float32)
    assert common_act(read) == act
    with pytest.raises(ValueError, match="for which gptq has no place"):
        export(model, tokenizer, source, tmp_path / "gptq", SPEC, fmt="gptq")


def test_compressed_tensors_accepts_the_config():
    """Its own classes read what is written, and quantize inputs as they read it."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="needs the package compressed-tensors")
    for act in (a for a in ACTS if a.clip == 1):
        config = quantization.QuantizationConfig.model_validate(compressed_tensors_config(SPEC, [], act))
        args = config.config_groups["group_0"].input_activations
        assert (args.num_bits, str(getattr(args.type, "value", args.type)), args.dynamic) == (act.bits, act.kind, True)
