"""bf16 weights with fp32 master copies: an optimizer that steps the copies and writes them back.

A learning rate of 1e-5 moves a weight of 0.02 by less than half of its last bf16 digit: in bf16 alone most steps would be
lost. So the model holds bf16 weights and gradients, the optimizer fp32 copies and their moments: 2 + 2 + 4 + 8 = 16
bytes a weight with AdamW, the same as fp32 weights and gradients without copies, but the forward pass casts nothing.
With 8-bit moments it is 2 + 2 + 4 + 2. Parameters in fp32 (scales, zeros) are their own copies.

It is a subclass made around any ``torch.optim.Optimizer`` (:func:`with_masters`), not a wrapper: learning-rate schedulers
and ``state_dict`` see an ordinary optimizer over the fp32 copies. The copying is done by torch's foreach functions, two
for a step. Gradients of several micro-batches are summed in bf16, which loses small ones: prefer few and large ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _Masters:
    """The part of :func:`with_masters` that comes before the optimizer in the order of its bases."""

    pairs: list[tuple[Tensor, Tensor]]

    def __init__(self, groups: Iterable[dict[str, Any]], **kwargs: Any) -> None:
        self.pairs, mine = [], []
        for group in groups:
            params = list(group["params"])
            copies = []
            for p in params:
                master = p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
                copies.append(master)
                if master is not p:
                    self.pairs.append((p, master))
            mine.append({**group, "params": copies})
        super().__init__(mine, **kwargs)  # type: ignore[call-arg]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)  # type: ignore[misc]
        for p, master in self.pairs:
            master.grad = None
            if p.grad is None:
                continue
            if set_to_none:
                p.grad = None
            else:
                p.grad.zero_()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        live = [(p, master) for p, master in self.pairs if p.grad is not None]  # frozen ones have none and stay
        for p, master in self.pairs:
            if p.grad is None:
                master.grad = None
            elif master.grad is None:
                master.grad = torch.empty_like(master)
        if live:
            torch._foreach_copy_([m.grad for _, m in live], [p.grad for p, _ in live])
        result = super().step(closure)  # type: ignore[misc]
        if live:
            torch._foreach_copy_([p for p, _ in live], [m for _, m in live])
        return result

    def step_masters(self) -> None:
        """Step the copies by their own gradients, nothing else."""
        super().step()  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer's, with ``master`` among the state of each parameter that has a copy."""
        found: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        copies = {id(master) for _, master in self.pairs}
        entries = {i: dict(entry) for i, entry in found["state"].items()}
        for i, p in enumerate(self._all()):
            if id(p) in copies:
                entries.setdefault(i, {})["master"] = p.detach()
        return {**found, "state": entries}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        entries = {i: dict(entry) for i, entry in state_dict["state"].items()}
        with torch.no_grad():
            for i, p in enumerate(self._all()):
                master = entries.get(i, {}).pop("master", None)
                if master is not None:
                    p.copy_(master)
        kept = {i: entry for i, entry in entries.items() if entry}
        super().load_state_dict({**state_dict, "state": kept})  # type: ignore[misc]

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]  # type: ignore[attr-defined]


def with_masters(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """An optimizer class like ``base`` that keeps fp32 copies of bf16 and fp16 parameters.

    Args:
        base: e.g. ``torch.optim.AdamW``.

    Returns:
        a subclass, made with parameter groups as ``base`` is.
    """
    return type(f"Master{base.__name__}", (_Masters, base), {})
