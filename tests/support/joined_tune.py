"""One of several processes that join a study: `python joined_tune.py STORAGE OUT SECONDS`.

Its GPU is a fake one whose compiles and gates take real time, so that the processes overlap.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from fake_tuning import DEVICE, PROBLEM, SMALL, FakeBackend

from gdn2gen.tuning import tune
from gdn2gen.tuning.views.progress import Progress


class SlowBackend(FakeBackend):
    """Writes down what it times, and takes a while over it."""

    def time_stages(self, recipe: Any, stages: Any, shape: Any) -> Any:
        time.sleep(0.02)
        return super().time_stages(recipe, stages, shape)

    def clock(self) -> float:
        return time.monotonic()


def main(storage: str, out: str, seconds: str) -> None:
    backend = SlowBackend()
    tune(
        PROBLEM,
        [SMALL],
        DEVICE,
        budget_minutes=float(seconds) / 60,
        out_dir=Path(out),
        storage=storage,
        levels=("lean",),
        backend=backend,
        clock=backend.clock,
        progress=Progress(),
    )
    timed = [str(x.by_stage[stages[0]]) for x, stages, _ in backend.timed if len(stages) == 1]
    print(json.dumps(timed))


if __name__ == "__main__":
    main(*sys.argv[1:])
