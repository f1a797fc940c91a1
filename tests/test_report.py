"""report.html stands alone, escapes what it is given, and shows a picture."""

import base64
import re

import pytest

from pyquant.report import Report, layer_figure, render, write_report

LAYERS = [
    {"name": f"model.layers.{i}.{kind}", "relative_error": 0.1 + 0.01 * i, "sqnr_db": 20.0}
    for i in range(3)
    for kind in ("self_attn.q_proj", "mlp.down_proj")
]
CURVE = [{"step": i, "loss": 3.0 - 0.1 * i, "kl": 0.5, "ce": 2.5, "lr": 1e-4} for i in range(1, 6)]


@pytest.fixture
def report():
    return Report(
        title="a <b>model</b> in W4",
        lead=["round & about"],
        tiles=[("1.2 MB", "was 4 MB")],
        columns=["text", "full precision", "quantized"],
        rows=[["books.txt", "10.000", "10.500"]],
        cost=["It took 3 s."],
        kept={"lm_head": "excluded by name"},
        layers={"rtn": LAYERS},
        curves={"rtn": CURVE},
        samples=[("Written by it", "once upon <time>")],
        config={"bits": 4, "kd": {"steps": 5}},
        versions={"torch": "2"},
        command="pyquant quantize x --out y",
    )


def pictures(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_the_page_needs_nothing_else(report, tmp_path):
    write_report(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    without_pictures = re.sub(r'src="data:image/png;base64,[^"]+"', "", page)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|src=|href=", without_pictures)
    assert "color-scheme: light dark" in page
    assert 'name="viewport"' in page


def test_the_pictures_are_pictures(report):
    found = pictures(render(report))
    assert len(found) == 2, "the layers and the losses"
    assert all(data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000 for data in found)


def test_a_picture_follows_its_data(report):
    before = pictures(render(report))
    report.layers = {"rtn": [{**row, "relative_error": 0.5} for row in LAYERS]}
    after = pictures(render(report))
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_no_data_no_picture(report):
    report.layers, report.curves = {"rtn": []}, {"rtn": []}
    assert not pictures(render(report))


def test_texts_are_escaped_and_all_there(report):
    page = render(report)
    assert "<b>model</b>" not in page
    assert "a &lt;b&gt;model&lt;/b&gt; in W4" in page
    for part in ("round &amp; about", "1.2 MB", "books.txt", "10.500", "It took 3 s.", "excluded by name", "steps=5"):
        assert part in page, part
    assert "pyquant quantize x --out y" in page


def test_several_runs_share_one_picture_each(report):
    report.layers = {"rtn": LAYERS, "kd": LAYERS}
    report.curves = {"a": CURVE, "b": CURVE[:1]}
    assert len(pictures(render(report))) == 2


def test_long_labels_leave_the_axes_their_room():
    figure = layer_figure({f"KD-QAT W3 per channel, variant {i}": LAYERS for i in range(4)})
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_legend().get_window_extent().width < figure.bbox.width
    assert axes.get_window_extent().width > 0.8 * figure.bbox.width
