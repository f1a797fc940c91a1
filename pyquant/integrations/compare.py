"""Two evaluations of the same documents, compared document by document: differences with 95 % intervals. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyquant.integrations.spread import spread


def compare_tasks(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What b changes against a, for each task and metric that has a value for each document.

    Both models answer the same questions, so the scatter that the questions have in common cancels: the interval is that
    of the mean of differences, not of a difference of means.

    Args:
        a, b: as :func:`pyquant.integrations.harness.score` returns them.

    Returns:
        ``{"task", "metric", "a", "b", "difference", "half", "unit", "documents", "changed"}``: the two figures; b - a in
        ``points`` (of 100) for accuracies, the change of the perplexity in ``%`` (100 ln(b / a)) for those; half of the
        95 % interval (Student's, normal beyond 11 documents; for texts of different lengths that of a ratio
        estimator), None for one document; documents; how many of them score differently.

    Raises:
        ValueError: no task in common, or other documents (another limit or another set).
    """
    rows = []
    common = [task for task in a["documents"] if task in b["documents"]]
    if not common:
        raise ValueError(f"no task in common: {', '.join(a['documents'])} and {', '.join(b['documents'])}")
    figures = [{(r["task"], r["metric"]): r["value"] for r in side["rows"]} for side in (a, b)]
    for task in common:
        one, two = a["documents"][task], b["documents"][task]
        if one["hash"] != two["hash"]:
            raise ValueError(
                f"{task} was run on {len(one['hash'])} and on {len(two['hash'])} documents that are not the same; use the "
                "same set and limit for both"
            )
        for metric, values in one.items():
            if metric == "hash" or metric not in two:
                continue
            row = {
                "task": task,
                "metric": metric,
                "a": figures[0].get((task, metric)),
                "b": figures[1].get((task, metric)),
            }
            rows.append({**row, **difference(values, two[metric], metric), "documents": len(values)})
    return rows


def difference(a: Sequence[Any], b: Sequence[Any], metric: str) -> dict[str, Any]:
    """Mean paired difference with half of its 95 % interval; see :func:`compare_tasks`.

    Args:
        a, b: a document each: a score, a log likelihood (``perplexity``), or ``[sum of log likelihoods, weight]``.
        metric: decides what the values are: names that end in ``perplexity`` are log likelihoods.
    """
    changed = sum(x != y for x, y in zip(a, b, strict=True))
    if isinstance(a[0], list | tuple):
        total = sum(weight for _, weight in a)
        gaps = [x - y for (x, _), (y, _) in zip(a, b, strict=True)]
        ratio = sum(gaps) / total
        left = [gap - ratio * weight for gap, (_, weight) in zip(gaps, a, strict=True)]
        scaled = spread([len(a) * value / total for value in left])  # its mean is 0, its interval that of the ratio
        found: dict[str, float | None] = {"mean": ratio, "half": scaled["half"]}
    elif metric.endswith("perplexity"):
        found = spread([x - y for x, y in zip(a, b, strict=True)])
    else:
        found = spread([y - x for x, y in zip(a, b, strict=True)])
    unit = "%" if metric.endswith("perplexity") else "points"
    half = found["half"]
    return {
        "difference": 100 * found["mean"],
        "half": None if half is None or math.isnan(half) else 100 * half,
        "unit": unit,
        "changed": changed,
    }


def compare_table(rows: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of :func:`compare_tasks`."""
    cells = []
    for r in rows:
        accuracy = r["unit"] == "points"
        values = [f"{100 * v:.2f} %" if accuracy else f"{v:.3f}" for v in (r["a"], r["b"])]
        half = "" if r["half"] is None else f" ± {r['half']:.2f}"
        sure = "-" if r["half"] is None else "yes" if abs(r["difference"]) > r["half"] else "no"
        cells.append(
            [
                r["task"],
                r["metric"],
                *values,
                f"{r['difference']:+.2f}{half} {r['unit']}",
                sure,
                f"{r['changed']}/{r['documents']}",
            ]
        )
    return ["task", "metric", *names, "difference (95 %)", "beyond it", "changed"], cells


def score_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of one evaluation: value and standard error of each metric."""
    cells = []
    for r in found["rows"]:
        scale, digits = (100, 2) if r["metric"] in ("acc", "acc_norm", "exact_match") else (1, 3)
        error = "-" if r["stderr"] is None else f"{scale * r['stderr']:.{digits}f}"
        unit = " %" if scale == 100 else ""
        count = "-" if r["documents"] is None else str(r["documents"])
        cells.append([r["task"], r["metric"], f"{scale * r['value']:.{digits}f}{unit}", error, count])
    return ["task", "metric", "value", "standard error", "documents"], cells
