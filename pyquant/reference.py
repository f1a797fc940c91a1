"""Every op in plain torch: what the kernels must compute, and the backend for the CPU.

Same names and argument order as :mod:`pyquant.ops`; arithmetic in fp32 (fp64 inputs stay fp64); no checks, no cleverness.
Notation in :mod:`pyquant.formats`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyquant.formats import int4
from pyquant.formats.spec import num_groups

_FAR = 65536.0  # steps beyond which every clamp is constant; an infinite quotient would turn a slope of 0 into NaN


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def quantize_int4(w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int) -> Tensor:
    """``qweight`` of w: ``clamp(round(w / scale) + zero)``, in tiled order. scale and zero are row-major ``[N, ceil(K/G)]``."""
    k = w.shape[1]
    steps = torch.round(_wide(w) / int4.expand_groups(_wide(scale), k, group_size))
    if zero is None:
        half = 1 << (bits - 1)
        codes = steps.clamp(-half, half - 1) + int4.SYMMETRIC_ZERO
    else:
        codes = (steps + int4.expand_groups(_wide(zero), k, group_size)).clamp(0, (1 << bits) - 1)
    return int4.tile_codes(codes.to(torch.uint8))


def dequantize_int4(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``w_hat [n, k]`` of a tiled weight; scale and zero in tiled order. The product is fp32, rounded once to dtype."""
    codes = int4.untile_codes(qweight, n, k)
    s = int4.expand_groups(_wide(int4.untile_scale(scale, n, k, group_size)), k, group_size)
    if zero is None:
        steps = codes.to(s.dtype) - int4.SYMMETRIC_ZERO
    else:
        steps = codes.to(s.dtype) - int4.expand_groups(int4.untile_scale(zero, n, k, group_size), k, group_size)
    return (steps * s).to(dtype or scale.dtype)


def linear_w4a16(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, group_size: int
) -> Tensor:
    """``y = x @ w_hat.T + bias`` with ``x [..., K]``; w_hat in fp32, never rounded to 16 bits; y in x's dtype."""
    w_hat = dequantize_int4(qweight, scale, zero, n, x.shape[-1], group_size, _wide(scale).dtype)
    y = _wide(x) @ w_hat.T
    if bias is not None:
        y = y + _wide(bias)
    return y.to(x.dtype)


def linear_w4a16_backward(
    grad_y: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, k: int, group_size: int
) -> Tensor:
    """``grad_x = grad_y @ w_hat`` with ``grad_y [..., N]``. The weight is frozen: it has no gradient."""
    w_hat = dequantize_int4(qweight, scale, zero, grad_y.shape[-1], k, group_size, _wide(scale).dtype)
    return (_wide(grad_y) @ w_hat).to(grad_y.dtype)


def _fake_quant_parts(
    w: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(v = w / scale, q - zero, inside the clamp?, scale), each ``[N, K]``."""
    k = w.shape[1]
    s = int4.expand_groups(_wide(scale), k, group_size)
    v = _wide(w) / s
    if zero is None:
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        return v, torch.round(v).clamp(low, high), (v >= low) & (v <= high), s
    high = (1 << bits) - 1
    z = int4.expand_groups(torch.round(_wide(zero)).clamp(0, high), k, group_size)
    return v, (torch.round(v) + z).clamp(0, high) - z, (v + z >= 0) & (v + z <= high), s


def fake_quant(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    grad_scale: float = 1.0,
    rounding: str = "ste",
    clamp: str = "hard",
    temperature: Tensor | None = None,
    beta: float = 10.0,
    soft_forward: bool = False,
) -> Tensor:
    """Quantize and dequantize at once: ``(clamp(round(w / scale) + zero) - zero) * scale`` in w's dtype.

    ``zero`` is a float ``[N, ceil(K/G)]`` that is rounded and clamped to the codes here, so that a learned zero trains at the
    integer it will be stored as. With ``soft_forward`` the value is ``(f(c(w / scale + zero)) - zero) * scale`` instead, f
    being :func:`soft_round` and c :func:`soft_clamp`. ``grad_scale`` only matters to the gradient, and without
    ``soft_forward`` so do the arguments behind it.
    """
    v, steps, _, s = _fake_quant_parts(w, scale, zero, group_size, bits)
    if soft_forward and (rounding, clamp) != ("ste", "hard"):
        steps, _ = _soft_parts(v, zero, group_size, bits, rounding, clamp, temperature, beta)
    return (steps * s).to(w.dtype)


def fake_quant_backward(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    grad_scale: float,
    rounding: str = "ste",
    clamp: str = "hard",
    temperature: Tensor | None = None,
    beta: float = 10.0,
    soft_forward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (w, scale, zero) of :func:`fake_quant`; dzero is empty without a zero.

    With v = w / scale, x = v + zero, ``h' = f'(c(x)) c'(x)`` the slope of :func:`soft_round` over :func:`soft_clamp`, and u the
    forward's value in steps (``q - zero``, or ``f(c(x)) - zero`` with ``soft_forward``)::

        dw     = grad h'
        dscale = sum_group grad (u - v h')              times grad_scale
        dzero  = sum_group grad scale (h' - 1)          times grad_scale

    With rounding "ste" and clamp "hard", h' is 1 where x lies within the codes and 0 outside, and these are LSQ's gradients
    (Esser et al., "Learned Step Size Quantization", 1902.08153; with a zero LSQ+, Bhalgat et al., 2004.09576).
    """
    v, value, inside, s = _fake_quant_parts(w, scale, zero, group_size, bits)
    g = _wide(grad)
    if (rounding, clamp) == ("ste", "hard"):
        dw = torch.where(inside, g, 0.0)
        dscale = g * torch.where(inside, value - v, value)
        dzero = torch.where(inside, 0.0, -g * s)
    else:
        soft, slope = _soft_parts(v, zero, group_size, bits, rounding, clamp, temperature, beta)
        if clamp == "hard":
            slope = torch.where(inside, slope, 0.0)
        dw = g * slope
        v = v.clamp(-_FAR, _FAR)
        dscale = g * ((soft if soft_forward else value) - v * slope)
        dzero = g * s * (slope - 1)
    dscale = (grad_scale * sum_groups(dscale, group_size)).to(scale.dtype)
    if zero is None:
        return dw.to(w.dtype), dscale, scale.new_empty(0)
    return dw.to(w.dtype), dscale, (grad_scale * sum_groups(dzero, group_size)).to(zero.dtype)


def soft_clamp(x: Tensor, low: float, high: float, clamp: str, beta: float) -> tuple[Tensor, Tensor]:
    """(c, c') of a clamp of x to ``low .. high``, after SoftClamp of 2410.10849::

        c(x)  = x g(x - low) g(high - x) + low g(low - x) + high g(x - high)
        c'(x) = g(x - low) g(high - x) + g'(x - low) (x g(high - x) - low) + g'(high - x) (high - x g(x - low))

    with a gate g that "sigmoid" takes as ``sigmoid(beta z)`` (the gate of Swish) and "phi" as ``Phi(beta z / 1.702)`` with the
    normal distribution function Phi, which is the gate of GELU at beta = 1.702; the factor makes both rise over the same
    width at equal beta. "hard" is the exact clamp, c' 1 inside, edges included, and 0 outside. The paper was at hand in
    reviews only: the gate and beta are our reading.
    """
    if clamp == "hard":
        return x.clamp(low, high), ((x >= low) & (x <= high)).to(x.dtype)
    if clamp == "sigmoid":
        above, below = torch.sigmoid(beta * (x - low)), torch.sigmoid(beta * (high - x))
        d_above = beta * above * torch.sigmoid(beta * (low - x))
        d_below = beta * below * torch.sigmoid(beta * (x - high))
        under, over = torch.sigmoid(beta * (low - x)), torch.sigmoid(beta * (x - high))
    else:
        b = beta / 1.702
        above, below = torch.special.ndtr(b * (x - low)), torch.special.ndtr(b * (high - x))
        d_above = b * torch.exp(-0.5 * (b * (x - low)) ** 2) / math.sqrt(2 * math.pi)
        d_below = b * torch.exp(-0.5 * (b * (high - x)) ** 2) / math.sqrt(2 * math.pi)
        under, over = torch.special.ndtr(b * (low - x)), torch.special.ndtr(b * (x - high))
    value = x * above * below + low * under + high * over
    return value, above * below + d_above * (x * below - low) + d_below * (high - x * above)


def soft_round(c: Tensor, rounding: str, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """(f, f') of a rounding of c with temperature T, larger is sharper; sig is the logistic function::

        "ste"        f = round(c)                                       f' = 1
        "sigmoid-a"  f = n - 1 + sig(T u) + sig(T (u - 1))              f' = T (sig'(T u) + sig'(T (u - 1)))
                     n = round(c), u = c - n + 1/2 in [0, 1]
        "sigmoid-b"  f = floor(c) + (sig(T r) - sig(-T/2)) / (2 sig(T/2) - 1)      f' = T sig'(T r) / (2 sig(T/2) - 1)
                     r = c - floor(c) - 1/2 in [-1/2, 1/2)

    Two readings of the sigmoid rounding of 2410.10849, whose printed formula reached us garbled. A keeps its sum over two
    sigmoids: f jumps by 2 sig(-T) at each threshold, and f' has the mean tanh(T / 2). B is normalised as in DSQ (1908.05033):
    f is continuous and f' has the mean 1. Ties go to even, as in the deployed rounding.
    """
    if rounding == "ste":
        return torch.round(c), torch.ones_like(c)
    assert temperature is not None
    t = temperature.to(c.dtype)
    if rounding == "sigmoid-a":
        n = torch.round(c)
        u = c - n + 0.5
        value = n - 1 + torch.sigmoid(t * u) + torch.sigmoid(t * (u - 1))
        return value, t * (_logistic_slope(t * u) + _logistic_slope(t * (u - 1)))
    n, norm = torch.floor(c), torch.tanh(t / 4)  # 2 sig(T/2) - 1
    r = c - n - 0.5
    return n + 0.5 + 0.5 * torch.tanh(t * r / 2) / norm, t * _logistic_slope(t * r) / norm


def _logistic_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _soft_parts(
    v: Tensor,
    zero: Tensor | None,
    group_size: int,
    bits: int,
    rounding: str,
    clamp: str,
    temperature: Tensor | None,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """(f(c(x)) - z, f'(c(x)) c'(x)) at x = v + z, each ``[N, K]``; z is the rounded zero."""
    if zero is None:
        z: Tensor | float = 0.0
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    else:
        low, high = 0, (1 << bits) - 1
        z = int4.expand_groups(torch.round(_wide(zero)).clamp(low, high), v.shape[1], group_size)
    c, c_slope = soft_clamp((v + z).clamp(-_FAR, _FAR), low, high, clamp, beta)
    f, f_slope = soft_round(c, rounding, temperature)
    return f - z, f_slope * c_slope


def sum_groups(t: Tensor, group_size: int) -> Tensor:
    """Sum ``[N, K]`` over each group of columns: ``[N, ceil(K/G)]``."""
    if group_size == -1:
        return t.sum(1, keepdim=True)
    groups = num_groups(t.shape[1], group_size)
    short = groups * group_size - t.shape[1]
    return torch.nn.functional.pad(t, (0, short)).view(t.shape[0], groups, group_size).sum(-1)


# ------------------------------------------------------------------------------------------------ the decode step


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, rounded once (Zhang and Sennrich, 1910.07467)."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s), s)`` of the sum ``s = x + residual`` in x's dtype."""
    total = (_wide(x) + _wide(residual)).to(x.dtype)
    return rms_norm(total, weight, eps), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for the halves of the last dimension, gate first."""
    gate, up = _wide(gate_up).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (2104.09864) of ``x [..., D]`` by ``cos, sin [..., D/2]``, dimension i paired with i + D/2."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    start: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Rotated queries ``[B, L, Hq, D]`` of ``qkv [B, L, (Hq + 2 Hkv) D]``; keys and values go to the cache from ``slot`` on."""
    batch, length, _ = qkv.shape
    kv_heads, size = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.view(batch, length, -1, size)
    q, k, v = heads.split([heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)
    q, k = _wide(q), _wide(k)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    at = slot.long()[:, None] + torch.arange(length, device=qkv.device)
    position = (at - start.long()[:, None]).clamp(0, cos.shape[0] - 1)
    cos, sin = cos[position][:, :, None].to(q.dtype), sin[position][:, :, None].to(q.dtype)
    rows = torch.arange(batch, device=qkv.device)[:, None]
    k_cache[rows, :, at] = rotate(k, cos, sin).to(k_cache.dtype)
    v_cache[rows, :, at] = v
    return rotate(q, cos, sin).to(qkv.dtype)


def attention_decode(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    start: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scaling: float,
    window: int,
    early: bool,
) -> Tensor:
    """``[B, Hq D]``: :func:`rope_append` of one token a sequence, then its attention to slots ``start .. slot``.

    A positive window leaves the newest ``window`` of them. ``early`` only matters to the CUDA kernel.
    """
    batch, kv_heads, slots, size = k_cache.shape
    q = _wide(rope_append(qkv[:, None], cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps))
    at, last = torch.arange(slots, device=qkv.device), slot.long()[:, None]
    live = (at >= start.long()[:, None]) & (at <= last)
    if window > 0:
        live &= at > last - window
    score = torch.einsum("bhgd,bhsd->bhgs", q.view(batch, kv_heads, -1, size), _wide(k_cache)) * scaling
    p = score.masked_fill(~live[:, None, None], -torch.inf).softmax(-1)
    value = torch.where(live[:, None, :, None], _wide(v_cache), 0.0)
    return torch.einsum("bhgs,bhsd->bhgd", p, value).reshape(batch, -1).to(qkv.dtype)


def greedy_append(
    logits: Tensor,
    tokens: Tensor,
    ids: Tensor,
    slot: Tensor,
    unfinished: Tensor,
    length: Tensor,
    eos: Tensor | None,
    pad: int,
) -> None:
    """Choose the likeliest token of each row of ``logits [B, V]`` and append it: see :func:`append`."""
    append(logits.argmax(-1), tokens, ids, slot, unfinished, length, eos, pad)


def append(
    chosen: Tensor,
    tokens: Tensor,
    ids: Tensor,
    slot: Tensor,
    unfinished: Tensor,
    length: Tensor,
    eos: Tensor | None,
    pad: int,
) -> None:
    """Append chosen tokens ``[B]`` in place; only tensors are touched, so that a CUDA graph can hold it.

    Rows that have ended get pad, those that choose one of eos end: ``tokens[slot + 1] = ids = chosen``,
    ``length += unfinished``, ``slot += 1``.
    """
    length.add_(unfinished)
    if eos is not None:
        chosen = torch.where(unfinished.bool(), chosen, pad)
        unfinished.mul_((chosen[:, None] != eos).all(1))
    slot.add_(1)
    tokens.scatter_(1, slot.long()[:, None], chosen[:, None])
    ids.copy_(chosen)


# ------------------------------------------------------------------------------------------------ distillation


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    *,
    teacher_logits: Tensor | None = None,
    kl: float = 0.5,
    reverse_kl: float = 0.0,
    jsd: float = 0.0,
    jsd_beta: float = 0.5,
    ce: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of :func:`pyquant.ops.distill_loss` and its parts, differentiable, with all logits at once."""
    student = distill_logits(student_hidden, student_weight, softcap, logit_scale)
    if labels is None:
        mask = student.new_ones(student.shape[0])
    else:
        mask = (labels != ignore_index).to(student.dtype)
    count = mask.sum().clamp_min(1)

    def mean(rows: Tensor) -> Tensor:
        return torch.where(mask > 0, rows, 0.0).sum() / count

    parts = dict.fromkeys(("kl", "reverse_kl", "jsd", "ce"), student.new_zeros(()))
    if labels is not None:
        target = torch.where(mask > 0, labels, 0).unsqueeze(-1)
        parts["ce"] = mean(-torch.log_softmax(student, -1).gather(-1, target).squeeze(-1))
    if kl or reverse_kl or jsd:
        if teacher_logits is None:
            teacher = distill_logits(teacher_hidden, teacher_weight, teacher_softcap, logit_scale).detach()
        else:
            teacher = _wide(teacher_logits.detach())
        log_s = torch.log_softmax(student / temperature, -1)
        log_t = torch.log_softmax(teacher.to(student.dtype) / temperature, -1)
        s, t, square = log_s.exp(), log_t.exp(), temperature**2

        def divergence(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
            return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1) * square

        parts["kl"] = mean(divergence(t, log_t, log_s))
        if reverse_kl:
            parts["reverse_kl"] = mean(divergence(s, log_s, log_t))
        if jsd:
            log_m = (jsd_beta * t + (1 - jsd_beta) * s).log()
            parts["jsd"] = mean(jsd_beta * divergence(t, log_t, log_m) + (1 - jsd_beta) * divergence(s, log_s, log_m))
    loss = kl * parts["kl"] + reverse_kl * parts["reverse_kl"] + jsd * parts["jsd"] + ce * parts["ce"]
    return loss, {name: part.detach() for name, part in parts.items()}


def distill_logits(hidden: Tensor, weight: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """``z = cap tanh(scale hidden weight^T / cap)`` in fp32, ``[T, V]``; without a cap ``scale hidden weight^T``."""
    return _cap(_wide(hidden) @ _wide(weight).T * logit_scale, softcap)


def _cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def distill_rows(
    sums: Tensor,
    grad: Tensor | None,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    factor: Tensor,
    ignore_index: int,
    kl: float,
    reverse_kl: float,
    jsd: float,
    jsd_beta: float,
    ce: float,
    temperature: float,
    softcap: float,
    teacher_softcap: float,
    student_scale: float,
    teacher_scale: float,
    first: int,
    rows: int,
    block: int,
) -> None:
    """What :func:`pyquant.ops.distill_rows.distill_rows` writes: the four losses of each row, and its gradient."""
    vocabulary = student.shape[1]
    z = _cap(_wide(student) * student_scale, softcap or None)
    live = torch.ones(z.shape[0], dtype=torch.bool) if labels is None else labels != ignore_index
    live = live.to(z.device).unsqueeze(-1)
    dz, parts = torch.zeros_like(z), z.new_zeros(z.shape[0], 4)
    if teacher is not None:
        log_s = torch.log_softmax(z / temperature, -1)
        log_t = torch.log_softmax(
            _cap(_wide(teacher).to(z.dtype) * teacher_scale, teacher_softcap or None) / temperature, -1
        )
        s, t = log_s.exp(), log_t.exp()
        parts[:, 0] = torch.where(t > 0, t * (log_t - log_s), 0.0).sum(-1)
        dz += kl * (s - t)
        if reverse_kl:
            reverse = (s * (log_s - log_t)).sum(-1, keepdim=True)
            parts[:, 1] = reverse.squeeze(-1)
            dz += reverse_kl * s * (log_s - log_t - reverse)
        if jsd:
            log_m = (jsd_beta * t + (1 - jsd_beta) * s).log()
            of_s = torch.where(s > 0, s * (log_s - log_m), 0.0).sum(-1, keepdim=True)
            of_t = torch.where(t > 0, t * (log_t - log_m), 0.0).sum(-1, keepdim=True)
            parts[:, 2] = (jsd_beta * of_t + (1 - jsd_beta) * of_s).squeeze(-1)
            dz += jsd * (1 - jsd_beta) * torch.where(s > 0, s * (log_s - log_m - of_s), 0.0)
        parts *= temperature**2
        dz *= temperature  # T^2 of the losses, 1/T of z / T
    if labels is not None:
        log_p = torch.log_softmax(z, -1)
        target = torch.where(live, labels.unsqueeze(-1), 0)
        parts[:, 3] = -log_p.gather(-1, target).squeeze(-1)
        if ce:
            dz += ce * log_p.exp().scatter_add(-1, target, z.new_full(target.shape, -1.0))
    sums.copy_(torch.where(live, parts, 0.0))
    if grad is not None:
        if softcap:
            dz *= 1 - (z / softcap) ** 2
        dz = torch.where(live, dz * (student_scale * factor), 0.0)
        for start, part in distill_blocks(grad, rows, vocabulary, block):
            part[first : first + z.shape[0]] = dz[:, start : start + block].to(grad.dtype)


def distill_blocks(grad: Tensor, rows: int, vocabulary: int, block: int) -> list[tuple[int, Tensor]]:
    """The matrices that lie one behind the other in ``grad``, each with its first column.

    ``block`` columns each, the last what is left; rows of the last start at multiples of 8 elements.

    Args:
        grad: ``[rows * ceil(vocabulary / 8) * 8]`` or more, contiguous.
        rows, vocabulary: of the whole matrix.
        block: columns of one part, a multiple of 8.
    """
    parts = []
    for start in range(0, vocabulary, block):
        width = min(block, vocabulary - start)
        stride = -(-width // 8) * 8
        flat = grad[start * rows : start * rows + rows * stride]
        parts.append((start, flat.view(rows, stride)[:, :width]))
    return parts
