"""rms_norm, silu_and_mul, rope_append and attention_decode against fp64, with faults that must be noticed."""

from __future__ import annotations

import decode_cases
import pytest
import torch
from decode_cases import (
    ATTENTION_CASES,
    ATTENTION_FAULTS,
    ODD_HEADS,
    ROW_CASES,
    AttentionCase,
    make_attention,
    rotated_heads,
    want_attention,
    want_norm,
    want_silu,
)

from cases import RESULT_FAULTS, Want, make_weight, make_x, mismatch, unit_roundoff
from pyquant import ops, reference
from pyquant.ops import _registry

pytestmark = pytest.mark.usefixtures("poison")

HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
FLOATS = [*HALVES, pytest.param(torch.float32, id="fp32")]


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="torch-cpu"),
        pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
        pytest.param(("cuda", "cuda"), id="cuda-cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request, monkeypatch):
    """(backend, device), pinned, so that nothing else can answer in its place."""
    name, device = request.param
    if why := _registry.unavailable(name, device):
        pytest.skip(why)
    monkeypatch.setenv("PYQUANT_BACKEND", name)
    return request.param


def marked(items, small):
    """pytest parameters; those that are small carry the marker that compute-sanitizer runs select."""
    return [pytest.param(i, id="-".join(map(str, i)) if isinstance(i, tuple) else str(i),
                         marks=[pytest.mark.small] if small(i) else []) for i in items]  # fmt: skip


SMALL_ROWS = marked(ROW_CASES, lambda case: case[0] * case[1] <= 8000)
SMALL_ATTENTION = marked(ATTENTION_CASES, lambda case: case.capacity <= 200)


def kernels_skip(backend, dtype):
    if backend[0] == "cuda" and dtype == torch.float32:
        pytest.skip("the kernels are for 16-bit values; fp32 runs in torch")


def rejects(got, want: Want):
    """The comparison notices each planted fault of a result."""
    for name, fault in RESULT_FAULTS.items():
        assert mismatch(fault(got), want), f"the comparison missed {name}"


# ------------------------------------------------------------------------------------------------ norm


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", SMALL_ROWS)
def test_rms_norm(backend, case, dtype):
    kernels_skip(backend, dtype)
    m, k, layout = case
    x, weight = make_x(m, k, layout, dtype, backend[1]), (1 + torch.randn(k, device=backend[1]) / 2).to(dtype)
    got, want = ops.rms_norm(x, weight, 1e-5), want_norm(x, weight, 1e-5, dtype)
    assert got.is_contiguous()
    assert mismatch(got, want) is None
    rejects(got, want)
    assert mismatch(ops.rms_norm(x, weight, 1.0), want), "the comparison missed another eps"
    if k > 1:
        assert mismatch(ops.rms_norm(x, weight.roll(1), 1e-5), want), "the comparison missed shifted weights"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", SMALL_ROWS)
def test_add_rms_norm(backend, case, dtype):
    kernels_skip(backend, dtype)
    m, k, layout = case
    x, residual = (make_x(m, k, way, dtype, backend[1]) for way in (layout, "rows"))
    weight = (1 + torch.randn(k, device=backend[1]) / 2).to(dtype)
    got, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype)), "the sum is rounded once, exactly"
    assert mismatch(got, want_norm(total, weight, 1e-5, dtype)) is None
    assert mismatch(got, want_norm(x, weight, 1e-5, dtype)), "the comparison missed a lost residual"


def test_norm_of_nothing_and_of_more_dimensions(backend):
    weight = torch.ones(16, device=backend[1]).half()
    assert ops.rms_norm(torch.empty(0, 16, device=backend[1]).half(), weight, 1e-5).shape == (0, 16)
    x = torch.randn(2, 3, 16, device=backend[1]).half()
    assert torch.equal(ops.rms_norm(x, weight, 1e-5).view(6, 16), ops.rms_norm(x.view(6, 16), weight, 1e-5))


# ------------------------------------------------------------------------------------------------ activation


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", SMALL_ROWS)
def test_silu_and_mul(backend, case, dtype):
    kernels_skip(backend, dtype)
    m, k, layout = case
    gate_up = make_x(m, 2 * k, layout, dtype, backend[1])
    gate_up[:, :k].mul_(4)  # where silu is far from both of its asymptotes and close to them
    got, want = ops.silu_and_mul(gate_up), want_silu(gate_up, dtype)
    assert got.is_contiguous()
    assert mismatch(got, want) is None
    rejects(got, want)
    assert mismatch(ops.silu_and_mul(gate_up.roll(k, 1)), want), "the comparison missed exchanged halves"


def test_silu_at_the_ends(backend):
    gate = torch.tensor([-60000.0, -100.0, -0.0, 0.0, 100.0, 60000.0], device=backend[1]).half()
    got = ops.silu_and_mul(torch.cat([gate, torch.ones_like(gate)]))
    assert torch.equal(got, torch.tensor([0, 0, 0, 0, 100, 60000], device=backend[1]).half())


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [*SMALL_ATTENTION, pytest.param(ODD_HEADS, id="odd", marks=pytest.mark.small)])
def test_attention_decode(backend, case, dtype):
    kernels_skip(backend, dtype)
    inputs = make_attention(case, dtype, backend[1])
    arguments = inputs.arguments()
    if backend[0] == "cuda" and case is ODD_HEADS:
        with pytest.raises(RuntimeError, match="head size 48 is none of"):
            ops.attention_decode(*arguments)
        return
    got, want = ops.attention_decode(*arguments), want_attention(inputs, dtype)
    assert mismatch(got, want) is None
    rejects(got, want)
    for name, fault in ATTENTION_FAULTS.items():
        wrong = fault(inputs)
        alone = case.slots == (0,) or (name == "KV heads swapped" and case.kv_heads == 1)
        if not alone:  # with one slot every probability is 1; with one KV head there is nothing to swap
            assert mismatch(got, want_attention(wrong, dtype)), f"the comparison missed: {name}"

    _, k_new, v_new = rotated_heads(inputs)
    u = unit_roundoff(dtype)
    for b in range(case.batch):
        slot = int(inputs.slot[b])
        for cache, before, new in ((arguments[3], inputs.k_cache, k_new), (arguments[4], inputs.v_cache, v_new)):
            # one rounding of a value made by a few operations in fp32
            row = Want(new[b], u * new[b].abs() + 1e-5, u + 1e-5)
            assert mismatch(cache[b, :, slot], row) is None
            kept = torch.ones(case.capacity, dtype=torch.bool, device=backend[1])
            kept[slot] = False
            assert torch.equal(cache[b][:, kept].isnan(), before[b][:, kept].isnan())
            assert torch.equal(cache[b][:, kept].nan_to_num(), before[b][:, kept].nan_to_num())
        assert torch.equal(arguments[4][b, :, slot], v_new[b].to(dtype)), "values are copied"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [c for c in SMALL_ATTENTION if c.values[0].size in (80, 128)])
def test_rope_append_is_the_step_without_attention(backend, case, dtype):
    """Three tokens at once give the queries and the cache that three steps give."""
    slots = tuple(min(slot, case.capacity - 3) for slot in case.slots)
    case = decode_cases.replace(case, slots=slots, starts=tuple(min(s, *slots, 20) for s in case.starts))
    inputs = make_attention(case, dtype, backend[1])
    kv_width = 2 * case.kv_heads * case.size
    prompt = make_x(case.batch * 3, kv_width + case.heads * case.size, case.layout, dtype, backend[1])
    prompt = prompt.reshape(case.batch, 3, -1)
    arguments = inputs.arguments()
    q = ops.rope_append(prompt, *arguments[1:10])
    assert q.shape == (case.batch, 3, case.heads, case.size)
    u = unit_roundoff(dtype)
    for i in range(3):
        step = decode_cases.replace(inputs, qkv=prompt[:, i], slot=inputs.slot + i)
        q_new, k_new, v_new = rotated_heads(step)
        assert mismatch(q[:, i], Want(q_new, u * q_new.abs() + 1e-5, u + 1e-5)) is None
        assert mismatch(q[:, i], Want(rotated_heads(decode_cases._rotate_backwards(step))[0],
                                      u * q_new.abs() + 1e-5, u + 1e-5)) or not inputs.slot.any()  # fmt: skip
        rows = torch.arange(case.batch, device=backend[1])
        at = (inputs.slot + i).long()
        k_row, v_row = arguments[3][rows, :, at], arguments[4][rows, :, at]
        assert mismatch(k_row, Want(k_new, u * k_new.abs() + 1e-5, u + 1e-5)) is None
        assert torch.equal(v_row, v_new.to(dtype))
    untouched = arguments[4].isnan().sum() + 3 * case.batch * case.kv_heads * case.size
    assert untouched == inputs.v_cache.isnan().sum(), "three slots a sequence are written, nothing else"


def test_padding_stands_at_position_zero(backend):
    """Slots before start have no position of their own: they must not read the tables out of bounds."""
    inputs = make_attention(AttentionCase(1, 2, 1, 64, 30, (0,), (5,)), torch.float16, backend[1])
    prompt = torch.randn(1, 8, inputs.qkv.shape[1], device=backend[1]).half()
    q = ops.rope_append(prompt, *inputs.arguments()[1:10])
    first = reference.rotate(prompt[0, :6, :64].float(), inputs.cos[0], inputs.sin[0])
    torch.testing.assert_close(q[0, :6, 0].float(), first, rtol=2e-3, atol=1e-5)  # one fp16 rounding is 5e-4


GOOD = make_attention(AttentionCase(2, 4, 2, 64, 40, (15, 16)), torch.float16, "cpu")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"qkv": GOOD.qkv[:, :100]}, r"qkv \(2, 100\) does not hold q, k and v heads"),
        ({"qkv": GOOD.qkv[:1]}, r"for a cache of 2 sequences"),
        ({"qkv": GOOD.qkv.bfloat16()}, "qkv is torch.bfloat16 but the cache is torch.float16"),
        ({"qkv": GOOD.qkv[None]}, r"qkv must be \[B, \(Hq \+ 2 Hkv\) D\]"),
        ({"cos": GOOD.cos.half()}, r"cos must be contiguous float32 \[P, 32\], got torch.float16"),
        ({"sin": GOOD.sin[:-1]}, r"cos \(40, 32\) and sin \(39, 32\) differ"),
        ({"slot": GOOD.slot.long()}, r"slot must be contiguous int32 \[2\], got torch.int64"),
        ({"start": GOOD.start[:1]}, r"start must be contiguous int32 \[2\]"),
        ({"v_cache": GOOD.v_cache[:, :, :20]}, "must agree in shape and strides"),
        ({"q_norm": torch.ones(64).half()}, "give both q_norm and k_norm, or neither"),
        ({"window": -1}, "window=-1 must be 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_attention_refuses(changes, sentence):
    ops.attention_decode(*GOOD.arguments())
    with pytest.raises(ValueError, match=f"attention_decode: .*{sentence}"):
        ops.attention_decode(*decode_cases.replace(GOOD, **changes).arguments())


def test_the_others_refuse():
    x, weight = torch.randn(3, 16), torch.ones(16)
    for call, sentence in (
        (lambda: ops.rms_norm(x, weight[:8], 1e-5), r"weight must have shape \(16,\), got \(8,\)"),
        (lambda: ops.rms_norm(x.half(), weight, 1e-5), "x is torch.float16 but weight is torch.float32"),
        (lambda: ops.add_rms_norm(x, x[:2], weight, 1e-5), r"residual is torch.float32 \(2, 16\)"),
        (lambda: ops.silu_and_mul(x[:, :7]), r"gate_up must be \[\.\.\., 2 I\], got shape \(3, 7\)"),
        (lambda: ops.rms_norm(x, weight.requires_grad_(), 1e-5), "has no gradient"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


# ------------------------------------------------------------------------------------------------ the end of a step


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("eos", [None, [3], [0, 1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("case", marked([(1, 1), (7, 50), (3, 1001), (2, 4096), (1, 128256), (40, 5000)],
                                        lambda case: case[0] * case[1] <= 4000))  # fmt: skip
def test_greedy_append(backend, case, eos, dtype):
    kernels_skip(backend, dtype)
    device, (batch, vocabulary) = backend[1], case
    logits = torch.randn(batch, vocabulary + 8, device=device).to(dtype)[:, :vocabulary]
    if eos and len(eos) > 1:  # some rows choose one of them
        logits[::2, :8] += 9
    ends = decode_cases.make_ends(batch, 9, device)
    want = decode_cases.want_greedy(logits, ends, eos, 77)
    ops.greedy_append(logits, *ends, None if eos is None else torch.tensor(eos, device=device), 77)
    names = ("tokens", "ids", "slot", "unfinished", "length")
    for name, got, right in zip(names, ends, want, strict=True):
        assert torch.equal(got.cpu().long(), right), name


def test_greedy_takes_the_first_of_equals(backend):
    logits = torch.zeros(3, 9000, device=backend[1]).half()
    logits[1, 4444:] = 1
    logits[2] = -torch.inf
    logits[2, 8999] = -60000
    ends = decode_cases.make_ends(3, 9, backend[1])
    ops.greedy_append(logits, *ends)
    assert ends[1].tolist() == [0, 4444, 8999]


@pytest.mark.parametrize(
    ("at", "wrong", "sentence"),
    [
        (0, torch.zeros(3), r"logits must be \[B, V\], got \(3,\)"),
        (1, torch.zeros(2, 9).long(), r"tokens must be int64 \[3, W\], got torch.int64 \(2, 9\)"),
        (3, torch.zeros(3).long(), r"slot must be contiguous torch.int32 \[3\], got torch.int64"),
        (6, torch.zeros(2).int(), r"eos must be contiguous int64 \[E\]"),
    ],
)
def test_greedy_refuses(at, wrong, sentence):
    arguments = [torch.randn(3, 50), *decode_cases.make_ends(3, 9, "cpu"), None, 0]
    arguments[at] = wrong
    with pytest.raises(ValueError, match=sentence):
        ops.greedy_append(*arguments)


# ------------------------------------------------------------------------------------------------ only a GPU can show


@pytest.mark.gpu
class TestOnTheGpu:
    """The kernels may start early: a chain of them, each reading what the one before wrote, over a cache they share."""

    @pytest.fixture(autouse=True)
    def _kernels(self, monkeypatch):
        if why := _registry.unavailable("cuda", "cuda"):
            pytest.skip(why)
        monkeypatch.setenv("PYQUANT_BACKEND", "cuda")

    def chain(self, dtype=torch.bfloat16, batch=2, early=False):
        """A function of x [B, 512] that runs norm, qkv product, attention, product, norm, activation; and its state."""
        heads, kv_heads, size, hidden, capacity = 8, 2, 128, 512, 256
        case = AttentionCase(batch, heads, kv_heads, size, capacity, (100, 180), (0, 7))
        state = make_attention(case, dtype, "cuda")
        weights = [
            make_weight(n, k, 128, True, dtype, "cuda").tiled()
            for n, k in (((heads + 2 * kv_heads) * size, hidden), (hidden, heads * size), (2 * hidden, hidden))
        ]
        weights = [(q, s / 64, z) for q, s, z in weights]
        norm = torch.ones(hidden, device="cuda", dtype=dtype)
        arguments = state.arguments()

        def step(x):
            y = ops.rms_norm(x, norm, 1e-5)
            qkv = ops.linear_w4a16(y, *weights[0], None, (heads + 2 * kv_heads) * size, 128)
            a = ops.attention_decode(qkv, *arguments[1:12], early)
            o = ops.linear_w4a16(a, *weights[1], None, hidden, 128)
            y, x = ops.add_rms_norm(o, x, norm, 1e-5)
            up = ops.linear_w4a16(y, *weights[2], None, 2 * hidden, 128)
            return ops.add_rms_norm(ops.silu_and_mul(up), x, norm, 1e-5)[0]

        return step, state, arguments

    def reset(self, state, arguments):
        arguments[3].copy_(state.k_cache)
        arguments[4].copy_(state.v_cache)

    @pytest.mark.parametrize("early", [False, True])
    @pytest.mark.parametrize("dtype", HALVES)
    def test_a_captured_chain_equals_one_call_at_a_time(self, dtype, early):
        step, state, arguments = self.chain(dtype, early=early)
        slots = arguments[5].clone()

        def alone(x, steps=20):
            """Each kernel after the one before it has ended."""
            self.reset(state, arguments)
            arguments[5].copy_(slots)
            for _ in range(steps):
                with pytest.MonkeyPatch.context() as patch:
                    for name in ("rms_norm", "add_rms_norm", "linear_w4a16", "attention_decode", "silu_and_mul"):
                        run = getattr(ops, name)

                        def slow(*args, run=run):
                            torch.cuda.synchronize()
                            return run(*args)

                        patch.setattr(ops, name, slow)
                    x = step(x)
                arguments[5].add_(1)
            return x

        x = torch.randn(2, 512, device="cuda").to(dtype)
        want = alone(x)
        want_cache = arguments[3].clone()
        assert torch.isfinite(want).all()

        hold = x.clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step(hold)
            hold.copy_(y)
            arguments[5].add_(1)
        for _ in range(5):
            self.reset(state, arguments)
            arguments[5].copy_(slots)
            hold.copy_(x)
            for _ in range(20):
                graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(hold, want)
            assert torch.equal(arguments[3].nan_to_num(), want_cache.nan_to_num())

    def test_consecutive_steps_without_a_promise(self):
        """Step after step of attention alone: each reads the row that the one before has just written."""
        _, state, arguments = self.chain()
        qkvs = [torch.randn_like(state.qkv) for _ in range(30)]
        results = []
        for wait in (True, False):
            self.reset(state, arguments)
            arguments[5].copy_(state.slot)
            slots = [arguments[5] + i for i in range(len(qkvs))]
            torch.cuda.synchronize()
            outs = []
            for qkv, slot in zip(qkvs, slots, strict=True):
                outs.append(ops.attention_decode(qkv, *arguments[1:5], slot, *arguments[6:12]))
                if wait:
                    torch.cuda.synchronize()
            results.append(torch.stack(outs))
        assert torch.isfinite(results[0]).all()
        assert torch.equal(*results)

    def test_same_input_same_bits_beside_another_stream(self):
        step, state, arguments = self.chain()
        x = torch.randn(2, 512, device="cuda").bfloat16()
        other, big = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
        results = []
        for _ in range(100):
            self.reset(state, arguments)
            with torch.cuda.stream(other):
                big @ big
            results.append(step(x))
        assert all(torch.equal(results[0], r) for r in results)

    def test_follows_the_current_stream(self):
        step, state, arguments = self.chain()
        x = torch.randn(2, 512, device="cuda").bfloat16()
        want = step(x)
        side, late = torch.cuda.Stream(), torch.zeros_like(x)
        self.reset(state, arguments)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # about 10 ms
            late.copy_(x)
            got = step(late)
        torch.cuda.synchronize()
        assert torch.equal(got, want)
