"""What all runs of `scripts/recall.py` share: the experiment, and a small one for a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from learning.models import Sizes
from learning.rows import Row
from learning.tasks import TASKS, Task


@dataclass(frozen=True)
class Experiment:
    """What all runs share."""

    tasks: dict[str, Task]
    hidden: int = 128
    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    batch: int = 64
    steps: int = 3000
    rates: tuple[float, ...] = (7e-4, 2e-3, 6e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    test_rows: int = 512
    small: bool = False
    """Told from the full one in the names of rows, and in them."""

    def sizes(self, task: Task) -> Sizes:
        return Sizes(
            task.vocabulary,
            self.hidden,
            self.layers,
            self.heads,
            self.head_dim,
            mamba_head_dim=self.head_dim,
        )


FULL: Final = Experiment(TASKS)
_FEW: Final[dict[str, Any]] = {"keys": 8, "values": 8, "noise": 4}
SMALL: Final = Experiment(
    {
        "mqar": replace(
            TASKS["mqar"], **_FEW, pairs=(2, 4), length=16, tests=((2, 16), (4, 16), (4, 32))
        ),
        "single-needle": replace(
            TASKS["single-needle"], **_FEW, length=16, tests=((1, 16), (1, 32))
        ),
        "multi-needle": replace(
            TASKS["multi-needle"], **_FEW, pairs=(1, 2), asked=1, length=16,
            tests=((2, 16), (2, 32)),
        ),
    },
    hidden=32, layers=1, heads=1, head_dim=32, batch=16, steps=300, rates=(1e-2, 3e-2),
    seeds=(0, 1), test_rows=64, small=True,
)  # fmt: skip


def best_rate(rows: Sequence[Row]) -> float | None:
    """The rate with the least loss on new rows; None where all diverged."""
    fine = [row for row in rows if row["diverged"] is None]
    return min(fine, key=lambda row: float(row["validation"]))["lr"] if fine else None
