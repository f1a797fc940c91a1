"""Loading: full-precision models, quantization on the fly, quantized checkpoints; and saving them again."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_tiny, shared, some_tokens, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, MixtralConfig, MixtralForCausalLM

from pyquant.formats.spec import QuantSpec
from pyquant.integrations import transformers as plugin
from pyquant.integrations.evaluate import probe_logits
from pyquant.integrations.transformers import (
    PyQuantConfig,
    compressed_tensors_config,
    load_causal_lm,
    load_model,
    spec_of,
)
from pyquant.nn import QLinear
from pyquant.recipes.rtn import rtn

TOKENS = some_tokens()
UP = "model.layers.0.mlp.up_proj."


def on_the_fly(folder: Path, dtype=torch.float32, **fields):
    config = PyQuantConfig(**{"group_size": 32, **fields})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def layers(model: nn.Module) -> int:
    return sum(isinstance(m, QLinear) for m in model.modules())


@pytest.mark.parametrize(
    "fields", [{}, {"bits": 3, "group_size": -1}, {"bits": 2, "symmetric": False, "rule": "mse"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_on_the_fly_is_rtn_and_survives_saving(tmp_path, fields, dtype, bias):
    source = save_tiny(tmp_path / "fp", attention_bias=bias)
    model = on_the_fly(source, dtype, **fields)
    reference, _ = load_causal_lm(source, dtype)
    config = PyQuantConfig(**{"group_size": 32, **fields})
    rtn(reference, config.spec, config.rule, scale_dtype=dtype)
    assert layers(model) == 14
    expected = probe_logits(reference, TOKENS)
    assert torch.equal(probe_logits(model, TOKENS), expected)  # not random weights: those of RTN

    model.save_pretrained(tmp_path / "q")
    written = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert written == compressed_tensors_config(config.spec, ["lm_head"])
    again = load_model(tmp_path / "q")
    assert again.dtype == dtype
    assert layers(again) == 14
    assert torch.equal(probe_logits(again, TOKENS), expected)
    again.save_pretrained(tmp_path / "q2")
    first, second = load_file(tmp_path / "q/model.safetensors"), load_file(tmp_path / "q2/model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert json.loads((tmp_path / "q2/config.json").read_text())["quantization_config"] == written


def test_fp32_load_of_a_bf16_checkpoint_is_exact(tmp_path):
    on_the_fly(save_tiny(tmp_path / "fp"), torch.bfloat16).save_pretrained(tmp_path / "q")
    half, full = load_model(tmp_path / "q"), load_model(tmp_path / "q", torch.float32)
    for a, b in zip(half.modules(), full.modules(), strict=True):
        if isinstance(a, QLinear):
            assert b.scale.dtype == torch.float32
            assert torch.equal(a.scale.float(), b.scale)
            assert torch.equal(a.qweight, b.qweight)
    for (name, p), q in zip(half.named_parameters(), full.parameters(), strict=True):
        assert q.dtype == torch.float32, name
        assert torch.equal(p.float(), q), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate(tmp_path, dtype):
    on_the_fly(save_tiny(tmp_path / "fp"), dtype).save_pretrained(tmp_path / "q")
    model = load_model(tmp_path / "q")
    prompt = TOKENS[:1, :5]
    text = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cached = probe_logits(model, text[:, :-1])[0, 4:].argmax(-1)
    assert text.shape == (1, 11)
    if dtype == torch.float32:  # in bf16 ties between logits may break either way
        assert text[0, 5:].tolist() == cached.tolist()


def test_untied_head_and_chosen_layers(tmp_path):
    source = save_tiny(tmp_path / "fp", tie_word_embeddings=False)
    model = on_the_fly(source, include=["*_proj"], exclude=["lm_head", "layers.0.*.v_proj"])
    ignored = ["lm_head", "model.layers.0.self_attn.v_proj"]
    assert layers(model) == 13
    assert sorted(model.config.quantization_config.ignore) == sorted(ignored)
    model.save_pretrained(tmp_path / "q")
    again = load_model(tmp_path / "q")
    assert layers(again) == 13
    assert torch.equal(probe_logits(model, TOKENS), probe_logits(again, TOKENS))
    head = on_the_fly(source, exclude=[])
    assert layers(head) == 15
    head.save_pretrained(tmp_path / "h")
    assert torch.equal(probe_logits(head, TOKENS), probe_logits(load_model(tmp_path / "h"), TOKENS))


def test_tied_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lm_head shares its weight with the embedding"):
        on_the_fly(save_tiny(tmp_path), exclude=[])


def test_fused_experts_are_refused(tmp_path):
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fused expert weight"):
        on_the_fly(tmp_path)
    model = on_the_fly(tmp_path, skip_experts=True)
    assert layers(model) == 4
    model.save_pretrained(tmp_path / "q")
    tokens = some_tokens() % 64
    again = load_model(tmp_path / "q")
    assert layers(again) == 4
    assert torch.equal(probe_logits(model, tokens), probe_logits(again, tokens))
    with pytest.raises(ValueError, match="fused expert weight"):
        rtn(load_causal_lm(tmp_path)[0], QuantSpec(4, 32))


def test_registering_twice_is_harmless():
    importlib.reload(plugin)
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert "pyquant" in AUTO_QUANTIZER_MAPPING


def test_spec_travels_through_the_config():
    for spec in (QuantSpec(), QuantSpec(3, -1), QuantSpec(2, 64, False)):
        assert spec_of(compressed_tensors_config(spec, [])) == spec


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "marlin-24", "its format is 'marlin-24'"),
        (("config_groups", "group_0", "weights", "num_bits"), 8, "its weights have 8 bits"),
        (("config_groups", "group_0", "weights", "type"), "float", "its weights are float"),
        (("config_groups", "group_0", "weights", "actorder"), "group", "activation order"),
        (
            ("config_groups", "group_0", "input_activations"),
            {"num_bits": 8},
            "its inputs are quantized symmetric, strategy None",
        ),
        (("config_groups", "group_0", "targets"), ["re:.*q_proj"], "targets"),
        (("config_groups", "group_1"), {}, "2 config groups"),
    ],
)
def test_foreign_schemes_are_refused(path, value, message):
    config = compressed_tensors_config(QuantSpec(), [])
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        spec_of(config)


def edit(folder: Path, change) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP + "weight_scale"), r"no model\.layers\.0\.mlp\.up_proj\.weight_scale"),
        (lambda t: t.update({UP + "weight_shape": torch.tensor([64, 96])}), r"up_proj: weight_shape \[64, 96\]"),
        (lambda t: t.update({UP + "weight_scale": torch.ones(96, 1)}), r"\(96, 1\)|no .*up_proj\.weight_scale"),
        (lambda t: t.pop("model.norm.weight"), r"1 missing keys such as model\.norm\.weight"),
        (lambda t: t.update({"model.embed_tokens.weight": torch.ones(100, 64)}), r"embed_tokens\.weight.*100, 64"),
        (lambda t: t.update({"model.more": torch.ones(1)}), r"1 unexpected keys such as model\.more"),
    ],
)  # fmt: skip
def test_quantized_checkpoints_that_do_not_fit_are_refused(tmp_path, change, message):
    on_the_fly(save_tiny(tmp_path / "fp")).save_pretrained(tmp_path / "q")
    edit(tmp_path / "q", change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "q")


def test_load_model_refuses_what_is_not_quantized(tmp_path):
    with pytest.raises(ValueError, match="is not quantized"):
        load_model(save_tiny(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match="is 'awq'; only compressed-tensors"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------ load_causal_lm


def test_load_causal_lm(tmp_path):
    model, tokenizer = load_causal_lm(save_tiny(tmp_path))
    assert model.dtype == torch.bfloat16
    assert not model.training
    saved = dict(tiny_llama(dtype=torch.bfloat16).named_parameters())
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
    assert load_causal_lm(tmp_path, torch.float32)[0].dtype == torch.float32


def test_load_causal_lm_reads_shards(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(probe_logits(load_causal_lm(tmp_path)[0], TOKENS), probe_logits(tiny_llama(), TOKENS))
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"the weights file {shard.name} is missing"):
        load_causal_lm(tmp_path)


def break_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def poison(folder: Path, value: float) -> None:
    edit(folder, lambda t: t["model.layers.1.mlp.down_proj.weight"].view(-1)[:3].fill_(value))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda d: (d / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), ValueError, "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), ValueError, "config.json is not a JSON object"),
        (cut, ValueError, r"model\.safetensors is damaged or incomplete"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), ValueError, r"model\.safetensors is damaged"),
        (lambda d: (d / "model.safetensors").unlink(), ValueError, "has no weights"),
        (only_pickles, ValueError, r"pickles only \(pytorch_model\.bin\)"),
        (
            lambda d: break_config(d, quantization_config={"quant_method": "gptq"}),
            ValueError,
            r"already quantized \(gptq\)",
        ),
        (
            lambda d: break_config(d, architectures=["LlamaForSequenceClassification"]),
            ValueError,
            "is a LlamaForSequenceClass",
        ),
        (lambda d: break_config(d, model_type="martian"), ValueError, "not a causal language model.*'martian'"),
        (lambda d: poison(d, math.nan), ValueError, r"model\.layers\.1\.mlp\.down_proj\.weight has 3 NaN or Inf"),
        (lambda d: poison(d, math.inf), ValueError, "3 NaN or Inf"),
        (
            lambda d: edit(d, lambda t: t.pop("model.norm.weight")),
            ValueError,
            r"1 missing keys such as model\.norm\.weight",
        ),
        (lambda d: break_config(d, intermediate_size=64), ValueError, "6 mismatched keys.*do not fit the config"),
        (lambda d: [p.unlink() for p in d.glob("tokenizer*")], ValueError, "has no usable tokenizer"),
    ],
)
def test_bad_models_are_refused_in_one_sentence(tmp_path, damage, kind, message):
    damage(save_tiny(tmp_path))
    with pytest.raises(kind, match=message) as caught:
        load_causal_lm(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_paths_and_other_models_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_causal_lm(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        load_causal_lm(tmp_path / "file")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no such repo"))
    )
    with pytest.raises(
        FileNotFoundError, match=r"org/nothing is no folder here and the Hugging Face Hub.*no such repo"
    ):
        load_causal_lm("org/nothing")
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=32)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a BertModel, not a causal language model"):
        load_causal_lm(tmp_path / "bert")


def test_a_real_model_per_channel(tmp_path):
    source = shared("models", "stories260K")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=PyQuantConfig(group_size=-1))
    assert layers(model) == 35
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    tokens = some_tokens()
    assert torch.equal(probe_logits(model, tokens), probe_logits(again, tokens))
    text = again.generate(tokens[:1, :4], max_new_tokens=20, do_sample=False)
    assert torch.equal(text, model.generate(tokens[:1, :4], max_new_tokens=20, do_sample=False))
