"""How long-running work tells its caller where it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Progress: ``done`` of ``total`` steps of a stage (total 0: unknown), with a ``note`` such as the loss."""

    stage: str
    done: int = 0
    total: int = 0
    note: str = ""


OnEvent = Callable[[Event], None]


class Clock:
    """Announces stages and times them.

    Args:
        say: receives the events; None is nobody.
    """

    def __init__(self, say: OnEvent | None = None) -> None:
        self.say: OnEvent = say or (lambda event: None)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Callable[..., None]]:
        """``with clock("train") as tick: tick(done, total, note)``; a stage that raises is not announced as done."""
        began = time.perf_counter()
        self.say(Event(stage))
        yield lambda done, total, note="": self.say(Event(stage, done, total, note))
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
        self.say(Event(stage, 1, 1, "done"))
