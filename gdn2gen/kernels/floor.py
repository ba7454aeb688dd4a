"""The bytes that no implementation can avoid moving, and the least time that they take."""

from __future__ import annotations

from math import prod
from typing import Final

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.registry import recurrence_named

# What a cache may keep from one direction to the other, or hold back at the end, instead of moving
# it: the largest L2 so far, a B200's.
_CACHE_BYTES: Final = 126 * 2**20


def floor_bytes(problem: Problem, backward: bool) -> int:
    """Bytes per token and value head that no implementation can avoid moving.

    Forward: read the inputs of a token, write o. With the backward: read them and dO again, write a
    gradient of each.
    """
    inputs, output = _input_bytes(problem), _output_bytes(problem)
    forward = inputs + output
    return forward + (2 * inputs + output if backward else 0)


def least_ms(problem: Problem, regime: Regime, backward: bool, gbps: float) -> float:
    """Time below which no measurement can be true, with an L2 that is cold at the start, in ms.

    Inputs (and dO) are read once, and of the rest a cache saves at most what it holds.
    """
    read = _input_bytes(problem) + (_output_bytes(problem) if backward else 0)
    count = regime.tokens * regime.heads
    saved = _CACHE_BYTES * (2 if backward else 1)
    return max(read * count, floor_bytes(problem, backward) * count - saved) / gbps / 1e6


def _input_bytes(problem: Problem) -> int:
    """Of what a call takes of a token, for one value head.

    Without q and k of members whose heads share the scores of a group: one may serve all heads.
    """
    member = recurrence_named(problem.op)
    width = {"K": problem.K, "V": problem.V}
    given = [x for x in member.inputs if not x.when or (x.name == "z" and problem.has_z)]
    shared = ("q", "k") if member.stepped else ()
    return sum(
        prod(width.get(symbol, 1) for symbol in x.symbols) * DTYPE[problem.dtype_of(x.dtype)].nbytes
        for x in given
        if "T" in x.symbols and x.name not in shared
    )


def _output_bytes(problem: Problem) -> int:
    return DTYPE[problem.dtype].nbytes * problem.V
