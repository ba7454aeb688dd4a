"""What each placement of the decay costs: time prepare and grad_key in every form, and plot it.

    python scripts/placements.py measure    # on a GPU; writes docs/placements/<gpu>.json
    python scripts/placements.py plot FILE  # writes FILE as .svg beside it

At train4k with a sigmoid gate of at most 2 nats a token, which every placement serves. The best of
a few hand-picked configs stands for a form; each passes the tuner's accuracy check before it is
timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gdn2gen.base.files import replace_file
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import CHUNKS, Knob
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.tuning.views.charts import Bar, bars

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
PROBLEM: Final = Problem(gate="sigmoid", bound=2, has_A_log=True)
PLACEMENTS: Final = ("log", "tree", "anchored", "bounded")
# Of the Triton forms; further knobs as in the default.
_TRITON: Final[dict[str, tuple[dict[str, Knob], ...]]] = {
    "prepare": (
        {"BK": 32, "num_warps": 1},
        {"BK": 64, "num_warps": 2},
        {"BK": 32, "num_warps": 1, "num_stages": 3},
    ),
    "grad_key": (
        {"BK": 32, "num_warps": 2, "num_stages": 1, "chunks": 1},
        {"BK": 64, "num_warps": 4, "num_stages": 2, "chunks": 4},
        {"BK": 32, "num_warps": 8, "num_stages": 1, "chunks": 1, "maxnreg": 208},
    ),
}
_TILELANG: Final[dict[str, dict[str, Knob]]] = {
    "prepare": {"BK": 128, "chunks": 4, "maxnreg": 80, "solve": "ieee"},
    "grad_key": {"BK": 64, "chunks": 16, "maxnreg": 128},
}
_STYLE: Final = """<style>
text { font: 11px sans-serif; fill: #555 } .value { fill: #333 }
.triton { fill: #7a9cc6 } .tilelang { fill: #d98b4a }
@media (prefers-color-scheme: dark) { text { fill: #aaa } .value { fill: #ddd } }
</style>"""


def forms(stage: str, BT: int) -> Iterator[tuple[str, str, list[Config]]]:
    """Placement, language, and the configs to choose the best of."""
    default = default_config(stage, PROBLEM, BT=BT)
    by_chunk = {"language": "tilelang", "num_warps": 4, "num_stages": 1, **_TILELANG[stage]}
    for placement in PLACEMENTS:
        if stage == "grad_key" and placement == "tree":
            continue
        for language, given in (("triton", _TRITON[stage]), ("tilelang", (by_chunk,))):
            configs = [default.replace(**knobs, decay=placement) for knobs in given]
            yield placement, language, [x for x in configs if why_invalid(x, PROBLEM) is None]


def measure() -> None:
    """Gate and time every form on the present GPU, and write the table with what was refused."""
    from gdn2gen.base.device import present_device, toolchain
    from gdn2gen.kernels.recipe import Recipe
    from gdn2gen.tuning.gpu.attempt import measure_config
    from gdn2gen.tuning.gpu.backend import WorkerBackend

    device = present_device()
    rows: list[dict[str, Any]] = []
    backend = WorkerBackend(device)
    asked = [
        (stage, BT, *form)
        for stage in ("prepare", "grad_key")
        for BT in CHUNKS
        for form in forms(stage, BT)
    ]
    compiles = {x: backend.compile(PROBLEM, x) for *_, configs in asked for x in configs}
    try:
        for stage, BT, placement, language, configs in asked:
            base = Recipe.default(PROBLEM, "lean", BT)
            shape = SHAPES["train4k"]
            for config in configs:
                ms, reason = measure_config(backend, compiles[config].result(), base, config, shape)
                row = {"stage": stage, "BT": BT, "placement": placement, "language": language}
                rows.append({**row, "config": str(config), "ms": ms, "refused": reason})
                print(*rows[-1].values(), flush=True)
    finally:
        backend.close()
    made: dict[str, Any] = {"gpu": device.name, "toolchain": toolchain(), "shape": "train4k"}
    path = DOCS / "placements" / f"{device.slug}.json"
    document = {**made, "problem": PROBLEM.key, "rows": rows}
    replace_file(path, json.dumps(document, indent=1) + "\n")


def plot(path: Path) -> None:
    """Bars in groups by stage and chunk size, a bar for each placement and language."""
    groups: dict[str, dict[tuple[str, str], float]] = {}
    for x in json.loads(path.read_text())["rows"]:
        if x["ms"] is not None:
            best = groups.setdefault(f"{x['stage']} BT={x['BT']}", {})
            form = (x["placement"], x["language"])
            best[form] = min(x["ms"], best.get(form, x["ms"]))
    drawn = [
        (label, [Bar(form[1], ms, f"{ms:.3f} {', '.join(form)}") for form, ms in best.items()])
        for label, best in groups.items()
    ]
    svg = bars(drawn, width=760)
    replace_file(path.with_suffix(".svg"), svg.replace(">", f">{_STYLE}", 1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["plot"] and len(sys.argv) == 3:
        plot(Path(sys.argv[2]))
    elif sys.argv[1:] == ["measure"]:
        measure()
    else:
        sys.exit(__doc__)
