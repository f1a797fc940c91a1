"""What every test relies on: a fixed seed, poisoned fresh memory, and GPU tests that say why they are skipped."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests need a GPU; without one they are skipped with that sentence."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU that torch can see")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whichever tests run before."""
    torch.manual_seed(20)


def fill_with_poison(t: torch.Tensor) -> torch.Tensor:
    """NaN for floats, bytes of 0xA5 for integers: what nobody wrote does not look like a result."""
    if t.dtype.is_floating_point or t.dtype.is_complex:
        return t.fill_(float("nan"))
    if t.dtype == torch.bool:
        return t.fill_(True)
    return t.fill_(int.from_bytes(b"\xa5" * t.dtype.itemsize, "little", signed=t.dtype.is_signed))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison what ``torch.empty``, ``empty_like``, ``empty_strided``, ``Tensor.new_empty`` return during the test."""

    def poisoned(allocate):
        def fresh(*args, **kwargs):
            with torch.no_grad():
                return fill_with_poison(allocate(*args, **kwargs))

        return fresh

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of generate that is left to transformers fails the test."""
    from pyquant.integrations import inference

    def fail(self: object, why: str) -> None:
        raise AssertionError(f"fell back: {why}")

    monkeypatch.setattr(inference.Plan, "warn", fail)
