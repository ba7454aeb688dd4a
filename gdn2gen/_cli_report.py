"""`gdn2gen report`: what the tuner found on a GPU, as a page and a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gdn2gen._cli_options import in_source_tree, present_or_target
from gdn2gen.errors import StoreError
from gdn2gen.problem import OPS

if TYPE_CHECKING:
    from gdn2gen.device import Device
    from gdn2gen.store import TunedFile
    from gdn2gen.tune.page import Line


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, default="gdn2", help="which recurrence (%(default)s)")
    parser.add_argument(
        "--device", metavar="NAME", help="GPU (the present one, or sm_90 without one)"
    )
    parser.add_argument(
        "--storage", metavar="URL", help="the searches' Optuna storage (a file in the user's cache)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="results of `bench --vs fla --save` to show beside (docs/results of a source tree)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("gdn2gen-report.html"),
        help="(%(default)s)",
    )
    parser.set_defaults(run=report)


def report(args: argparse.Namespace) -> int:
    """Write the page, and print what is on file."""
    from gdn2gen.build import write_atomically
    from gdn2gen.tune import page, study
    from gdn2gen.tune.ledger import read_ledger
    from gdn2gen.tune.storage import open_storage

    device, _ = present_or_target(args.device)
    file = _file(args.op, device)
    lines = page.lines(file.entries if file else (), device, _results(args.results, device))
    storage = args.storage or study.storage_path(args.op, device)
    known = "://" in str(storage) or Path(storage).exists()
    sizes = {config.size("BT") for line in lines for config in line.entry.configs.values()}
    found = page.searches(open_storage(storage), args.op, device, sizes) if known else []
    refusals = page.refused(found, read_ledger(study.open_ledger(args.op, device).path))
    text = page.page(device, _facts(file), lines, found, refusals)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, text)
    args.out.chmod(0o644)  # a temporary file is its owner's alone; a page is for everyone
    _print(lines, device)
    print(f"wrote {args.out}: {len(lines)} entries, searches of {len(found)} stages")
    return 0


def _file(op: str, device: Device) -> TunedFile | None:
    from gdn2gen.sharing import on_file

    try:
        return on_file(op, device)
    except StoreError:
        return None


def _facts(file: TunedFile | None) -> dict[str, Any]:
    if file is None:
        return {}
    metadata = file.metadata
    return {**metadata["toolchain"], "tuned": str(metadata["date"])[:10]}


def _results(path: Path | None, device: Device) -> dict[str, Any] | None:
    from gdn2gen.bench import read_results
    from gdn2gen.paths import packaged_tuned_dir

    if path is None:
        if not in_source_tree():
            return None
        path = packaged_tuned_dir().parent / "docs/results" / f"{device.slug}.json"
        if not path.exists():
            return None
    return read_results(path)


def _print(lines: list[Line], device: Device) -> None:
    from rich.console import Console
    from rich.table import Table

    names = ("shape", "level", "default", "tuned", "speedup", "against FLA", "x floor")
    tables: dict[str, Table] = {}
    for x in lines:
        if x.problem not in tables:
            tables[x.problem] = Table(title=f"{device.name}, {x.problem}: forward+backward in ms")
            for name in names:
                justify: Literal["left", "right"] = "left" if name in names[:2] else "right"
                tables[x.problem].add_column(name, justify=justify)
        numbers = [(x.default_ms, "{:.3f}"), (x.tuned_ms, "{:.3f}"), (x.speedup, "{:.2f}x")]
        numbers += [(x.to_fla, "{:.2f}x"), (x.to_floor, "{:.1f}")]
        cells = ["-" if value is None else form.format(value) for value, form in numbers]
        name = x.name + (" (stale)" if x.stale else "")
        tables[x.problem].add_row(name, x.entry.level, *cells)
    Console().print(*tables.values())
