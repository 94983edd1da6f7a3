"""Charts as inline SVG: no script, no image file, no font of its own; text stays text and prints sharp.

Every chart has a role and a label that say in words what it shows. Colours stay apart in grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

INK, QUIET, GRID = "#1f2430", "#667085", "#e4e7ec"
ACCENT = "#0b6e75"
PALETTE = ("#0b6e75", "#e08a1e", "#7a5cc0", "#98a2b3", "#3b82c4", "#c2410c", "#5b9a3c", "#b4568f")

Point = tuple[float, float]


def bars(
    rows: Sequence[tuple[str, float, str]], *, label: str, top: float, highlight: int | None = 0, width: int = 640
) -> Markup:
    """Horizontal bars, one line each: (name, value, value as text). `top` is the value of the full width."""
    right, height = 82, 30
    # About 7 units a letter; a name that is longer than the room is better cut than the bars squeezed away.
    left = min(width // 2, 20 + 7.4 * max(len(name) for name, _, _ in rows))
    parts = []
    for i, (name, value, shown) in enumerate(rows):
        y = i * height
        strong = i == highlight
        n = max(2.0, (width - left - right) * min(1.0, value / top if top > 0 else 0.0))
        fill, weight = (ACCENT, 600) if strong else ("#b8c0cc", 400)
        parts.append(
            f'<text x="{left - 12:.1f}" y="{y + 19}" text-anchor="end" font-weight="{weight}">{escape(name)}</text>'
            f'<rect x="{left:.1f}" y="{y + 5}" width="{n:.1f}" height="{height - 11}" rx="3" fill="{fill}"/>'
            f'<text x="{left + n + 8:.1f}" y="{y + 19}" font-weight="{weight}">{escape(shown)}</text>'
        )
    return _svg(width, len(rows) * height, label, parts)


def lines(
    series: Sequence[tuple[str, Sequence[Point]]], *, label: str, x_name: str, y_name: str, marks: Iterable[float] = ()
) -> Markup:
    """Curves over a common grid; the first is drawn strong, with its raw values faint behind a running mean."""
    width, height, left, bottom, top, right = 500, 290, 40, 44, 14, 14
    points = [point for _, curve in series for point in curve]
    x_ticks = _ticks(0, max((x for x, _ in points), default=1), 6)
    y_ticks = _ticks(0, max((y for _, y in points), default=1), 5)
    x_max, y_max = max(x_ticks[-1], *(x for x, _ in points), 1e-9), max(y_ticks[-1], 1e-9)

    def place(x: float, y: float) -> Point:
        return left + (width - left - right) * x / x_max, top + (height - top - bottom) * (1 - min(y, y_max) / y_max)

    parts = []
    for tick in y_ticks:
        _, y = place(0, tick)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="{QUIET}">{tick:g}</text>')
    for tick in x_ticks:
        x, y = place(tick, 0)
        if x <= width - right + 1:
            parts.append(f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle" fill="{QUIET}">{tick:g}</text>')
    for mark in marks:
        x, y = place(mark, 0)
        parts.append(f'<path d="M{x:.1f} {top}V{y:.1f}" stroke="{QUIET}" stroke-dasharray="2 4"/>')
    for i, (name, curve) in reversed(list(enumerate(series))):
        color = PALETTE[i % len(PALETTE)]
        parts.append(f"<g><title>{escape(name)}</title>")
        if i == 0:
            parts.append(_path(curve, place, color, width=1, opacity=0.35))
        parts.append(_path(_running_mean(curve), place, color, width=2.4 if i == 0 else 1.4, opacity=1))
        parts.append("</g>")
    parts.append(f'<text x="{width - right}" y="{height - 6}" text-anchor="end" fill="{QUIET}">{escape(x_name)}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}" fill="{QUIET}">{escape(y_name)}</text>')
    return _svg(width, height, label, parts)


def intervals(
    rows: Sequence[tuple[str, float, float | None, float | None, str]],
    *,
    label: str,
    percent: bool,
    mark: float | None = None,
    width: int = 640,
) -> Markup:
    """A point with its interval on each line: (name, value, low, high, value as text), over one axis.

    Args:
        percent: whether the axis counts in hundredths.
        mark: where a dotted line stands, such as at no difference.
    """
    right, height, bottom = 96, 30, 30
    left = min(width // 2, 20 + 7.4 * max(len(name) for name, *_ in rows))
    known = [x for _, value, low, high, _ in rows for x in (value, low, high) if x is not None]
    ends = [*known, *([mark] if mark is not None else [])]
    ticks = _ticks_around(min(ends), max(ends), 3)  # more would write over each other
    start, span = ticks[0], ticks[-1] - ticks[0]

    def place(x: float) -> float:
        return left + (width - left - right) * (x - start) / span

    total = len(rows) * height
    parts = []
    for tick in ticks:
        shown = f"{100 * tick:g} %" if percent else f"{tick:g}"
        x = place(tick)
        parts.append(f'<path d="M{x:.1f} 0V{total}" stroke="{GRID}"/>')
        parts.append(f'<text x="{x:.1f}" y="{total + 18}" text-anchor="middle" fill="{QUIET}">{shown}</text>')
    if mark is not None:
        parts.append(f'<path d="M{place(mark):.1f} 0V{total}" stroke="{QUIET}" stroke-dasharray="2 4"/>')
    for i, (name, value, low, high, shown) in enumerate(rows):
        y = i * height + height / 2
        parts.append(f'<text x="{left - 12:.1f}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        if low is not None and high is not None:
            parts.append(
                f'<path d="M{place(low):.1f} {y - 5}v10m0 -5H{place(high):.1f}m0 -5v10" stroke="{ACCENT}"'
                ' stroke-width="1.6" fill="none"/>'
            )
        parts.append(f'<circle cx="{place(value):.1f}" cy="{y}" r="4.5" fill="{ACCENT}"/>')
        parts.append(f'<text x="{width - right + 12}" y="{y + 4}">{escape(shown)}</text>')
    return _svg(width, total + bottom, label, parts)


def columns(
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None]]],
    *,
    label: str,
    top: float,
    percent: bool,
    width: int = 500,
) -> Markup:
    """Upright bars in groups, one bar of each series in every group; a missing value leaves a gap."""
    height, left, bottom, above = 290, 46, 34, 20
    inner = height - bottom - above
    parts = []
    for tick in _ticks(0, top, 5):
        y = above + inner * (1 - tick / top)
        shown = f"{100 * tick:g} %" if percent else f"{tick:g}"
        parts.append(f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="{QUIET}">{shown}</text>')
    room = (width - left) / max(1, len(groups))
    bar = min(38.0, room * 0.8 / max(1, len(series)))
    for g, group in enumerate(groups):
        middle = left + room * (g + 0.5)
        parts.append(f'<text x="{middle:.1f}" y="{height - 10}" text-anchor="middle">{escape(group)}</text>')
        for s, (name, values) in enumerate(series):
            value = values[g]
            if value is None:
                continue
            x = middle + (s - len(series) / 2) * bar
            y = above + inner * (1 - min(1.0, value / top))
            shown = f"{100 * value:.0f}" if percent else f"{value:.3g}"
            parts.append(
                f"<g><title>{escape(group)}, {escape(name)}: {shown}{' %' if percent else ''}</title>"
                f'<rect x="{x + 1.5:.1f}" y="{y:.1f}" width="{bar - 3:.1f}" height="{above + inner - y:.1f}" rx="2"'
                f' fill="{PALETTE[s % len(PALETTE)]}"/>'
                f'<text x="{x + bar / 2:.1f}" y="{y - 5:.1f}" text-anchor="middle" font-size="11">{shown}</text></g>'
            )
    return _svg(width, height, label, parts)


def strip(parts_of_whole: Sequence[tuple[str, float, str, str]], *, label: str) -> Markup:
    """One bar cut into its parts, left to right in order of time: (name, value, value as text, colour)."""
    width, height = 1000, 34
    total = sum(value for _, value, _, _ in parts_of_whole) or 1.0
    x, parts = 0.0, []
    for name, value, shown, color in parts_of_whole:
        n = width * value / total
        parts.append(
            f"<g><title>{escape(name)}: {escape(shown)}</title>"
            f'<rect x="{x:.1f}" width="{max(1.0, n - 2):.1f}" height="{height}" rx="3" fill="{color}"/></g>'
        )
        x += n
    return _svg(width, height, label, parts, stretch=True)


def part_color(i: int) -> str:
    """The colour of the i-th part or series, for legends."""
    return PALETTE[i % len(PALETTE)]


def _svg(width: float, height: float, label: str, parts: Iterable[str], *, stretch: bool = False) -> Markup:
    ratio = ' preserveAspectRatio="none" class="strip"' if stretch else ""
    return Markup(  # noqa: S704 - every text above went through escape()
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}"{ratio}'
        f' font-size="13" fill="{INK}">{"".join(parts)}</svg>'
    )


def _path(
    curve: Sequence[Point], place: Callable[[float, float], Point], color: str, *, width: float, opacity: float
) -> str:
    spots = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
    return (
        f'<polyline points="{spots}" fill="none" stroke="{color}" stroke-width="{width}" stroke-opacity="{opacity}"'
        ' stroke-linejoin="round"/>'
    )


def _running_mean(curve: Sequence[Point]) -> list[Point]:
    """Exponential mean over about a thirtieth of the curve, unbiased at its start; short curves stay as they are."""
    if len(curve) < 30:
        return list(curve)
    keep = max(0.5, 1 - 30 / len(curve))
    mean, weight, smooth = 0.0, 0.0, []
    for x, y in curve:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smooth.append((x, mean / weight))
    return smooth


def _ticks(low: float, high: float, n: int) -> list[float]:
    """About `n` round numbers from `low` to the first one that reaches `high`."""
    span = high - low
    if not math.isfinite(span) or span < 1e-12:  # Nothing to scale, and no power of ten below it is sure to exist.
        return [low, low + 1]
    raw = span / n
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw * 0.999)
    count = math.ceil(span / step - 1e-9)
    return [round(low + i * step, 10) for i in range(count + 1)]


def _ticks_around(low: float, high: float, n: int) -> list[float]:
    """About `n` round numbers that enclose both ends, wherever they lie."""
    if high - low < 1e-6 * max(1.0, abs(low), abs(high)):
        pad = max(0.05 * abs(low), 0.01)
        low, high = low - pad, high + pad
    raw = (high - low) / n
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
