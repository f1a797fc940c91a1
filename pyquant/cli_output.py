"""What commands show: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from typing import Any

import typer


class Progress:
    """Events as a bar on a terminal, as lines elsewhere (a new stage, and then at most one line every ten seconds)."""

    def __init__(self) -> None:
        self.live: Any = None
        self.task: Any = None
        self.stage, self.printed = "", 0.0

    def __enter__(self) -> Progress:
        from pyquant.integrations.machine import quiet

        quiet()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = [SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), BarColumn(None)]
            columns += [MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}")]
            self.live = Bars(*columns, console=Console(stderr=True))
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, event: Any) -> None:
        """Show one :class:`pyquant.integrations.events.Event`."""
        if self.live is not None:
            self._bar(event)
        else:
            self._line(event)

    def _bar(self, event: Any) -> None:
        if event.stage != self.stage:
            self.stage = event.stage
            self.task = self.live.add_task(event.stage, total=None, note="")
        if event.total:
            self.live.update(self.task, completed=event.done, total=event.total, note=event.note)

    def _line(self, event: Any) -> None:
        import time

        now = time.monotonic()
        if event.stage != self.stage:
            self.stage, self.printed = event.stage, now
            typer.echo(f"{event.stage} ...", err=True)
        elif event.note != "done" and event.total and now - self.printed > 10:
            self.printed = now
            typer.echo(f"  {event.done}/{event.total} {event.note}".rstrip(), err=True)


def table(columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout: drawn on a terminal, aligned columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn = Table(*columns)
        for column in drawn.columns[1:]:
            column.justify = "right"
        for row in rows:
            drawn.add_row(*row)
        Console().print(drawn)
        return
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    for line in [columns, *rows]:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        typer.echo("  ".join(cells).rstrip())
