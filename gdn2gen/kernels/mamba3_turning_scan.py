"""Mamba-3's states and outputs in one stage that turns queries and keys itself.

As `mamba3_scan`, but q and k of a head are never in memory, unless the backward is to find them:
one group of warps turns a chunk's rows of Q and K in shared memory while another one has the
products of the chunk before it. Angles are added up on the way, so that `mamba3_turns` is not run
either. No call takes it by itself: it has not run on a GPU (`TURNS_WITHIN`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.limits import Knob, Limit
from gdn2gen.kernels.mamba3 import mamba3_stage
from gdn2gen.kernels.mamba3_chunks import MAMBA3_ROTATE, MAMBA3_TURNS
from gdn2gen.kernels.mamba3_scan import MAMBA3_SCAN, scans_at_once
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.stage import Form, Operand

_KNOWN: Final = {
    x.name: x
    for stage in (MAMBA3_TURNS, MAMBA3_ROTATE, MAMBA3_SCAN)
    for x in (*stage.inputs, *stage.outputs)
}
# Half of tanh of the angles: of the head that all share, or of each.
_RATES: Final = Operand("rates", "B HA T S", "fp32", "rotated")

MAMBA3_WEIGHTS: Final = mamba3_stage(
    "mamba3_weights",
    tuple(_KNOWN[x] for x in ("ADT", "DT", "Trap", "Angles")),
    (*(_KNOWN[x] for x in ("within", "tail_decay", "weight_s", "own_dt")), _RATES),
    ("T", "H", "HA", "n_tiles", "angle_row", "angle_head"),
    {"BH": (1, 2, 4, 8), "num_warps": (1,), "num_stages": (1,)},
)
MAMBA3_TURNING_SCAN: Final = PartStage(
    made_for=Mamba3Problem,
    name="mamba3_turning_scan",
    inputs=(
        *(_KNOWN[x] for x in ("Q", "K", "Q_bias", "K_bias")),
        replace(_KNOWN["DT"], when="rotated"),
        *(_RATES, _KNOWN["angle_state"]),
        *(_KNOWN[x] for x in ("V", "within", "tail_decay", "weight_s", "own_dt")),
        *(_KNOWN[x] for x in ("D", "Z", "initial_ssm")),
    ),
    outputs=tuple(
        _KNOWN[x]
        for x in (
            *("out", "ungated", "h", "final_ssm"),
            *("q", "k", "theta", "turns", "last_angle"),
        )
    ),
    scalars=("T",),
    count="n_sequences",
    forms=(
        Form(
            "mamba3_turning_scan",
            "tilelang",
            "mamba3_turning_scan",
            # what is left for a backward, as of `mamba3_scan`; registers of a thread that turns, of
            # the 256 that it shares with one that has products (with 88 ptxas waits for each of
            # these); whether rates are read a chunk ahead, which takes registers
            knobs={
                **{"keep": (0, 1, 2), "BV": (64,), "maxnreg": (64, 72, 80)},
                **{"ahead": (1, 0), "num_warps": (4,), "num_stages": (2,)},
            },
            leads={},
            limits=(
                Limit("arch", (None, "sm_90"), "it was written for products of that arch's groups"),
                Limit("BT", (64,), "tokens are the 64 rows of a warp group's products"),
                Limit("K", (64, 128), "a lane has one or two pairs of channels of a row"),
                Limit("V", (64,), "a program has all values of a head, 64 rows of its state"),
            ),
            tiles=(),
        ),
    ),
    chunks=(64,),
)
TURNS_WITHIN: Final = False
"""Whether calls that can take it do, where nothing is forced."""
TURNING_STAGES: Final = (MAMBA3_WEIGHTS, MAMBA3_TURNING_SCAN)

_LANES: Final = 32


def turning_knobs(problem: Mamba3Problem, keep: int) -> dict[str, Knob]:
    """The scan's without a search. Of more than 32 angles a lane has two: rates a chunk ahead spill
    192 bytes, and others 80 in 64 registers."""
    if problem.angles > _LANES:
        return {"keep": keep, "ahead": 0, "maxnreg": 72}
    return {"keep": keep, "ahead": 1, "maxnreg": 64}


def weights_problem(problem: Mamba3Problem) -> Mamba3Problem:
    """What is compiled into the numbers of tokens."""
    usual = Mamba3Problem()
    own = replace(problem, head_dim=usual.head_dim, state_size=max(usual.state_size, problem.K))
    return replace(own, skip=False, gate=False, carried=False)


def turning_problem(problem: Mamba3Problem) -> Mamba3Problem:
    """What is compiled into the scan: weights and rates are made."""
    usual = Mamba3Problem()
    return replace(problem, trap_dtype=usual.trap_dtype, angle_dtype=usual.angle_dtype)


def turns_within(problem: Mamba3Problem, BT: int, T: int, programs: int, sms: int) -> bool:
    """Whether the scan can be one that turns: where `mamba3_scan` would run, of P 64."""
    return problem.head_dim == 64 and scans_at_once(problem, BT, T, programs, sms)
