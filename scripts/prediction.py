"""How well predictions rank configs, beside times that were measured: Spearman's rank correlation.

    python scripts/prediction.py FILE...

FILE is a table of scripts/placements.py or scripts/search_value.py. Needs no GPU: every config that
was timed is compiled ahead for the table's GPU, and ranked by what `gdn2gen tune --target` ranks
by, within its stage and chunk size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from gdn2gen.base.device import named_device
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.worker import CompilePool, compile_slots
from gdn2gen.codegen.build import Resources
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.limits import Knob
from gdn2gen.tuning.offline.predict import predicted_bytes

_SECONDS = 120.0


def timed(table: dict[str, Any]) -> Iterator[tuple[Config, float]]:
    """Every config of a table that has a time, and its ms."""
    for row in table["rows"]:
        if row["ms"] is not None:
            yield Config.of(row.get("stage") or table["stage"], knobs_of(row["config"])), row["ms"]


def knobs_of(written: str | dict[str, Knob]) -> dict[str, Knob]:
    """A config's knobs, as they are or from its text."""
    if not isinstance(written, str):
        return written
    pairs = (word.split("=") for word in written.split())
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: 1 where both orders are the same, -1 where one is the other's reverse."""
    import torch

    ranks = torch.stack([torch.tensor(x, dtype=torch.float64).argsort().argsort() for x in (a, b)])
    return float(torch.corrcoef(ranks.double())[0, 1])


def compare(path: Path) -> None:
    """Print one line for each stage and chunk size of a table."""
    table = json.loads(path.read_text())
    device, shape = named_device(table["gpu"]), SHAPES[table["shape"]]
    problem = Problem(**dict(table.get("problem", {})))
    pool = CompilePool(compile_slots())
    groups: dict[tuple[str, int], list[tuple[Config, float, Future[Outcome[Resources]]]]] = {}
    try:
        for config, ms in timed(table):
            target = "gdn2gen.codegen.build:compile_ahead"
            used = pool.submit(target, problem, config.stage, config, device, timeout=_SECONDS)
            groups.setdefault((config.stage, config.size("BT")), []).append((config, ms, used))
        for (stage, BT), rows in groups.items():
            predicted = [
                predicted_bytes(problem, config, shape, used.result().get(), device)
                for config, _, used in rows
            ]
            found = rank_correlation(predicted, [ms for _, ms, _ in rows])
            best = min(rows, key=lambda row: row[1])[1]
            chosen = rows[predicted.index(min(predicted))][1]
            print(
                f"{stage} BT={BT}: {len(rows)} configs, rank correlation {found:.2f}; "
                f"the one predicted fastest takes {chosen / best:.2f} times the best"
            )
    finally:
        pool.close()


if __name__ == "__main__":
    if not sys.argv[1:] or "--help" in sys.argv:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        compare(Path(name))
