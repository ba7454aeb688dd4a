"""`gdn2gen tune` and `gdn2gen quick`: search on this GPU, or what can be done without one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gdn2gen._cli_options import (
    add_budget,
    add_problem,
    add_shapes,
    add_target,
    in_source_tree,
    present_or_target,
    problem_of,
    user_dir,
)
from gdn2gen.errors import InputError
from gdn2gen.paths import packaged_tuned_dir, user_tuned_dir
from gdn2gen.shapes import Shape, parse_shapes

if TYPE_CHECKING:
    from gdn2gen.device import Device
    from gdn2gen.problem import Problem

_LEVELS: Final = {"lean": ("lean",), "fast": ("fast",), "both": ("lean", "fast")}
_TARGET_HELP: Final = (
    "work for this GPU or bare target without running anything on a GPU: compile, check in the "
    "interpreter, rank, file as predicted (without a GPU and without a name: sm_90)"
)


def add_tune(parser: argparse.ArgumentParser) -> None:
    add_problem(parser)
    add_shapes(parser, "train4k")
    add_budget(parser, 20.0)
    add_target(parser, _TARGET_HELP)
    parser.add_argument(
        "--level",
        choices=tuple(_LEVELS),
        default="both",
        help="plan to tune: lean saves memory, fast saves time (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of tuned files (GDN2GEN_TUNED_DIR, else tuned/ of a source tree, else the "
        "user's cache)",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="Optuna storage that several GPUs or hosts share (a file in the user's cache)",
    )
    parser.set_defaults(run=tune)


def tune(args: argparse.Namespace) -> int:
    """Tune each shape and file the winners."""
    problem, shapes = problem_of(args), _shapes(args.shapes)
    device, present = present_or_target(args.target)
    folder = args.out or user_tuned_dir()
    if folder is None:
        folder = packaged_tuned_dir() if in_source_tree() else user_dir()
    levels = _LEVELS[args.level]
    if present:
        _tune_present(problem, shapes, device, args.budget, folder, args.storage, levels)
    else:
        if args.storage is not None:
            raise InputError("--storage is for studies that run on a GPU, and none is used here")
        _tune_absent(problem, shapes, device, args.budget, folder)
    _say_where(folder)
    return 0


def add_quick(parser: argparse.ArgumentParser) -> None:
    add_problem(parser)
    add_shapes(parser, "train4k")
    add_budget(parser, 3.0)
    add_target(parser, _TARGET_HELP)
    parser.set_defaults(run=quick)


def quick(args: argparse.Namespace) -> int:
    """The whole path once, in minutes; entries go to the user's folder, never to the package."""
    problem, shapes = problem_of(args), _shapes(args.shapes)
    device, present = present_or_target(args.target)
    folder = user_dir()
    if present:
        _tune_present(problem, shapes, device, args.budget, folder, None, ("lean",))
    else:
        _tune_absent(problem, shapes, device, args.budget, folder)
    os.environ["GDN2GEN_TUNED_DIR"] = str(folder)
    _say_what_runs(problem, shapes, device)
    _say_where(folder)
    return 0


def _shapes(text: str) -> list[Shape]:
    shapes = parse_shapes(text)
    if not shapes:
        raise InputError("--shapes names no shape")
    return shapes
