"""What is on file for a GPU, line by line: beside the default, other kernels, the memory floor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from gdn2gen.base.decay import WEAK
from gdn2gen.base.device import Device
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES, Shape, shape_of
from gdn2gen.kernels.floor import floor_bytes
from gdn2gen.kernels.plans import LEVELS
from gdn2gen.store import tuned_files
from gdn2gen.store.format import entry_to
from gdn2gen.store.tuned_files import Entry
from gdn2gen.tuning.records.entries import problem_of, words_of

# In `measured` of entries that were ranked without a GPU, see `predict.predicted_bytes`.
COST, DEFAULT_COST = "predicted_bytes", "default_predicted_bytes"
KEY_NAMES = (*Problem().key, "bound")


@dataclass(frozen=True)
class Line:
    """One tuned entry, beside the default, flash-linear-attention and the memory floor, in ms.

    One that was ranked without a GPU has no times, but what its bytes make expect.
    """

    entry: Entry
    name: str
    default_ms: float | None
    tuned_ms: float | None
    forward_ms: float | None
    fla_ms: float | None
    fla_level: str | None
    """How FLA was told to recompute: where there is no time at the entry's level, at another."""
    floor_ms: float | None
    peak_mib: float | None
    expected: float | None
    """The default's predicted cost over the entry's."""
    stale: bool
    odd: tuple[str, ...] = ()
    """What of the entry was left out, for it is none of what it should be."""

    @property
    def problem(self) -> str:
        return words_of(self.entry)

    @property
    def level(self) -> str:
        """The entry's, and the decay that it was timed under, if that was strong."""
        decay = self.entry.decay
        return self.entry.level if decay == WEAK else f"{self.entry.level}, {decay} decay"

    @property
    def speedup(self) -> float | None:
        return _ratio(self.default_ms, self.tuned_ms)

    @property
    def to_fla(self) -> float | None:
        return _ratio(self.fla_ms, self.tuned_ms)

    @property
    def of_fla(self) -> str:
        """Says so where FLA was timed at another level than the entry's."""
        other = self.fla_level not in (None, self.entry.level)
        return f" ({self.fla_level})" if other else ""

    @property
    def to_floor(self) -> float | None:
        return _ratio(self.tuned_ms, self.floor_ms)

    @property
    def worst_error(self) -> tuple[str, float] | None:
        errors = {name: x for name, x in self.entry.gate.items() if is_number(x)}
        return max(errors.items(), key=lambda item: item[1], default=None)

    @property
    def document(self) -> dict[str, Any]:
        """All of it, for a program that reads it."""
        own = {name: getattr(self, name) for name in _SHOWN}
        return {"shape": self.name, **own, "entry": entry_to(self.entry)}


_SHOWN = (
    *("problem", "default_ms", "tuned_ms", "forward_ms", "speedup", "fla_ms", "fla_level"),
    *("to_fla", "floor_ms", "to_floor", "peak_mib", "expected", "stale"),
)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def is_number(value: object) -> TypeGuard[float]:
    """Whether a file gives a number above 0 that a float holds, as times, memory and errors are."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300


def lines(entries: Iterable[Entry], device: Device, fla: Iterable[FlaTime]) -> list[Line]:
    """What is on file, in the order of the shapes; one that lost its times is not.

    Nor is one beside which there is a faster one, which needs TileLang, or refuses options.
    """
    times = {(x.shape, x.problem, x.level): x.ms for x in fla}
    entries = list(entries)
    second = tuned_files.stand_ins(entries)
    made = (_line(entry, device, times) for entry in entries if entry.key not in second)
    found = [x for x in made if x.tuned_ms is not None or x.entry.provenance == "predicted"]
    order = list(SHAPES)

    def place(line: Line) -> tuple[str, int, str, int, bool]:
        known = order.index(line.name) if line.name in order else len(order)
        level, strong = LEVELS.index(line.entry.level), line.entry.decay != WEAK
        return str(line.entry.problem_key), known, line.name, level, strong

    return sorted(found, key=place)


def _line(entry: Entry, device: Device, times: Mapping[tuple[str, str, str], float]) -> Line:
    shape = shape_of(entry.regime)
    name = shape.name if shape else " ".join(f"{x}={y}" for x, y in entry.regime_key.items())
    key = json.dumps(dict(entry.problem_key), sort_keys=True)
    # FLA was timed under a layer's own decay: its times say nothing beside others under another
    levels = (entry.level, *LEVELS) if entry.decay == WEAK else ()
    fla_level = next((x for x in levels if (name, key, x) in times), None)
    floor = None
    if device.memory_gbps and entry.regime.tokens and entry.regime.heads:
        problem = problem_of(entry, shape or Shape(name, 1, 1, 1))
        tokens = entry.regime.tokens * entry.regime.heads
        floor = floor_bytes(problem, True) * tokens / device.memory_gbps / 1e6
    measured = {name: x for name, x in entry.measured.items() if is_number(x)}
    cost, default_cost = (measured.get(x) for x in (COST, DEFAULT_COST))
    return Line(
        entry,
        name,
        default_ms=measured.get("default_forward_backward_ms"),
        tuned_ms=measured.get("forward_backward_ms"),
        forward_ms=measured.get("forward_ms"),
        fla_ms=times.get((name, key, fla_level)) if fla_level else None,
        fla_level=fla_level,
        floor_ms=floor,
        peak_mib=measured.get("peak_mib"),
        expected=_ratio(default_cost, cost) if entry.provenance == "predicted" else None,
        stale=tuned_files.is_stale(entry),
        odd=tuple(_oddities(entry)),
    )


def _oddities(entry: Entry) -> Iterator[str]:
    """What of an entry's figures is none: to be zero is not odd for a spread.

    Times and errors that are none were refused when the file was read (`store._claims`).
    """
    for name, value in entry.measured.items():
        if name == "pattern" and isinstance(value, str):
            continue  # of the decay that it was timed under
        if not is_number(value) and value != 0:
            yield f"measured.{name} of the entry [{entry.label}] is {value!r}, and no number"


@dataclass(frozen=True)
class FlaTime:
    """Forward and backward of flash-linear-attention in ms, as `bench --vs fla --save` took it."""

    shape: str
    problem: str
    """`Problem.key` as JSON."""
    level: str
    ms: float


def fla_times(rows: Iterable[Any]) -> tuple[list[FlaTime], list[str]]:
    """FLA's times in rows of results, and what is odd about the other rows."""
    found, odd = [], []
    for number, row in enumerate(rows):
        try:
            if row["fla"] is None:
                continue
            ms, shape, level = row["fla"]["forward_backward"]["median"], row["shape"], row["level"]
            key = {name: x for name, x in row["problem"].items() if name in KEY_NAMES}
            key = key if key.get("bound") else {x: y for x, y in key.items() if x != "bound"}
            if not is_number(ms) or not isinstance(shape["name"], str) or level not in LEVELS:
                raise TypeError(f"the level is {level!r}, the time {ms!r}")
            found.append(FlaTime(shape["name"], json.dumps(key, sort_keys=True), level, float(ms)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            odd.append(f"row {number} of the results is left out ({type(error).__name__}: {error})")
    return found, odd
