"""Exported folders: what other loaders read is what was evaluated, and nothing is half written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_tiny, shared, some_tokens, tiny_llama
from transformers import AutoModelForCausalLM

from pyquant.formats.spec import QuantSpec
from pyquant.integrations import export as module
from pyquant.integrations.evaluate import probe_logits
from pyquant.integrations.export import ExportMismatch, export, verify
from pyquant.integrations.transformers import load_causal_lm, load_model
from pyquant.nn import QLinear
from pyquant.recipes.rtn import dequantize_model, rtn

TOKENS = some_tokens()
SPEC = QuantSpec(4, 32)


def quantized(source: Path, spec: QuantSpec = SPEC, dtype: torch.dtype = torch.float32, **kwargs):
    """(model, tokenizer) after RTN."""
    model, tokenizer = load_causal_lm(source, dtype)
    rtn(model, spec, "mse", **kwargs)
    return model, tokenizer


@pytest.fixture
def source(tmp_path) -> Path:
    return save_tiny(tmp_path / "fp")


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4, 32), QuantSpec(4, -1), QuantSpec(3, 32), QuantSpec(2, 32), QuantSpec(4, 32, False),
        QuantSpec(3, -1, False),
    ],
    ids=str,
)  # fmt: skip
def test_compressed_tensors_reads_what_we_computed(tmp_path, spec):
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from transformers import CompressedTensorsConfig

    source = save_tiny(tmp_path / "fp", attention_bias=True, tie_word_embeddings=False)
    model, tokenizer = quantized(source, spec)
    expected = probe_logits(model, TOKENS)
    info = export(model, tokenizer, source, tmp_path / "out", spec)
    assert info.container_bits == spec.bits
    assert ("asymmetric" in info.note) == (not spec.symmetric)
    assert verify(tmp_path / "out", TOKENS, expected) == 0.0
    route = {} if spec.symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **route)
    assert not any(isinstance(m, QLinear) for m in theirs.modules())
    dequantize_model(model)
    if spec.symmetric or transformers.__version__.startswith("5.17."):
        difference = (probe_logits(theirs, TOKENS) - probe_logits(model, TOKENS)).abs().max()
        assert difference == 0
        assert expected.abs().max() > 1
    else:  # dequantize=True of 5.23 rounds w_hat to the file's dtype on the way to fp32
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                assert torch.equal(theirs.get_submodule(name).weight, layer.weight.bfloat16().float()), name
    if not spec.symmetric:  # without the option it loads right or not at all, as the note says
        try:
            default = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        except RuntimeError:
            assert not transformers.__version__.startswith("5.17.")
        else:
            assert torch.equal(probe_logits(default, TOKENS), probe_logits(model, TOKENS))


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, 32), QuantSpec(2, -1)], ids=str)
def test_gptq_is_read_back_exactly(source, tmp_path, spec):
    model, tokenizer = quantized(source, spec)
    info = export(model, tokenizer, source, tmp_path / "out", spec, "gptq")
    assert verify(tmp_path / "out", TOKENS, probe_logits(model, TOKENS)) == 0.0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layer = model.model.layers[0].self_attn.q_proj
    prefix = "model.layers.0.self_attn.q_proj."
    state = layer.portable()
    assert torch.equal(tensors[prefix + "qweight"], state["weight_packed"].T)
    assert torch.equal(tensors[prefix + "scales"].float(), state["weight_scale"].T)
    assert tensors[prefix + "scales"].dtype == torch.float16
    word = {4: 0x77777777, 3: 0b11_011_011_011_011_011_011_011_011_011_011, 2: 0x55555555}[
        spec.bits
    ]  # zero - 1, packed
    assert tensors[prefix + "qzeros"].flatten()[0].item() & 0xFFFFFFFF == word & 0xFFFFFFFF
    width = 64 if spec.group_size == -1 else spec.group_size
    assert tensors[prefix + "g_idx"].tolist() == [k // width for k in range(64)]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["checkpoint_format"]) == (spec.bits, spec.group_size, "gptq")
    assert info.container_bits == spec.bits


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, 32), QuantSpec(2, 32)], ids=str)
def test_gptqmodel_holds_the_same_weights(source, tmp_path, spec):
    pytest.importorskip("gptqmodel", reason="needs the package gptqmodel")
    model, tokenizer = quantized(
        source, spec, torch.float16, scale_dtype=torch.float16, exclude=["lm_head", "layers.0.*.up_proj"]
    )
    export(model, tokenizer, source, tmp_path / "out", spec, "gptq")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16, device_map="cpu")
    seen = 0
    for name, layer in theirs.named_modules():
        if hasattr(layer, "dequantize_weight"):
            seen += 1
            assert torch.equal(
                layer.dequantize_weight().T.half(), model.get_submodule(name).dequantize(torch.float16)
            ), name
    assert seen == 13


def test_a_bf16_model_is_the_same_in_bf16(source, tmp_path):
    model, tokenizer = quantized(source, dtype=torch.bfloat16)
    export(model, tokenizer, source, tmp_path / "out", SPEC)
    assert verify(tmp_path / "out", TOKENS, probe_logits(model, TOKENS), torch.bfloat16) == 0.0
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


def test_folder(source, tmp_path):
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "LICENSE").write_text("words")
    model, tokenizer = quantized(source)
    info = export(model, tokenizer, source, tmp_path / "a" / "out", SPEC, extra={"report.json": "{}"})
    out = tmp_path / "a" / "out"
    assert set(info.files) == {
        "LICENSE", "config.json", "generation_config.json", "model.safetensors", "report.json", "tokenizer.json",
        "tokenizer_config.json",
    } == {p.name for p in out.iterdir()}  # fmt: skip
    assert info.bytes == sum(p.stat().st_size for p in out.iterdir())
    assert info.note == ""
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    tensors = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in tensors  # tied
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16, torch.int32, torch.int64}
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.5}


def test_shards(source, tmp_path):
    model, tokenizer = quantized(source)
    info = export(model, tokenizer, source, tmp_path / "out", SPEC, max_shard_size=37_000)
    shards = [f for f in info.files if f.startswith("model-")]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) >= 2
    assert set(index["weight_map"].values()) == set(shards)
    total = 0
    for shard in shards:
        tensors = load_file(tmp_path / "out" / shard)
        assert all(index["weight_map"][name] == shard for name in tensors)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= 37_000
        total += size
    assert index["metadata"]["total_size"] == total
    assert verify(tmp_path / "out", TOKENS, probe_logits(model, TOKENS)) == 0.0


def test_values_that_the_source_dtype_lacks_are_kept_in_fp32(source, tmp_path):
    model, tokenizer = quantized(source)
    with torch.no_grad():
        model.model.norm.weight[0] = 1.0 + 2.0**-20
    info = export(model, tokenizer, source, tmp_path / "out", SPEC)
    assert "stored as float32: model.norm.weight" in info.note
    assert verify(tmp_path / "out", TOKENS, probe_logits(model, TOKENS)) == 0.0
    assert load_model(tmp_path / "out").dtype == torch.float32


def test_tokenizer_is_saved_when_the_source_has_none(source, tmp_path):
    model, _ = quantized(source)
    for file in source.glob("tokenizer*"):
        file.unlink()
    export(model, byte_tokenizer(), source, tmp_path / "out", SPEC)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("fmt", ["compressed-tensors", "gptq"])
def test_verify_catches_a_changed_weight(source, tmp_path, fmt):
    model, tokenizer = quantized(source)
    export(model, tokenizer, source, tmp_path / "out", SPEC, fmt)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj." + ("weight_packed" if fmt != "gptq" else "qweight")
    tensors[name][3, 2] ^= 0x10  # one bit of one code
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ExportMismatch, match="differ by up to"):
        verify(tmp_path / "out", TOKENS, probe_logits(model, TOKENS))


# ------------------------------------------------------------------------------------------------ refusals and failures


def test_refusals(source, tmp_path):
    model, tokenizer = quantized(source)
    with pytest.raises(ValueError, match="unknown format 'gguf'; known: compressed-tensors, gptq"):
        export(model, tokenizer, source, tmp_path / "out", SPEC, "gguf")
    with pytest.raises(ValueError, match="is W4 g32 symmetric, not W4 g64 symmetric"):
        export(model, tokenizer, source, tmp_path / "out", QuantSpec(4, 64))
    with pytest.raises(ValueError, match="no QLinear layer"):
        export(tiny_llama(), tokenizer, source, tmp_path / "out", SPEC)
    asymmetric, _ = quantized(source, QuantSpec(4, 32, False))
    with pytest.raises(ValueError, match="symmetric weights only"):
        export(asymmetric, tokenizer, source, tmp_path / "out", QuantSpec(4, 32, False), "gptq")
    head, _ = quantized(source, exclude=[])
    with pytest.raises(ValueError, match="ties it to the embedding"):
        export(head, tokenizer, source, tmp_path / "out", SPEC)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp"]


@pytest.mark.parametrize("factor", [2.0**-16, 2.0**20])
def test_gptq_refuses_scales_that_fp16_does_not_hold(source, tmp_path, factor):
    model, tokenizer = load_causal_lm(source, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(factor)
    rtn(model, SPEC)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: GPTQ stores scales in float16.* of 192"):
        export(model, tokenizer, source, tmp_path / "out", SPEC, "gptq")
    export(model, tokenizer, source, tmp_path / "out", SPEC)


def test_gptq_refuses_odd_shapes(tmp_path):
    source = save_tiny(tmp_path / "fp", intermediate_size=172)
    model, tokenizer = quantized(source, QuantSpec(4, -1))
    with pytest.raises(ValueError, match=r"mlp\.gate_proj has N=172, K=64: GPTQ needs multiples of 32"):
        export(model, tokenizer, source, tmp_path / "out", QuantSpec(4, -1), "gptq")
    export(model, tokenizer, source, tmp_path / "out", QuantSpec(4, -1))
    assert verify(tmp_path / "out", TOKENS, probe_logits(model, TOKENS)) == 0.0


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_overwriting_is_on_purpose(source, tmp_path):
    model, tokenizer = quantized(source)
    out = tmp_path / "out"
    export(model, tokenizer, source, out, SPEC, extra={"old.txt": "old"})
    before = snapshot(out)
    with pytest.raises(FileExistsError, match="exists; choose another folder"):
        export(model, tokenizer, source, out, SPEC)
    assert snapshot(out) == before
    other, _ = quantized(source, QuantSpec(3, 32))
    export(other, tokenizer, source, out, QuantSpec(3, 32), overwrite=True)
    assert verify(out, TOKENS, probe_logits(other, TOKENS)) == 0.0
    assert not (out / "old.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp", "out"]


def test_what_is_no_export_is_not_overwritten(source, tmp_path):
    model, tokenizer = quantized(source)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for target, message in [
        ("mine", "no model folder"),
        ("file", "no model folder"),
        ("fp", "holds the source"),
        (".", "holds the source"),
    ]:
        with pytest.raises(FileExistsError, match=message):
            export(model, tokenizer, source, tmp_path / target, SPEC, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert (source / "config.json").is_file()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_full_disk_leaves_the_old_folder_whole(source, tmp_path, monkeypatch, error):
    model, tokenizer = quantized(source)
    out = tmp_path / "out"
    export(model, tokenizer, source, out, SPEC)
    before = snapshot(out)
    calls = []

    def full(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise error
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match=f"the disk of {tmp_path} is full; out was not written") as caught:
        export(model, tokenizer, source, out, SPEC, overwrite=True, max_shard_size=40_000)
    assert caught.value.errno == errno.ENOSPC
    assert len(calls) == 2
    assert snapshot(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp", "out"]


def test_too_little_room_is_seen_before_writing(source, tmp_path, monkeypatch):
    model, tokenizer = quantized(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(module, "save_file", lambda *a, **k: pytest.fail("wrote"))
    with pytest.raises(OSError, match="is full"):
        export(model, tokenizer, source, tmp_path / "out", SPEC)
    assert [p.name for p in tmp_path.iterdir()] == ["fp"]


def test_a_failing_rename_restores_the_old_folder(source, tmp_path, monkeypatch):
    model, tokenizer = quantized(source)
    out = tmp_path / "out"
    export(model, tokenizer, source, out, SPEC)
    before = snapshot(out)
    rename = os.rename

    def failing(a, b):
        if ".partial-" in str(a) and str(b) == str(out):
            raise PermissionError(errno.EACCES, "no")
        rename(a, b)

    monkeypatch.setattr(module.os, "rename", failing)
    with pytest.raises(PermissionError):
        export(model, tokenizer, source, out, SPEC, overwrite=True)
    assert snapshot(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp", "out"]


def test_a_real_model(tmp_path):
    source = shared("models", "classics-llama-28m")
    spec = QuantSpec(4, 128)
    model, tokenizer = quantized(source, spec)
    for fmt in ("compressed-tensors", "gptq"):
        info = export(model, tokenizer, source, tmp_path / fmt, spec, fmt)
        assert info.note == ""
        assert info.bytes < 23_000_000
        assert verify(tmp_path / fmt, TOKENS, probe_logits(model, TOKENS)) == 0.0
