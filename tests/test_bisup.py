"""Weight-activation quantization: rounding of inputs, rotations, hosts, BiSup's parts, and the prompt's K and V."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny import learnable_tokens, some_tokens, tiny_llama
from torch import nn

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.errors import error_curves, write_error_pages
from pyquant.integrations.evaluate import perplexity
from pyquant.integrations.prompt import STORAGES, prompt_cache, prompted_perplexity, round_kv
from pyquant.recipes.act_linear import ActLinear, Inputs, best_clip, best_ratio, magnitudes, round_weight
from pyquant.recipes.bisup import HOSTS, PARTS, BiSup, Opened, Quantized, bisup
from pyquant.recipes.bisup_parts import Smoothing, Trained
from pyquant.recipes.blocks import block_arguments, call_block, embed, find_blocks
from pyquant.recipes.rotate import factors, hadamard, random_rotation, rotate, small_orthogonal
from pyquant.recipes.streams import FullPrecision, InMemory, precision
from pyquant.recipes.vocabulary import fake_quant_tokens

SPEC = QuantSpec(3, 32)


def run(host: str, parts: tuple[str, ...] = (), **changes: Any) -> tuple[nn.Module, torch.Tensor, Quantized]:
    model, tokens = tiny_llama(), learnable_tokens(16, 24)
    fields = {"act_bits": 3, "steps": 24, "batch_size": 4, **changes}
    return model, tokens, bisup(model, tokens, SPEC, BiSup(host=host, parts=parts, **fields))


# ------------------------------------------------------------------------------------------------ rounding of inputs


@pytest.mark.parametrize(("bits", "group", "clip"), [(8, -1, 1.0), (4, 32, 0.9), (3, 32, 0.7), (2, 16, 1.0)])
def test_inputs_are_rounded_group_by_group(bits, group, clip):
    """Against a loop over groups in fp64; the last group is short."""
    x = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 5, 40)
    y = fake_quant_tokens(x, bits, group, clip)
    top = 2 ** (bits - 1) - 1
    for row, got in zip(x.view(-1, 40).double(), y.view(-1, 40).double(), strict=True):
        for begin in range(0, 40, 40 if group == -1 else group):
            part = row[begin : begin + (40 if group == -1 else group)]
            s = part.abs().max() * clip / top
            want = (part / s).round().clamp(-top - 1, top) * s
            # 1e-6: the scale in fp32; a value moved by one step would be off by s, which is 1e-2 or more
            assert (got[begin : begin + len(part)] - want).abs().max() < 1e-6 * part.abs().max()
    shifted = fake_quant_tokens(x.roll(1, -1), bits, group, clip).roll(-1, -1)
    assert group == -1 or not torch.equal(shifted, y)  # groups lie where they should


def test_gradients_of_inputs_pass_the_scale_and_the_clip():
    """fp64 finite differences would see the steps; the straight-through form is differentiated by hand instead."""
    x = torch.tensor([[0.3, -1.0, 0.62, 0.05]], requires_grad=True)
    clip = torch.tensor(0.8, requires_grad=True)
    fake_quant_tokens(x, 3, -1, clip, range_gradient=True).sum().backward()
    s = 0.8 * 1.0 / 3
    v = x.detach() / s  # 1.125, -3.75, 2.325, 0.1875: the second is clipped to -4 + nothing, so it stays inside
    q = v.round().clamp(-4, 3)
    dscale = (q - v).sum()
    assert clip.grad.item() == pytest.approx((dscale * 1.0 / 3).item(), rel=1e-5)
    want = torch.ones_like(v)
    want[0, 1] += dscale * 0.8 / 3 * -1  # through the largest magnitude, which is negative
    torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-6)


def test_inputs_refuse_what_cannot_be():
    for wrong in ({"bits": 9}, {"bits": 1}, {"bits": 4, "clip": 0.0}, {"bits": 4, "clip": 1.5}):
        with pytest.raises(ValueError, match=r"must be"):
            Inputs(**wrong)


def test_outliers_have_bits_of_their_own():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x[:, 7] *= 100
    mask = torch.zeros(64, dtype=torch.bool)
    mask[7] = True
    plain, mixed = Inputs(3, 32)(x), Inputs(3, 32, outliers=mask)(x)
    keep = ~mask
    assert (mixed - x)[:, 7].abs().max() < 100 * 4 / 127  # half a step of 8 bits, magnitudes below 400
    assert (mixed - x)[:, keep].square().mean() < 0.2 * (plain - x)[:, keep].square().mean()
    w_hat, _ = round_weight(x, 1.0, SPEC, torch.float32, mask, 8)
    assert (w_hat - x)[:, 7].abs().max() < 100 * 4 / 127


def test_searched_ranges_are_no_worse_than_full_ones():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    errors = [(round_weight(w, r, SPEC, torch.float32)[0] - w).square().mean() for r in (best_ratio(w, SPEC), 1.0)]
    assert errors[0] < 0.9 * errors[1]
    assert 0.5 < best_clip(w, Inputs(3, 32)) < 1


# ------------------------------------------------------------------------------------------------ rotations


@pytest.mark.parametrize("n", [1, 2, 64, 12, 96, 172, 43, 1408])
def test_hadamard_is_orthogonal_and_even(n):
    r = hadamard(torch.eye(n, dtype=torch.float64))
    assert (r @ r.T - torch.eye(n)).abs().max() < 1e-12  # sums of n terms in fp64
    assert r.abs().max() * math.sqrt(n) < 1.4143  # 1 of a Hadamard matrix, sqrt 2 of the Hartley transform
    m, p = factors(n)
    assert m * p == n
    assert not p & (p - 1)
    walsh = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(p)] for i in range(p)]).double() / math.sqrt(p)
    assert (torch.kron(small_orthogonal(m), walsh) - r).abs().max() < 1e-12
    x = torch.randn(3, n, dtype=torch.float64)
    assert (hadamard(hadamard(x), inverse=True) - x).abs().max() < 1e-12


@pytest.mark.parametrize("online", [True, False])
def test_rotating_changes_no_logit(online):
    model, tokens = tiny_llama(), some_tokens()
    rotated = copy.deepcopy(model)
    rotate(rotated, tokens, 3, online)
    before, after = model(tokens).logits, rotated(some_tokens()).logits
    assert (after - before).norm() < 1e-5 * before.norm()  # fp32 sums in another order
    assert not torch.allclose(rotated.lm_head.weight, rotated.model.embed_tokens.weight)  # untied: a norm is in one
    assert (rotated.model.norm.weight == 1).all()
    # a wrong rotation is seen: Q of another seed in the head
    q = random_rotation(64, 4).float()
    rotated.lm_head.weight.data.copy_(rotated.lm_head.weight @ q)
    assert (rotated(tokens).logits - before).norm() > 0.1 * before.norm()


def test_rotating_spreads_an_outlier():
    model, tokens = tiny_llama(), some_tokens()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 50
    rotated = copy.deepcopy(model)
    rotate(rotated, tokens)

    def peak(who: nn.Module) -> torch.Tensor:
        h = embed(who, find_blocks(who)[1], tokens)
        return (h.abs().amax(-1) / h.square().mean(-1).sqrt()).mean()

    assert peak(model) > 6
    assert peak(rotated) < 4


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_other_families_rotate(family):
    """Biases, norms inside attention, sliding windows: logits stay, and the whole recipe runs."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.dim() == 1:
            p.data.add_(0.3 * torch.randn_like(p))
    tokens = learnable_tokens(8, 24)
    before = model(tokens).logits
    rotated = copy.deepcopy(model)
    rotate(rotated, tokens)
    assert (rotated(tokens).logits - before).norm() < 1e-5 * before.norm()  # fp32 sums in another order
    made = bisup(model, tokens, SPEC, BiSup(host="quarot", act_bits=3, steps=8, batch_size=4))
    bare = bisup(model, tokens, SPEC, BiSup(host="quarot", act_bits=3, parts=(), batch_size=4))
    assert (made.model(tokens).logits - before).norm() < (bare.model(tokens).logits - before).norm()


def test_models_that_do_not_rotate_are_refused():
    model = tiny_llama()
    model.model.norm = nn.Identity()
    with pytest.raises(ValueError, match="quarot needs one norm"):
        rotate(model, some_tokens())
    with pytest.raises(ValueError, match="quarot rotates in fp32"):
        rotate(tiny_llama(dtype=torch.bfloat16), some_tokens())


def test_a_norm_behind_a_layer_is_refused():
    """What Gemma has: the stream then receives what no rotation commutes with."""
    model = tiny_llama()

    class Behind(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp, self.norm = mlp, nn.RMSNorm(64)
            self.norm.weight.data.uniform_(0.5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.mlp(x))

    for block in model.model.layers:
        block.mlp = Behind(block.mlp)
    with pytest.raises(ValueError, match="rotating changes its logits"):
        rotate(model, some_tokens())


# ------------------------------------------------------------------------------------------------ hosts and parts


@pytest.mark.parametrize("host", list(HOSTS))
def test_a_host_rounds_every_layer(host):
    model, tokens, made = run(host)
    layers = {n: m for n, m in made.model.named_modules() if isinstance(m, ActLinear)}
    assert len(layers) == 14
    full = dict(made.reference.named_modules())
    for name, layer in layers.items():
        outliers = layer.inputs.outliers
        keep = torch.ones(layer.in_features, dtype=torch.bool) if outliers is None else ~outliers
        assert (outliers is not None) == (host == "atom")
        scale = layer.scale.repeat_interleave(32, 1)[:, : layer.in_features]
        steps = (layer.weight / scale)[:, keep]
        assert (steps - steps.round()).abs().max() < 1e-4  # fp32 products
        assert steps.min() >= -4
        assert steps.max() <= 3
        assert (layer.weight - full[name].weight).norm() < 0.5 * full[name].weight.norm()
    assert (made.reference(tokens).logits - model(tokens).logits).norm() < 1e-4 * model(tokens).logits.norm()
    if host == "rtn":  # the layer's meaning, from codes in fp64
        layer, x = layers["model.layers.0.mlp.down_proj"], torch.randn(4, 96)
        want = fake_quant_tokens(x, 3, 32).double() @ layer.weight.double().T
        assert (layer(x).double() - want).abs().max() < 1e-4 * want.abs().max()


def test_low_bits_hurt_and_16_bits_of_inputs_do_less():
    model, tokens, _ = run("rtn")
    reference = model(tokens).logits

    def error(**changes: Any) -> float:
        made = bisup(model, tokens, QuantSpec(4, 32), BiSup(parts=(), batch_size=4, **changes))
        return float((made.model(tokens).logits - reference).norm() / reference.norm())

    errors = [error(act_bits=bits) for bits in (16, 8, 4, 3)]
    assert errors[0] < errors[2] < errors[3]
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("host", list(HOSTS))
def test_training_brings_the_block_nearer(host):
    model, tokens, bare = run(host)
    _, _, made = run(host, PARTS)
    assert all(row["best"] < row["before"] for row in made.rows)
    errors = [(m.model(tokens).logits - model(tokens).logits).norm() for m in (made, bare)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_trains_alone(part):
    _, _, made = run("rtn", (part,))
    assert all(row["best"] < row["before"] for row in made.rows[:1])


@pytest.mark.parametrize("host", list(HOSTS))
def test_the_finished_block_is_the_trained_one(host):
    """Bit by bit: norms folded, low-rank merged, clips settled; with every parameter moved away from its start."""
    model, tokens = tiny_llama(), learnable_tokens(8, 24)
    model.requires_grad_(False)
    if host == "quarot":
        rotate(model, tokens[:1])
    _, blocks = find_blocks(model)
    hidden, arguments = block_arguments(model, blocks, tokens)
    context = precision(torch.device("cpu"), False)
    fp = FullPrecision(InMemory(blocks), arguments, 8, context)
    block = InMemory(blocks).fetch(0)
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    opened = Opened(block, layers, SPEC, BiSup(host=host, act_bits=3, smooth_alpha=0.5), torch.bfloat16, 0)
    opened.begin(lambda begin, count: hidden[begin : begin + count], 8, 8, arguments[0], fp, context)
    make = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p, _ in opened.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=make))
        trained = call_block(block, hidden, arguments[0])
        original = call_block(blocks[0], hidden, arguments[0])
        assert set(opened.smoothings) >= {"input_layernorm", "post_attention_layernorm"}
        assert ("mlp.up_proj" in opened.smoothings) == (host != "quarot")  # a rotation lies between up and down
        opened.finish()
        assert torch.equal(call_block(block, hidden, arguments[0]), trained)
    assert not torch.equal(trained, original)
    assert {type(m) for m in block.modules() if isinstance(m, nn.Linear)} == {ActLinear}
    norm = block.input_layernorm.weight
    assert torch.equal(norm, norm.to(torch.bfloat16).float())  # as a file would hold it
    assert not torch.equal(norm, blocks[0].input_layernorm.weight)


def test_smoothing_alone_changes_nothing_before_rounding():
    """16-bit inputs and 8-bit weights: what is folded is taken back exactly, up to 8-bit rounding."""
    model, tokens = tiny_llama(), learnable_tokens(8, 24)
    how = BiSup(parts=("smooth",), act_bits=16, steps=0, batch_size=4, smooth_alpha=0.5)
    made = bisup(model, tokens, QuantSpec(8, 32), how)
    before = model(tokens).logits
    plain = bisup(model, tokens, QuantSpec(8, 32), BiSup(parts=(), act_bits=16, steps=0, batch_size=4))
    errors = [(m.model(tokens).logits - before).norm() / before.norm() for m in (made, plain)]
    assert errors[0] < 2 * errors[1]
    assert errors[0] < 0.05


def test_gradients_of_the_parts():
    """fp64 gradcheck of everything smooth: folded norms, smoothed weights with the low-rank term, the range."""
    torch.manual_seed(0)
    norm = nn.RMSNorm(12).double()
    norm.weight.data.uniform_(0.5, 1.5)
    columns = Smoothing(norm, torch.rand(12).double() + 0.5, 0.7, torch.float64)
    rows = Smoothing(nn.Linear(12, 8), torch.rand(8).double() + 0.5, 0.7, torch.float64)
    linear = nn.Linear(12, 8, bias=True).double().requires_grad_(False)
    layer = Trained(linear, Inputs(3, 4), SPEC, torch.float32, torch.full((8, 1), 0.8), columns, rows)
    layer.add_low_rank(3, 1.5, 0)
    a, b = torch.randn(3, 12).double().requires_grad_(), torch.randn(8, 3).double().requires_grad_()
    rho, turn = torch.randn(12).double().requires_grad_(), torch.randn(8).double().requires_grad_()
    for module in (columns, rows):
        del module._parameters["rho"]
    del layer._parameters["a"], layer._parameters["b"]

    def weight(rho, turn, a, b):
        columns.rho, rows.rho, layer.a, layer.b = rho, turn, a, b
        return layer.to_round(), layer.folded_bias(), columns.norm_weight() * columns.factors()

    # norm x factors is the norm's old weight, whatever rho: its numerical gradient is 0, and straight through it is too
    assert torch.autograd.gradcheck(weight, (rho, turn, a, b), eps=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda w: magnitudes(w, 4), (torch.randn(3, 10).double().requires_grad_(),))


def test_the_gradient_of_a_clip_is_that_of_its_range():
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))
    ratio = torch.full((4, 2), 0.7, requires_grad=True)
    grad = torch.randn(4, 64, generator=torch.Generator().manual_seed(7))
    round_weight(w, ratio, SPEC, torch.float32)[0].backward(grad)
    unit = magnitudes(w, 32) / 3  # d scale / d ratio
    v = w / (0.7 * unit).repeat_interleave(32, 1)
    q = v.round().clamp(-4, 3)
    slope = torch.where((v >= -4) & (v <= 3), q - v, q)
    want = (grad * slope).view(4, 2, 32).sum(-1) * unit
    torch.testing.assert_close(ratio.grad, want, rtol=1e-4, atol=1e-5)  # fp32 sums
    assert (want.abs() > 0.01).all()


class Memory:
    """A keeper in memory that forgets what comes after a block."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}

    def load(self, index: int) -> Any:
        return self.held.get(index)

    def save(self, index: int, tensors: dict[str, torch.Tensor], row: dict[str, Any]) -> None:
        self.held[index] = ({n: t.clone() for n, t in tensors.items()}, dict(row))


@pytest.mark.parametrize("host", list(HOSTS))
def test_a_resumed_run_ends_in_the_same_bits(host):
    model, tokens, how = tiny_llama(), learnable_tokens(16, 24), BiSup(host=host, act_bits=3, steps=8, batch_size=4)
    keeper = Memory()
    first = bisup(model, tokens, SPEC, how, keeper=keeper)
    del keeper.held[1]
    again = bisup(model, tokens, SPEC, how, keeper=keeper)
    for (name, a), b in zip(first.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(first.model(tokens).logits, again.model(tokens).logits)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"host": "awq"}, "host='awq' must be one of"),
        ({"parts": ("clip", "turn")}, "parts=turn unknown"),
        ({"act_bits": 1}, "act_bits=1 must be"),
        ({"act_clip": 1.5}, "act_clip=1.5 must be in"),
        ({"clip_start": "max"}, "clip_start='max'"),
        ({"smooth_reach": 0.0}, "smooth_reach=0.0"),
    ],
)
def test_settings_that_cannot_be(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        BiSup(**wrong)


def test_inputs_of_a_run_that_cannot_be():
    model = tiny_llama()
    with pytest.raises(ValueError, match="2 calibration windows do not fill one batch of 8"):
        bisup(model, learnable_tokens(2), SPEC)
    with pytest.raises(ValueError, match="symmetric"):
        bisup(model, learnable_tokens(8), QuantSpec(4, 32, False))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"block 1: mlp\.up_proj has NaN"):
        bisup(model, learnable_tokens(8), SPEC, BiSup(parts=(), steps=0))


# ------------------------------------------------------------------------------------------------ the prompt


def test_a_prompt_in_16_bits_is_plain_context():
    """Against one pass over prompt and window without any cache, in fp32."""
    model, tokens, prompt = tiny_llama(), learnable_tokens(6, 24), some_tokens(1, 7)[0]
    pairs = prompt_cache(model, model, prompt, 4, "both")
    assert pairs[0][0].shape == (1, 2, 7, 16)
    got = prompted_perplexity(model, tokens, pairs)
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(6, -1), tokens], 1)).logits[:, 7:-1]
    want = nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()).exp().item()
    assert got == pytest.approx(want, rel=1e-5)  # fp32 sums in another order
    other = prompted_perplexity(model, tokens, prompt_cache(model, model, prompt.flip(0), 4))
    assert other != pytest.approx(want, rel=1e-4)  # the prompt is seen
    assert prompted_perplexity(model, tokens, pairs, 2, 32) != pytest.approx(want, rel=1e-4)  # and so are few bits


@pytest.mark.parametrize("host", ["rtn", "quarot"])
def test_the_four_storages(host):
    model, _, made = run(host)
    prompt, rotated = some_tokens(1, 7)[0], host == "quarot"
    pairs = {s: prompt_cache(made.model, model, prompt, 3, s, 32, rotated) for s in STORAGES}
    exact = prompt_cache(model, model, prompt, 16)

    def error(a: Any, b: Any) -> float:
        return max(
            float((x - y).norm() / y.norm()) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
        )

    assert error(pairs["both"], exact) == 0
    assert 0.02 < error(pairs["computed"], exact) < 0.5  # 3 bits
    want = [tuple(round_kv(t, 3, 32, rotated) for t in pair) for pair in exact]
    assert error(pairs["computed"], want) == 0
    assert error(pairs["stored"], exact) > 0.02
    assert error(pairs["none"], pairs["stored"]) > 0.02
    with pytest.raises(ValueError, match="storage='half'"):
        prompt_cache(made.model, model, prompt, 3, "half")


def test_k_and_v_are_rounded_along_the_heads_of_a_token():
    t = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(3))
    got = round_kv(t, 4, 32)
    flat = t.permute(0, 2, 1, 3).reshape(10, 64)
    assert torch.equal(got.permute(0, 2, 1, 3).reshape(10, 64), fake_quant_tokens(flat, 4, 32))
    assert torch.equal(round_kv(t, 16), t)
    t[..., 3] *= 30
    errors = [(round_kv(t, 4, 32, rotated) - t)[..., 4:].norm() for rotated in (True, False)]
    assert errors[0] < errors[1]


# ------------------------------------------------------------------------------------------------ errors


def test_error_curves(tmp_path):
    model, tokens, made = run("quarot")
    none = error_curves(model, model, model, tokens)
    assert all(v == 0 for curve in none.values() for v in curve)
    found = error_curves(model, made.reference, made.model, tokens, 4, 32, True)
    assert {len(curve) for curve in found.values()} == {2}
    assert found["horizontal"][0] < found["total"][0]
    assert found["vertical"][1] < found["total"][1]
    with torch.no_grad():  # the total, by hand: K and V in 16 bits
        total = error_curves(model, made.reference, made.model, tokens)["total"][-1]
    a, b = ({}, {})
    for who, keep in ((made.model, a), (made.reference, b)):
        hook = find_blocks(who)[1][-1].register_forward_hook(
            lambda _, args, out, keep=keep: keep.update(h=out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            who(tokens)
        hook.remove()
    want = (a["h"][:, -1] - b["h"][:, -1]).norm() / b["h"][:, -1].norm()
    assert total == pytest.approx(want.item(), rel=1e-3)  # some values lie on a threshold, sums differ in order
    names = write_error_pages({"quarot": found}, tmp_path, "tiny", {"bits": 3})
    assert all((tmp_path / name).stat().st_size for name in names)
    assert "<svg" in (tmp_path / "errors.svg").read_text()
    with pytest.raises(ValueError, match="T >= 2"):
        error_curves(model, model, model, tokens[:, :1])


def test_perplexity_is_finite_everywhere():
    _, tokens, made = run("atom", PARTS)
    assert math.isfinite(perplexity(made.model, tokens))
