"""Means with confidence intervals, and the page that tells of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from gdn2gen.base.files import replace_file

NOTHING: Final = "No results are committed yet."
# Student's t for 95%, two sides, by degrees of freedom; fewer runs than four are the rule here.
_T: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Interval(NamedTuple):
    """A mean and half of its 95% interval over runs; None where there is one run alone."""

    mean: float
    half: float | None

    def percent(self) -> str:
        """In percent, the interval cut at none and at all, which it cannot pass."""
        if self.half is None:
            return f"{100 * self.mean:.1f}"
        if not self.half:
            return f"{100 * self.mean:.1f} ± 0"
        low, high = max(0.0, self.mean - self.half), min(1.0, self.mean + self.half)
        return f"{100 * self.mean:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def interval(values: Sequence[float]) -> Interval:
    """By Student's t, runs taken as independent and their spread as normal."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None)
    t = _T[min(len(values) - 1, len(_T)) - 1]
    return Interval(mean, float(t * statistics.stdev(values) / len(values) ** 0.5))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_line(titles), "|---|" + "---:|" * (len(titles) - 1)]
    return "\n".join([*lines, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def put(page: Path, name: str, text: str) -> None:
    """Put `text` between the markers of that name in a page."""
    found = page.read_text()
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = found.split(begin)
    _, after = rest.split(end)
    replace_file(page, f"{before}{begin}\n{text}\n{end}{after}")
