"""The check: no config is timed before its outputs and gradients are right and repeat.

Runs in the worker. Two sizes, since a race often shows at one and hides at the other: a few heads
with a last chunk that is not full, and a grid of at least 256 blocks. Every buffer is filled with
NaN first, so that what a kernel leaves out shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import Shape
from gdn2gen.family.tolerances import limit_of, over, roundings_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.scans import SEGMENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

QUICK_PATTERNS: Final = ("layer", "sparse", "zero")
QUICK_REPEATS: Final = 3
# For finalists only: 30 identical calls have found races that 3 did not.
FULL_REPEATS: Final = 30

# T = 1100 leaves a partial last chunk at every chunk size, and makes two segments up to BT 32.
# Under constant strong decay db is the last token's, whose error is one number a head: one draw of
# 3 heads in 50 is off by more than 1e-2, one of 8 in 10000, and all heads together by 4.5e-3.
RAGGED: Final = Shape("ragged", 1, 1100, 8)
# 8 * 32 = 256 blocks even in a scan that takes a whole head per block.
MANY_BLOCKS: Final = Shape("many-blocks", 8, 192, 32)
# Of the parallel scans: the third segment's start is the first that takes a transition.
SEGMENT_PATTERNS: Final = ("layer", "zero")
RAGGED_PACKED: Final = Shape("ragged", 1, 333, 3, (0, 0, 100, 101, 333))
MANY_BLOCKS_PACKED: Final = Shape("many-blocks", 1, 1536, 32, tuple(range(0, 1537, 192)))


@dataclass(frozen=True)
class CheckResult:
    """Worst relative error of each output and gradient, and why it is refused if it is."""

    ok: bool
    errors: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def check_shapes(problem: Problem) -> tuple[Shape, Shape]:
    """The two sizes of the check; the second one has blocks enough for races to show.

    Where heads share the scores of a group, there is one.
    """
    given = (RAGGED_PACKED, MANY_BLOCKS_PACKED) if problem.varlen else (RAGGED, MANY_BLOCKS)
    if recurrence_named(problem.op).stepped:
        given = (replace(given[0], groups=1), replace(given[1], groups=1))
    return given


def segmented_shape(recipe: Recipe) -> Shape | None:
    """For parallel scans, a size of four segments, the last one shorter; None for others."""
    if not any(config.get("segments") == "parallel" for config in recipe.configs):
        return None
    return Shape("segments", 1, (3 * SEGMENT + 1) * recipe.BT + 8, 2)


def full_problem(problem: Problem) -> Problem:
    """`problem` with states in and out, so that their values and gradients are seen as well."""
    return replace(problem, initial_state=True, final_state=True)


def check_recipe(
    recipe: Recipe,
    *,
    patterns: tuple[str, ...],
    repeats: int,
    shapes: tuple[Shape, Shape],
    segmented: Shape | None = None,
    device: str = "cuda",
) -> CheckResult:
    """Hold a recipe against the fp64 reference, then against itself.

    In every pattern at each of `shapes`, and in two more at `segmented`.

    Passes if every error is within the bound of the problem's dtype (`tolerances.limit_of`,
    one home for both) and `repeats` calls at the second size agree bit for bit. Raises what the
    kernels raise.
    """
    from gdn2gen.runtime.passes import poisoned

    worst: dict[str, float] = {}
    cases = [(shape, pattern) for shape in shapes for pattern in patterns]
    if segmented is not None:
        cases += [(segmented, pattern) for pattern in SEGMENT_PATTERNS]
    with poisoned(), forced(recipe):
        for shape, pattern in cases:
            limit = limit_of(recipe.problem.dtype, pattern)
            errors = _errors(recipe.problem, shape, pattern, device)
            worst = {name: max(x, worst.get(name, 0.0)) for name, x in errors.items()}
            wrong = over(errors, limit, recipe.problem.op, roundings_of(recipe.problem))
            if wrong:
                return CheckResult(False, worst, _wrong(wrong, limit, pattern, shape))
        moved = _moved(recipe.problem, shapes[1], repeats, device)
    if moved:
        return CheckResult(False, worst, moved)
    return CheckResult(True, worst)


def _wrong(wrong: Mapping[str, float], limit: float, pattern: str, shape: Shape) -> str:
    names = ", ".join(f"{name} is off by {error:.2e}" for name, error in wrong.items())
    return f"{names} (bound {limit:.1e}; pattern {pattern}, {shape.B}x{shape.T}x{shape.H})"


def _errors(problem: Problem, shape: Shape, pattern: str, device: str) -> dict[str, float]:
    from gdn2gen.measure.case_runs import errors_in_range

    found = _run(problem, shape, pattern, device)
    return errors_in_range(found, exact(problem, shape, pattern, device), problem.dtype)


def _run(problem: Problem, shape: Shape, pattern: str, device: str) -> dict[str, Tensor]:
    from gdn2gen.measure.accuracy import public_op, run_op

    inputs, gradients = drawn(problem, shape, pattern, device)
    return run_op(public_op(problem.op), problem, inputs, gradients)


@lru_cache(maxsize=32)
def drawn(
    problem: Problem, shape: Shape, pattern: str, device: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and gradients of the outputs, kept: they are the same for every recipe."""
    from gdn2gen.measure.accuracy import inputs_of, output_gradients

    inputs = inputs_of(problem, shape, pattern, 0, device)
    return inputs, output_gradients(problem, shape, 0, device)


@lru_cache(maxsize=32)
def exact(problem: Problem, shape: Shape, pattern: str, device: str) -> dict[str, Tensor]:
    """The reference's answer, kept: it is the same for every recipe. In fp32 to save memory."""
    from gdn2gen.measure.accuracy import run_reference

    results = run_reference(problem, *drawn(problem, shape, pattern, device))
    return {name: x.float() for name, x in results.items()}


def _moved(problem: Problem, shape: Shape, repeats: int, device: str) -> str:
    """Say which results differ between identical calls; empty if none does."""
    import torch

    first = _run(problem, shape, "layer", device)
    for repeat in range(1, repeats):
        again = _run(problem, shape, "layer", device)
        names = [name for name, x in first.items() if not torch.equal(x, again[name])]
        if names:
            bits = f"{', '.join(names)} changed between identical calls"
            return f"not deterministic: {bits} (call {repeat + 1} of {repeats})"
    finite = all(math.isfinite(x.double().norm().item()) for x in first.values())
    return "" if finite else "a result is not finite"


@contextmanager
def forced(recipe: Recipe) -> Iterator[None]:
    """Inside, the public op runs `recipe`, backward included.

    The backward stays on the calling thread: autograd's own threads do not see the forced recipe,
    and would run the backward of another one.
    """
    import torch

    from gdn2gen.store.dispatch import forced_recipe

    with forced_recipe(recipe), torch.autograd.set_multithreading_enabled(False):
        yield


TINY: Final = (Shape("tiny", 1, 70, 1), Shape("two-heads", 1, 33, 2))
TINY_PACKED: Final = (
    Shape("tiny", 1, 70, 1, (0, 0, 21, 70)),
    Shape("two-heads", 1, 33, 2, (0, 1, 33)),
)


def check_interpreted(recipe: Recipe) -> CheckResult:
    """What can be checked without a GPU: the kernels in Triton's interpreter, in fp32.

    Needs TRITON_INTERPRET=1 from the start of the process. In fp32, where a fault is larger than
    what rounding leaves; that in 16 bits is not seen here, nor, one program after another, races.
    """
    problem = replace(recipe.problem, dtype="fp32", gate_dtype="fp32", beta_fp32=False)
    configs = tuple(x.replace(solve="ieee") if "solve" in x else x for x in recipe.configs)
    shapes = TINY_PACKED if problem.varlen else TINY
    exact_recipe = replace(recipe, problem=problem, configs=configs)
    return check_recipe(
        exact_recipe, patterns=("layer", "sparse"), repeats=1, shapes=shapes, device="cpu"
    )
