"""One attempt: a compiled config's resources, the accuracy gate, then its times at every shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gdn2gen.base import outcome
from gdn2gen.base.device import Device
from gdn2gen.base.outcome import Outcome
from gdn2gen.codegen.build import Resources
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.tune import space
from gdn2gen.tune.gpu.backend import Backend

Times = Mapping[str, float]


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


def attempt(
    it: Attempt,
    compiled: Outcome[Resources],
    shapes: Sequence[Shape],
    backend: Backend,
    device: Device,
    is_hopeless: Callable[[Times], bool],
) -> Result:
    """Try a config. Times stop at the first shape after which it `is_hopeless`."""
    if not compiled.ok:
        return Result(compiled.status, compiled.reason)
    unfit = space.why_unfit(compiled.get(), device)
    if unfit is not None:
        return Result(outcome.RESOURCES, f"{outcome.RESOURCES}: {unfit}")
    checked = backend.gate(it.recipe, full=False)
    if not checked.ok:
        return Result(checked.status, checked.reason, ran=True)
    gate = checked.get()
    if not gate.ok:
        reason = f"{outcome.WRONG}: {gate.reason}"
        return Result(outcome.WRONG, reason, errors=gate.errors, ran=True)
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
