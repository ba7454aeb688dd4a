"""Recipes of a process as data, and taken by another: so that ranks of a job run the same kernels.

`recorded` notes what look-ups found; `pin` gives that, or takes what another process gave. What was
compiled ahead for a container (`codegen.shipped`) is taken in the same way, without being asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

from gdn2gen import __version__
from gdn2gen.base.decay import WEAK, check_decay
from gdn2gen.base.device import Device
from gdn2gen.base.errors import DispatchError, Gdn2genError, InputError
from gdn2gen.codegen import shipped as compiled
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store import tuned_files
from gdn2gen.store._nearest import regime_distance
from gdn2gen.store._words import words_of, words_of_key
from gdn2gen.store.format import configs_from


@dataclass(frozen=True)
class Pin:
    """One recipe, and the calls that it is for."""

    recipe: Recipe
    regime: Regime
    level: str
    """What was asked for: a plan of another level may serve it."""
    gpu: str
    arch: str
    decay: str = WEAK
    """What was expected of it."""

    @property
    def document(self) -> dict[str, Any]:
        """What `of_document` reads; JSON can hold it."""
        recipe = self.recipe
        return {
            "problem": recipe.problem.document,
            "regime": self.regime.key,
            "level": self.level,
            "gpu": self.gpu,
            "arch": self.arch,
            "plan": recipe.plan.name,
            "configs": {config.stage: dict(config) for config in recipe.configs},
            "templates": {x.stage: tuned_files.digest_of(x) for x in recipe.configs},
            **({} if self.decay == WEAK else {"decay": self.decay}),
        }

    @classmethod
    def of_document(cls, raw: Mapping[str, Any]) -> Pin:
        """Raises DispatchError for what cannot be run as it was, by name."""
        try:
            problem, configs = Problem(**raw["problem"]), configs_from(raw["configs"])
            tuned_files.check_configs(raw["plan"], configs, problem)
            recipe = Recipe.of(problem, raw["plan"], configs)
            decay = check_decay(raw.get("decay", WEAK), "decay")
            regime = Regime(**raw["regime"])
            pin = cls(recipe, regime, raw["level"], raw["gpu"], raw["arch"], decay)
            digests = dict(raw["templates"])
        except (Gdn2genError, KeyError, TypeError, ValueError) as error:
            raise DispatchError(
                f"a pinned recipe cannot be read: {error!r}; got {raw!r}"
            ) from error
        for stage, digest in pin.document["templates"].items():
            if digests.get(stage) != digest:
                raise DispatchError(
                    f"the pinned {stage} of {pin} was made from the template {digests.get(stage)}, "
                    f"but this gdn2gen has {digest}: run the same version in all processes"
                )
        return pin

    def serves(self, problem: Problem, level: str, decay: str) -> bool:
        """Whether it is for such calls, whatever their sizes and optional arguments."""
        asked = self.level, self.decay
        return asked == (level, decay) and self.recipe.problem.key == problem.key

    def why_unfit(self, problem: Problem) -> str | None:
        """Why its recipe cannot run a call that it is for, given its options; None if it can."""
        try:
            tuned_files.check_configs(self.recipe.plan.name, self.recipe.by_stage, problem)
        except Gdn2genError as error:
            return str(error)
        return None

    def at(self, problem: Problem) -> Recipe:
        """The recipe for a problem that it serves."""
        return Recipe.of(problem, self.recipe.plan.name, self.recipe.by_stage)

    def __str__(self) -> str:
        words = f"{words_of(self.recipe.problem)} at {words_of_key(self.regime.key)}, {self.level}"
        return words if self.decay == WEAK else f"{words}, {self.decay} decay"


@dataclass(frozen=True, eq=False)
class Taken:
    """What this process runs because it was told so. Compared by identity, in every call."""

    pins: tuple[Pin, ...] = ()
    strict: bool = False


_taken = Taken()
_recorded: dict[tuple[Any, ...], Pin] = {}
_MOST: Final = 4096
"""Calls that are noted: of more sizes than these, the first ones are forgotten."""


def pin(recipes: Mapping[str, Any] | None = None, *, strict: bool = False) -> dict[str, Any]:
    """The recipes that calls of this process ran so far, as data that JSON can hold; with
    `recipes`, what another process gave, this one runs those from now on.

    Ranks of a job run the same kernels if all take what one of them gives, before their first call:

        recipes = [gdn2gen.pin() if rank == 0 else None]     # after `gdn2gen.warmup(...)` there
        torch.distributed.broadcast_object_list(recipes)
        gdn2gen.pin(recipes[0])

    A call at other sizes runs what is pinned for the nearest ones of its problem and level, of
    those that serve its options. Where strong decay is expected it is what ran so; else, as among
    entries on file, what ran at weak decay: warm up under what calls will expect. A call of which
    nothing is pinned is looked up as ever, or with `strict` refused (DispatchError). An empty
    mapping ends it.

    Raises InputError for what no process gave, and with `strict` for what one gave that had run
    nothing; DispatchError that names both recipes where this
    process ran a call by another one before, where a template differs from what the recipe was made
    of, and, at the call, where the GPU is of another architecture. Decoding kernels are not pinned:
    their configs are a rule of the sizes and the GPU.
    """
    global _taken
    if recipes is not None:
        taken = Taken(tuple(map(Pin.of_document, _listed(recipes))), strict)
        if strict and recipes and not taken.pins:
            raise InputError(
                "recipes list none, so that strict would refuse nothing: make a call of each "
                "problem, or gdn2gen.warmup(...), in the process that gives them"
            )
        for ran in _recorded.values():
            _check(ran, taken)
        _taken = taken
    found = sorted({**_recorded}.values(), key=str)
    return {"version": __version__, "recipes": [x.document for x in found]}


def _listed(recipes: object) -> Sequence[Any]:
    """What another process's `pin` gave. Raises InputError for anything else."""
    found: object = None
    if isinstance(recipes, Mapping):
        found = recipes.get("recipes") if recipes else ()  # an empty one ends it
    if not isinstance(found, list | tuple) or not all(isinstance(x, Mapping) for x in found):
        raise InputError(
            "recipes must be what `gdn2gen.pin()` gave in another process, a mapping whose "
            f"'recipes' lists them, but got {recipes!r}"
        )
    return found


def _check(ran: Pin, taken: Taken) -> None:
    """Raise DispatchError if a call that ran would run otherwise."""
    problem = ran.recipe.problem
    wanted = _nearest(taken, problem, ran.regime, ran.level, ran.arch, ran.decay)
    if wanted is not None and wanted.arch != ran.arch:
        return
    if wanted is not None and wanted.at(problem) != ran.recipe:
        raise DispatchError(
            f"{ran} ran as\n  {ran.recipe}\nin this process, but is pinned as\n  {wanted.recipe}\n"
            "Take pinned recipes before the first call, or give all ranks the same tuned files"
        )


def current() -> Taken:
    """What is pinned: while it is the same, so are the answers of `pinned`."""
    return _taken


def pinned(
    taken: Taken, problem: Problem, regime: Regime, device: Device, level: str, decay: str = WEAK
) -> Pin | None:
    """What such a call is told to run, by what was `current`. Raises DispatchError for another GPU,
    and if strict."""
    found = _nearest(taken, problem, regime, level, device.arch, decay)
    if found is None:
        if taken.strict and taken.pins:
            known = "; ".join(sorted({str(x) for x in taken.pins}))
            raise DispatchError(
                f"nothing is pinned for {words_of(problem)} at {words_of_key(regime.key)}, "
                f"{level}; pinned are {known}. Warm it up where the recipes come from, or leave "
                "strict out"
            )
        return None
    if found.arch != device.arch:
        raise DispatchError(
            f"{found} is pinned as it ran on {found.gpu} ({found.arch}), but this process runs on "
            f"{device.name} ({device.arch}): kernels of one are not those of the other"
        )
    return found


def record(
    recipe: Recipe,
    regime: Regime,
    device: Device,
    level: str,
    decay: str = WEAK,
    *,
    again: bool = True,
) -> None:
    """Note what a call runs; unless `again`, only if no call of these sizes was noted."""
    key = (recipe.problem, regime, level, decay, device.name)
    if key in _recorded and not again:
        return
    if key not in _recorded and len(_recorded) >= _MOST:
        _recorded.pop(next(iter(_recorded)), None)
    _recorded[key] = Pin(recipe, regime, level, device.name, device.arch, decay)


def forget() -> None:
    """As in a process that has just begun."""
    global _taken
    _taken = Taken()
    _recorded.clear()


def shipped(
    named: Path | None,
    problem: Problem,
    regime: Regime,
    device: Device,
    level: str,
    decay: str = WEAK,
) -> Pin | None:
    """What was compiled ahead for such a call, in the folder that is named for it
    (`paths.compiled_dir`), if that is for such a GPU."""
    folder = compiled.usable(named)
    if folder is None:
        return None
    found = _nearest(_of_folder(folder), problem, regime, level, device.arch, decay)
    return found if found is not None and found.arch == device.arch else None


def look_anew() -> None:
    """Forget what was read of a folder of compiled kernels."""
    compiled.look_anew()
    _of_folder.cache_clear()


@cache
def _of_folder(folder: Path) -> Taken:
    recipes = compiled.read_manifest(folder).get("recipes") or ()
    try:
        return Taken(tuple(map(Pin.of_document, recipes)))
    except DispatchError as error:
        warnings.warn(
            f"the recipes of {folder} are not used: {error}", RuntimeWarning, stacklevel=2
        )
        return Taken()


@lru_cache(maxsize=1024)
def _nearest(
    taken: Taken, problem: Problem, regime: Regime, level: str, arch: str, decay: str
) -> Pin | None:
    """The one for such calls whose sizes are the nearest, or None: of such GPUs, if there is one,
    and of what can run the call, if that is, since another call's recipe may refuse its options.
    Of those at weak decay, if there is none at this one."""
    serving = [x for x in taken.pins if x.serves(problem, level, decay)]
    serving = serving or [x for x in taken.pins if x.serves(problem, level, WEAK)]
    there = [x for x in serving if x.arch == arch] or serving
    there = [x for x in there if x.why_unfit(problem) is None] or there
    return min(there, key=lambda x: regime_distance(x.regime, regime), default=None)
