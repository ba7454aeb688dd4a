"""Options that several commands share, and what they mean as problem, shapes, device and folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base.decay import DECAYS, WEAK
from gdn2gen.base.errors import InputError
from gdn2gen.base.files import check_replaceable, replace_file
from gdn2gen.family.decoding import DECODING_EXTRAS, DecodingProblem
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem, usual_mamba3_problem
from gdn2gen.family.parts import PartProblem
from gdn2gen.family.problem import (
    DIMS,
    DTYPES,
    EXTRAS,
    WHERE_TAKEN,
    Problem,
    bound_of,
    check_lower_bound,
    gate_parameters,
)
from gdn2gen.family.recurrence import GATES, Usual
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.family.shapes import NAMED_SHAPES, SHAPES
from gdn2gen.kernels.plans import LEVELS

if TYPE_CHECKING:
    from gdn2gen.base.device import Device

ALL: Final = "all"
"""What --op takes for every member, where it does."""
LEVEL_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    **{level: (level,) for level in LEVELS},
    "both": tuple(LEVELS),
}
"""What --level takes where several levels may be meant, and those that it means."""
ALL_SHAPES: Final = "all but mamba4k"
_MAMBA3_USUAL: Final = Usual(head_dims=("128,64",), shapes=("mamba4k",))


def add_problem(
    parser: argparse.ArgumentParser,
    *,
    extras: bool = False,
    several: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
) -> None:
    """Add the options that make a Problem (see `problem_of`).

    With `several`, --head-dim takes any number of head dims, by default these. `also`: words that
    --op takes beside recurrences.
    """
    group = parser.add_argument_group("problem")
    add_op(group, also=also)
    group.add_argument(
        "--head-dim",
        nargs="+" if several else None,
        default=None,
        metavar="K[,V]",
        help=f"key head dim, and value head dim if it differs: multiples of {DIMS['K'].step} from "
        f"{DIMS['K'].start} to {DIMS['K'].stop - 1}, and to {DIMS['V'].stop - 1} "
        f"({' '.join(several) or '128'}{', one after the other' if several else ''}; "
        "mamba2, mamba3: 128,64)",
    )
    if not several:
        group.add_argument(
            "--value-dim", type=int, metavar="V", help="value head dim (what --head-dim says)"
        )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="of q, k, v, o, and of what erases and writes (%(default)s)",
    )
    group.add_argument("--gate-dtype", choices=DTYPES, default="fp32", help="of g (%(default)s)")
    group.add_argument(
        "--gate",
        choices=GATES,
        help="none: g is the natural-log decay; else its activation in the kernels (none; mamba2: "
        "softplus)",
    )
    add_lower_bound(
        group,
        "least decay a token with --gate sigmoid, in [-5, 0), in whole nats: kernels may then "
        "count on it, and entries are filed for it (any)",
    )
    group.add_argument(
        "--no-l2norm",
        dest="l2norm",
        action="store_false",
        default=WHERE_TAKEN,
        help="q and k are not normalised in the kernels, where those can",
    )
    if extras:
        group.add_argument(
            "--with",
            dest="extras",
            metavar="NAME,...",
            help=f"arguments that the kernels take as well: {', '.join(EXTRAS)}; with --stage "
            f"recurrent also {', '.join(x for x in DECODING_EXTRAS if x not in EXTRAS)}; with "
            "--stage of a layer's part its fields, as in width:3,bias "
            f"(with a gate its parameters; else none)",
        )


def problem_of(args: argparse.Namespace) -> Problem:
    """The Problem that the options describe."""
    fill_in(args)
    K, V = parse_head_dim(args.head_dim, getattr(args, "value_dim", None))
    problem = Problem(args.op, K, V, args.dtype, args.gate_dtype, args.l2norm)
    extras = getattr(args, "extras", None)
    return with_extras(problem, args.gate, extras, bound_option(args.gate, args.lower_bound))


def usual_of(op: str) -> Usual:
    """What is meant of a member where nothing is asked for: as its models have it."""
    return _MAMBA3_USUAL if op == MAMBA3 else recurrence_named(op).usual


def fill_in(args: argparse.Namespace) -> None:
    """Head dims, gate and shapes that were not given: as the member's models have them."""
    usual = usual_of(args.op)
    if getattr(args, "head_dim", "") is None:
        args.head_dim = usual.head_dims[0]
    if getattr(args, "gate", "") is None:
        args.gate = usual.gate
    if getattr(args, "shapes", "") is None:
        args.shapes = ",".join(usual.shapes or SHAPES)


def mamba3_problem_of(args: argparse.Namespace) -> Mamba3Problem:
    """The same of --op mamba3, of which --with names fields. Raises InputError for what is of
    recurrences alone."""
    fill_in(args)
    refuse_of_mamba3(args)
    K, V = parse_head_dim(args.head_dim, getattr(args, "value_dim", None))
    problem = usual_mamba3_problem(K, V, args.dtype, {})
    words = (x.strip() for x in (getattr(args, "extras", None) or "").split(","))
    return problem.with_extras(x for x in words if x)


def refuse_of_mamba3(args: argparse.Namespace) -> None:
    """InputError for options that say nothing of Mamba-3."""
    given = {
        "--gate": args.gate != "none",
        "--gate-dtype": getattr(args, "gate_dtype", "fp32") != "fp32",
        "--lower-bound": args.lower_bound is not None,
        "--no-l2norm": args.l2norm is False,
    }
    found = [name for name, is_given in given.items() if is_given]
    if found:
        raise InputError(
            f"--op {MAMBA3} has one gate, and norms outside of its op: leave "
            f"{' and '.join(found)} out"
        )


def words_of(problem: Problem) -> dict[str, Any]:
    """The keywords that describe a problem to the workflows."""
    fields = {x.name: getattr(problem, x.name) for x in dataclasses.fields(problem)}
    return {"head_dim": fields.pop("K"), "value_dim": fields.pop("V"), **fields}


def decoding_problem_of(args: argparse.Namespace) -> Problem:
    """The same of the mode `recurrent`, whose kernels count on no bound."""
    fill_in(args)
    K, V = parse_head_dim(args.head_dim, args.value_dim)
    bound_option(args.gate, args.lower_bound)
    problem = DecodingProblem(args.op, K, V, args.dtype, args.gate_dtype, args.l2norm)
    return with_extras(problem, args.gate, args.extras, known=DECODING_EXTRAS)


def part_problem_of(args: argparse.Namespace, made_for: type[PartProblem]) -> PartProblem:
    """The PartProblem that --dtype and --with describe; the other options say nothing of it."""
    words = [x.strip() for x in (args.extras or "").split(",") if x.strip()]
    return made_for(dtype=args.dtype).with_extras(words)


def add_op(
    parser: argparse._ActionsContainer, *, also: tuple[str, ...] = (), default: str = OPS[0]
) -> None:
    """--op, by default the first. `also`: words that it takes beside recurrences."""
    parser.add_argument(
        "--op", choices=(*OPS, *also), default=default, help="which recurrence (%(default)s)"
    )


def add_device(
    parser: argparse.ArgumentParser,
    help_text: str = "GPU (the present one, or sm_90 without one)",
) -> None:
    parser.add_argument("--device", metavar="NAME", help=help_text)


def add_lower_bound(parser: argparse._ActionsContainer, help_text: str) -> None:
    parser.add_argument("--lower-bound", type=float, metavar="NATS", help=help_text)


def bound_option(gate: str, lower_bound: float | None) -> int:
    """`Problem.bound` of the options --gate and --lower-bound; 0 where the latter is not given."""
    if lower_bound is None:
        return 0
    if gate != "sigmoid":
        raise InputError(f"--lower-bound is of --gate sigmoid, but got --gate {gate}")
    check_lower_bound(lower_bound)
    return bound_of(lower_bound)


def with_extras(
    problem: Problem,
    gate: str,
    names: str | None,
    bound: int = 0,
    known: Mapping[str, str] = EXTRAS,
) -> Problem:
    """Add a gate, its bound in nats (0: any), and the optional arguments named, of those `known`.

    By default those that a gated layer passes.
    """
    flags: dict[str, Any] = gate_parameters(problem.op, gate) if names is None else {}
    for name in (x.strip() for x in (names or "").split(",") if x.strip()):
        if name not in known:
            raise InputError(f"--with takes {', '.join(known)}, but got {name!r}")
        flags[known[name]] = True
    return dataclasses.replace(problem, gate=gate, bound=bound, **flags)


def parse_head_dim(text: str, value_dim: int | None = None) -> tuple[int, int]:
    """`128` or `128,64` as (K, V); V may also be said by an option of its own."""
    words = text.split(",")
    try:
        sizes = [int(word) for word in words]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2):
        raise InputError(f"--head-dim takes K or K,V such as 128 or 128,64, but got {text!r}")
    if value_dim is None:
        return sizes[0], sizes[-1]
    if len(sizes) == 2 and sizes[1] != value_dim:
        raise InputError(f"--head-dim {text} and --value-dim {value_dim} say two values of V")
    return sizes[0], value_dim


def add_shapes(
    parser: argparse.ArgumentParser, default: str | None = None, usual: str | None = None
) -> None:
    """By default those that `fill_in` takes; `usual`: what is said of members without their own."""
    parser.add_argument(
        "--shapes",
        default=default,
        metavar="LIST",
        help=f"comma-separated names ({', '.join(NAMED_SHAPES)}) or sizes BxTxH such as 4x4096x16, "
        f"or 4x4096x64/1 with one head of q and k "
        f"({default or f'{usual or ALL_SHAPES}; mamba2, mamba3: mamba4k'})",
    )


def add_budget(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument(
        "--budget",
        type=minutes,
        default=default,
        metavar="MINUTES",
        help="time to spend, over all shapes (%(default)s)",
    )


def some_text(text: str) -> str:
    """A text that is not empty (argparse type): an empty variable of a shell is no wish."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"takes a name or a path, but got {text!r}")
    return text


def some_path(text: str) -> Path:
    """A path that is not empty (argparse type)."""
    return Path(some_text(text))


def minutes(text: str) -> float:
    """A positive number of minutes (argparse type)."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"takes a positive number of minutes, but got {text!r}")
    return value


def add_decay(parser: argparse.ArgumentParser, what: str) -> None:
    """--decay: what calls expect; by default what this process does (GDN2GEN_EXPECTED_DECAY)."""
    parser.add_argument(
        "--decay",
        choices=DECAYS,
        help=f"{what} (what GDN2GEN_EXPECTED_DECAY says, else {WEAK})",
    )


def add_target(parser: argparse.ArgumentParser, help_text: str, *also: str) -> None:
    """`also`: other names of it."""
    parser.add_argument("--target", *also, metavar="NAME", help=help_text)


def present_or_target(target: str | None) -> tuple[Device, bool]:
    """The device to work for, and whether it is the GPU in this machine.

    A named target wins; without a name the present GPU, or sm_90 where there is none.
    """
    from gdn2gen.workflows.wanted import present_or

    return present_or(target)


def target_device(name: str) -> Device:
    """The device of that name: in the table of GPUs, or one that a tuned file says it is of."""
    from gdn2gen.store.sharing import device_called

    return device_called(name)


def refuse(args: argparse.Namespace, because: str, *names: str) -> None:
    """InputError if any of these options was given; their defaults are None or False."""
    given = [f"--{x.replace('_', '-')}" for x in names if getattr(args, x) not in (None, False)]
    if given:
        raise InputError(f"{because}, and takes no {' or '.join(given)}")


def say_where(folder: Path) -> None:
    """Say how calls find what was filed in `folder`, unless they look there anyway."""
    from gdn2gen.base.paths import packaged_tuned_dir, user_tuned_dir

    if folder not in (user_tuned_dir(), packaged_tuned_dir()):
        print(f"To have calls find these entries: export GDN2GEN_TUNED_DIR={folder}")


def check_json(path: Path | None) -> None:
    """Raise before anything is measured what would be raised when it is written."""
    if path is not None:
        check_replaceable(path)


def write_json(path: Path, document: dict[str, Any]) -> None:
    replace_file(path, json.dumps(document, indent=1) + "\n")
