"""Inputs, references, tolerances and planted faults for each op.

References are made from codes in fp64, never by another kernel. Every comparison looks at the RMS ratio and at the
worst element, and each tolerance is derived where it is defined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyquant.formats import int4
from pyquant.formats.spec import num_groups

U32 = 2.0**-24  # unit roundoff of fp32


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest: 2^-8 for bf16, 2^-11 for fp16, 2^-24 for fp32."""
    return torch.finfo(dtype).eps / 2


# ------------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Weight:
    """A 4-bit weight in the open: codes ``[N, K]``, scale and zero row-major ``[N, ceil(K/G)]``."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    @property
    def steps(self) -> Tensor:
        """codes - zero in fp64."""
        k = self.shape[1]
        zero = 8.0 if self.zero is None else int4.expand_groups(self.zero.double(), k, self.group_size)
        return self.codes.double() - zero

    @property
    def w_hat(self) -> Tensor:
        """The weight in fp64."""
        return self.steps * int4.expand_groups(self.scale.double(), self.shape[1], self.group_size)

    def tiled(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(qweight, scale, zero) as the ops take them."""
        k = self.shape[1]
        zero = None if self.zero is None else int4.tile_scale(self.zero, k, self.group_size)
        return int4.tile_codes(self.codes), int4.tile_scale(self.scale, k, self.group_size), zero


def make_scale(n: int, groups: int, dtype: torch.dtype, device: str) -> Tensor:
    """A scale of its own for each (row, group), between 2^-8 and 2^2."""
    return torch.exp2(torch.rand(n, groups, device=device) * 10 - 8).to(dtype)


def make_weight(n: int, k: int, group_size: int, symmetric: bool, dtype: torch.dtype, device: str) -> Weight:
    """Random codes 0..15, scales from 2^-8 to 2^2, zeros 0..15 that are never 8."""
    groups = num_groups(k, group_size)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    zero = None
    if not symmetric:
        zero = torch.randint(0, 15, (n, groups), dtype=torch.uint8, device=device)
        zero = zero + (zero >= 8).to(torch.uint8)
    return Weight(codes, make_scale(n, groups, dtype, device), zero, group_size)


# ------------------------------------------------------------------------------------------------ planted faults


def swap_nibbles(weight: Weight) -> Weight:
    """Columns 2i and 2i + 1 exchanged, as if the halves of each packed register were read the wrong way round."""
    k = weight.shape[1]
    order = torch.arange(k, device=weight.codes.device) ^ 1
    return replace(weight, codes=weight.codes[:, torch.where(order < k, order, order - 1)])


def shift_scales(weight: Weight) -> Weight:
    """Every group takes the scale of its neighbour (with one group, every row that of the row above)."""
    return replace(weight, scale=weight.scale.roll(1, dims=1 if weight.scale.shape[1] > 1 else 0))


def wrong_code(weight: Weight) -> Weight:
    """One code 8 steps off, where the scale is largest."""
    row, group = divmod(int(weight.scale.argmax()), weight.scale.shape[1])
    codes = weight.codes.clone()
    codes[row, group * max(weight.group_size, 0)] ^= 8
    return replace(weight, codes=codes)


WEIGHT_FAULTS: dict[str, Callable[[Weight], Weight]] = {
    "swapped nibbles": swap_nibbles,
    "shifted scales": shift_scales,
    "wrong code": wrong_code,
}


def one_wrong_element(result: Tensor) -> Tensor:
    """The element of median size replaced by its mirror image (by 1 where it is 0)."""
    bad = result.clone().reshape(-1)
    middle = int(bad.double().abs().argsort()[bad.numel() // 2])
    bad[middle] = torch.where(bad[middle] == 0, torch.ones_like(bad[middle]), -bad[middle])
    return bad.view(result.shape)


def one_unwritten_element(result: Tensor) -> Tensor:
    """The last element left as poisoned memory."""
    bad = result.clone()
    bad.view(-1)[-1] = float("nan")
    return bad


RESULT_FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one wrong element": one_wrong_element,
    "one unwritten element": one_unwritten_element,
}


# ------------------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Want:
    """A reference in fp64 and how far from it a right result may be."""

    value: Tensor
    worst: Tensor  # for each element
    rms: float  # |result - value| / |value| over all elements


def mismatch(got: Tensor, want: Want) -> str | None:
    """Why got is not want, or None."""
    if got.shape != want.value.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(want.value.shape)}"
    if got.numel() == 0:
        return None
    error = (got.double() - want.value).abs()
    bad = ~(error <= want.worst)  # written so that NaN is bad
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        return (
            f"{int(bad.sum())} of {got.numel()} elements are off, first at {where}: got {got[where].item():.6g}, "
            f"want {want.value[where].item():.6g} +- {want.worst[where].item():.2g}"
        )
    ratio = float(error.norm() / want.value.norm().clamp_min(1e-300))
    return None if ratio <= want.rms else f"RMS ratio {ratio:.3g} exceeds {want.rms:.3g}"


# ------------------------------------------------------------------------------------------------ linear


@dataclass(frozen=True)
class LinearCase:
    """One call of linear_w4a16."""

    m: int
    n: int
    k: int
    group_size: int
    symmetric: bool = True
    bias: bool = False
    layout: str = "contiguous"  # of x: contiguous, rows (padded rows), columns (every other column), transposed

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "zero"
        return f"{self.m}x{self.n}x{self.k}-g{self.group_size}-{kind}{'-bias' if self.bias else ''}-{self.layout}"


# Tiles are 64 or 128 features, 16, 32, 64 or 128 tokens, steps of 32, 64 or 128 columns: edges and their neighbours.
LINEAR_CASES = (
    LinearCase(1, 64, 64, 64),
    LinearCase(1, 1, 1, -1, symmetric=False, bias=True),
    LinearCase(2, 63, 127, 32, symmetric=False),
    LinearCase(3, 65, 129, 64, bias=True),
    LinearCase(1, 130, 1000, 128, symmetric=False, bias=True),
    LinearCase(7, 200, 1056, 32, symmetric=False, layout="rows"),
    LinearCase(8, 128, 512, 128, bias=True),
    LinearCase(9, 192, 1023, 128, symmetric=False, layout="columns"),
    LinearCase(15, 70, 1025, -1, symmetric=False, bias=True),
    LinearCase(16, 256, 640, 64, symmetric=False, layout="transposed"),
    LinearCase(17, 129, 65, 32, bias=True),
    LinearCase(31, 64, 333, 128, symmetric=False),
    LinearCase(33, 191, 704, 64, symmetric=False, bias=True, layout="rows"),
    LinearCase(63, 65, 192, 128),
    LinearCase(64, 127, 320, 32, symmetric=False, bias=True),
    LinearCase(65, 200, 384, 128, symmetric=False, bias=True),
    LinearCase(100, 129, 511, 64, symmetric=False, bias=True, layout="transposed"),
    LinearCase(129, 257, 577, 32, symmetric=False),
    LinearCase(130, 96, 1100, -1, bias=True, layout="columns"),
)
LARGE_LINEAR_CASES = (
    LinearCase(1, 4096, 4096, 128, symmetric=False),
    LinearCase(3, 1536, 8960, -1, bias=True),
    LinearCase(16, 2048, 4096 + 32, 32, symmetric=False, bias=True),
    LinearCase(48, 4096, 2048, 64),
    LinearCase(1000, 1024, 2048, 128, symmetric=False, bias=True),
    LinearCase(257, 1000, 4000, 64, symmetric=False),
)


def make_x(rows: int, columns: int, layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """Random ``[rows, columns]``, stored as layout says; what lies between its elements is NaN."""
    values = torch.randn(rows, columns, device=device).to(dtype)
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return values.T.contiguous().T
    stored = torch.full((rows, 2 * columns + 3), float("nan"), dtype=dtype, device=device)
    x = stored[:, :columns] if layout == "rows" else stored[:, 1 : 2 * columns : 2]
    return x.copy_(values)


def want_product(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    rounded_weight: bool,
    fixed_point_x: bool = False,
    by_cublas: bool = False,
) -> Want:
    """``x @ w.T + bias`` for x ``[M, K]`` and w ``[N, K]`` in fp64, computed by a kernel that returns dtype.

    A right kernel errs by

    * the last rounding: u |y| with u the unit roundoff of dtype;
    * fp32 sums: each of K additions is off by at most 2^-23 of a partial sum (tensor cores truncate), and a partial sum
      of K random terms stays below about 4 l2, where l2 = sqrt(sum x^2 w^2); sums in fewer, longer steps err less;
    * a weight rounded to 16 bits, where the kernel does that: K independent errors of at most u |x w|, of deviation
      u / sqrt(3) |x w|, so six deviations of their sum are 6 u / sqrt(3) l2;
    * parts of a split K added in 16 bits, which torch by default allows cuBLAS to do: one more rounding of a partial sum,
      at most u * 4 l2;
    * x in fixed point, where the kernel does that: steps of at most 2^-14 of the largest of 128 neighbours, so K
      independent errors of deviation step / sqrt(12) |w|, and six deviations of their sum.
    """
    x, w, k = x.double(), w.double(), x.shape[1]
    steps = torch.nn.functional.pad(x.abs(), (0, -k % 128)).unflatten(1, (-1, 128)).amax(2) * 2.0**-14
    fixed = (
        (steps.square().repeat_interleave(128, 1)[:, :k] / 12 @ w.square().T).sqrt() if fixed_point_x else 0 * x[:, :1]
    )
    value = x @ w.T
    l2 = (x.square() @ w.square().T).sqrt()
    if bias is not None:
        value = value + bias.double()
    u = unit_roundoff(dtype)
    sums = 2 * U32 * k * 4 * (l2 if bias is None else l2 + bias.double().abs())
    worst = u * value.abs() + sums + ((6 / 3**0.5 * rounded_weight + 4 * by_cublas) * u) * l2 + 6 * fixed
    # RMS: every term at its deviation instead of its extreme; roundings are at most u of what they round, and
    # |y| and l2 are equal in the mean over random inputs (3: a row with few columns may be far from the mean).
    rms = u + 2 * U32 * k**0.5 + (3 * u if rounded_weight else 0)
    rms += 2 * float((fixed + 0 * value).norm() / value.norm().clamp_min(1e-300))
    return Want(value, worst + torch.finfo(dtype).tiny, rms)


# ------------------------------------------------------------------------------------------------ fake_quant


@dataclass(frozen=True)
class FakeQuantCase:
    """One call of fake_quant, or of quantize_int4 where bits <= 4."""

    n: int
    k: int
    group_size: int
    bits: int = 4
    symmetric: bool = True
    layout: str = "contiguous"

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "zero"
        return f"{self.n}x{self.k}-g{self.group_size}-b{self.bits}-{kind}-{self.layout}"


FAKE_QUANT_CASES = (
    FakeQuantCase(64, 128, 64),
    FakeQuantCase(1, 1, 1, symmetric=False),
    FakeQuantCase(65, 100, 32, symmetric=False),
    FakeQuantCase(7, 127, -1, bits=3, layout="rows"),
    FakeQuantCase(5, 2500, -1, symmetric=False),
    FakeQuantCase(3, 4100, -1, bits=2, layout="transposed"),
    FakeQuantCase(63, 257, 128, bits=2, symmetric=False, layout="columns"),
    FakeQuantCase(130, 65, 7, bits=4, symmetric=False, layout="transposed"),
    FakeQuantCase(9, 33, 1, bits=8),
    FakeQuantCase(12, 50, 1000, bits=8, symmetric=False),
    FakeQuantCase(33, 640, 96, bits=5, symmetric=False, layout="rows"),
    FakeQuantCase(129, 384, 128, bits=4),
)


def make_fake_quant(
    case: FakeQuantCase, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(w, scale fp32, zero fp32 or None, grad): weights beyond the codes at both ends, zeros with fractions."""
    groups = num_groups(case.k, case.group_size)
    levels = 1 << case.bits
    scale = make_scale(case.n, groups, torch.float32, device)
    zero = None
    middle = torch.zeros(case.n, groups, device=device)
    if not case.symmetric:
        zero = torch.rand(case.n, groups, device=device) * (levels + 1) - 1  # some below 0, some above the highest code
        middle = levels / 2 - zero
    shape = make_x(case.n, case.k, case.layout, dtype, device)
    v = torch.randn(case.n, case.k, device=device) * levels / 3
    v = v + int4.expand_groups(middle, case.k, case.group_size)
    s = int4.expand_groups(scale, case.k, case.group_size)
    w = shape.copy_(v * s)
    # Off the knife's edge: where fp32 and fp64 may disagree on the nearest code or on what is clamped, gradients jump.
    v = w.double() / s
    w = w.copy_(torch.where((2 * v - (2 * v).round()).abs() < 1e-4, (0.3 * s).to(dtype), w))
    return w, scale, zero, make_x(case.n, case.k, case.layout, dtype, device)


def division_boundaries(device: str) -> tuple[Tensor, Tensor]:
    """(w, scale): quotients on the boundaries between codes and one ulp beside them: only IEEE division gets all right."""
    scale = torch.exp2(torch.rand(256, 1, device=device) * 10 - 8)
    boundary = torch.arange(-7, 7, device=device) + 0.5
    w = (boundary.double() * scale.double()).float()
    far = torch.tensor(9e9, device=device)
    return torch.cat([w, w.nextafter(far), w.nextafter(-far)], 1), scale


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Lowest and highest code."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)


def fake_quant_formula(w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> Tensor:
    """fake_quant in fp64 whose autograd gradients are the straight-through ones.

    Clamp first, then round with a gradient of one: equal to round, then clamp, as the ends of the range are integers.
    With a zero the value is taken from round(v) + zero, as ties go to even there and an odd zero moves them. The
    quotient w / scale is taken in fp32 when w and scale are 32 bits or narrower, as the op does, so that values next to
    a rounding boundary fall on the same side.
    """
    k = w.shape[1]
    s = int4.expand_groups(scale.double(), k, group_size)
    v = w.double() / s
    if torch.float64 not in (w.dtype, scale.dtype):
        v = v + ((w.float() / int4.expand_groups(scale.float(), k, group_size)).double() - v).detach()
    low, high = code_range(bits, zero is None)
    if zero is None:
        return _round(v.clamp(low, high)) * s
    z = zero.double()
    z = z + (z.round().clamp(low, high) - z).detach()
    z = int4.expand_groups(z, k, group_size)
    smooth = _round((v + z).clamp(low, high))
    return (smooth + ((v.round() + z).clamp(low, high) - smooth).detach() - z) * s


def _round(v: Tensor) -> Tensor:
    return v + (v.round() - v).detach()


def want_group_sums(terms: Tensor, group_size: int, factor: float, dtype: torch.dtype) -> Want:
    """``factor`` times the sum of fp64 terms ``[N, K]`` over each group, by a kernel that adds in fp32.

    A right kernel errs by a few roundings of each term (the subtraction, the product, the factor: 4 u), by the
    additions (in any order at most u of a partial sum; of K random ones about sqrt(K) add up, and 4 deviations are
    allowed) and by the last rounding.
    """
    sums = _sum_groups(terms, group_size) * factor
    magnitude = _sum_groups(terms.abs(), group_size) * abs(factor)
    length = terms.shape[1] if group_size == -1 else min(group_size, terms.shape[1])
    relative = (4 + 4 * length**0.5) * U32
    worst = unit_roundoff(dtype) * sums.abs() + relative * magnitude + torch.finfo(dtype).tiny
    rms = unit_roundoff(dtype) + relative * float(magnitude.norm() / sums.norm().clamp_min(1e-300))
    return Want(sums, worst, rms)


def _sum_groups(terms: Tensor, group_size: int) -> Tensor:
    columns = [terms] if group_size == -1 else terms.split(group_size, dim=1)
    return torch.stack([part.sum(1) for part in columns], dim=1)


# ------------------------------------------------------------------------------------------------ arguments for opcheck


def sample_calls(device: str) -> dict[str, list[tuple]]:
    """For each op of the table, argument tuples that its checks accept; what can have a gradient asks for one."""

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().requires_grad_()

    calls: dict[str, list[tuple]] = {
        name: []
        for name in (
            "quantize_int4",
            "dequantize_int4",
            "linear_w4a16",
            "linear_w4a16_backward",
            "fake_quant",
            "fake_quant_backward",
        )
    }
    for symmetric in (True, False):
        weight = make_weight(70, 100, 32, symmetric, torch.float16, device)
        qweight, scale, zero = weight.tiled()
        x, grad_y = torch.randn(5, 100, device=device).half(), torch.randn(5, 70, device=device).half()
        bias = torch.randn(70, device=device).half()
        case = FakeQuantCase(6, 40, 16, symmetric=symmetric)
        w, s, z, grad = make_fake_quant(case, torch.float32, device)
        calls["quantize_int4"].append((w, s, z if z is None else z.round().clamp(0, 15), 16, 4))
        calls["dequantize_int4"].append((qweight, leaf(scale), zero, 70, 100, 32, torch.float32))
        calls["linear_w4a16"].append((leaf(x), qweight, scale, zero, leaf(bias), 70, 32))
        calls["linear_w4a16_backward"].append((grad_y, qweight, scale, zero, 100, 32))
        calls["fake_quant"].append((leaf(w), leaf(s), leaf(z), 16, 4, 0.5))
        calls["fake_quant_backward"].append((grad, w, s, z, 16, 4, 0.5))
        soft = "sigmoid-b" if symmetric else "sigmoid-a", "sigmoid", torch.tensor(4.0, device=device), 10.0, symmetric
        calls["fake_quant"].append((leaf(w), leaf(s), leaf(z), 16, 4, 0.5, *soft))
        calls["fake_quant_backward"].append((grad, w, s, z, 16, 4, 0.5, *soft))
        # strides: results are contiguous whatever the arguments are
        across = torch.randn(40, 6, device=device).T
        calls["quantize_int4"].append((across, s, None, 16, 4))
        calls["fake_quant"].append((leaf(across), leaf(s), leaf(z), 16, 4, 1.0))
        calls["fake_quant_backward"].append((across, across, s, z, 16, 4, 1.0))
        wide = torch.randn(2, 100, 5, device=device).half().transpose(1, 2)
        calls["linear_w4a16"].append((leaf(wide), qweight, scale, zero, None, 70, 32))
        calls["linear_w4a16_backward"].append((wide[..., :70], qweight, scale, zero, 100, 32))
    import act8_cases  # here, as they import this file
    import decode_cases
    import distill_cases
    import kv4_cases

    return {
        **calls,
        **act8_cases.sample_calls(device),
        **decode_cases.sample_calls(device),
        **distill_cases.sample_calls(device),
        **kv4_cases.sample_calls(device),
    }
