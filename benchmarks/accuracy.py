"""``python -m benchmarks.accuracy NAME=DIR ... --out FILE``: gather the reports of several ``pyquant quantize`` runs."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="name=folder that pyquant quantize wrote, all of one model and texts")
    parser.add_argument("--about", required=True, help="one sentence: the model, the texts, the windows")
    parser.add_argument("--commit", default="unknown", help="the commit that made the runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows, texts = [], None
    for run in args.runs:
        name, _, folder = run.partition("=")
        report = json.loads((Path(folder) / "report.json").read_text())
        found = {Path(r["text"]).stem: {"fp": r["fp"], "quantized": r["quantized"]} for r in report["rows"]}
        if texts is None:
            texts = list(found)
            rows.append({"recipe": "full precision", "perplexity": found})
        if list(found) != texts:
            raise SystemExit(f"{folder} was measured on {list(found)}, the first run on {texts}")
        kd = report["config"]["kd"] if report["config"]["recipe"] == "kd-qat" else None
        rows.append(
            {
                "recipe": name, "perplexity": found, "spec": report["spec"], "range": report["config"]["range"], "kd": kd,
                "seconds": report["seconds"], "max_difference": report["max_difference"],
                "versions": {k: v for k, v in report["versions"].items() if k != "platform"},
            }
        )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    meta = {
        "about": args.about, "texts": texts, "commit": args.commit, "date": datetime.date.today().isoformat(),
        "gpu": rows[-1]["versions"].get("device"),
    }  # fmt: skip
    args.out.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
