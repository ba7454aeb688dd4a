"""`gdn2gen tune` and `gdn2gen quick`: search on this GPU, or what can be done without one."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from gdn2gen.base.decay import WEAK
from gdn2gen.base.errors import InputError
from gdn2gen.base.paths import user_tuned_dir
from gdn2gen.base.terminal import console, text_width
from gdn2gen.cli.options import (
    ALL,
    LEVEL_WORDS,
    add_budget,
    add_problem,
    add_shapes,
    add_target,
    fill_in,
    mamba3_problem_of,
    present_or_target,
    problem_of,
    refuse,
    say_where,
    some_path,
    some_text,
    usual_of,
    words_of,
)
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import CHANNEL_OPS
from gdn2gen.family.shapes import parse_shapes
from gdn2gen.kernels.plans import filed_levels

if TYPE_CHECKING:
    from gdn2gen.tuning import TuneReport
    from gdn2gen.tuning.mamba3 import Mamba3Report

_TARGET_HELP: Final = (
    "work for this GPU or bare target without running anything on a GPU: compile, check in the "
    "interpreter, rank, file as predicted (without a GPU and without a name: sm_90)"
)


def add_tune(parser: argparse.ArgumentParser) -> None:
    add_problem(parser, several=("128", "64"), also=(MAMBA3, ALL))
    add_shapes(parser)
    add_budget(parser, 10.0)
    add_target(parser, _TARGET_HELP)
    parser.add_argument(
        "--level",
        choices=tuple(LEVEL_WORDS),
        default="both",
        help="level to tune: lean saves memory, fast saves time (%(default)s)",
    )
    parser.add_argument(
        "--decay",
        type=some_text,
        default=WEAK,
        metavar="weak|strong|FILE",
        help="what calls expect that find the entries, which are timed under it: weak, as a layer "
        "is drawn; strong, -20 nats in every token; FILE: decays that a model had "
        "(nn.Observatory), filed as strong. For "
        f"{', '.join(CHANNEL_OPS)}; needs a GPU if it is not weak (%(default)s)",
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
    if args.op == ALL:
        return _tune_every(args, folder)
    if args.head_dim is None:
        args.head_dim = [*usual_of(args.op).head_dims]
    fill_in(args)
    if args.op == MAMBA3:
        refuse(args, "--op mamba3 checks all that it files anew", "only_failing")
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
        search(args, folder, LEVEL_WORDS[args.level], args.storage)
    return 0


def _tune_every(args: argparse.Namespace, folder: Path) -> int:
    """Every member at its head dims, one budget for all."""
    from gdn2gen.base.paths import cache_dir
    from gdn2gen.workflows.every import Job, finished_table, jobs, tune_every, usual_sizes

    refuse(args, "--op all takes the head dims and the gate of each member", "head_dim", "gate")
    refuse(args, "--op all takes the head dims and the gate of each member", "lower_bound")
    if args.decay != WEAK:
        raise InputError("--op all is tuned for weak decay: name the --op that --decay is for")
    device, _ = present_or_target(args.target)
    levels = LEVEL_WORDS[args.level]
    given = None if args.shapes is None else len(parse_shapes(args.shapes))
    mamba3 = usual_of(MAMBA3)
    sizes = usual_sizes() | {MAMBA3: (mamba3.head_dims, len(mamba3.shapes))}
    wanted = jobs({op: (x, given or count) for op, (x, count) in sizes.items()}, levels)

    def search_one(job: Job, minutes: float) -> TuneReport | Mamba3Report | None:
        one = argparse.Namespace(**vars(args))
        one.op, one.head_dim, one.budget = job.op, job.head_dim, minutes
        fill_in(one)
        if args.only_failing and job.op != MAMBA3 and not _leave_failing(one, folder):
            return None
        return search(one, folder, levels, args.storage)

    asked = {"dtype": args.dtype, "gate_dtype": args.gate_dtype, "level": args.level}
    asked |= {"shapes": args.shapes, "out": str(folder), "only_failing": args.only_failing}
    found = tune_every(
        wanted,
        search_one,
        budget_minutes=args.budget,
        record=cache_dir() / "tune-all" / f"{device.slug}.json",
        asked=asked,
    )
    console().print(finished_table(found))
    return int(any(x.failure for x in found))


def _leave_failing(args: argparse.Namespace, folder: Path) -> bool:
    """Take the shapes whose entries all hold out of `args.shapes`; whether any is left."""
    from gdn2gen.family.decays import PATTERN_UNDER
    from gdn2gen.store import tuned_files
    from gdn2gen.tuning.gpu.backend import WorkerBackend
    from gdn2gen.tuning.recheck import amended, recheck, recheck_table
    from gdn2gen.workflows.wanted import tuned_under

    refuse(args, "--only-failing checks entries on the present GPU", "target")
    device, present = present_or_target(None)
    if not present:
        raise InputError("--only-failing checks entries on the present GPU, and there is none")
    problem, shapes = problem_of(args), parse_shapes(args.shapes)
    decay, _ = tuned_under(args.decay)
    path = tuned_files.tuned_path(folder, problem.op, device)
    tuned_files.check_mergeable(path, device.name)
    file = tuned_files.read_tuned(path, device)
    levels = filed_levels(LEVEL_WORDS[args.level], problem.op)
    wanted = {(shape.regime, level) for shape in shapes for level in levels}
    entries = [
        entry
        for entry in (file.entries if file is not None else ())
        if dict(entry.problem_key) == problem.key and (entry.regime, entry.level) in wanted
        if entry.decay == decay
    ]
    backend = WorkerBackend(device, pattern=PATTERN_UNDER[decay])
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
    left = [x for x in shapes if {(x.regime, y) for y in levels} - holding]
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

    # --op takes no Mamba-3 here
    report = cast("TuneReport", search(args, user_tuned_dir(), ("lean",)))
    for result in report.results:
        found = find_recipe(report.problem, result.shape.regime, report.device)
        print(f"\nWhat a call at {result.shape.name} runs now:")
        print(explain_recipe(found, text_width()))
    return 0


def search(
    args: argparse.Namespace, folder: Path, levels: tuple[str, ...], storage: str | None = None
) -> TuneReport | Mamba3Report:
    """Search on the present GPU, or do what can be done without one; print the report."""
    from gdn2gen.store.verified import Place, is_verified
    from gdn2gen.workflows.mamba3 import tune_mamba3
    from gdn2gen.workflows.tune import tune as workflow

    problem: Problem | Mamba3Problem
    problem = mamba3_problem_of(args) if args.op == MAMBA3 else problem_of(args)
    shapes = parse_shapes(args.shapes)
    device, present = present_or_target(args.target)
    decay = getattr(args, "decay", WEAK)  # `quick` has none
    if decay != WEAK and args.op == MAMBA3:
        raise InputError(f"--op {MAMBA3} takes as long under any decay, and takes no --decay")
    if not present:
        if decay != WEAK:
            raise InputError(
                f"nothing is timed without a GPU, and only times depend on decay, but got {decay!r}"
            )
        if storage is not None:
            raise InputError("--storage is for studies that run on a GPU, and none is used here")
        print(
            f"Without a GPU, for the target {device.name}: kernels are compiled, checked in "
            "Triton's interpreter and ranked by\ntheir compiled resources. Nothing is timed; "
            "entries are filed as predicted."
        )
    options = {"budget_minutes": args.budget, "target": args.target, "out_dir": folder}
    report: TuneReport | Mamba3Report
    if isinstance(problem, Mamba3Problem):
        report = tune_mamba3(problem, shapes, levels=levels, storage=storage, **options)
    else:
        options |= {"levels": levels, "decay": decay, "storage": storage}
        report = workflow(shapes, **options, **words_of(problem))
    console().print(report.table())
    say_where(folder)
    place = Place.of(problem)
    if not is_verified(*place, device.arch):
        print(f"Calls are refused on {device.arch} until `{place.command}` has passed there.")
    print(f"A page on it: gdn2gen report --device {report.device.slug}")
    return report
