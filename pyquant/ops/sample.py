"""greedy_append: the end of a greedy step, in place. No gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant import reference
from pyquant.ops._checks import check, check_device, check_floats, check_no_grad
from pyquant.ops._registry import Backend, define, extension, needs_torch
from pyquant.ops.norm import only_halves
from pyquant.ops.quantize import dtype_code, pointer, stream


def _greedy_fake(logits, tokens, ids, slot, unfinished, length, eos, pad) -> None:
    check_floats("greedy_append", "logits", logits)
    check(logits.dim() == 2 and logits.shape[1] > 0, f"greedy_append: logits must be [B, V], got {tuple(logits.shape)}")
    batch = logits.shape[0]
    check(
        tokens.dtype == torch.int64 and tokens.dim() == 2 and tokens.shape[0] == batch and tokens.stride(1) == 1,
        f"greedy_append: tokens must be int64 [{batch}, W], got {tokens.dtype} {tuple(tokens.shape)}",
    )
    for name, t, dtype in (
        ("ids", ids, torch.int64),
        ("slot", slot, torch.int32),
        ("unfinished", unfinished, torch.int64),
        ("length", length, torch.int64),
    ):
        check(
            t.dtype == dtype and tuple(t.shape) == (batch,) and t.is_contiguous(),
            f"greedy_append: {name} must be contiguous {dtype} [{batch}], got {t.dtype} {tuple(t.shape)}",
        )
    check(
        eos is None or (eos.dtype == torch.int64 and eos.dim() == 1 and eos.is_contiguous()),
        "greedy_append: eos must be contiguous int64 [E], or None",
    )
    check_device(
        "greedy_append", logits, tokens=tokens, ids=ids, slot=slot, unfinished=unfinished, length=length, eos=eos
    )


def _greedy_cuda(logits, tokens, ids, slot, unfinished, length, eos, pad) -> None:
    _greedy_fake(logits, tokens, ids, slot, unfinished, length, eos, pad)
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    extension().greedy_append(
        rows.data_ptr(), rows.stride(0), dtype_code(rows.dtype), *rows.shape, tokens.data_ptr(), tokens.stride(0),
        tokens.shape[1], ids.data_ptr(), slot.data_ptr(), unfinished.data_ptr(), length.data_ptr(), pointer(eos),
        0 if eos is None else len(eos), pad, stream(),
    )  # fmt: skip


def _greedy_torch(logits, tokens, ids, slot, unfinished, length, eos, pad) -> None:
    _greedy_fake(logits, tokens, ids, slot, unfinished, length, eos, pad)
    reference.greedy_append(logits, tokens, ids, slot, unfinished, length, eos, pad)


_greedy = define(
    "greedy_append(Tensor logits, Tensor(a!) tokens, Tensor(b!) ids, Tensor(c!) slot, Tensor(d!) unfinished, "
    "Tensor(e!) length, Tensor? eos, int pad) -> ()",
    fake=_greedy_fake,
    backends={"cuda": Backend(_greedy_cuda, only_halves), "torch": Backend(_greedy_torch)},
)


def greedy_append(
    logits: Tensor,
    tokens: Tensor,
    ids: Tensor,
    slot: Tensor,
    unfinished: Tensor,
    length: Tensor,
    eos: Tensor | None = None,
    pad: int = 0,
) -> None:
    """Choose the likeliest token of each row, the lowest index among equals, and append it, in one launch.

    Args:
        logits: ``[B, V]`` bf16 or fp16 (others run in plain torch), any row stride.
        tokens: int64 ``[B, W]``; the token goes to column ``slot + 1``.
        ids: int64 ``[B]``, gets the token as well.
        slot: int32 ``[B]``, counts up.
        unfinished: int64 ``[B]``, 1 or 0: rows that have ended get pad; those that choose one of eos end.
        length: int64 ``[B]``, counts tokens of rows that go on.
        eos: int64 ``[E]``, or None where nothing ends.
        pad: what rows that have ended get.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or when a gradient is wanted.
    """
    check_no_grad("greedy_append", logits)
    run = _greedy.overload if needs_torch(logits) else _greedy.call
    run(logits, tokens, ids, slot, unfinished, length, eos, pad)
