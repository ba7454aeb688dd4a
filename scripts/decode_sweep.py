"""Times of configs of a step of decoding, for the rule of kernels/recurrent.py: `decode_time.py
--sweep`.

What a GPU is to time was compiled before (`measure.compiling`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from gdn2gen.base.device import present_device, toolchain
from gdn2gen.base.terminal import Sheet, command_line, console
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.limits import Domain, Knob, Place
from gdn2gen.kernels.recurrent import RECURRENT
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.validity import valid_configs
from gdn2gen.measure.cases import Case
from gdn2gen.measure.compiling import compile_all
from gdn2gen.measure.decode_runs import Call, run_calls
from gdn2gen.runtime import decoding
from gdn2gen.runtime.arguments import Dims
from gdn2gen.store.decoding import (
    DecodingEntry,
    decoding_path,
    is_filed,
    known_of,
    merge_decoding,
)
from gdn2gen.store.tuned_files import digest_of, metadata_for

Run = Callable[[int], Any]
SHOWN: Final = 8
# Of the fastest, so many are checked before nothing is filed; and what they are checked at.
TRIED: Final = 3
MANY_SEQUENCES: Final = 300
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


@dataclass(frozen=True)
class Timed:
    """A step: its call, what times that, and of how many sequences and heads it is."""

    name: str
    make: Callable[[], Run]
    us: Callable[[Run], float]
    copy_us: Callable[[], float]
    sequences: int
    heads: int


def sweep(steps: Sequence[Timed], wanted: Mapping[str, Domain], into: Path | None = None) -> None:
    """Times of every config of each step, the fastest first, and of the rule's. The fastest that
    is right is filed in the folder `into`, if that is given."""
    problems = [problem_of(x.make()) for x in steps]
    given = [[*configs(x, wanted)] for x in problems]
    if not all(given):
        raise SystemExit("no config has such knobs")
    device = present_device()
    rules = [
        decoding.by_rule(x, step.sequences, step.heads, device)
        for x, step in zip(problems, steps, strict=True)
    ]
    made = zip(problems, given, rules, strict=True)
    failed = compile_all((x, config) for x, found, rule in made for config in (*found, rule))
    for step, problem, found, rule in zip(steps, problems, given, rules, strict=True):
        run, times = step.make(), {}
        for config in [x for x in dict.fromkeys((rule, *found)) if x not in failed]:
            decoding.force(config)
            times[config] = step.us(run)
        decoding.force()
        ranked = sorted(times, key=lambda x: times[x])
        sheet = Sheet(step.name, (*KNOBS, "us"), words=())
        for config in ranked[:SHOWN]:
            sheet.add(*(str(config[x]) for x in KNOBS), f"{times[config]:.2f}")
        sheet.add("rule", *[""] * (len(KNOBS) - 1), f"{times[rule]:.2f}")
        console().print(sheet)
        if into is not None:
            del run
            console().print(file(step, problem, ranked, times, rule, into))


def file(
    step: Timed,
    problem: DecodingProblem,
    ranked: Sequence[Config],
    times: Mapping[Config, float],
    rule: Config,
    folder: Path,
) -> str:
    """File the fastest config that is right; what came of it."""
    device, said = present_device(), ""
    if not is_filed(problem):
        return "nothing is filed of such calls: they are not of one token in slots of a pool"
    for config in ranked[:TRIED]:
        errors, wrong = checked(problem, config)
        if wrong:
            said += f"wrong, [{config}]: {wrong}\n"
            continue
        entry = DecodingEntry(
            at=known_of(problem),
            programs=step.sequences * step.heads,
            knobs={x: config[x] for x in KNOBS},
            template=digest_of(config),
            measured={"us": times[config], "rule_us": times[rule], "copy_us": step.copy_us()},
            errors=errors,
        )
        path = decoding_path(folder, problem.op, device)
        command = command_line("python scripts/decode_time.py", less=("--into",))
        merge_decoding(path, metadata_for(device, toolchain(), command), [entry])
        return f"{said}filed: {path}"
    return f"{said}nothing is filed"


@cache
def checked(problem: DecodingProblem, config: Config) -> tuple[dict[str, float], str]:
    """Errors of calls by it beside fp64, few sequences and many, padding among them; and what is
    wrong."""
    own = Problem(problem.op, problem.K, problem.V, dtype=problem.dtype)
    state, v_first = problem.dtype_of("state"), problem.state_v_first
    calls = [
        Call(f"{n} sequences", (1,) * n, "pool", state_dtype=state, v_first=v_first)
        for n in (5, MANY_SEQUENCES)
    ]
    decoding.force(None, **{x: config[x] for x in KNOBS})
    try:
        return run_calls(Case("sweep", own, Shape("sweep", 1, 1, 8)), "cuda", calls)
    finally:
        decoding.force()


def problem_of(run: Run) -> DecodingProblem:
    """What a call compiles a kernel for."""
    seen: list[DecodingProblem] = []
    usual = decoding.config_for

    def noting(
        problem: DecodingProblem, dims: Dims, device: torch.device, read: Any = None
    ) -> Config:
        seen.append(problem)
        return usual(problem, dims, device, read)

    decoding.config_for = noting
    decoding.force()  # so that no call is known
    try:
        run(0)
    finally:
        decoding.config_for = usual
    return seen[-1]
