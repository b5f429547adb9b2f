"""Drawings: every series with its name, ids of their own, files as matplotlib writes them."""

import re
from xml.etree import ElementTree

from maestro_kernels.measure import plots
from maestro_kernels.measure import report as html


def test_drawings_of_one_title_have_their_own_ids():
    def ids(y):
        series = {"a": [plots.Point(1, 2), plots.Point(4, y)]}
        svg = plots.inline(plots.line_plot(series, title="T", xlabel="x", ylabel="y", log=False))
        return set(re.findall(r'\bid="([^"]+)"', svg))

    assert ids(3.0) == ids(3.0)
    assert not ids(3.0) & ids(3.01)


def test_line_plot_draws_every_series_with_its_name():
    points = [plots.Point(1, 2, 1.5, 2.5), plots.Point(4, 3)]
    drawing = plots.line_plot(
        {"ours": points, "a & b": points}, title='T "q"', xlabel="x", ylabel="y", log=False
    )
    svg = html.figure(drawing, "x < y")
    assert '<div role="img" aria-label="T &#34;q&#34;"><svg ' in svg
    assert "<figcaption>x &lt; y</figcaption>" in svg
    assert "ours" in svg
    assert "a &amp; b" in svg
    assert set(plots.SERIES[:2]) <= set(re.findall(r"#\w{6}", svg))


def test_a_drawing_is_a_file_as_matplotlib_writes_it():
    def draw():
        points = [plots.Point(1, 2), plots.Point(4, 3)]
        return plots.line_plot({"a & b": points}, title="T & q", xlabel="x", ylabel="y")

    text = plots.standalone(draw())
    root = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{name}svg"
    assert root.findtext(f"{name}title") == "T & q"
    assert any(element.text == "a & b" for element in root.iter(f"{name}text"))
    assert plots.CARD in text
    assert not re.search(r"var\(|<date|matplotlib\.org", text)
    assert text == plots.standalone(draw())


def test_levels_are_dashed_lines_across():
    points = {"one": [plots.Point(0, 1), plots.Point(1, 2)]}
    drawing = plots.line_plot(points, title="T", xlabel="x", ylabel="y", log=False, levels=[1.5])
    assert "stroke-dasharray" in plots.standalone(drawing)
    plain = plots.line_plot(points, title="T", xlabel="x", ylabel="y", log=False)
    assert "stroke-dasharray" not in plots.standalone(plain)


def test_curves_are_thinned_named_shortly_and_eight_to_a_drawing():
    line = [(float(x), 2.0 * x) for x in range(1000)]
    long = [f"bert.encoder.layer.{i}.attention.output.dense" for i in range(12)]
    drawn = plots.curves(dict.fromkeys([*long, "head"], line), title="Ranks", xlabel="step")
    assert [d.get_label() for d in drawn] == ["Ranks 1 and on", "Ranks 9 and on"]
    shown = [axes for d in drawn for axes in d.axes[0].get_lines()]
    short = [f"ber.enc.lay.{i}.att.out.dense" for i in range(12)]
    assert [axes.get_label() for axes in shown] == [*short, "head"]
    for axes in shown:
        xs = list(axes.get_xdata())
        assert 150 <= len(xs) <= 240
        assert max(xs) == 999
    (alone,) = plots.curves({"loss": line[:3]}, title="Loss", xlabel="step")
    assert alone.get_label() == "Loss"
    assert len(alone.axes[0].get_lines()[0].get_xdata()) == 3
