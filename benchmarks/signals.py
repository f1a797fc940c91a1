"""``python -m benchmarks.signals DATA --out FILE``: signal propagation on the 28 M parameter model, with its pictures.

DATA holds ``models/`` and ``data/`` (the shared data). The work folder keeps every finished arm, so a killed run goes on;
``--summarize-only`` makes FILE from what is there. Beside FILE the pictures are written, as SVG.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.ptq import commit
from pyquant.analysis.verdict import by_kind, suggestion, verdict
from pyquant.integrations.events import Event
from pyquant.integrations.machine import quiet
from pyquant.integrations.signals import SignalConfig, analyze
from pyquant.integrations.signals_report import conclusions, overall, pictures
from pyquant.integrations.spread import spread
from pyquant.report import panel_figure, save_figure

PICTURES = {"Squared gradient norms": "norms", "Gradients against full precision": "deviation"}
PICTURES |= {"Outputs against full precision": "snr", "Squared gradient norms over training": "training"}


def summarize(held: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """What README and a reader need of the rows of :func:`pyquant.integrations.signals.analyze`: means over seeds."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in held["rows"]:
        arms.setdefault(row["arm"], []).append(row)
    found = []
    for arm, rows in arms.items():
        cells = [by_kind(row["layers"]) for row in rows]
        kinds = {}
        for kind in cells[0]:
            values = {k: [c[kind][k] for c in cells if c[kind][k] is not None] for k in cells[0][kind]}
            kinds[kind] = {k: float(f"{sum(v) / len(v):.5g}") if v else None for k, v in values.items()}
            names = {r["name"] for r in rows[0]["layers"] if r["kind"] == kind}
            spikes = [max((v for n, v in row["spikes"].items() if n in names and v), default=None) for row in rows]
            kinds[kind]["spike"] = sum(spikes) / len(spikes) if None not in spikes else None
        losses = {key: spread([row["loss"][key] for row in rows]) for key in ("kl", "ce")}
        found.append({"arm": arm, "seeds": len(rows), "loss": losses, "kinds": kinds})
    untrained = [by_kind(row["layers"]) for row in arms.get("ptq", ())]
    tests = verdict(held["rows"])
    return {
        "meta": meta, "rows": found, "tests": tests, "freeze": suggestion(untrained) if untrained else [],
        "overall": overall(held["rows"]), "conclusions": conclusions(held["rows"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with models/ and data/")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--work", type=Path, help="folder of finished arms (FILE.work)")
    parser.add_argument("--model", default="classics-llama-28m")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--freeze", nargs="*", default=["v_proj,o_proj"], help="an arm each, comma-separated patterns")
    parser.add_argument("--summarize-only", action="store_true")
    parser.add_argument("--commit", help="of the working tree, where git does not know it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    quiet()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    work = args.work or args.out.with_suffix(".work")
    if args.summarize_only:
        held = json.loads((work / "rows.json").read_text())
    else:
        config = SignalConfig(
            str(args.data / "models" / args.model), str(args.data / "data" / "classics" / "calibration.txt"), args.bits,
            args.group_size, steps=args.steps, batch_size=args.batch_size, seq_len=args.seq_len, seeds=args.seeds,
            freezes=tuple(tuple(f.split(",")) for f in args.freeze), device=args.device,
        )  # fmt: skip

        def say(event: Event) -> None:
            if event.done in (0, event.total) or event.done % 20 == 0:
                print(event.stage, f"{event.done}/{event.total}", event.note, flush=True)

        held = analyze(config, work, say)
    keep = ("spec", "steps", "batch_size", "seq_len", "probe_batches", "lr", "scale_lr", "warmup_steps", "loss", "rule")
    meta = {"model": args.model, **{key: held["meta"][key] for key in keep}}
    meta |= {"gpu": held["meta"]["versions"]["device"], "torch": held["meta"]["versions"]["torch"]}
    meta |= {"commit": args.commit or commit(), "date": datetime.date.today().isoformat()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = summarize(held, meta)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no matplotlib here: --summarize-only makes the pictures from the work folder elsewhere")
    else:
        for panels in pictures(held["rows"]):
            save_figure(panel_figure(panels), args.out.with_name(f"{args.out.stem}-{PICTURES[panels.title]}.svg"))
    print("\n".join(found["conclusions"]))


if __name__ == "__main__":
    main()
