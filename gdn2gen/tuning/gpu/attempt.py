"""One attempt: what was compiled fits, its results are right, then its times at every shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from gdn2gen.base import outcome
from gdn2gen.base.device import Device
from gdn2gen.base.outcome import Outcome
from gdn2gen.codegen.build import Resources
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.check import CheckResult
from gdn2gen.tuning import space
from gdn2gen.tuning.gpu.backend import Backend, WorkerBackend

Times = Mapping[str, float]
Compiles = Mapping[Config, Future[Outcome[Resources]]]


@dataclass(frozen=True)
class Attempt:
    """A config to try, in a recipe."""

    config: Config
    recipe: Recipe
    """The config among others, whose times are known."""
    known: Mapping[str, Times] = field(default_factory=dict)
    """Times without this config, by shape, of other stages whose time it changes."""


@dataclass(frozen=True)
class Result:
    """What became of an attempt: `times` (ms, by shape) if the status is OK."""

    status: str
    reason: str = ""
    times: Times = field(default_factory=dict)
    errors: Times | None = None
    ran: bool = False
    """Whether the GPU saw it."""


def fitting(compiled: Outcome[Resources], device: Device) -> Outcome[Resources]:
    """What a compile came to; one that the device cannot hold failed for its resources."""
    if not compiled.ok:
        return compiled
    unfit = space.why_unfit(compiled.get(), device)
    return compiled if unfit is None else Outcome(outcome.RESOURCES, detail=unfit)


def right(checked: Outcome[CheckResult]) -> Outcome[CheckResult]:
    """What a check came to; results that are off failed as wrong, and keep their errors."""
    if not checked.ok or checked.get().ok:
        return checked
    return Outcome(outcome.WRONG, checked.get(), checked.get().reason)


def try_recipe(
    recipe: Recipe, compiles: Compiles, backend: Backend, device: Device, *, full: bool
) -> Outcome[CheckResult]:
    """Wait for the compiles, look whether they fit, and check the recipe."""
    for config, future in compiles.items():
        built = fitting(future.result(), device)
        if not built.ok:
            return Outcome(built.status, detail=f"{config.stage}: {built.detail}")
    return right(backend.check(recipe, full=full))


def attempt(
    it: Attempt,
    compiled: Outcome[Resources],
    shapes: Sequence[Shape],
    backend: Backend,
    device: Device,
    is_hopeless: Callable[[Times], bool] = lambda _: False,
) -> Result:
    """Try a config. Times stop at the first shape after which it `is_hopeless`."""
    built = fitting(compiled, device)
    if not built.ok:
        return Result(built.status, built.reason)
    checked = right(backend.check(it.recipe, full=False))
    if not checked.ok:
        errors = None if checked.value is None else checked.value.errors
        return Result(checked.status, checked.reason, errors=errors, ran=True)
    times: dict[str, float] = {}
    stages = (it.config.stage, *it.known)
    for shape in shapes:
        timed = backend.time_stages(it.recipe, stages, shape)
        if not timed.ok:
            return Result(timed.status, timed.reason, ran=True)
        found = {stage: timing.median for stage, timing in timed.get().items()}
        # what it costs the pass: its own time, and what other stages take more for it
        moved = sum(found[stage] - known[shape.name] for stage, known in it.known.items())
        times[shape.name] = found[it.config.stage] + moved
        if is_hopeless(times):
            break
    return Result(outcome.OK, times=times, ran=True)


def measure_config(
    backend: WorkerBackend,
    compiled: Outcome[Resources],
    base: Recipe,
    config: Config,
    shape: Shape,
) -> tuple[float | None, str]:
    """Median ms of a compiled config at `shape`, in `base` for its stage; or None, and why not.

    What the search does with one trial, for tables of configs: nothing is filed.
    """
    it = Attempt(config, base.with_config(config))
    result = attempt(it, compiled, [shape], backend, backend.device)
    return result.times.get(shape.name), result.reason
