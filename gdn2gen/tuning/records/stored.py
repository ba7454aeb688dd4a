"""Recipes on file, which a search begins with and which stand in its finals."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Final

from gdn2gen.base.decay import WEAK
from gdn2gen.base.device import Device
from gdn2gen.base.paths import packaged_tuned_dir, user_tuned_dir
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import OPS
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, language_of
from gdn2gen.kernels.recipe import Recipe, fitted
from gdn2gen.store import tuned_files
from gdn2gen.store.format import MINOR_KEYS
from gdn2gen.store.sizes import dims_apart
from gdn2gen.tuning import space

# Beside those of the searched shapes themselves. Of four in all, which were of train4k and wide8k,
# none was of long32k: tuned anew, its forward took 0.846 ms on an H200 where 0.805 was on file.
_OTHERS: Final = 4


@dataclass(frozen=True)
class Stored:
    """A recipe on file, and the sizes that it was tuned for."""

    regime: tuple[tuple[str, int], ...]
    recipe: Recipe
    own: bool = True
    """Whether it is on file for the problem itself and its decay, and not for one near it."""

    def is_for(self, shape: Shape, plan: str) -> bool:
        return self.recipe.plan.name == plan and dict(self.regime) == shape.regime.key


def stored_recipes(
    problem: Problem,
    plans: Sequence[str],
    shapes: Sequence[Shape],
    path: Path,
    device: Device,
    decay: str = WEAK,
) -> Iterator[Stored]:
    """Those for this problem and architecture: of the shapes first, then of regimes near them.

    From `path`, then from the folders that calls look into; files of this GPU before others, and
    of this member of the family before others, whose kernels are of the same templates. Those of
    another gate or dtype of it, which a call may run, come after the problem's own: without them a
    search of two minutes with softplus in the kernels tried 14 of 1398 configs of grad_key and kept
    one of 1.301 ms, where 0.418 were on file with decays given. Where a file has none of the
    problem's head dims, those of the nearest ones, with tiles that fit. Stale entries count, too:
    their configs are still likely to be good. For strong decay those for it, then those for weak;
    for weak decay those for it alone.
    """
    for entries, asked in product(_by_file(path, problem.op, device), _decays(decay)):
        like = [x for x in entries if x.decay == asked]
        like = [x for x in like if x.plan in plans and _is_member(x, problem)]
        for entry in _nearest(like, problem, shapes):
            recipe = entry.recipe_for(problem).fitted(problem, device.arch)
            own = dict(entry.problem_key) == problem.key and asked == decay
            yield Stored(tuple(entry.regime_key.items()), recipe, own)


def _decays(decay: str) -> tuple[str, ...]:
    """Whose entries a search for calls that expect it begins with, its own first."""
    return tuple(dict.fromkeys((decay, WEAK)))


def steady_recipes(
    problem: Problem,
    plans: Sequence[str],
    shapes: Sequence[Shape],
    device: Device,
    stored: Sequence[Stored],
) -> Iterator[Stored]:
    """What is stored of each shape and plan, or of the nearest shape, with forms whose time hardly
    depends on the decay (`Form.steady`) in place of others; where nothing is, the defaults so. A
    search for strong decay begins with them. Nothing of plans with a stage that has no such form.
    """
    for shape, plan in product(shapes, plans):
        near = [x for x in stored if x.recipe.plan.name == plan]
        there = [x.recipe for x in near if x.is_for(shape, plan)]
        there = there or [x.recipe for x in near[:1]]
        if not stored:
            there = [Recipe.default(problem, plan, arch=device.arch)]
        found = (steady(x, problem, device) for x in there)
        for recipe in dict.fromkeys(x for x in found if x is not None):
            yield Stored(tuple(shape.regime.key.items()), recipe)


def steady(recipe: Recipe, problem: Problem, device: Device) -> Recipe | None:
    """The recipe with steady forms alone, in the languages that its stages have if there are such;
    None where a stage has none for such chunks."""
    changed = []
    for config in recipe.configs:
        if config.form.steady:
            continue
        starts = space.starts(config.stage, problem, device, recipe.BT)
        found = [x for x in starts if x.form.steady]
        if not found:
            return None
        # the last form is the one that was made for it
        same = [x for x in found if language_of(x) == language_of(config)]
        changed.append((same or found)[-1])
    return recipe.with_config(*changed)


def lent_configs(
    problem: Problem,
    plans: Sequence[str],
    stages: Collection[str],
    shapes: Sequence[Shape],
    path: Path,
    device: Device,
    decay: str = WEAK,
) -> Iterator[Config]:
    """Configs of these stages, of recipes on file that `stored_recipes` leaves out since their
    plans are others: a search may begin with them. Each once, with tiles that fit; of the same
    dtype and architecture.

    GLA's plans have no name in common with KDA's, and most of their stages: without these a search
    of a minute on an H200 tried 36 of 1458 configs of grad_key, none of them in TileLang, and kept
    the default of 0.780 ms, where KDA's takes 0.417 with more to do.
    """
    found: dict[Config, None] = {}
    for entries in _by_file(path, problem.op, device):
        like = [x for x in entries if x.decay in _decays(decay)]
        like = [x for x in like if x.plan not in plans and _has_dtype(x, problem)]
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
    """Whether it is of the same problem, but for the recurrence, the head dims and minor keys."""
    if entry.problem_key.get("bound") not in (None, problem.key.get("bound")):
        return False  # its kernels may count on it
    loose = {name: problem.key.get(name) for name in ("op", "K", "V", *MINOR_KEYS)}
    return {**entry.problem_key, **loose} == {**problem.key, **loose}


def _has_dtype(entry: tuned_files.Entry, problem: Problem) -> bool:
    return bool(entry.problem_key["dtype"] == problem.dtype)


def _nearest(
    entries: Sequence[tuned_files.Entry], problem: Problem, shapes: Sequence[Shape]
) -> list[tuned_files.Entry]:
    """Those of the head dims nearest to the problem's that there are: of the shapes, then a few of
    regimes near them; the problem's own gate and dtypes before others."""
    apart = [dims_apart(problem, x) for x in entries]
    same = [x for x, gap in zip(entries, apart, strict=True) if gap == min(apart)]
    gaps = [min(_gap(entry, shape) for shape in shapes) for entry in same]
    others = [sum(x.problem_key.get(y) != problem.key.get(y) for y in MINOR_KEYS) for x in same]
    ranked = sorted(zip(gaps, others, same, strict=True), key=itemgetter(0, 1))
    most = sum(gap == 0 for gap in gaps) + _OTHERS
    return [entry for _, _, entry in ranked[:most]]


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
