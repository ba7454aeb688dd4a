"""Times of Mamba-3 and of the kernels around its scan, on the present GPU; their least bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, Final

import torch
from torch import Tensor

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.base.environment import verifying
from gdn2gen.family.mamba3 import States
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3 import AROUND, MAMBA3_AROUND, MAMBA3_STEP
from gdn2gen.kernels.mamba3_chunks import CHUNKS, MAMBA3_CHUNK_STAGES
from gdn2gen.kernels.mamba3_reverse_scan import MAMBA3_REVERSE_STAGES, REVERSE
from gdn2gen.kernels.mamba3_scan import MAMBA3_SCAN
from gdn2gen.kernels.mamba3_turning_scan import TURNING_STAGES
from gdn2gen.measure.mamba3_cases import Mamba3Case
from gdn2gen.measure.mamba3_runs import mamba3_arguments, mamba3_inputs, run_mamba3_case
from gdn2gen.measure.timing import time_ms
from gdn2gen.runtime import mamba3
from gdn2gen.runtime.mamba3_chunk_ops import chunks_forced
from gdn2gen.runtime.mamba3_chunks import Given, launches
from gdn2gen.runtime.mamba3_loaded import force, force_tile
from gdn2gen.runtime.mamba3_reverse_scan import force_reverse_scan

Run = Callable[[], Any]
Configs = Mapping[str, Mapping[str, Knob]]
DEVICE: Final = "cuda"
# Of operands that heads share: bytes of one head are those of all.
_SHARED: Final = ("Angles",)
_OF_CHUNKS: Final = tuple(x.name for x in MAMBA3_CHUNK_STAGES)
_OF_REVERSE: Final = tuple(x.name for x in MAMBA3_REVERSE_STAGES)
# Where knobs are checked: a reference goes token by token.
_CHECKED_TOKENS: Final = 150
_CHECKED: Final = ("layer", "strong", "mixed")


def layer_inputs(problem: Mamba3Problem, shape: Shape, pattern: str = "layer") -> dict[str, Tensor]:
    """As a layer gives them: no states in, one of Angles for all heads."""
    made = mamba3_inputs(problem, shape, pattern, 0, DEVICE)
    made = {x: y for x, y in made.items() if x not in States._fields}
    made["Angles"] = made["Angles"][:, :, :1].expand(made["Angles"].shape)
    return made


def kernel_runs(problem: Mamba3Problem, x: Mapping[str, Tensor], BT: int) -> dict[str, Run]:
    """Each of the kernels around the scan, by its stage, on its real operands."""
    numbers, biases = [x["ADT"], x["DT"], x["Trap"]], [x["Q_bias"], x["K_bias"]]
    before = (x["Q"], x["K"], numbers, biases, x["Angles"])
    D, Z = x.get("D"), x.get("Z")
    q, k, decay, own, last, turns = mamba3.prologue(*before, D, None, [], BT)
    after: Any = (torch.randn_like(x["V"]), x["V"], own, Z, None, [], BT)
    gradients = [torch.randn_like(y) for y in (q, k, decay, own, last)]
    dout = torch.randn_like(x["V"])
    return {
        "mamba3_prologue": lambda: mamba3.prologue(*before, D, None, [], BT),
        "mamba3_prologue_backward": lambda: mamba3.prologue_backward(
            gradients, *before, None, [], turns, BT
        ),
        "mamba3_epilogue": lambda: mamba3.epilogue(*after),
        "mamba3_epilogue_backward": lambda: mamba3.epilogue_backward(dout, *after),
    }


def chunk_runs(x: Mapping[str, Tensor], BT: int) -> dict[str, Run]:
    """Each of the kernels over chunks, likewise."""
    numbers, biases = [x["ADT"], x["DT"], x["Trap"]], [x["Q_bias"], x["K_bias"]]
    D, Z = x.get("D"), x.get("Z")
    given = Given(
        x["Q"], x["K"], x["V"], numbers, biases, x["Angles"], D, Z, None, None, [], BT
    )  # fmt: skip
    return launches(given, torch.randn_like(x["V"]))


def runs_of(kind: str, problem: Mamba3Problem, x: Mapping[str, Tensor], BT: int) -> dict[str, Run]:
    """Those of a kind, which share a tile."""
    return kernel_runs(problem, x, BT) if kind == AROUND else chunk_runs(x, BT)


def time_knobs(
    problem: Mamba3Problem, shape: Shape, stage: str, BT: int, knobs: Mapping[str, Knob]
) -> float:
    """Milliseconds of one stage with these knobs; of a step's at B sequences. For a worker, which
    keeps the operands of the last call."""
    force(stage, dict(knobs))
    # else of a call that has an entry on file: what is asked for of the others, as they are
    force_reverse_scan(stage in _OF_REVERSE)
    try:
        with verifying():
            run = _step_run(problem, shape) if stage == MAMBA3_STEP.name else None
            kind = REVERSE if stage in _OF_REVERSE else CHUNKS if stage in _OF_CHUNKS else AROUND
            return time_ms(run or _runs(kind, problem, shape, BT)[stage]).median
    finally:
        force_reverse_scan(None)
        force(stage, None)


@lru_cache(maxsize=1)
def _runs(kind: str, problem: Mamba3Problem, shape: Shape, BT: int) -> dict[str, Run]:
    return runs_of(kind, problem, layer_inputs(problem, shape), BT)


@lru_cache(maxsize=1)
def _step_run(problem: Mamba3Problem, shape: Shape) -> Run:
    from gdn2gen.ops.mamba3 import mamba3_siso_step

    made = mamba3_inputs(problem, shape, "layer", 0, DEVICE)
    given = mamba3_arguments(made)
    for name in ("Q", "K", "V", "Z", "Angles"):
        if name in given:
            given[name] = given[name][:, 0]
    for name in ("ADT", "DT", "Trap"):
        given[name] = given[name][..., 0]
    return torch.no_grad()(partial(mamba3_siso_step, **given))


def check_knobs(
    problem: Mamba3Problem,
    shape: Shape,
    BT: int | None,
    configs: Configs,
    device: str | None = None,
) -> tuple[dict[str, float], str]:
    """Errors against fp64 with these knobs, in hostile patterns, and that they repeat bit for bit;
    and what is wrong, if anything is. `BT`: the tile of a call over sequences; None for a step.
    `device`: the GPU if None."""
    at_once = any(x in _OF_REVERSE for x in configs)
    tokens = min(shape.T, _CHECKED_TOKENS) if BT is not None else 5
    # TMA reads rows of numbers that begin at multiples of 16 bytes
    tokens -= tokens % 4 if at_once else 0
    small = Shape("check", 1 if BT is not None else 3, tokens, shape.H, groups=shape.key_heads)
    wanted = [("accuracy", x) for x in _CHECKED] + [("repeat", "layer")]
    if BT is None:
        wanted = [("steps", "layer")]
    errors: dict[str, float] = {}
    for stage, knobs in configs.items():
        force(stage, {x: y for x, y in knobs.items() if x != "BT"})
    force_tile(BT)
    # whichever dtype it is: the kernels that the knobs are of
    of_chunks = any(x in (*_OF_CHUNKS, *_OF_REVERSE) for x in configs)
    force_reverse_scan(at_once)
    try:
        for check, pattern in wanted:
            with verifying(), chunks_forced(of_chunks):
                case = Mamba3Case(f"{check}-{pattern}", problem, small, pattern, check)
                result = run_mamba3_case(case, device or DEVICE)
            for name, error in result.errors.items():
                errors[name] = max(error, errors.get(name, 0.0))
            if not result.passed:
                return errors, f"{case.name}: {result.message}"
    finally:
        force_reverse_scan(None)
        force_tile(None)
        for stage in configs:
            force(stage, None)
    return errors, ""


def stage_bytes(
    problem: Mamba3Problem, shape: Shape, BT: int, kind: str = AROUND
) -> dict[str, float]:
    """Bytes of the operands of each stage of a kind, every one moved once."""
    B, T, H = shape.B, shape.T, shape.H
    sizes = dict(B=B, T=T, H=H, G=shape.key_heads, N=problem.state_size, P=problem.head_dim)
    # heads share their angles, as a layer's do
    sizes |= dict(HA=1, S=problem.angles, n=shape.regime.sequences, M=B * -(-T // BT), R=1)
    return {
        stage.name: sum(
            y.nbytes(problem, sizes) / (H if y.name in _SHARED else 1)
            for y in stage.operands(problem)
        )
        for stage in (
            (*MAMBA3_CHUNK_STAGES, MAMBA3_SCAN, *MAMBA3_REVERSE_STAGES, *TURNING_STAGES)
            if kind == CHUNKS
            else MAMBA3_AROUND
        )
    }


def floor_bytes(problem: Mamba3Problem, backward: bool) -> float:
    """Bytes per token and head that no implementation can avoid moving: V, Z, out and the numbers;
    with the backward these and dout again, and a gradient of each. Q, K and Angles of a group may
    serve all of its heads."""
    values = DTYPE[problem.dtype].nbytes * problem.head_dim
    numbers = 2 * DTYPE["fp32"].nbytes + DTYPE[problem.trap_dtype].nbytes
    inputs = values * (2 if problem.gate else 1) + numbers
    forward = inputs + values
    return forward + (2 * inputs + values if backward else 0)
