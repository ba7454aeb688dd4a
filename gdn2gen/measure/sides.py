"""One implementation at one shape: its times, its peak memory, its errors; measured in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from gdn2gen.base.decay import WEAK
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import CHANNEL_OPS, recurrence_named
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
from gdn2gen.measure.peers import as_mamba_ssm, untuned
from gdn2gen.measure.timing import Timing, peak_mib, time_ms

# Of each implementation the faster counts. At the first shape of a process FLA's forward waited
# for its host: 1.55 ms at train4k (H200), and 1.05 at train2k, which has as many tokens.
_TURNS: Final = 2

# A reference in fp64 at a full shape would take longer than everything else together.
ACCURACY_SHAPE: Final = Shape("accuracy", 1, 1024, 16)
ACCURACY_PATTERNS: Final = ("layer", "zero", "strong", "uniform", "sparse", "mixed")
DECAYS: Final = ("weak", "strong")
"""What times are taken under beside a layer's own decay, which is weak, too: next to nothing is
ever forgotten; all is within a token or a few. Calls are told neither."""
# Patterns of `inputs` that are so; and what a gate's pre-activation is about, for the same.
DECAY_PATTERN: Final = {"weak": "zero", "strong": "strong"}
_PRE_ACTIVATION: Final = {"weak": -16.0, "strong": 12.0}


@dataclass(frozen=True)
class Errors:
    """Worst relative error of one output or gradient, and the pattern of decay it was found in."""

    error: float
    regime: str
    """The pattern; files of results call it by this name."""


@dataclass(frozen=True)
class Times:
    """Both directions, in ms."""

    forward: Timing
    forward_backward: Timing

    def or_faster(self, other: Times) -> Times:
        """The faster of two measurements of each."""
        return Times(
            min(self.forward, other.forward, key=lambda x: x.median),
            min(self.forward_backward, other.forward_backward, key=lambda x: x.median),
        )


@dataclass(frozen=True)
class Side:
    """One implementation at one shape: times in ms, peak memory of fwd+bwd in MiB, errors."""

    forward: Timing
    forward_backward: Timing
    peak_mib: float
    errors: dict[str, Errors]
    decays: dict[str, Times] = field(default_factory=dict)
    """Times under each of DECAYS, where anything decays: kernels that leave out what is forgotten
    are fast only where memory is short."""

    def or_faster(self, other: Side) -> Side:
        """The faster of two measurements of each time; errors are those of both."""
        best = Times(self.forward, self.forward_backward).or_faster(
            Times(other.forward, other.forward_backward)
        )
        return replace(
            self,
            forward=best.forward,
            forward_backward=best.forward_backward,
            peak_mib=min(self.peak_mib, other.peak_mib),
            decays={x: y.or_faster(other.decays[x]) for x, y in self.decays.items()},
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
        with untuned():
            mine = run_op(function, problem, inputs, gradients)
        found = relative_errors(mine, exact)
        for name, error in found.items():
            if name not in worst or error > worst[name].error:
                worst[name] = Errors(error, pattern)
    return worst


def our_op(op: str, level: str, decay: str = WEAK) -> OpFunction:
    """Our op of a recurrence, keeping as much of the forward as `level` lets it, and told what to
    expect of its decay where it can be.

    Of Mamba-2 as callers of mamba_ssm's have it.
    """
    if op == "mamba2":
        from gdn2gen.ops.mamba import mamba_chunk_scan_combined

        return as_mamba_ssm(mamba_chunk_scan_combined)
    told = {"expected_decay": decay} if op in CHANNEL_OPS else {}
    return partial(public_op(op), disable_recompute=level == "fast", **told)


def called(function: OpFunction, problem: Problem, shape: Shape) -> None:
    """Forward and backward once, for what the first call compiles and chooses."""
    inputs = inputs_of(problem, shape, "layer", 0, "cuda")
    run_op(function, problem, inputs, output_gradients(problem, shape, 0, "cuda"))


def measure_in_turns(
    functions: Sequence[OpFunction],
    errors: Sequence[dict[str, Errors]],
    problem: Problem,
    shape: Shape,
) -> list[Side]:
    """Time all `functions`, one after the other and once more, and keep the faster of each.

    `errors`: of each function, to go with its times. Raises DeviceError without a GPU.
    """
    layer = inputs_of(problem, shape, "layer", 0, "cuda")
    gradients = output_gradients(problem, shape, 0, "cuda")

    def time(function: OpFunction, inputs: dict[str, Tensor]) -> Times:
        def forward() -> Tensor:
            with torch.no_grad():
                return function(**inputs, **op_flags(problem))[0]

        return Times(
            time_ms(forward), time_ms(lambda: run_op(function, problem, inputs, gradients))
        )

    def measure(function: OpFunction, found: dict[str, Errors]) -> Side:
        times = time(function, layer)
        peak = peak_mib(lambda: run_op(function, problem, layer, gradients))
        return Side(times.forward, times.forward_backward, peak, found)

    sides = [measure(x, found) for x, found in zip(functions, errors, strict=True)]
    for _ in range(_TURNS - 1):
        again = [measure(x, found) for x, found in zip(functions, errors, strict=True)]
        sides = [one.or_faster(other) for one, other in zip(sides, again, strict=True)]
    if recurrence_named(problem.op).decay is None:
        return sides
    by_decay: list[dict[str, Times]] = [{} for _ in functions]
    for decay in DECAYS:
        inputs = decaying_inputs(problem, shape, decay, "cuda")
        for _ in range(_TURNS):
            for function, found in zip(functions, by_decay, strict=True):
                times = time(function, inputs)
                found[decay] = times.or_faster(found.get(decay, times))
    return [replace(x, decays=found) for x, found in zip(sides, by_decay, strict=True)]


def decaying_inputs(problem: Problem, shape: Shape, decay: str, device: str) -> dict[str, Tensor]:
    """Inputs of one call under one of DECAYS, whether a gate is in the kernels or not."""
    if problem.gate == "none":
        return inputs_of(problem, shape, DECAY_PATTERN[decay], 0, device)
    inputs = inputs_of(problem, shape, "layer", 0, device)
    gate = recurrence_named(problem.op).decay
    assert gate is not None
    inputs[gate.input].mul_(0.5).add_(_PRE_ACTIVATION[decay])
    return inputs
