"""Charts as SVG and PNG: they are well formed, and lengths and places are those of the values."""

import math
import re
import struct
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from peftkit import ContractError
from peftkit.report_page import (
    Bar,
    Bars,
    Group,
    Line,
    Lines,
    Part,
    Stack,
    to_png,
    to_svg,
    write_chart,
)
from peftkit.report_page.charts import log_ticks, ticks

BARS = Bars(
    "Steps <s>",
    [
        Group("seconds", [Bar("peftkit", 1.0, "1.0 s", True), Bar("plain PEFT", 2.0, "2.0 s")]),
        Group("memory", [Bar("peftkit", 3.0, "3 GiB", True), Bar("plain PEFT", 4.0, "4 GiB")]),
    ],
)
LINES = Lines(
    "loss", "step", [Line("a", [1, 2, 3], [4.0, math.nan, 1.0]), Line("b", [1, 3], [2, 2])]
)
STACK = Stack(
    "memory",
    [Part("weights", 6.0, "6 GiB"), Part("activations", 2.0, "2 GiB")],
    [Part("T4", 16.0, "16 GiB")],
)


def drawn(chart, file=True):
    return ElementTree.fromstring(
        to_svg(chart, file=file).replace(' xmlns="http://www.w3.org/2000/svg"', "")
    )


@pytest.mark.parametrize("chart", [BARS, LINES, STACK], ids=["bars", "lines", "stack"])
def test_charts_are_well_formed_and_stay_inside(chart):
    root = drawn(chart)
    _, _, width, height = map(float, root.get("viewBox").split())
    assert root.find("title").text == chart.title
    for shape in root.iter():
        for name, end in (
            ("x", width),
            ("x1", width),
            ("x2", width),
            ("y", height),
            ("y1", height),
        ):
            if shape.get(name) is not None:
                assert 0 <= float(shape.get(name)) <= end, (shape.tag, shape.attrib)
        if shape.tag == "rect":
            assert float(shape.get("x")) + float(shape.get("width")) <= width + 0.01
    assert "<style>" in to_svg(chart, file=True)
    assert "<style>" not in to_svg(chart)


def test_bars_are_as_long_as_their_values():
    widths = [float(rect.get("width")) for rect in drawn(BARS).iter("rect")]
    assert widths[0] / widths[1] == pytest.approx(1 / 2, rel=1e-3)
    assert widths[2] / widths[3] == pytest.approx(3 / 4, rel=1e-3)
    assert [rect.get("class") for rect in drawn(BARS).iter("rect")] == ["f0", "other"] * 2
    half = Bars("x", [Group("%", [Bar("a", 50, "50 %")], full=100)])
    whole = Bars("x", [Group("%", [Bar("a", 100, "50 %")], full=100)])
    (a,), (b,) = (
        [float(r.get("width")) for r in drawn(chart).iter("rect")] for chart in (half, whole)
    )
    assert a / b == pytest.approx(1 / 2, rel=1e-3)


def test_curves_leave_out_what_is_not_finite_and_logarithms_what_is_not_positive():
    points = [line.get("points").split() for line in drawn(LINES).iter("polyline")]
    assert [len(p) for p in points] == [2, 2]
    y = [float(p.split(",")[1]) for p in points[0]]
    assert y[0] < y[1]  # 4 is above 1
    log = Lines(
        "loss", "step", [Line("a", [1, 2, 3, 4], [100.0, 10.0, 0.0, 1.0])], logarithmic=True
    )
    (line,) = drawn(log).iter("polyline")
    heights = [float(p.split(",")[1]) for p in line.get("points").split()]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert "no values" in to_svg(Lines("loss", "step", []))


def test_long_curves_are_thinned_with_both_ends():
    line = Line("a", list(range(5001)), [float(i) for i in range(5001)])
    (drawn_line,) = drawn(Lines("x", "step", [line])).iter("polyline")
    points = drawn_line.get("points").split()
    assert len(points) == 400
    assert points[-1] == "414.0,28.0"


def test_the_line_of_the_card_is_where_its_memory_is():
    root = drawn(STACK)
    parts = [rect for rect in root.iter("rect") if rect.get("height") == "34"]
    (mark,) = [line for line in root.iter("line") if line.get("class") == "mark"]
    end = float(parts[1].get("x")) + float(parts[1].get("width"))
    assert end / float(mark.get("x1")) == pytest.approx(8 / 16, rel=1e-3)
    text = "".join(root.itertext())
    assert "T4: 16 GiB" in text
    assert "75.0%" in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 5, 10]), (0.1, 0.48, [0.1, 0.2, 0.3, 0.4]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_logarithmic_ticks():
    assert log_ticks(0.01, 20) == pytest.approx([0.01, 0.1, 1, 10])
    assert log_ticks(0.8, 6) == pytest.approx([1, 2, 5])


@pytest.mark.parametrize("chart", [BARS, LINES, STACK], ids=["bars", "lines", "stack"])
def test_png_is_a_picture(chart):
    pytest.importorskip("matplotlib")
    content = to_png(chart)
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width == 7 * 150
    assert height > 200


def test_without_matplotlib_png_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ContractError, match=r"PNG files need matplotlib; install it .* or write an \.svg"
    ):
        write_chart(BARS, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
    assert write_chart(BARS, tmp_path / "deep" / "a.svg").read_text().startswith("<svg")


def test_other_pictures_are_refused(tmp_path):
    with pytest.raises(ContractError, match=re.escape("a.pdf has no known kind of picture")):
        write_chart(BARS, tmp_path / "a.pdf")
