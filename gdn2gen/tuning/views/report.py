"""TuneReport: what a run of the tuner found, tried and refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gdn2gen.base.decay import WEAK
from gdn2gen.base.device import Device
from gdn2gen.base.terminal import Sheet, plain
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class ShapeResult:
    """The winner at one shape and level; times in ms, None where nothing was timed."""

    shape: Shape
    level: str
    recipe: Recipe
    forward_ms: float | None
    forward_backward_ms: float | None
    default_forward_backward_ms: float | None
    spread: float | None
    peak_mib: float | None
    errors: Mapping[str, float]
    tied: bool = False
    note: str = ""
    predicted_bytes: float | None = None
    """Cost by which results without times were ranked, see `predict.predicted_bytes`."""
    default_predicted_bytes: float | None = None

    @property
    def speedup(self) -> float | None:
        """The default's time over the winner's, forward+backward."""
        if self.forward_backward_ms is None or self.default_forward_backward_ms is None:
            return None
        return self.default_forward_backward_ms / self.forward_backward_ms

    @property
    def expected(self) -> float | None:
        """The default's predicted cost over the winner's: what is to be gained, untimed."""
        default, cost = self.default_predicted_bytes, self.predicted_bytes
        if not default or not cost or math.inf in (default, cost):
            return None
        return default / cost


@dataclass
class Phase:
    """Seconds of a part of a run, and how many of these the GPU was at work."""

    seconds: float = 0.0
    busy: float = 0.0


@dataclass(frozen=True)
class TuneReport:
    """Result of `tune` and `tune_without_gpu`."""

    problem: Problem
    device: Device
    path: Path
    """The tuned file that the results were merged into."""
    results: list[ShapeResult]
    trials: dict[str, int] = field(default_factory=dict)
    """Trials of this run by outcome."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Shapes, chunk sizes and levels that were left out, and why."""
    ledger: Path | None = None
    left_to_try: list[str] = field(default_factory=list)
    """For each group of shapes, how much of the space was tried: what more time would buy."""
    seconds: float = 0.0
    check_seconds: float = 0.0
    """Of these, the GPU (and the host before it) checked accuracy."""
    timing_seconds: float = 0.0
    """Of these, the GPU (and the host before it) took times."""
    phases: dict[str, Phase] = field(default_factory=dict)
    """Defaults, search and finals over all groups of shapes: when the GPU waited for compilers."""
    decay: str = WEAK
    """What calls expect that find the entries."""

    def table(self) -> RenderableType:
        """The results as a rich table, with what was tried and left out beneath."""
        from rich.console import Group
        from rich.text import Text

        under = "" if self.decay == WEAK else f" under {self.decay} decay"
        table = Sheet(
            f"{self.problem.op} on {self.device.name}: forward+backward in ms{under}",
            ("shape", "level", "default", "tuned", "speedup", "worst error", "BT"),
            words=("shape", "level"),
        )
        for result in self.results:
            worst = max(result.errors.items(), key=lambda pair: pair[1], default=None)
            table.add(
                result.shape.name,
                result.level,
                _ms(result.default_forward_backward_ms),
                "predicted" if result.note else _ms(result.forward_backward_ms),
                _gain(result),
                "-" if worst is None else f"{worst[0]} {worst[1]:.1e}",
                str(result.recipe.BT),
            )
        more = (f"{words}; more time goes on from there" for words in self.left_to_try)
        lines = [self._tried(), *more, *(f"left out {x}: {why}" for x, why in self.skipped.items())]
        notes = dict.fromkeys(result.note for result in self.results if result.note)
        return Group(table, *(Text(plain(line)) for line in (*lines, *notes)))

    def _tried(self) -> str:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(self.trials.items())) or "none"
        where = f"; refusals in {self.ledger}" if self.ledger is not None else ""
        tried = f"trials in {self.seconds:.0f} s: {counts}{self._busy()}"
        return f"{tried}{where}; filed in {self.path}"

    def _busy(self) -> str:
        if not self.seconds or not self.check_seconds + self.timing_seconds:
            return ""
        checks, times = (x / self.seconds for x in (self.check_seconds, self.timing_seconds))
        words = ", ".join(
            f"{x.busy / x.seconds:.0%} of {x.seconds:.0f} s for {name}"
            for name, x in self.phases.items()
            if x.seconds
        )
        return (
            f"; {checks:.0%} of the time in accuracy checks, {times:.0%} in timings"
            f"{f' (together {words})' if words else ''}"
        )


def _gain(result: ShapeResult) -> str:
    if result.speedup is not None:
        return f"{result.speedup:.2f}x"
    return "-" if result.expected is None else f"expects {result.expected:.2f}x"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
