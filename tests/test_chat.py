"""Conversations over one cache, and the file of a system prompt: equal to computing everything anew, refused when it is not."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import byte_tokenizer, some_tokens, tiny_config, tiny_llama
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import pyquant
from pyquant.cli import app
from pyquant.integrations import chat, commands, kv_file
from pyquant.nn.kv_cache import KVSettings

GREEDY = commands.sampling(0)
SYSTEM = "You are an old fox by a river. Answer in seven words, and name one boat in each of them."
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Rewrites what was said, as templates do that drop a model's reasoning from earlier turns.
FORGETS = TEMPLATE.replace(
    "{{ m.content | trim }}", "{{ (m.content | trim)[:9] if m.role == 'assistant' else m.content }}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
TURNS = ("who sat under the bridge?", "and at noon?", "why seven?")


def make(dtype=torch.float32, **changes):
    return tiny_llama(dtype=dtype, **{"max_position_embeddings": 1024, **changes})


def tokenizer(template=TEMPLATE):
    made = byte_tokenizer()
    made.chat_template = template
    return made


def filled(model, ids, **settings):
    cache = pyquant.KVCache(model.config, prompt_tokens=None, **settings)
    model.set_attn_implementation("pyquant")
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def from_scratch(model, made, messages, new):
    """The greedy answer to a whole conversation, by transformers and its own cache."""
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([chat.render(made, messages)])
    stop = {} if made.chat_template else {"stop_strings": [chat.STOP]}
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            pad_token_id=0,
            tokenizer=made,
            **GREEDY,
            **stop,
        )
    said = made.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return (said.split(chat.STOP)[0] if stop else said).strip()


# ------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_loaded_prompt_is_the_computed_one(tmp_path, bits, dtype):
    """Bit for bit, and whatever comes after it too."""
    model, ids, more = make(dtype), some_tokens(1, 150), some_tokens(1, 120, seed=3)
    made = filled(model, ids, bits=bits, window=20)
    made.save(tmp_path / "a.safetensors", model, ids, "what it says")
    loaded = pyquant.KVCache.load(tmp_path / "a.safetensors", model, ids)
    assert loaded.settings == made.settings
    assert torch.equal(loaded.ids, ids[0])
    for a, b in zip(made.layers, loaded.layers, strict=True):
        assert a.kept.held == b.kept.held == [(150, 0, 150)]
    with torch.no_grad():
        for part in more.split(5, 1):
            assert torch.equal(*(model(part, past_key_values=cache).logits for cache in (made, loaded)))
    assert loaded.layers[0].kept.held[0][1] == ((120 - 20) // 64 if bits == 4 else 0)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        about, key = file.metadata(), file.get_tensor("layers.1.key")
    assert (about["text"], about["pyquant"]) == ("what it says", pyquant.__version__)
    assert key.shape == (2, 150, 16) and key.dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_settings_of_a_file_can_be_replaced(tmp_path):
    model, ids = make(), some_tokens(1, 30)
    filled(model, ids, bits=16).save(tmp_path / "a.safetensors", model, ids)
    loaded = pyquant.KVCache.load(tmp_path / "a.safetensors", model, bits=4, window=33)
    assert (loaded.settings.bits, loaded.settings.window, loaded.settings.prompt_tokens) == (4, 33, None)


def test_heads_without_a_format_are_kept_too(tmp_path):
    model, ids = make(head_dim=24), some_tokens(1, 40)
    made = filled(model, ids)
    made.save(tmp_path / "a.safetensors", model, ids)
    loaded = pyquant.KVCache.load(tmp_path / "a.safetensors", model)
    assert torch.equal(loaded.layers[1].plain.values, made.layers[1].plain.values)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A model, its prompt and the file of it."""
    model, ids = make(), some_tokens(1, 50)
    path = tmp_path_factory.mktemp("kv") / "one.safetensors"
    filled(model, ids).save(path, model, ids)
    return model, ids, path


def changed(model, how):
    other = copy.deepcopy(model)
    with torch.no_grad():
        how(other)
    return other


def swap_values(model):
    w = model.model.layers[1].mlp.up_proj.weight
    w[3, [4, 9]] = w[3, [9, 4]]  # the same numbers in other places


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (lambda m: m.model.norm.weight[5].add_(1e-6), "was made for a model of other weights"),
        (swap_values, "was made for a model of other weights"),
        (lambda m: m.to(torch.bfloat16), "a model in float32, and this one computes in bfloat16"),
        (lambda m: setattr(m.config, "rms_norm_eps", 1e-3), "was made for a model of another config"),
        (lambda m: m.config.rope_parameters.update(rope_theta=5e5), "was made for a model of another config"),
    ],
)
def test_another_model_is_refused(one, how, sentence):
    model, _, path = one
    with pytest.raises(ValueError, match=sentence):
        pyquant.KVCache.load(path, changed(model, how))
    pyquant.KVCache.load(path, changed(model, lambda m: setattr(m.config, "use_cache", False)))


def test_other_prompts_are_refused(one):
    model, ids, path = one
    for other in (ids[:, :-1], ids.flip(1)):
        with pytest.raises(ValueError, match=r"other tokens \(50 of them, this prompt has \d+\); delete it, or name"):
            pyquant.KVCache.load(path, model, other)


def test_other_files_are_refused(one, tmp_path):
    model, ids, path = one
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is not there"):
        pyquant.KVCache.load(tmp_path / "b.safetensors", model)
    (tmp_path / "b.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no safetensors file"):
        pyquant.KVCache.load(tmp_path / "b.safetensors", model)
    save_file({"ids": ids[0]}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="is no file of a prompt's keys and values"):
        pyquant.KVCache.load(tmp_path / "c.safetensors", model)
    with safe_open(path, framework="pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["ids"] = tensors["ids"].flip(0)
    save_file(tensors, tmp_path / "d.safetensors", metadata=about)
    with pytest.raises(ValueError, match="something that changed its tokens afterwards"):
        pyquant.KVCache.load(tmp_path / "d.safetensors", model)


def test_what_cannot_be_saved(tmp_path):
    model, ids = make(), some_tokens(2, 50)
    path = tmp_path / "a.safetensors"
    short = pyquant.KVCache(model.config, prompt_tokens=8)
    model.set_attn_implementation("pyquant")
    with torch.no_grad():
        model(ids, past_key_values=short)
    with pytest.raises(ValueError, match="50 tokens are to be saved and the cache keeps 8 in 16 bits"):
        short.save(path, model, ids[0])
    short.save(path, model, ids[0, :8])
    with pytest.raises(ValueError, match="a prompt of no tokens"):
        short.save(path, model, ids[0, :0])
    with pytest.raises(ValueError, match="50 tokens are to be saved and the cache keeps 0"):
        pyquant.KVCache(model.config).save(path, model, ids[0])
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    padded = pyquant.KVCache(model.config, prompt_tokens=None)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=padded)
    with pytest.raises(ValueError, match="padded has no single prompt"):
        padded.save(path, model, ids[1])


def test_fingerprints_do_not_depend_on_how_weights_lie():
    model = make()
    other = copy.deepcopy(model)
    for p in other.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()
    assert kv_file.weights_fingerprint(model) == kv_file.weights_fingerprint(other)


def test_fingerprints_see_packed_weights():
    models = [make(), make()]
    for m in models:
        pyquant.swap(m, pyquant.QuantSpec(4, 32))
    assert kv_file.weights_fingerprint(models[0]) == kv_file.weights_fingerprint(models[1])
    models[1].model.layers[0].mlp.up_proj.qweight.view(-1)[7] ^= 1
    assert kv_file.weights_fingerprint(models[0]) != kv_file.weights_fingerprint(models[1])


# ------------------------------------------------------------------------------------------------ conversations


@pytest.mark.parametrize(
    "template", [TEMPLATE, FORGETS, NO_SYSTEM, None], ids=["plain", "forgets", "no-system", "none"]
)
def test_a_conversation_is_what_computing_it_anew_gives(template, tmp_path):
    """16 bits: each answer equals that of transformers over the whole conversation; with the file, at the second start too."""
    model, made, file = make(), tokenizer(template), tmp_path / "fox.safetensors"
    for attempt in range(2):
        talk = chat.start(model, made, SYSTEM, None, file)
        prompt = talk.cache.get_seq_length()
        assert prompt == len(chat.system_ids(made, SYSTEM)) > 60
        for n, turn in enumerate(TURNS):
            said = chat.answer(talk, turn, 20, GREEDY)
            assert talk.cache.get_seq_length() == len(talk.ids)
            assert said == from_scratch(model, made, talk.messages[:-1], 20), f"attempt {attempt}, turn {n}"
            model.set_attn_implementation("pyquant")
        assert [m["role"] for m in talk.messages] == ["system"] + 3 * ["user", "assistant"]
        assert talk.cache.layers[0].kept.held[0][0] == prompt, "the system prompt stays in 16 bits"


def test_nothing_is_computed_twice(tmp_path):
    """Tokens that go through the model: the system prompt at the first start only, of a turn only what is new."""
    model, made, seen = make(), tokenizer(), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for first in (True, False):
        seen.clear()
        talk = chat.start(model, made, SYSTEM, KVSettings(4, None, 64), tmp_path / "fox.safetensors")
        assert seen == ([len(chat.system_ids(made, SYSTEM))] if first else [])
        for turn in TURNS:
            seen.clear()
            before = list(talk.ids)
            chat.answer(talk, turn, 12, GREEDY)
            new = chat.render(made, talk.messages[:-1])
            assert seen[0] == len(new) - chat.agreeing(before, new) < 60
            assert all(n == 1 for n in seen[1:]) and len(seen) <= 13


def test_a_system_prompt_comes_out_of_the_file(tmp_path):
    model, made, file = make(), tokenizer(), tmp_path / "fox.safetensors"
    first = chat.answer(chat.start(model, made, SYSTEM, None, file), TURNS[0], 20, GREEDY)
    assert chat.answer(chat.start(model, made, None, None, file), TURNS[0], 20, GREEDY) == first
    with pytest.raises(ValueError, match="was made for other tokens"):
        chat.start(model, made, SYSTEM + " No.", None, file)


def test_the_context_is_an_end():
    model, made = make(max_position_embeddings=200), tokenizer()
    talk = chat.start(model, made, SYSTEM)
    held, messages = list(talk.ids), list(talk.messages)
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens and 150 new ones would not fit .* 200"):
        chat.answer(talk, TURNS[0], 150, GREEDY)
    assert talk.ids == held and talk.messages == messages
    chat.answer(talk, TURNS[0], 10, GREEDY)
    with pytest.raises(ValueError, match="the system prompt has"):
        chat.start(model, made, 10 * SYSTEM)


def test_no_template_is_said_once(caplog):
    caplog.set_level(logging.WARNING, logger="pyquant")
    talk = chat.start(make(), tokenizer(None), "Be brief.")
    assert caplog.text.count("no chat template: turns become lines 'User: ..' and 'Assistant: ..'") == 1
    text = talk.tokenizer.decode(chat.render(talk.tokenizer, [*talk.messages, {"role": "user", "content": "why?"}]))
    assert text == "Be brief.\n\nUser: why?\nAssistant:"


def test_streams_stop_before_the_next_turn(capsys):
    """Whatever pieces a text comes in."""
    for text, shown in (("one\ntwo\nUser: three", "one\ntwo\n"), ("\nUse it", "\nUse it\n"), ("a\nUser:", "a\n")):
        for size in (1, 2, 5, 100):
            stream = chat.Streamer(byte_tokenizer())
            for i in range(0, len(text), size):
                stream.on_finalized_text(text[i : i + size], i + size >= len(text))
            assert capsys.readouterr().out == shown


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = LlamaForCausalLM(tiny_config(max_position_embeddings=1024))
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def run(*args, code=0, stdin=""):
    result = CliRunner().invoke(app, ["generate", *map(str, args)], input=stdin)
    assert result.exit_code == code, result.output
    return result


def test_the_command(folder, tmp_path):
    """Turns from standard input, one prompt, and the file between two starts: the same answers."""
    file, written = tmp_path / "fox.safetensors", tmp_path / "system.txt"
    written.write_text(SYSTEM + "\n")
    how = ("--chat", "--temperature", "0", "-n", "12", "--kv-bits", "4", "--device", "cpu")
    first = run(folder, *how, "--system-prompt", SYSTEM, "--prompt-cache", file, stdin=f"{TURNS[0]}\n\n{TURNS[1]}\n")
    stamp = file.stat().st_mtime_ns
    again = run(folder, *how, "--system-file", written, "--kv-file", file, stdin="\n".join(TURNS[:2]))
    assert again.stdout == first.stdout
    for asked in ((TURNS[0],), ("--prompt", TURNS[0])):
        alone = run(folder, *asked, *how, "--prompt-cache", file).stdout
        assert alone.strip() and first.stdout.startswith(alone)
    assert file.stat().st_mtime_ns == stamp, "it is written once"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--system-prompt", "x"), "--system-prompt needs --chat"),
        (("hello", "--prompt-cache", "x.safetensors"), "--prompt-cache needs --chat"),
        ((), "give a prompt to continue, or --chat"),
        (("a", "-p", "b"), "two prompts are given, 'a' and --prompt 'b'"),
        (("a", "--kv-bits", "4", "--kv-prompt", "system"), "--kv-prompt system needs a system prompt"),
        (("--chat", "--kv-prompt", "some"), "--kv-prompt 'some' must be a number"),
        (("--chat", "--system", "x", "--kv-prompt", "5"), "--kv-prompt 5 does not go with a system prompt"),
        (("--chat", "--system", "x", "--system-file", "y"), "are both given"),
        (("--chat", "--system-file", "nowhere.txt"), "nowhere.txt"),
        (("a", "--chat", "--prompt-cache", "nowhere.safetensors"), "nowhere.safetensors is not there"),
        (("a", "--temperature", "-1"), "temperature=-1.0 must not be negative"),
    ],
)
def test_the_command_refuses(folder, args, sentence):
    shown = run(folder, *args, code=1).stderr.strip().splitlines()
    assert shown[-1].startswith("error: ") and sentence in shown[-1]


@pytest.mark.gpu
def test_few_bits_on_a_gpu_take_the_captured_step(tmp_path, no_fallback, monkeypatch):
    """``--kv-bits`` without a conversation: prepare_for_inference serves it, no KVCache is made."""
    LlamaForCausalLM(
        tiny_config(hidden_size=256, head_dim=64, max_position_embeddings=1024, dtype="bfloat16")
    ).bfloat16().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    how = ("--temperature", "0", "-n", "150", "--device", "cuda", "--kv-window", "16")
    slow = run(tmp_path, SYSTEM, *how, "--kv-bits", "16").stdout

    def fail(self, *args, **kwargs):
        raise AssertionError("transformers' loop over a KVCache")

    monkeypatch.setattr(pyquant.KVCache, "__init__", fail)
    fast = run(tmp_path, SYSTEM, *how, "--kv-bits", "4", "--kv-prompt", "none").stdout
    assert fast.startswith(SYSTEM) and slow.startswith(SYSTEM)
    assert fast != slow, "random weights show what 4 bits cost"
