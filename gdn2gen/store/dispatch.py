"""Which plan and configs a call runs, and why: tuned entries, and the default where there are none.

The user's folder of tuned files and the packaged one are looked at together; at equal merit the
user's wins. Nothing is ever tuned in a call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from gdn2gen.base import paths
from gdn2gen.base.device import Device, present_device
from gdn2gen.base.errors import DispatchError, Gdn2genError
from gdn2gen.codegen.nvrtc import has_compiler
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.config import Config, default_config, language_of
from gdn2gen.kernels.plans import Plan, plan_named
from gdn2gen.store import tuned_files
from gdn2gen.store._nearest import TIERS, Candidate, Place, Query, differing, nearest_entry
from gdn2gen.store._words import (
    explain_recipe,
    recipe_document,
    tune_command,
    words_of,
    words_of_key,
)

__all__ = [
    "Recipe",
    "Source",
    "default_recipe",
    "explain_recipe",
    "find_recipe",
    "forced",
    "forced_recipe",
    "in_triton",
    "recipe_document",
    "reload",
    "surroundings",
    "tune_command",
]

Source = Literal["exact", "nearest", "transferred", "predicted", "default", "forced"]


@dataclass(frozen=True)
class Recipe:
    """A plan with a config for each stage, and where they came from.

    Two recipes are equal if they run the same kernels, wherever they came from.
    """

    problem: Problem
    plan: Plan
    configs: Mapping[str, Config] = field(hash=False)
    source: Source = field(compare=False)
    why: str = field(compare=False)
    stale: bool = field(default=False, compare=False)
    """A better entry was passed over because its templates changed since; `why` names them."""
    file: str | None = field(default=None, compare=False)
    """The tuned file that the configs are from."""
    regime: Regime | None = field(default=None, compare=False)
    device: Device | None = field(default=None, compare=False)
    agreed_segments: int | None = None
    """`saved_segments`, if it was agreed on before the recipe was found, and not as it says."""
    language: str | None = field(default=None, compare=False)
    """The only language that was asked for, if one was."""

    @property
    def BT(self) -> int:
        """Tokens of a chunk, in all stages."""
        return self.configs[self.plan.forward[0]].size("BT")

    def max_segments(self, stage: str) -> int:
        """Segments of all heads and sequences at most; rescan starts from those that scan kept."""
        if self.agreed_segments is not None and stage in ("rescan", self.plan.forward[-1]):
            return self.agreed_segments
        return self.configs["scan" if stage == "rescan" else stage].max_segments

    @property
    def saved_segments(self) -> int:
        """`max_segments` of the forward's scan, which what it saves depends on."""
        return self.max_segments(self.plan.forward[-1])


def find_recipe(
    problem: Problem,
    regime: Regime,
    device: Device | None = None,
    *,
    level: str = "lean",
    strict: bool | None = None,
) -> Recipe:
    """The recipe for a call, the first that there is of:

    1. exact: a measured entry of this problem, regime, level and GPU;
    2. nearest: the nearest regime of the same problem on this GPU; failing that, of a problem that
       differs only in l2norm, gate or gate_dtype;
    3. transferred: the same on the nearest GPU of the same architecture;
    4. predicted: an entry that was ranked without a GPU;
    5. the default configs of the plan named `level`.

    The tuned files are read once in a process (see `tuned_files.current_look`). Where a GPU is in
    use and nothing can compile TileLang, entries that need Triton alone come before others. Entries
    whose templates changed since are passed over (`Recipe.stale`). Inside `forced_recipe` the
    forced one is returned. `device` is by default the present GPU, the only case where one is
    queried.
    `strict` (by default GDN2GEN_STRICT) raises DispatchError for all but `exact`.
    """
    forced = _FORCED.get()
    if forced is not None:
        return forced if forced.problem == problem else _forced_for(forced, problem)
    if device is None:
        device = present_device()
    places = _places(problem.op, device.slug, paths.user_tuned_dir(), paths.packaged_tuned_dir())
    query = Query(problem, regime, device, level, _only_triton_compiles())
    recipe = _look_up(query, places, tuned_files.current_look())
    if recipe.source != "exact" and (_strict_from_env() if strict is None else strict):
        raise DispatchError(
            f"strict mode wants an exact entry, but the best is {recipe.source!r}: {recipe.why}. "
            f"Run `{tune_command(recipe)}` on this GPU, or leave strict mode (GDN2GEN_STRICT, "
            "--strict)\n"
            f"{explain_recipe(recipe)}"
        )
    return recipe


def _only_triton_compiles() -> bool:
    """Whether this process has a GPU to itself, and nothing to compile TileLang for it with."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized() and not has_compiler()


def surroundings() -> tuple[Any, ...]:
    """What `find_recipe` depends on besides its arguments: while it is equal, so is the answer."""
    return (
        _FORCED.get(),
        os.environ.get("GDN2GEN_TUNED_DIR"),
        os.environ.get("GDN2GEN_CACHE_DIR"),
        os.environ.get("GDN2GEN_STRICT"),
        paths.user_tuned_dir,
        paths.packaged_tuned_dir,
        tuned_files.current_look(),
    )


def reload() -> None:
    """Read the tuned files anew: later calls use what other processes filed since the first one.

    What a call saved for its backward stays as it is, and is understood by it.
    """
    tuned_files.look_anew()


def default_recipe(
    problem: Problem, plan_name: str = "lean", *, BT: int | None = None, arch: str | None = None
) -> Recipe:
    """The default configs of a plan: valid for every problem and device, and meant for `arch`."""
    plan = plan_named(plan_name)
    configs = {stage: default_config(stage, problem, BT=BT, arch=arch) for stage in plan.stages}
    return Recipe(problem, plan, configs, "default", "the default was asked for")


def in_triton(recipe: Recipe) -> Recipe:
    """The recipe with Triton's default config, at its chunk size, for every stage in TileLang."""
    problem = recipe.problem
    instead = {
        stage: default_config(stage, problem, BT=config.size("BT"))
        for stage, config in recipe.configs.items()
        if language_of(config) != "triton"
    }
    why = recipe.why
    if instead:
        why += f"; Triton was asked for, so defaults stand in for {', '.join(instead)} in TileLang"
    return replace(recipe, configs={**recipe.configs, **instead}, why=why, language="triton")


_FORCED: ContextVar[Recipe | None] = ContextVar("forced_recipe", default=None)


@contextmanager
def forced_recipe(recipe: Recipe) -> Iterator[Recipe]:
    """Inside, `find_recipe` returns `recipe`, also in strict mode; for a problem with other flags,
    the same plan and configs. Holds in this context only: a new thread does not see it.
    """
    token = _FORCED.set(recipe)
    try:
        yield recipe
    finally:
        _FORCED.reset(token)


def forced() -> Recipe | None:
    """The recipe of the innermost `forced_recipe`, or None."""
    return _FORCED.get()


def _forced_for(forced: Recipe, problem: Problem) -> Recipe:
    try:
        tuned_files.check_configs(forced.plan.name, forced.configs, problem)
    except Gdn2genError as error:
        raise DispatchError(
            f"the forced recipe is for {words_of(forced.problem)}, and does not fit the call's "
            f"{words_of(problem)}: {error}"
        ) from error
    return replace(forced, problem=problem)


def _strict_from_env() -> bool:
    value = os.environ.get("GDN2GEN_STRICT", "")
    return value.strip().lower() not in ("", "0", "false", "no", "off")


@lru_cache(maxsize=64)
def _places(op: str, slug: str, user: Path, packaged: Path) -> tuple[Place, ...]:
    """The place in each folder: the user's, if it can be read, and the packaged one."""
    folders = [x / op for x in (paths.to_be_read(user), packaged) if x is not None]
    return tuple(Place(str(x), str(x / f"{slug}.json")) for x in folders)


@lru_cache(maxsize=4096)
def _look_up(query: Query, places: tuple[Place, ...], _look: int) -> Recipe:
    """`find_recipe` without its overrides; remembered until the files are looked at anew."""
    if query.level not in tuned_files.LEVELS:
        raise DispatchError(f"level must be one of {tuned_files.LEVELS}, but got {query.level!r}")
    best, passed, notes = nearest_entry(query, places)
    if best is None:
        made = default_recipe(query.problem, query.level, arch=query.device.arch)
        looked = " and ".join(place.own for place in places)
        why = (
            f"nothing that fits is tuned for {words_of(query.problem)} on {query.device.name}; "
            f"looked at {looked}, and at those of other {query.device.arch} GPUs beside"
        )
    else:
        entry = best.entry
        plan, source = plan_named(entry.plan), TIERS[best.tier]
        made = Recipe(query.problem, plan, entry.configs, source, "", file=best.path)
        why = _why(best, query)
    if passed is not None:
        notes = (*notes, _why_not(passed))
    if query.triton_alone and best is not None:
        notes = (*notes, _why_triton(best.entry))
    return replace(
        made,
        why="; ".join((why, *notes)),
        stale=passed is not None,
        regime=query.regime,
        device=query.device,
    )


def _why(best: Candidate, query: Query) -> str:
    entry, key = best.entry, query.problem.key
    words = [f"entry [{entry.label}] of {best.gpu}, {entry.provenance}"]
    if best.distance:
        words.append(f"its regime is the nearest to {words_of_key(query.regime.key)}")
    minor = differing(key, entry)
    if minor:
        given = ", ".join(f"{name}={key[name]}" for name in minor)
        words.append(f"the call has {given}, which moves the speed only a little")
    if TIERS[best.tier] == "transferred":
        words.append(f"nothing was measured on {query.device.name} itself")
    if entry.provenance == "predicted":
        words.append("ranked without a GPU, never timed")
    return "; ".join(words)


def _why_triton(entry: tuned_files.Entry) -> str:
    why = "TileLang cannot be compiled here, for neither nvcc nor NVRTC was found"
    if entry.needs_triton_alone:
        return f"{why}: looked for entries that need Triton alone"
    stages = ", ".join(x for x, config in entry.configs.items() if language_of(config) != "triton")
    return f"{why}, and no entry needs Triton alone: {stages} run Triton's default configs"


def _why_not(passed: Candidate) -> str:
    stages = ", ".join(tuned_files.stale_stages(passed.entry))
    return (
        f"passed over the stale entry [{passed.entry.label}] of {passed.path}, for the templates "
        f"of {stages} changed since it was checked; `gdn2gen tune` checks it again"
    )
