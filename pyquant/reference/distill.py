"""The distillation loss."""

from __future__ import annotations

import torch
from torch import Tensor

from pyquant.reference.weights import wide


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
            teacher = wide(teacher_logits.detach())
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
    return _cap(wide(hidden) @ wide(weight).T * logit_scale, softcap)


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
    z = _cap(wide(student) * student_scale, softcap or None)
    live = torch.ones(z.shape[0], dtype=torch.bool) if labels is None else labels != ignore_index
    live = live.to(z.device).unsqueeze(-1)
    dz, parts = torch.zeros_like(z), z.new_zeros(z.shape[0], 4)
    if teacher is not None:
        log_s = torch.log_softmax(z / temperature, -1)
        log_t = torch.log_softmax(
            _cap(wide(teacher).to(z.dtype) * teacher_scale, teacher_softcap or None) / temperature, -1
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
