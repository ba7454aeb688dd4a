"""Which plan and configs a call runs, and why: tuned entries, and the default where there are none.

The user's folder of tuned files and the packaged one are looked at together; at equal merit the
user's wins. Nothing is ever tuned in a call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

from gdn2gen.base import paths
from gdn2gen.base.decay import WEAK, check_decay
from gdn2gen.base.device import Device, present_device
from gdn2gen.base.errors import DispatchError, Gdn2genError
from gdn2gen.codegen.nvrtc import has_compiler
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.registry import CHANNEL_OPS
from gdn2gen.kernels.config import default_config, language_of
from gdn2gen.kernels.plans import filed_level, plans_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.validity import why_not_there
from gdn2gen.store import pins, tuned_files, verified
from gdn2gen.store._nearest import TIERS, Place, Query, nearest_entry
from gdn2gen.store._words import (
    explain_recipe,
    generate_command,
    recipe_document,
    tune_command,
    why_for_weak,
    why_matched,
    why_passed,
    why_refused,
    why_triton,
    words_of,
)
from gdn2gen.store.format import Entry
from gdn2gen.store.surroundings import FORCED, Surroundings

__all__ = [
    "Found",
    "Source",
    "check_there",
    "explain_recipe",
    "find_recipe",
    "forced",
    "forced_recipe",
    "generate_command",
    "in_triton",
    "recipe_document",
    "reload",
    "tune_command",
]

Source = Literal["exact", "nearest", "transferred", "predicted", "default", "forced", "pinned"]


@dataclass(frozen=True)
class Found:
    """The recipe of a call, where it came from and why.

    Two are equal if they run the same kernels and save the same.
    """

    recipe: Recipe
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
    decay: str = field(default=WEAK, compare=False)
    """What the call expects of its decay."""
    tuned_decay: str = field(default=WEAK, compare=False)
    """What the configs were tuned under."""
    entry: Entry | None = field(default=None, compare=False)
    """On file, if the configs are from there."""
    gate_apart: str | None = field(default=None, compare=False)
    """The gate that a kernel of its own makes before the call, which is without (`store.gates`)."""

    def __str__(self) -> str:
        """What `gdn2gen explain` prints of it."""
        return explain_recipe(self)

    @property
    def saved_segments(self) -> int:
        """`Recipe.saved_segments`, or what was agreed on."""
        agreed = self.agreed_segments
        return self.recipe.saved_segments if agreed is None else agreed


def find_recipe(
    problem: Problem,
    regime: Regime,
    device: Device | None = None,
    *,
    level: str = "lean",
    decay: str = WEAK,
    strict: bool | None = None,
    scan_apart: bool = False,
    around: Surroundings | None = None,
) -> Found:
    """The recipe for a call, the first that there is of:

    1. exact: a measured entry of this problem, regime, level, decay and GPU;
    2. nearest: the nearest regime of the same problem on this GPU; failing that, of a problem that
       differs only in l2norm, gate, gate_dtype or head dims that are tiled alike (72 as 96);
    3. transferred: the same on the nearest GPU of the same architecture;
    4. predicted: an entry that was ranked without a GPU;
    5. the default configs of the plan named `level`.

    Before all of these comes what is pinned (`pins.pin`), or compiled ahead for such a call.

    `decay`: `weak` or `strong`, what the call expects. At `strong` entries that were tuned under
    strong decay come first, the nearest one before any other; where there is none that serves, it
    is what a call finds at `weak`, which is then not exact. Weak where no kernel's time depends on
    it.

    An entry that refuses the call's options (packed sequences, a gate in the kernel) is passed
    over: of its size there may be a slower one that serves them all, which is exact, too.
    `scan_apart`: the call keeps states on the way, as a scan of its own can.

    With GDN2GEN_BATCH_INVARIANT it is the same recipe for all sizes of a batch.

    The tuned files are read once in a process (see `tuned_files.current_look`). Where a GPU is in
    use and nothing can compile TileLang, entries that need Triton alone come before others. Entries
    whose templates changed since are passed over (`Found.stale`). Inside `forced_recipe` the
    forced one is returned. `device` is by default the present GPU, the only case where one is
    queried.
    `strict` (by default GDN2GEN_STRICT) raises DispatchError for all but `exact`.
    `around`: what all this depends on besides, as it was read before; else as it is now.
    """
    around = Surroundings.of() if around is None else around
    forced = around.forced
    if forced is not None:
        found = forced if forced.recipe.problem == problem else _forced_for(forced, problem)
        if device is not None:
            check_there(found.recipe, device)
        return found
    if device is None:
        device = present_device()
    decay = check_decay(decay, "decay") if problem.op in CHANNEL_OPS else WEAK
    strict = around.strict if strict is None else strict
    if around.batch_invariant:
        return _batch_invariant(problem, regime, device, level, decay, strict, around)
    return _find(problem, regime, device, level, decay, strict, around, scan_apart=scan_apart)


def _find(
    problem: Problem,
    regime: Regime,
    device: Device,
    level: str,
    decay: str,
    strict: bool,
    around: Surroundings,
    *,
    scan_apart: bool = False,
) -> Found:
    pinned = _pinned(problem, regime, device, level, decay, around)
    if pinned is not None:
        return pinned
    places = _places(problem.op, device.slug, *around.folders)
    query = Query(problem, regime, device, level, _only_triton_compiles(), scan_apart, decay)
    found = _look_up(query, places, around.look)
    if found.source != "exact" and strict:
        raise DispatchError(
            f"strict mode wants an exact entry, but the best is {found.source!r}: {found.why}. "
            f"Run `{tune_command(found)}` on this GPU, or leave strict mode (GDN2GEN_STRICT, "
            "--strict)\n"
            f"{explain_recipe(found)}"
        )
    return found


# What all sizes of a batch count as where results may not depend on them: those of train4k.
_ANY_BATCH: Final = Regime(tokens=16384, sequences=4, heads=16)


def _batch_invariant(
    problem: Problem,
    regime: Regime,
    device: Device,
    level: str,
    decay: str,
    strict: bool,
    around: Surroundings,
) -> Found:
    """The same for every batch: looked up as if sequences were packed, of which none is cut into
    segments. Its forward scan is the one that can keep states on the way, so that calls that ask
    for them have the bits of those that do not.

    Nor is a sequence of its own cut for the backward: a segment would begin at a state that the
    forward's factors made, and go on from it with factors that were made again. Compiled apart,
    these may differ in their last bits: on an H200 dq of 3275 tokens alone, in four segments, was
    not that of the same tokens in a packed batch."""
    usual = replace(_ANY_BATCH, heads=regime.heads)
    found = _find(replace(problem, varlen=True), usual, device, level, decay, strict, around)
    recipe = found.recipe.keeping()
    why = f"{found.why}; results may not depend on the batch (GDN2GEN_BATCH_INVARIANT)"
    recipe = replace(recipe, problem=problem)
    return replace(found, recipe=recipe, why=why, agreed_segments=1)


def _pinned(
    problem: Problem, regime: Regime, device: Device, level: str, decay: str, around: Surroundings
) -> Found | None:
    """What such a call is told to run, or is compiled ahead for it."""
    given = problem, regime, device, level, decay
    pin, why = pins.pinned(around.pins, *given), "pinned as {} on {}"
    if pin is None:
        pin, why = pins.shipped(around.compiled_dir, *given), "compiled ahead for {} on {}"
    if pin is None:
        return None
    reason = pin.why_unfit(problem)
    if reason is not None:
        raise DispatchError(
            f"the pinned recipe of {pin} does not fit the call's {words_of(problem)}: {reason}"
        )
    recipe = pin.at(problem)
    return Found(
        recipe,
        "pinned",
        why.format(pin, pin.gpu),
        regime=regime,
        device=device,
        decay=decay,
        tuned_decay=pin.decay,
    )


def _only_triton_compiles() -> bool:
    """Whether this process has a GPU to itself, and nothing to compile TileLang for it with."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized() and not has_compiler()


def reload() -> None:
    """Read the tuned files anew, and what is verified: later calls use what other processes filed
    since the first one.

    What a call saved for its backward stays as it is, and is understood by it.
    """
    tuned_files.look_anew()
    verified.look_anew()
    pins.look_anew()


def in_triton(found: Found) -> Found:
    """The same with Triton's default config, at its chunk size, for every stage in TileLang."""
    recipe = found.recipe.everywhere()
    instead = [
        default_config(config.stage, recipe.problem, BT=config.size("BT"))
        for config in recipe.configs
        if language_of(config) != "triton"
    ]
    why = found.why
    replaced = [x.stage for x in found.recipe.configs if language_of(x) != "triton"]
    if replaced:
        stages = ", ".join(replaced)
        why += f"; Triton was asked for, so defaults stand in for {stages} in TileLang"
    return replace(found, recipe=recipe.with_config(*instead), why=why, language="triton")


@contextmanager
def forced_recipe(recipe: Recipe) -> Iterator[Recipe]:
    """Inside, `find_recipe` finds `recipe`, also in strict mode; for a problem with other flags,
    the same plan and configs. Holds in this context only: a new thread does not see it.
    """
    token = FORCED.set(Found(recipe, "forced", "it was forced"))
    try:
        yield recipe
    finally:
        FORCED.reset(token)


def check_there(recipe: Recipe, device: Device) -> None:
    """Raise DispatchError where launches of a forced recipe are none of the device's: their
    instructions would be refused by its assembler, in its own words."""
    for config in recipe.configs:
        reason = why_not_there(config, recipe.problem, device.arch)
        if reason is not None:
            raise DispatchError(
                f"the forced recipe cannot run on {device.name}: {config.stage} [{config}]: "
                f"{reason}; force `recipe.independent()` there"
            )


def forced() -> Found | None:
    """What the innermost `forced_recipe` forces, or None."""
    return FORCED.get()


def _forced_for(forced: Found, problem: Problem) -> Found:
    recipe = forced.recipe
    try:
        tuned_files.check_configs(recipe.plan.name, recipe.by_stage, problem)
    except Gdn2genError as error:
        raise DispatchError(
            f"the forced recipe is for {words_of(recipe.problem)}, and does not fit the call's "
            f"{words_of(problem)}: {error}"
        ) from error
    return replace(forced, recipe=replace(recipe, problem=problem))


@lru_cache(maxsize=64)
def _places(op: str, slug: str, user: Path, packaged: Path) -> tuple[Place, ...]:
    """The place in each folder: the user's, if it can be read, and the packaged one."""
    folders = [x / op for x in (paths.to_be_read(user), packaged) if x is not None]
    return tuple(Place(str(x), str(x / f"{slug}.json")) for x in folders)


@lru_cache(maxsize=4096)
def _look_up(query: Query, places: tuple[Place, ...], _look: int) -> Found:
    """`find_recipe` without its overrides; remembered until the files are looked at anew."""
    if query.level not in tuned_files.LEVELS:
        raise DispatchError(f"level must be one of {tuned_files.LEVELS}, but got {query.level!r}")
    query = query._replace(level=filed_level(query.level, query.problem.op))
    best, passed, notes, refused = nearest_entry(query, places)
    if best is None:
        plan = plans_of(query.level, query.problem.op)[0]
        recipe = Recipe.default(query.problem, plan, arch=query.device.arch)
        source: Source = "default"
        file = None
        looked = " and ".join(place.own for place in places)
        why = (
            f"nothing that fits is tuned for {words_of(query.problem)} on {query.device.name}; "
            f"looked at {looked}, and at those of other {query.device.arch} GPUs beside"
        )
    else:
        recipe = best.entry.recipe_for(query.problem)
        source, file = TIERS[best.tier], best.path
        why = why_matched(best, query)
        if best.entry.decay != query.decay:
            notes = (*notes, why_for_weak())
    chosen, saved = recipe, None
    if source != "exact":  # which was measured at these sizes
        recipe = recipe.for_few(query.regime)
    elif best is not None and best.entry.decay != query.decay:
        source = "nearest"
    if recipe is not chosen:
        saved = chosen.saved_segments
        names = [x for x in chosen.by_stage if recipe[x] != chosen[x]]
        why += f"; {' and '.join(names)} changed for so few chunks, which leave the GPU room"
        # one sequence of 16, 64, 256 tokens, 16 heads, on an H200: 12.1, 15.0, 22.2 us became
        # 11.3, 14.1, 21.3; at 1024 they are the same
        plain, recipe = recipe, recipe.dependent(query.device.arch, backward=False)
        why += ", and launches of the forward overlap" if recipe != plain else ""
    if refused is not None:
        notes = (*notes, why_refused(refused))
    if passed is not None:
        notes = (*notes, why_passed(passed))
    if query.triton_alone and best is not None:
        notes = (*notes, why_triton(best.entry))
    return Found(
        recipe,
        source,
        "; ".join((why, *notes)),
        stale=passed is not None,
        file=file,
        regime=query.regime,
        device=query.device,
        agreed_segments=saved,
        decay=query.decay,
        tuned_decay=WEAK if best is None else best.entry.decay,
        entry=None if best is None else best.entry,
    )
