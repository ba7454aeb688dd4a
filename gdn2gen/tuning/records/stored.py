"""Recipes on file, which a search begins with and which stand in its finals."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Final

from gdn2gen.base.device import Device
from gdn2gen.base.paths import packaged_tuned_dir, user_tuned_dir
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OPS
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store import tuned_files
from gdn2gen.store.sizes import dims_apart

# Beside those of the searched shapes themselves. Of four in all, which were of train4k and wide8k,
# none was of long32k: tuned anew, its forward took 0.846 ms on an H200 where 0.805 was on file.
_OTHERS: Final = 4


@dataclass(frozen=True)
class Stored:
    """A recipe on file, and the sizes that it was tuned for."""

    regime: tuple[tuple[str, int], ...]
    recipe: Recipe

    def is_for(self, shape: Shape, plan: str) -> bool:
        return self.recipe.plan.name == plan and dict(self.regime) == shape.regime.key


def stored_recipes(
    problem: Problem, plans: Sequence[str], shapes: Sequence[Shape], path: Path, device: Device
) -> Iterator[Stored]:
    """Those for this problem and architecture: of the shapes first, then of regimes near them.

    From `path`, then from the folders that calls look into; files of this GPU before others, and
    of this member of the family before others, whose kernels are of the same templates. Where a
    file has none of the problem's head dims, those of the nearest ones, with tiles that fit. Stale
    entries count, too: their configs are still likely to be good.
    """
    for file in _files(path, problem.op):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A seed that cannot be read is no news.
            tuned = tuned_files.read_tuned(file)
        if tuned is None or tuned.metadata["arch"] != device.arch:
            continue
        entries = _nearest_dims(problem, [x for x in tuned.entries if x.plan in plans])
        gaps = [min(_gap(entry, shape) for shape in shapes) for entry in entries]
        by_gap = sorted(zip(gaps, entries, strict=True), key=itemgetter(0))
        most = sum(gap == 0 for gap in gaps) + _OTHERS
        for _, entry in by_gap[:most]:
            recipe = entry.recipe_for(problem).fitted(problem, device.arch)
            yield Stored(tuple(entry.regime_key.items()), recipe)


def _nearest_dims(
    problem: Problem, entries: Sequence[tuned_files.Entry]
) -> list[tuned_files.Entry]:
    """Of any member of the family, and of the head dims nearest to the problem's that there are."""
    loose = {"op": problem.op, "K": problem.K, "V": problem.V}
    ours = [x for x in entries if {**x.problem_key, **loose} == problem.key]
    apart = [dims_apart(problem, x) for x in ours]
    return [x for x, gap in zip(ours, apart, strict=True) if gap == min(apart)]


def _files(path: Path, op: str) -> list[Path]:
    folders = [path.parent.parent, user_tuned_dir(), packaged_tuned_dir()]
    files = [path]
    for member in dict.fromkeys((op, *OPS)):
        for folder in dict.fromkeys(folders):
            found = sorted((folder / member).glob("*.json"))
            files += sorted(found, key=lambda file: file.name != path.name)
    return list(dict.fromkeys(files))


def _gap(entry: tuned_files.Entry, shape: Shape) -> float:
    """How far the sizes of an entry are from a shape: 0 for the same ones."""
    pairs = zip(entry.regime_key.values(), shape.regime.key.values(), strict=True)
    return sum(abs(a - b) / max(a, b, 1) for a, b in pairs)
