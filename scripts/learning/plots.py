"""Curves with confidence intervals, side by side: SVG for a light page and a dark one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, NamedTuple

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _GAP = 300, 210, 40, 30, 38, 24
_ROW: Final = 20
# Dashes as well as colours: not everybody sees colours.
_DASHES: Final = ("", "7 3", "2 3", "8 3 2 3", "4 2", "1 2", "10 4", "3 1")
STYLE: Final = """<style>
text { font: 12px sans-serif; fill: #57606a }
.title { fill: #1f2328 } .grid { stroke: #8c959f55 }
path.line { fill: none; stroke-width: 1.8 } path.band { stroke: none; fill-opacity: .13 }
.c0 { stroke: #b35900; fill: #b35900 } .c1 { stroke: #0969da; fill: #0969da }
.c2 { stroke: #1a7f37; fill: #1a7f37 } .c3 { stroke: #8250df; fill: #8250df }
.c4 { stroke: #bf3989; fill: #bf3989 } .c5 { stroke: #57606a; fill: #57606a }
.c6 { stroke: #9a6700; fill: #9a6700 } .c7 { stroke: #0e7490; fill: #0e7490 }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1 } .title { fill: #f0f6fc }
  .c0 { stroke: #f0883e; fill: #f0883e } .c1 { stroke: #58a6ff; fill: #58a6ff }
  .c2 { stroke: #56d364; fill: #56d364 } .c3 { stroke: #bc8cff; fill: #bc8cff }
  .c4 { stroke: #ff9bce; fill: #ff9bce } .c5 { stroke: #9198a1; fill: #9198a1 }
  .c6 { stroke: #e3b341; fill: #e3b341 } .c7 { stroke: #39c5cf; fill: #39c5cf }
}
</style>"""


class Point(NamedTuple):
    """A mean, and how far its interval reaches to either side."""

    x: float
    y: float
    half: float = 0.0


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a curve for each name, of the same colour in all panels."""

    title: str
    below: str
    """What the horizontal axis is."""
    curves: Mapping[str, Sequence[Point]]
    low: float | None = None
    high: float | None = None
    """Of the vertical axis; as the curves want it if None."""
    log: bool = False
    """Of the horizontal axis."""
    percent: bool = False


def picture(panels: Sequence[Panel]) -> str:
    """The panels beside each other, and below what each curve is."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    parts = [STYLE]
    for number, panel in enumerate(panels):
        x = number * (_WIDTH + _GAP)
        parts.append(f'<g transform="translate({x} 0)">{"".join(_panel(panel, names))}</g>')
    width = len(panels) * (_WIDTH + _GAP) - _GAP
    columns = max(1, width // 190)
    for number, name in enumerate(names):
        x, y = 190 * (number % columns), _HEIGHT + 14 + _ROW * (number // columns)
        kind, dash = _look(number)
        parts.append(f'<path class="line {kind}"{dash} d="M{x} {y}h26"/>')
        parts.append(_text(x + 32, y + 4, name, "name"))
    height = _HEIGHT + 10 + _ROW * -(-len(names) // columns)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">{"".join(parts)}</svg>\n'
    )


def _panel(panel: Panel, names: Sequence[str]) -> list[str]:
    points = [point for curve in panel.curves.values() for point in curve]
    parts = [_text(_LEFT, 14, panel.title, "title")]
    if not points:
        return parts
    xs = sorted({_x(panel, point.x) for point in points})
    low = min(p.y - p.half for p in points) if panel.low is None else panel.low
    high = max(p.y + p.half for p in points) if panel.high is None else panel.high
    base, wide = _HEIGHT - _BOTTOM, _WIDTH - _LEFT - 8
    span, tall = (xs[-1] - xs[0]) or 1.0, (high - low) or 1.0

    def at(x: float, y: float) -> str:
        across = _LEFT + 4 + (_x(panel, x) - xs[0]) / span * (wide - 8)
        up = base - (min(max(y, low), high) - low) / tall * (base - _TOP)
        return f"{across:.1f} {up:.1f}"

    for tick in _ticks(low, high):
        y = at(points[0].x, tick).split()[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - 8}"/>')
        words = f"{100 * tick:.0f}%" if panel.percent else f"{tick:.4g}"
        parts.append(_text(_LEFT - 5, float(y) + 4, words, "tick", "end"))
    marks = sorted({point.x for point in points})
    for mark in marks if len(marks) <= 6 else (marks[0], marks[len(marks) // 2], marks[-1]):
        words = f"{mark:.3g}" if mark < 1000 else f"{mark:,.0f}"
        parts.append(_text(float(at(mark, low).split()[0]), base + 15, words, "tick", "middle"))
    parts.append(_text((_LEFT + _WIDTH) / 2, base + 31, panel.below, "tick", "middle"))
    for name, curve in panel.curves.items():
        kind, dash = _look(names.index(name))
        if any(point.half for point in curve):
            upper = [at(p.x, p.y + p.half) for p in curve]
            lower = [at(p.x, p.y - p.half) for p in reversed(curve)]
            parts.append(f'<path class="band {kind}" d="M{"L".join(upper + lower)}Z"/>')
        line = "L".join(at(p.x, p.y) for p in curve)
        parts.append(
            f'<path class="line {kind}"{dash} d="M{line}"><title>{escape(name)}</title></path>'
        )
    return parts


def _x(panel: Panel, x: float) -> float:
    return math.log(x) if panel.log else x


def _look(number: int) -> tuple[str, str]:
    dash = _DASHES[number % len(_DASHES)]
    return f"c{number % 8}", f' stroke-dasharray="{dash}"' if dash else ""


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) or 1.0))
    for part in (0.2, 0.25, 0.5, 1.0, 2.0):
        if (high - low) / (part * step) <= 6:
            step *= part
            break
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
