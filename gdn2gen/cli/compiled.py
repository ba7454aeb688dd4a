"""`gdn2gen compile`: a folder of kernels that ships in a container."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from gdn2gen.base.errors import InputError
from gdn2gen.base.terminal import console, status
from gdn2gen.cli.options import (
    LEVEL_WORDS,
    add_decay,
    add_problem,
    add_shapes,
    add_target,
    mamba3_problem_of,
    problem_of,
    some_path,
    usual_of,
    words_of,
)
from gdn2gen.family.decoding import DECODING_FLAGS
from gdn2gen.family.mamba3_problem import MAMBA3
from gdn2gen.kernels.plans import LEVELS


def add_compile(parser: argparse.ArgumentParser) -> None:
    add_problem(parser, extras=True, also=(MAMBA3,))
    add_shapes(parser, usual="train4k")
    add_target(
        parser,
        "GPU or bare target to compile for (the present GPU, or sm_90 without one)",
        "--device",
    )
    parser.add_argument(
        "--out", type=some_path, required=True, metavar="DIR", help="the folder, new or added to"
    )
    parser.add_argument(
        "--level",
        choices=tuple(LEVEL_WORDS),
        default=LEVELS[0],
        help="lean saves memory, fast saves time (%(default)s)",
    )
    add_decay(parser, "what the calls expect of their decay")
    parser.add_argument(
        "--forward-only", action="store_true", help="without the kernels of gradients"
    )
    parser.add_argument(
        "--decode",
        default="",
        metavar="LIST",
        help="also of the mode `recurrent`: sizes NxTxH of its calls, such as 1x1x16,64x1x16",
    )
    parser.add_argument(
        "--decode-with",
        default="",
        metavar="NAME,...",
        help=f"what those calls take: {', '.join(DECODING_FLAGS)}",
    )
    parser.add_argument(
        "--serving",
        action="store_true",
        help="also of prefill with states in slots of a pool, checkpoints and intermediate states",
    )
    parser.add_argument(
        "--language",
        choices=("triton",),
        help="triton: a folder that needs no TileLang, with Triton's default config for stages "
        "that are tuned in TileLang",
    )
    parser.set_defaults(run=compile_command)


def compile_command(args: argparse.Namespace) -> int:
    """Compile, and say what was written and how a process is pointed at it."""
    from gdn2gen.workflows.compiled import compile_kernels

    named = [x.strip() for x in args.decode_with.split(",") if x.strip()]
    unknown = [x for x in named if x not in DECODING_FLAGS]
    if unknown or (named and not args.decode):
        raise InputError(
            f"--decode-with takes {', '.join(DECODING_FLAGS)} beside --decode, but got "
            f"{', '.join(unknown or named)}"
        )
    if args.shapes is None:
        args.shapes = (*usual_of(args.op).shapes, "train4k")[0]
    problem: dict[str, Any]
    if args.op == MAMBA3:
        asked = mamba3_problem_of(args)
        problem = {"op": MAMBA3, **{x.name: getattr(asked, x.name) for x in fields(asked)}}
        problem["head_dim"], problem["value_dim"] = asked.K, asked.V
        del problem["state_size"]
    else:
        problem = words_of(problem_of(args))
    with status(console()) as say:
        compiled = compile_kernels(
            args.out,
            args.shapes,
            levels=LEVEL_WORDS[args.level],
            decay=args.decay,
            backward=not args.forward_only,
            decode=args.decode,
            decode_fields=dict.fromkeys(named, True),
            serving=args.serving,
            target=args.target,
            language=args.language,
            say=say,
            **problem,
        )
    print(
        f"compiled {len(compiled.seconds)} kernels for {compiled.device.name} into "
        f"{compiled.folder}, {compiled.nbytes / 1e6:.1f} MB"
    )
    if compiled.lacks is not None:
        print(f"it lacks what launches them: {compiled.lacks}")
    print(f"To have calls run them: export GDN2GEN_COMPILED_DIR={compiled.folder}")
    return 0
