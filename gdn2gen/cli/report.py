"""`gdn2gen report`: what the tuner found on a GPU, as a page and a table."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base.errors import StoreError, TunedFileWarning
from gdn2gen.base.files import check_replaceable, replace_file
from gdn2gen.base.terminal import Sheet, console
from gdn2gen.cli.options import (
    add_device,
    add_op,
    present_or_target,
    some_path,
    some_text,
)
from gdn2gen.family.mamba3_problem import PART_OPS

if TYPE_CHECKING:
    from gdn2gen.base.device import Device
    from gdn2gen.store.tuned_files import TunedFile
    from gdn2gen.tuning.views.lines import Line

PAGE: Final = Path("gdn2gen-report.html")


def add_report(parser: argparse.ArgumentParser) -> None:
    add_op(parser, also=PART_OPS)
    add_device(parser)
    parser.add_argument(
        "--storage",
        type=some_text,
        metavar="URL",
        help="the searches' Optuna storage (a file in the user's cache)",
    )
    parser.add_argument(
        "--results",
        type=some_path,
        metavar="FILE",
        help="results of `bench --vs fla --save` to show beside (docs/results of a source tree)",
    )
    parser.add_argument(
        "--out",
        type=some_path,
        metavar="FILE",
        help=f"the page ({PAGE}; with --json none)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per line and entry, instead of a table"
    )
    parser.set_defaults(run=report)


def report(args: argparse.Namespace) -> int:
    """Write the page, and print what is on file."""
    from gdn2gen.store.sharing import parts_of
    from gdn2gen.tuning.records.ledger import read_lines
    from gdn2gen.tuning.records.places import open_ledger, storage_path
    from gdn2gen.tuning.records.storage import read_storage
    from gdn2gen.tuning.views import page
    from gdn2gen.tuning.views.lines import fla_times, lines
    from gdn2gen.tuning.views.parts import part_lines, parts_sheet

    out = args.out or (None if args.json else PAGE)
    if out is not None:
        check_replaceable(out)
    device, _ = present_or_target(args.device)
    storage = args.storage or storage_path(args.op, device)
    # without a name, a search need not have been made here
    known = args.storage is not None or Path(storage).exists()
    searched = read_storage(storage) if known else None
    file = _file(args.op, device)
    fla, odd = fla_times(_results(args.results, device))
    rows = lines(file.entries if file else (), device, fla)
    parts = part_lines(args.op, parts_of(args.op, device) if args.op in PART_OPS else ())
    odd += [words for x in rows for words in x.odd]
    sizes = {config.size("BT") for x in rows for config in x.entry.configs.values()}
    found = page.searches(searched, args.op, device, sizes) if searched else []
    ledger, odd_lines = read_lines(open_ledger(args.op, device).path)
    for words in (*odd, *odd_lines):
        warnings.warn(words, TunedFileWarning, stacklevel=1)
    if out is not None:
        refusals = page.refused(found, ledger)
        replace_file(out, page.page(device, _facts(file), rows, found, refusals, parts))
    if args.json:
        for document in (x.document for shown in (rows, parts) for x in shown):
            print(json.dumps({"device": device.name, **document}))
        return 0
    _print(rows, device)
    if parts:
        title = f"{device.name}, {args.op}: kernels that are in no plan, in ms"
        console().print(parts_sheet(title, parts))
    count = f"{len(rows)} entries" + (f", {len(parts)} kernels in no plan" if parts else "")
    print(f"wrote {out}: {count}, searches of {len(found)} stages")
    return 0


def _file(op: str, device: Device) -> TunedFile | None:
    from gdn2gen.store.sharing import on_file

    if op in PART_OPS:
        return None  # their scans are other ops'
    try:
        return on_file(op, device)
    except StoreError:
        return None


def _facts(file: TunedFile | None) -> dict[str, str]:
    """Versions and the date, as far as the file has them."""
    if file is None:
        return {}
    toolchain, date = file.metadata.get("toolchain"), file.metadata.get("date")
    versions = toolchain if isinstance(toolchain, Mapping) else {}
    facts = {name: x for name, x in versions.items() if isinstance(x, str)}
    return {**facts, "tuned": date[:10]} if isinstance(date, str) else facts


def _results(path: Path | None, device: Device) -> list[Any]:
    """Rows of results of this GPU; StoreError for those of another."""
    from gdn2gen.base.paths import packaged_tuned_dir
    from gdn2gen.measure.results import read_results
    from gdn2gen.workflows.tune import in_source_tree

    if path is None:
        path = packaged_tuned_dir().parent / "docs/results" / f"{device.slug}.json"
        if not in_source_tree() or not path.exists():
            return []
    document = read_results(path)
    if document["gpu"] != device.name:
        raise StoreError(
            f"{path} holds results of {document['gpu']!r}, but the report is on {device.name!r}; "
            "give --device or other --results"
        )
    rows: list[Any] = document["rows"]
    return rows


def _print(lines: list[Line], device: Device) -> None:
    names = ("shape", "level", "default", "tuned", "speedup", "against FLA", "x floor")
    tables: dict[str, Sheet] = {}
    for x in lines:
        if x.problem not in tables:
            title = f"{device.name}, {x.problem}: forward+backward in ms"
            tables[x.problem] = Sheet(title, names, words=names[:2])
        numbers = [(x.default_ms, "{:.3f}"), (x.tuned_ms, "{:.3f}"), (x.speedup, "{:.2f}x")]
        numbers += [(x.to_fla, f"{{:.2f}}x{x.of_fla}"), (x.to_floor, "{:.1f}")]
        cells = ["-" if value is None else form.format(value) for value, form in numbers]
        if x.tuned_ms is None:
            cells[1:3] = "predicted", "-" if x.expected is None else f"expects {x.expected:.2f}x"
        name = x.name + (" (stale)" if x.stale else "")
        tables[x.problem].add(name, x.level, *cells)
    console().print(*tables.values())
