"""One implementation at one shape: its times, its peak memory, its errors; measured in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import Shape
from gdn2gen.measure.accuracy import (
    OpFunction,
    inputs_of,
    op_flags,
    output_gradients,
    public_op,
    relative_errors,
    run_op,
    run_reference,
)
from gdn2gen.measure.peers import as_mamba_ssm
from gdn2gen.measure.timing import Timing, peak_mib, time_ms

# Of each implementation the faster counts. At the first shape of a process FLA's forward waited
# for its host: 1.55 ms at train4k (H200), and 1.05 at train2k, which has as many tokens.
_TURNS: Final = 2

# A reference in fp64 at a full shape would take longer than everything else together.
ACCURACY_SHAPE: Final = Shape("accuracy", 1, 1024, 16)
ACCURACY_PATTERNS: Final = ("layer", "zero", "strong", "uniform", "sparse", "mixed")


@dataclass(frozen=True)
class Errors:
    """Worst relative error of one output or gradient, and the pattern of decay it was found in."""

    error: float
    regime: str
    """The pattern; files of results call it by this name."""


@dataclass(frozen=True)
class Side:
    """One implementation at one shape: times in ms, peak memory of fwd+bwd in MiB, errors."""

    forward: Timing
    forward_backward: Timing
    peak_mib: float
    errors: dict[str, Errors]

    def or_faster(self, other: Side) -> Side:
        """The faster of two measurements of each time; errors are those of both."""
        return replace(
            self,
            forward=min(self.forward, other.forward, key=lambda x: x.median),
            forward_backward=min(
                self.forward_backward, other.forward_backward, key=lambda x: x.median
            ),
            peak_mib=min(self.peak_mib, other.peak_mib),
        )


def worst_errors(function: OpFunction, problem: Problem) -> dict[str, Errors]:
    """Worst error over ACCURACY_PATTERNS, per output and gradient, at ACCURACY_SHAPE."""
    problem = replace(problem, final_state=True)
    shape = ACCURACY_SHAPE
    if recurrence_named(problem.op).stepped:
        shape = replace(shape, groups=1)
    worst: dict[str, Errors] = {}
    for pattern in ACCURACY_PATTERNS:
        inputs = inputs_of(problem, shape, pattern, 0, "cuda")
        gradients = output_gradients(problem, shape, 0, "cuda")
        exact = run_reference(problem, inputs, gradients)
        found = relative_errors(run_op(function, problem, inputs, gradients), exact)
        for name, error in found.items():
            if name not in worst or error > worst[name].error:
                worst[name] = Errors(error, pattern)
    return worst


def our_op(op: str, level: str) -> OpFunction:
    """Our op of a recurrence, keeping as much of the forward as `level` lets it.

    Of Mamba-2 as callers of mamba_ssm's have it.
    """
    if op == "mamba2":
        from gdn2gen.ops.mamba import mamba_chunk_scan_combined

        return as_mamba_ssm(mamba_chunk_scan_combined)
    return partial(public_op(op), disable_recompute=level == "fast")


def measure_in_turns(
    functions: Sequence[OpFunction],
    errors: Sequence[dict[str, Errors]],
    problem: Problem,
    shape: Shape,
) -> list[Side]:
    """Time all `functions`, one after the other and once more, and keep the faster of each.

    `errors`: of each function, to go with its times. Raises DeviceError without a GPU.
    """
    inputs = inputs_of(problem, shape, "layer", 0, "cuda")
    gradients = output_gradients(problem, shape, 0, "cuda")

    def measure(function: OpFunction, found: dict[str, Errors]) -> Side:
        def forward() -> Tensor:
            with torch.no_grad():
                return function(**inputs, **op_flags(problem))[0]

        def both() -> None:
            run_op(function, problem, inputs, gradients)

        return Side(time_ms(forward), time_ms(both), peak_mib(both), found)

    sides = [measure(x, found) for x, found in zip(functions, errors, strict=True)]
    for _ in range(_TURNS - 1):
        again = [measure(x, found) for x, found in zip(functions, errors, strict=True)]
        sides = [one.or_faster(other) for one, other in zip(sides, again, strict=True)]
    return sides
