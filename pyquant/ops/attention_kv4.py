"""attention_kv4: a few query tokens a sequence against a KV cache in mixed precision; append_kv4: new tokens into it.

The cache of one layer is four tensors, laid out by :mod:`pyquant.formats.kv4`::

    prompt   16 bit  [B or 1, Hkv, prompt tiles, 32 D]    the first tokens; one prompt for the batch where the size is 1
    pages    uint8   [B, Hkv, page capacity, page bytes]  64 tokens each, 2, 3, 4 or 8 bits a value, as their size says
    window   16 bit  [B, Hkv, ring tiles, 32 D]           the newest tokens
    segments int32   [B, 3]                               prompt tokens, pages, length; read on the device

Neither op has a gradient.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyquant import reference
from pyquant.formats import kv4
from pyquant.ops._checks import check, check_device, check_floats, check_no_grad
from pyquant.ops._registry import Backend, define, extension, kernels, needs_torch
from pyquant.ops._workspace import workspace
from pyquant.ops.norm import only_halves
from pyquant.ops.quantize import dtype_code, pointer, stream

MAX_BATCH = 256  # of the CUDA kernels
MAX_TRITON_ROWS = 64
MAX_HEADS = 1 << 14  # sequences times KV heads


def max_rows(head_size: int) -> int:
    """Query heads a KV head times query tokens that the CUDA kernel takes."""
    return 16 if head_size > 128 else 32


def _check_cache(op: str, x: Tensor, kv_heads: int, parts: dict[str, Tensor], segments: Tensor) -> None:
    """The parts of a cache fit x ``[B, T, heads, D]`` and each other."""
    batch, size = x.shape[0], x.shape[3]
    check(size % 16 == 0 and size > 0, f"{op}: head size {size} must be a multiple of 16")
    for name, t in parts.items():
        widths = [kv4.tile_values(size)] if name != "pages" else [kv4.page_bytes(size, bits) for bits in kv4.BITS]
        fits = t.dim() == 4 and (t.shape[0] == batch or (name == "prompt" and t.shape[0] == 1))
        check(
            fits and t.shape[1] == kv_heads and t.shape[3] in widths,
            f"{op}: {name} must be [{'1 or ' if name == 'prompt' else ''}{batch}, {kv_heads}, n, "
            f"{' or '.join(map(str, widths))}] for head size {size}, got {tuple(t.shape)}",
        )
        want = torch.uint8 if name == "pages" else x.dtype
        check(t.dtype == want, f"{op}: {name} must be {want}, not {t.dtype}")
        check(t.is_contiguous(), f"{op}: {name} must be contiguous")
    check(parts["window"].shape[2] > 0, f"{op}: the window's ring has no tiles")
    check(
        segments.dtype == torch.int32 and tuple(segments.shape) == (batch, 3) and segments.is_contiguous(),
        f"{op}: segments must be contiguous int32 [{batch}, 3], got {segments.dtype} {tuple(segments.shape)}",
    )
    check_device(op, x, segments=segments, **parts)


def _declines_cache(x: Tensor, kv_heads: int, parts: tuple[Tensor, ...]) -> str | None:
    if why := only_halves(x):
        return why
    batch, size = x.shape[0], x.shape[3]
    if size not in kv4.HEAD_SIZES:
        return f"head size {size} is none of {kv4.HEAD_SIZES}"
    if batch > MAX_BATCH or batch * kv_heads > MAX_HEADS:
        return f"more than {MAX_BATCH} sequences, or {MAX_HEADS} KV heads of all of them"
    if any(t.data_ptr() % 16 for t in parts):
        return "the cache is not aligned to 16 bytes"
    return None


# ------------------------------------------------------------------------------------------------ attention


def _attention_fake(
    q, prompt, pages, window, segments, scaling, softcap, early, sliding_window, sinks
) -> tuple[Tensor, Tensor]:
    op = "attention_kv4"
    check(q.dim() == 4, f"{op}: q must be [B, T, Hq, D], got shape {tuple(q.shape)}")
    check_floats(op, "q", q)
    check(window.dim() == 4, f"{op}: window must be [B, Hkv, ring tiles, 32 D], got shape {tuple(window.shape)}")
    heads, kv_heads = q.shape[2], window.shape[1]
    check(
        kv_heads > 0 and heads > 0 and heads % kv_heads == 0,
        f"{op}: {heads} query heads do not divide over {kv_heads} KV heads",
    )
    check(softcap >= 0, f"{op}: softcap={softcap} must be 0 (none) or positive")
    check(0 <= sliding_window < 1 << 30, f"{op}: sliding_window={sliding_window} must be 0 (none) or positive")
    if sinks is not None:
        check_floats(op, "sinks", sinks)
        check(sinks.shape == (heads,), f"{op}: sinks must be [{heads}], one a query head, got {tuple(sinks.shape)}")
        check_device(op, q, sinks=sinks)
    _check_cache(op, q, kv_heads, {"prompt": prompt, "pages": pages, "window": window}, segments)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


def _attention_declines(q, prompt, pages, window, segments, *args) -> str | None:
    if why := _declines_cache(q, window.shape[1], (prompt, pages, window)):
        return why
    rows, most = q.shape[2] // window.shape[1] * q.shape[1], max_rows(q.shape[3])
    if rows > most:
        return f"{rows} query rows a KV head are more than {most}"
    bits = kv4.bits_of(pages.shape[3], q.shape[3])
    return _too_large(q.device.index, bits, q.shape[3], rows) if bits else None


@functools.cache
def _too_large(device: int, bits: int, head_size: int, rows: int) -> str | None:
    """Why a block of the CUDA kernel does not fit the device's shared memory (100 KiB on sm_86 and sm_89, 227 on sm_90)."""
    has = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    wants = extension().attention_kv4_shared(bits, head_size, rows)
    return None if wants <= has else f"the kernel needs {wants} bytes of shared memory and this device has {has}"


@functools.cache
def _workspace_bytes(device: int, head_size: int) -> int:
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return extension().attention_kv4_workspace(head_size, count)


def _attention_cuda(
    q, prompt, pages, window, segments, scaling, softcap, early, sliding_window, sinks
) -> tuple[Tensor, Tensor]:
    out, lse = _attention_fake(q, prompt, pages, window, segments, scaling, softcap, early, sliding_window, sinks)
    if not out.numel():
        return out, lse
    batch, tokens, heads, size = q.shape
    if q.stride(3) != 1 or q.stride(2) != size or q.stride(0) % 2 or q.stride(1) % 2 or q.data_ptr() % 4:
        q = q.clone(memory_format=torch.contiguous_format)  # its values are read in pairs
    sinks = None if sinks is None else sinks.float().contiguous()
    handle, device = stream(), q.device.index
    space = workspace("attention_kv4", device, handle, _workspace_bytes(device, size))
    extension().attention_kv4(
        q.data_ptr(), q.stride(0), q.stride(1), dtype_code(q.dtype), prompt.data_ptr(),
        0 if len(prompt) == 1 else prompt.stride(0), prompt.shape[2], pages.data_ptr(), pages.shape[2],
        window.data_ptr(), window.shape[2], segments.data_ptr(), out.data_ptr(), lse.data_ptr(), pointer(space),
        scaling, softcap, batch, tokens, heads, window.shape[1], size, early,
        kv4.bits_of(pages.shape[3], size), sliding_window, 0 if sinks is None else sinks.data_ptr(), handle,
    )  # fmt: skip
    return out, lse


def _triton_declines(q, prompt, pages, window, *args) -> str | None:
    if why := only_halves(q):
        return why
    rows = q.shape[2] // window.shape[1] * q.shape[1]
    return None if rows <= MAX_TRITON_ROWS else f"{rows} query rows a KV head are more than {MAX_TRITON_ROWS}"


def _attention_triton(
    q, prompt, pages, window, segments, scaling, softcap, early, sliding_window, sinks
) -> tuple[Tensor, Tensor]:
    out, lse = _attention_fake(q, prompt, pages, window, segments, scaling, softcap, early, sliding_window, sinks)
    if out.numel():
        kernels("attention_kv4").attention_kv4(
            out, lse, q, prompt, pages, window, segments, scaling, softcap, sliding_window, sinks
        )
    return out, lse


def _attention_torch(
    q, prompt, pages, window, segments, scaling, softcap, early, sliding_window, sinks
) -> tuple[Tensor, Tensor]:
    out, lse = _attention_fake(q, prompt, pages, window, segments, scaling, softcap, early, sliding_window, sinks)
    if not out.numel():
        return out, lse
    return reference.attention_kv4(q, prompt, pages, window, segments, scaling, softcap, early, sliding_window, sinks)


_attention = define(
    "attention_kv4(Tensor q, Tensor prompt, Tensor pages, Tensor window, Tensor segments, float scaling, float softcap, "
    "bool early, int sliding_window, Tensor? sinks) -> (Tensor, Tensor)",
    fake=_attention_fake,
    backends={
        "cuda": Backend(_attention_cuda, _attention_declines),
        "triton": Backend(_attention_triton, _triton_declines),
        "torch": Backend(_attention_torch),
    },
)


def attention_kv4(
    q: Tensor,
    prompt: Tensor,
    pages: Tensor,
    window: Tensor,
    segments: Tensor,
    scaling: float | None = None,
    softcap: float = 0.0,
    early: bool = False,
    sliding_window: int = 0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest T tokens of each sequence over a cache in mixed precision, in one launch.

    Mixed precision by position after BiSup, 4 bits with a scale for each channel of K and each token of V after KIVI (arXiv
    2402.02750); pages of 64 tokens and the layout are our own. The same bits in every run.

    Args:
        q: ``[B, T, Hq, D]`` bf16 or fp16 (fp32 runs in plain torch), rotated, any strides; their keys and values are in the
            cache already. On a GPU D of 64, 80, 96, 128, 256 and up to 32 rows T Hq / Hkv (16 above D = 128) have a kernel,
            everything else runs in plain torch.
        prompt, pages, window, segments: the cache, see the head of this file; prompt and window in q's dtype. What a segment
            says must lie within its part; on a GPU that is not checked. A sequence of length 0 gives zeros.
        scaling: factor of the scores, ``D ** -0.5`` by default.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        early: promises that the cache was final before the kernel ahead of this one began (which may still write q).
        sliding_window: each token attends to so many of the newest tokens up to itself, itself among them; 0 for all. Pages
            and tiles that no query token sees are not read.
        sinks: ``[Hq]``, learned logits in the denominator as gpt-oss has them: a score for each query head that no value
            belongs to, taken as it is (neither scaled nor bent). fp32 saves a conversion.

    Returns:
        out ``[B, T, Hq, D]`` in q's dtype, and the natural logarithm of the sum of exponentials, the sink's among them, fp32
        ``[B, T, Hq]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or when a gradient is wanted.
    """
    check_no_grad("attention_kv4", q, prompt, window, sinks)
    run = _attention.overload if needs_torch(q, prompt, window, sinks) else _attention.call
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    return run(q, prompt, pages, window, segments, scaling, softcap, early, sliding_window, sinks)


# ------------------------------------------------------------------------------------------------ append


def _append_fake(k, v, pages, window, segments, keep, cos, sin) -> None:
    op = "append_kv4"
    check(k.dim() == 4, f"{op}: k must be [B, T, Hkv, D], got shape {tuple(k.shape)}")
    check_floats(op, "k", k)
    check(
        v.shape == k.shape and v.dtype == k.dtype,
        f"{op}: v must be {k.dtype} {tuple(k.shape)} like k, got {v.dtype} {tuple(v.shape)}",
    )
    check_device(op, k, v=v)
    _check_cache(op, k, k.shape[2], {"pages": pages, "window": window}, segments)
    tokens, ring = k.shape[1], kv4.TILE * window.shape[2]
    check(tokens <= kv4.PAGE, f"{op}: {tokens} tokens at once are more than {kv4.PAGE}; a KVLayer takes a prompt")
    check(keep >= -1, f"{op}: keep={keep} must be -1 (nothing is packed) or the tokens that the window keeps")
    check(
        keep + kv4.PAGE - 1 + tokens <= ring or keep < 0,
        f"{op}: a ring of {ring} tokens cannot keep {keep}, wait for a page of {kv4.PAGE} and take {tokens} new ones",
    )
    check((cos is None) == (sin is None), f"{op}: cos and sin come together or not at all")
    if cos is not None:
        shapes = ((k.shape[0], tokens, k.shape[3]), (1, tokens, k.shape[3]))
        for name, t in (("cos", cos), ("sin", sin)):
            check(
                tuple(t.shape) in shapes and t.dtype in (k.dtype, torch.float32),
                f"{op}: {name} must be {k.dtype} or float32 {shapes[0]} or {shapes[1]}, got {t.dtype} {tuple(t.shape)}",
            )
        check(cos.dtype == sin.dtype and cos.shape == sin.shape, f"{op}: cos and sin must be alike")
        check_device(op, k, cos=cos, sin=sin)


def _append_declines(k, v, pages, window, *args) -> str | None:
    return _declines_cache(k, k.shape[2], (pages, window))


def _append_cuda(k, v, pages, window, segments, keep, cos, sin) -> None:
    _append_fake(k, v, pages, window, segments, keep, cos, sin)
    if not k.numel():
        return
    handle = stream()
    space = workspace("append_kv4", k.device.index, handle, 4 * extension().append_kv4_batch)
    batch, tokens, kv_heads, size = k.shape
    if cos is not None:
        cos, sin = (t.contiguous() for t in (cos, sin))
    extension().append_kv4(
        k.data_ptr(), k.stride(), v.data_ptr(), v.stride(), dtype_code(k.dtype), pages.data_ptr(), pages.shape[2],
        window.data_ptr(), window.shape[2], segments.data_ptr(), pointer(space), batch, tokens, kv_heads, size, keep,
        kv4.bits_of(pages.shape[3], size), 0 if cos is None else cos.data_ptr(), 0 if sin is None else sin.data_ptr(),
        0 if cos is None or len(cos) == 1 else tokens * size, cos is not None and cos.dtype == torch.float32, handle,
    )  # fmt: skip


def _append_triton(k, v, pages, window, segments, keep, cos, sin) -> None:
    _append_fake(k, v, pages, window, segments, keep, cos, sin)
    if k.numel():
        kernels("append_kv4").append_kv4(k, v, pages, window, segments, keep, cos, sin)


def _append_torch(k, v, pages, window, segments, keep, cos, sin) -> None:
    _append_fake(k, v, pages, window, segments, keep, cos, sin)
    if k.numel():
        reference.append_kv4(k, v, pages, window, segments, keep, cos, sin)


_append = define(
    "append_kv4(Tensor k, Tensor v, Tensor(a!) pages, Tensor(b!) window, Tensor(c!) segments, int keep, "
    "Tensor? cos, Tensor? sin) -> ()",
    fake=_append_fake,
    backends={
        "cuda": Backend(_append_cuda, _append_declines),
        "triton": Backend(_append_triton, only_halves),
        "torch": Backend(_append_torch),
    },
)


def append_kv4(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    window: Tensor,
    segments: Tensor,
    keep: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """New tokens into the window of a cache, and a page packed from its oldest 64 where it then holds ``keep + 64`` or more.

    One launch that reads and updates segments on the device: the host never waits, and a captured graph can hold it. The page
    equals :func:`pyquant.formats.kv4.pack_pages` of the same tokens bit for bit.

    Args:
        k, v: ``[B, T, Hkv, D]`` bf16 or fp16 (fp32 runs in plain torch), T up to 64, any strides, finite; keys rotated,
            unless cos and sin are given.
        pages, window, segments: the cache, written in place; see the head of this file.
        keep: tokens that the window keeps at least, or -1 to pack nothing. The ring must hold ``keep + 63 + T`` tokens. That a
            page is left (and, for -1, room in the ring) is up to the caller: plain torch raises, the kernel packs nothing and
            the window overwrites itself.
        cos, sin: ``[B or 1, T, D]`` in k's dtype or fp32, to rotate keys by, as Llama does: ``k cos + (-k_high, k_low) sin``,
            in fp32 and rounded once (so not the same bits as three operations in 16 bits).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or when a gradient is wanted.
    """
    check_no_grad("append_kv4", k, v, cos, sin)
    run = _append.overload if needs_torch(k, v) else _append.call
    run(k, v, pages, window, segments, keep, cos, sin)
