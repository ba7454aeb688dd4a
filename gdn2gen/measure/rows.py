"""One row per shape: our times, FLA's, the floor's, memory, errors; and times stage by stage."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from torch import Tensor

from gdn2gen.base.decay import WEAK
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.problem import WHERE_TAKEN, Problem, bound_of, gate_parameters
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stages import STAGES
from gdn2gen.measure.accuracy import LOWER_BOUND, inputs_of, output_gradients
from gdn2gen.measure.compiling import compile_side_by_side
from gdn2gen.measure.peers import peer_op
from gdn2gen.measure.sides import (
    ACCURACY_SHAPE,
    Errors,
    Side,
    called,
    decaying_inputs,
    measure_in_turns,
    our_op,
    worst_errors,
)
from gdn2gen.measure.timing import (
    Timing,
    call_of,
    copy_gbps,
    floor_ms,
    product_tflops,
    symbol_sizes,
    time_ms,
)
from gdn2gen.measure.turn import in_turn

T = TypeVar("T")

# Each of several benches has so many compilers.
_SLOTS: Final = 4


@dataclass(frozen=True)
class StageRow:
    """One stage on its real operands: its time, least bytes to move and operations to do.

    `copy_gbps` and `product_tflops` are what a plain copy and a large product of the problem's
    dtype reach on the same GPU: no stage can be faster than the slower of both.
    """

    stage: str
    timing: Timing
    nbytes: int
    flops: int
    copy_gbps: float
    product_tflops: float

    @property
    def gbps(self) -> float:
        return self.nbytes / self.timing.median / 1e6

    @property
    def tflops(self) -> float:
        return self.flops / self.timing.median / 1e9


@dataclass(frozen=True)
class Row:
    """Everything measured at one shape. `fla` is the peer's side; None where none was asked for."""

    shape: Shape
    problem: Problem | Mamba3Problem
    level: str
    """`lean` saves memory, `fast` (disable_recompute=True) saves time."""
    recipe: str
    ours: Side
    fla: Side | None
    floor_forward_ms: float
    floor_forward_backward_ms: float
    peer: str = "fla"
    """What `fla` is the side of, see `peers`."""
    stages: list[StageRow] = field(default_factory=list)
    decay: str = WEAK
    """What our calls expected."""

    @property
    def ratio_to_fla(self) -> tuple[float, float] | None:
        """The peer's time over ours, forward and forward+backward: above 1 we are faster."""
        if self.fla is None:
            return None
        return (
            self.fla.forward.median / self.ours.forward.median,
            self.fla.forward_backward.median / self.ours.forward_backward.median,
        )

    @property
    def ratio_to_floor(self) -> tuple[float, float]:
        """Our time over the memory floor, forward and forward+backward: 1 is the limit."""
        return (
            self.ours.forward.median / self.floor_forward_ms,
            self.ours.forward_backward.median / self.floor_forward_backward_ms,
        )


def bench_problem(
    op: str, K: int, V: int, dtype: str, gate: str, l2norm: bool, shape: Shape, bound: int = 0
) -> Problem:
    """The problem that a benchmark call at `shape` runs: no states in or out.

    `bound` in nats is that of the sigmoid gate; by default the one that `op_flags` gives it.
    """
    if gate == "sigmoid":
        bound = bound or bound_of(LOWER_BOUND)
    return Problem(
        op=op,
        K=K,
        V=V,
        dtype=dtype,
        l2norm=l2norm,
        gate=gate,
        gate_dtype="fp32" if gate == "none" else dtype,
        varlen=shape.cu_seqlens is not None,
        bound=bound,
        **gate_parameters(op, gate),
    )


def bench_shapes(
    op: str,
    shapes: Sequence[Shape],
    K: int,
    V: int,
    dtype: str,
    *,
    vs: str | None,
    gate: str,
    l2norm: bool = WHERE_TAKEN,
    stages: bool = False,
    level: str = "lean",
    bound: int = 0,
    decay: str = WEAK,
    on_row: Callable[[Row], None] | None = None,
    turn: Path | None = None,
) -> list[Row]:
    """Measure each shape on the present GPU; with `stages` also stage by stage.

    `bound`: nats that a token loses at most with the sigmoid gate, 1 to 5; 0 for FLA's default.
    `decay`: what our calls are told to expect, whatever they get; stages are timed under it.
    `vs`: a peer of `peers`. A member whose output may go through a gate is measured without it,
    then with it. Backward is timed as forward+backward of `o` with a random dO. A peer that raises,
    as flash-linear-attention does where it knows that a Triton miscompiles it, is left out with a
    warning that says what it said. `turn`: as in `measure.turn`, once all has been called. Raises
    DeviceError without a GPU, and UnsupportedError when a peer is asked for and not installed.
    """
    ours, theirs = our_op(op, level, decay), peer_op(vs, op, level) if vs else None
    errors: dict[Problem, list[dict[str, Errors]]] = {}
    pairs = [*_gated_and_not(shapes, op, K, V, dtype, gate, l2norm, bound)]
    if turn is not None:
        compile_side_by_side(_kernels(pairs, level, decay), _present_device(), _SLOTS)
    for problem, shape in pairs:
        dense = replace(problem, varlen=False)
        if dense not in errors:
            beside = of_peer(vs, partial(worst_errors, theirs, dense)) if theirs else None
            errors[dense] = [worst_errors(ours, dense), *([beside] if beside else [])]
        if turn is not None:
            called(ours, problem, shape)
            if theirs and len(errors[dense]) == 2:
                of_peer(vs, partial(called, theirs, problem, shape), f" at {shape.name}")
    rows = []
    with in_turn(turn):
        gbps = copy_gbps()
        for problem, shape in pairs:
            known = errors[replace(problem, varlen=False)]
            # a peer that raised has no errors
            sides = None
            if theirs and len(known) == 2:
                both = partial(measure_in_turns, [ours, theirs], known, problem, shape)
                sides = of_peer(vs, both, f" at {shape.name}")
            mine, *others = sides or measure_in_turns([ours], known[:1], problem, shape)
            row = Row(
                shape=shape,
                problem=problem,
                level=level,
                recipe=_recipe_name(problem, shape, level, decay),
                ours=mine,
                fla=others[0] if others else None,
                floor_forward_ms=floor_ms(problem, shape, False, gbps),
                floor_forward_backward_ms=floor_ms(problem, shape, True, gbps),
                peer=vs or "fla",
                stages=bench_stages(problem, shape, level, decay) if stages else [],
                decay=decay,
            )
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def _kernels(
    pairs: Iterable[tuple[Problem, Shape]], level: str, decay: str
) -> Iterator[tuple[Problem, Config]]:
    """What calls run, here and where errors are measured."""
    from gdn2gen.store.dispatch import find_recipe

    for problem, shape in pairs:
        checked = replace(problem, varlen=False, final_state=True), ACCURACY_SHAPE
        for x, sizes in ((problem, shape), checked):
            found = find_recipe(x, sizes.regime, _present_device(), level=level, decay=decay)
            yield from ((x, config) for config in found.recipe.configs)


def _gated_and_not(
    shapes: Sequence[Shape],
    op: str,
    K: int,
    V: int,
    dtype: str,
    gate: str,
    l2norm: bool,
    bound: int,
) -> Iterator[tuple[Problem, Shape]]:
    """Problems at each shape: one, or two where the output may go through a gate."""
    for shape in shapes:
        problem = bench_problem(op, K, V, dtype, gate, l2norm, shape, bound)
        if problem.has_z:
            yield replace(problem, has_z=False), shape
        yield problem, shape


def of_peer(name: str | None, measure: Callable[[], T], where: str = "") -> T | None:
    """What is measured of a peer, or beside it; None, with a warning, where that raises any error:
    what a peer cannot do, or has no memory for, takes nothing from what is measured of ours."""
    try:
        return measure()
    except Exception as error:  # whatever a peer raises
        said = f"{name} is left out{where}: it raised {type(error).__name__}: {error}"
    warnings.warn(said, stacklevel=3)
    return None


def bench_stages(
    problem: Problem, shape: Shape, level: str = "lean", decay: str = WEAK
) -> list[StageRow]:
    """Time each stage of the recipe that a call would run, on its real operands, under the decay
    that it expects."""
    from gdn2gen.store.dispatch import find_recipe

    found = find_recipe(problem, shape.regime, _present_device(), level=level, decay=decay)
    recipe = found.recipe
    inputs = inputs_of(problem, shape, "layer", 0, "cuda")
    if decay != WEAK:
        inputs = decaying_inputs(problem, shape, decay, "cuda")
    do = output_gradients(problem, shape, 0, "cuda")["o"]
    rows = []
    for name, call in stage_calls(recipe, shape, inputs, do):
        BT = recipe[name].size("BT")
        stage, sizes = STAGES[name], symbol_sizes(problem, shape, BT)
        ceilings = copy_gbps(), product_tflops(problem.dtype)
        work = stage.nbytes(problem, sizes), stage.flops(problem, sizes)
        rows.append(StageRow(name, time_ms(call), *work, *ceilings))
    return rows


def stage_calls(
    recipe: Recipe, shape: Shape, inputs: Mapping[str, Tensor], do: Tensor
) -> list[tuple[str, Callable[[], None]]]:
    """Run the recipe once, and return each stage as a callable that runs it again on its operands.

    `inputs` as `inputs_of` makes them; `do` is the gradient of the output.
    """
    from gdn2gen.runtime import runner

    call = call_of(recipe.problem, shape, do.device)
    tensors = {**inputs, **_unfolded_bias(recipe.problem, shape, inputs), "do": do}
    return runner.stage_calls(runner.Runner(recipe), call, tensors)


def _unfolded_bias(
    problem: Problem, shape: Shape, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The bias of a gate, where there is one, in the dims that kernels know: [HG, K], or one number
    a head. Callers may give it flat."""
    from gdn2gen.family.registry import recurrence_named

    sizes = {"HG": shape.H, "HV": shape.H, "K": problem.K}
    return {
        x.name: inputs[x.name].reshape([sizes[symbol] for symbol in x.symbols])
        for x in recurrence_named(problem.op).optional
        if x.name == "dt_bias" and x.name in inputs
    }


def _recipe_name(problem: Problem, shape: Shape, level: str, decay: str) -> str:
    """The plan, where its configs came from: a figure without it cannot be repeated."""
    from gdn2gen.store.dispatch import find_recipe

    found = find_recipe(problem, shape.regime, _present_device(), level=level, decay=decay)
    under = "" if decay == WEAK else f", for {found.tuned_decay}"
    return f"{found.recipe.plan.name} ({found.source}{under})"


def _present_device() -> Any:
    from gdn2gen.base.device import present_device

    return present_device()
