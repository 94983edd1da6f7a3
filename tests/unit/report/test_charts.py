"""Charts stay within their frame and survive what data can be."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.report import _charts

NUMBERS = st.floats(0, 1e12)


@pytest.mark.parametrize(("high", "n"), [(1.0, 5), (3.7, 5), (1380, 6), (1e-6, 5), (7, 6)])
def test_ticks_are_round_and_reach_the_top(high: float, n: int):
    ticks = _charts._ticks(0, high, n)
    assert ticks[0] == 0 and ticks[-1] >= high * 0.999 and 2 <= len(ticks) <= 2 * n + 1


@pytest.mark.parametrize("high", [0.0, -1.0, float("inf"), float("nan")])
def test_ticks_of_nothing(high: float):
    assert _charts._ticks(0, high, 5) == [0, 1]


@given(st.lists(st.tuples(st.text(max_size=5), NUMBERS, st.text(max_size=5)), min_size=1, max_size=5), NUMBERS)
def test_bars_stay_inside(rows, top):
    svg = str(_charts.bars(rows, label="x", top=top))
    width = 640
    for x, n in re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', svg):
        assert float(x) + float(n) <= width


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=50), min_size=1, max_size=3)
)
def test_curves_stay_inside(curves):
    svg = str(
        _charts.lines([(str(i), c) for i, c in enumerate(curves)], label="x", x_name="s", y_name="l", marks=[0.5])
    )
    for points in re.findall(r'points="([^"]*)"', svg):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 500 and 0 <= y <= 290


def test_a_missing_value_leaves_a_gap():
    svg = str(_charts.columns(["a", "b"], [("s", [0.5, None])], label="x", top=1.0, percent=True))
    assert svg.count("<rect") == 1


def test_the_running_mean_is_unbiased_at_its_start():
    curve = [(float(i), 2.0) for i in range(200)]
    assert all(abs(y - 2.0) < 1e-9 for _, y in _charts._running_mean(curve))
