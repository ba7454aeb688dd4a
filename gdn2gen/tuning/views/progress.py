"""Progress: what the tuner shows while it works; a live display, or plain lines in a log."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from gdn2gen.base import terminal
from gdn2gen.kernels.config import Config

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_PLAIN_SECONDS: Final = 10.0
_LAST_TRIALS: Final = 6


class Progress:
    """Counts trials by outcome and shows nothing; the base of the visible ones."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.phase_text = ""
        self.budget_seconds = 0.0
        self.best: dict[str, tuple[float, float | None]] = {}
        self._started = time.monotonic()

    def start(self, title: str, budget_seconds: float) -> None:
        """Begin a run that may take `budget_seconds`."""
        self.phase_text = title
        self.budget_seconds = budget_seconds
        self._started = time.monotonic()

    def phase(self, text: str) -> None:
        """Say what happens now."""
        self.phase_text = text

    def working_on(self, text: str) -> None:
        """Say what is being tried now; changes often, so only a live display shows it."""
        self.phase_text = text

    def trial(self, config: Config, status: str, detail: str) -> None:
        """One trial ended: its outcome, and its times or the reason for its refusal."""
        self.counts[status] += 1

    def best_so_far(self, label: str, best_ms: float, default_ms: float | None) -> None:
        """Best time known for a stage or a shape, beside the default's, in ms."""
        self.best[label] = (best_ms, default_ms)

    def close(self) -> None:
        """End the display."""

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.budget_seconds - (time.monotonic() - self._started))

    @property
    def summary(self) -> str:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(self.counts.items()))
        return f"trials: {counts or 'none yet'}; {_clock(self.seconds_left)} left"


class PlainProgress(Progress):
    """Lines for a log: each phase, a summary every ten seconds, each refusal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._said = 0.0

    def start(self, title: str, budget_seconds: float) -> None:
        super().start(title, budget_seconds)
        self._say(f"{title}, budget {_clock(budget_seconds)}")

    def phase(self, text: str) -> None:
        super().phase(text)
        self._say(text)

    def trial(self, config: Config, status: str, detail: str) -> None:
        super().trial(config, status, detail)
        if status != "ok":
            self._say(f"  refused {config.stage} [{config}]: {detail}")
        elif time.monotonic() - self._said > _PLAIN_SECONDS:
            self._said = time.monotonic()
            self._say(f"  {self.summary}")

    def close(self) -> None:
        self._say(self.summary)
        for label, pair in self.best.items():
            self._say(f"  {label}: {_versus(*pair)}")

    def _say(self, text: str) -> None:
        self._console.print(terminal.plain(text), soft_wrap=True)


class LiveProgress(Progress):
    """A display that is redrawn in place: phase, best against default, outcomes, last trials."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live: Live | None = None
        self._last: deque[tuple[str, str, str]] = deque(maxlen=_LAST_TRIALS)

    def start(self, title: str, budget_seconds: float) -> None:
        from rich.live import Live

        super().start(title, budget_seconds)
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
        self._live.start()

    def trial(self, config: Config, status: str, detail: str) -> None:
        super().trial(config, status, detail)
        self._last.append((f"{config.stage} [{config}]", status, detail))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        best, last = (Table(box=None, pad_edge=False) for _ in range(2))
        for table, names in ((best, ("best so far", "ms")), (last, ("last trials", "outcome"))):
            for name in names:
                table.add_column(name, overflow="fold")  # not cut where the terminal is narrow
        # Stages and shapes that changed last matter most; a terminal has few lines.
        for label, pair in list(self.best.items())[-16:]:
            best.add_row(Text(label), _versus(*pair))
        for name, status, detail in self._last:
            style = "green" if status == "ok" else "yellow"
            last.add_row(Text(name), Text(terminal.plain(detail), style=style))
        head = Text(self.phase_text, style="bold")
        return Group(head, Text(self.summary), best, last)


def console_progress(console: Console | None = None) -> Progress:
    """The live display on a terminal, plain lines elsewhere."""
    if console is None:
        console = terminal.console(stderr=True)
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


def times_text(times: Mapping[str, float]) -> str:
    """Times per shape in one line, in ms."""
    return ", ".join(f"{shape} {ms:.3f} ms" for shape, ms in times.items())


def _versus(best_ms: float, default_ms: float | None) -> str:
    if default_ms is None:
        return f"{best_ms:.3f} (no default)"
    return f"{best_ms:.3f} (default {default_ms:.3f}, {default_ms / best_ms:.2f}x)"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
