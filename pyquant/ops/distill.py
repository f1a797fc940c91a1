"""distill_loss: linear heads, divergences and cross-entropy in one step, so that logits of all tokens never exist.

Arguments and gradients are here, the way through the tokens in :mod:`pyquant.ops._distill_chunks`.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyquant.ops._checks import check, check_device, check_floats
from pyquant.ops._distill_chunks import How, Inputs, forward
from pyquant.ops._registry import LIBRARY
from pyquant.ops.distill_rows import PARTS, distill_scale

# ------------------------------------------------------------------------------------------------ gradients


def _run(inputs: Inputs, dtypes: tuple, wants: tuple[bool, bool]) -> tuple[Tensor, Tensor, list[Tensor | None], float]:
    """(loss, its parts ``[4]``, gradients of hidden and weight where wanted, the factor that they still need).

    fp16: 1/tokens would push the gradient of the logits towards fp16's subnormal numbers, and the caller's loss scale
    only comes with the backward pass. So it is that of the sum over about T tokens, and what is kept stays fp32.
    """
    power = 2.0 ** (inputs.x.shape[0] - 1).bit_length() if inputs.x.dtype == torch.float16 else 1.0
    made = [
        torch.empty(t.shape, dtype=torch.float32 if dtype == torch.float16 else dtype, device=t.device)
        if want
        else None
        for t, dtype, want in zip((inputs.x, inputs.weight), dtypes, wants, strict=True)
    ]
    if not inputs.x.shape[0] and made[1] is not None:
        made[1].zero_()
    loss, parts = forward(inputs, made[0], made[1], power)
    return loss, parts, made, 1 / power


class _Loss(torch.autograd.Function):
    """The gradients wait in ``ctx.made`` and leave it when they are used: nothing else holds them, so that autograd
    need not copy them into ``.grad``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, inputs: Inputs, wants: tuple[bool, bool]) -> tuple:
        ctx.dtypes = hidden.dtype, weight.dtype
        loss, parts, ctx.made, ctx.scale = _run(inputs, ctx.dtypes, wants)
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, of_parts: Tensor) -> tuple:
        if ctx.made is None:
            raise RuntimeError(
                "distill_loss: its gradients are made once and handed over by the first backward pass; "
                "compute the loss again instead of keeping the graph for a second one"
            )
        made, ctx.made = ctx.made, None
        for i, t in enumerate(made):
            if t is not None:
                distill_scale(t, grad, ctx.scale)
                made[i] = t if t.dtype == ctx.dtypes[i] else t.to(ctx.dtypes[i])
        return (*made, None, None)


# Under torch.compile the same work is one opaque op; its gradients are scaled into new tensors, since a compiled graph
# may run its backward pass more than once.


def _traced(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_logits: Tensor | None,
    wants_hidden: bool,
    wants_weight: bool,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(hidden, weight, labels, teacher_hidden, teacher_weight, teacher_logits, How(*how))
    loss, parts, made, _ = _run(inputs, (hidden.dtype, weight.dtype), (wants_hidden, wants_weight))
    dx, dw = (loss.new_empty(0) if t is None else t for t in made)
    return loss, parts, dx, dw


def _traced_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = hidden.new_empty((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    made = [
        (t.new_empty(t.shape, dtype=wide.dtype if t.dtype == torch.float16 else t.dtype) if want else wide.new_empty(0))
        for t, want in zip((hidden, weight), rest[4:6], strict=True)
    ]
    return wide, wide.new_empty(len(PARTS)), *made


def _traced_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight = inputs[:2]
    ctx.save_for_backward(*output[2:])
    ctx.wants, ctx.dtypes = inputs[6:8], (hidden.dtype, weight.dtype)
    ctx.tokens, ctx.count = hidden.shape[0], len(inputs)


def _traced_backward(ctx: Any, grad: Tensor, *of_others: Tensor) -> tuple:
    scale = 2.0 ** -((ctx.tokens - 1).bit_length()) if ctx.dtypes[0] == torch.float16 else 1.0
    made = [
        (t * (grad * scale)).to(dtype) if want else None
        for t, want, dtype in zip(ctx.saved_tensors, ctx.wants, ctx.dtypes, strict=True)
    ]
    return *made, *[None] * (ctx.count - 2)


LIBRARY.define(
    "distill_loss(Tensor hidden, Tensor weight, Tensor? labels, Tensor? teacher_hidden, Tensor? teacher_weight, "
    "Tensor? teacher_logits, bool wants_hidden, bool wants_weight, float kl, float reverse_kl, float jsd, "
    "float jsd_beta, float ce, float temperature, float? softcap, float? teacher_softcap, float logit_scale, "
    "int ignore_index, int? chunk) -> (Tensor, Tensor, Tensor, Tensor)"
)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("distill_loss", _traced, _key)
torch.library.register_fake("pyquant::distill_loss", _traced_fake, lib=LIBRARY)
torch.library.register_autograd("pyquant::distill_loss", _traced_backward, setup_context=_traced_setup, lib=LIBRARY)


# ------------------------------------------------------------------------------------------------ the public call


def _check(name: str, inputs: Inputs) -> None:
    x, weight, labels, how = inputs.x, inputs.weight, inputs.labels, inputs.how
    check(
        x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1],
        f"{name}: student_hidden {tuple(x.shape)} and student_weight {tuple(weight.shape)} must be [T, H] and [V, H]",
    )
    check_floats(name, "student_hidden", x)
    check(weight.shape[0] > 0, f"{name}: student_weight {tuple(weight.shape)} has no rows")
    check(
        x.dtype == weight.dtype,
        f"{name}: student_hidden is {x.dtype} but student_weight is {weight.dtype}; convert one",
    )
    tokens, vocabulary = x.shape[0], weight.shape[0]
    for what in ("kl", "reverse_kl", "jsd", "ce"):
        check(getattr(how, what) >= 0, f"{name}: the weight {what}={getattr(how, what)} must not be negative")
    check(how.divergence or how.ce > 0, f"{name}: all of kl, reverse_kl, jsd and ce are 0")
    check(how.temperature > 0, f"{name}: temperature={how.temperature} must be positive")
    check(0 < how.jsd_beta < 1, f"{name}: jsd_beta={how.jsd_beta} must lie between 0 and 1; its limits are the KLs")
    for what in ("softcap", "teacher_softcap"):
        value = getattr(how, what)
        check(value is None or value > 0, f"{name}: {what}={value} must be positive, or None")
    check(how.logit_scale != 0, f"{name}: logit_scale={how.logit_scale} must not be 0")
    check(how.chunk is None or how.chunk > 0, f"{name}: chunk={how.chunk} must be positive")
    if labels is None:
        check(how.ce == 0, f"{name}: ce={how.ce} needs labels")
    else:
        check(
            tuple(labels.shape) == (tokens,) and labels.dtype == torch.int64,
            f"{name}: labels must be int64 [{tokens}] like student_hidden, got {labels.dtype} {tuple(labels.shape)}",
        )
    _check_teacher(name, inputs, tokens, vocabulary)
    check_device(
        name, x, student_weight=weight, labels=labels, teacher_hidden=inputs.teacher_x,
        teacher_weight=inputs.teacher_weight, teacher_logits=inputs.teacher_logits,
    )  # fmt: skip


def _check_teacher(name: str, inputs: Inputs, tokens: int, vocabulary: int) -> None:
    hidden, weight, logits = inputs.teacher_x, inputs.teacher_weight, inputs.teacher_logits
    check((hidden is None) == (weight is None), f"{name}: teacher_hidden and teacher_weight belong together")
    check(
        hidden is None or logits is None, f"{name}: give teacher_hidden and teacher_weight, or teacher_logits, not both"
    )
    if logits is not None:
        check_floats(name, "teacher_logits", logits)
        check(
            tuple(logits.shape) == (tokens, vocabulary),
            f"{name}: teacher_logits must be [{tokens}, {vocabulary}], got {tuple(logits.shape)}",
        )
        check(
            inputs.how.teacher_softcap is None,
            f"{name}: teacher_softcap={inputs.how.teacher_softcap} is for logits made here; teacher_logits are final",
        )
    elif hidden is not None:
        check_floats(name, "teacher_hidden", hidden)
        check(
            hidden.dim() == 2 and hidden.shape[0] == tokens and tuple(weight.shape) == (vocabulary, hidden.shape[1]),
            f"{name}: teacher_hidden {tuple(hidden.shape)} and teacher_weight {tuple(weight.shape)} must be "
            f"[{tokens}, Ht] and [{vocabulary}, Ht]",
        )
        check(
            hidden.dtype == weight.dtype,
            f"{name}: teacher_hidden is {hidden.dtype} but teacher_weight is {weight.dtype}; convert one",
        )
    else:
        check(not inputs.how.divergence, f"{name}: kl, reverse_kl and jsd need a teacher; give one or set them to 0")


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
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Distillation loss of a linear head against a teacher's, without the logits of all tokens in memory.

    With s and t the softmax of student and teacher logits over temperature, p that of the student's logits, y the
    label, and m = jsd_beta t + (1 - jsd_beta) s::

        loss = mean over tokens of   temperature^2 (kl KL(t||s) + reverse_kl KL(s||t)
                                        + jsd (jsd_beta KL(t||m) + (1 - jsd_beta) KL(s||m)))  -  ce log p[y]

    Tokens whose label is ignore_index do not count; without a counted token the loss and its gradients are 0. The
    temperature^2 is Hinton et al.'s (1503.02531); the generalized JSD is that of Agarwal et al. (2306.13649). Our own
    reading: the mean over tokens for all terms, and cross-entropy at temperature 1.

    Gradients are made in this call (under ``torch.no_grad`` none are) and handed over by one backward pass; a second one
    over the same graph, or a derivative of the gradient, is refused. None flow to the teacher. Nothing waits for the
    GPU, and forward and backward can be captured in a CUDA graph. Under autocast, products are of its dtype. Memory
    beside the gradients: none up to about H/2 tokens, above that ``SCRATCH`` (512 MB), see the head of this file.

    Args:
        student_hidden: ``[T, H]`` bf16, fp16, fp32 or fp64.
        student_weight: ``[V, H]``, the same dtype (under autocast any).
        labels: int64 ``[T]``, already shifted: position t holds the token that row t predicts. None counts all tokens
            and needs ``ce=0``.
        teacher_hidden, teacher_weight: ``[T, Ht]`` and ``[V, Ht]``, of one dtype; or
        teacher_logits: ``[T, V]`` float, final: neither scaled nor capped here.
        kl, reverse_kl, jsd, ce: weights, not negative, not all 0.
        jsd_beta: between 0 and 1, both excluded.
        temperature: of the divergences, positive.
        softcap, teacher_softcap: logits z become ``cap tanh(z / cap)``; None for none. The teacher's is not taken over
            from the student's.
        logit_scale: factor on both products, before the cap.
        ignore_index: label of tokens that do not count.
        chunk: rows of logits at once; None takes what fits the memory above.

    Returns:
        the loss (0-dim, fp32; fp64 for fp64), and its parts, detached and before weighting: ``kl`` and ``ce`` wherever
        there is what they need (a weighted divergence, labels), ``reverse_kl`` and ``jsd`` where weighted, else 0.

    Raises:
        ValueError: for shapes, dtypes, devices or weights that do not fit.
        RuntimeError: from the backward pass, when it is run twice.
    """
    how = How(
        kl, reverse_kl, jsd, jsd_beta, ce, temperature, softcap, teacher_softcap, logit_scale, ignore_index, chunk
    )
    given = student_hidden, student_weight, teacher_hidden, teacher_weight
    kind = student_hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        given = tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in given)
    others = (*given[2:], teacher_logits)
    teacher_x, teacher_weight, teacher_logits = (None if t is None else t.detach() for t in others)
    labels = None if labels is None else labels.contiguous()
    inputs = Inputs(given[0].detach(), given[1].detach(), labels, teacher_x, teacher_weight, teacher_logits, how)
    _check("distill_loss", inputs)
    wants = tuple(torch.is_grad_enabled() and t.requires_grad for t in (student_hidden, student_weight))
    with torch.autocast(kind, enabled=False):
        if torch.compiler.is_compiling():
            run = torch.ops.pyquant.distill_loss.default
            traced = run(*given[:2], labels, teacher_x, teacher_weight, teacher_logits, *wants, *astuple(how))
            loss, parts = traced[0], traced[1].detach()
        elif any(wants):
            loss, parts = _Loss.apply(student_hidden, student_weight, inputs, wants)
        else:
            with torch.no_grad():
                loss, parts = forward(inputs, None, None, 1.0)
    return loss, dict(zip(PARTS, parts.unbind(), strict=True))
