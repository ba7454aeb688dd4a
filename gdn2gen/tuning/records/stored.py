"""Recipes on file, which a search begins with and which stand in its finals."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Final

from gdn2gen.base.device import Device
from gdn2gen.base.paths import packaged_tuned_dir, user_tuned_dir
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OPS
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recipe import Recipe, fitted
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
    for entries in _by_file(path, problem.op, device):
        like = [x for x in entries if x.plan in plans and _is_member(x, problem)]
        for entry in _nearest(like, problem, shapes):
            recipe = entry.recipe_for(problem).fitted(problem, device.arch)
            yield Stored(tuple(entry.regime_key.items()), recipe)


def lent_configs(
    problem: Problem,
    plans: Sequence[str],
    stages: Collection[str],
    shapes: Sequence[Shape],
    path: Path,
    device: Device,
) -> Iterator[Config]:
    """Configs of these stages, of recipes on file that `stored_recipes` leaves out since their
    plans, or their flags, are others: a search may begin with them. Each once, with tiles that fit;
    of the same dtypes and architecture.

    GLA's plans have no name in common with KDA's, and most of their stages: without these a search
    of a minute on an H200 tried 36 of 1458 configs of grad_key, none of them in TileLang, and kept
    the default of 0.780 ms, where KDA's takes 0.417 with more to do.
    """
    found: dict[Config, None] = {}
    for entries in _by_file(path, problem.op, device):
        like = [x for x in entries if x.plan not in plans and _has_dtypes(x, problem)]
        for entry in _nearest(like, problem, shapes):
            shared = (x for name, x in entry.configs.items() if name in stages)
            found |= dict.fromkeys(fitted(x, problem, device.arch) for x in shared)
    yield from found


def _by_file(path: Path, op: str, device: Device) -> Iterator[tuple[tuned_files.Entry, ...]]:
    """The entries of each file of this architecture."""
    for file in _files(path, op):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A seed that cannot be read is no news.
            tuned = tuned_files.read_tuned(file)
        if tuned is not None and tuned.metadata["arch"] == device.arch:
            yield tuned.entries


def _is_member(entry: tuned_files.Entry, problem: Problem) -> bool:
    """Whether it is of the same problem, but for the recurrence and the head dims."""
    loose = {"op": problem.op, "K": problem.K, "V": problem.V}
    return {**entry.problem_key, **loose} == problem.key


def _has_dtypes(entry: tuned_files.Entry, problem: Problem) -> bool:
    return all(entry.problem_key[x] == problem.key[x] for x in ("dtype", "gate_dtype"))


def _nearest(
    entries: Sequence[tuned_files.Entry], problem: Problem, shapes: Sequence[Shape]
) -> list[tuned_files.Entry]:
    """Those of the head dims nearest to the problem's that there are: of the shapes, then a few of
    regimes near them."""
    apart = [dims_apart(problem, x) for x in entries]
    same = [x for x, gap in zip(entries, apart, strict=True) if gap == min(apart)]
    gaps = [min(_gap(entry, shape) for shape in shapes) for entry in same]
    by_gap = sorted(zip(gaps, same, strict=True), key=itemgetter(0))
    most = sum(gap == 0 for gap in gaps) + _OTHERS
    return [entry for _, entry in by_gap[:most]]


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
