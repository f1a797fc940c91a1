"""Block-wise quantization as it is run: from a checkpoint to a folder, killed and resumed, on several processes."""

from __future__ import annotations

import json
import random
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, some_tokens, tiny_llama
from torch import distributed as dist
from torch import multiprocessing
from trained import make_tiny_model, tiny_text
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pyquant.cli import app
from pyquant.formats.spec import QuantSpec
from pyquant.integrations import blockwise as files
from pyquant.integrations.config import load_config
from pyquant.integrations.pipeline import quantize
from pyquant.integrations.streaming import Streamed
from pyquant.integrations.transformers import load_model
from pyquant.recipes.blockwise import blockwise
from pyquant.recipes.rtn import dequantize_model
from pyquant.recipes.settings import Settings

SETTINGS = {"blockwise.steps": 8, "blockwise.windows": 16, "blockwise.seq_len": 24, "blockwise.batch_size": 4}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A trained model and texts."""
    folder = tmp_path_factory.mktemp("blockwise")
    make_tiny_model(folder / "model", steps=60)
    (folder / "calibration.txt").write_text(tiny_text(400, 1))
    (folder / "evaluation.txt").write_text(tiny_text(100, 2))
    return folder


def config(work: Path, out: Path, **changes):
    fields = {
        "model": str(work / "model"), "out": str(out), "recipe": "blockwise", "bits": 3, "group_size": 32,
        "calibration": str(work / "calibration.txt"), "eval": (str(work / "evaluation.txt"),), "eval_windows": 8,
        "eval_length": 32, **SETTINGS, **changes,
    }  # fmt: skip
    return load_config(None, fields)


def weights(folder: Path) -> bytes:
    return b"".join(f.read_bytes() for f in sorted(folder.glob("*.safetensors")))


def test_streaming_and_memory_give_the_same_checkpoint_and_it_loads_elsewhere(work, tmp_path):
    a = quantize(config(work, tmp_path / "a", symmetric=True))
    b = quantize(config(work, tmp_path / "b", **{"blockwise.stream": True, "blockwise.activations": "disk"}))
    assert a.max_difference == b.max_difference == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    for row, other in zip(a.rows, b.rows, strict=True):
        assert row["quantized"] == other["quantized"]
        assert row["fp"] == pytest.approx(other["fp"], rel=1e-5)  # in other batches
        assert row["quantized"] < 1.3 * row["fp"]
    assert [row["blocks"] for row in a.blocks] == [[0, 0], [1, 1]]
    assert {r["name"]: r["relative_error"] for r in a.layers} == pytest.approx(
        {r["name"]: r["relative_error"] for r in b.layers}
    )
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    tokens = some_tokens(2, 16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    ours = load_model(tmp_path / "a", torch.float32)
    dequantize_model(ours)  # the same products of the same matrices: no difference at all
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_killed_at_random_it_resumes_to_the_same_checkpoint(work, tmp_path):
    """SIGKILL at ten random moments; what is published in the end is the uninterrupted run's, byte by byte."""
    fields = {"eval": (), "blockwise.window": 2, "blockwise.stride": 1, "blockwise.steps": 24}
    began = time.monotonic()
    quantize(config(work, tmp_path / "whole", **fields))
    seconds = time.monotonic() - began
    server = multiprocessing.get_context("forkserver")  # forks a process in which no thread was ever started
    server.set_forkserver_preload(["pyquant.integrations.pipeline"])
    draw, kills, attempt = random.Random(11), 0, 0
    while kills < 10:
        attempt += 1
        out = tmp_path / f"killed{attempt}"
        while not out.exists():
            child = server.Process(target=_child, args=(config(work, out, resume=True, **fields), tmp_path / "why.txt"))
            child.start()
            if kills < 10:  # not every kill comes in time: the run may have ended
                child.join(draw.uniform(0.3, 1.2) * (seconds + 0.5))
                child.kill()
            child.join()
            kills += child.exitcode == -signal.SIGKILL
            assert child.exitcode in (0, -signal.SIGKILL), (tmp_path / "why.txt").read_text()
        assert weights(out) == weights(tmp_path / "whole")


def _child(settings, why: Path) -> None:
    torch.set_num_threads(1)
    try:
        quantize(settings)
    except BaseException:
        why.write_text(traceback.format_exc())
        raise


def test_a_resumed_run_with_other_inputs_is_refused(tmp_path):
    tokens, spec = some_tokens(4, 8), QuantSpec(4, 32)

    def keeper(settings: Settings, resume: bool) -> files.Windows:
        return files.Windows(tmp_path, files.fingerprint(spec, settings, tokens, "m", "cpu", torch.float32), resume)

    keeper(Settings(), False).save(0, {"a": torch.arange(3)}, {"blocks": [0, 0]})
    tensors, row = keeper(Settings(), True).load(0)
    assert tensors["a"].tolist() == [0, 1, 2] and row == {"blocks": [0, 0]}
    with pytest.raises(ValueError, match=r"other inputs: settings \(was .*steps"):
        keeper(Settings(steps=3), True)
    (tmp_path / "window-0000.safetensors").write_bytes(b"torn")
    assert keeper(Settings(), True).load(0) is None
    keeper(Settings(), False)
    assert not list(tmp_path.glob("window-*"))


def test_what_cannot_be_streamed_or_held_is_refused_early(work, tmp_path):
    folder = save_tiny(tmp_path / "odd")
    index = folder / "model.safetensors"
    from safetensors.torch import load_file, save_file

    state = load_file(index)
    state["model.layers.1.mlp.up_gate.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, index, {"format": "pt"})
    with pytest.raises(ValueError, match=r"it has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        Streamed(folder, "cpu")
    with pytest.raises(ValueError, match="stride=3 must divide window=2"):
        quantize(config(work, tmp_path / "x", **{"blockwise.window": 2, "blockwise.stride": 3}))
    assert not (tmp_path / "x").exists()


def test_the_command_line(work, tmp_path):
    base = ["--calibration", str(work / "calibration.txt"), "--calibration-windows", "16", "--calibration-length", "24"]
    base += ["--batch-size", "4", "--steps", "6", "--eval", str(work / "evaluation.txt"), "--eval-windows", "8"]
    out = tmp_path / "q"
    args = ["quantize", str(work / "model"), "--out", str(out), "--recipe", "blockwise", "--bits", "3"]
    args += ["--group-size", "32", "--lookahead", "end", "--window", "2", "--eval-length", "32", "--stream", *base]
    ran = CliRunner().invoke(app, args)
    assert ran.exit_code == 0, ran.output
    report = json.loads((out / "report.json").read_text())
    assert report["config"]["blockwise"]["lookahead"] == "end" and report["config"]["blockwise"]["steps"] == 6
    assert report["blocks"][0]["blocks"] == [0, 1]
    ran = CliRunner().invoke(app, [*args[: -len(base)], "--lookahead", "soon", "--overwrite", *base])
    assert ran.exit_code == 1 and "lookahead" in ran.output


def test_ablate_makes_one_table_and_goes_on_where_it_was(work, tmp_path):
    args = ["ablate", str(work / "model"), "--calibration", str(work / "calibration.txt"), "--out", str(tmp_path / "o")]
    args += [
        "--eval",
        str(work / "evaluation.txt"),
        "--bits",
        "2",
        "--group-size",
        "32",
        "--seeds",
        "3",
        "--steps",
        "8",
    ]
    args += ["--calibration-windows", "16", "--calibration-length", "24", "--batch-size", "4", "--eval-windows", "4"]
    args += ["--arm", "rtn", "--arm", "single", "--arm", "far=ahead-end,kl:0.5,end_mse:0.5"]
    ran = CliRunner().invoke(app, [*args, "--budget-seconds", "0"])
    assert ran.exit_code == 0 and "Not all arms were run" in ran.output
    ran = CliRunner().invoke(app, args)
    assert ran.exit_code == 0, ran.output
    assert "far against single" in ran.output and "95 % interval" in ran.output
    rows = json.loads((tmp_path / "o" / "rows.json").read_text())["rows"]
    assert [(r["arm"], r["seed"]) for r in rows if r["seed"] == 0] == [("rtn", 0), ("single", 0), ("far", 0)]
    assert len(rows) == 7  # rounding to nearest has one seed
    assert len({r["perplexity"]["evaluation"] for r in rows}) == 7
    before = (tmp_path / "o" / "rows.json").read_bytes()
    CliRunner().invoke(app, args)
    assert (tmp_path / "o" / "rows.json").read_bytes() == before
    for wrong, what in [("nonsense", "unknown"), ("x=single,kll:1", "no setting"), ("x=none,kl:1", "builds on")]:
        ran = CliRunner().invoke(app, [*args, "--arm", wrong])
        assert ran.exit_code == 1 and what in ran.output
    ran = CliRunner().invoke(app, [*args, "--batch-size", "8"])
    assert ran.exit_code == 1 and "another run" in ran.output


# ------------------------------------------------------------------------------------------------ processes


def _process(rank: int, size: int, folder: str, settings: Settings, start: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{start}", rank=rank, world_size=size)
    result = blockwise(tiny_llama(initializer_range=0.1), some_tokens(16, 24), QuantSpec(3, 32), settings)
    state = {f"{b}.{n}": r.weight() for b, block in result.blocks.items() for n, r in block.layers.items()}
    torch.save(state, f"{folder}/{start}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("start", ["mse", "gptq"])
def test_two_processes_find_what_one_finds(start, tmp_path):
    # GPTQ alone: its few codes that sums in another order turn over would be followed by all later training
    steps = 20 if start == "mse" else 0
    settings = Settings(batch_size=4, steps=steps, start=start, window=2, stride=1, keep_best=False)
    multiprocessing.spawn(_process, (2, str(tmp_path), settings, start), nprocs=2)
    a, b = (torch.load(tmp_path / f"{start}-{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)  # the processes agree to the bit
    one = blockwise(tiny_llama(initializer_range=0.1), some_tokens(16, 24), QuantSpec(3, 32), settings)
    for i, block in one.blocks.items():
        for name, r in block.layers.items():
            got, want = a[f"{i}.{name}"], r.weight()
            # sums in another order: the sign of a gradient near 0 may differ, and its weight's rounding with it
            assert ((got - want).abs() > 1e-3 * want.abs().max()).float().mean() < 0.02, name
    if not steps:
        return
    other = blockwise(
        tiny_llama(initializer_range=0.1),
        some_tokens(16, 24),
        QuantSpec(3, 32),
        Settings(**vars(settings) | {"seed": 1}),
    )
    far = [
        (a[f"{i}.{n}"] - r.weight()).abs().gt(1e-3 * r.weight().abs().max()).float().mean()
        for i, block in other.blocks.items()
        for n, r in block.layers.items()
    ]
    assert max(far) > 0.02  # another order of windows is seen by this measure
