"""``pyquant eval --tasks``: one model or two, results kept in a folder, and the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyquant.integrations.compare import compare_table, compare_tasks, score_table
from pyquant.integrations.files import write_atomic
from pyquant.report import Report, write_report

RESULT = "tasks.json"


def read_or_run(which: str, run: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """An earlier evaluation where ``which`` is its file or folder, a new one of the model folder otherwise.

    Raises:
        ValueError: a file that is no evaluation.
    """
    path = Path(which)
    file = path / RESULT if (path / RESULT).is_file() else path
    if not file.is_file():
        return run(which)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict) or not {"rows", "documents"} <= found.keys():
        raise ValueError(f"{file} is no result of pyquant eval --tasks")
    return found


def keep(found: Mapping[str, Any], file: Path) -> None:
    """Write an evaluation."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(found) + "\n")


def names_of(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, str]:
    """Two short names for two models, different ones."""
    one, two = (Path(str(side.get("model", "model"))).name for side in (a, b))
    return (one, two) if one != two else (f"{one} (A)", f"{two} (B)")


def write_page(found: Sequence[Mapping[str, Any]], path: Path, command: str = "") -> None:
    """``report.html`` of one evaluation, or of two and their differences."""
    names = [Path(str(side.get("model", "model"))).name for side in found]
    tables = []
    lead = []
    for name, side in zip(names, found, strict=True):
        settings = side["settings"]
        limit = (
            "all documents" if settings["limit"] is None else f"the first {settings['limit']} documents of each task"
        )
        lead.append(f"{name}: {limit}, seed {settings['seed']}, {side.get('device')}, {side.get('dtype')}")
        tables.append((f"Scores of {name}", *score_table(side)))
    notes = ["Standard errors are the harness's, over documents."]
    if len(found) == 2:
        tables.insert(0, ("Differences", *compare_table(compare_tasks(*found), names_of(*found))))
        notes.append(
            "Differences are paired: both models scored the same documents; the interval is that of their mean."
        )
    report = Report(
        title=f"Tasks: {' against '.join(names)}",
        lead=lead,
        tables=tables,
        notes=notes,
        config={name: side["settings"] for name, side in zip(names, found, strict=True)},
        versions=dict(found[0].get("versions", {})),
        command=command,
    )
    write_report(report, path)
