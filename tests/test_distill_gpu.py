"""The distillation loss on a GPU: both kernels at every size class and mode, no waiting for the GPU, graphs, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distill_cases import MIXES, Sample, error, expected, make

from cases import unit_roundoff
from pyquant import reference
from pyquant.ops import _distill_chunks as distill
from pyquant.ops import _registry, distill_loss
from pyquant.ops.distill_rows import distill_rows, distill_scale

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# a cluster of 1, 2, 4 and 8 blocks, each full and just beyond; then the wider kernel, and beyond 262144 the plain one
VOCABULARIES = [1, 5, 1000, 16384, 16388, 32768, 50257, 65540, 128256, 131072, 131080, 151936, 262144, 262147]


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch):
    """One of the two kernel backends, pinned."""
    why = _registry.unavailable(request.param, "cuda")
    if why:
        pytest.skip(why)
    monkeypatch.setenv("PYQUANT_BACKEND", request.param)
    return request.param


def logits(rows: int, vocabulary: int, dtype: torch.dtype, spread: float) -> torch.Tensor:
    """Random logits whose rows start at 16 bytes; what lies between the rows is poisoned."""
    padded = -(-vocabulary // 8) * 8
    whole = torch.full((rows, padded), float("nan"), device="cuda", dtype=dtype)
    whole[:, :vocabulary] = torch.randn(rows, vocabulary, device="cuda") * spread
    return whole[:, :vocabulary]


def settings(mix: str) -> tuple[float, ...]:
    how = {
        "kl": 0.5, "reverse_kl": 0.0, "jsd": 0.0, "jsd_beta": 0.5, "ce": 0.5, "temperature": 1.0, "softcap": 0.0,
        "teacher_softcap": 0.0, "logit_scale": 1.0,
    } | MIXES[mix]  # fmt: skip
    return (*how.values(), how["logit_scale"])


def check_rows(
    vocabulary: int, mix: str, teacher_dtype: torch.dtype, grad_dtype: torch.dtype, block: int, shift: int = 0
) -> None:
    """Every row in fp64 beside it: sums, and D with the error of fp32 arithmetic and one rounding.

    Arguments of the exponentials are below 40 in base 2 and rounded to fp32, ex2.approx and lg2.approx add some ulp: s, t
    and p are right to about 5e-6 of themselves, and so are differences of their logarithms, which multiply s where they
    are up to 10. D is a difference of such terms: its error is measured by s + t + p, not by D.
    """
    rows, first, total = 6, 2, 9
    student, teacher = logits(rows, vocabulary, FP32, 3.0), logits(rows, vocabulary, teacher_dtype, 3.0)
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    labels[1] = -100
    factor = torch.tensor(0.37, device="cuda")
    weights = settings(mix)
    divergence = any(weights[:3])
    arguments = (student, teacher if divergence else None, labels, factor, -100, *weights, first, total, block + shift)
    padded = -(-vocabulary // 8) * 8
    sums = torch.full((rows, 4), float("nan"), device="cuda")
    grad = torch.full((total * padded,), 7.0, device="cuda", dtype=grad_dtype)
    distill_rows(sums, grad, *arguments)
    want_sums = torch.zeros(rows, 4, device="cuda", dtype=torch.float64)
    want = torch.full((total * padded,), 7.0, device="cuda", dtype=torch.float64)
    wide = (student.double(), arguments[1] if arguments[1] is None else arguments[1].double(), labels, factor.double())
    reference.distill_rows(want_sums, want, *wide, *arguments[4:-1], block)
    assert (sums.double() - want_sums).abs().max() < 1e-5 * want_sums.abs().max().clamp_min(1)
    z, y = (t.double() * weights[8] for t in (student, teacher))
    size = torch.softmax(z, -1) + torch.softmax(z / weights[5], -1) + torch.softmax(y / weights[5], -1)
    if weights[6]:  # capped logits: nearer to each other
        size = torch.ones_like(size).mul_(size.amax())
    size = size * (5e-5 * 0.37 * abs(weights[8]) * sum(weights[:3] + weights[4:5]) * max(1.0, weights[5]))
    u = unit_roundoff(grad_dtype) * (4 if grad_dtype == FP32 else 1)  # fp32: as many operations after the difference
    smallest = 2.0**-24 if grad_dtype == FP16 else 0.0  # half a step of fp16's subnormal numbers
    for (start, got), (_, right) in zip(
        reference.distill_blocks(grad, total, vocabulary, block),
        reference.distill_blocks(want, total, vocabulary, block), strict=True,
    ):  # fmt: skip
        assert torch.equal(got[:first], torch.full_like(got[:first], 7.0)), "rows of others are left alone"
        assert torch.equal(got[first + rows :], torch.full_like(got[first + rows :], 7.0))
        assert got[first + 1].count_nonzero() == 0, "an ignored row"
        got, right = got[first : first + rows].double(), right[first : first + rows]
        bound = u * right.abs() + smallest + size[:, start : start + block]
        assert ((got - right).abs() <= bound).all(), float(((got - right).abs() / bound).max())
    alone = torch.full((rows, 4), float("nan"), device="cuda")
    distill_rows(alone, None, *arguments)
    torch.testing.assert_close(alone, sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_rows_of_every_size(backend, vocabulary):
    for mix in ("kl+ce", "all", "ce"):
        check_rows(vocabulary, mix, FP32, BF16, distill.BLOCK)


@pytest.mark.small
@pytest.mark.parametrize("mix", MIXES)
def test_rows_of_every_mix(backend, mix):
    for vocabulary in (5, 333, 4104):
        for teacher_dtype, grad_dtype in ((FP32, BF16), (BF16, FP16), (FP16, FP32)):
            check_rows(vocabulary, mix, teacher_dtype, grad_dtype, 128)


def test_a_wrong_block_is_seen(backend):
    with pytest.raises(AssertionError):
        check_rows(1000, "kl", FP32, BF16, 128, shift=8)


@pytest.mark.small
def test_a_label_outside_shows(backend):
    student = logits(2, 40, FP32, 1.0)
    sums = torch.zeros(2, 4, device="cuda")
    labels = torch.tensor([3, 40], device="cuda")
    distill_rows(sums, None, student, None, labels, torch.ones((), device="cuda"), -100, *settings("ce"), 0, 2, 128)
    assert torch.isfinite(sums[0]).all()
    assert torch.isnan(sums[1, 3])


@pytest.mark.small
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_scale(backend, dtype):
    for count in (1, 7, 4099):
        t = torch.randn(count, device="cuda").to(dtype)
        for piece in (t, t[1:]):  # the second starts at no multiple of 16 bytes
            want = (piece.float() * (0.3 * 2.0)).to(dtype)
            got = piece.clone() if piece is t else torch.cat([t[:1], piece])[1:]
            distill_scale(got, torch.tensor(2.0, device="cuda"), 0.3)
            torch.testing.assert_close(got, want, rtol=2 * unit_roundoff(dtype), atol=0)
            kept = got.clone()
            distill_scale(got, torch.tensor(4.0, device="cuda"), 0.25)
            assert torch.equal(got, kept)


@pytest.mark.parametrize("lend", [0, 1])
@pytest.mark.parametrize("mix", ["kl+ce", "all"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_loss_and_gradients(backend, dtype, mix, lend, monkeypatch):
    """As on the CPU: one rounding of D and one of the result, u / sqrt(3) RMS each, and one of dW a segment."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(distill, "LEND", lend)
    monkeypatch.setattr(distill, "BLOCK", 512)
    monkeypatch.setattr(distill, "SCRATCH", 8 << 20)
    sample = make(300, 512, 5003, 256, dtype, "cuda")
    want = expected(sample, **MIXES[mix])
    loss, _ = distill_loss(*sample.args(), **MIXES[mix])
    assert error(loss.detach(), want[0]) < 1e-5
    bound = 100 * unit_roundoff(dtype) if dtype == FP32 else 2 * unit_roundoff(dtype)
    for found, right in zip(torch.autograd.grad(loss, (sample.x, sample.weight)), want[2:], strict=True):
        assert error(found, right) < bound


def test_never_waits_for_the_gpu(backend):
    sample = make(300, 128, 5003, 64, BF16, "cuda")
    distill_loss(*sample.args())[0].backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        distill_loss(*sample.args(), **MIXES["all"])[0].backward()
        with torch.autocast("cuda", torch.bfloat16):
            distill_loss(*sample.args())[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_side_stream(sample: Sample) -> tuple[torch.Tensor, ...]:
    loss, _ = distill_loss(*sample.args())
    return loss.detach(), *torch.autograd.grad(loss, (sample.x, sample.weight))


def test_follows_the_current_stream(backend):
    """The input is written late on a side stream: a kernel on another stream would read the old one."""
    sample = make(300, 128, 5003, 64, BF16, "cuda")
    old, fresh = on_side_stream(sample), -sample.teacher_x
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        sample.teacher_x.copy_(fresh)
        got = on_side_stream(sample)
    stream.synchronize()
    want = on_side_stream(sample)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(got[0], old[0])


def test_is_captured_in_a_graph(backend):
    """Forward and backward in one graph, replayed on other hidden states and another number of counted tokens."""
    sample = make(300, 128, 5003, 64, BF16, "cuda")
    on_side_stream(sample)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = on_side_stream(sample)
    with torch.no_grad():
        sample.x.copy_(sample.x.flip(0))
    sample.labels[10:90] = -100
    want = on_side_stream(sample)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_same_bits_every_time(backend):
    sample = make(300, 128, 5003, 64, BF16, "cuda")
    first = on_side_stream(sample)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, on_side_stream(sample), strict=True))


def test_memory_is_flat_in_tokens(monkeypatch):
    """Beyond the gradients: almost nothing while the head's gradient lends its memory, SCRATCH and sums after that."""
    monkeypatch.setattr(distill, "SCRATCH", 32 << 20)
    hidden, vocabulary = 1024, 16384
    beyond = {}
    for tokens in (256, 512, 2048, 8192, 16384):
        sample = make(1, hidden, vocabulary, hidden, BF16, "cuda")
        x = torch.randn(tokens, hidden, device="cuda", dtype=BF16)
        sample = replace(sample, x=x.clone().requires_grad_(), teacher_x=x, labels=None)
        distill_loss(*sample.args(), kl=1.0, ce=0.0)[0].backward()
        sample.x.grad = sample.weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        distill_loss(*sample.args(), kl=1.0, ce=0.0)[0].backward()
        torch.cuda.synchronize()
        gradients = 2 * (tokens * hidden + vocabulary * hidden)
        beyond[tokens] = torch.cuda.max_memory_allocated() - before - gradients
    # fp32 sums of dx of a segment (H x 4 bytes a token), four sums a token, rounding of the allocator
    slack = 16 << 20
    assert beyond[256] < slack, beyond
    assert max(beyond.values()) < (32 << 20) + 3 * slack, beyond
    assert beyond[16384] - beyond[2048] < slack, beyond
