"""What is on file of kernels that are in no plan, line by line, beside the rule on sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gdn2gen.base.terminal import Sheet
from gdn2gen.kernels.mamba3 import ONE_TOKEN
from gdn2gen.store.part_files import PartEntry, stale_parts
from gdn2gen.tuning.views.lines import is_number


@dataclass(frozen=True)
class PartLine:
    """One kernel of an entry; times in ms, None where the file gives none."""

    op: str
    stage: str
    at: str
    rule_ms: float | None
    tuned_ms: float | None
    knobs: str
    worst_error: tuple[str, float] | None
    """Of all kernels of the entry: they are checked together."""
    stale: bool
    entry: PartEntry

    @property
    def speedup(self) -> float | None:
        return self.rule_ms / self.tuned_ms if self.rule_ms and self.tuned_ms else None

    @property
    def document(self) -> dict[str, Any]:
        """All of it, for a program that reads it."""
        return {**asdict(self), "speedup": self.speedup}


def part_lines(op: str, entries: Iterable[PartEntry]) -> list[PartLine]:
    """A line for each kernel, in the order of the file."""
    return [x for entry in entries for x in _lines(op, entry)]


def _lines(op: str, entry: PartEntry) -> list[PartLine]:
    unit = "sequences" if entry.kind == ONE_TOKEN else "tokens"
    others = [str(entry.at.get("dtype", "")), f"{entry.at.get('heads')} heads"]
    sizes = (("state_size", "N"), ("head_dim", "P"), ("groups", "groups"))
    others += [f"{there}={entry.at[x]}" for x, there in sizes if x in entry.at]
    at = ", ".join([f"{entry.tokens} {unit}", *filter(None, others)])
    errors = {name: x for name, x in entry.errors.items() if is_number(x)}
    worst = max(errors.items(), key=lambda item: item[1], default=None)
    stale = bool(stale_parts(entry))
    return [
        PartLine(
            op,
            stage,
            at,
            rule_ms=_ms(entry.measured[stage], "default_ms"),
            tuned_ms=_ms(entry.measured[stage], "ms"),
            knobs=" ".join(f"{x}={y}" for x, y in knobs.items()),
            worst_error=worst,
            stale=stale,
            entry=entry,
        )
        for stage, knobs in entry.knobs.items()
    ]


def _ms(measured: Mapping[str, float], name: str) -> float | None:
    value = measured.get(name)
    return value if is_number(value) else None


def parts_sheet(title: str, lines: Iterable[PartLine]) -> Sheet:
    """As a table."""
    names = ("kernel", "at", "rule", "tuned", "speedup", "knobs")
    sheet = Sheet(title, names, words=("kernel", "at", "knobs"))
    for x in lines:
        numbers = ((x.rule_ms, "{:.4f}"), (x.tuned_ms, "{:.4f}"), (x.speedup, "{:.2f}x"))
        cells = ["-" if value is None else form.format(value) for value, form in numbers]
        sheet.add(x.stage, x.at + (" (stale)" if x.stale else ""), *cells, x.knobs)
    return sheet
