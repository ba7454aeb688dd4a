"""`gdn2gen explain` and `gdn2gen generate`: look at recipes and at rendered kernels."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base.decay import WEAK
from gdn2gen.base.errors import ConfigError, InputError
from gdn2gen.base.terminal import console, status, text_width
from gdn2gen.cli.options import (
    add_decay,
    add_problem,
    add_target,
    decoding_problem_of,
    mamba3_problem_of,
    minutes,
    part_problem_of,
    present_or_target,
    problem_of,
    refuse,
    some_path,
    usual_of,
    words_of,
)
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.mamba3_problem import MAMBA3
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import CHANNEL_OPS
from gdn2gen.family.shapes import NAMED_SHAPES, Shape, parse_shapes
from gdn2gen.kernels.config import Config, default_config, language_of
from gdn2gen.kernels.languages import LANGUAGES
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.plans import LEVELS
from gdn2gen.kernels.stages import EVERY_STAGE, STAGES
from gdn2gen.kernels.validity import why_invalid

if TYPE_CHECKING:
    from gdn2gen.tuning.mamba3_packages import Mamba3Package
    from gdn2gen.tuning.packages import Package

SHAPE: Final = "train4k"
_ANY_DECAY: Final = "--op mamba3 takes as long under any decay"


def add_explain(parser: argparse.ArgumentParser) -> None:
    add_problem(parser, extras=True, also=(MAMBA3,))
    _add_regime(parser, several=True)
    parser.add_argument(
        "--device",
        "--target",
        dest="target",
        metavar="NAME",
        help="GPU (H200, 'RTX 4090') or bare target (sm_90); the present GPU, or sm_90 without one",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail unless an exact entry is on file"
    )
    add_decay(parser, "what the call expects of its decay")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and shape")
    parser.set_defaults(run=explain)


def explain(args: argparse.Namespace) -> int:
    """Print which recipe a call would run at each shape, and why."""
    from gdn2gen.store.dispatch import Found, explain_recipe, recipe_document
    from gdn2gen.workflows.explain import explain as workflow

    if args.op == MAMBA3:
        return _explain_mamba3(args)
    words, device = words_of(problem_of(args)), present_or_target(args.target)[0]
    words |= {"level": args.level or LEVELS[0], "strict": True if args.strict else None}
    words["decay"] = args.decay
    for shape in _shapes(args):
        (found,) = workflow(shape, target=args.target, **words)
        assert isinstance(found, Found)
        if args.json:
            print(json.dumps({"shape": shape.name, **recipe_document(found)}))
            continue
        print(f"{shape.name} on {device.name}")
        print(explain_recipe(found, text_width()))
    return 0


def _explain_mamba3(args: argparse.Namespace) -> int:
    from gdn2gen.workflows.mamba3 import explain_mamba3

    refuse(args, _ANY_DECAY, "decay")
    problem, device = mamba3_problem_of(args), present_or_target(args.target)[0]
    level, strict = args.level or LEVELS[0], True if args.strict else None
    for found in explain_mamba3(problem, _shapes(args), level, args.target, strict):
        if args.json:
            print(json.dumps({"shape": found.shape.name, **found.document}))
            continue
        print(f"{found.shape.name} on {device.name}")
        print(found.words(text_width()))
    return 0


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_problem(parser, extras=True, also=(MAMBA3,))
    _add_regime(parser)
    add_target(
        parser,
        "GPU or bare target whose tuned configs are taken (the present GPU, or sm_90); with "
        "--stage, also compile for it and report its resources on stderr",
        "--device",
    )
    parser.add_argument(
        "--out", type=some_path, metavar="DIR", help="write a package to this folder"
    )
    parser.add_argument(
        "--force", action="store_true", help="also replace files of a package that were edited"
    )
    parser.add_argument(
        "--tune",
        nargs="?",
        const=5.0,
        type=minutes,
        metavar="MINUTES",
        help="tune the problem at the shape first, as `gdn2gen tune` would (%(const)s): timed on "
        "the present GPU or ranked for the target, and filed",
    )
    parser.add_argument(
        "--stage",
        choices=tuple(EVERY_STAGE),
        metavar="NAME",
        help="print one kernel instead: that of a stage which `gdn2gen explain` shows, such as "
        "prepare, scan or grad_key, of decoding (recurrent) or of a part of a layer (short_conv, "
        "gated_norm); any other name says all that there are",
    )
    parser.add_argument(
        "--language",
        choices=tuple(LANGUAGES),
        help="triton: a package that does not need TileLang, with Triton's default config for "
        "stages that are tuned in TileLang; of --stage, the language of the kernel (what is tuned)",
    )
    parser.add_argument(
        "--config",
        metavar="'KNOB=VALUE ...'",
        help="knobs of --stage, as in 'BT=64 num_warps=8'; the others stay at their defaults",
    )
    add_decay(parser, "whose entries a package is made of, and --tune files")
    parser.set_defaults(run=generate)


def generate(args: argparse.Namespace) -> int:
    """Write a package of kernels, or print one kernel to stdout."""
    if args.stage is not None:
        unused = ("out", "shape", "level", "tune", "decay")
        refuse(args, "--stage prints one kernel to stdout", *unused)
        return _print_stage(args)
    if args.config is not None:
        raise InputError("--config describes one kernel and needs --stage")
    if args.out is None:
        raise InputError("give --out DIR for a package, or --stage NAME to print one kernel")
    if args.language not in (None, "triton"):
        raise InputError(
            f"a package is as tuned or --language triton, but got --language {args.language}; "
            "--stage NAME prints one kernel in it"
        )
    shapes = _shapes(args)
    if len(shapes) != 1:
        names = ", ".join(x.name for x in shapes)
        raise InputError(f"a package is made for one shape, but got {names}")
    from gdn2gen.cli.tune import search
    from gdn2gen.store.dispatch import reload
    from gdn2gen.tuning import mamba3_packages, packages
    from gdn2gen.workflows.tune import own_folder
    from gdn2gen.workflows.wanted import expected_from

    if args.op == MAMBA3:
        refuse(args, _ANY_DECAY, "decay")
    level = args.level or LEVELS[0]
    decay = expected_from(args.decay) if args.op in CHANNEL_OPS else WEAK
    problem = mamba3_problem_of(args) if args.op == MAMBA3 else problem_of(args)
    if args.tune is not None:
        args.budget, args.shapes, args.decay = args.tune, shapes[0].name, decay
        search(args, own_folder(), (level,))
        reload()
    device, present = present_or_target(args.target)
    given = (shapes[0], device, args.out)
    options: dict[str, Any] = {"present": present, "level": level, "force": args.force}
    options["language"] = args.language
    package: Package | Mamba3Package
    with status(console()) as say:
        if isinstance(problem, Problem):
            options["decay"] = decay
            package = packages.make(_at(problem, shapes[0]), *given, **options, say=say)
        else:
            asked = replace(problem, packed=problem.packed or shapes[0].cu_seqlens is not None)
            package = mamba3_packages.make_mamba3(asked, *given, **options, say=say)
    _say_written(package)
    return 0


def _say_written(package: Package | Mamba3Package) -> None:
    from gdn2gen.store.dispatch import Found, explain_recipe

    found, needs, hint = package.found, "torch and triton", ""
    if isinstance(found, Found):
        print(explain_recipe(found, text_width()))
        if any(language_of(x) == "tilelang" for x in found.recipe.configs):
            needs, hint = "torch, triton and tilelang", " (--language triton: nor tilelang)"
    else:
        print(found.words(text_width()))
    if package.proof is not None:
        print(package.proof.words)
    print(f"wrote {len(package.files)} files, which need {needs} but not gdn2gen{hint}:")
    for file in package.files:
        print(f"  {file}")


def _print_stage(args: argparse.Namespace) -> int:
    from gdn2gen.codegen.render import render

    stage = EVERY_STAGE[args.stage]
    problem: Compiled
    if isinstance(stage, PartStage):
        problem = part_problem_of(args, stage.made_for)
    else:
        problem = problem_of(args) if args.stage in STAGES else decoding_problem_of(args)
    device = None if args.target is None else present_or_target(args.target)[0]
    arch = None if device is None else device.arch
    words = args.config or ""
    if args.language is not None:
        words = f"{words} language={args.language}"
    config = parse_config(args.stage, words, problem, arch)
    reason = why_invalid(config, problem, arch)
    if reason is not None:
        where = "" if arch is None else f" on {arch}"
        raise ConfigError(f"{args.stage} [{config}] cannot serve this problem{where}: {reason}")
    sys.stdout.write(render(problem, args.stage, config).source)
    if device is not None:
        from gdn2gen.codegen.build import compile_ahead

        used = compile_ahead(problem, args.stage, config, device)
        print(
            f"{args.stage} for {device.arch}: {used.registers} registers, "
            f"{used.spill_bytes} bytes spilled per thread, {used.shared_bytes} bytes of shared "
            f"memory of {device.shared_bytes}, compiled in {used.seconds:.1f} s",
            file=sys.stderr,
        )
    return 0


def parse_config(stage: str, text: str, problem: Compiled, arch: str | None = None) -> Config:
    """`BT=64 num_warps=8` as a Config of `stage`; knobs left out keep their defaults for `arch`."""
    knobs: dict[str, Knob] = {}
    for word in text.replace(",", " ").split():
        name, separator, value = word.partition("=")
        if not separator or not value:
            raise ConfigError(f"--config takes KNOB=VALUE words, but got {word!r}")
        if name in knobs:
            raise ConfigError(f"{name} is given twice: {knobs[name]} and {value}")
        knobs[name] = int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else value
    return Config.of(stage, {**default_config(stage, problem, arch=arch), **knobs})


def _shapes(args: argparse.Namespace) -> list[Shape]:
    usual = (*usual_of(args.op).shapes, SHAPE)[0]
    return parse_shapes(usual if args.shape is None else args.shape)


def _at(problem: Problem, shape: Shape) -> Problem:
    """`problem` for the calls at `shape`: packed if the shape is."""
    return replace(problem, varlen=problem.varlen or shape.cu_seqlens is not None)


def _add_regime(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    parser.add_argument(
        *("--shape", "--shapes")[: 1 + several],
        metavar="LIST" if several else "NAME",
        help=f"{'any' if several else 'one'} of {', '.join(NAMED_SHAPES)}, or BxTxH such as "
        f"4x4096x16{', comma-separated' if several else ''} ({SHAPE}; mamba2, mamba3: mamba4k)",
    )
    parser.add_argument(
        "--level",
        choices=LEVELS,
        help=f"lean saves memory, fast saves time ({LEVELS[0]})",
    )
