"""The table of tiles, what `pyquant bench --tune` keeps, and what is made of a file that is none."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

pytest.importorskip("triton")

from pyquant.integrations.bench import bench, find_shapes, tune
from pyquant.kernels import tiles
from pyquant.kernels import tune as search
from pyquant.kernels.tiles import CANDIDATES, TABLE, Tile, choose

SHAPES = [(4096, 4096), (14336, 4096)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.forget()
    yield tmp_path
    tiles.forget()


def by(which: str, fast: Tile, seconds: float = 0.5):
    """A timer in whose eyes one tile of one kernel takes a part of the others' time."""
    return lambda kernel, m, shape, tile: (seconds if (kernel, tile) == (which, fast) else 1.0) * m * shape[0]


def test_every_number_of_tokens_has_a_tile():
    for (kernel, kind), rows in TABLE.items():
        assert rows[-1][0] is None
        assert [most for most, _ in rows] == list(CANDIDATES[kernel])
        for m in (1, 16, 17, 32, 33, 64, 65, 5000):
            tile = choose(kernel, m, kind)
            assert tile.tokens in (16, 32, 64, 128)
            assert m > 64 or m <= tile.tokens, "the weight is unpacked once for few tokens"


def test_the_fastest_tile_is_kept_for_this_gpu_only(cache):
    fast = CANDIDATES["forward"][32][0]
    rows, report = search.tune(by("forward", fast), SHAPES, "sm90")
    file = tiles.save("GPU A", rows, "3.6.0")
    assert file == cache / "pyquant" / "tiles.json"
    assert choose("forward", 20, "sm90", "GPU A") == fast
    assert choose("forward", 20, "sm90", "GPU B") == choose("forward", 20, "sm90") != fast
    assert choose("forward", 1, "sm90", "GPU A") == choose("forward", 1, "sm90")
    assert [r["ratio"] for r in report if r["tile"] != r["table_tile"]] == [pytest.approx(0.5)]
    tiles.save("GPU B", {"backward": [(None, Tile(64, 1, 1, 8, 3, 0))]}, "3.6.0")
    assert choose("forward", 20, "sm90", "GPU A") == fast, "another GPU's tiles stay"
    assert choose("backward", 9, "sm90", "GPU B").warps == 8


def test_a_gain_within_the_noise_changes_nothing():
    for fast in CANDIDATES["backward"][16]:
        rows, _ = search.tune(by("backward", fast, 0.98), SHAPES, "sm90")
        assert rows["backward"] == list(TABLE["backward", "sm90"])


def test_a_tile_that_cannot_run_is_left_out():
    def measure(kernel, m, shape, tile):
        if tile in CANDIDATES["forward"][16] and tile.programs == 1056:
            raise search.triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    rows, report = search.tune(measure, SHAPES, "other")
    assert rows["forward"] == list(TABLE["forward", "other"])
    assert {r["tokens"]: r["failed"] for r in report if r["kernel"] == "forward"} == {16: 2, 32: 0, 64: 0, None: 0}


def test_running_out_of_memory_is_no_fault_of_a_tile():
    own = [tile for rows in TABLE.values() for _, tile in rows]

    def measure(kernel, m, shape, tile):
        if tile not in own:
            raise RuntimeError("CUDA out of memory")
        return 1.0

    with pytest.raises(RuntimeError, match="out of memory"):
        search.tune(measure, SHAPES, "sm90")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({"version": 2, "gpus": {}}),
        json.dumps({"gpus": {}}),
        json.dumps({"version": 1, "gpus": {"G": {"forward": [[None, [16, 1, 1, 4]]]}}}),
        json.dumps({"version": 1, "gpus": {"G": {"forward": [[None, [24, 1, 1, 4, 3, 0]]]}}}),
        json.dumps({"version": 1, "gpus": {"G": {"forward": [[16, [16, 1, 1, 4, 3, 0]]]}}}),
        json.dumps({"version": 1, "gpus": {"G": []}}),
    ],
)
def test_a_file_that_is_none_is_left_alone_with_one_warning(cache, text):
    (cache / "pyquant").mkdir()
    (cache / "pyquant" / "tiles.json").write_text(text)
    with pytest.warns(UserWarning, match=r"tiles\.json are left alone"):
        assert choose("forward", 1, "sm90", "G") == TABLE["forward", "sm90"][0][1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("forward", 1, "sm90", "G")
        choose("backward", 1, "sm90", "G")
    assert (cache / "pyquant" / "tiles.json").read_text() == text


def test_shapes_as_typed():
    assert find_shapes(None, ["4096x14336", "5X7"]) == [(4096, 14336), (5, 7)]
    for wrong in ("4096", "x3", "0x5", "3x-1", "axb"):
        with pytest.raises(ValueError, match="is not NxK"):
            find_shapes(None, [wrong])
    with pytest.raises(ValueError, match="needs a model folder"):
        find_shapes(None, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    for run in (bench, tune):
        with pytest.raises(ValueError, match="torch sees no GPU here"):
            run(SHAPES)


@pytest.mark.gpu
def test_tunes_on_the_gpu_and_keeps_the_choice(cache, monkeypatch):
    """Two tiles a range over real kernels, timed as a user's are."""
    few = {kernel: {most: own[:2] for most, own in ranges.items()} for kernel, ranges in CANDIDATES.items()}
    monkeypatch.setattr(search, "CANDIDATES", few)
    report, file = tune([(512, 1024)])
    assert sum(r["failed"] for r in report) == 0, report
    name = tiles.gpu(torch.device("cuda", torch.cuda.current_device()))[1]
    held = json.loads(file.read_text())["gpus"][name]
    assert set(held) == {"forward", "backward"}
    for kernel, rows in held.items():
        assert [tuple(tile) for _, tile in rows] == [r["tile"] for r in report if r["kernel"] == kernel]
