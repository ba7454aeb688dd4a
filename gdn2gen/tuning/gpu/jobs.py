"""What the worker that owns the GPU is asked for: functions that a pipe can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from gdn2gen.base.decay import STRONG
from gdn2gen.family.decays import LAYER
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure import check
from gdn2gen.measure.accuracy import inputs_of, run_op
from gdn2gen.measure.check import CheckResult
from gdn2gen.measure.rows import stage_calls
from gdn2gen.measure.sides import decaying_inputs
from gdn2gen.measure.timing import Timing, peak_mib, time_ms

if TYPE_CHECKING:
    from torch import Tensor

    from gdn2gen.family.decays import Drawn
    from gdn2gen.family.problem import Problem

# Stages take 0.05 to 1 ms: this is 20 runs and more, and a recipe costs less than its compile.
_STAGE_REP_MS: Final = 20.0
_STAGE_WARMUP_MS: Final = 5.0
_ROUND_REP_MS: Final = 60.0
_ROUND_WARMUP_MS: Final = 10.0
# Inputs of a shape stay on the GPU until less than this part of its memory is free.
_KEEP_FREE: Final = 0.5


@dataclass(frozen=True)
class RecipeTiming:
    """Forward alone and forward+backward of one recipe at one shape, and its peak memory."""

    forward: Timing
    forward_backward: Timing
    peak_mib: float


def check_quick(recipe: Recipe) -> CheckResult:
    """The check that every recipe passes before it is timed."""
    return check.check_recipe(
        recipe,
        patterns=check.QUICK_PATTERNS,
        repeats=check.QUICK_REPEATS,
        shapes=check.check_shapes(recipe.problem),
        segmented=check.segmented_shape(recipe),
    )


def check_full(recipe: Recipe) -> CheckResult:
    """The check for finalists: every pattern, states in and out, and many repeats."""
    from gdn2gen.family.inputs import PATTERNS

    full = replace(recipe, problem=check.full_problem(recipe.problem))
    shapes = check.check_shapes(full.problem)
    return check.check_recipe(
        full,
        patterns=PATTERNS,
        repeats=check.FULL_REPEATS,
        shapes=shapes,
        segmented=check.segmented_shape(full),
    )


def time_stages(
    recipe: Recipe, stages: tuple[str, ...], shape: Shape, pattern: Drawn = LAYER
) -> dict[str, Timing]:
    """Time the named stages of a recipe, each alone on the operands that the others make of inputs
    whose decay is of a pattern."""
    inputs = _inputs(recipe.problem, shape, pattern)
    do = _output_gradients(recipe.problem, shape)["o"]
    calls = stage_calls(recipe, shape, inputs, do)
    return {
        name: time_ms(call, _STAGE_WARMUP_MS, _STAGE_REP_MS)
        for name, call in calls
        if name in stages
    }


def time_recipe(
    recipe: Recipe, shape: Shape, with_peak: bool, pattern: Drawn = LAYER
) -> RecipeTiming:
    """Time a whole recipe through the public op; the peak is 0 unless asked for.

    Each pass is timed as one CUDA graph: the GPU's time, not that of a host which may be slower at
    issuing than the GPU is at working (two candidates at few heads would tie at the host's pace).
    """
    import torch

    from gdn2gen.measure.accuracy import op_flags, public_op

    problem = recipe.problem
    op = public_op(problem.op)
    inputs, gradients = _inputs(problem, shape, pattern), _output_gradients(problem, shape)
    arguments: dict[str, Any] = {**inputs, **op_flags(problem)}

    def forward() -> None:
        with torch.no_grad():
            op(**arguments)

    def both() -> None:
        run_op(op, problem, inputs, gradients)

    with check.forced(recipe):
        # before the graphs, whose own pools would be counted
        peak = peak_mib(both) - _others_mib(inputs, gradients) if with_peak else 0.0
        return RecipeTiming(_time_graph(forward), _time_graph(both), peak)


def _time_graph(run: Callable[[], None]) -> Timing:
    import torch

    new_stream: Any = torch.cuda.Stream  # untyped in torch
    side = new_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles and loads, which a capture may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return time_ms(graph.replay, _ROUND_WARMUP_MS, _ROUND_REP_MS)


def _inputs(problem: Problem, shape: Shape, pattern: Drawn) -> dict[str, Tensor]:
    import torch

    free, total = torch.cuda.mem_get_info()
    if free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < _KEEP_FREE * total:
        _free()
    return _cached_inputs(problem, shape, pattern)


@lru_cache(maxsize=16)
def _cached_inputs(problem: Problem, shape: Shape, pattern: Drawn) -> dict[str, Tensor]:
    if pattern == STRONG:  # with a gate in the kernels, too
        return decaying_inputs(problem, shape, STRONG, "cuda")
    return inputs_of(problem, shape, pattern, 0, "cuda")


@lru_cache(maxsize=16)
def _output_gradients(problem: Problem, shape: Shape) -> dict[str, Tensor]:
    from gdn2gen.measure.accuracy import output_gradients

    return output_gradients(problem, shape, 0, "cuda")


def _others_mib(*own: Mapping[str, Tensor]) -> float:
    """What lies in the GPU's memory beside a call's own tensors, in MiB: references of the check,
    inputs of other shapes. To drop them for a measurement meant to make them anew after it.
    """
    import torch

    nbytes = sum(x.nbytes for tensors in own for x in tensors.values())
    return float(torch.cuda.memory_allocated() - nbytes) / 2**20


def _free() -> None:
    """Drop everything kept."""
    import torch

    _cached_inputs.cache_clear()
    _output_gradients.cache_clear()
    check.exact.cache_clear()
    check.drawn.cache_clear()
    torch.cuda.empty_cache()
