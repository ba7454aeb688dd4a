"""Times of configs of a step of decoding, for the rule of kernels/recurrent.py: `decode_time.py
--sweep`.

What a GPU is to time was compiled before (compile_side_by_side.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from compile_side_by_side import compile_all

from gdn2gen.base.terminal import Sheet, console
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.limits import Domain, Knob, Place
from gdn2gen.kernels.recurrent import RECURRENT
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.validity import valid_configs
from gdn2gen.runtime import decoding
from gdn2gen.runtime.arguments import Dims

Run = Callable[[int], Any]
SHOWN: Final = 8
KNOBS: Final = ("BV", "num_warps", "tiles", "loads", "evict", "maxnreg")
# Elements of a state in a thread: with less there is nothing to do, with more they do not fit.
LEAST, MOST = 32, 128
_wrong: Final = argparse.ArgumentTypeError


def domain(words: str) -> tuple[str, Domain]:
    """A knob and what it may be, of `KNOB=VALUE,...`."""
    name, _, values = words.partition("=")
    if name not in KNOBS or not values:
        raise _wrong(f"a sweep takes KNOB=VALUE,... of {', '.join(KNOBS)}, but got {words!r}")
    known = RECURRENT.domains[name]
    found = tuple(x for x in known if str(x) in values.split(","))
    if len(found) != len(values.split(",")):
        raise _wrong(f"{name} may be of {', '.join(map(str, known))}, but got {values}")
    return name, found


def knob(words: str) -> tuple[str, Knob]:
    """The same with one value."""
    name, values = domain(words)
    if len(values) != 1:
        raise _wrong(f"one value of {name}, but got {words!r}")
    return name, values[0]


def configs(problem: DecodingProblem, wanted: Mapping[str, Domain]) -> Iterator[Config]:
    """Every config with such knobs that has 32 to 128 elements of a state in a thread."""
    for config in valid_configs(RECURRENT.name, Place(problem, 1)):
        rows = config.size("BV") * config.size("tiles")
        held = rows * covering(problem.K) / (32 * config.size("num_warps"))
        if rows > covering(problem.V):
            continue
        if LEAST <= held <= MOST and all(config[x] in values for x, values in wanted.items()):
            yield config


def sweep(
    steps: Sequence[tuple[str, Callable[[], Run], Callable[[Run], float]]],
    wanted: Mapping[str, Domain],
) -> None:
    """Of each step its name, what makes its call, and what times that: every config, the fastest
    first, and that of the rule."""
    problems = [problem_of(make()) for _, make, _ in steps]
    given = [[*configs(x, wanted)] for x in problems]
    if not all(given):
        raise SystemExit("no config has such knobs")
    failed = compile_all(
        (x, config) for x, found in zip(problems, given, strict=True) for config in found
    )
    for (name, make, us), found in zip(steps, given, strict=True):
        run, times = make(), []
        for config in [x for x in found if x not in failed]:
            decoding.force(config)
            times.append((us(run), config))
        decoding.force()
        sheet = Sheet(name, (*KNOBS, "us"), words=())
        for took, config in sorted(times, key=lambda x: x[0])[:SHOWN]:
            sheet.add(*(str(config[x]) for x in KNOBS), f"{took:.2f}")
        sheet.add("rule", *[""] * (len(KNOBS) - 1), f"{us(run):.2f}")
        console().print(sheet)


def problem_of(run: Run) -> DecodingProblem:
    """What a call compiles a kernel for."""
    seen: list[DecodingProblem] = []
    usual = decoding.config_for

    def noting(problem: DecodingProblem, dims: Dims, device: torch.device) -> Config:
        seen.append(problem)
        return usual(problem, dims, device)

    decoding.config_for = noting
    decoding.force()  # so that no call is known
    try:
        run(0)
    finally:
        decoding.config_for = usual
    return seen[-1]
