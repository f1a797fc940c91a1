"""``pyquant eval --tasks``: task files, figures equal to the harness called by hand, and paired comparisons."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny import shared
from trained import make_tiny_model, tiny_text
from typer.testing import CliRunner

from pyquant.cli import app
from pyquant.integrations.commands import load_any
from pyquant.integrations.compare import compare_table, compare_tasks, difference
from pyquant.integrations.tasks import TASKS, articles, hellaswag_rows, local_sets, write_tasks


def pyquant(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    return result


def make_sets(folder):
    """A set of each form, from the words that the tiny model knows."""
    draw = random.Random(0)
    lines = tiny_text(400, seed=3).split("\n")
    take = lambda n: [draw.choice(lines).rstrip(".") for _ in range(n)]  # noqa: E731
    folder.mkdir()
    plain = [{"query": q, "choices": take(4), "gold": draw.randrange(4)} for q in take(12)]
    forms = {
        "piqa": [{"query": f"Question: {q}\n", "choices": take(2), "gold": draw.randrange(2)} for q in take(12)],
        "arc_easy": plain, "openbook_qa": plain[:9],
        "boolq": [{"query": q, "choices": ["no", "yes"], "gold": draw.randrange(2)} for q in take(7)],
        "winogrande": [{"context_options": take(2), "continuation": take(1)[0], "gold": draw.randrange(2)} for _ in range(8)],
        "lambada_openai": [{"context": " ".join(q.split()[:-1]), "continuation": q.split()[-1]} for q in take(8)],
    }  # fmt: skip
    for name, rows in forms.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    swag = [line for q in take(6) for line in (q, str(draw.randrange(4)), *take(4))]
    (folder / "hellaswag_val.txt").write_text("\n".join(swag) + "\n")
    pages = [f" = Title {i} = \n \n {' '.join(take(3 + i))} \n" for i in range(4)]
    (folder / "wiki.test.raw").write_text(" \n" + "".join(pages))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    make_tiny_model(folder / "model")
    make_sets(folder / "data")
    return folder


# ------------------------------------------------------------------------------------------------ task files


def test_task_files(work, tmp_path):
    names = write_tasks(["all"], work / "data", tmp_path)
    assert names == [f"{n}_local" for n in TASKS if n != "arc_challenge"]  # which the folder does not have
    for name in names:
        text = (tmp_path / f"{name}.yaml").read_text()
        config = yaml.safe_load(text.replace("!function ", ""))
        assert config["task"] == name and config["dataset_path"] == "json"
    assert "doc_to_target: !function pyquant_tasks.wikitext_detokenizer" in text
    rows = [json.loads(line) for line in (tmp_path / "hellaswag.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(len(r["choices"]) == 4 for r in rows)


def test_task_files_refuse(work, tmp_path):
    with pytest.raises(ValueError, match="unknown task 'chess'"):
        write_tasks(["chess"], work / "data", tmp_path / "x")
    with pytest.raises(ValueError, match=r"has no arc_challenge.jsonl, which task arc_challenge reads"):
        write_tasks(["arc_challenge"], work / "data", tmp_path / "x")
    with pytest.raises(ValueError, match="has none of the sets"):
        write_tasks(["all"], tmp_path, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "h.txt").write_text("a\n1\nb\nc\nd\ne\nf\n")
    with pytest.raises(ValueError, match="7 lines; a task takes 6"):
        hellaswag_rows(tmp_path / "h.txt")
    (tmp_path / "h.txt").write_text("a\n4\nb\nc\nd\ne\n")
    with pytest.raises(ValueError, match="line 2: '4' is no index"):
        hellaswag_rows(tmp_path / "h.txt")


def test_articles():
    text = " \n = One = \n \n x \n = = Part = = \n y \n = Two = \n \n z \n"
    assert articles(text) == [" \n = One = \n \n x \n = = Part = = \n y \n", " = Two = \n \n z \n"]
    assert articles("no heading") == ["no heading"]


def test_the_shared_sets_are_whole():
    sets = local_sets(shared("data", "tasks"))
    assert list(sets) == list(TASKS)
    assert len(hellaswag_rows(sets["hellaswag"])) == 10042
    assert len(articles(sets["wikitext"].read_text())) == 62  # as the harness's document-level set


# ------------------------------------------------------------------------------------------------ comparing


def side(values, metric="acc", hashes=None):
    hashes = hashes or [str(i) for i in range(len(values))]
    rows = [{"task": "t", "metric": metric, "value": 0.5, "stderr": None, "documents": len(values)}]
    return {"rows": rows, "documents": {"t": {"hash": hashes, metric: values}}}


def test_differences_are_paired():
    a = [1.0, 0.0] * 50
    b = [1.0, 0.0] * 49 + [1.0, 1.0]
    row = compare_tasks(side(a), side(b))[0]
    assert row["difference"] == pytest.approx(1.0) and row["unit"] == "points"
    # one of 100 differs: sd 0.1, interval 1.96 * 0.1 / 10; unpaired it would be ten times as wide
    assert row["half"] == pytest.approx(1.96, rel=1e-6)
    assert (row["changed"], row["documents"]) == (1, 100)
    assert compare_table([row], ("a", "b"))[1][0][4:] == ["+1.00 ± 1.96 points", "no", "1/100"]


def test_perplexities_are_compared_by_their_logarithm():
    a, b = [-2.0, -3.0, -4.0], [-2.5, -3.5, -4.5]
    row = difference(a, b, "perplexity")
    assert row["difference"] == pytest.approx(50.0) and row["half"] == pytest.approx(0.0) and row["unit"] == "%"
    # documents of other lengths: log ratio = sum of differences over the sum of words, the jackknife as a reference
    draw = random.Random(1)
    a = [[-100 * draw.random(), draw.randrange(10, 200)] for _ in range(200)]
    b = [[x - words * draw.gauss(0.05, 0.1), words] for x, words in a]
    row = difference(a, b, "word_perplexity")
    pairs = list(zip(a, b, strict=True))
    ratio = lambda some: sum(x[0] - y[0] for x, y in some) / sum(x[1] for x, _ in some)  # noqa: E731
    assert row["difference"] == pytest.approx(100 * ratio(pairs))
    left = [ratio(pairs[:i] + pairs[i + 1 :]) for i in range(200)]
    jackknife = math.sqrt(199 / 200 * sum((r - sum(left) / 200) ** 2 for r in left))
    assert row["half"] == pytest.approx(100 * 1.96 * jackknife, rel=0.02)  # the two differ by terms of 1/200


def test_other_documents_are_refused():
    with pytest.raises(ValueError, match="documents that are not the same"):
        compare_tasks(side([1.0, 0.0]), side([1.0, 0.0], hashes=["0", "2"]))
    with pytest.raises(ValueError, match="no task in common"):
        compare_tasks(side([1.0]), {"rows": [], "documents": {"u": {"hash": ["0"]}}})


# ------------------------------------------------------------------------------------------------ the harness


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'pyquant[eval]')")
    from pyquant.integrations import harness

    return harness


@pytest.fixture(scope="module")
def results(harness, work):
    """Full precision and 3 bits, by the command line."""
    pyquant("quantize", work / "model", "--recipe", "rtn", "--bits", "3", "--group-size", "32", "--device", "cpu",
            "--out", work / "w3")  # fmt: skip
    for name in ("model", "w3"):
        pyquant("eval", work / name, "--tasks", "all", "--data", work / "data", "--limit", "6", "--device", "cpu",
                "--dtype", "float32", "--out", work / f"{name}-out")  # fmt: skip
    return {name: json.loads((work / f"{name}-out" / "tasks.json").read_text()) for name in ("model", "w3")}


def by_hand(harness, work, pretrained, tokenizer=None):
    """(task, metric) -> figure, from the harness's own entry point and the task files that were written."""
    simple_evaluate, hflm, task_manager = harness.harness()
    tasks = sorted(p.stem for p in (work / "model-out" / "tasks").glob("*.yaml"))
    given = {"tokenizer": tokenizer} if tokenizer is not None else {"dtype": "float32", "device": "cpu"}
    found = simple_evaluate(
        hflm(pretrained=pretrained, batch_size=5, **given), tasks=tasks, limit=6, bootstrap_iters=0,
        task_manager=task_manager(include_path=str(work / "model-out" / "tasks")),
    )["results"]  # fmt: skip
    return {
        (task.removesuffix("_local"), key.partition(",")[0]): value
        for task, values in found.items()
        for key, value in values.items()
        if isinstance(value, float) and "_stderr" not in key
    }


def figures(result):
    return {(r["task"], r["metric"]): r["value"] for r in result["rows"]}


def same(found, expected):
    # another batch size pads differently, which moves fp32 log likelihoods by about 1e-6 of their size
    return found.keys() == expected.keys() and all(found[k] == pytest.approx(v, rel=1e-4) for k, v in expected.items())


def test_figures_are_the_harness_s(harness, results, work):
    expected = by_hand(harness, work, str(work / "model"))
    assert len(expected) == 15
    assert same(figures(results["model"]), expected)
    assert not same(figures(results["w3"]), expected)  # another model has other figures
    model, tokenizer, _ = load_any(str(work / "w3"), "cpu", "float32")
    assert same(figures(results["w3"]), by_hand(harness, work, model, tokenizer))


@torch.no_grad()
def test_figures_are_the_model_s(results, work):
    """piqa once more from logits, without the harness."""
    model, tokenizer, _ = load_any(str(work / "model"), "cpu", "float32")
    right = []
    for line in (work / "data" / "piqa.jsonl").read_text().splitlines()[:6]:
        row = json.loads(line)
        context = f"{row['query'].strip()}\nAnswer:"
        sums = []
        for choice in row["choices"]:
            ids = tokenizer(f"{context} {choice}", add_special_tokens=False)["input_ids"]
            start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids))))
        right.append(float(sums.index(max(sums)) == row["gold"]))
    assert results["model"]["documents"]["piqa"]["acc"] == right
    value, error = sum(right) / 6, math.sqrt((sum(right) / 6) * (1 - sum(right) / 6) / 5)
    row = next(r for r in results["model"]["rows"] if (r["task"], r["metric"]) == ("piqa", "acc"))
    assert (row["value"], row["documents"]) == (pytest.approx(value), 6)
    assert row["stderr"] == pytest.approx(error)  # sample deviation over sqrt(n)


def test_compare(harness, results, work):
    printed = pyquant("eval", "--compare", work / "model-out", work / "w3-out", "--out", work / "both").stdout
    rows = compare_tasks(results["model"], results["w3"])
    assert {r["task"] for r in rows} == set(TASKS) - {"arc_challenge"}
    assert "word_perplexity" in printed and "piqa" in printed
    assert "Differences" in (work / "both" / "report.html").read_text()
    word = next(r for r in rows if r["metric"] == "word_perplexity")
    assert word["difference"] == pytest.approx(100 * math.log(word["b"] / word["a"]))
    # one of them evaluated now
    one = ("--tasks", "piqa", "--data", work / "data", "--device", "cpu", "--dtype", "float32")
    again = json.loads(
        pyquant("eval", "--compare", work / "model-out", work / "model", *one, "--limit", "6", "--json").stdout
    )
    assert [r["difference"] for r in again["differences"]] == [0.0, 0.0]
    assert "documents that are not the same" in pyquant(
        "eval", "--compare", work / "model-out", work / "model", *one, "--limit", "5", code=1
    ).stderr  # fmt: skip


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((), "give a model, or two with --compare"),
        (("m",), "give a text to measure perplexity on, or --tasks"),
        (("m", "t.txt", "--tasks", "piqa"), "not both"),
        (("m", "--compare", "a", "b"), "not both"),
        (("m", "--tasks", "piqa", "--data", "nowhere"), "nowhere has none of the sets"),
        (("m", "--tasks", "piqa", "--limit", "0"), "limit=0 must be at least 1"),
        (("--compare", "a", "b"), "no task was given"),
    ],
)
def test_refusals(harness, args, sentence):
    assert sentence in pyquant("eval", *args, code=1).stderr


def test_the_harness_is_imported_in_one_file():
    root = Path(__file__).resolve().parents[1] / "pyquant"
    pattern = re.compile(r"^ +(from|import) lm_eval", re.MULTILINE)
    assert [p.name for p in root.rglob("*.py") if pattern.search(p.read_text())] == ["harness.py"]


def test_without_the_harness_it_says_what_to_install(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = pyquant("eval", tmp_path, "--tasks", "piqa", code=1)
    assert "pip install 'pyquant[eval]'" in found.stderr
