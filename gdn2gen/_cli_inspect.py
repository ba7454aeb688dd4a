"""`gdn2gen explain` and `gdn2gen generate`: look at recipes and at rendered kernels."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from gdn2gen._cli_options import add_problem, add_target, present_or_target, problem_of
from gdn2gen.config import Config, Knob, default_config
from gdn2gen.errors import ConfigError, InputError
from gdn2gen.plans import PLANS_OF
from gdn2gen.problem import Problem
from gdn2gen.shapes import SHAPES, Shape, parse_shapes
from gdn2gen.stages import STAGES


def add_explain(parser: argparse.ArgumentParser) -> None:
    add_problem(parser, extras=True)
    _add_regime(parser)
    parser.add_argument(
        "--device",
        dest="target",
        metavar="NAME",
        help="GPU (H200, 'RTX 4090') or bare target (sm_90); the present GPU, or sm_90 without one",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail unless an exact entry is on file"
    )
    parser.set_defaults(run=explain)


def explain(args: argparse.Namespace) -> int:
    """Print which recipe a call would run at each shape, and why."""
    from gdn2gen.dispatch import explain_recipe, find_recipe

    problem = problem_of(args)
    device, _ = present_or_target(args.target)
    for shape in parse_shapes(args.shape):
        strict = True if args.strict else None
        recipe = find_recipe(
            _at(problem, shape), shape.regime, device, level=args.level, strict=strict
        )
        print(f"{shape.name} on {device.name}")
        print(explain_recipe(recipe))
    return 0


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_problem(parser, extras=True)
    _add_regime(parser)
    add_target(
        parser,
        "GPU or bare target whose tuned configs are taken (the present GPU, or sm_90); with "
        "--stage, also compile for it and report its resources on stderr",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a package to this folder")
    parser.add_argument("--stage", choices=tuple(STAGES), help="print one kernel instead")
    parser.add_argument(
        "--config",
        metavar="'KNOB=VALUE ...'",
        help="knobs of --stage, as in 'BT=64 num_warps=8'; the others stay at their defaults",
    )
    parser.set_defaults(run=generate)


def generate(args: argparse.Namespace) -> int:
    """Write a package of kernels, or print one kernel to stdout."""
    if args.stage is not None:
        return _print_stage(args)
    if args.config is not None:
        raise InputError("--config describes one kernel and needs --stage")
    if args.out is None:
        raise InputError("give --out DIR for a package, or --stage NAME to print one kernel")
    shapes = parse_shapes(args.shape)
    if len(shapes) != 1:
        raise InputError(f"a package is made for one shape, but got {args.shape!r}")
    from gdn2gen.dispatch import explain_recipe, find_recipe
    from gdn2gen.generate import generate_package

    problem = _at(problem_of(args), shapes[0])
    device, _ = present_or_target(args.target)
    recipe = find_recipe(problem, shapes[0].regime, device, level=args.level)
    files = generate_package(problem, args.out, recipe)
    print(explain_recipe(recipe))
    print(f"wrote {len(files)} files, which need torch and triton but not gdn2gen:")
    for file in files:
        print(f"  {file}")
    return 0


def _print_stage(args: argparse.Namespace) -> int:
    from gdn2gen.render import render

    problem = problem_of(args)
    config = parse_config(args.stage, args.config or "", problem)
    sys.stdout.write(render(problem, args.stage, config).source)
    if args.target is not None:
        from gdn2gen.build import compile_ahead

        device, _ = present_or_target(args.target)
        used = compile_ahead(problem, args.stage, config, device)
        print(
            f"{args.stage} for {device.arch}: {used.registers} registers, "
            f"{used.spill_bytes} bytes spilled per thread, {used.shared_bytes} bytes of shared "
            f"memory of {device.shared_bytes}, compiled in {used.seconds:.1f} s",
            file=sys.stderr,
        )
    return 0


def parse_config(stage: str, text: str, problem: Problem) -> Config:
    """`BT=64 num_warps=8` as a Config of `stage`; knobs left out keep their defaults."""
    knobs: dict[str, Knob] = {}
    for word in text.replace(",", " ").split():
        name, separator, value = word.partition("=")
        if not separator or not value:
            raise ConfigError(f"--config takes KNOB=VALUE words, but got {word!r}")
        knobs[name] = int(value) if value.lstrip("-").isdigit() else value
    return Config.of(stage, {**default_config(stage, problem), **knobs})


def _at(problem: Problem, shape: Shape) -> Problem:
    """`problem` for the calls at `shape`: packed if the shape is."""
    return replace(problem, varlen=problem.varlen or shape.cu_seqlens is not None)


def _add_regime(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        default="train4k",
        metavar="NAME",
        help=f"one of {', '.join(SHAPES)}, or BxTxH such as 4x4096x16 (%(default)s)",
    )
    parser.add_argument(
        "--level",
        choices=tuple(PLANS_OF),
        default="lean",
        help="lean saves memory, fast saves time (%(default)s)",
    )
