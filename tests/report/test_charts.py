"""Charts are well-formed, place points where they belong, and escape names."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenry.report import charts
from tokenry.report.numbers import readable

values = st.floats(1e-3, 1e6, allow_nan=False)
names = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12)


def parse(svg):
    return ElementTree.fromstring(f"<div>{svg}</div>")


@given(st.dictionaries(names, st.tuples(values, values), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_scatter_is_well_formed_and_inside(points, log_x, log_y):
    tree = parse(charts.scatter(points, "x", "y", log_x=log_x, log_y=log_y))
    circles = tree.findall(".//circle")
    assert len(circles) == len(points)
    for circle in circles:
        assert charts.LEFT - 1 <= float(circle.get("cx")) <= charts.WIDTH
        assert 0 <= float(circle.get("cy")) <= charts.HEIGHT - charts.BOTTOM + 1


def test_scatter_keeps_order():
    tree = parse(charts.scatter({"low": (1, 1), "high": (10, 10)}, "x", "y"))
    low, high = tree.findall(".//circle")
    assert float(low.get("cx")) < float(high.get("cx")) and float(low.get("cy")) > float(high.get("cy"))


def test_bars_are_proportional():
    tree = parse(charts.bars({"a": 1.0, "b": 2.0}, "value", spread={"b": 0.1}))
    a, b = (float(r.get("width")) for r in tree.findall(".//rect"))
    assert b == pytest.approx(2 * a, rel=0.02)


def test_negative_bars_begin_at_zero():
    tree = parse(charts.bars({"a": -1.0, "b": 1.0}, "value"))
    a, b = tree.findall(".//rect")
    assert float(a.get("x")) + float(a.get("width")) == pytest.approx(float(b.get("x")), abs=0.2)


def test_all_negative_bars():
    assert len(parse(charts.bars({"a": -4.0, "b": -2.0}, "log error")).findall(".//rect")) == 2


@given(st.dictionaries(names, st.lists(st.tuples(values, values), min_size=1, max_size=5), min_size=1, max_size=12))
def test_lines_are_well_formed(series):
    tree = parse(charts.lines(series, "size", "cost"))
    assert len(tree.findall(".//polyline")) == len(series)


@pytest.mark.parametrize(("low", "high"), [(5.2, 9.3), (1.1, 1.4), (0.3, 40.0), (1e-3, 1e5)])
def test_logarithmic_axes_have_ticks(low, high):
    tree = parse(charts.lines({"a": [(1.0, low), (2.0, high)]}, "x", "y"))
    assert len([text for text in tree.findall(".//text[@class='tick']") if text.get("text-anchor") == "end"]) >= 2


def test_more_lines_than_colours_can_be_told_apart():
    tree = parse(charts.lines({str(i): [(1.0, i + 1.0), (2.0, i + 2.0)] for i in range(12)}, "x", "y"))
    assert len({line.get("class") for line in tree.findall(".//polyline")}) == 12


def test_stacked_shares_fill_the_row():
    tree = parse(charts.stacked({"GPT-2": {"English": 3.0, "code": 1.0}}, "shares"))
    english, code = (float(r.get("width")) for r in tree.findall(".//rect"))
    assert english == pytest.approx(3 * code, rel=0.01)


def test_names_are_escaped():
    assert "<script>" not in charts.bars({"<script>": 1.0}, "<b>")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (31.0, "31.0"), (1.0, "1.00"), (1, "1"), (12345, "12345"), (123456, "123 k"), (26341656, "26.3 M"), (0.98765, "0.988"), (float("inf"), "∞"),
     (float("nan"), "–"), ("yes", "yes"), (False, "no"), (-0.5, "-0.500"), (1e-5, "1×10⁻⁵")],
)  # fmt: skip
def test_numbers_are_readable(value, text):
    assert readable(value) == text
