"""What the commands do of Mamba-3, which is its own kernels, or in fp32 those around
`chunk_simple_gla`'s scan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base.device import Device
from gdn2gen.base.errors import InputError
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.mamba3 import MAMBA3_AROUND, MAMBA3_STEP, own_problem
from gdn2gen.kernels.mamba3_chunks import (
    MAMBA3_CHUNK_STAGES,
    MAMBA3_GATE,
    MAMBA3_GRADIENT,
    MAMBA3_REVERSE_STATES,
    chunk_problem,
)
from gdn2gen.store.mamba3 import Mamba3Found, find_mamba3
from gdn2gen.workflows.wanted import Shapes, levels_from, present_or, shapes_from

if TYPE_CHECKING:
    from gdn2gen.tuning.mamba3 import Mamba3Report
    from gdn2gen.tuning.views.progress import Progress

_BACKWARD: Final = (MAMBA3_GATE, MAMBA3_REVERSE_STATES, MAMBA3_GRADIENT)


def explain_mamba3(
    problem: Mamba3Problem, shapes: Shapes, level: str, target: str | None, strict: bool | None
) -> list[Mamba3Found]:
    """What calls at these shapes run, one for each."""
    device, _ = present_or(target)
    return [
        find_mamba3(at_shape(problem, x), x, device, level=level, strict=strict)
        for x in shapes_from(shapes)
    ]


def tune_mamba3(
    problem: Mamba3Problem,
    shapes: Shapes,
    *,
    budget_minutes: float,
    levels: str | Iterable[str],
    target: str | None,
    out_dir: Path,
    storage: str | None = None,
    progress: Progress | None = None,
) -> Mamba3Report:
    """Tune its own kernels; or in fp32 the scan at `levels`, then what is around it. Without a GPU,
    and for a named target, the scan alone, as predicted: knobs of others are timed or come from a
    rule."""
    from gdn2gen.tuning import mamba3, tune_without_gpu

    device, present = present_or(target)
    options: dict[str, Any] = {"budget_minutes": budget_minutes, "out_dir": out_dir}
    options["levels"] = levels_from(levels)
    if progress is not None:
        options["progress"] = progress
    if present:
        return mamba3.tune_mamba3(problem, shapes_from(shapes), device, storage=storage, **options)
    if storage is not None:
        raise InputError(f"storage is for studies on a GPU, and none is used here; got {storage!r}")
    return mamba3.without_gpu(problem, shapes_from(shapes), device, tune_without_gpu, **options)


def mamba3_stages(
    problem: Mamba3Problem, shape: Shape, device: Device, *, backward: bool
) -> Iterator[tuple[Mamba3Problem, str, Config]]:
    """The kernels of a call but for its scan, to be compiled."""
    found = find_mamba3(problem, shape, device)
    for stage in MAMBA3_AROUND if found.scan else MAMBA3_CHUNK_STAGES:
        skipped = not backward and (stage.name.endswith("backward") or stage in _BACKWARD)
        if skipped or stage.name not in found.knobs:
            continue
        own = own_problem(stage, problem) if found.scan else chunk_problem(stage, problem)
        yield own, stage.name, default_config(stage.name, own).replace(**found.knobs[stage.name])


def mamba3_step_stage(
    problem: Mamba3Problem, shape: Shape, device: Device
) -> tuple[Mamba3Problem, str, Config]:
    """The kernel of a step of as many sequences, to be compiled."""
    check_step_shape(shape)
    own = own_problem(MAMBA3_STEP, problem)
    knobs = find_mamba3(problem, shape, device).knobs[MAMBA3_STEP.name]
    return own, MAMBA3_STEP.name, default_config(MAMBA3_STEP.name, own).replace(**knobs)


def check_step_shape(shape: Shape) -> None:
    """InputError unless it is of one token."""
    if shape.T != 1:
        raise InputError(f"a step is of one token, as in 64x1x{shape.H}, but got {shape.name}")


def at_shape(problem: Mamba3Problem, shape: Shape) -> Mamba3Problem:
    """`problem` for the calls at `shape`: packed if the shape is."""
    return replace(problem, packed=problem.packed or shape.cu_seqlens is not None)
