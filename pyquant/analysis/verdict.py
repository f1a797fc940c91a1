"""From measured signals to sentences: which projections stand out, and what to freeze. Numbers alone, no torch.

The claim of arXiv 2403.18159, as far as it is known to us, is that the value and output projections have high gradient
norms, are the vulnerable ones, and that freezing them brings the signals of training close to full precision. Here it
is taken apart into tests that can fail (:func:`verdict`). Which quantity makes a projection vulnerable is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
CLAIMED = ("v_proj", "o_proj")
EXCESS = 1.5  # of a kind's share of the gradient deviation over its share of the weights: from here on it stands out


def geometric(values: Iterable[float]) -> float:
    """The geometric mean; 0 where a value is 0."""
    values = list(values)
    if not values or min(values) <= 0:
        return 0.0
    return math.exp(sum(math.log(v) for v in values) / len(values))


def by_kind(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Rows of one model, a layer each (see :func:`pyquant.analysis.signal.compare`, joined with outputs), to one a kind.

    Returns:
        kind -> ``norm_sq``, ``ratio`` (geometric means over blocks), ``cosine``, ``deviation``, ``snr_db``, ``mean``,
        ``variance`` (means), ``weights`` (sum) and ``excess``: the kind's share of sum ||g - g_fp||^2 over its share of
        the weights, 1 where every weight bears the same. None where no row has the value.
    """
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    out: dict[str, dict[str, float | None]] = {}
    for kind, found in kinds.items():
        cell: dict[str, float | None] = {"weights": sum(r["weights"] for r in found)}
        for key in ("norm_sq", "ratio", "cosine", "deviation", "snr_db", "mean", "variance"):
            values = [r[key] for r in found if r.get(key) is not None]
            mean = geometric if key in ("norm_sq", "ratio") else lambda v: sum(v) / len(v)
            cell[key] = mean(values) if values else None
        out[kind] = cell
    noise = {kind: sum(_noise(r) for r in found) for kind, found in kinds.items()}
    all_noise, all_weights = sum(noise.values()), sum(c["weights"] for c in out.values())
    for kind, cell in out.items():
        cell["excess"] = noise[kind] / all_noise / (cell["weights"] / all_weights) if all_noise else None
    return out


def _noise(row: Row) -> float:
    """||g - r||^2 of a layer, from deviation = ||g - r||^2 / ||r||^2 and ratio = ||g||^2 / ||r||^2."""
    if not row.get("deviation") or not row.get("ratio"):
        return 0.0
    return row["deviation"] * row["norm_sq"] / row["ratio"]


def spike(values: Sequence[float]) -> float | None:
    """The largest of some squared norms over their median; None without any or for a median of 0."""
    if not values:
        return None
    ordered = sorted(values)
    half = len(ordered) // 2
    median = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return ordered[-1] / median if median > 0 else None


def attention_kinds(rows: Sequence[Row], claimed: Sequence[str] = CLAIMED) -> list[str]:
    """The kinds that stand in the same module as the claimed ones, in the model's order; empty where one is missing."""
    parents = {r["name"].rpartition(".")[0] for r in rows if r["kind"] in claimed}
    kinds = list(dict.fromkeys(r["kind"] for r in rows if r["name"].rpartition(".")[0] in parents))
    return kinds if set(claimed) <= set(kinds) else []


def top(cells: Mapping[str, Mapping[str, float | None]], key: str, kinds: Sequence[str], count: int) -> list[str]:
    """The ``count`` kinds with the largest value of a key, largest first; kinds without a value are left out."""
    known = [kind for kind in kinds if cells[kind].get(key) is not None]
    return sorted(known, key=lambda kind: -cells[kind][key])[:count]


def suggestion(seeds: Sequence[Mapping[str, Mapping[str, float | None]]]) -> list[str]:
    """Kinds to freeze, by the measurement: in each seed they bear :data:`EXCESS` times the gradient deviation that
    their weights would at random. At most half of the weights, the largest excess first; empty when none stands out.

    Args:
        seeds: :func:`by_kind` of the quantized, untrained model, one a seed.
    """
    kinds = [k for k in seeds[0] if all((s[k]["excess"] or 0) >= EXCESS for s in seeds)]
    kinds.sort(key=lambda k: -sum(s[k]["excess"] for s in seeds))
    total, chosen, taken = sum(c["weights"] for c in seeds[0].values()), [], 0.0
    for kind in kinds:
        taken += seeds[0][kind]["weights"]
        if taken > total / 2:
            break
        chosen.append(kind)
    return chosen


def verdict(rows: Sequence[Row], claimed: Sequence[str] = CLAIMED) -> list[dict[str, Any]]:
    """The claim about value and output projections, test by test.

    Args:
        rows: all measurements, ``{"arm", "seed", "layers": [rows], "spikes": {name: value}, "curves": {kind: values}}``;
            the arms used are ``fp``, ``ptq``, ``fp, trained``, ``kd-qat`` and ``kd-qat, frozen v_proj,o_proj`` (tests of
            missing ones are left out).

    Returns:
        ``{"test", "holds": "yes" | "no" | "in n of m seeds", "figures"}``, a sentence each; empty for a model that has no
        such projections.
    """
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    kinds = attention_kinds(next(iter(arms.values()))[0]["layers"], claimed)
    if not kinds:
        return []
    names = " and ".join(claimed)
    out = []

    def judge(test: str, results: Sequence[bool], figures: str) -> None:
        if not results:
            return
        good = sum(results)
        holds = "yes" if good == len(results) else "no" if not good else f"in {good} of {len(results)} seeds"
        out.append({"test": test, "holds": holds, "figures": figures})

    def ranking(arm: str, key: str, test: str) -> None:
        cells = [by_kind(row["layers"]) for row in arms[arm]]
        tops = [set(top(c, key, kinds, len(claimed))) == set(claimed) for c in cells]
        means = {k: _mean([c[k][key] for c in cells]) for k in kinds}
        judge(test, tops, ", ".join(f"{k} {v:.3g}" for k, v in sorted(means.items(), key=lambda i: -i[1])))

    if "fp" in arms:
        ranking("fp", "norm_sq", f"in full precision {names} have the largest squared gradient norms of the attention")
    if "ptq" in arms:
        ranking("ptq", "norm_sq", f"quantized, untrained: {names} have the largest squared gradient norms")
        ranking("ptq", "ratio", f"quantized, untrained: the norms of {names} grow the most against full precision")
        ranking(
            "ptq",
            "deviation",
            f"quantized, untrained: the gradients of {names} deviate the most, relative to their size",
        )
    if "kd-qat" in arms:
        worst = [_worst_spikes(row, kinds) for row in arms["kd-qat"]]
        means = {k: _mean([w[k] for w in worst]) for k in kinds}
        judge(
            f"in KD-QAT {names} have the highest spikes (largest over median squared norm of a layer)",
            [set(sorted(w, key=lambda k: -w[k])[: len(claimed)]) == set(claimed) for w in worst],
            ", ".join(f"{k} {v:.3g}" for k, v in sorted(means.items(), key=lambda i: -i[1])),
        )
        if "fp, trained" in arms:
            pairs = [[_worst_spikes(r, kinds) for r in pair] for pair in _paired(arms["kd-qat"], arms["fp, trained"])]
            judge(
                f"the spikes of {names} in KD-QAT exceed those of full-precision training on the same batches",
                [all(w[k] > c[k] for k in claimed) for w, c in pairs],
                ", ".join(
                    f"{k} {_mean([w[k] for w, _ in pairs]):.3g} against {_mean([c[k] for _, c in pairs]):.3g}"
                    for k in claimed
                ),
            )
    frozen = f"kd-qat, frozen {','.join(claimed)}"
    if "kd-qat" in arms and frozen in arms:
        both = _paired(arms[frozen], arms["kd-qat"])
        rest = [k for k in by_kind(both[0][0]["layers"]) if k not in claimed] if both else []
        for key, what in (("deviation", "gradients"), ("snr_db", "outputs")):
            values = [[_mean([by_kind(r["layers"])[k][key] for k in rest]) for r in pair] for pair in both]
            unit = " dB" if key == "snr_db" else ""
            judge(
                f"after training, {what} of the other projections are closer to full precision with ov-freeze than without",
                [(a > b) if key == "snr_db" else (a < b) for a, b in values],
                f"{'SNR' if unit else 'relative deviation'} {_mean([a for a, _ in values]):.3g}{unit} with, "
                f"{_mean([b for _, b in values]):.3g}{unit} without",
            )
        controls = {row["seed"]: row for row in arms.get("fp, trained", ())}
        gaps = [
            [_gap(row, controls[row["seed"]], rest) for row in pair] for pair in both if pair[0]["seed"] in controls
        ]
        if gaps:
            judge(
                "during training, gradient norms of the other projections are closer to those of full-precision training "
                "with ov-freeze than without",
                [a < b for a, b in gaps],
                f"apart by {100 * _mean([a for a, _ in gaps]):.2g} % with, {100 * _mean([b for _, b in gaps]):.2g} % without",
            )
    return out


def _paired(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of two arms, seed by seed."""
    other = {row["seed"]: row for row in second}
    return [(row, other[row["seed"]]) for row in first if row["seed"] in other]


def _gap(row: Row, control: Row, kinds: Sequence[str]) -> float:
    """How far the gradient norms (not squared) of some kinds lie apart over training: mean |ln(a / b)|."""
    pairs = [pair for k in kinds for pair in zip(row["curves"][k], control["curves"][k], strict=False)]
    return _mean([abs(math.log(a / b)) / 2 for a, b in pairs if a > 0 and b > 0])


def _worst_spikes(row: Row, kinds: Sequence[str]) -> dict[str, float]:
    """Kind -> the highest spike among its layers."""
    places = {r["name"]: r["kind"] for r in row["layers"]}
    found = {k: [v for n, v in row["spikes"].items() if places[n] == k and v is not None] for k in kinds}
    return {k: max(v, default=0.0) for k, v in found.items()}


def _mean(values: Iterable[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else float("nan")
