"""Block-wise quantization: the engine against what it is defined to do, on models of seconds."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
import transformers
from tiny import some_tokens, tiny_llama
from torch import Tensor, nn

from pyquant import reference
from pyquant.formats.spec import QuantSpec
from pyquant.quantizers.ranges import find_range
from pyquant.recipes import awq
from pyquant.recipes.blocks import block_arguments, call_block, find_blocks, logits_of
from pyquant.recipes.blockwise import Result, blockwise, insert, plan
from pyquant.recipes.experts import Experts, all_experts, unfuse
from pyquant.recipes.gptq import gptq
from pyquant.recipes.memory import GIB, Estimate, check, estimate
from pyquant.recipes.parametrize import Start, parametrize
from pyquant.recipes.rtn import rtn
from pyquant.recipes.settings import Settings
from pyquant.recipes.start import STARTS
from pyquant.recipes.train_window import Stepper, rates, schedule, train

SPECS = [QuantSpec(4, 32), QuantSpec(3, -1), QuantSpec(2, 32, False)]
BATCH = 4


def run(model: nn.Module, spec: QuantSpec, tokens: Tensor | None = None, **settings) -> Result:
    settings = {"batch_size": BATCH, "steps": 12, **settings}
    return blockwise(model, some_tokens(16, 24) if tokens is None else tokens, spec, Settings(**settings))


def with_result(model: nn.Module, result: Result) -> nn.Module:
    model = copy.deepcopy(model)
    _, blocks = find_blocks(model)
    for b, r in result.blocks.items():
        insert(blocks[b], r)
    return model


def hidden_error(model: nn.Module, other: nn.Module, tokens: Tensor) -> float:
    """Relative error of the hidden states after the last block."""
    with torch.no_grad():
        want = model(tokens, output_hidden_states=True).hidden_states[-2]
        got = other(tokens, output_hidden_states=True).hidden_states[-2]
    return float((got - want).norm() / want.norm())


def same(a: Result, b: Result) -> bool:
    if a.blocks.keys() != b.blocks.keys():
        return False
    pairs = [(x, b.blocks[i].layers[n]) for i, r in a.blocks.items() for n, x in r.layers.items()]
    return all(torch.equal(x.codes, y.codes) and torch.equal(x.scale, y.scale) for x, y in pairs)


# ------------------------------------------------------------------------------------------------ windows and order


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(8, 1, 1), (8, 2, 1), (8, 2, 2), (7, 3, 3), (8, 3, 1), (5, 4, 2)]
)
def test_every_block_is_in_as_many_windows(count, window, stride):
    found = plan(count, window, stride)
    times = [sum(b in r for r in found) for b in range(count)]
    assert times == [window // stride] * count
    assert max(map(len, found)) == window


def test_the_order_covers_all_windows_and_can_be_shared():
    order = schedule(24, 4, 10, seed=3, first=4)
    assert order.shape == (10, 4)
    assert order[:5].flatten().sort().values.tolist() == list(range(4, 24))  # one epoch: each window once
    assert (order % 4 == torch.arange(4)).all()  # a position keeps its class, whoever holds it
    assert not torch.equal(order, schedule(24, 4, 10, seed=4, first=4))
    with pytest.raises(ValueError, match="10 windows, 0 of them held out"):
        schedule(10, 4, 1, 0)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"window": 3, "stride": 2}, "stride=2 must divide window=3"),
        ({"lookahead": -1}, "lookahead=-1"),
        ({"lookahead": "far"}, "lookahead='far'"),
        ({"target": "none"}, "target='none' must be one of fp, block, both"),
        ({"start": "x"}, "start='x'"),
        ({"learn": "x"}, "learn='x'"),
        ({"optimizer": "adam"}, "optimizer='adam'"),
        ({"window": 0}, "window=0"),
    ],
)
def test_settings_are_checked(wrong, what):
    with pytest.raises(ValueError, match=what):
        Settings(**wrong)


# ------------------------------------------------------------------------------------------------ parametrizations


@pytest.mark.parametrize("learn", ["rounding", "clip", "weights"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_deployed_is_what_was_trained(spec, learn):
    linear = nn.Linear(64, 12, bias=False)
    scale, zero = find_range(linear.weight, spec, "mse", torch.bfloat16)
    start = Start(linear.weight.detach().clone(), scale, zero)
    layer = parametrize(linear, start, learn, spec, torch.bfloat16)
    assert torch.equal(
        layer.quantized_weight(), reference.fake_quant(start.weight, scale, zero, spec.group_size, spec.bits)
    )
    for kind, p in layer.quantizer.trained(layer):
        p.data.add_({"rounding": 0.4, "scale": 0.2, "zero": 1.0, "weight": 0.02}[kind] * torch.randn_like(p))
    layer.quantizer.bound()
    deployed = layer.quantizer.deploy(layer.weight)
    w_hat = layer.quantized_weight().detach()
    assert torch.equal(deployed.weight(), w_hat)
    assert torch.equal(deployed.scale, deployed.scale.bfloat16().float())  # as the file will have it
    deployed.scale = deployed.scale.roll(1, 0)  # planted fault: scales of the wrong rows
    assert not torch.equal(deployed.weight(), w_hat)


def test_the_gradient_of_an_offset_is_that_of_its_weight_times_the_scale():
    spec = QuantSpec(3, 32)
    linear = nn.Linear(64, 8, bias=False)
    scale, _ = find_range(linear.weight, spec, "mse")
    layer = parametrize(linear, Start(linear.weight.detach(), scale), "rounding", spec, torch.float32)
    g = torch.randn(8, 64)
    (grad,) = torch.autograd.grad((layer.quantized_weight() * g).sum(), [layer.quantizer.offset])
    v = layer.weight / scale.repeat_interleave(32, 1)
    inside = (v >= -4) & (v <= 3)
    torch.testing.assert_close(grad, torch.where(inside, g * scale.repeat_interleave(32, 1), 0.0))


def test_adamw_is_torchs_and_sign_sgd_is_the_sign():
    torch.manual_seed(0)
    p, grads = torch.randn(5, 3), torch.randn(20, 5, 3)
    mine, theirs = p.clone(), nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1.0, weight_decay=0)
    lr, plain = rates(20, 0.1, "adamw"), rates(20, 0.1, "sign-sgd")
    stepper = Stepper([mine], [0.5], "adamw")
    for i, g in enumerate(grads):
        stepper.step([g], lr[i])
        theirs.grad = g.clone()
        optimizer.param_groups[0]["lr"] = 0.5 * plain[i].item()
        optimizer.step()
    torch.testing.assert_close(
        mine, theirs.detach(), rtol=1e-4, atol=1e-6
    )  # eps stands before the correction of v here
    signed = p.clone()
    Stepper([signed], [2.0], "sign-sgd").step([grads[0]], torch.tensor(0.1))
    torch.testing.assert_close(signed, p - 0.2 * grads[0].sign())


def test_nan_ends_in_the_last_good_state():
    p = nn.Parameter(torch.tensor([1.0]))
    calls = []

    def loss() -> Tensor:
        calls.append(1)
        value = (p - 0.3).square().sum()
        return value if p.item() > 0.6 else value * float("nan")

    index = torch.zeros(1, 1, dtype=torch.int64)
    order = index.expand(16, 1)
    for keep in (True, False):
        p.data.fill_(1.0)
        lr = rates(16, 0.1, "sign-sgd")
        outcome = train([p], [1.0], loss, lambda i: None, lambda: None, order, index, lr, keep_best=keep)
        assert outcome.failed
        assert math.isfinite(p.item()) and p.item() > 0.6
        assert outcome.best <= outcome.before


# ------------------------------------------------------------------------------------------------ the engine


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_starts_are_the_recipes_of_that_name(spec):
    model, tokens = tiny_llama(), some_tokens(16, 24)
    for start, recipe in [("minmax", rtn), ("mse", rtn), ("gptq", gptq)]:
        other = tiny_llama()
        if start == "gptq":
            gptq(other, tokens.split(BATCH), spec)
        else:
            recipe(other, spec, start)
        result = run(model, spec, tokens, steps=0, start=start)
        blocks = other.model.layers
        for b, r in result.blocks.items():
            for name, layer in r.layers.items():
                want = blocks[b].get_submodule(name).dequantize(torch.float32)
                # GPTQ: a value at a boundary may fall the other way, since hidden states went through other products
                close = (layer.weight() - want).abs() < 1e-3 * want.abs().max()
                assert close.float().mean() > (0.98 if start == "gptq" else 0.9999), (b, name)


@pytest.mark.parametrize(
    "arm",
    [
        {},
        {"start": "gptq"},
        {"window": 2},
        {"window": 2, "stride": 1},
        {"window": 9},
        {"lookahead": 1},
        {"lookahead": "end", "end_mse": 1.0},
        {"target": "both", "lookahead": 1, "local": 1.0},
        {"learn": "weights", "optimizer": "adamw"},
        {"learn": "clip"},
        {"start": "awq"},
    ],
    ids=str,
)
def test_training_lowers_the_error_of_the_start(arm):
    spec = QuantSpec(3, 32)
    model, tokens = tiny_llama(num_hidden_layers=3, initializer_range=0.1), some_tokens(32, 24)
    start = run(model, spec, tokens, steps=0, start=arm.get("start", "mse"))
    trained = run(model, spec, tokens, **{"steps": 60, **arm})
    before = {n: p.clone() for n, p in model.named_parameters()}
    for row in trained.rows:
        assert row["best"] <= row["before"] and not row["failed"]
    assert sum(row["steps"] * (row["blocks"][1] - row["blocks"][0] + 1) for row in trained.rows) == 3 * 60
    a, b = (hidden_error(model, with_result(model, r), tokens) for r in (trained, start))
    # Ranges alone gain little; an objective at the logits weighs hidden states by what the head makes of them; what GPTQ
    # found for random weights is hard to better on other windows, and then its state is kept.
    few = arm.get("learn") == "clip" or arm.get("lookahead") == "end"
    assert a <= b * (1.0 if arm.get("start") == "gptq" else 0.999 if few else 0.95), (a, b)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # the model is left as it was


def test_blocks_without_chosen_layers_are_left():
    model, tokens = tiny_llama(num_hidden_layers=3), some_tokens(16, 24)
    chosen = ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.o_proj"]
    settings = Settings(batch_size=BATCH, steps=6)
    result = blockwise(model, tokens, QuantSpec(3, 32), settings, chosen)
    assert [row["steps"] for row in result.rows] == [0, 6, 0]
    assert {b: sorted(r.layers) for b, r in result.blocks.items()} == {
        0: [],
        1: ["mlp.up_proj", "self_attn.o_proj"],
        2: [],
    }
    before = dict(model.named_parameters())
    changed = [n for n, p in with_result(model, result).named_parameters() if not torch.equal(p, before[n])]
    assert sorted(changed) == sorted(f"{name}.weight" for name in chosen)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    model, spec = tiny_llama(), QuantSpec(3, 32)
    first = run(model, spec)
    assert same(first, run(model, spec))
    assert not same(first, run(model, spec, seed=1))


def test_polishing_trains_all_blocks_to_the_logits():
    model, spec, tokens = tiny_llama(initializer_range=0.1), QuantSpec(2, 32), some_tokens(32, 24)

    def divergence(result: Result) -> float:
        with torch.no_grad():
            a, b = (m(tokens).logits.log_softmax(-1) for m in (model, with_result(model, result)))
        return float((a.exp() * (a - b)).sum(-1).mean())

    plain, polished = run(model, spec, tokens, steps=20), run(model, spec, tokens, steps=20, polish=60, polish_lr=0.01)
    assert polished.rows[-1]["blocks"] == [0, 1]
    assert divergence(polished) < 0.95 * divergence(plain)


def test_broken_weights_are_named_before_any_training():
    model = tiny_llama()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="block 1: the loss is NaN before any training"):
        run(model, QuantSpec(4, 32))
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: .*NaN or Inf"):
        run(model, QuantSpec(4, 32))
    with pytest.raises(ValueError, match="3 calibration windows do not fill one batch of 4"):
        run(tiny_llama(), QuantSpec(4, 32), some_tokens(3, 8))


class Memory:
    """A keeper in memory that stops the run after some windows."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[dict[str, Tensor], dict]] = {}
        self.left = 99

    def load(self, index):
        return self.kept.get(index)

    def save(self, index, tensors, row):
        self.kept[index] = ({k: t.clone() for k, t in tensors.items()}, dict(row))
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "arm", [{}, {"window": 2, "stride": 1, "start": "awq"}, {"lookahead": "end", "polish": 8}], ids=str
)
def test_a_resumed_run_ends_in_the_same_bits(arm):
    model, spec, tokens = tiny_llama(num_hidden_layers=4), QuantSpec(3, 32, False), some_tokens(16, 24)
    settings = Settings(batch_size=BATCH, steps=8, **arm)
    want = blockwise(model, tokens, spec, settings)
    for stops in (1, 2, 3):
        keeper = Memory()
        keeper.left = stops
        with pytest.raises(KeyboardInterrupt):
            blockwise(model, tokens, spec, settings, keeper=keeper)
        keeper.left = 99
        got = blockwise(model, tokens, spec, settings, keeper=keeper)
        assert same(want, got), stops
        for b, r in want.blocks.items():
            assert all(torch.equal(t, got.blocks[b].other[n]) for n, t in r.other.items())
    last = keeper.kept[max(keeper.kept)][0]
    key = next(k for k in last if k.endswith("|codes"))
    last[key] = 1 - last[key].clamp(0, 1)  # planted fault: what was kept is used, and not made again
    assert not same(want, blockwise(model, tokens, spec, settings, keeper=keeper))


@pytest.mark.parametrize("place", ["host", "disk"])
def test_where_hidden_states_are_does_not_matter(place, tmp_path):
    model, spec, tokens = tiny_llama(), QuantSpec(3, 32), some_tokens(16, 24)
    settings = Settings(batch_size=BATCH, steps=6, target="both")
    want = blockwise(model, tokens, spec, settings)
    assert same(want, blockwise(model, tokens, spec, settings, place=place, folder=tmp_path))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ architectures

SMALL = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Qwen2": {}, "Qwen3": {"head_dim": 16}, "Mistral": {"sliding_window": 8}, "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 8}, "Gemma3Text": {"head_dim": 16, "sliding_window": 8},
    "Phi": {}, "Phi3": {}, "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
}  # fmt: skip


def family(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **FAMILIES[name])
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_walked_without_names(name):
    model, tokens = family(name), some_tokens(16, 24)
    root, blocks = find_blocks(model)
    hidden, arguments = block_arguments(model, blocks, tokens[:4])
    for block, given in zip(blocks, arguments, strict=True):
        hidden = call_block(block, hidden, given)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, blocks, hidden), model(tokens[:4]).logits, rtol=1e-4, atol=1e-4)
    for start in STARTS:
        result = run(model, QuantSpec(4, 32), tokens, steps=4 if start == "mse" else 0, start=start, lookahead="end")
        quantized = with_result(model, result)
        assert hidden_error(model, quantized, tokens) < 0.5
        want = [m for m in model.get_submodule(root).modules() if isinstance(m, nn.Linear)]
        experts = 4 * 3 if name in ("Mixtral", "Qwen3Moe") else 0
        assert sum(len(r.layers) for r in result.blocks.values()) == len(want) + experts * len(blocks)


def test_fused_experts_are_taken_apart_exactly_and_all_are_calibrated():
    model = family("Mixtral")
    block = copy.deepcopy(model.model.layers[0])
    x = torch.randn(2, 24, 64)
    want = block.mlp(x)
    assert unfuse(block) == ["mlp.experts"]
    experts = block.mlp.experts
    assert isinstance(experts, Experts)
    torch.testing.assert_close(block.mlp(x), want, rtol=1e-4, atol=1e-5)
    seen = []
    experts[0].gate_proj.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with all_experts(block):
        torch.testing.assert_close(block.mlp(x), want, rtol=1e-4, atol=1e-5)
    assert seen == [48]  # the router chose it for some of these tokens, it saw all
    model.model.layers[0].mlp.experts.extra = nn.Parameter(torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match=r"MixtralExperts with .* is not known; looked for gate_up_proj \[E, 2I, H\]"):
        run(model, QuantSpec(4, 32))


def test_inputs_that_depend_on_the_tokens_are_refused():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(288, 32)
            self.layers = nn.ModuleList([OddBlock() for _ in range(2)])

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embed(tokens)
            for layer in self.layers:
                h = layer(h, extra=tokens.float()[..., None])
            return h

    class OddBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(32, 32)

        def forward(self, hidden: Tensor, extra: Tensor) -> Tensor:
            return hidden + self.proj(hidden) * extra

    with pytest.raises(ValueError, match="block 0 of Odd is given 'extra', which depends on the tokens"):
        run(Odd(), QuantSpec(4, 32))
    with pytest.raises(ValueError, match="has no blocks to walk: looked for an"):
        run(nn.Sequential(nn.Linear(4, 4)), QuantSpec(4, 32))


# ------------------------------------------------------------------------------------------------ AWQ


@pytest.mark.parametrize("name", ["Llama", "Gemma", "Phi3", "Qwen2"])
def test_awq_folds_only_what_is_exact(name):
    model = tiny_llama() if name == "Llama" else family(name)
    block = copy.deepcopy(model.model.layers[0])
    _, blocks = find_blocks(model)
    hidden, arguments = block_arguments(model, blocks, some_tokens(4, 24))
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}

    def probe() -> Tensor:
        with torch.no_grad():
            return call_block(block, hidden, arguments[0])

    want = probe()
    folds = awq.find_folds(block, layers, probe)
    assert torch.equal(probe(), want)  # trying leaves nothing behind
    if name == "Phi3":
        expected = {"input_layernorm": ["self_attn.qkv_proj"], "post_attention_layernorm": ["mlp.gate_up_proj"]}
    else:
        qkv = [f"self_attn.{p}_proj" for p in "qkv"]
        expected = {"input_layernorm": qkv, "mlp.up_proj": ["mlp.down_proj"]}
        expected["post_attention_layernorm"] = ["mlp.gate_proj", "mlp.up_proj"]
    assert folds == expected  # and not v before o: its heads are shared
    seen = {n: awq.Hessian(m.in_features, hidden.device) for n, m in layers.items()}
    sizes = {}
    for n, m in layers.items():
        x = torch.randn(200, m.in_features) * torch.exp(torch.randn(m.in_features))
        seen[n].see(x)
        sizes[n] = x.abs().sum(0)
    before = {n: m.weight.clone() for n, m in layers.items()}
    awq.fold_scales(block, layers, QuantSpec(3, 32), seen, sizes, probe, torch.float32)
    assert any(not torch.equal(m.weight, before[n]) for n, m in layers.items())
    torch.testing.assert_close(probe(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


# ------------------------------------------------------------------------------------------------ memory


def test_a_run_that_does_not_fit_is_refused_with_what_to_change():
    with torch.device("meta"):
        block = transformers.models.llama.modeling_llama.LlamaDecoderLayer(
            transformers.LlamaConfig(hidden_size=4096, intermediate_size=14336, num_attention_heads=32), 0
        )
    facts = (block, 2 * 128256 * 4096, 128256, 128, 2048, 4096)
    on_device = estimate(*facts, Settings(), 2, "device", 32)
    low = estimate(*facts, Settings(batch_size=2), 2, "host", 32)
    assert 2 * sum(p.numel() for p in block.parameters()) < sum(low.device.values()) < 24 * GIB
    check(low, 24 * GIB, 64 * GIB, None)
    with pytest.raises(ValueError, match=r"needs about .* GiB of device memory and may use 8.0 GiB; .* try "):
        check(on_device, 8 * GIB, None, None)
    with pytest.raises(ValueError, match=r"host memory and 4.0 GiB are free: try fewer --cal"):
        check(low, 24 * GIB, 4 * GIB, None)
    assert str(Estimate({"block": 1.5 * GIB, "norms": 1e3}, {})) == "device 1.50 GiB (block 1.50); host 0.00 GiB"


def test_random_stops_do_not_change_the_result():
    """Ten stops at random steps, inside windows and between them."""
    model, spec, tokens = tiny_llama(num_hidden_layers=3), QuantSpec(3, 32), some_tokens(16, 24)
    settings = Settings(batch_size=BATCH, steps=16, window=3, stride=1)
    want = blockwise(model, tokens, spec, settings)
    draw, keeper, stops = random.Random(5), Memory(), 0
    while stops < 10:
        left = draw.randrange(1, 30)

        def stop(done: int, total: int, note: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        try:
            got = blockwise(model, tokens, spec, settings, keeper=keeper, on_progress=stop)
        except KeyboardInterrupt:
            stops += 1
            if draw.random() < 0.3:  # what a crash may lose
                keeper.kept.pop(max(keeper.kept, default=-1), None)
        else:
            assert same(want, got)
            keeper = Memory()
    got = blockwise(model, tokens, spec, settings, keeper=keeper)
    assert same(want, got)
