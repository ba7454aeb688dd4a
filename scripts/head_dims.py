"""What a head costs by its head dim: ours beside flash-linear-attention's, and what transfer loses.

    python scripts/head_dims.py measure [K[,V] ...]  # on a GPU; adds to docs/head_dims/<gpu>.json
    python scripts/head_dims.py ours [K[,V] ...] [--turn=FILE]    # likewise, without FLA's
    python scripts/head_dims.py compile K[,V] ...    # FLA's kernels, for a later measure
    python scripts/head_dims.py transfer K[,V] ... [--turn=FILE]  # of tuned head dims; likewise
    python scripts/head_dims.py plot FILE            # its tables and chart, in docs/head_dims.md

At train4k in bf16, nanoseconds for a token and head: a call's, which runs what is on file, and
FLA's where it is installed and K is at most 256. Transfer: forward+backward as graphs with the
recipe of the nearest other head dims on file, which is checked first, beside that of their own and
the default, which others have checked; none where there is none, or it is refused. What is on file
may itself have begun with a recipe of those head dims. --turn: as of scripts/recipe_times.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from learning.report import put, table

from gdn2gen.base.environment import VERIFYING
from gdn2gen.base.files import replace_file
from gdn2gen.base.outcome import Outcome
from gdn2gen.base.worker import Worker
from gdn2gen.family.problem import DIMS, Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.plans import LEVELS
from gdn2gen.tuning.views.charts import Curve, curves

DOCS: Final = Path(__file__).resolve().parent.parent / "docs/head_dims"
SHAPE: Final = SHAPES["train4k"]
NS: Final = 1e6 / (SHAPE.B * SHAPE.T * SHAPE.H)
# A size compiles all of its kernels first, and FLA times hundreds.
MOST_S: Final = 500.0
# Each has a context on the GPU, tensors of train4k and compilers of its own.
MOST_SIDE_BY_SIDE: Final = 8
# Ours have no configs to try, and wait for each other with 4 GB at most.
MOST_OF_OURS: Final = 24
TITLES: Final = (
    *("K, V", "config", "forward ms", "FLA", "FLA / ours", "ns a token and head"),
    *("forward+backward ms", "FLA", "FLA / ours", "ns a token and head"),
)
TRANSFER_TITLES: Final = (
    *("K, V", "level", "tuned ms", "transferred ms", "/ tuned", "of", "default ms"),
)
TRANSFERRED: Final = (
    "What a config costs that was tuned at other head dims: forward and backward as CUDA graphs."
)
SQUARES: Final = tuple(f"{size}" for size in DIMS["K"])
PAGE: Final = DOCS.with_suffix(".md")
_STYLE: Final = """<style>
text { font: 11px sans-serif; fill: #777 } .grid { stroke: #9994 } path { fill: none }
.ours { stroke: #d98b4a; stroke-width: 2 } .fla { stroke: #7a9cc6; stroke-width: 2 }
.forward { stroke-dasharray: 5 3 } .dot { stroke: none; stroke-dasharray: none }
.dot.ours { fill: #d98b4a } .dot.fla { fill: #7a9cc6 }
.name { stroke: none } .name.ours { fill: #d98b4a } .name.fla { fill: #7a9cc6 }
</style>"""


def problem_of(size: str) -> Problem:
    K, _, V = size.partition(",")
    return Problem(K=int(K), V=int(V or K))


def measure(sizes: Iterable[str]) -> None:
    """Times of our op and FLA's, size by size; each is written as soon as it is there."""
    for size in sizes:
        problem = problem_of(size)
        # one after the other: what one of them cannot do, or breaks, costs the other nothing
        names = ("ours", "fla") if problem.K <= 256 else ("ours",)
        _keep(size, {name: in_a_process("times_of", name, problem) for name in names})


def measure_ours(sizes: Sequence[str], among: Path | None = None) -> None:
    """Times of ours: all sizes compile side by side, and are timed one at a time. `among`: in a
    turn of all of them beside other measurements."""
    for first in range(0, len(sizes), MOST_OF_OURS):
        _measure_side_by_side(sizes[first : first + MOST_OF_OURS], among)


def _measure_side_by_side(sizes: Sequence[str], among: Path | None) -> None:
    from gdn2gen.measure.turn import in_turn

    with TemporaryDirectory() as folder, ThreadPoolExecutor(len(sizes)) as pool:
        turn = Path(folder) / "turn"
        asked = {
            size: pool.submit(in_a_process, "times_of", "ours", problem_of(size), str(turn))
            for size in sizes
        }
        # those that are done have failed, and will say nothing
        while _ready(turn) + sum(x.done() for x in asked.values()) < len(asked):
            time.sleep(0.1)
        with in_turn(among):
            turn.touch()
            for size, timed in asked.items():
                _keep(size, {"ours": timed.result()})


def _ready(turn: Path) -> int:
    """How many have nothing left but to time."""
    ready = Path(f"{turn}.ready")
    return len(ready.read_text().splitlines()) if ready.exists() else 0


def _keep(size: str, found: Mapping[str, Outcome[Any]]) -> None:
    """The row of a size, which says where our recipe is from."""
    from gdn2gen.store.dispatch import find_recipe

    problem = problem_of(size)
    source = find_recipe(problem, SHAPE.regime, _device()).source
    row: dict[str, Any] = {"K": problem.K, "V": problem.V, "source": source}
    for name, timed in found.items():
        row[name] = timed.get() if timed.ok else None
        if not timed.ok:
            print(f"{name} at {size}: {timed.reason}")
    _add("times", row)
    print(row, flush=True)


def compile_theirs(sizes: Sequence[str]) -> None:
    """Fill the caches with FLA's kernels, sizes side by side, with every config that its autotuning
    tries, and keep none of its choices: these want a GPU alone, which `measure` then needs for a
    minute a size instead of four."""
    forget = {"FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"}

    def one(size: str) -> None:
        tried = in_a_process("times_of", "fla", problem_of(size), environment=forget)
        print(f"FLA's at {size}: {'compiled' if tried.ok else tried.reason}", flush=True)

    with ThreadPoolExecutor(MOST_SIDE_BY_SIDE) as pool:
        list(pool.map(one, sizes))


def in_a_process(
    function: str, *given: Any, environment: Mapping[str, str] | None = None
) -> Outcome[Any]:
    """A call of a function of this file in a process of its own."""
    file = Path(__file__).resolve()
    path = [str(file.parent), str(file.parent.parent), os.environ.get("PYTHONPATH", "")]
    worker = Worker(
        {
            "GDN2GEN_UNVERIFIED": VERIFYING,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            **(environment or {}),
        }
    )
    try:
        outcome: Outcome[Any] = worker.call(f"{file.stem}:{function}", *given, timeout=MOST_S)
    finally:
        worker.close()
    return outcome


def times_of(name: str, problem: Problem, turn: str | None = None) -> list[float]:
    """Forward and forward+backward, ms; in a process of its own, in its turn if there is one."""
    from gdn2gen.measure.peers import fla_op
    from gdn2gen.measure.sides import called, measure_in_turns, our_op
    from gdn2gen.measure.turn import in_turn

    function = our_op("gdn2", "lean") if name == "ours" else fla_op("gdn2", "lean")
    called(function, problem, SHAPE)
    with in_turn(None if turn is None else Path(turn)):
        (side,) = measure_in_turns([function], [{}], problem, SHAPE)
    return [side.forward.median, side.forward_backward.median]


def transfer(sizes: Iterable[str], turn: Path | None = None) -> None:
    """Forward+backward of three recipes at every level; None where one is refused. `turn`: as in
    `measure.turn`, once all is compiled and checked."""
    from gdn2gen.measure.turn import in_turn
    from gdn2gen.tuning.gpu.backend import WorkerBackend

    backend = WorkerBackend(_device())
    try:
        wanted = [(problem_of(size), level) for size in sizes for level in LEVELS]
        rows = [(problem, level, *_recipes_of(problem, level)) for problem, level in wanted]
        compiles = _compiles(backend, [(x, r.values()) for x, _, r, _ in rows])
        for problem, _, recipes, _ in rows:
            for name, recipe in recipes.items():
                built = {x: compiles[problem, x] for x in recipe.configs} if recipe else {}
                if recipe and not _passes(backend, recipe, built, checked=name == "transferred"):
                    recipes[name] = None
        with in_turn(turn):
            for problem, level, recipes, origin in rows:
                row: dict[str, Any] = {"K": problem.K, "V": problem.V, "level": level}
                row |= {name: recipe and _ms(backend, recipe) for name, recipe in recipes.items()}
                row["from"] = origin
                _add("transfer", row)
                print(row, flush=True)
    finally:
        backend.close()


def _compiles(backend: Any, wanted: Iterable[tuple[Problem, Iterable[Any]]]) -> dict[Any, Any]:
    """Every config once, all at once: compilers are what takes the time, and recipes share half."""
    found: dict[Any, Any] = {}
    for problem, recipes in wanted:
        for config in (x for recipe in recipes if recipe is not None for x in recipe.configs):
            if (problem, config) not in found:
                found[problem, config] = backend.compile(problem, config)
    return found


def _recipes_of(problem: Problem, level: str) -> tuple[dict[str, Any], str | None]:
    """What is tuned, what the nearest other head dims on file have, and the default; and which
    these are."""
    from gdn2gen.kernels.recipe import Recipe
    from gdn2gen.store.dispatch import find_recipe
    from gdn2gen.store.sizes import transferred

    device = _device()
    own = find_recipe(problem, SHAPE.regime, device, level=level)
    near = transferred(problem, SHAPE.regime, device, level=level)
    recipes = {
        "tuned": own.recipe if own.source == "exact" else None,
        "transferred": None if near is None else near.recipe,
        "default": Recipe.default(problem, level, arch=device.arch),
    }
    return recipes, None if near is None else _origin(near)


def _origin(near: Any) -> str:
    """K and V of the entries that a transferred recipe is of."""
    return str(near.why).partition("nearest head dims, ")[2].partition(", with")[0]


def _passes(backend: Any, recipe: Any, compiles: Any, *, checked: bool) -> bool:
    """Whether all of it compiles and fits, and is right; `checked`: it never ran at these head
    dims."""
    from gdn2gen.tuning.gpu.attempt import fitting, right

    for config, future in compiles.items():
        built = fitting(future.result(), _device())
        if not built.ok:
            print(f"refused: {config.stage}: {built.reason}")
            return False
    tried = right(backend.check(recipe, full=False)) if checked else None
    if tried is not None and not tried.ok:
        print(f"refused: {tried.reason}")
        return False
    return True


def _ms(backend: Any, recipe: Any) -> float | None:
    timed = backend.time_recipe(recipe, SHAPE, with_peak=False)
    if not timed.ok:
        print(f"refused: {timed.reason}")
        return None
    return float(timed.get().forward_backward.median)


def _device() -> Any:
    from gdn2gen.base.device import present_device

    return present_device()


def _add(kind: str, row: dict[str, Any]) -> None:
    """A row of the same size and level is replaced."""
    from gdn2gen.base.device import toolchain

    path = DOCS / f"{_device().slug}.json"
    document = json.loads(path.read_text()) if path.exists() else {"times": [], "transfer": []}
    document |= {"gpu": _device().name, "shape": SHAPE.name}
    row["toolchain"] = toolchain()
    names = ("K", "V", "level")
    of_row = [row.get(name) for name in names]
    kept = []
    for x in document[kind]:
        if [x.get(name) for name in names] != of_row:
            kept.append(x)
        elif x.get("fla") and "fla" not in row:
            row["fla"] = x["fla"]
    document[kind] = sorted([*kept, row], key=lambda x: (x["K"], x["V"]))
    path.parent.mkdir(exist_ok=True)
    replace_file(path, json.dumps(document, indent=1) + "\n")


def plot(path: Path, page: Path = PAGE) -> None:
    """The tables and the chart of a file of times, put into the page and beside the file."""
    document = json.loads(path.read_text())
    times = document["times"]
    svg = curves(_curves(times), "ns for a token and head")
    replace_file(path.with_suffix(".svg"), svg.replace(">", f">{_STYLE}", 1) + "\n")
    machines = {_words(x["toolchain"]): None for x in times if "toolchain" in x}
    said = [
        f"![Time for a token and head by head dim]({path.parent.name}/{path.stem}.svg)",
        "",
        table(TITLES, map(_cells, times)),
        "",
        f"{document['gpu']}, {document['shape']}; {'; '.join(machines)}.",
    ]
    if document["transfer"]:
        moved = table(TRANSFER_TITLES, map(_transfer_cells, document["transfer"]))
        said += ["", TRANSFERRED, "", moved]
    put(page, path.stem, "\n".join(said))


def _curves(times: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Of squares, a curve for each direction and side that has points."""
    found = []
    for name, label in (("fla", "FLA"), ("ours", "gdn2gen")):
        for place, direction in enumerate(("forward", "forward+backward")):
            points = [
                (float(x["K"]), x[name][place] * NS)
                for x in times
                if x["K"] == x["V"] and x.get(name)
            ]
            kind = name if place else f"{name} forward"
            found += [Curve(kind, f"{label} {direction}", points)] if points else []
    return found


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [f"{row['K']}, {row['V']}", row["source"]]
    for place in (0, 1):
        ours, fla = (row[name][place] if row.get(name) else None for name in ("ours", "fla"))
        cells += ["-" if ms is None else f"{ms:.3f}" for ms in (ours, fla)]
        cells.append("-" if ours is None or fla is None else f"{fla / ours:.2f}")
        cells.append("-" if ours is None else f"{ours * NS:.3f}")
    return cells


def _transfer_cells(row: Mapping[str, Any]) -> list[str]:
    ms = ["none" if row[x] is None else f"{row[x]:.3f}" for x in ("tuned", "transferred")]
    lost = "-" if None in (row["tuned"], row["transferred"]) else row["transferred"] / row["tuned"]
    default = "none" if row["default"] is None else f"{row['default']:.3f}"
    last = lost if isinstance(lost, str) else f"{lost:.2f}"
    return [f"{row['K']}, {row['V']}", row["level"], *ms, last, row["from"] or "", default]


def _words(toolchain: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in toolchain.items())


def _shared(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """Sizes, and the file of --turn if that is given."""
    turns = [Path(x.removeprefix("--turn=")) for x in words if x.startswith("--turn=")]
    return [x for x in words if not x.startswith("--")], turns[0] if turns else None


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2:] or SQUARES)
    elif sys.argv[1:2] == ["ours"]:
        named, shared = _shared(sys.argv[2:])
        measure_ours(named or SQUARES, shared)
    elif sys.argv[1:2] == ["compile"] and len(sys.argv) > 2:
        compile_theirs(sys.argv[2:])
    elif sys.argv[1:2] == ["transfer"] and len(sys.argv) > 2:
        transfer(*_shared(sys.argv[2:]))
    elif sys.argv[1:2] == ["plot"] and len(sys.argv) == 3:
        plot(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
