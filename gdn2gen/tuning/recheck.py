"""After an upgrade: do the entries on file still hold? Checked and timed again, with defaults."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from rich.console import Group

from gdn2gen.base import outcome
from gdn2gen.base.decay import WEAK
from gdn2gen.base.device import Device
from gdn2gen.base.terminal import Sheet
from gdn2gen.family.decays import PATTERN_UNDER
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape, shape_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.store import tuned_files
from gdn2gen.store.tuned_files import Entry
from gdn2gen.tuning.filing import PATTERN, entries_of
from gdn2gen.tuning.gpu.attempt import try_recipe
from gdn2gen.tuning.gpu.backend import Backend
from gdn2gen.tuning.records.entries import problem_of, words_of
from gdn2gen.tuning.search.verdicts import Measured, Verdict

if TYPE_CHECKING:
    from concurrent.futures import Future

    from gdn2gen.base.outcome import Outcome
    from gdn2gen.codegen.build import Resources
    from gdn2gen.kernels.config import Config
    from gdn2gen.tuning.gpu.jobs import RecipeTiming

    Compiled = dict[tuple[Problem, Config], Future[Outcome[Resources]]]

Status = Literal["holds", "renewed", "slower", "wrong", "stale", "failed"]

# Twice what two runs of one config differ by from machine to machine of the same kind.
SLOWER: Final = 0.05


@dataclass(frozen=True)
class Rechecked:
    """What became of one entry; times are forward+backward in ms, None where not taken."""

    entry: Entry
    shape: Shape | None
    status: Status
    detail: str = ""
    now_ms: float | None = None
    default_ms: float | None = None
    renewed: Entry | None = None
    """Of a stale entry that passed: the same configs with the templates, times and errors of now.
    """

    @property
    def holds(self) -> bool:
        return self.status in ("holds", "renewed")


def recheck(
    entries: Iterable[Entry], backend: Backend, device: Device, *, renew: bool = False
) -> Iterator[Rechecked]:
    """Check each entry's recipe, and time it beside the default. All are of one decay, whose usual
    pattern the backend draws by (`PATTERN_UNDER`).

    An entry of other templates is stale, and not run; with `renew` only such entries are, through
    the check of finalists. One that passes is slower if it takes 5% more than when it was filed, or
    5% more than the default now.
    """
    defaults: dict[tuple[Problem, str, str], RecipeTiming | None] = {}
    chosen = [x for x in entries if not renew or tuned_files.stale_stages(x)]
    # queued before the first check: the GPU would wait for each entry's compilers in turn
    compiled: Compiled = {}
    for entry in chosen:
        shape = shape_of(entry.regime)
        if shape is not None and (renew or not tuned_files.stale_stages(entry)):
            problem = problem_of(entry, shape)
            for config in entry.recipe_for(problem).configs:
                if (problem, config) not in compiled:
                    compiled[problem, config] = backend.compile(problem, config)
    for entry in chosen:
        shape = shape_of(entry.regime)
        stale = tuned_files.stale_stages(entry)
        if stale and not renew:
            detail = f"other templates since: {', '.join(stale)}"
            yield Rechecked(entry, shape, "stale", detail)
        elif shape is None:
            yield Rechecked(entry, None, "failed", "its packed batch has no name, so it is unknown")
        else:
            yield _recheck(entry, shape, backend, device, compiled, defaults)


def _recheck(
    entry: Entry,
    shape: Shape,
    backend: Backend,
    device: Device,
    compiled: Compiled,
    defaults: dict[tuple[Problem, str, str], RecipeTiming | None],
) -> Rechecked:
    problem, stale = problem_of(entry, shape), bool(tuned_files.stale_stages(entry))
    recipe = entry.recipe_for(problem)
    compiles = {config: compiled[problem, config] for config in recipe.configs}
    tried = try_recipe(recipe, compiles, backend, device, full=stale)
    if tried.status == outcome.WRONG:
        return Rechecked(entry, shape, "wrong", tried.detail)
    if not tried.ok:
        return Rechecked(entry, shape, "failed", tried.reason)
    timed = backend.time_recipe(recipe, shape, with_peak=stale)
    if not timed.ok:
        return Rechecked(entry, shape, "failed", timed.reason)
    now = timed.get().forward_backward.median
    key = (problem, entry.plan, shape.name)
    if key not in defaults:
        usual = Recipe.default(problem, entry.plan, arch=device.arch)
        timed_default = backend.time_recipe(usual, shape, with_peak=False)
        defaults[key] = timed_default.get() if timed_default.ok else None
    default = defaults[key]
    default_ms = default.forward_backward.median if default else None
    usual_pattern = PATTERN_UNDER[entry.decay]
    like = entry.measured.get(PATTERN, usual_pattern) == usual_pattern
    filed = entry.measured.get("forward_backward_ms") if like else None
    detail = why_slower(filed, now, default_ms)
    status: Status = "slower" if detail else "renewed" if stale else "holds"
    renewed = None
    if status == "renewed":
        renewed = _renewed(entry, recipe, shape, timed.get(), default, tried.get().errors)
    return Rechecked(entry, shape, status, detail, now, default_ms, renewed)


def _renewed(
    entry: Entry,
    recipe: Recipe,
    shape: Shape,
    timed: RecipeTiming,
    default: RecipeTiming | None,
    errors: dict[str, float],
) -> Entry:
    def measured(timing: RecipeTiming) -> Measured:
        return Measured(recipe, timing.forward, timing.forward_backward, timing.peak_mib, errors)

    reference = None if default is None else measured(default)
    verdict = Verdict(shape, recipe.level, measured(timed), reference, False)
    (renewed,) = entries_of(verdict, entry.decay)
    return renewed


def why_slower(
    filed: float | None, now: float, default: float | None, usual: str = "the default"
) -> str:
    """Nothing where it is not. `usual`: what the default is called."""
    words = []
    if filed and now > filed * (1 + SLOWER):
        words.append(f"{now / filed - 1:.0%} slower than when it was filed ({filed:.3f} ms)")
    if default and now > default * (1 + SLOWER):
        words.append(f"{now / default - 1:.0%} slower than {usual} ({default:.3f} ms)")
    return ", ".join(words)


def amended(result: Rechecked) -> Entry | None:
    """The entry as it is now known to be, so that a better one takes its place; None if wrong.

    A slower one has the time that it takes now; one that could not be run has none, and counts as
    predicted.
    """
    if result.status == "wrong":
        return None
    if result.status not in ("slower", "failed"):
        return result.entry
    times = ("forward_ms", "forward_backward_ms")
    measured = {name: x for name, x in result.entry.measured.items() if name not in times}
    if result.now_ms is None:
        return replace(result.entry, measured=measured, provenance="predicted")
    measured["forward_backward_ms"] = round(result.now_ms, 5)
    if PATTERN in measured:  # under which it was timed now
        measured[PATTERN] = PATTERN_UNDER[result.entry.decay]
    return replace(result.entry, measured=measured)


def recheck_table(results: Iterable[Rechecked]) -> Group:
    """What `gdn2gen verify --tuned` prints: a table for each problem."""
    tables: dict[str, Sheet] = {}
    columns = ("shape", "level", "filed", "now", "default", "verdict")
    results = list(results)
    others = tuned_files.stand_ins([x.entry for x in results])
    for x in results:
        problem = words_of(x.entry)
        if problem not in tables:
            title = f"Entries on file for {problem}, checked and timed again (forward+backward, ms)"
            tables[problem] = Sheet(title, columns, words=("shape", "level", "verdict"))
        filed = x.entry.measured.get("forward_backward_ms")
        times = ["-" if ms is None else f"{ms:.3f}" for ms in (filed, x.now_ms, x.default_ms)]
        verdict = f"{x.status}: {x.detail}" if x.detail else x.status
        name = x.shape.name if x.shape is not None else str(x.entry.regime)
        name += "".join(f", {y}" for y in (others.get(x.entry.key),) if y)
        under = "" if x.entry.decay == WEAK else f", {x.entry.decay} decay"
        tables[problem].add(name, f"{x.entry.level}{under}", *times, verdict)
    return Group(*tables.values())
