"""Several measurements that share one GPU: they compile and check side by side, and time one at a
time.

Each says in FILE.ready, a line each, that it has nothing left but to time, and waits for FILE; who
began them makes it when all are ready. From then on each holds it while it times.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from gdn2gen.base.errors import ConfigError
from gdn2gen.base.files import locked

# For all others to be compiled and checked: four of TileLang's at a size take two minutes.
MOST_S: Final = 400.0


def wait_for_turn(turn: Path, seconds: float = MOST_S, every: float = 0.1) -> None:
    """Say in FILE.ready that all is ready, and wait until there is a FILE, or raise ConfigError."""
    with Path(f"{turn}.ready").open("a") as ready:
        ready.write(f"{os.getpid()}\n")
    until = time.monotonic() + seconds
    while not turn.exists():
        if time.monotonic() > until:
            raise ConfigError(f"no {turn} in {seconds:.0f} s: make it when all others are ready")
        time.sleep(every)


@contextmanager
def in_turn(turn: Path | None) -> Iterator[None]:
    """Inside, the GPU is of this process alone among those that wait for the same FILE; at once,
    where there is none to wait for."""
    if turn is None:
        yield
        return
    wait_for_turn(turn)
    with locked(turn):
        yield
