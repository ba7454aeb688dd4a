"""What one of several processes does that join a study.

Its GPU is a fake one whose compiles and gates take real time, so that the processes overlap.
"""

from __future__ import annotations

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


def join(storage: str, out: Path, seconds: float) -> list[str]:
    """The configs that were timed by this process."""
    backend = SlowBackend()
    tune(
        PROBLEM,
        [SMALL],
        DEVICE,
        budget_minutes=seconds / 60,
        out_dir=out,
        storage=storage,
        levels=("lean",),
        backend=backend,
        clock=backend.clock,
        progress=Progress(),
    )
    return [str(x.by_stage[stages[0]]) for x, stages, _ in backend.timed if len(stages) == 1]
