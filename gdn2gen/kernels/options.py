"""Which calls a config serves of those that may run what is filed for its problem.

An entry is filed under what moves the speed. Calls that differ in the rest find it as well: a
packed batch, states in or out, a gate activated in the kernel, q and k that come normalised, g in
another dtype. Some forms refuse some of these; what refuses none is said to serve every option. It
follows from the config alone, so that no file has to say it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from gdn2gen.base.errors import InputError
from gdn2gen.family.problem import DTYPES, OPTIONAL_FLAGS, Problem, gate_parameters, untaken
from gdn2gen.family.registry import recurrence_named
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.validity import why_invalid


def serves_every_option(config: Config, problem: Problem) -> bool:
    """Whether no call that may run what is filed for `problem` is refused, whatever its options."""
    return _serves(config, _filed(problem))


@lru_cache(maxsize=1024)
def calls_of(problem: Problem) -> tuple[Problem, ...]:
    """Problems of calls that may run what is filed for `problem`: with each gate, each of them with
    every option by itself and with all that go together.

    What is filed under a gate's bound serves that gate alone.
    """
    gates = (problem.gate,) if problem.bound else recurrence_named(problem.op).activations
    found: dict[Problem, None] = {}
    for gate in gates:
        key = {**problem.key, "gate": gate}
        plain = Problem(**key, **gate_parameters(problem.op, gate))  # type: ignore[arg-type]
        every = plain
        found[plain] = None
        for options in _options(problem):
            for other in _with(plain, options):
                found[other] = None
            every = next(_with(every, options), every)
        found[every] = None
    return tuple(found)


def _options(problem: Problem) -> Iterator[dict[str, Any]]:
    """One at a time; what needs another one comes after it."""
    lacks = untaken(problem.op)
    yield from ({str(name): True} for name in OPTIONAL_FLAGS if name not in lacks)
    if "l2norm" not in lacks:
        yield {"l2norm": not problem.l2norm}
    if "gate_dtype" not in lacks:
        yield from ({"gate_dtype": x} for x in DTYPES if x != problem.gate_dtype)


def _with(problem: Problem, options: dict[str, Any]) -> Iterator[Problem]:
    """The problem with these options, if there is such a call."""
    try:
        yield replace(problem, **options)
    except InputError:
        return


@lru_cache(maxsize=1024)
def _filed(problem: Problem) -> Problem:
    """The same for all problems of one key, whose answers are the same."""
    flags = gate_parameters(problem.op, problem.gate)
    return Problem(**problem.key, **flags)  # type: ignore[arg-type]


@lru_cache(maxsize=65536)
def _serves(config: Config, problem: Problem) -> bool:
    return all(why_invalid(config, call) is None for call in calls_of(problem))
