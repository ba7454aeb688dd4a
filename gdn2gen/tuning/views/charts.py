"""Small charts as inline SVG; colours are classes, so that a page's style sheet themes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_BAR, _GAP, _GROUP, _LABEL = 14, 3, 8, 18
# Percent of the width: the rest is for the value at the bar's end.
_LONGEST: Final = 76
_TICKS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Bar:
    """One bar: which series (a CSS class), how long, and what is written at its end."""

    series: str
    value: float
    text: str


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], width: int | None = None) -> str:
    """Horizontal bars in groups, each below its label, all on one scale from zero.

    Without `width` as wide as the page lets it be, with text of one size, also on a phone: lengths
    are percentages. A chart that is a file of its own has a width.
    """
    most = max((bar.value for _, group in groups for bar in group), default=0.0) or 1.0
    parts, y = [], 0
    for label, group in groups:
        parts.append(_text(0, y + _LABEL - 5, label, "label"))
        y += _LABEL
        for bar in group:
            length = max(0.5, _LONGEST * bar.value / most)
            parts.append(
                f'<rect class="{bar.series}" x="0" y="{y}" width="{length:.1f}%" '
                f'height="{_BAR}" rx="2"><title>{escape(label)}: {escape(bar.text)}</title></rect>'
                f'<text class="value" x="{length:.1f}%" dx="6" y="{y + _BAR - 3}">'
                f"{escape(bar.text)}</text>"
            )
            y += _BAR + _GAP
        y += _GROUP
    y = max(y, 1)
    if width is not None:
        return _svg(parts, width, y)
    return f'<svg class="bars" style="height:{y}px" role="img">{"".join(parts)}</svg>'


def dots(columns: Mapping[str, Sequence[float]], width: int = 240, height: int = 150) -> str:
    """Values over categories, the least of all marked: a slice of a search along one knob."""
    values = [x for column in columns.values() for x in column]
    if not values:
        return ""
    left, bottom = 40, 22
    low, high = min(values), max(values)
    scale = (height - bottom - 12) / ((high - low) or 1.0)
    step = (width - left) / len(columns)
    parts = _axis(low, high, left, width, height - bottom, scale)
    for place, (name, column) in enumerate(columns.items()):
        x = left + step * (place + 0.5)
        parts.append(_text(x, height - 6, name, "label", "middle"))
        for number, value in enumerate(column):
            # spread by the order of the trials, so that equal times do not hide each other
            offset = step * 0.6 * ((number * 0.618) % 1 - 0.5)
            kind = "dot best" if value == low else "dot"
            y = height - bottom - (value - low) * scale
            parts.append(
                f'<circle class="{kind}" cx="{x + offset:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{escape(name)}: {value:.4g} ms</title></circle>"
            )
    return _svg(parts, width, height)


def progress(values: Sequence[float | None], width: int = 240, height: int = 150) -> str:
    """Each trial's value (None: refused), and the best so far as a line of steps."""
    found = [x for x in values if x is not None]
    if not found:
        return ""
    left, bottom = 40, 22
    # a default three times as slow as the rest would press all else flat
    low = min(found)
    high = min(max(found), 3 * low)
    scale = (height - bottom - 12) / ((high - low) or 1.0)
    step = (width - left - 8) / max(1, len(values) - 1)
    base = height - bottom
    parts = _axis(low, high, left, width, base, scale)
    parts.append(_text(width, height - 6, f"{len(values)} trials", "label", "end"))
    path: list[str] = []
    best = float("inf")
    for number, value in enumerate(values):
        x = left + number * step
        if value is None:
            parts.append(f'<path class="refused" d="M{x - 2:.1f} {base - 2}l4 4m0 -4l-4 4"/>')
            continue
        y = base - (min(value, high) - low) * scale
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
            f"<title>trial {number + 1}: {value:.4g} ms</title></circle>"
        )
        if value < best:
            best = value
            path.append(f"{'H' if path else 'M'}{x:.1f}{f'V{y:.1f}' if path else f' {y:.1f}'}")
    parts.append(f'<path class="line" d="{"".join(path)}H{width - 8}"/>')
    return _svg(parts, width, height)


def lines(
    series: Mapping[str, Sequence[float]], most: float, width: int = 640, height: int = 260
) -> str:
    """Steps over trials, each named at its end, cut at `most`: a file with a style of its own."""
    left, base = 40, height - 22
    low = min(min(values) for values in series.values())
    scale = (base - 12) / ((most - low) or 1.0)
    length = max(map(len, series.values()))
    step = (width - left - 70) / max(1, length - 1)
    parts = [_LINES_STYLE, *_axis(low, most, left, width - 70, base, scale)]
    parts.append(_text(width - 70, height - 6, f"{length} trials", "label", "end"))
    for number, (name, values) in enumerate(series.items()):
        heights = [base - (min(value, most) - low) * scale for value in values]
        path = f"M{left} {heights[0]:.1f}" + "".join(
            f"H{left + n * step:.1f}V{y:.1f}" for n, y in enumerate(heights[1:], 1)
        )
        parts.append(f'<path class="line{number}" d="{path}"/>')
        end = left + (len(values) - 1) * step + 6
        # the curves end at the same height once everything was tried
        parts.append(_text(end, heights[-1] - 12 * number, name, f"name{number}"))
    return _svg(parts, width, height)


@dataclass(frozen=True)
class Curve:
    """Points (x, y) joined by straight lines, of a class that a style names, and what it is of."""

    kind: str
    label: str
    points: Sequence[tuple[float, float]]


def curves(found: Sequence[Curve], unit: str, width: int = 760, height: int = 360) -> str:
    """Curves over one axis, from zero up; each named at its last point. `unit` is of y."""
    left, right, base = 44, width - 150, height - 24
    xs = sorted({x for curve in found for x, _ in curve.points})
    most = max(y for curve in found for _, y in curve.points)
    across = (right - left) / ((xs[-1] - xs[0]) or 1.0)
    scale = (base - 24) / most
    parts = [*_axis(0.0, most, left, right, base, scale), _text(4, 12, unit, "label")]
    labelled = float("-inf")
    for x in xs:
        place = left + (x - xs[0]) * across
        # sizes that are close to each other would write over each other
        if place - labelled >= 24:
            parts.append(_text(place, height - 6, f"{x:g}", "label", "middle"))
            labelled = place
    for curve in found:
        at = [(left + (x - xs[0]) * across, base - y * scale) for x, y in curve.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        parts.append(f'<path class="{curve.kind}" d="M{path}"/>')
        for (x, y), (given_x, given_y) in zip(at, curve.points, strict=True):
            parts.append(
                f'<circle class="{curve.kind} dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
                f"<title>{given_x:g}: {given_y:.3g} {escape(unit)}</title></circle>"
            )
        parts.append(_text(at[-1][0] + 8, at[-1][1] + 4, curve.label, f"{curve.kind} name"))
    return _svg(parts, width, height)


_LINES_STYLE: Final = """<style>
text { font: 11px sans-serif; fill: #777 } .grid { stroke: #9995 }
.line0, .line1, .line2 { fill: none; stroke-width: 2 }
.line0 { stroke: #d98b4a } .line1 { stroke: #7aa77a } .line2 { stroke: #7a9cc6 }
.name0 { fill: #d98b4a } .name1 { fill: #7aa77a } .name2 { fill: #7a9cc6 }
</style>"""


def _axis(low: float, high: float, left: int, width: int, base: float, scale: float) -> list[str]:
    parts = []
    for tick in _ticks(low, high):
        y = base - (tick - low) * scale
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width}"/>')
        parts.append(_text(left - 6, y + 3, f"{tick:.4g}", "label", "end"))
    return parts


def _ticks(low: float, high: float, about: int = 3) -> list[float]:
    """Round numbers within [low, high], or `low` alone where the range is nothing."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0
    while power > span / about:
        power /= 10
    step = next((power * x for x in _TICKS if power * x >= span / about), power * 10)
    first = int(low / step) + (1 if low > 0 and low % step else 0)
    ticks = [round(step * n, 12) for n in range(first, int(high / step) + 1)]
    return [x for x in ticks if low <= x <= high] or [low]


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(parts: Sequence[str], width: int, height: float) -> str:
    # the namespace is for charts that are files of their own
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
        f'width="{width}" height="{height:.0f}" role="img">{"".join(parts)}</svg>'
    )
