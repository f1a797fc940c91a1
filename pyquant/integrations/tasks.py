"""Task files of lm-evaluation-harness over local sets of questions, so that an evaluation needs no network.

:func:`write_tasks` turns a folder of sets (``piqa.jsonl``, ``hellaswag_val.txt``, ...) into YAML files that the harness
reads with ``--include_path``, by hand as well as through ``pyquant eval --tasks``. Prompts are those of the harness's own
tasks of these names (0-shot), except where the local set lacks a field: boolq's passages have no title, and hellaswag's
contexts are used as they are (the harness capitalizes their second sentence). The rows' fields: ``query``, ``choices``,
``gold``; ``context_options``, ``continuation``, ``gold`` (winogrande); ``context``, ``continuation`` (lambada).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pyquant.integrations.files import write_atomic

SUFFIX = "_local"  # of a task's name, to tell it from the harness's own
HELPERS = "pyquant_tasks.py"  # beside the YAML files


@dataclass(frozen=True)
class TaskSet:
    """A local set.

    Args:
        files: where it may lie in the data folder; the first that exists is taken.
        text, target, choices: the harness's ``doc_to_text``, ``doc_to_target``, ``doc_to_choice``.
        metrics: of the harness, for the output type.
        output: the harness's ``output_type``.
    """

    files: tuple[str, ...]
    text: str
    target: str
    choices: Any = "choices"
    metrics: tuple[str, ...] = ("acc", "acc_norm")
    output: str = "multiple_choice"


TASKS: dict[str, TaskSet] = {
    "piqa": TaskSet(("piqa.jsonl",), "{{query.strip()}}\nAnswer:", "gold"),
    "arc_easy": TaskSet(("arc_easy.jsonl",), "{{query}}\nAnswer:", "gold"),
    "arc_challenge": TaskSet(("arc_challenge.jsonl",), "{{query}}\nAnswer:", "gold"),
    "openbookqa": TaskSet(("openbook_qa.jsonl", "openbookqa.jsonl"), "query", "gold"),
    "winogrande": TaskSet(("winogrande.jsonl",), "gold", "continuation", "context_options", ("acc",)),
    "boolq": TaskSet(("boolq.jsonl",), "{{query}}\nAnswer:", "gold", metrics=("acc",)),
    "hellaswag": TaskSet(("hellaswag_val.txt",), "query", "gold"),
    "lambada_openai": TaskSet(
        ("lambada_openai.jsonl",), "{{context}}", "{{' ' + continuation}}", None, ("perplexity", "acc"), "loglikelihood"
    ),
    "wikitext": TaskSet(
        ("../wikitext2/wiki.test.raw", "wiki.test.raw"), "", "", None,
        ("word_perplexity", "byte_perplexity", "bits_per_byte"), "loglikelihood_rolling",
    ),
}  # fmt: skip

# Python beside a task file is how the harness takes functions; these two are its own.
_HELPERS = '''"""The document's text as the harness's own wikitext task prepares it."""

from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

__all__ = ["process_results", "wikitext_detokenizer"]
'''


def local_sets(data: Path) -> dict[str, Path]:
    """The sets that lie in a folder: name -> file."""
    found = {}
    for name, task in TASKS.items():
        file = next((data / f for f in task.files if (data / f).is_file()), None)
        if file is not None:
            found[name] = file
    return found


def write_tasks(names: list[str], data: Path, out: Path) -> list[str]:
    """Write task files and whatever rows had to be converted.

    Args:
        names: of :data:`TASKS`, or ``all`` for every set in the folder.
        data: folder of the sets.
        out: folder for the YAML files (``NAME_local.yaml``), for rows and for the harness's cache of them.

    Returns:
        the names of the tasks in the harness, ``NAME_local``, in order.

    Raises:
        ValueError: an unknown name, or a set that is not in the folder.
    """
    sets = local_sets(data)
    if not sets:
        raise ValueError(f"{data} has none of the sets {', '.join(f for t in TASKS.values() for f in t.files)}")
    names = [n for name in names for n in (sets if name == "all" else [name])]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; with local data the tasks are {', '.join(TASKS)}")
        if name not in sets:
            raise ValueError(f"{data} has no {' or '.join(TASKS[name].files)}, which task {name} reads")
    out.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(names):
        task, rows = TASKS[name], _rows(name, sets[name], out)
        config: dict[str, Any] = {
            "task": name + SUFFIX,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(rows.resolve())},
                "cache_dir": str((out / "cache").resolve()),
            },
            "test_split": "test",
            "output_type": task.output,
            "doc_to_text": task.text,
            "doc_to_target": task.target,
        }
        if task.choices is not None:
            config["doc_to_choice"] = ["no", "yes"] if name == "boolq" else task.choices
        config["metric_list"] = [_metric(metric) for metric in task.metrics]
        config["metadata"] = {"version": 1.0}
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        if task.output == "loglikelihood_rolling":
            write_atomic(out / HELPERS, _HELPERS)
            stem = HELPERS.removesuffix(".py")
            text = text.replace("doc_to_target: ''", f"doc_to_target: !function {stem}.wikitext_detokenizer")
            text += f"process_results: !function {stem}.process_results\n"
        write_atomic(out / f"{name}{SUFFIX}.yaml", text)
    return [name + SUFFIX for name in dict.fromkeys(names)]


def _metric(name: str) -> dict[str, Any]:
    if name in ("acc", "acc_norm"):
        return {"metric": name, "aggregation": "mean", "higher_is_better": True}
    if name == "perplexity":
        return {"metric": name, "aggregation": "perplexity", "higher_is_better": False}
    return {"metric": name}


def _rows(name: str, file: Path, out: Path) -> Path:
    """The set as .jsonl: the file itself, or one converted into ``out``."""
    if name == "hellaswag":
        rows = hellaswag_rows(file)
    elif name == "wikitext":
        rows = [{"page": page} for page in articles(file.read_text(encoding="utf-8"))]
    else:
        return file
    path = out / f"{name}.jsonl"
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def hellaswag_rows(file: Path) -> list[dict[str, Any]]:
    """Rows ``{"query", "choices", "gold"}`` from six lines each: context, index of the right ending, four endings.

    Raises:
        ValueError: another number of lines, or an index that is none, with the line.
    """
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(lines) % 6:
        raise ValueError(f"{file} has {len(lines)} lines; a task takes 6, so the file is cut off")
    rows = []
    for i in range(0, len(lines), 6):
        query, gold, *choices = lines[i : i + 6]
        if gold not in ("0", "1", "2", "3"):
            raise ValueError(f"{file} line {i + 2}: {gold!r} is no index of an ending")
        rows.append({"query": query, "choices": choices, "gold": int(gold)})
    return rows


def articles(text: str) -> list[str]:
    """WikiText, raw, cut before each heading of the first level (`` = Title = ``)."""
    starts = [m.start() for m in re.finditer(r"^ = [^=\n]+ = ?\n", text, re.MULTILINE)]
    starts = [0, *starts[1:]] if starts else [0]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
