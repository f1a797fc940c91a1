"""Means, differences and intervals over the seeds of a grid of arms; numbers alone, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

# Student's t, two-sided 95 %, for 1, 2, .. degrees of freedom; beyond the table the normal value is close enough.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard deviation and 95 % interval over seeds of each arm and format.

    Returns:
        ``{"spec", "arm", "seeds", "texts": {name: {"mean", "sd", "half"}}, "seconds"}``; ``half`` is half the width of
        Student's interval for the mean, None for one seed.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["spec"], row["arm"]), []).append(row)
    out: list[dict[str, Any]] = []
    for (spec, arm), found in groups.items():
        texts = {name: spread([r["perplexity"][name] for r in found]) for name in found[0]["perplexity"]}
        seconds = sum(r["seconds"] for r in found) / len(found)
        out.append({"spec": spec, "arm": arm, "seeds": len(found), "texts": texts, "seconds": seconds})
    return out


def differences(rows: Iterable[dict[str, Any]], base: str = "single") -> list[dict[str, Any]]:
    """What each arm changes against ``base``, seed by seed: log perplexity, in percent (negative is better).

    Pairs share calibration windows and their order, so much of the seeds' scatter cancels.

    Returns:
        ``{"spec", "arm", "seeds", "texts": {name: {"mean", "sd", "half"}}}``.
    """
    rows = list(rows)
    bases = {(r["spec"], r["seed"]): r["perplexity"] for r in rows if r["arm"] == base}
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for r in rows:
        against = bases.get((r["spec"], r["seed"]))
        if against is not None and r["arm"] != base:
            change = {name: 100 * math.log(value / against[name]) for name, value in r["perplexity"].items()}
            groups.setdefault((r["spec"], r["arm"]), []).append(change)
    return [
        {"spec": s, "arm": a, "seeds": len(c), "texts": {name: spread([x[name] for x in c]) for name in c[0]}}
        for (s, a), c in groups.items()
    ]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, sample standard deviation and half width of the 95 % interval of the mean."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return {"mean": mean, "sd": None, "half": None}
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    return {"mean": mean, "sd": sd, "half": t * sd / math.sqrt(n)}
