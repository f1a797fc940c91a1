"""Tasks of lm-evaluation-harness over any model folder, full precision or quantized (the extra ``pyquant[eval]``).

The harness scores our loaded model object through its own ``HFLM``, so a figure here is the harness's figure. What is
added: local task files (:mod:`pyquant.integrations.tasks`), and the score of every document kept, which is what a paired
comparison of two models needs (:mod:`pyquant.integrations.compare`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from torch import nn

from pyquant.integrations.commands import load_any
from pyquant.integrations.events import Clock, OnEvent
from pyquant.integrations.machine import versions
from pyquant.integrations.tasks import SUFFIX, write_tasks

# What a document contributes to each metric; the others are functions of these (or rank-based, without a pairing).
PER_DOCUMENT = ("acc", "acc_norm", "perplexity", "word_perplexity", "byte_perplexity", "exact_match")

BOOTSTRAP = 1000  # resamples for the standard error of lambada's perplexity; the harness's 100,000 take minutes


def evaluate_tasks(
    path: str,
    tasks: Sequence[str],
    data: Path | None = None,
    out: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    fewshot: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Score a model folder.

    Args:
        path: folder of a full-precision or quantized model.
        tasks: names; with ``data`` those of :data:`pyquant.integrations.tasks.TASKS` or ``all``, without it the harness's
            own, which it fetches from the network (such as ``mmlu``).
        data: folder of local sets.
        out: folder for the task files; needed with ``data``.
        limit: documents of each task, from its beginning; None takes all.
        batch_size: requests at once.
        seed: of Python, numpy, torch and of the few-shot examples.
        fewshot: examples before each question; None is the task's own number (0 for local sets).
        device, dtype: as for ``pyquant eval``.
        on_event: receives progress.

    Returns:
        see :func:`score`, with ``model``, ``quantized``, ``device``, ``dtype`` and ``versions``.

    Raises:
        ImportError: lm_eval is not installed.
        FileNotFoundError, ValueError: as :func:`load_any` and :func:`write_tasks`; limit or batch_size below 1.
    """
    harness()  # before anything is loaded
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not tasks:
        raise ValueError("no task was given")
    clock = Clock(on_event)
    include = None
    if data is not None:
        if out is None:
            raise ValueError("local sets need a folder for their task files")
        tasks, include = write_tasks(list(tasks), data, out), out
    with clock("load the model"):
        model, tokenizer, quantized = load_any(path, device, dtype)
    with clock("evaluate tasks") as tick:
        found = score(model, tokenizer, tasks, include, limit, batch_size, seed, fewshot, tick)
    p = next(model.parameters())
    facts = {
        "model": path,
        "quantized": quantized,
        "device": p.device.type,
        "dtype": str(p.dtype).removeprefix("torch."),
    }
    return {**facts, **found, "seconds": round(sum(clock.seconds.values()), 1), "versions": versions(p.device.type)}


def score(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    fewshot: int | None = None,
    tick: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Score a loaded causal LM, task after task.

    Args:
        model, tokenizer: of transformers; the model where it is, in its dtype.
        tasks: names in the harness.
        include: folder of task files; with it, the harness's own tasks are not known.
        limit, batch_size, seed, fewshot: as :func:`evaluate_tasks`.
        tick: ``tick(done, total, note)`` after each task.

    Returns:
        ``{"rows", "documents", "settings"}``: rows ``{"task", "metric", "value", "stderr", "documents"}``, stderr None
        where the harness has none; ``documents`` task -> metric -> value of each document in order (a number, or ``[sum of
        log likelihoods, weight]``), with ``hash``, a digest of each document.
    """
    simple_evaluate, language_model, task_manager = harness()
    manager = task_manager(include_path=None if include is None else str(include), include_defaults=include is None)
    model.eval()
    wrapped = language_model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    rows: list[dict[str, Any]] = []
    documents: dict[str, dict[str, list[Any]]] = {}
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    for number, task in enumerate(tasks, 1):
        with _calm():
            found = simple_evaluate(
                wrapped,
                tasks=[task],
                num_fewshot=fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=BOOTSTRAP,
                **seeds,
            )
        for name, values in found["results"].items():  # a group such as mmlu has a row for each of its parts
            label = name.removesuffix(SUFFIX)
            count = found.get("n-samples", {}).get(name, {}).get("effective")
            for key, value in values.items():
                metric, _, form = key.partition(",")
                if not form or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = values.get(f"{metric}_stderr,{form}")
                row = {"task": label, "metric": metric, "value": value}
                row |= {"stderr": error if isinstance(error, int | float) else None, "documents": count}
                rows.append(row)
        for name, samples in (found.get("samples") or {}).items():
            samples = sorted(samples, key=lambda s: s["doc_id"])
            kept: dict[str, list[Any]] = {"hash": [s["doc_hash"][:16] for s in samples]}
            for metric in PER_DOCUMENT:
                if samples and metric in samples[0]:
                    kept[metric] = [list(v) if isinstance(v := s[metric], tuple | list) else float(v) for s in samples]
            documents[name.removesuffix(SUFFIX)] = kept
        if tick is not None:
            tick(number, len(tasks), task.removesuffix(SUFFIX))
    settings = {"limit": limit, "batch_size": batch_size, "seed": seed, "fewshot": fewshot}
    return {"rows": rows, "documents": documents, "settings": settings}


def harness() -> tuple[Any, Any, Any]:
    """The harness's ``simple_evaluate``, ``HFLM`` and ``TaskManager``.

    Raises:
        ImportError: with what to install.
    """
    try:
        with _calm():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"evaluating tasks needs lm_eval ({error}): pip install 'pyquant[eval]'") from None
    return simple_evaluate, HFLM, TaskManager


@contextmanager
def _calm() -> Any:
    """The harness's bars and remarks kept back; its errors come as exceptions."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        import datasets

        datasets.disable_progress_bars()
    except ImportError:
        pass
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield
