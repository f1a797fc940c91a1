"""Attention over a static cache of 16-bit keys and values: rope_append for a prompt, attention_decode for a step.

Both take the projections of new tokens as one tensor, heads q | k | v, and write the cache in place::

    k_cache, v_cache [B, Hkv, S, D]     slot [B]   where the (first) new token goes
                                        start [B]  the first slot in use: left padding lies before it
    cos, sin fp32 [P, D/2]              the token in slot s stands at position s - start

Neither has a gradient. A slot of S or more is the caller's mistake: the kernels then write nothing, torch raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant import reference
from pyquant.ops._checks import check, check_device, check_floats, check_no_grad
from pyquant.ops._registry import Backend, define, extension, needs_torch
from pyquant.ops.norm import only_halves
from pyquant.ops.quantize import dtype_code, pointer, stream

HEAD_SIZES = (64, 80, 96, 128, 256)  # of the CUDA kernels
MAX_GROUP = 16  # query heads a KV head


def _check(
    op: str,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    start: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> tuple[int, int]:
    """(query heads, D) of arguments that fit each other."""
    check_floats(op, "qkv", qkv)
    check(k_cache.dim() == 4, f"{op}: k_cache must be [B, Hkv, S, D], got shape {tuple(k_cache.shape)}")
    batch, kv_heads, slots, size = k_cache.shape
    check(slots > 0, f"{op}: the cache has no slots")
    check(
        k_cache.shape == v_cache.shape and k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1,
        f"{op}: k_cache and v_cache must agree in shape and strides and be contiguous along D, got "
        f"{tuple(k_cache.shape)} {k_cache.stride()} and {tuple(v_cache.shape)} {v_cache.stride()}",
    )
    check(
        k_cache.dtype == v_cache.dtype == qkv.dtype,
        f"{op}: qkv is {qkv.dtype} but the cache is {k_cache.dtype} and {v_cache.dtype}",
    )
    width = qkv.shape[-1]
    heads = width // size - 2 * kv_heads
    check(
        qkv.shape[0] == batch and width % size == 0 and heads > 0 and heads % kv_heads == 0,
        f"{op}: qkv {tuple(qkv.shape)} does not hold q, k and v heads for a cache of {batch} sequences, {kv_heads} KV "
        f"heads and head size {size}",
    )
    for name, t in (("cos", cos), ("sin", sin)):
        check(
            t.dtype == torch.float32 and t.dim() == 2 and t.shape[1] * 2 == size and t.is_contiguous(),
            f"{op}: {name} must be contiguous float32 [P, {size // 2}], got {t.dtype} {tuple(t.shape)}",
        )
    check(cos.shape == sin.shape, f"{op}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} differ")
    for name, t in (("slot", slot), ("start", start)):
        check(
            t.dtype == torch.int32 and tuple(t.shape) == (batch,) and t.is_contiguous(),
            f"{op}: {name} must be contiguous int32 [{batch}], got {t.dtype} {tuple(t.shape)}",
        )
    check((q_norm is None) == (k_norm is None), f"{op}: give both q_norm and k_norm, or neither")
    for name, t in (("q_norm", q_norm), ("k_norm", k_norm)):
        check(
            t is None or (tuple(t.shape) == (size,) and t.dtype == qkv.dtype and t.is_contiguous()),
            f"{op}: {name} must be contiguous [{size}] in {qkv.dtype}",
        )
    check_device(
        op, qkv, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache, slot=slot, start=start, q_norm=q_norm,
        k_norm=k_norm,
    )  # fmt: skip
    return heads, size


def _declines(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, *args: object) -> str | None:
    if why := only_halves(qkv):
        return why
    size, kv_heads = k_cache.shape[-1], k_cache.shape[1]
    if size not in HEAD_SIZES:
        return f"head size {size} is none of {HEAD_SIZES}"
    if qkv.shape[-1] // size - 2 * kv_heads > MAX_GROUP * kv_heads:
        return f"more than {MAX_GROUP} query heads a KV head"
    if k_cache.data_ptr() % 16 or any(s % 8 for s in k_cache.stride()[:3]):
        return "the rows of the cache are not aligned to 16 bytes"
    if cos.data_ptr() % 16 or sin.data_ptr() % 16:
        return "the rotary tables are not aligned to 16 bytes"
    return None


def _arguments(qkv, cos, k_cache, v_cache, slot, start, q_norm, k_norm, eps, heads):
    """csrc's AttentionArguments for qkv [rows, width], aligned."""
    batch, kv_heads, slots, size = k_cache.shape
    return extension().AttentionArguments(
        qkv.data_ptr(), qkv.stride(0), dtype_code(qkv.dtype), k_cache.data_ptr(), v_cache.data_ptr(),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), slot.data_ptr(), start.data_ptr(), pointer(q_norm),
        pointer(k_norm), eps, cos.shape[0], batch, heads, kv_heads, size, slots,
    )  # fmt: skip


def _aligned(rows: Tensor) -> Tensor:
    """rows [M, width] whose heads start at multiples of 16 bytes; a copy where they do not."""
    fits = rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0
    return rows if fits else rows.clone(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------ rope_append


def _append_fake(qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps) -> Tensor:
    check(qkv.dim() == 3, f"rope_append: qkv must be [B, L, (Hq + 2 Hkv) D], got shape {tuple(qkv.shape)}")
    heads, size = _check("rope_append", qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm)
    return qkv.new_empty((*qkv.shape[:2], heads, size))


def _append_cuda(qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps) -> Tensor:
    q = _append_fake(qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps)
    if q.numel():
        rows = _aligned(qkv.reshape(-1, qkv.shape[-1]))
        arguments = _arguments(rows, cos, k_cache, v_cache, slot, start, q_norm, k_norm, eps, q.shape[2])
        extension().rope_append(
            arguments, cos.data_ptr(), sin.data_ptr(), q.data_ptr(), qkv.shape[1], stream()
        )  # fmt: skip
    return q


def _append_torch(qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps) -> Tensor:
    q = _append_fake(qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps)
    if not q.numel():
        return q
    return reference.rope_append(
        qkv.contiguous(), cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps
    ).contiguous()


_append = define(
    "rope_append(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot, "
    "Tensor start, Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor",
    fake=_append_fake,
    backends={"cuda": Backend(_append_cuda, _declines), "torch": Backend(_append_torch)},
)


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    start: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate the queries and keys of new tokens (2104.09864) and write keys and values to the cache.

    Args:
        qkv: ``[B, L, (Hq + 2 Hkv) D]`` bf16 or fp16 (fp32 runs in plain torch), heads q | k | v, any strides.
        cos, sin: fp32 ``[P, D/2]``.
        k_cache, v_cache: ``[B, Hkv, S, D]`` in qkv's dtype, one set of strides, D contiguous; written in place.
        slot: int32 ``[B]``, where the first of the L tokens goes.
        start: int32 ``[B]``, the first slot in use; what lies before it is padding and stands at position 0.
        q_norm, k_norm: weights ``[D]`` of an RMS norm of each head before it is rotated (as in Qwen3), or None.
        eps: of those norms.

    Returns:
        the rotated queries ``[B, L, Hq, D]``.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, or when a gradient is wanted.
    """
    check_no_grad("rope_append", qkv, q_norm, k_norm)
    run = _append.overload if needs_torch(qkv, q_norm, k_norm) else _append.call
    return run(qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps)


# ------------------------------------------------------------------------------------------------ attention_decode


def _decode_fake(
    qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps, scaling, window, early
) -> Tensor:  # fmt: skip
    check(qkv.dim() == 2, f"attention_decode: qkv must be [B, (Hq + 2 Hkv) D], got shape {tuple(qkv.shape)}")
    check(window >= 0, f"attention_decode: window={window} must be 0 (none) or positive")
    heads, size = _check("attention_decode", qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm)
    return qkv.new_empty((qkv.shape[0], heads * size))


def _decode_cuda(
    qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps, scaling, window, early
) -> Tensor:  # fmt: skip
    out = _decode_fake(qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps, scaling, window, early)
    if out.numel():
        heads = out.shape[1] // k_cache.shape[3]
        arguments = _arguments(_aligned(qkv), cos, k_cache, v_cache, slot, start, q_norm, k_norm, eps, heads)
        extension().attention_decode(
            arguments, cos.data_ptr(), sin.data_ptr(), out.data_ptr(), scaling, window, early, stream()
        )
    return out


def _decode_torch(
    qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps, scaling, window, early
) -> Tensor:  # fmt: skip
    out = _decode_fake(qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps, scaling, window, early)
    if not out.numel():
        return out
    return reference.attention_decode(
        qkv.contiguous(), cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps, scaling, window, early
    )


_decode = define(
    "attention_decode(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot, "
    "Tensor start, Tensor? q_norm, Tensor? k_norm, float eps, float scaling, int window, bool early) -> Tensor",
    fake=_decode_fake,
    backends={"cuda": Backend(_decode_cuda, _declines), "torch": Backend(_decode_torch)},
)


def attention_decode(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    start: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    scaling: float | None = None,
    window: int = 0,
    early: bool = False,
) -> Tensor:
    """One new token a sequence: rotate, append to the cache, attend to slots ``start .. slot``, in one launch.

    Args:
        qkv: ``[B, (Hq + 2 Hkv) D]`` bf16 or fp16 (fp32 runs in plain torch), any strides. On a GPU: D of 64, 80, 96, 128 or
            256 and up to 16 query heads a KV head have a kernel, everything else runs in plain torch.
        cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps: as in :func:`rope_append`.
        scaling: factor of the scores, ``D ** -0.5`` by default.
        window: only the newest ``window`` slots are attended to; 0 for all.
        early: promises that everything but qkv was final before the kernel ahead of this one began, so that the cache can be
            fetched while that one still runs. Without the promise the kernel waits first and is right in any order of
            calls.

    Returns:
        ``[B, Hq D]`` in qkv's dtype.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, or when a gradient is wanted.
    """
    check_no_grad("attention_decode", qkv, q_norm, k_norm)
    run = _decode.overload if needs_torch(qkv, q_norm, k_norm) else _decode.call
    scaling = k_cache.shape[-1] ** -0.5 if scaling is None else scaling
    return run(qkv, cos, sin, k_cache, v_cache, slot, start, q_norm, k_norm, eps, scaling, window, early)
