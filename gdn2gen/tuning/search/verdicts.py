"""Of recipes that were timed in turns: which one wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.timing import Timing

TIE: Final = 0.01


@dataclass(frozen=True)
class Measured:
    """A finalist at one shape: times over all rounds (ms), peak memory (MiB), errors."""

    recipe: Recipe
    forward: Timing
    forward_backward: Timing
    peak_mib: float
    errors: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """The winner at one shape and level; `default` is None if the default failed."""

    shape: Shape
    level: str
    winner: Measured
    default: Measured | None
    tied: bool
    """Others came within 1% of the best time."""
    in_triton: Measured | None = None
    """The best that needs Triton alone, if the winner does not: for machines with nothing else."""
    serving_all: Measured | None = None
    """The best that serves every option, if the winner does not: for calls that it refuses."""


def pick(measured: Sequence[Measured], default: Recipe) -> tuple[Measured, bool]:
    """The winner, and whether others tied with the fastest.

    Within 1% of the fastest those win whose forward is within 1% of the best among them: where the
    host issues more slowly than the GPU works, whole passes tie and forwards still differ. Then
    what serves every option wins, then the default, then what differs from it in the fewest knobs.
    """
    fastest = min(x.forward_backward.median for x in measured)
    tied = [x for x in measured if x.forward_backward.median <= fastest * (1 + TIE)]
    forward = min(x.forward.median for x in tied)
    best = [x for x in tied if x.forward.median <= forward * (1 + TIE)]

    def simplicity(x: Measured) -> tuple[bool, int, float]:
        few = not x.recipe.serves_every_option
        return few, x.recipe.distance(default), x.forward_backward.median

    return min(best, key=simplicity), len(tied) > 1


def better(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of a level from those of its plans, beside the default of the first.

    The first plan keeps less, and stays within 1% of the fastest.
    """
    fastest = min(x.winner.forward_backward.median for x in verdicts)
    best = next(x for x in verdicts if x.winner.forward_backward.median <= fastest * (1 + TIE))
    in_triton, serving_all = None, None
    if not best.winner.recipe.needs_triton_alone:
        found = [x.in_triton or x.winner for x in verdicts]
        in_triton = _least([x for x in found if x.recipe.needs_triton_alone])
    if not best.winner.recipe.serves_every_option:
        found = [x.serving_all or x.winner for x in verdicts]
        serving_all = _least([x for x in found if x.recipe.serves_every_option])
    default = verdicts[0].default
    return replace(best, default=default, in_triton=in_triton, serving_all=serving_all)


def _least(measured: Sequence[Measured]) -> Measured | None:
    return min(measured, key=lambda x: x.forward_backward.median, default=None)


def combine(rounds: Sequence[Timing]) -> Timing:
    """One timing over several rounds: median of medians, widest percentiles' medians, all runs."""
    return replace(
        rounds[0],
        median=median(x.median for x in rounds),
        p20=median(x.p20 for x in rounds),
        p80=median(x.p80 for x in rounds),
        n=sum(x.n for x in rounds),
    )


def is_decided(rounds: Sequence[Sequence[tuple[Timing, Timing]]]) -> bool:
    """Whether the fastest is apart from every other: by its interval, or tied within 1%."""
    times = sorted((combine([x for _, x in one]) for one in rounds), key=lambda x: x.median)
    if len(times) < 2:
        return True
    fastest = times[0]
    return all(x.p20 > fastest.p80 or x.median <= fastest.median * (1 + TIE) for x in times[1:])
