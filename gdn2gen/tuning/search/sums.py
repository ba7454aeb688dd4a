"""What a search holds for the best recipe of a plan: the sum of the times of its stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.options import serves_every_option
from gdn2gen.kernels.plans import PLANS, level_of, plans_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.tuning.search.verdicts import TIE

if TYPE_CHECKING:
    from gdn2gen.tuning.search.loop import Search

_NONE: Final = float("inf")
Kept = Callable[[Config], bool]
"""Which configs count."""


def any_config(_: Config) -> bool:
    return True


def in_triton(config: Config) -> bool:
    """Those that every machine can compile."""
    return language_of(config) == "triton"


class Sums:
    """Recipes of the best stages of a search so far."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def wide(self, config: Config) -> bool:
        """Those that serve calls with every option."""
        return serves_every_option(config, self._search.problem)

    def ranked(self, stage: str, shape: Shape, BT: int) -> list[tuple[Config, float]]:
        """Fastest first; nothing of a plan whose default failed at this chunk size."""
        trials = self._search.trials[BT].get(stage)
        return trials.ranked(shape) if trials is not None else []

    def at(self, shape: Shape, plan: str, BT: int, kept: Kept = any_config) -> float:
        """Milliseconds; infinite where a stage has none."""
        return sum(ms for _, ms in self._first(shape, plan, BT, kept)) or _NONE

    def least(self, shape: Shape, plan: str, kept: Kept = any_config) -> float:
        """Of all chunk sizes."""
        return min((self.at(shape, plan, BT, kept) for BT in self._search.trials), default=_NONE)

    def sizes(self, shape: Shape, plan: str, kept: Kept = any_config) -> list[int]:
        """Chunk sizes, the best first."""
        return sorted(self._search.trials, key=lambda BT: self.at(shape, plan, BT, kept))

    def best(self, shape: Shape, plan: str, BT: int, kept: Kept = any_config) -> Recipe | None:
        """None where a stage has none."""
        first = {x.stage: x for x, _ in self._first(shape, plan, BT, kept)}
        return Recipe.of(self._search.problem, plan, first) if first else None

    def _first(self, shape: Shape, plan: str, BT: int, kept: Kept) -> list[tuple[Config, float]]:
        """The fastest of each stage; nothing where a stage has none."""
        found = []
        for stage in PLANS[plan].stages:
            # as few as are needed are asked: of hundreds, whether calls have an option
            first = next((x for x in self.ranked(stage, shape, BT) if kept(x[0])), None)
            if first is None:
                return []
            found.append(first)
        return found

    def is_behind(self, shape: Shape, plan: str, kept: Kept = any_config) -> bool:
        """Whether another plan of its level is faster; one that nothing is kept of is."""
        others = plans_of(level_of(plan), self._search.problem.op)
        own, least = self.least(shape, plan, kept), min(self.least(shape, x, kept) for x in others)
        return own == _NONE or own > least * (1 + TIE)
