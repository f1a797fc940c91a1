"""``python -m benchmarks.plots``: draw the results in results/h200 as SVG.

linear.json becomes linear.svg, time against tokens, a panel a shape; distill.json becomes distill.svg, memory against
tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "h200"
WIDTH, HEIGHT, COLUMNS = 300, 230, 3  # of a panel, and panels beside each other
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 28, 34
LINES = {  # name in the file: (label, colour)
    "roof": ("roof", "#888888"),
    "pyquant": ("pyquant", "#0b6e4f"),
    "cublas-bf16": ("cuBLAS bf16", "#c1440e"),
    "tinygemm": ("torch tinygemm int4", "#6a4c93"),
    "humming": ("humming", "#1f77b4"),
    "gemlite": ("gemlite", "#e0a100"),
    "bitsandbytes-nf4": ("bitsandbytes NF4", "#d16ba5"),
}


def series(rows: list[dict]) -> dict[tuple[int, int], dict[str, dict[int, float]]]:
    """(K, N) -> line -> tokens -> microseconds."""
    found: dict[tuple[int, int], dict[str, dict[int, float]]] = {}
    for row in rows:
        lines = found.setdefault((row["K"], row["N"]), {})
        lines.setdefault("roof", {})[row["M"]] = row["roof_us"]
        lines.setdefault(row["impl"], {})[row["M"]] = row["us"]
    return found


def _panel(shape: tuple[int, int], lines: dict[str, dict[int, float]], x0: float, y0: float) -> list[str]:
    tokens = sorted({m for line in lines.values() for m in line})
    times = [us for line in lines.values() for us in line.values()]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))

    def at(m: float, us: float) -> tuple[float, float]:
        across = math.log(m / tokens[0]) / math.log(tokens[-1] / tokens[0])
        up = (math.log10(us) - low) / (high - low)
        return (
            round(x0 + LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(y0 + HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    parts = [f'<text x="{x0 + LEFT}" y="{y0 + 18}" font-weight="bold">K {shape[0]}, N {shape[1]}</text>']
    for power in range(low, high + 1):
        (left, y), (right, _) = at(tokens[0], 10**power), at(tokens[-1], 10**power)
        parts.append(f'<path d="M{left} {y}H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{10**power:g}</text>')
    for m in tokens[::2]:
        x, y = at(m, 10**low)
        parts.append(f'<text x="{x}" y="{y + 14}" text-anchor="middle">{m}</text>')
    for name, (_, colour) in LINES.items():
        if line := lines.get(name):
            points = " ".join("{},{}".format(*at(m, us)) for m, us in sorted(line.items()))
            dash = ' stroke-dasharray="5 3"' if name == "roof" else ""
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
    return parts


def draw(found: dict) -> str:
    """The picture, as SVG text.

    Args:
        found: a results file of ``benchmarks.run --family linear``.
    """
    panels = series(found["rows"])
    height = -(-len(panels) // COLUMNS) * HEIGHT + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMNS * WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{COLUMNS * WIDTH}" height="{height}" fill="white"/>',
    ]
    for i, (shape, lines) in enumerate(panels.items()):
        parts += _panel(shape, lines, i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT)
    x, y = LEFT, height - 14
    drawn = {name for lines in panels.values() for name in lines}
    for label, colour in (line for name, line in LINES.items() if name in drawn):
        parts.append(f'<path d="M{x} {y - 4}h22" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(f'<text x="{x + 28}" y="{y}">{label}</text>')
        x += 50 + 7 * len(label)
    parts.append(f'<text x="{x}" y="{y}">microseconds against tokens, {found["meta"]["gpu"]}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


MEMORY_LINES = {
    "pyquant": ("pyquant", "#0b6e4f"),
    "torch-eager": ("torch eager", "#c1440e"),
    "torch-compile": ("torch.compile", "#6a4c93"),
    "liger-fused-jsd": ("Liger FusedLinearJSD", "#1f6fb2"),
}


def draw_memory(found: dict) -> str:
    """Memory of the distillation loss beyond its gradients against tokens, both logarithmic, as SVG text.

    Args:
        found: a results file of ``benchmarks.run --family distill``.
    """
    rows = [r for r in found["rows"] if r["op"] == "distill memory"]
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        lines.setdefault(row["impl"], {})[row["T"]] = max(row["beyond_gradients_gib"], 0.01)
    tokens = sorted({row["T"] for row in rows})
    width, height, low, high = 640, 330, -2, math.ceil(math.log10(max(max(line.values()) for line in lines.values())))

    def at(t: float, gib: float) -> tuple[float, float]:
        across = math.log(t / tokens[0]) / math.log(tokens[-1] / tokens[0])
        up = (math.log10(gib) - low) / (high - low)
        return round(60 + across * (width - 80), 1), round(height - 70 - up * (height - 90), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for power in range(low, high + 1):
        (left, y), (right, _) = at(tokens[0], 10**power), at(tokens[-1], 10**power)
        parts.append(f'<path d="M{left} {y}H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{10**power:g}</text>')
    for t in tokens:
        x, y = at(t, 10**low)
        parts.append(f'<text x="{x}" y="{y + 15}" text-anchor="middle">{t}</text>')
    x = 60
    for name, (label, colour) in MEMORY_LINES.items():
        if line := lines.get(name):
            points = " ".join("{},{}".format(*at(t, gib)) for t, gib in sorted(line.items()))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
            parts.append(f'<path d="M{x} {height - 35}h22" stroke="{colour}" stroke-width="2.5"/>')
            parts.append(f'<text x="{x + 28}" y="{height - 31}">{label}</text>')
            x += 50 + 7 * len(label)
    about = f"GiB beyond the gradients against tokens, H {rows[0]['H']}, V {rows[0]['V']}, {found['meta']['gpu']}"
    parts.append(f'<text x="60" y="{height - 10}">{about}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    (RESULTS / "linear.svg").write_text(draw(json.loads((RESULTS / "linear.json").read_text())))
    if (RESULTS / "distill.json").is_file():
        (RESULTS / "distill.svg").write_text(draw_memory(json.loads((RESULTS / "distill.json").read_text())))


if __name__ == "__main__":
    main()
