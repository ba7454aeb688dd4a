"""`gdn2gen tune` and `gdn2gen quick`: search on this GPU, or what can be done without one."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gdn2gen.base.errors import InputError
from gdn2gen.base.paths import user_tuned_dir
from gdn2gen.base.terminal import console, text_width
from gdn2gen.cli.options import (
    add_budget,
    add_problem,
    add_shapes,
    add_target,
    fill_in,
    present_or_target,
    problem_of,
    refuse,
    say_where,
    some_path,
    some_text,
    words_of,
)
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import parse_shapes

if TYPE_CHECKING:
    from gdn2gen.tuning import TuneReport

_LEVELS: Final = {"lean": ("lean",), "fast": ("fast",), "both": ("lean", "fast")}
_TARGET_HELP: Final = (
    "work for this GPU or bare target without running anything on a GPU: compile, check in the "
    "interpreter, rank, file as predicted (without a GPU and without a name: sm_90)"
)


def add_tune(parser: argparse.ArgumentParser) -> None:
    add_problem(parser, several=("128", "64"))
    add_shapes(parser)
    add_budget(parser, 10.0)
    add_target(parser, _TARGET_HELP)
    parser.add_argument(
        "--level",
        choices=tuple(_LEVELS),
        default="both",
        help="level to tune: lean saves memory, fast saves time (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=some_path,
        metavar="DIR",
        help="folder of tuned files (GDN2GEN_TUNED_DIR, else tuned/ of a source tree, else the "
        "user's cache)",
    )
    parser.add_argument(
        "--only-failing",
        action="store_true",
        help="first check the entries on file; tune only shapes whose entry is missing, stale, "
        "wrong or slower than it was",
    )
    parser.add_argument(
        "--storage",
        type=some_text,
        metavar="URL",
        help="Optuna storage that several GPUs or hosts share (a file in the user's cache)",
    )
    parser.set_defaults(run=tune)


def tune(args: argparse.Namespace) -> int:
    """Tune each shape and file the winners."""
    from gdn2gen.workflows.tune import own_folder

    folder = args.out or own_folder()
    if args.head_dim is None:
        args.head_dim = [*recurrence_named(args.op).usual.head_dims]
    fill_in(args)
    started, budget, dims, shapes = time.monotonic(), args.budget, args.head_dim, args.shapes
    for number, dim in enumerate(dims):
        args.head_dim, args.shapes = dim, shapes
        if len(dims) > 1:
            left = budget - (time.monotonic() - started) / 60
            # a search that overran leaves the next one a minute, and says what it could not do
            args.budget = max(min(1.0, budget), left / (len(dims) - number))
            print(f"head dim {dim} ({number + 1} of {len(dims)}), {args.budget:.1f} minutes")
        if args.only_failing and not _leave_failing(args, folder):
            continue
        search(args, folder, _LEVELS[args.level], args.storage)
    return 0


def _leave_failing(args: argparse.Namespace, folder: Path) -> bool:
    """Take the shapes whose entries all hold out of `args.shapes`; whether any is left."""
    from gdn2gen.store import tuned_files
    from gdn2gen.tuning.gpu.backend import WorkerBackend
    from gdn2gen.tuning.recheck import amended, recheck, recheck_table

    refuse(args, "--only-failing checks entries on the present GPU", "target")
    device, present = present_or_target(None)
    if not present:
        raise InputError("--only-failing checks entries on the present GPU, and there is none")
    problem, shapes = problem_of(args), parse_shapes(args.shapes)
    path = tuned_files.tuned_path(folder, problem.op, device)
    tuned_files.check_mergeable(path, device.name)
    file = tuned_files.read_tuned(path, device)
    wanted = {(shape.regime, level) for shape in shapes for level in _LEVELS[args.level]}
    entries = [
        entry
        for entry in (file.entries if file is not None else ())
        if dict(entry.problem_key) == problem.key and (entry.regime, entry.level) in wanted
    ]
    backend = WorkerBackend(device)
    try:
        results = list(recheck(entries, backend, device))
    finally:
        backend.close()
    if results:
        console().print(recheck_table(results))
    # or an entry that holds no longer would outrank what is found now, by the time it once took
    tuned_files.amend_entries(path, [(x.entry, amended(x)) for x in results])
    if any(x.status == "wrong" for x in results):
        print(f"entries that give wrong results were taken out of {path}")
    # of a pair, neither may fail
    holding = {(x.entry.regime, x.entry.level) for x in results if x.holds}
    holding -= {(x.entry.regime, x.entry.level) for x in results if not x.holds}
    left = [x for x in shapes if {(x.regime, y) for y in _LEVELS[args.level]} - holding]
    print(f"{len(left)} of {len(shapes)} shapes to tune: {', '.join(x.name for x in left) or '-'}")
    args.shapes = ",".join(x.name for x in left)
    return bool(left)


def add_quick(parser: argparse.ArgumentParser) -> None:
    add_problem(parser)
    add_shapes(parser, "train4k")
    add_budget(parser, 3.0)
    add_target(parser, _TARGET_HELP)
    parser.set_defaults(run=quick)


def quick(args: argparse.Namespace) -> int:
    """The whole path once, in minutes; entries go to the user's folder, never to the package."""
    from gdn2gen.store.dispatch import explain_recipe, find_recipe

    report = search(args, user_tuned_dir(), ("lean",))
    for result in report.results:
        found = find_recipe(report.problem, result.shape.regime, report.device)
        print(f"\nWhat a call at {result.shape.name} runs now:")
        print(explain_recipe(found, text_width()))
    return 0


def search(
    args: argparse.Namespace, folder: Path, levels: tuple[str, ...], storage: str | None = None
) -> TuneReport:
    """Search on the present GPU, or do what can be done without one; print the report."""
    from gdn2gen.store.verified import Place, is_verified
    from gdn2gen.workflows.tune import tune as workflow

    problem, shapes = problem_of(args), parse_shapes(args.shapes)
    device, present = present_or_target(args.target)
    if not present:
        if storage is not None:
            raise InputError("--storage is for studies that run on a GPU, and none is used here")
        print(
            f"Without a GPU, for the target {device.name}: kernels are compiled, checked in "
            "Triton's interpreter and ranked by\ntheir compiled resources. Nothing is timed; "
            "entries are filed as predicted."
        )
    report = workflow(
        shapes,
        budget_minutes=args.budget,
        levels=levels,
        target=args.target,
        out_dir=folder,
        storage=storage,
        **words_of(problem),
    )
    console().print(report.table())
    say_where(folder)
    place = Place.of(problem)
    if not is_verified(*place, device.arch):
        print(f"Calls are refused on {device.arch} until `{place.command}` has passed there.")
    print(f"A page on it: gdn2gen report --device {report.device.slug}")
    return report
