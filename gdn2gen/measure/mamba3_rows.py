"""A benchmark's rows of Mamba-3: ours and mamba_ssm's at each shape, and kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.mamba3 import AROUND
from gdn2gen.kernels.mamba3_chunks import CHUNKS, by_chunks
from gdn2gen.measure.accuracy import relative_errors
from gdn2gen.measure.mamba3_runs import mamba3_inputs, mamba3_results
from gdn2gen.measure.mamba3_times import DEVICE, floor_bytes, layer_inputs, runs_of, stage_bytes
from gdn2gen.measure.peers import mamba3_op, untuned
from gdn2gen.measure.rows import Row, StageRow, of_peer
from gdn2gen.measure.sides import ACCURACY_PATTERNS, DECAY_PATTERN, DECAYS, Errors, Side, Times
from gdn2gen.measure.timing import copy_gbps, peak_mib, product_tflops, time_ms
from gdn2gen.measure.turn import in_turn
from gdn2gen.runtime.mamba3_loaded import tile_at

# A reference goes token by token.
ACCURACY_SHAPE: Final = Shape("accuracy", 1, 512, 16, groups=1)
_TURNS: Final = 2
Op = Callable[..., Any]


@dataclass(frozen=True)
class _Timed:
    """An implementation, and how far it is off."""

    op: Op
    errors: dict[str, Errors]


def bench_mamba3(
    shapes: Sequence[Shape],
    K: int,
    V: int,
    dtype: str,
    *,
    vs: str | None,
    stages: bool = False,
    level: str = "lean",
    on_row: Callable[[Row], None] | None = None,
    turn: Path | None = None,
) -> list[Row]:
    """Measure each shape on the present GPU, with D and Z, without and with states packed.

    `level`: of our scan; mamba_ssm's op knows none. Backward is timed as forward+backward of `out`,
    for a gradient of every input. A peer that raises is left out, and `turn` is waited for, as by
    `bench_shapes`. Raises DeviceError without a GPU, and UnsupportedError when a peer is asked for
    and not installed.
    """
    from gdn2gen.ops.mamba3 import mamba3_siso_combined

    own = partial(mamba3_siso_combined, disable_recompute=level == "fast")
    theirs = mamba3_op(vs) if vs else None
    base = Mamba3Problem(dtype=dtype, state_size=K, head_dim=V, angles=K // 4, skip=True, gate=True)
    given = [_Timed(own, worst_errors(own, base, peer=False))]
    beside = of_peer(vs, partial(worst_errors, theirs, base, peer=True)) if theirs else None
    if theirs and beside:
        given.append(_Timed(theirs, beside))
    for shape in shapes if turn is not None else ():
        problem = replace(base, packed=shape.cu_seqlens is not None)
        _called(own, problem, shape)
        if theirs and len(given) == 2:
            of_peer(vs, partial(_called, theirs, problem, shape), f" at {shape.name}")
    rows = []
    with in_turn(turn):
        gbps = copy_gbps()
        for shape in shapes:
            problem = replace(base, packed=shape.cu_seqlens is not None)
            both = partial(measure_in_turns, given, problem, shape)
            sides = of_peer(vs, both, f" at {shape.name}") if len(given) == 2 else None
            ours, *others = sides or measure_in_turns(given[:1], problem, shape)
            row = Row(
                shape=shape,
                problem=problem,
                level=level,
                recipe=_recipe_name(problem, shape, level),
                ours=ours,
                fla=others[0] if others else None,
                floor_forward_ms=_floor_ms(problem, shape, False, gbps),
                floor_forward_backward_ms=_floor_ms(problem, shape, True, gbps),
                peer=vs or "mamba_ssm",
                stages=_stage_rows(problem, shape) if stages else [],
            )
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def _called(op: Op, problem: Mamba3Problem, shape: Shape) -> None:
    """Forward and backward once, for what the first call compiles and chooses."""
    made = layer_inputs(problem, shape)
    _, both = _runs(op, made, torch.randn_like(made["V"]))
    both()


def worst_errors(op: Op, problem: Mamba3Problem, *, peer: bool) -> dict[str, Errors]:
    """Worst error over ACCURACY_PATTERNS, per output and gradient."""
    worst: dict[str, Errors] = {}
    for pattern in ACCURACY_PATTERNS:
        made = mamba3_inputs(problem, ACCURACY_SHAPE, pattern, 0, DEVICE)
        with untuned():
            results = mamba3_results(made, op, peer=peer)
        for name, error in relative_errors(*results).items():
            if name not in worst or error > worst[name].error:
                worst[name] = Errors(error, pattern)
    return worst


def measure_in_turns(given: Sequence[_Timed], problem: Mamba3Problem, shape: Shape) -> list[Side]:
    """Time all of them, one after the other and once more, and keep the faster of each; then under
    each of DECAYS."""
    made = layer_inputs(problem, shape)
    dout = torch.randn_like(made["V"])

    def measure(timed: _Timed) -> Side:
        times, both = _times(timed.op, made, dout)
        return Side(times.forward, times.forward_backward, peak_mib(both), timed.errors)

    sides = [measure(x) for x in given]
    for _ in range(_TURNS - 1):
        sides = [x.or_faster(measure(y)) for x, y in zip(sides, given, strict=True)]
    for decay in DECAYS:
        inputs = layer_inputs(problem, shape, DECAY_PATTERN[decay])
        found = [_times(x.op, inputs, dout)[0] for x in given]
        for _ in range(_TURNS - 1):
            again = [_times(x.op, inputs, dout)[0] for x in given]
            found = [x.or_faster(y) for x, y in zip(found, again, strict=True)]
        sides = [
            replace(x, decays=x.decays | {decay: y}) for x, y in zip(sides, found, strict=True)
        ]
    return sides


def _times(op: Op, made: dict[str, Tensor], dout: Tensor) -> tuple[Times, Callable[[], Any]]:
    run, both = _runs(op, made, dout)
    return Times(time_ms(torch.no_grad()(run)), time_ms(both)), both


def _runs(
    op: Op, made: dict[str, Tensor], dout: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """A forward, and one with the backward."""
    floating = {x: y for x, y in made.items() if y.is_floating_point()}
    leaves = {x: y.detach().requires_grad_() for x, y in floating.items()}
    angles = made["Angles"][:, :, :1].clone().requires_grad_()
    leaves["Angles"] = angles

    def run() -> Tensor:
        shared = angles.expand(made["Angles"].shape)
        out: Tensor = op(**{**made, **leaves, "Angles": shared})
        return out

    def both() -> Any:
        return torch.autograd.grad(run(), [*leaves.values()], dout)

    return run, both


def _floor_ms(problem: Mamba3Problem, shape: Shape, backward: bool, gbps: float) -> float:
    return floor_bytes(problem, backward) * shape.B * shape.T * shape.H / gbps / 1e6


def _tile(problem: Mamba3Problem, shape: Shape, kind: str) -> int:
    device = torch.device("cuda", torch.cuda.current_device())
    return tile_at(problem, shape.B * shape.T, shape.H, shape.key_heads, device, kind)


def _stage_rows(problem: Mamba3Problem, shape: Shape) -> list[StageRow]:
    """Its own kernels; of a scan they are around, that is a benchmark of `simple_gla`."""
    dense = replace(problem, packed=False), replace(shape, cu_seqlens=None)
    kind = CHUNKS if by_chunks(problem.dtype) else AROUND
    BT = _tile(*dense, kind)
    moved = stage_bytes(*dense, BT, kind)
    runs = runs_of(kind, dense[0], layer_inputs(*dense), BT)
    ceilings = copy_gbps(), product_tflops(problem.dtype)
    return [StageRow(x, time_ms(run), int(moved[x]), 0, *ceilings) for x, run in runs.items()]


def _recipe_name(problem: Mamba3Problem, shape: Shape, level: str) -> str:
    """What runs, and where its knobs come from: kernels over chunks, or the scan's plan and the
    kernels around it."""
    from gdn2gen.base.device import present_device
    from gdn2gen.store.mamba3 import find_mamba3

    device = present_device(torch.cuda.current_device())
    found = find_mamba3(problem, shape, device, level=level)
    own = "tuned" if "tuned" in {y for x, y in found.sources.items() if "step" not in x} else "rule"
    if found.scan is None:
        return f"chunks ({own})"
    return f"{found.scan.recipe.plan.name} ({found.scan.source}), around it {own}"
