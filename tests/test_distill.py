"""distill_loss: what it computes against the reference's autograd in fp64, and how it behaves in training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import distill_cases
import pytest
import torch
from distill_cases import MIXES, error, expected, make

from benchmarks import plots, tables
from cases import unit_roundoff
from pyquant import reference
from pyquant.ops import _distill_chunks as distill
from pyquant.ops import distill_loss
from pyquant.ops.distill_rows import aligned
from pyquant.recipes.kd_qat import KDLoss, kd_loss

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [(1, 8, 5, 4), (37, 24, 101, 16), (9, 64, 40, 8), (64, 16, 333, 16)]  # T, H, V, Ht
# fp64 against fp64, sums of some hundred terms in another order
EXACT = 1e-12


@pytest.fixture(params=["lent", "scratch", "narrow"])
def memory(request, monkeypatch):
    """Where D lies: in the head's gradient, in scratch memory for a few rows at once, and in many blocks of either."""
    if request.param != "lent":
        monkeypatch.setattr(distill, "SCRATCH", 40_000)
        monkeypatch.setattr(distill, "LEND", int(request.param == "narrow"))
    if request.param != "scratch":
        monkeypatch.setattr(distill, "BLOCK", 16)
        monkeypatch.setattr(distill, "LOGITS", 24)
    return request.param


def gradients(sample, weight=1.0, **how):
    loss, parts = distill_loss(*sample.args(), **how)
    return loss.detach(), parts, *torch.autograd.grad(loss * weight, (sample.x, sample.weight))


# ------------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("mix", MIXES)
def test_reference_is_smooth(mix):
    """Autograd of the reference against finite differences."""
    sample = make(4, 6, 9, 5, torch.float64)

    def loss(x, w):
        return reference.distill_loss(x, w, sample.labels, sample.teacher_x, sample.teacher_weight, **MIXES[mix])[0]

    assert torch.autograd.gradcheck(loss, (sample.x, sample.weight))


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, mix, chunk, memory):
    sample = make(*shape, torch.float64)
    want = expected(sample, **MIXES[mix])
    got = gradients(sample, chunk=chunk, **MIXES[mix])
    assert error(got[0], want[0]) < EXACT
    for name, value in got[1].items():
        assert abs(float(value - want[1][name])) < EXACT * 10, name
        assert not value.requires_grad
    for found, right in zip(got[2:], want[2:], strict=True):
        assert error(found, right) < EXACT


def test_planted_faults_are_seen():
    """Each wrong reading of the definition moves loss or gradient far beyond the tolerance."""
    sample = make(37, 24, 101, 16, torch.float64)
    how = MIXES["all"]
    want = expected(sample, **how)
    wrong = {
        "all tokens count": (replace(sample, labels=sample.labels.clamp_min(0)), how),
        "labels one token late": (replace(sample, labels=sample.labels.roll(1)), how),
        "no temperature": (sample, how | {"temperature": 1.0}),
        "beta the other way": (sample, how | {"jsd_beta": 0.3}),
        "teacher's cap": (sample, how | {"teacher_softcap": 6.0}),
        "no cap": (sample, how | {"softcap": None}),
        "scale": (sample, how | {"logit_scale": 1.29}),
    }
    for name, (other, settings) in wrong.items():
        got = gradients(other, **settings)
        assert max(error(a, b) for a, b in zip(got[2:], want[2:], strict=True)) > 1e6 * EXACT, name
        assert error(got[0], want[0]) > 1e6 * EXACT, name


def test_shifted_blocks_are_seen(monkeypatch):
    """Gradients of the logits read one block away."""
    sample = make(37, 24, 128, 16, torch.float64)
    monkeypatch.setattr(distill, "BLOCK", 16)
    want = expected(sample)
    blocks = distill._Segment.blocks

    def shifted(self):
        right = blocks(self)
        return [(start, right[(i + 1) % len(right)][1]) for i, (start, _) in enumerate(right)]

    monkeypatch.setattr(distill._Segment, "blocks", shifted)
    assert error(gradients(sample)[2], want[2]) > 0.1


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_narrow_dtypes(dtype, mix, memory):
    """Logits and softmax are fp32: what is left is one rounding of D and one of the result. Each is at most u of an
    element, u / sqrt(3) RMS; a segment adds one of dW. fp32: sums of V = 333 terms."""
    sample = make(64, 32, 333, 16, dtype)
    want = expected(sample, **MIXES[mix])
    got = gradients(sample, **MIXES[mix])
    u = unit_roundoff(dtype)
    assert error(got[0], want[0]) < 1e-5
    bound = 40 * u if dtype == torch.float32 else 2 * u
    for found, right in zip(got[2:], want[2:], strict=True):
        assert found.dtype == dtype
        assert error(found, right) < bound
    # logits rounded to 16 bits, as a head computes them by itself, are beyond that bound in bf16
    if dtype == torch.bfloat16 and mix == "kl":
        x, w = sample.x.detach(), sample.weight.detach()
        s = torch.softmax((x @ w.T).float(), -1)
        t = torch.softmax((sample.teacher_x @ sample.teacher_weight.T).float(), -1)
        d = (s - t) * (sample.labels != -100).unsqueeze(-1) / (sample.labels != -100).sum()
        assert error(d @ w.float(), want[2]) > bound / 2


def test_small_gradients_survive_fp16():
    """A gradient of 1 / T a token lies below fp16's normal numbers for most of the vocabulary; it must not be lost."""
    sample = make(512, 16, 4096, 16, torch.float16)
    want = expected(sample)
    got = gradients(sample, weight=2.0**10)
    for found, right in zip(got[2:], want[2:], strict=True):
        assert error(found, right * 2**10) < 2 * unit_roundoff(torch.float16)


@pytest.mark.parametrize("layout", ["rows", "columns", "padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_teacher_logits(dtype, layout):
    sample = make(9, 16, 45, 8, torch.float64)
    logits = (torch.randn(9, 45, dtype=torch.float64) * 2).to(dtype)
    if layout == "columns":
        logits = logits.T.contiguous().T
    elif layout == "padded":
        logits = torch.nn.functional.pad(logits, (0, 3))[:, :45]
    bare = replace(sample, teacher_x=None, teacher_weight=None)
    how = MIXES["all"] | {"teacher_softcap": None, "teacher_logits": logits}
    want = expected(bare, **how)
    got = gradients(bare, chunk=4, **how)
    assert error(got[0], want[0]) < EXACT
    assert all(error(a, b) < EXACT for a, b in zip(got[2:], want[2:], strict=True))


def test_a_teacher_that_rules_tokens_out():
    """Minus infinity in teacher logits is a probability of 0, for KL and JSD."""
    sample = make(9, 16, 45, 8, torch.float32)
    logits = torch.randn(9, 45).masked_fill(torch.rand(9, 45) < 0.5, -torch.inf)
    logits[:, 0] = 0
    bare = replace(sample, teacher_x=None, teacher_weight=None)
    how = {"kl": 0.5, "jsd": 0.5, "ce": 0.0, "teacher_logits": logits}
    loss, _, dx, dw = gradients(bare, **how)
    s = torch.softmax((sample.x @ sample.weight.T).double(), -1)
    t = torch.softmax(logits.double(), -1)
    m = (s + t) / 2
    kl = torch.where(t > 0, t * (t.clamp_min(1e-300) / s).log(), 0).sum(-1)
    jsd = (torch.where(t > 0, t * (t.clamp_min(1e-300) / m).log(), 0).sum(-1) + (s * (s / m).log()).sum(-1)) / 2
    want = (0.5 * (kl + jsd))[sample.labels != -100].mean()
    assert error(loss, want.detach()) < 1e-5  # fp32 products
    right = torch.autograd.grad(want, (sample.x, sample.weight))
    assert error(dx, right[0].double()) < 1e-5
    assert error(dw, right[1].double()) < 1e-5


def test_is_the_loss_of_kd_qat():
    """On the positions that kd_loss scores, loss and parts agree."""
    sample = make(2 * 7, 16, 45, 8, torch.float64)
    student = (sample.x @ sample.weight.T).view(2, 7, 45)
    teacher = (sample.teacher_x @ sample.teacher_weight.T).view(2, 7, 45)
    labels = sample.labels.view(2, 7)
    want, parts = kd_loss(student, teacher, labels, KDLoss(0.3, 0.6, 2.0))
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1).view(-1)
    got, found = distill_loss(*replace(sample, labels=shifted).args(), kl=0.3, ce=0.6, temperature=2.0)
    assert error(got, want.double()) < 1e-6  # kd_loss computes in fp32
    assert all(error(found[name], parts[name].double()) < 1e-6 for name in parts)


def test_nothing_counts(memory):
    sample = make(9, 64, 40, 8, torch.float32)
    sample.labels.fill_(-100)
    loss, parts, dx, dw = gradients(sample, **MIXES["all"])
    assert [float(t) for t in (loss, *parts.values())] == [0] * 5
    assert dx.count_nonzero() == 0
    assert dw.count_nonzero() == 0


def test_no_tokens():
    sample = make(9, 64, 40, 8, torch.float32)
    empty = replace(sample, x=sample.x[:0].detach().requires_grad_(), labels=sample.labels[:0])
    empty.teacher_x = sample.teacher_x[:0]
    loss, _, dx, dw = gradients(empty)
    assert float(loss) == 0
    assert dx.shape == (0, 64)
    assert dw.count_nonzero() == 0


def test_without_labels_every_token_counts():
    sample = replace(make(9, 64, 40, 8, torch.float64), labels=None)
    want, got = expected(sample, kl=1.0, ce=0.0), gradients(sample, kl=1.0, ce=0.0)
    assert error(got[0], want[0]) < EXACT
    assert float(got[1]["ce"]) == 0
    everything = gradients(replace(sample, labels=torch.zeros(9, dtype=torch.int64)), kl=1.0, ce=0.0)
    assert error(got[2], everything[2]) < EXACT


# ------------------------------------------------------------------------------------------------ in training


def test_only_what_is_wanted_is_multiplied(monkeypatch):
    """A frozen head or frozen hidden states cost no product, and losses alone none of the backward."""
    made = []
    product = distill._product
    monkeypatch.setattr(distill, "_product", lambda out, a, b: (made.append(tuple(out.shape)), product(out, a, b)))
    sample = make(9, 64, 40, 8, torch.float32)
    logits = [(9, 40)] * 2
    for x, w, shapes in ((True, True, [(9, 64), (40, 64)]), (True, False, [(9, 64)]), (False, True, [(40, 64)])):
        sample.x, sample.weight = sample.x.detach().requires_grad_(x), sample.weight.detach().requires_grad_(w)
        made.clear()
        loss, _ = distill_loss(*sample.args())
        assert made == logits + shapes
        loss.backward()
        assert (sample.x.grad is not None, sample.weight.grad is not None) == (x, w)
    made.clear()
    with torch.no_grad():
        alone, parts = distill_loss(*sample.args())
    assert made == logits
    assert float(alone) == pytest.approx(float(loss), rel=1e-6)
    assert not alone.requires_grad
    assert set(parts) == {"kl", "reverse_kl", "jsd", "ce"}


def test_no_gradient_flows_to_the_teacher():
    sample = make(9, 64, 40, 8, torch.float32)
    sample.teacher_x.requires_grad_()
    sample.teacher_weight.requires_grad_()
    distill_loss(*sample.args())[0].backward()
    assert sample.teacher_x.grad is None
    assert sample.teacher_weight.grad is None


def test_under_autocast():
    """fp32 parameters, bf16 products, fp32 gradients of the parameters."""
    sample = make(64, 32, 333, 16, torch.float32)
    want = expected(sample)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = distill_loss(*sample.args())
    loss.backward()
    assert loss.dtype == torch.float32
    assert sample.x.grad.dtype == sample.weight.grad.dtype == torch.float32
    # inputs and D rounded to bf16: logits of deviation 2 are off by 2^-9 of that, times 4 for two models and the spread
    for found, right in zip((sample.x.grad, sample.weight.grad), want[2:], strict=True):
        assert 1e-5 < error(found, right) < 4 * unit_roundoff(torch.bfloat16)


def test_gradients_accumulate_without_a_copy():
    sample = make(37, 24, 101, 16, torch.float64)
    want = expected(sample)
    loss, _ = distill_loss(*sample.args())
    made = [t.data_ptr() for t in loss.grad_fn.made]
    (loss / 4).backward()
    assert [sample.x.grad.data_ptr(), sample.weight.grad.data_ptr()] == made
    (distill_loss(*sample.args())[0] * 0.75).backward()
    assert error(sample.weight.grad, want[3]) < EXACT
    assert error(sample.x.grad, want[2]) < EXACT


def test_a_second_backward_is_refused():
    sample = make(9, 64, 40, 8, torch.float32)
    loss, _ = distill_loss(*sample.args())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
    loss, _ = distill_loss(*sample.args())
    (grad,) = torch.autograd.grad(loss, sample.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


def test_memory_does_not_grow(monkeypatch):
    """Bytes asked for beside gradients and sums, whatever the number of tokens."""
    asked = []
    empty = torch.empty

    def counted(*args, **kwargs):
        t = empty(*args, **kwargs)
        asked.append(t.numel() * t.element_size())
        return t

    monkeypatch.setattr(distill, "SCRATCH", 1 << 20)
    monkeypatch.setattr(distill.torch, "empty", counted)
    seen = {}
    for tokens in (64, 512, 2048):
        sample = make(tokens, 32, 500, 16, torch.bfloat16)
        asked.clear()
        distill_loss(*sample.args())
        lasting = tokens * 32 * 2 + 500 * 32 * 2 + tokens * 4 * 4
        # sums of dx of the segments, freed one after the other, are part of what comes and goes
        seen[tokens] = max(a for a in asked if a not in (tokens * 32 * 2, 500 * 32 * 2, tokens * 4 * 4)) if asked else 0
        assert sum(asked) >= lasting
    assert max(seen.values()) <= 1 << 20


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({"x": torch.randn(9, 63)}, {}, r"student_hidden \(9, 63\) and student_weight \(40, 64\) must be \[T, H\]"),
        ({"x": torch.randn(9, 64).half()}, {}, "student_hidden is torch.float16 but student_weight is torch.float32"),
        ({"x": torch.zeros(9, 64).long()}, {}, "student_hidden must be bfloat16, float16 or float32, not torch.int64"),
        ({"labels": None}, {}, "ce=0.5 needs labels"),
        (
            {"labels": torch.zeros(8).long()},
            {},
            r"labels must be int64 \[9\] like student_hidden, got torch.int64 \(8,\)",
        ),
        ({"labels": torch.zeros(9)}, {}, "labels must be int64"),
        ({"teacher_x": None}, {}, "teacher_hidden and teacher_weight belong together"),
        ({"teacher_x": None, "teacher_weight": None}, {}, "need a teacher"),
        ({"teacher_weight": torch.randn(41, 8)}, {}, r"teacher_weight \(41, 8\) must be \[9, Ht\] and \[40, Ht\]"),
        ({"teacher_x": torch.randn(9, 8).half()}, {}, "teacher_hidden is torch.float16 but teacher_weight is"),
        ({}, {"teacher_logits": torch.randn(9, 40)}, "not both"),
        ({}, {"kl": -1.0}, "kl=-1.0 must not be negative"),
        ({}, {"kl": 0.0, "ce": 0.0}, "all of kl, reverse_kl, jsd and ce are 0"),
        ({}, {"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({}, {"jsd": 1.0, "jsd_beta": 1.0}, "jsd_beta=1.0 must lie between 0 and 1"),
        ({}, {"softcap": 0.0}, "softcap=0.0 must be positive, or None"),
        ({}, {"chunk": 0}, "chunk=0 must be positive"),
        ({"weight": torch.randn(40, 64, device="meta")}, {}, "student_weight is on meta"),
    ],
)
def test_refuses(changes, options, sentence):
    sample = make(9, 64, 40, 8, torch.float32)
    distill_loss(*sample.args())
    with pytest.raises(ValueError, match="distill_loss: .*" + sentence):
        distill_loss(*replace(sample, **changes).args(), **options)


def test_final_teacher_logits_are_not_capped():
    sample = replace(make(9, 64, 40, 8, torch.float32), teacher_x=None, teacher_weight=None)
    with pytest.raises(ValueError, match=r"teacher_softcap=3\.0 is for logits made here"):
        distill_loss(*sample.args(), teacher_logits=torch.randn(9, 40), teacher_softcap=3.0)
    with pytest.raises(ValueError, match=r"teacher_logits must be \[9, 40\], got \(9, 41\)"):
        distill_loss(*sample.args(), teacher_logits=torch.randn(9, 41))


def test_sample_calls_reach_every_argument():
    calls = distill_cases.sample_calls("cpu")["distill_rows"]
    assert (
        {c[1] is None for c in calls} == {c[3] is None for c in calls} == {c[4] is None for c in calls} == {True, False}
    )


def test_aligned_rows():
    assert aligned(torch.empty(9, 48)[:, :45])
    assert aligned(torch.empty(9, 48))
    assert not aligned(torch.empty(9, 45))
    assert not aligned(torch.empty(9, 56)[:, 1:49])
    assert not aligned(torch.empty(48, 9).T)
    assert not aligned(torch.empty(8 * 48 + 45).as_strided((9, 45), (48, 1)))  # its last piece lies outside


# ------------------------------------------------------------------------------------------------ benchmark


def test_table_and_picture():
    meta = {"gpu": "G", "torch": "2", "date": "d", "commit": "c" * 40, "ceilings": {"read_tbps": 1, "bf16_tflops": 2}}
    rows = [
        {"op": "distill memory", "impl": name, "T": t, "H": 4, "V": 8, "beyond_gradients_gib": gib}
        for name, t, gib in (("pyquant", 2048, 0.05), ("pyquant", 8192, 0.5), ("torch-eager", 2048, 9.0))
    ]
    measured = {"us": 12850.0, "peak_extra_gib": 1.09, "rel_err": 0.0018, "rel_err_weight": 0.0021}
    rows.append({"op": "distill kl", "impl": "pyquant", **measured})
    found = {"meta": meta, "rows": rows}
    assert tables.distill(found).splitlines()[-1] == "| KL | **pyquant** | 12.8 | 1.09 | 1.8e-3 | 2.1e-3 |"
    picture = plots.draw_memory(found)
    assert picture.count("<polyline") == 2
    rows[1]["beyond_gradients_gib"] = 1.0
    assert plots.draw_memory(found) != picture


def test_the_picture_is_that_of_the_results():
    folder = Path(plots.RESULTS)
    if not (folder / "distill.json").is_file():
        pytest.skip("no results of the distill family in benchmarks/results/h200")
    found = json.loads((folder / "distill.json").read_text())
    assert plots.draw_memory(found) == (folder / "distill.svg").read_text(), "run python -m benchmarks.plots"


# ------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["fp64", "fp16"])
def test_compiles_to_one_graph(dtype):
    """The whole loss is one op of the graph, forward and backward, with the eager call's results."""
    sample = make(9, 64, 40, 8, dtype)

    def step(x, w):
        loss, parts = distill_loss(x * 1.0, w, sample.labels, sample.teacher_x, sample.teacher_weight, kl=0.2, ce=0.3)
        return loss * 2, parts["kl"]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        loss, kl = function(sample.x, sample.weight)
        results.append((loss, kl, *torch.autograd.grad(loss, (sample.x, sample.weight))))
    for eager, traced in zip(*results, strict=True):
        assert traced.dtype == eager.dtype
        assert error(traced, eager.double()) < (EXACT if dtype == torch.float64 else 1e-3)


def test_opcheck():
    sample = make(9, 16, 40, 8, torch.float32)
    how = (0.3, 0.2, 0.5, 0.7, 0.4, 2.0, 6.0, None, 1.3, -100, 4)
    for wants in ((True, True), (True, False)):
        args = (*sample.args(), None, *wants, *how)
        sample.weight.requires_grad_(wants[1])
        torch.library.opcheck(torch.ops.pyquant.distill_loss.default, args)
