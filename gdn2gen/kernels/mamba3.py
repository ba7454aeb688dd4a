"""The stages around Mamba-3's scan, in no plan: what comes before and after it, and gradients.

Symbols in `dims` are those of Mamba: B rows, T tokens, H heads, G groups of Q and K, N channels of
these, P of V, S pairs of the N that are rotated. Beside them n sequences, M tiles of BT tokens,
none of which has tokens of two sequences, and R parts of the heads of a group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.limits import Domain, Knob
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stage import Form, Operand

MAMBA3_TOKENS: Final[Domain] = (16, 32, 64)
"""Tokens of a tile."""
_KNOBS: Final[dict[str, Domain]] = {
    "BH": (1, 2, 4, 8, 16, 32, 64),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1,),
}


def mamba3_stage(
    name: str,
    inputs: tuple[Operand, ...],
    outputs: tuple[Operand, ...],
    scalars: tuple[str, ...],
    knobs: dict[str, Domain] = _KNOBS,
    chunks: Domain = MAMBA3_TOKENS,
) -> PartStage:
    return PartStage(
        made_for=Mamba3Problem,
        name=name,
        inputs=inputs,
        outputs=outputs,
        scalars=scalars,
        forms=(Form(name, "triton", name, knobs=knobs, leads={}, tiles=()),),
        chunks=chunks,
    )


_TILES: Final = Operand("tiles", "M 4", "int32", "varlen")
_TILE_STARTS: Final = Operand("tile_starts", "n+1", "int32", "varlen")
_GIVEN: Final = (
    Operand("Q", "B T G N"),
    Operand("K", "B T G N"),
    Operand("ADT", "B H T", "fp32"),
    Operand("DT", "B H T", "fp32"),
    Operand("Trap", "B H T", "trap"),
    Operand("Q_bias", "H N", "weight"),
    Operand("K_bias", "H N", "weight"),
    Operand("Angles", "B T H S", "angle", "rotated"),
)
_TURNS: Final = Operand("turns", "M H S", "int32", "rotated")
_SIZES: Final = ("B", "T", "H", "G", "n_tiles", "n_sequences", "angle_row", "angle_head")

MAMBA3_PROLOGUE: Final = mamba3_stage(
    "mamba3_prologue",
    (
        *_GIVEN,
        Operand("D", "H", "weight", "skip"),
        Operand("angle_state", "n H S", "fp32", "carries_angles"),
        _TILES,
        _TILE_STARTS,
    ),
    (
        Operand("q", "B T H N"),
        Operand("k", "B T H N"),
        Operand("decay", "B T H", "fp32"),
        Operand("own", "B T H", "fp32"),
        _TURNS,
        Operand("last_angle", "n H S", "fp32", "rotated"),
    ),
    _SIZES,
)
MAMBA3_PROLOGUE_BACKWARD: Final = mamba3_stage(
    "mamba3_prologue_backward",
    (
        *_GIVEN,
        _TILES,
        _TILE_STARTS,
        _TURNS,
        Operand("dq", "B T H N"),
        Operand("dk", "B T H N"),
        Operand("ddecay", "B T H", "fp32"),
        Operand("down", "B T H", "fp32"),
        Operand("dlast_angle", "n H S", "fp32", "rotated"),
    ),
    (
        Operand("dQ_part", "R B T G N", "fp32"),
        Operand("dK_part", "R B T G N", "fp32"),
        Operand("dQ_bias_part", "M H N", "fp32"),
        Operand("dK_bias_part", "M H N", "fp32"),
        Operand("dADT", "B H T", "fp32"),
        Operand("dDT", "B H T", "fp32"),
        Operand("dTrap", "B H T", "trap"),
        Operand("dAngles", "B T H S", "angle", "rotated"),
        Operand("dangle_state", "n H S", "fp32", "carries_angles"),
        Operand("dweight_s", "B H T", "fp32"),
        Operand("down_dt", "B H T", "fp32"),
        Operand("dtheta", "B T H S", "fp32", "rotated"),
        Operand("dtheta_sums", "M H S", "fp32", "rotated"),
    ),
    _SIZES,
)

_VALUES: Final = (
    Operand("o", "B T H P"),
    Operand("V", "B T H P"),
    Operand("own", "B T H", "fp32"),
    Operand("Z", "B T H P", when="gate"),
    Operand("first", "n H P", "fp32", "carried"),
    _TILES,
)
MAMBA3_EPILOGUE: Final = mamba3_stage(
    "mamba3_epilogue", _VALUES, (Operand("out", "B T H P"),), ("T", "H", "n_tiles")
)
MAMBA3_EPILOGUE_BACKWARD: Final = mamba3_stage(
    "mamba3_epilogue_backward",
    (*_VALUES, Operand("dout", "B T H P")),
    (
        Operand("do", "B T H P"),
        Operand("dV", "B T H P"),
        Operand("down", "B T H", "fp32"),
        Operand("dZ", "B T H P", when="gate"),
        Operand("dfirst", "n H P", "fp32", "carried"),
    ),
    ("T", "H", "n_tiles"),
)
_ROWS: Final[dict[str, Domain]] = {
    "BR": (8, 16, 32, 64),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1,),
}
MAMBA3_STEP: Final = mamba3_stage(
    "mamba3_step",
    (
        Operand("Q", "B G N"),
        Operand("K", "B G N"),
        Operand("V", "B H P"),
        Operand("ADT", "B H", "fp32"),
        Operand("DT", "B H", "fp32"),
        Operand("Trap", "B H", "trap"),
        Operand("Q_bias", "H N", "weight"),
        Operand("K_bias", "H N", "weight"),
        Operand("Angles", "B H S", "angle", "rotated"),
        Operand("D", "H", "weight", "skip"),
        Operand("Z", "B H P", when="gate"),
        Operand("angle_state", "B H S", "fp32", "rotated"),
        Operand("ssm_state", "B H P N", "fp32"),
        Operand("k_state", "B H N", "fp32"),
        Operand("v_state", "B H P", "fp32"),
    ),
    (
        Operand("out", "B H P"),
        Operand("last_angle", "B H S", "fp32", "rotated"),
        Operand("last_ssm", "B H P N", "fp32"),
        Operand("last_k", "B H N", "fp32"),
    ),
    ("B", "H", "G"),
    _ROWS,
    (1,),
)
MAMBA3_AROUND: Final = (
    *(MAMBA3_PROLOGUE, MAMBA3_PROLOGUE_BACKWARD),
    *(MAMBA3_EPILOGUE, MAMBA3_EPILOGUE_BACKWARD),
)
MAMBA3_STAGES: Final = (*MAMBA3_AROUND, MAMBA3_STEP)

AROUND: Final = "around"
"""What files call the kernels before and after the scan, which share a tile and are tuned
together."""
ONE_TOKEN: Final = "step"
"""What files call the kernel of one token."""


def known_around(problem: Mamba3Problem, H: int, G: int) -> dict[str, str | int]:
    """What an entry on file is of, beside its tokens: what moves the speed."""
    names = ("dtype", "state_size", "head_dim", "angles")
    return {**{x: getattr(problem, x) for x in names}, "heads": H, "groups": G}


def own_problem(stage: PartStage, problem: Mamba3Problem) -> Mamba3Problem:
    """What is compiled into a stage: its own launch knows no more of a call."""
    if stage is MAMBA3_STEP:
        return replace(problem, carried=True, packed=False)
    if stage in (MAMBA3_EPILOGUE, MAMBA3_EPILOGUE_BACKWARD):
        return Mamba3Problem(
            dtype=problem.dtype,
            head_dim=problem.head_dim,
            gate=problem.gate,
            carried=problem.carried,
            packed=problem.packed,
        )
    skip = problem.skip and stage is MAMBA3_PROLOGUE
    return replace(problem, head_dim=Mamba3Problem.head_dim, gate=False, skip=skip)


def known_of(stage: PartStage, problem: Mamba3Problem, H: int, G: int) -> dict[str, str | int]:
    """The same as far as a stage's own launch knows it."""
    known = known_around(problem, H, G)
    before = stage in (MAMBA3_PROLOGUE, MAMBA3_PROLOGUE_BACKWARD)
    foreign = ("head_dim",) if before else ("state_size", "angles", "groups")
    return {x: y for x, y in known.items() if x not in foreign}


# Programs to a multiprocessor at least.
_PROGRAMS: Final = 8


def tile_of(dtype: str, state_size: int) -> int:
    """Tokens of a tile, the same in all kernels of a call: as many as fit into registers."""
    return 16 if dtype == "fp32" or state_size > 128 else 32


def mamba3_knobs(
    stage: PartStage, problem: Mamba3Problem, tiles: int, H: int, G: int, sms: int
) -> dict[str, Knob]:
    """The knobs for so many tiles, H heads and G groups on `sms` multiprocessors.

    A program takes as many heads as leave enough programs: it reads their group's rows from L1
    then, and hands on one sum of gradients for them. Nothing of this was measured.
    """
    BH = 1
    for heads in _KNOBS["BH"]:
        assert isinstance(heads, int)
        if (H // G) % heads == 0 and tiles * (H // heads) >= _PROGRAMS * sms:
            BH = heads
    if stage in (MAMBA3_PROLOGUE, MAMBA3_PROLOGUE_BACKWARD):
        num_warps = 4 if stage is MAMBA3_PROLOGUE and problem.dtype != "fp32" else 8
    else:
        num_warps = 8 if covering(problem.head_dim) > 128 else 4
    return {"BT": tile_of(problem.dtype, problem.state_size), "BH": BH, "num_warps": num_warps}


def mamba3_step_knobs(problem: Mamba3Problem, B: int, H: int, sms: int) -> dict[str, Knob]:
    """The knobs for one token of B sequences and H heads: rows of a state as many as leave every
    multiprocessor a program, in warps that hold 32 numbers a thread. Nothing of this was
    measured."""
    BR = 8
    for rows in _ROWS["BR"]:
        assert isinstance(rows, int)
        fits = rows * covering(problem.state_size) <= 8192
        if fits and B * H * -(-problem.head_dim // rows) >= 2 * sms:
            BR = rows
    return {"BT": 1, "BR": BR, "num_warps": max(1, BR * covering(problem.state_size) // 1024)}
