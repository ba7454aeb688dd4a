"""What the search is worth: against random order, on a stage of which every config was measured.

    python scripts/search_value.py measure STAGE BT [SHAPE]  # on a GPU
                                   # writes docs/search/<gpu>-<stage>-<BT>.json
    python scripts/search_value.py replay FILE [K]   # the same search on the file; FILE as .svg

Measuring compiles, gates and times every config worth compiling, at train4k unless told otherwise.
A replay runs the tuner's own trials on that table, with 20 seeds, and counts until one is within 3%
of the best; once as where nothing is on file, and once from the winners of the nearest other head
dims, or of those of K.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import optuna

from gdn2gen.base.device import Device, named_device
from gdn2gen.base.files import replace_file
from gdn2gen.base.paths import packaged_tuned_dir
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES, Shape
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.store.sizes import dims_apart
from gdn2gen.store.tuned_files import load_tuned
from gdn2gen.tuning import space
from gdn2gen.tuning.records.ledger import Ledger
from gdn2gen.tuning.search.trials import StageTrials
from gdn2gen.tuning.views.charts import lines

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
PROBLEM: Final = Problem()
USUAL: Final = "train4k"
SEEDS: Final = 20
NEAR: Final = 1.03


def measure(stage: str, BT: int, shape: Shape) -> None:
    """Time every config of a stage on the present GPU, and write the table."""
    from gdn2gen.base.device import present_device, toolchain
    from gdn2gen.kernels.recipe import Recipe
    from gdn2gen.tuning.gpu.attempt import measure_config
    from gdn2gen.tuning.gpu.backend import WorkerBackend

    device = present_device()
    backend, base = WorkerBackend(device), Recipe.default(PROBLEM, "lean", BT)
    configs = list(space.valid_configs(stage, PROBLEM, device, BT))
    compiles = [backend.compile(PROBLEM, config) for config in configs]
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    try:
        for config, future in zip(configs, compiles, strict=True):
            ms, reason = measure_config(backend, future.result(), base, config, shape)
            row: dict[str, Any] = {"config": dict(config), "ms": ms}
            rows.append(row | {"refused": reason} if ms is None else row)
    finally:
        backend.close()
    made: dict[str, Any] = {"gpu": device.name, "toolchain": toolchain(), "shape": shape.name}
    made |= {"stage": stage, "seconds": round(time.monotonic() - started, 1)}
    path = DOCS / "search" / f"{device.slug}-{stage}-{BT}.json"
    replace_file(path, json.dumps({**made, "BT": BT, "rows": rows}, indent=1) + "\n")
    print(f"{len(rows)} configs, {sum(x['ms'] is not None for x in rows)} timed: {path}")


def searched(
    table: Mapping[Config, float | None],
    stage: str,
    BT: int,
    device: Device,
    seed: int,
    shape: Shape = SHAPES[USUAL],
    seeds: Sequence[Config] = (),
) -> Iterator[float | None]:
    """Times in the order in which the tuner would ask for them; None where refused.

    `seeds`: what it is given to begin with.
    """
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.jsonl", device.name, {})
        storage = optuna.storages.InMemoryStorage()
        trials = StageTrials(PROBLEM, stage, BT, [shape], device, ledger, "replay", storage, seed)
        default = default_config(stage, PROBLEM, BT=BT)
        first = table.get(default)
        if first is not None:
            trials.record(default, {shape.name: first})
            yield first
        for start in space.starts(stage, PROBLEM, device, BT):
            trials.suggest_first(start)
        for config in seeds:
            trials.suggest_first(config)
        while (proposal := trials.propose()) is not None:
            ms = table.get(proposal.config)
            if ms is None:
                trials.refuse(proposal, "refused when it was measured")
            else:
                trials.succeed(proposal, {shape.name: ms})
            yield ms


def of_other_head_dims(
    stage: str, BT: int, device: Device, size: int | None = None
) -> list[Config]:
    """Of the packaged entries of the nearest other head dims, with tiles that fit; or of `size`."""
    file = load_tuned(packaged_tuned_dir() / PROBLEM.op / f"{device.slug}.json")
    assert file is not None
    loose = {"K": PROBLEM.K, "V": PROBLEM.V}
    others = [
        entry
        for entry in file.entries
        if entry.problem_key != PROBLEM.key and {**entry.problem_key, **loose} == PROBLEM.key
        if size in (None, entry.problem_key["K"])
    ]
    nearest = min(dims_apart(PROBLEM, entry) for entry in others)
    recipes = [
        entry.recipe_for(PROBLEM).fitted(PROBLEM, device.arch)
        for entry in others
        if dims_apart(PROBLEM, entry) == nearest
    ]
    configs = [config for recipe in recipes for config in recipe.configs]
    return list(dict.fromkeys(x for x in configs if x.stage == stage and x["BT"] == BT))


def shuffled(table: Mapping[Config, float | None], seed: int) -> list[float | None]:
    """Times in random order."""
    times = list(table.values())
    random.Random(seed).shuffle(times)
    return times


def best_so_far(times: list[float | None]) -> list[float]:
    """The least time after each trial; infinite before the first that is not refused."""
    best, found = float("inf"), []
    for ms in times:
        best = min(best, ms if ms is not None else best)
        found.append(best)
    return found


def replay(path: Path, size: int | None = None) -> None:
    """Compare the orders, print the trials they take, and draw the medians."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = json.loads(path.read_text())
    stage, BT, device = file["stage"], file["BT"], named_device(file["gpu"])
    shape = SHAPES[file["shape"]]
    table = {Config.of(stage, x["config"]): x["ms"] for x in file["rows"]}
    least = min(ms for ms in table.values() if ms is not None)
    near = of_other_head_dims(stage, BT, device, size)
    for config in near:
        print(f"begun with {config}: {table.get(config, 'not in the table')} ms")
    runs = {
        "search": [list(searched(table, stage, BT, device, x, shape)) for x in range(SEEDS)],
        "from other head dims": [
            list(searched(table, stage, BT, device, x, shape, near)) for x in range(SEEDS)
        ],
        "random": [shuffled(table, x) for x in range(SEEDS)],
    }
    drawn = {}
    print(f"{stage}, BT={BT}, {shape.name}: {len(table)} configs, the best takes {least} ms")
    for name, times in runs.items():
        curves = [best_so_far(x) for x in times]
        needed = sorted(1 + sum(ms > least * NEAR for ms in curve) for curve in curves)
        print(
            f"{name}: within 3% after {median(needed):.0f} trials (median), "
            f"{needed[len(needed) * 9 // 10]} in 9 of 10 runs; exhaustive: {len(table)}"
        )
        length = min(map(len, curves))
        drawn[name] = [median(curve[n] for curve in curves) / least for n in range(length)]
    replace_file(path.with_suffix(".svg"), lines(drawn, most=1.5) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["replay"] and len(sys.argv) in (3, 4):
        replay(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    elif sys.argv[1:2] == ["measure"] and len(sys.argv) in (4, 5):
        measure(sys.argv[2], int(sys.argv[3]), SHAPES[[*sys.argv, USUAL][4]])
    else:
        sys.exit(__doc__)
