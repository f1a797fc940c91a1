"""Inputs, references, tolerances and planted faults of the ops around the matrix products of a decode step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cases import U32, Want, make_x, unit_roundoff

# ------------------------------------------------------------------------------------------------ norm and activation

# (rows, columns, layout): one row and many, columns of one to four pieces a thread, past them, and not made of pieces.
ROW_CASES = (
    (1, 8, "contiguous"),
    (1, 4096, "contiguous"),
    (3, 1, "contiguous"),
    (7, 1000, "rows"),
    (5, 1024, "contiguous"),
    (2, 5120, "transposed"),
    (9, 264, "columns"),
    (33, 127, "contiguous"),
    (4, 14336, "contiguous"),
    (2, 16392, "contiguous"),
    (2, 20000, "rows"),
    (300, 512, "contiguous"),
)


def want_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Want:
    """``x * rsqrt(mean(x^2) + eps) * weight`` by a kernel that computes in fp32 and rounds to dtype once.

    It errs by the last rounding, u |y|; by the sum of K squares, all positive, so at most about sqrt(K) of the roundings
    u32 of its K additions add up (4 deviations are allowed); and by some ten roundings of the rest.
    """
    wide = x.double()
    value = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    relative = unit_roundoff(dtype) + (10 + 4 * x.shape[-1] ** 0.5) * U32
    return Want(value, relative * value.abs() + torch.finfo(dtype).tiny, relative)


def want_silu(gate_up: Tensor, dtype: torch.dtype) -> Want:
    """``silu(gate) * up``: the last rounding, and a fast exponential that is off by 2 + 1.2 |gate| units in the last place."""
    gate, up = gate_up.double().chunk(2, -1)
    value = gate / (1 + (-gate).exp()) * up
    relative = unit_roundoff(dtype) + (10 + 2 * gate.abs()) * 2 * U32
    return Want(value, relative * value.abs() + torch.finfo(dtype).tiny, float(relative.max()))


# ------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True)
class AttentionCase:
    """One step over a cache; slots and starts are repeated over the batch."""

    batch: int
    heads: int
    kv_heads: int
    size: int
    capacity: int
    slots: tuple[int, ...]
    starts: tuple[int, ...] = (0,)
    window: int = 0
    norms: bool = False
    layout: str = "contiguous"  # of qkv, and "rows" also stores the cache as [B, S, Hkv, D]

    def __str__(self) -> str:
        text = f"b{self.batch}-h{self.heads}/{self.kv_heads}-d{self.size}-s{self.capacity}-at{self.slots[0]}"
        return text + ("-norms" if self.norms else "") + (f"-w{self.window}" if self.window else "")


ATTENTION_CASES = (
    AttentionCase(1, 4, 1, 64, 16, (0,)),
    AttentionCase(2, 8, 2, 64, 40, (15, 16), (0, 9)),
    AttentionCase(2, 4, 2, 80, 100, (64, 99), (3, 98), layout="rows"),
    AttentionCase(3, 12, 4, 96, 333, (300, 31, 332), (0, 5, 100), norms=True),
    AttentionCase(1, 32, 8, 128, 1024, (700,)),
    AttentionCase(1, 32, 8, 128, 1000, (520,), (17,), layout="rows", norms=True),
    AttentionCase(2, 16, 1, 256, 200, (150, 199), (0, 33)),
    AttentionCase(2, 8, 2, 256, 130, (127, 128), norms=True),
    AttentionCase(2, 9, 1, 128, 70, (47, 48), (1, 2)),
    AttentionCase(2, 4, 4, 128, 300, (255, 290), (0, 3), window=20),
    AttentionCase(5, 6, 2, 64, 500, (499, 1, 17, 250, 333), (2, 0, 16, 100, 1), window=130),
    AttentionCase(40, 8, 8, 128, 700, (640, 100, 699)),
)
ODD_HEADS = AttentionCase(2, 6, 2, 48, 50, (20, 33), (0, 4), norms=True)  # runs in torch everywhere


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of attention_decode in the open."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slot: Tensor
    start: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    scaling: float
    window: int

    def arguments(self, early: bool = False) -> tuple:
        """For the op, over copies of the cache (with their strides)."""
        k_cache, v_cache = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
                            for t in (self.k_cache, self.v_cache))  # fmt: skip
        return (
            self.qkv, self.cos, self.sin, k_cache, v_cache, self.slot, self.start, self.q_norm, self.k_norm, self.eps,
            self.scaling, self.window, early,
        )  # fmt: skip


def make_attention(case: AttentionCase, dtype: torch.dtype, device: str) -> AttentionInputs:
    """Random heads and a cache that is NaN wherever it must not be read."""
    width = (case.heads + 2 * case.kv_heads) * case.size
    qkv = make_x(case.batch, width, case.layout, dtype, device)
    angles = torch.rand(case.capacity, case.size // 2, device=device) * 6.28
    shape = (case.batch, case.kv_heads, case.capacity, case.size)
    caches = []
    slot = torch.tensor([case.slots[i % len(case.slots)] for i in range(case.batch)], dtype=torch.int32, device=device)
    start = torch.tensor([case.starts[i % len(case.starts)] for i in range(case.batch)], dtype=torch.int32).to(device)
    for _ in range(2):
        cache = torch.randn(shape, device=device).to(dtype)
        for b in range(case.batch):
            cache[b, :, : int(start[b])] = float("nan")
            cache[b, :, int(slot[b]) :] = float("nan")
        if case.layout == "rows":
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        caches.append(cache)
    norms = [(1 + 0.3 * torch.randn(case.size, device=device)).to(dtype) if case.norms else None for _ in range(2)]
    cos, sin = angles.cos().contiguous(), angles.sin().contiguous()
    return AttentionInputs(qkv, cos, sin, *caches, slot, start, *norms, 1e-5, case.size**-0.5, case.window)


def rotated_heads(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[B, Hq, D]``, k and v ``[B, Hkv, D]`` of the new token in fp64, one head after another."""
    kv_heads, size = inputs.k_cache.shape[1], inputs.k_cache.shape[3]
    heads = inputs.qkv.double().reshape(inputs.qkv.shape[0], -1, size)
    out = torch.empty_like(heads)
    first_k = heads.shape[1] - 2 * kv_heads
    for b in range(heads.shape[0]):
        position = int(inputs.slot[b] - inputs.start[b])
        cos, sin = inputs.cos[position].double(), inputs.sin[position].double()
        for h in range(heads.shape[1]):
            x = heads[b, h]
            if h < first_k + kv_heads:
                if inputs.q_norm is not None:
                    weight = inputs.q_norm if h < first_k else inputs.k_norm
                    x = x / (x.square().mean() + inputs.eps).sqrt() * weight.double()
                low, high = x[: size // 2], x[size // 2 :]
                x = torch.cat([low * cos - high * sin, low * sin + high * cos])
            out[b, h] = x
    return out[:, :first_k], out[:, first_k : first_k + kv_heads], out[:, first_k + kv_heads :]


def want_attention(inputs: AttentionInputs, dtype: torch.dtype) -> Want:
    """Attention of the new token in fp64, by a kernel with 16-bit tensor core products.

    With u the unit roundoff of dtype, a right kernel errs by

    * the last rounding: u |out|;
    * q and the new k, rounded to dtype before they are multiplied: D independent errors of deviation u / sqrt(3) times
      |q k| each (both factors: sqrt(2)), so six deviations of a score are ds = 6 sqrt(2/3) u scale l2 with
      l2 = sqrt(sum q^2 k^2), and a score off by ds moves the result by at most ds sum(p |v - out|);
    * the probabilities, rounded to dtype before the second product: u sum(p |v|);
    * fp32 sums and exponentials: about 50 roundings u32 of sum(p |v|) and sqrt(S) more.
    """
    q, k_new, v_new = rotated_heads(inputs)
    batch, heads, _ = q.shape
    group = heads // k_new.shape[1]
    u = unit_roundoff(dtype)
    value, worst = torch.empty_like(q), torch.empty_like(q)
    steepest = 0.0
    for b in range(batch):
        slot, first = int(inputs.slot[b]), int(inputs.start[b])
        if inputs.window:
            first = max(first, slot - inputs.window + 1)
        for h in range(heads):
            kv = h // group
            k = torch.cat([inputs.k_cache[b, kv, first:slot].double(), k_new[b, kv][None]])
            v = torch.cat([inputs.v_cache[b, kv, first:slot].double(), v_new[b, kv][None]])
            p = (k @ q[b, h] * inputs.scaling).softmax(0)
            out = p @ v
            ds = float(6 * (2 / 3) ** 0.5 * u * inputs.scaling * (k * q[b, h]).norm(dim=1).max())
            spread, size_of = p @ (v - out).abs(), p @ v.abs()
            value[b, h] = out
            worst[b, h] = u * out.abs() + ds * spread + (u + (50 + len(p) ** 0.5) * U32) * size_of
            steepest = max(steepest, ds)
    # RMS: roundings at their deviation, u / sqrt(3); ds at one of its six. For random v, sum(p |v|) exceeds |out| by at
    # most sqrt(S), but independent errors of the S terms shrink by as much.
    rms = u + 2 * (u + steepest / 6) + (20 + inputs.k_cache.shape[2] ** 0.5) * U32
    return Want(value.reshape(batch, -1), worst.reshape(batch, -1) + torch.finfo(dtype).tiny, rms)


def _forget_the_newest(inputs: AttentionInputs) -> AttentionInputs:
    """The new token's value is taken for its neighbour's."""
    kv = inputs.k_cache.shape[1] * inputs.k_cache.shape[3]
    qkv = inputs.qkv.clone()
    qkv[:, -kv:] = inputs.qkv[:, -kv:].roll(1, -1)
    return replace(inputs, qkv=qkv)


def _rotate_backwards(inputs: AttentionInputs) -> AttentionInputs:
    return replace(inputs, sin=-inputs.sin)


def _one_position_off(inputs: AttentionInputs) -> AttentionInputs:
    return replace(inputs, cos=inputs.cos.roll(1, 0), sin=inputs.sin.roll(1, 0))


def _swap_kv_heads(inputs: AttentionInputs) -> AttentionInputs:
    return replace(inputs, v_cache=inputs.v_cache.flip(1))


def _swap_slots(inputs: AttentionInputs) -> AttentionInputs:
    """Values of neighbouring slots exchanged, as if a fragment were read the wrong way round."""
    slots = inputs.v_cache.shape[2]
    order = torch.arange(slots, device=inputs.v_cache.device) ^ 1
    moved = inputs.v_cache[:, :, torch.where(order < slots, order, order - 1)]
    return replace(inputs, v_cache=torch.where(moved.isnan(), inputs.v_cache, moved))


ATTENTION_FAULTS: dict[str, Callable[[AttentionInputs], AttentionInputs]] = {
    "newest value shifted": _forget_the_newest,
    "rotated backwards": _rotate_backwards,
    "one position off": _one_position_off,
    "KV heads swapped": _swap_kv_heads,
    "slots swapped": _swap_slots,
}


# ------------------------------------------------------------------------------------------------ the end of a step


def make_ends(batch: int, width: int, device: str) -> tuple[Tensor, ...]:
    """tokens, ids, slot, unfinished, length of sequences of which every third has ended."""
    at = torch.arange(batch, device=device)
    tokens = -torch.ones(batch, width, dtype=torch.int64, device=device)
    return tokens, torch.zeros_like(at), (at % (width - 1)).int(), (at % 3 != 2).long(), at * 10


def want_greedy(logits: Tensor, ends: tuple[Tensor, ...], eos: list[int] | None, pad: int) -> tuple[Tensor, ...]:
    """The same, a row at a time, in Python's integers."""
    tokens, ids, slot, unfinished, length = (t.tolist() for t in ends)
    for b, row in enumerate(logits.double().tolist()):
        chosen = row.index(max(row))
        if eos is not None and not unfinished[b]:
            chosen = pad
        length[b] += unfinished[b]
        if eos is not None and chosen in eos:
            unfinished[b] = 0
        slot[b] += 1
        tokens[b][slot[b]] = ids[b] = chosen
    return tuple(torch.tensor(t) for t in (tokens, ids, slot, unfinished, length))


# ------------------------------------------------------------------------------------------------ arguments for opcheck


def sample_calls(device: str) -> dict[str, list[tuple]]:
    """Argument tuples for each op of this file; none of them asks for a gradient, as there is none."""
    x, residual = torch.randn(3, 40, device=device).half(), torch.randn(5, 40, 3, device=device).half()
    weight = torch.randn(40, device=device).half()
    wide = residual.transpose(1, 2)
    case = AttentionCase(2, 4, 2, 64, 40, (15, 16), (0, 9))
    calls: dict[str, list[tuple]] = {
        "rms_norm": [(x, weight, 1e-6), (wide, weight, 1e-6), (wide.float(), weight.float(), 1e-6)],
        "add_rms_norm": [(x, x.flip(0), weight, 1e-6), (wide, wide.contiguous(), weight, 1e-6)],
        "silu_and_mul": [(x,), (wide,)],
        "rope_append": [],
        "attention_decode": [],
        "greedy_append": [],
    }
    for eos in (None, torch.tensor([3, 5], device=device)):
        calls["greedy_append"].append((torch.randn(3, 50, device=device).half(), *make_ends(3, 9, device), eos, 7))
    for norms in (False, True):
        inputs = make_attention(replace(case, norms=norms, layout="rows" if norms else "contiguous"),
                                torch.float16, device)  # fmt: skip
        arguments = inputs.arguments()
        calls["attention_decode"].append(arguments)
        prompt = make_x(2 * 3, inputs.qkv.shape[1], "contiguous", torch.float16, device).view(2, 3, -1)
        calls["rope_append"].append((prompt, *inputs.arguments()[1:10]))
    return calls
