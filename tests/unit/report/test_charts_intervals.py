"""Points with intervals stay within their frame and survive what data can be."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from cloister.report import _charts

FIGURES = st.floats(-1e6, 1e6)
ROWS = st.lists(
    st.tuples(st.text(max_size=30), FIGURES, st.one_of(st.none(), st.floats(0, 10))), min_size=1, max_size=6
)


@given(ROWS, st.booleans(), st.one_of(st.none(), st.just(0.0)))
def test_points_and_their_intervals_stay_inside(rows, percent, mark):
    lines = [
        (name, value, None if reach is None else value - reach, None if reach is None else value + reach, "x")
        for name, value, reach in rows
    ]
    svg = str(_charts.intervals(lines, label="x", percent=percent, mark=mark))
    points = [float(x) for x in re.findall(r'cx="([-\d.]+)"', svg)]
    bars = re.findall(r'd="M([-\d.]+) [\d.]+v10m0 -5H([-\d.]+)m', svg)
    assert len(points) == len(rows) and len(bars) == sum(reach is not None for *_, reach in rows)
    for x in (*points, *(float(end) for bar in bars for end in bar)):
        assert 0 <= x <= 640
    assert svg.count("stroke-dasharray") == (mark is not None)


def test_the_axis_encloses_both_ends():
    for low, high in ((0.2, 0.9), (-0.36, 0.5), (3.0, 3.0), (0.0, 0.0), (-7.0, -2.0)):
        ticks = _charts._ticks_around(low, high, 5)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 12, (low, high, ticks)


def test_text_is_escaped():
    svg = str(_charts.intervals([("<b>", 0.5, 0.4, 0.6, "<i>")], label='"x"', percent=True))
    assert "<b>" not in svg and "<i>" not in svg and "&#34;x&#34;" in svg
