"""The measurement of several GPUs, on two CPU processes: its numbers about time mean nothing there, the others do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.tables_several import several_table

ROOT = Path(__file__).resolve().parents[1]


def test_small_run(tmp_path: Path):
    out = tmp_path / "several.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "benchmarks.several_gpus", "--small", "--out", str(out), "--commit", "c" * 40]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text())
    assert len(found["meta"]["commit"]) == 40 and len(found["meta"]["gpus"]) == 2
    rows = found["rows"]
    assert not [r for r in rows if "failed" in r]
    steps = {r["way"]: r for r in rows if r["op"] == "kd_qat_step"}
    assert len(steps) == 8
    for way in ("replicas", "replicas, captured", "fsdp", "fsdp, gathered"):
        # bf16 weights and moments: 2^-9 a rounding; measured 3e-8 and 4e-5
        assert steps[way]["loss_difference"] < 1e-3
        assert {"speedup", "over_best", "over_same_batch"} <= steps[way].keys()
    alone, whole = steps["one"]["losses"], steps["one, all windows"]["losses"]
    assert (
        max(abs(a - b) / b for a, b in zip(alone[:3], whole[:3], strict=True)) > 1e-3
    )  # other windows are seen by this
    (logits,) = (r for r in rows if r["op"] == "logits")
    assert logits["relative"] < 1.5 * logits["noise"] < 2e-2
    assert logits["alike_on_all"]
    decoded = {(r["gpus"], r["batch"]): r for r in rows if r["op"] == "decode"}
    assert decoded.keys() == {(1, 1), (1, 3), (2, 1), (2, 3)}
    about, head, cells = several_table(found)
    assert "Logits of the cut model" in about and len(cells) == 12 and {len(c) for c in cells} == {len(head)}
