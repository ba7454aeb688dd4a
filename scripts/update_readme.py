"""Write the tables and the picture of README.md and docs/results.md; with --check only say if they
differ.

The README's table and picture are of the family: each member as it is declared, and beside its best
peer on the GPU that most members were measured on. The page of results has bench's tables of each
GPU, from docs/results/<gpu>.json, and the times on file in tuned/.

Usage: python scripts/update_readme.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # also from a source tree that is not installed

from gdn2gen.base.decay import WEAK  # noqa: E402
from gdn2gen.base.device import slug_of  # noqa: E402
from gdn2gen.base.files import replace_file  # noqa: E402
from gdn2gen.cli.options import parse_head_dim  # noqa: E402
from gdn2gen.family.mamba3_problem import MAMBA3  # noqa: E402
from gdn2gen.family.registry import OPS, recurrence_named  # noqa: E402
from gdn2gen.family.shapes import NAMED_SHAPES as SHAPES  # noqa: E402
from gdn2gen.kernels.plans import LEVELS  # noqa: E402
from gdn2gen.measure.results import read_results  # noqa: E402
from gdn2gen.store.tuned_files import Entry, load_tuned, stand_ins  # noqa: E402
from gdn2gen.tuning.views.charts import Bar, bars  # noqa: E402

MAMBA3_TITLE: Final = "Mamba-3"
# It is declared by no `Recurrence`: its scan is another's.
MAMBA3_CELLS: Final = (
    f"`mamba3_siso_combined`: {MAMBA3_TITLE}, one input and output a head (arXiv 2603.15569)",
    "`exp(ADT_t) (S_{t-1} + (1 - s_t) DT_t k_{t-1} v_{t-1}^T) + s_t DT_t k_t v_t^T`, s = "
    "sigmoid(Trap), q and k rotated by sums of DT tanh(Angles)",
    "Q, K [B, T, G, K]; V [B, T, HV, V]; ADT, DT, Trap [B, HV, T]; Angles [B, T, HV, S]",
)
NOTHING = "No results are committed yet."
SIDES: Final = ("forward", "forward_backward")
# Text and bars of the picture, on a light page and on a dark one.
STYLE: Final = """<style>
text { font: 12px sans-serif; fill: #57606a }
.value { fill: #1f2328 }
.ours { fill: #d98b4a }
.peer { fill: #8fa6c4 }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1 }
  .value { fill: #f0f6fc }
  .peer { fill: #4f6b8f }
}
</style>"""
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    args = parser.parse_args()
    made = pages(args.root)
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if args.check:
        names = ", ".join(str(path.relative_to(args.root)) for path in stale)
        if stale:
            print(f"out of date: {names}; run: python scripts/update_readme.py")
        return int(bool(stale))
    for path in stale:
        replace_file(path, made[path])
    return 0


def pages(root: Path) -> dict[Path, str]:
    """What the files should hold: the pages that are there, and the picture where one is shown."""
    files = sorted((root / "docs/results").glob("*.json"))
    documents = [read_results(file) for file in files]
    found = members(documents)
    parts = [section(x, on_file(root, file.name)) for x, file in zip(documents, files, strict=True)]
    filed = filed_times(root, found.gpu)
    tables = {"family": "\n".join(family(found, filed)), "results": "\n\n".join(parts) or NOTHING}
    made = {}
    for path in (root / "README.md", root / "docs/results.md"):
        if path.exists():
            made[path] = updated(path.read_text(), tables)
    if found.rows:
        made[root / "docs/family.svg"] = picture(found)
    return made


def updated(page: str, tables: dict[str, str]) -> str:
    """A page with the text between its markers made anew."""
    for name, text in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in page:
            before, rest = page.split(begin)
            _, after = rest.split(end)
            page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


class Members(NamedTuple):
    """What bench measured of members at `SHOWN`, on the GPU on which it did so of most."""

    gpu: str
    rows: dict[str, Row]


# As many tokens as train4k, the first shape of a run, at which FLA's forward waited for the host:
# 1.55 ms on an H200 that takes 1.05 at train2k.
SHOWN: Final = "train2k"
FILED: Final = "train4k"
"""The shape at which all members were searched."""


def shown(op: str) -> str:
    """The shape of a member's row."""
    shapes = ("mamba4k",) if op == MAMBA3 else recurrence_named(op).usual.shapes
    return (*shapes, SHOWN)[0]


def decay_of(row: Row) -> str:
    """What our calls expected."""
    return str(row.get("decay", WEAK))


def _expecting(row: Row) -> str:
    return "" if decay_of(row) == WEAK else f", expecting {decay_of(row)} decay"


def gated(row: Row) -> bool:
    return bool(row["problem"].get("has_z"))


def members(documents: Iterable[dict[str, Any]]) -> Members:
    best = Members("", {})
    for document in documents:
        rows: dict[str, Row] = {}
        # an output's gate is a choice of some models: without it first
        for row in sorted(document["rows"], key=lambda x: (gated(x), problem_of(x))):
            if decay_of(row) != WEAK:
                continue
            op = row["problem"]["op"]
            if row["shape"]["name"] == shown(op) and row["level"] == LEVELS[0]:
                rows.setdefault(op, row)
        best = max(best, Members(document["gpu"], rows), key=lambda x: len(x.rows))
    return best


def filed_times(root: Path, gpu: str) -> dict[str, str]:
    """Forward, and forward and backward, in ms of the GPU alone, of what is on file for members at
    their usual head dims and shape."""
    found = {}
    for path in root.glob(f"tuned/*/{slug_of(gpu)}.json"):
        file = load_tuned(path)
        usual = recurrence_named(path.parent.name).usual
        regime = SHAPES[(*usual.shapes, FILED)[0]].regime
        times = [
            (x.measured["forward_backward_ms"], x.measured["forward_ms"])
            for x in (file.entries if file else ())
            if (x.problem_key["K"], x.problem_key["V"]) == parse_head_dim(usual.head_dims[0])
            and (x.regime, x.level, x.decay) == (regime, LEVELS[0], WEAK)
            and x.problem_key["dtype"] == "bf16"
            and x.provenance == "measured"
        ]
        if times:
            found[path.parent.name] = "{1:.3f} / {0:.3f}".format(*min(times))
    return found


def family(found: Members, filed: Mapping[str, str]) -> Iterator[str]:
    """The members of the family that have kernels, and what one call takes beside its peer's."""
    titles = ("op", "S_t =", "a token's tensors", "forward, ms", "forward+backward", "a peer takes")
    yield line([*titles, "on file, GPU alone"])
    yield "|---|---|---|---:|---:|---:|---:|"
    for name in OPS:
        member = recurrence_named(name)
        dims: dict[str, list[str]] = {}
        for x in member.required:
            dims.setdefault(", ".join(x.symbols), []).append(x.name)
        tensors = "; ".join(f"{', '.join(names)} [{shape}]" for shape, names in dims.items())
        public = member.public
        names = [public.chunk, *([public.elsewhere.split(".")[-1]] if public.elsewhere else [])]
        op = f"{', '.join(f'`{x}`' for x in names)}: {member.title} ({member.source})"
        times = [*beside_peer(found.rows.get(name)), filed.get(name, "-")]
        yield line([op, f"`{member.update}`", tensors, *times])
    yield line([*MAMBA3_CELLS, *beside_peer(found.rows.get(MAMBA3)), "-"])


def beside_peer(row: Row | None) -> list[str]:
    """Times of a member and its peer, and how many times as long the peer takes."""
    if row is None:
        return ["-", "-", "-"]
    ours, theirs = row["ours"], row["fla"]
    times = [f"{ours[side]['median']:.3f}" for side in SIDES]
    if theirs is None:
        return [*times, "-"]
    times = [
        f"{x}, {peer_of(row)} {theirs[y]['median']:.3f}" for x, y in zip(times, SIDES, strict=True)
    ]
    return [*times, " / ".join(f"{x:.1f}x" for x in row["ratio_to_fla"])]


def peer_of(row: Row) -> str:
    name = row.get("peer", "fla")
    return "FLA" if name == "fla" else str(name)


def picture(found: Members) -> str:
    """Bars of forward+backward: each member, and its peer below."""
    groups = []
    for name in (*OPS, MAMBA3):
        row = found.rows.get(name)
        if row is None:
            continue
        sides = {"ours": row["ours"], peer_of(row): row["fla"]}
        both = {x: y["forward_backward"]["median"] for x, y in sides.items() if y}
        group = [
            Bar("ours" if x == "ours" else "peer", y, f"{y:.2f} ms {x}") for x, y in both.items()
        ]
        title = MAMBA3_TITLE if name == MAMBA3 else recurrence_named(name).title
        groups.append((f"{title}, {shown(name)}, {found.gpu}", group))
    return bars(groups, width=760).replace(">", f">{STYLE}", 1) + "\n"


def section(document: dict[str, Any], stored: Iterable[str]) -> str:
    """All results of one GPU: tables for each problem and level, then what is on file."""
    lines = [f"### {document['gpu']}", ""]
    rows = sorted(document["rows"], key=lambda row: (problem_of(row), _place(row["shape"])))
    shown: list[str] = []
    for _, same in groupby(rows, key=problem_of):
        found = list(same)
        wrong = list(errors(found))
        lines += block(found, ["Errors as in the table above."] if wrong == shown else wrong)
        shown = wrong
    lines += stored
    return "\n".join(lines).rstrip()


def on_file(root: Path, name: str) -> Iterator[str]:
    """The tuner's own times in the tuned files called `name`: a table for each problem."""
    for path in sorted(root.glob(f"tuned/*/{name}")):
        file = load_tuned(path)
        if file is None:
            continue
        entries = sorted(
            file.entries, key=lambda entry: (_order(dict(entry.problem_key)), entry.decay != WEAK)
        )
        for _, same in groupby(entries, key=lambda x: (dict(x.problem_key), x.decay)):
            yield from graphs(list(same))
            yield ""
        versions = ", ".join(f"{x} {version}" for x, version in file.metadata["toolchain"].items())
        date, command = file.metadata["date"][:10], file.metadata["command"]
        yield f"- {path.relative_to(root)}, last changed {date}: `{command}`; {versions}"
        yield ""


def graphs(entries: list[Entry]) -> Iterator[str]:
    """Entries of one problem, at the shapes that have a name."""
    names = {str(shape.regime.key): shape.name for shape in SHAPES.values()}
    sides = ["forward", *(f"forward+backward, {level}" for level in LEVELS)]
    found: dict[str, dict[str, float]] = {side: {} for side in sides}
    others = stand_ins(entries)
    for entry in entries:
        if entry.key in others:
            continue
        shape, times = names.get(str(entry.regime_key), ""), entry.measured
        if entry.level == LEVELS[0]:
            found["forward"][shape] = times["forward_ms"]
        found[f"forward+backward, {entry.level}"][shape] = times["forward_backward_ms"]
    columns = [name for name in SHAPES if any(name in times for times in found.values())]
    problem = problem_words(dict(entries[0].problem_key))
    decay = entries[0].decay
    under = "" if decay == WEAK else f", under {decay} decay"
    yield f"**{problem}: by the tuner, as CUDA graphs{under}, ms**"
    yield ""
    yield from header("", *columns)
    for side, times in found.items():
        if times:
            cells = [f"{times[x]:.3f}" if x in times else "-" for x in columns]
            yield line([side, *cells])


def problem_of(row: Row) -> tuple[Any, ...]:
    """Rows of one problem, level and decay share a block, large heads first; packing is in the
    shape."""
    packing = ("varlen", "packed")
    problem = {name: value for name, value in row["problem"].items() if name not in packing}
    return (*_order(problem, LEVELS.index(row["level"])), decay_of(row) != WEAK)


def _order(problem: Row, level: int = 0) -> tuple[int, int, int, str]:
    return (
        (*OPS, MAMBA3).index(problem["op"]),
        -problem["K"],
        -problem["V"],
        json.dumps([level, problem], sort_keys=True),
    )


def _place(shape: dict[str, Any]) -> tuple[int, str]:
    names = [*SHAPES]
    return (names.index(shape["name"]) if shape["name"] in SHAPES else len(names), shape["name"])


def block(rows: list[Row], wrong: list[str]) -> list[str]:
    return [
        f"**{problem_words(rows[0]['problem'])}, level {rows[0]['level']}{_expecting(rows[0])}**",
        "",
        *times(rows),
        "",
        *wrong,
        "",
        *runs(rows),
        "",
    ]


def runs(rows: list[Row]) -> Iterator[str]:
    """Which command measured what, when, and with which versions."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        run = (row["date"], row["command"], versions)
        found.setdefault(run, []).append(row["shape"]["name"])
    for (date, command, versions), names in found.items():
        yield f"- {', '.join(names)}: {date[:10]}, `{command}`; {versions}"


def problem_words(problem: Row) -> str:
    words = "" if problem["op"] == OPS[0] else f"{problem['op']}, "
    words += f"K={problem['K']}, V={problem['V']}, {problem['dtype']}, g {problem['gate_dtype']}"
    words += ", l2norm in the kernels" if problem["l2norm"] else ""
    if problem["op"] == MAMBA3:
        return words + (", D and Z" if problem["gate"] else "")
    words += ", with z" if problem.get("has_z") else ""
    return words + (f", {problem['gate']} gate" if problem["gate"] != "none" else "")


def times(rows: list[Row]) -> Iterator[str]:
    yield from header(
        "shape (BxTxH)", "forward ms", "FLA", "FLA / ours", "x floor",
        "forward+backward ms", "FLA", "FLA / ours", "x floor", "peak MiB", "FLA",
    )  # fmt: skip
    for row in rows:
        cells = [shape_words(row["shape"])]
        for index, side in enumerate(SIDES):
            fla = row["fla"]
            cells += [
                f"{row['ours'][side]['median']:.3f}",
                f"{fla[side]['median']:.3f}" if fla else "-",
                f"{row['ratio_to_fla'][index]:.2f}" if fla else "-",
                f"{row['ratio_to_floor'][index]:.2f}",
            ]
        cells.append(f"{row['ours']['peak_mib']:.0f}")
        cells.append(f"{row['fla']['peak_mib']:.0f}" if row["fla"] else "-")
        yield line(cells)


def errors(rows: list[Row]) -> Iterator[str]:
    """They do not depend on the shape: the worst of all rows."""
    yield from header("worst relative error against fp64", "ours", "gates", "FLA", "gates")
    ours = [row["ours"]["errors"] for row in rows]
    theirs = [row["fla"]["errors"] for row in rows if row["fla"]]
    for name in dict.fromkeys(name for found in ours for name in found):
        yield line([name, *worst(name, ours), *worst(name, theirs)])


def worst(name: str, sides: list[Row]) -> list[str]:
    found = [side[name] for side in sides if name in side]
    if not found:
        return ["-", "-"]
    most = max(found, key=lambda x: float(x["error"]))
    return [f"{most['error']:.1e}", most["regime"]]


def shape_words(shape: Row) -> str:
    sizes = f"{shape['B']}x{shape['T']}x{shape['H']}"
    packed = shape["cu_seqlens"]
    words = f"{len(packed) - 1} packed in {sizes}" if packed else sizes
    return words if shape["name"] == sizes else f"{shape['name']} ({words})"


def header(*titles: str) -> Iterator[str]:
    yield line(list(titles))
    yield "|---|" + "---:|" * (len(titles) - 1)


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
