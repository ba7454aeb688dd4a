"""Write the README's tables; with --check only say if they differ.

The ops, as the family declares them. Of each GPU, bench's tables from docs/results/<gpu>.json, and
the times on file in tuned/.

Usage: python scripts/update_readme.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # also from a source tree that is not installed

from gdn2gen.base.files import replace_file  # noqa: E402
from gdn2gen.family.registry import OPS, recurrence_named  # noqa: E402
from gdn2gen.family.shapes import NAMED_SHAPES as SHAPES  # noqa: E402
from gdn2gen.kernels.plans import LEVELS  # noqa: E402
from gdn2gen.measure.results import read_results  # noqa: E402
from gdn2gen.store.tuned_files import Entry, load_tuned  # noqa: E402

NOTHING = "No results are committed yet."
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    args = parser.parse_args()
    readme = args.root / "README.md"
    old = readme.read_text()
    new = updated(old, args.root)
    if args.check:
        if new != old:
            print("README.md is out of date; run: python scripts/update_readme.py")
        return int(new != old)
    replace_file(readme, new)
    return 0


def updated(readme: str, root: Path) -> str:
    """The README with the text between its markers made anew."""
    files = sorted((root / "docs/results").glob("*.json"))
    parts = [section(read_results(file), on_file(root, file.name)) for file in files]
    tables = {"ops": "\n".join(ops()), "results": "\n\n".join(parts) or NOTHING}
    for name, text in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in readme:
            before, rest = readme.split(begin)
            _, after = rest.split(end)
            readme = f"{before}{begin}\n{text}\n{end}{after}"
    return readme


def ops() -> Iterator[str]:
    """The members of the family that have kernels."""
    yield line(["op", "", "S_t =", "a token's tensors", "was in"])
    yield "|---|---|---|---|---|"
    for name in OPS:
        member = recurrence_named(name)
        dims: dict[str, list[str]] = {}
        for x in member.required:
            dims.setdefault(", ".join(x.symbols), []).append(x.name)
        tensors = "; ".join(f"{', '.join(names)} [{shape}]" for shape, names in dims.items())
        public = member.public
        names = [public.chunk, *([public.elsewhere.split(".")[-1]] if public.elsewhere else [])]
        op, title = ", ".join(f"`{x}`" for x in names), f"{member.title} ({member.source})"
        was_in = public.fla or public.elsewhere.rpartition(".")[0]
        yield line([op, title, f"`{member.update}`", tensors, f"`{was_in}`"])


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
        entries = sorted(file.entries, key=lambda entry: _order(dict(entry.problem_key)))
        for _, same in groupby(entries, key=lambda entry: dict(entry.problem_key)):
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
    for entry in entries:
        shape, times = names.get(str(entry.regime_key), ""), entry.measured
        if entry.level == LEVELS[0]:
            found["forward"].setdefault(shape, times["forward_ms"])
        # the first of a pair is the faster; the other needs Triton alone
        found[f"forward+backward, {entry.level}"].setdefault(shape, times["forward_backward_ms"])
    columns = [name for name in SHAPES if any(name in times for times in found.values())]
    problem = problem_words(dict(entries[0].problem_key))
    yield f"**{problem}: by the tuner, as CUDA graphs, ms**"
    yield ""
    yield from header("", *columns)
    for side, times in found.items():
        if times:
            cells = [f"{times[x]:.3f}" if x in times else "-" for x in columns]
            yield line([side, *cells])


def problem_of(row: Row) -> tuple[int, int, int, str]:
    """Rows of one problem and level share a block, large heads first; packing is in the shape."""
    problem = {name: value for name, value in row["problem"].items() if name != "varlen"}
    return _order(problem, LEVELS.index(row["level"]))


def _order(problem: Row, level: int = 0) -> tuple[int, int, int, str]:
    return (
        OPS.index(problem["op"]),
        -problem["K"],
        -problem["V"],
        json.dumps([level, problem], sort_keys=True),
    )


def _place(shape: dict[str, Any]) -> tuple[int, str]:
    names = [*SHAPES]
    return (names.index(shape["name"]) if shape["name"] in SHAPES else len(names), shape["name"])


def block(rows: list[Row], wrong: list[str]) -> list[str]:
    return [
        f"**{problem_words(rows[0]['problem'])}, level {rows[0]['level']}**",
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
    return words + (f", {problem['gate']} gate" if problem["gate"] != "none" else "")


def times(rows: list[Row]) -> Iterator[str]:
    yield from header(
        "shape (BxTxH)", "forward ms", "FLA", "FLA / ours", "x floor",
        "forward+backward ms", "FLA", "FLA / ours", "x floor", "peak MiB", "FLA",
    )  # fmt: skip
    for row in rows:
        cells = [shape_words(row["shape"])]
        for index, side in enumerate(("forward", "forward_backward")):
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
