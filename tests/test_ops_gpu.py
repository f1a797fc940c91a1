"""What only a GPU can show: streams, captured graphs, several devices, and that the backends agree with each other."""

from __future__ import annotations

import pytest
import torch

from cases import FakeQuantCase, make_fake_quant, make_weight, mismatch, want_product
from pyquant import ops, reference
from pyquant.formats import int4
from pyquant.ops import _registry

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch):
    """One of the two kernel backends, pinned."""
    why = _registry.unavailable(request.param, "cuda")
    if why:
        pytest.skip(why)
    monkeypatch.setenv("PYQUANT_BACKEND", request.param)
    return request.param


class Calls:
    """One small call of each op on a device: functions without arguments that return a tuple of tensors."""

    def __init__(self, device: str) -> None:
        self.weight = make_weight(130, 512, 128, False, torch.float16, device)
        qweight, scale, zero = self.weight.tiled()
        self.x = torch.randn(4, 512, device=device).half()
        self.many = torch.randn(70, 512, device=device).half()
        self.grad_y = torch.randn(4, 130, device=device).half()
        self.w, self.s, self.z, self.grad = make_fake_quant(
            FakeQuantCase(65, 384, 128, symmetric=False), torch.float16, device
        )
        self.t = torch.full((2,), 4.0, device=device)[0]
        self.codes, self.token_scale, self.sums = ops.quantize_activation(self.many, sum_size=128)
        quant = torch.ops.pyquant
        self.all = {
            "linear_w4a16": lambda: (ops.linear_w4a16(self.x, qweight, scale, zero, None, 130, 128),),
            "linear_w4a16 of many tokens": lambda: (ops.linear_w4a16(self.many, qweight, scale, zero, None, 130, 128),),
            "linear_w4a16_backward": lambda: (
                quant.linear_w4a16_backward(self.grad_y, qweight, scale, zero, 512, 128),
            ),
            "quantize_activation": lambda: ops.quantize_activation(self.x, 8, 32, sum_size=128),
            "linear_w4a8": lambda: (
                ops.linear_w4a8(self.codes, self.token_scale, self.sums, qweight, scale, zero, None, 130, 512, 128),
            ),
            "dequantize_int4": lambda: (ops.dequantize_int4(qweight, scale, zero, 130, 512, 128),),
            "quantize_int4": lambda: (ops.quantize_int4(self.w, self.s, None, 128, 4),),
            "fake_quant": lambda: (ops.fake_quant(self.w, self.s, self.z, 128, 4),),
            "fake_quant_backward": lambda: quant.fake_quant_backward(self.grad, self.w, self.s, self.z, 128, 4, 0.5),
            "fake_quant at a temperature": lambda: (
                ops.fake_quant(self.w, self.s, self.z, 128, 4, 0.5, "sigmoid-b", "sigmoid", self.t, 10.0, True),
            ),
            "fake_quant_backward at a temperature": lambda: quant.fake_quant_backward(
                self.grad, self.w, self.s, self.z, 128, 4, 0.5, "sigmoid-a", "sigmoid", self.t
            ),
        }
        # the first argument of each op: what changes between two replays
        self.first = {
            "linear_w4a16": self.x, "linear_w4a16 of many tokens": self.many,
            "quantize_activation": self.x, "linear_w4a8": self.codes,
            "linear_w4a16_backward": self.grad_y, "dequantize_int4": scale,
            "quantize_int4": self.w, "fake_quant": self.w, "fake_quant_backward": self.grad,
            "fake_quant at a temperature": self.w, "fake_quant_backward at a temperature": self.grad,
        }  # fmt: skip


def same(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


NAMES = [
    "linear_w4a16",
    "linear_w4a16 of many tokens",
    "linear_w4a16_backward",
    "quantize_activation",
    "linear_w4a8",
    "dequantize_int4",
    "quantize_int4",
    "fake_quant",
    "fake_quant_backward",
    "fake_quant at a temperature",
    "fake_quant_backward at a temperature",
]


def test_every_op_is_called_here():
    assert set(NAMES) == set(Calls("cuda").all)


@pytest.mark.parametrize("name", NAMES)
def test_follows_the_current_stream(backend, name):
    """The input is written late on a side stream: a kernel on another stream would read the old one."""
    calls = Calls("cuda")
    run, first = calls.all[name], calls.first[name]
    old = run()
    fresh = -first
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # about 30 ms: the host is long past the launch when the input changes
        first.copy_(fresh)
        got = run()
    stream.synchronize()
    want = run()
    assert same(got, want)
    assert not same(got, old), "the new input must give another result"


@pytest.mark.parametrize("name", NAMES)
def test_is_captured_in_a_graph(backend, name):
    """Captured once, replayed on another input: nothing of the call may be left to the host."""
    calls = Calls("cuda")
    run, first = calls.all[name], calls.first[name]
    run()  # Triton compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    first.copy_(first.flip(0))
    want = run()
    for t in got:
        t.view(torch.uint8).fill_(0xA5)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert same(got, want)


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("at a temperature")])
def test_a_captured_graph_follows_the_temperature(backend, name):
    """A schedule changes the scalar between replays: nothing read it when the graph was captured."""
    calls = Calls("cuda")
    run = calls.all[name]
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for temperature in (2.0, 9.0):
        calls.t.fill_(temperature)
        graph.replay()
        torch.cuda.synchronize()
        assert same(got, run())
    calls.t.fill_(1.0)
    assert not same(got, run())


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_each_device(backend, name):
    """On the tensors' device, whichever is current; with one GPU this is only that GPU."""
    for i in range(torch.cuda.device_count()):
        torch.manual_seed(1)
        calls = Calls(f"cuda:{i}")
        current = (i + 1) % torch.cuda.device_count()
        with torch.cuda.device(current):
            got = calls.all[name]()
            torch.cuda.synchronize(i)
            assert torch.cuda.current_device() == current
        assert all(t.device.index == i for t in got)
        with torch.cuda.device(i):
            assert same(got, calls.all[name]())


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_paths_equal_the_reference_bit_for_bit(backend, group_size, symmetric):
    weight = make_weight(200, 1000, group_size, symmetric, torch.bfloat16, "cuda")
    qweight, scale, zero = weight.tiled()
    assert torch.equal(
        ops.dequantize_int4(qweight, scale, zero, 200, 1000, group_size),
        reference.dequantize_int4(qweight, scale, zero, 200, 1000, group_size),
    )
    w = weight.w_hat.float() + torch.randn(200, 1000, device="cuda") * 0.3
    zero = None if weight.zero is None else weight.zero.float()
    assert torch.equal(
        ops.quantize_int4(w, weight.scale, zero, group_size, 4),
        reference.quantize_int4(w, weight.scale, zero, group_size, 4),
    )


def test_offsets_beyond_31_bits(backend):
    """A weight of more than 2^31 elements: offsets of 32 bits would wrap."""
    n, k = 64 * 520, 64 * 1024  # 2.18e9 elements, 1.1 GB of codes
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of GPU memory, {free >> 30} GiB are free")
    assert n * k > 2**31
    w = torch.zeros(n, k, dtype=torch.bfloat16, device="cuda")
    w[-1, -64:] = torch.arange(64, device="cuda").bfloat16() % 16 - 8
    scale = torch.ones(n, 1, dtype=torch.bfloat16, device="cuda")
    qweight = ops.quantize_int4(w, scale)
    last = int4.untile_codes(qweight[-1:, -1:].contiguous(), 64, 64)[-1]
    assert torch.equal(last.int() - 8, w[-1, -64:].int())
    assert torch.equal(ops.dequantize_int4(qweight, int4.tile_scale(scale, k, -1), None, n, k, -1)[-1], w[-1])
    assert torch.equal(ops.fake_quant(w, scale)[-1], w[-1])
    x = torch.zeros(2, k, dtype=torch.bfloat16, device="cuda")
    x[:, -1] = 1
    y = ops.linear_w4a16(x, qweight, int4.tile_scale(scale, k, -1), None, None, n, -1)
    assert torch.equal(y[:, -1], w[-1, -1].expand(2))
    assert y[:, :-1].count_nonzero() == 0


def test_backends_agree_on_a_product():
    """cuda and triton sum in different orders and both stay within the bound of fp32 sums."""
    calls = Calls("cuda")
    for name in ("cuda", "triton"):
        want = want_product(calls.x, calls.weight.w_hat, None, torch.float16, False, fixed_point_x=name == "cuda")
        if _registry.unavailable(name, "cuda") is None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYQUANT_BACKEND", name)
                assert mismatch(calls.all["linear_w4a16"]()[0], want) is None, name
