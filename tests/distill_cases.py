"""Inputs, mixes of losses and planted faults for the distillation loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyquant import reference

MIXES: dict[str, dict[str, Any]] = {
    "kl+ce": {},
    "kl": {"kl": 1.0, "ce": 0.0},
    "ce": {"kl": 0.0, "ce": 1.0},
    "reverse": {"kl": 0.0, "reverse_kl": 1.5, "ce": 0.0},
    "jsd": {"kl": 0.0, "jsd": 1.0, "jsd_beta": 0.3, "ce": 0.0},
    "warm": {"kl": 0.4, "ce": 0.3, "temperature": 2.0},
    "capped": {"kl": 0.4, "ce": 0.3, "softcap": 5.0, "teacher_softcap": 3.0, "logit_scale": 0.7},
    "all": {
        "kl": 0.3, "reverse_kl": 0.2, "jsd": 0.5, "jsd_beta": 0.7, "ce": 0.4, "temperature": 0.7,
        "softcap": 6.0, "teacher_softcap": 4.0, "logit_scale": 1.3,
    },
}  # fmt: skip


@dataclass
class Sample:
    """Tensors of one call; labels with every third token ignored."""

    x: Tensor
    weight: Tensor
    labels: Tensor | None
    teacher_x: Tensor | None
    teacher_weight: Tensor | None

    def args(self) -> tuple:
        return self.x, self.weight, self.labels, self.teacher_x, self.teacher_weight

    def wide(self) -> Sample:
        """The same in fp64, leaves of a graph of their own."""
        return Sample(
            *(None if t is None else t.detach().double() if t.is_floating_point() else t for t in self.args())
        )

    def leaves(self) -> Sample:
        self.x.requires_grad_()
        self.weight.requires_grad_()
        return self


def make(
    tokens: int, hidden: int, vocabulary: int, teacher_hidden: int, dtype: torch.dtype, device: str = "cpu"
) -> Sample:
    """Logits of deviation 2 for both models, which have nothing in common."""

    def normal(*shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64, device=device) * by).to(dtype)

    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    labels[1::3] = -100
    return Sample(
        normal(tokens, hidden), normal(vocabulary, hidden, by=2 / hidden**0.5), labels,
        normal(tokens, teacher_hidden), normal(vocabulary, teacher_hidden, by=2 / teacher_hidden**0.5),
    ).leaves()  # fmt: skip


def expected(sample: Sample, **how: Any) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Loss, parts, grad_x and grad_weight of the reference in fp64, by autograd."""
    wide = sample.wide().leaves()
    loss, parts = reference.distill_loss(*wide.args(), **how)
    return loss.detach(), parts, *torch.autograd.grad(loss, (wide.x, wide.weight))


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is right; infinite where got is not finite."""
    value = float((got.double() - want).norm() / want.norm().clamp_min(1e-300))
    return value if value == value else float("inf")


def sample_calls(device: str) -> dict[str, list[tuple]]:
    """Argument tuples of the two ops, for opcheck."""
    student, teacher = torch.randn(3, 40, device=device), torch.randn(3, 40, device=device).half()
    labels = torch.tensor([1, -100, 39], device=device)
    factor = torch.tensor(0.5, device=device)
    losses = (0.3, 0.2, 0.5, 0.7, 0.4, 2.0, 6.0, 0.0, 1.3, 1.0)
    sums, grad = torch.zeros(3, 4, device=device), torch.zeros(5 * 40, device=device).bfloat16()
    rows = [
        (sums, grad, student, teacher, labels, factor, -100, *losses, 1, 5, 16),
        (sums, None, student, None, labels, factor, -100, *losses, 0, 3, 16),
        (sums, grad, student, teacher, None, factor, -100, *losses, 2, 5, 64),
    ]
    return {"distill_rows": rows, "distill_scale": [(torch.randn(7, device=device).half(), factor, 0.25)]}
