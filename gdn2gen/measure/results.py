"""What a benchmark run leaves behind: a table on the terminal, and a file of results per GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base.decay import WEAK
from gdn2gen.base.errors import StoreError
from gdn2gen.base.files import check_replaceable, locked_folder, replace_file
from gdn2gen.base.terminal import Sheet, command_line
from gdn2gen.measure.rows import Row
from gdn2gen.measure.sides import DECAYS, Errors, Side, Times
from gdn2gen.measure.timing import Timing

if TYPE_CHECKING:
    from rich.console import RenderableType

RESULTS_SCHEMA: Final = 1


def rows_table(rows: Sequence[Row]) -> RenderableType:
    """The rows as rich tables: times and memory, then errors, then stages where measured."""
    from rich.console import Group

    times = (_times_table(rows, side) for side in ("forward", "forward_backward"))
    parts: list[RenderableType] = [*times]
    parts += [_decays_table(rows)] if any(row.ours.decays for row in rows) else []
    parts.append(_errors_table(rows))
    parts += [_stages_table(row) for row in rows if row.stages]
    return Group(*parts)


def rows_document(rows: Sequence[Row], *, command: str | None = None) -> dict[str, Any]:
    """The rows with the GPU, the versions, the date (UTC) and the command, ready for JSON."""
    from gdn2gen.base.device import present_device, toolchain

    stamp = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": dict(toolchain()),
        "command": command or command_line(less=("--turn", "--json")),
    }
    return {
        "schema": RESULTS_SCHEMA,
        "gpu": present_device().name,
        "rows": [_row_document(row) | stamp for row in rows],
    }


def read_results(path: Path) -> dict[str, Any]:
    """Read a file of results; `rows` is a list of whatever it holds. StoreError for other files."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read as results: {error}. Give a file that `gdn2gen bench --vs fla "
            "--save` wrote"
        ) from error
    if not isinstance(document, dict) or document.get("schema") != RESULTS_SCHEMA:
        raise StoreError(
            f"{path} is not a file of results of schema {RESULTS_SCHEMA}; move it away and "
            "run the benchmark again"
        )
    for name, kind in (("gpu", str), ("rows", list)):
        if not isinstance(document.get(name), kind):
            raise StoreError(
                f"{path} should name its {name}, but has {document.get(name)!r}; move it away and "
                "run the benchmark again"
            )
    return document


def save_results(path: Path, rows: Sequence[Row], *, command: str | None = None) -> None:
    """Merge the rows into the file at `path`: same shape and problem replaces, others stay.

    The file is replaced atomically, and rows that other processes save meanwhile stay. Raises
    StoreError if the file there is not ours, or is of another GPU.
    """
    document = rows_document(rows, command=command)
    with locked_folder(path.parent):
        fresh = {_identity(row) for row in document["rows"]}
        old = [row for row in _rows_there(path, document["gpu"]) if _identity(row) not in fresh]
        # rows that are not ours stay, too
        document["rows"] = sorted(document["rows"] + old, key=_identity)
        replace_file(path, json.dumps(document, indent=1) + "\n")


def check_saveable(path: Path, gpu: str) -> None:
    """Raise what `save_results` would raise at `path` for rows of `gpu`, yet to be measured."""
    _rows_there(path, gpu)


def _rows_there(path: Path, gpu: str) -> list[Any]:
    check_replaceable(path)
    if not path.exists():
        return []
    old = read_results(path)
    if old["gpu"] != gpu:
        raise StoreError(
            f"{path} holds results of {old['gpu']!r}, these are of {gpu!r}; give another file"
        )
    rows: list[Any] = old["rows"]
    return rows


def _identity(row: Any) -> str:
    try:
        named = [row["shape"]["name"], row["problem"], row["level"]]
        named += [row["decay"]] if "decay" in row else []
    except (KeyError, TypeError):
        named = [row]
    return json.dumps(named, sort_keys=True)


def _row_document(row: Row) -> dict[str, Any]:
    stages = [
        asdict(x) | {"gbps": round(x.gbps, 1), "tflops": round(x.tflops, 1)} for x in row.stages
    ]
    return {
        "shape": asdict(row.shape),
        "problem": row.problem.document,
        "level": row.level,
        "recipe": row.recipe,
        "ours": asdict(row.ours),
        "fla": None if row.fla is None else asdict(row.fla),
        "peer": row.peer,
        "ratio_to_fla": row.ratio_to_fla,
        "floor_ms": [row.floor_forward_ms, row.floor_forward_backward_ms],
        "ratio_to_floor": row.ratio_to_floor,
        "stages": stages,
        **({} if row.decay == WEAK else {"decay": row.decay}),
    }


def _times_table(rows: Sequence[Row], side: str) -> Sheet:
    """Times of one `side`, forward or forward_backward; with the latter peak memory, too."""
    both = side == "forward_backward"
    vs_fla = any(row.fla is not None for row in rows)
    peer = _peer(rows[0]) if rows else ""
    title = "Forward+backward, and its peak memory in MiB" if both else "Forward"
    columns = ["shape", "ours", "x floor", *([peer, f"{peer} / ours"] if vs_fla else [])]
    columns += ["peak", *([f"{peer}'s"] if vs_fla else [])] if both else ["recipe"]
    table = Sheet(f"{title}: median ms, L2 flushed", columns, words=("shape", "recipe"))
    for row in rows:
        ours: Timing = getattr(row.ours, side)
        cells = [f"{ours.median:.3f}", f"{row.ratio_to_floor[both]:.2f}"]
        if vs_fla:
            cells += _fla_times(row, side)
        if both:
            cells.append(f"{row.ours.peak_mib:.0f}")
            cells += [f"{row.fla.peak_mib:.0f}" if row.fla else "-"] if vs_fla else []
        else:
            cells.append(row.recipe)
        table.add(f"{row.shape.name}{_gated(row)}", *cells)
    return table


def _peer(row: Row) -> str:
    return "FLA" if row.peer == "fla" else row.peer


def _gated(row: Row) -> str:
    """What tells rows of one shape apart."""
    return ", with z" if row.problem.has_z else ""


def _fla_times(row: Row, side: str) -> tuple[str, str]:
    if row.fla is None or row.ratio_to_fla is None:
        return "-", "-"
    theirs: Timing = getattr(row.fla, side)
    return f"{theirs.median:.3f}", f"{row.ratio_to_fla[side == 'forward_backward']:.2f}"


def _decays_table(rows: Sequence[Row]) -> Sheet:
    """Long memory and short: each side forward, and forward and backward."""
    vs = any(row.fla is not None for row in rows)
    who = ["ours", *([_peer(rows[0])] if vs else [])]
    columns = ["shape", *(f"{side}, {decay}" for side in who for decay in DECAYS)]
    title = "Weak decay (long memory) and strong (short): forward / forward+backward, median ms"
    table = Sheet(title, columns, words=("shape",))
    for row in rows:
        sides = [row.ours, *([row.fla] if vs else [])]
        cells = [_both(side.decays.get(x)) if side else "-" for side in sides for x in DECAYS]
        table.add(f"{row.shape.name}{_gated(row)}", *cells)
    return table


def _both(found: Times | None) -> str:
    if found is None:
        return "-"
    return f"{found.forward.median:.3f} / {found.forward_backward.median:.3f}"


def _errors_table(rows: Sequence[Row]) -> Sheet:
    """Errors do not depend on the shape, so the first row of each problem speaks for it."""
    labels: list[str] = []
    sides: list[Side] = []
    for row in rows:
        for label, side in (("ours", row.ours), (_peer(row), row.fla)):
            if side is not None and all(side.errors != seen.errors for seen in sides):
                labels.append(f"{label}{_gated(row)}")
                sides.append(side)
    title = "Worst relative error against fp64, and the pattern of decay it was found in"
    table = Sheet(title, ("output", *labels), words=("output",))
    names = dict.fromkeys(name for side in sides for name in side.errors)
    for name in names:
        table.add(name, *(_error_cell(side.errors.get(name)) for side in sides))
    return table


def _error_cell(found: Errors | None) -> str:
    return "-" if found is None else f"{found.error:.2e} ({found.regime})"


def _stages_table(row: Row) -> Sheet:
    rates = ("MiB to move", "GB/s", "of a copy", "GFLOP", "TFLOP/s", "of a product")
    table = Sheet(f"{row.shape.name}, stage by stage", ("stage", "ms", *rates), words=("stage",))
    for stage in row.stages:
        table.add(
            stage.stage,
            f"{stage.timing.median:.3f}",
            f"{stage.nbytes / 2**20:.0f}",
            f"{stage.gbps:.0f}",
            f"{stage.gbps / stage.copy_gbps:.0%}",
            f"{stage.flops / 1e9:.1f}",
            f"{stage.tflops:.0f}",
            f"{stage.tflops / stage.product_tflops:.0%}",
        )
    return table
