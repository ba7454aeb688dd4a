"""The stages of Mamba-3 by kernels of its own: rotations, states, outputs, and gradients.

A chunk is a tile of BT tokens, and symbols in `dims` are those of `kernels.mamba3`. Queries and
keys of each head are turned once, and the gate is taken off once: all products read plain tiles.
What needs a state reads it: a scan leaves one at the start of each chunk, one back its gradient at
the end, and all else runs chunks side by side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.limits import Domain, Knob
from gdn2gen.kernels.mamba3 import MAMBA3_TOKENS, mamba3_stage
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stage import Operand

_HEADS: Final[Domain] = (1, 2, 4, 8, 16, 32, 64)
_VALUES: Final[Domain] = (16, 32, 64, 128)
_WARPS: Final[Domain] = (1, 2, 4, 8)
_BY_HEADS: Final[dict[str, Domain]] = {"BH": _HEADS, "num_warps": _WARPS, "num_stages": (1,)}
# A lane has a pair of channels of a token, and variables of its own for each head.
_BY_TOKENS: Final[dict[str, Domain]] = {"BH": (1, 2, 4, 8), "num_warps": (1,), "num_stages": (1,)}
_BY_VALUES: Final[dict[str, Domain]] = {"BV": _VALUES, "num_warps": _WARPS, "num_stages": (1,)}
# Two programs of eight warps to a multiprocessor: of one, a scan would take two rounds.
_BY_SCAN: Final[dict[str, Domain]] = _BY_VALUES | {"maxnreg": (0, 128)}

_BY_ROWS: Final[dict[str, Domain]] = {
    "BR": (16, 32, 64, 128),
    "num_warps": _WARPS,
    "num_stages": (1,),
}

# Registers that leave room for two, three and four programs of four warps.
_BY_REGISTERS: Final[dict[str, Domain]] = (
    _BY_HEADS | _BY_VALUES | {"maxnreg": (0, 168, 128), "num_stages": (1, 2)}
)

_TILES: Final = (
    Operand("tiles", "M 4", "int32", "varlen"),
    Operand("tile_starts", "n+1", "int32", "varlen"),
)
_NUMBERS: Final = (
    Operand("ADT", "B H T", "fp32"),
    Operand("DT", "B H T", "fp32"),
    Operand("Trap", "B H T", "trap"),
)
_ANGLES: Final = Operand("Angles", "B T H S", "angle", "rotated")
_THETA: Final = Operand("theta", "B T H S", "int32", "rotated")
_TURNS: Final = Operand("turns", "M H S", "int32", "rotated")
_BIASED: Final = (
    *(Operand("Q", "B T G N"), Operand("K", "B T G N")),
    *(Operand("Q_bias", "H N", "weight"), Operand("K_bias", "H N", "weight")),
)
_Q: Final = Operand("q", "B T H N")
_K: Final = Operand("k", "B T H N")
# Of each token and head, in the layout of the scans' programs.
_WEIGHTS: Final = (
    Operand("within", "B H T", "fp32"),
    Operand("tail_decay", "B H T", "fp32"),
    Operand("weight_s", "B H T", "fp32"),
    Operand("own_dt", "B H T", "fp32"),
)
_V: Final = Operand("V", "B T H P")
_Z: Final = Operand("Z", "B T H P", when="gate")
_D: Final = Operand("D", "H", "weight", "skip")
_H: Final = Operand("h", "M H P N")
_DH: Final = Operand("dh", "M H P N")
_Y: Final = Operand("ungated", "B T H P", when="gate")
_DY: Final = Operand("dy", "B T H P")
_DOWN: Final = Operand("down", "B T H", "fp32")

MAMBA3_TURNS: Final = mamba3_stage(
    "mamba3_turns",
    (
        Operand("DT", "B H T", "fp32"),
        _ANGLES,
        Operand("angle_state", "n H S", "fp32", "carries_angles"),
        *_TILES,
    ),
    (_TURNS, Operand("last_angle", "n H S", "fp32", "rotated")),
    ("T", "H", "n_tiles", "n_sequences", "angle_row", "angle_head"),
    _BY_TOKENS,
)
MAMBA3_ROTATE: Final = mamba3_stage(
    "mamba3_rotate",
    (*_BIASED, *_NUMBERS, _ANGLES, _TURNS, _TILES[0]),
    (_Q, _K, *_WEIGHTS, _THETA),
    ("T", "H", "G", "n_tiles", "angle_row", "angle_head", "keep"),
    _BY_TOKENS,
)
MAMBA3_STATES: Final = mamba3_stage(
    "mamba3_states",
    (
        *(_K, _V, *_WEIGHTS[:3]),
        Operand("initial_ssm", "n H P N", "fp32", "carried"),
        *_TILES,
    ),
    (_H, Operand("final_ssm", "n H P N", "fp32")),
    ("T", "H", "n_sequences"),
    _BY_SCAN,
)
MAMBA3_OUTPUT: Final = mamba3_stage(
    "mamba3_output",
    (_Q, _K, _V, _NUMBERS[0], _WEIGHTS[0], *_WEIGHTS[2:], _D, _Z, _H, _TILES[0]),
    (Operand("out", "B T H P"), _Y),
    ("T", "H", "n_tiles", "keep"),
    _BY_REGISTERS,
)
MAMBA3_GATE: Final = mamba3_stage(
    "mamba3_gate",
    (_V, _Z, _Y, Operand("dout", "B T H P")),
    (replace(_DY, when="gate"), Operand("dZ", "B T H P", when="gate"), _DOWN),
    ("B", "T", "H"),
    _BY_ROWS,
)
MAMBA3_REVERSE_STATES: Final = mamba3_stage(
    "mamba3_reverse_states",
    (
        *(_Q, _WEIGHTS[0], _DY),
        Operand("dfinal_ssm", "n H P N", "fp32"),
        *_TILES,
    ),
    (_DH, Operand("dinitial_ssm", "n H P N", "fp32", "carried")),
    ("T", "H", "n_sequences"),
    _BY_SCAN,
)
MAMBA3_GRADIENT: Final = mamba3_stage(
    "mamba3_gradient",
    (
        *(_Q, _K, _V, *_NUMBERS, *_WEIGHTS, _ANGLES, _THETA, _TURNS, _D),
        *(_DY, _DOWN, _H, _DH, _TILES[0]),
        Operand("dlast_angle", "n H S", "fp32", "rotated"),
        Operand("dlast_turn", "n H S", "fp32", "rotated"),
    ),
    (
        Operand("dQ", "B T G N"),
        Operand("dK", "B T G N"),
        Operand("dv", "B T H P"),
        Operand("dQ_bias_part", "M H N", "fp32"),
        Operand("dK_bias_part", "M H N", "fp32"),
        Operand("dADT", "B H T", "fp32"),
        Operand("dDT", "B H T", "fp32"),
        Operand("dTrap", "B H T", "trap"),
        Operand("dAngles", "B T H S", "angle", "rotated"),
        Operand("dQ_head", "B T H N"),
        Operand("dK_head", "B T H N"),
        Operand("dweight_s", "B H T", "fp32"),
        Operand("down_dt", "B H T", "fp32"),
        Operand("dread", "B H T", "fp32"),
        Operand("read_q", "B H T", "fp32"),
        Operand("written_k", "B H T", "fp32"),
        Operand("kept_state", "M H", "fp32"),
        Operand("dtheta", "B T H S", "fp32", "rotated"),
        Operand("dtheta_k", "B T H S", "fp32", "rotated"),
        Operand("dtheta_sums", "M H S", "fp32", "rotated"),
    ),
    ("T", "H", "G", "n_tiles", "angle_row", "angle_head"),
    _BY_REGISTERS | {"parts": (3, 2)},
)
MAMBA3_CHUNK_STAGES: Final = (
    *(MAMBA3_TURNS, MAMBA3_ROTATE, MAMBA3_STATES, MAMBA3_OUTPUT),
    *(MAMBA3_GATE, MAMBA3_REVERSE_STATES, MAMBA3_GRADIENT),
)
CHUNKS: Final = "chunks"
"""What files call these kernels, which share a tile and are tuned together."""
# Programs to a multiprocessor at least, and of a warp.
_PROGRAMS: Final = 4
_WARP_PROGRAMS: Final = 16
# Bytes of a tile of queries or keys, and of a state, that fit beside what a program makes of them.
_TILE_BYTES: Final = 64 * 128 * 2


def by_chunks(dtype: str) -> bool:
    """Whether these kernels are what a call runs, and not those around the scan of simple_gla.

    In 16 bits they are: they move half the bytes, and hand on no dq and dk that are rounded. In
    fp32 tiles of q, k and a state leave too little of the registers.
    """
    return dtype != "fp32"


def chunk_of(dtype: str, state_size: int) -> int:
    """Tokens of a chunk without tuning: rows of q that take 16 KB."""
    BT = _TILE_BYTES // (DTYPE[dtype].nbytes * covering(state_size))
    return min(max(BT, int(MAMBA3_TOKENS[0])), int(MAMBA3_TOKENS[-1]))


def chunk_problem(stage: PartStage, problem: Mamba3Problem) -> Mamba3Problem:
    """What is compiled into a stage."""
    usual, own = Mamba3Problem(), problem
    if stage in (MAMBA3_TURNS, MAMBA3_ROTATE):
        own = replace(own, head_dim=usual.head_dim)
    if stage is MAMBA3_GATE:
        own = replace(own, state_size=usual.state_size, angles=0, packed=False)
    if stage not in (MAMBA3_ROTATE, MAMBA3_GRADIENT):
        own = replace(own, trap_dtype=usual.trap_dtype)
    if stage not in (MAMBA3_OUTPUT, MAMBA3_GATE):
        own = replace(own, gate=False)
    if stage not in (MAMBA3_OUTPUT, MAMBA3_GRADIENT):
        own = replace(own, skip=False)
    if stage not in (MAMBA3_TURNS, MAMBA3_STATES, MAMBA3_REVERSE_STATES):
        own = replace(own, carried=False)
    if stage not in (MAMBA3_TURNS, MAMBA3_ROTATE, MAMBA3_GRADIENT):
        own = replace(own, angle_dtype=usual.angle_dtype)
    if stage not in (MAMBA3_TURNS, MAMBA3_ROTATE, MAMBA3_GRADIENT):
        # what reads queries and keys that are turned knows of no turn
        own = replace(own, angles=0)
    return own


def chunk_knobs(
    stage: PartStage, problem: Mamba3Problem, tiles: int, H: int, G: int, sms: int
) -> dict[str, Knob]:
    """The knobs for so many chunks, H heads and G groups on `sms` multiprocessors.

    Scans over chunks are as many programs as there are sequences, heads and slices of values. Of
    others those that read angles take as many heads, of a group's or one after another, as leave
    enough programs; those of one head hold fewer registers, so that more of them hide each other's
    waits. They have one warp, or four, since eight compute rows of 64 tokens twice.
    """
    narrow = problem.dtype != "fp32"
    BT, BV = chunk_of(problem.dtype, problem.state_size), min(covering(problem.head_dim), 64)
    knobs: dict[str, Knob] = {"BT": BT, "num_warps": 4}
    if stage in (MAMBA3_STATES, MAMBA3_REVERSE_STATES):
        wide = not narrow or covering(problem.state_size) > 128
        # few programs, whose every chunk waits for the one before: more warps hide more of that
        knobs |= {"num_warps": 8, "maxnreg": 0 if wide else 128}
        return knobs | {"BV": min(BV, 32) if wide else BV}
    if stage is MAMBA3_GATE:
        return knobs | {"BR": 32 if covering(problem.head_dim) > 128 else 64}
    # programs of a warp, and of four
    of_warp = stage in (MAMBA3_TURNS, MAMBA3_ROTATE)
    most, programs = (4, _WARP_PROGRAMS) if of_warp else (8, _PROGRAMS)
    BH = 1
    for heads in _HEADS if of_warp or stage is MAMBA3_GRADIENT else ():
        assert isinstance(heads, int)
        many = heads <= most and tiles * (H // heads) >= programs * sms
        if (H // G) % heads == 0 and many:
            BH = heads
    knobs["BH"] = BH
    if of_warp:
        return knobs | {"num_warps": 1}
    # four programs of the output to a multiprocessor, and three of the gradient for some spills:
    # at 128 registers each of its products is waited for by itself
    fewer = narrow and covering(problem.state_size) <= 128
    knobs |= {"BV": BV if narrow else min(BV, 32), "maxnreg": 0}
    if stage is MAMBA3_OUTPUT:
        return knobs | ({"maxnreg": 128} if fewer else {})
    if narrow and covering(problem.head_dim) > BV and 32 in _tiles_of_channels(problem):
        # of slices of 64 by 32 channels, in a loop, ptxas 12.8 loses addresses (codegen/faults.py)
        knobs |= {"BV": 32}
    # 1.54 ms on an H200, with two programs 1.63 (4 x 4096 tokens, 64 heads)
    return knobs | {"parts": 3} | ({"maxnreg": 168} if fewer else {})


def _tiles_of_channels(problem: Mamba3Problem) -> tuple[int, ...]:
    """Widths of the tiles of what is rotated, and of the rest of a state's channels."""
    turned, rest = 2 * problem.angles, problem.state_size - 2 * problem.angles
    return tuple(covering(x) for x in (turned, rest) if x)
