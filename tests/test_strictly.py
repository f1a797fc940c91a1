"""Training that repeats to the bit, where every operation in it can."""

from __future__ import annotations

import logging

import pytest
import torch

from pyquant.recipes.streams import strictly


@pytest.fixture
def warn_only():
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield torch.is_deterministic_algorithms_warn_only_enabled
    torch.set_deterministic_debug_mode(mode)


def failing(message: str):
    def rehearsal() -> None:
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        raise RuntimeError(message)

    return rehearsal


def test_errors_while_it_lasts(warn_only):
    with strictly(lambda: None):
        assert not warn_only()
    assert warn_only()


def test_given_up_for_what_has_no_deterministic_form(warn_only, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pyquant"), "propagate", True)  # the command line takes it away
    with strictly(failing("cumsum does not have a deterministic implementation. And more.")):
        assert warn_only()
    assert "does not repeat to the bit: cumsum" in caplog.text


def test_other_errors_are_errors(warn_only):
    with pytest.raises(RuntimeError, match="sizes"), strictly(failing("sizes differ")):
        pass
    assert warn_only()
