"""The products of Mamba-3's backward in one stage, and what adds up what it leaves.

As in `mamba3_scan` a program goes from chunk to chunk, the last one first, with the gradient of the
state in its registers: that is not written to be read again, and queries, keys, values and their
gradients' factors are read once instead of two to four times. TileLang alone, and never chosen by
itself: a call runs it where an entry on file says that it is faster (`REVERSE`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.limits import Domain, Knob, Limit
from gdn2gen.kernels.mamba3 import MAMBA3_TOKENS
from gdn2gen.kernels.mamba3_chunks import MAMBA3_GRADIENT, MAMBA3_REVERSE_STATES, chunk_knobs
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.stage import Form, Operand

_STATES: Final = {
    x.name: x for x in (*MAMBA3_REVERSE_STATES.inputs, *MAMBA3_REVERSE_STATES.outputs)
}
_GRADIENT: Final = {x.name: x for x in (*MAMBA3_GRADIENT.inputs, *MAMBA3_GRADIENT.outputs)}
_NUMBERS: Final = ("within", "tail_decay", "weight_s")
# What it leaves for the other stage: of each token and head, and in parts of each chunk.
_LEFT: Final = (
    *(_GRADIENT[x] for x in ("dQ_head", "dK_head", "dtheta")),
    Operand("sums", "B H 5 T", "fp32"),
    # of each value, and of each warp
    Operand("kept_part", "M H P", "fp32"),
    Operand("dtheta_part", "M H 4 S", "fp32", "rotated"),
)

MAMBA3_REVERSE_SCAN: Final = PartStage(
    made_for=Mamba3Problem,
    name="mamba3_reverse_scan",
    inputs=(
        *(_GRADIENT[x] for x in ("q", "k", "V", *_NUMBERS, "own_dt", "D", "dy", "h")),
        _STATES["dfinal_ssm"],
    ),
    outputs=(_GRADIENT["dv"], *_LEFT, _STATES["dinitial_ssm"]),
    scalars=("T",),
    count="n_sequences",
    forms=(
        Form(
            "mamba3_reverse_scan",
            "tilelang",
            "mamba3_reverse_scan",
            # how often pairs are made: with either tokens as rows, or once, in shared memory
            knobs={"pairs": (2, 1), "num_warps": (4,), "num_stages": (1,)},
            leads={},
            limits=(
                Limit("arch", (None, "sm_90"), "it was written for products of that arch's groups"),
                Limit("BT", (64,), "tokens are the 64 rows of a warp group's products"),
                Limit("K", (64, 128), "other sizes of a state were not compiled"),
                Limit("V", (64,), "a program has all values of a head, 64 rows of its products"),
            ),
            tiles=(),
        ),
    ),
    chunks=(64,),
)
# Of `mamba3_sums`: what a program's loop goes over, heads of a chunk, or its tokens with all heads
# of a group at once.
BY_HEADS: Final = "heads"
BY_TOKENS: Final = "tokens"
_COUNTS: Final[Domain] = (1, 2, 4, 8, 16, 32, 64)
MAMBA3_SUMS: Final = PartStage(
    made_for=Mamba3Problem,
    name="mamba3_sums",
    inputs=(
        *(_GRADIENT[x] for x in ("DT", "Trap", *_NUMBERS, "Angles", "theta", "turns")),
        *_LEFT,
        *(_GRADIENT[x] for x in ("dlast_angle", "dlast_turn")),
    ),
    outputs=tuple(
        _GRADIENT[x]
        for x in ("dQ", "dK", "dQ_bias_part", "dK_bias_part", "dADT", "dDT", "dTrap", "dAngles")
    ),
    scalars=("T", "H", "G", "n_tiles", "angle_row", "angle_head"),
    forms=(
        Form(
            BY_HEADS,
            "triton",
            "mamba3_sums",
            knobs={"BG": (1,), "BH": _COUNTS, "num_warps": (4, 2, 8), "num_stages": (1,)},
            leads={},
            tiles=(),
        ),
        Form(
            BY_TOKENS,
            "triton",
            "mamba3_sums_tokens",
            knobs={
                **{"BG": _COUNTS, "BH": _COUNTS},
                **{"num_warps": (8, 4), "num_stages": (3, 1, 2, 4)},
            },
            tiles=(),
        ),
    ),
    selector="order",
    later={"order": BY_HEADS, "BG": 1},
    chunks=MAMBA3_TOKENS,
)

MAMBA3_REVERSE_STAGES: Final = (MAMBA3_REVERSE_SCAN, MAMBA3_SUMS)
REVERSE: Final = "reverse"
"""What files call the two, of an entry where they took less than the stages that they stand for."""
SUMS: Final = MAMBA3_SUMS.name


def reverse_scan_problem(problem: Mamba3Problem) -> Mamba3Problem:
    """What is compiled into it: of angles it knows their number alone."""
    usual = Mamba3Problem()
    return replace(problem, gate=False, trap_dtype=usual.trap_dtype, angle_dtype=usual.angle_dtype)


def sums_problem(problem: Mamba3Problem) -> Mamba3Problem:
    """What is compiled into the other stage."""
    return replace(problem, gate=False, skip=False, carried=False)


def reverse_scans_at_once(problem: Mamba3Problem, BT: int, T: int) -> bool:
    """Whether both can do what is asked for, whatever is the faster."""
    given = BT == 64 and T > 0 and T % 4 == 0 and not problem.packed
    sizes = problem.state_size in (64, 128) and problem.head_dim == 64
    return given and sizes and problem.dtype == "bf16"


def reverse_rule(tokens: int, H: int, G: int, sms: int) -> dict[str, dict[str, Knob]]:
    """The knobs of both without tuning, by stage."""
    scan: dict[str, Knob] = {"BT": 64, "num_warps": 4, "pairs": 2}
    return {
        MAMBA3_REVERSE_SCAN.name: scan,
        MAMBA3_SUMS.name: sums_knobs(64, -(-tokens // 64), H, G, sms),
    }


def sums_knobs(BT: int, tiles: int, H: int, G: int, sms: int) -> dict[str, Knob]:
    """The knobs of `mamba3_sums`: heads of a program as `mamba3_gradient` has them, whose kernels
    for tokens and angles these are."""
    usual = chunk_knobs(MAMBA3_GRADIENT, Mamba3Problem(), tiles, H, G, sms)
    by_heads: dict[str, Knob] = {"order": BY_HEADS, "BG": 1, "num_stages": 1}
    return {"BT": BT, "BH": usual["BH"], "num_warps": 4, **by_heads}


def other_starts(
    rule: Mapping[str, Mapping[str, Knob]], H: int, G: int
) -> dict[str, list[dict[str, Knob]]]:
    """Where searches of both begin beside the rule's knobs: of the scan with pairs made once; of
    the sums with loops over tokens, read as they are needed (0.44 ms on an H200), or two tokens
    ahead in shared memory (0.37; with eight warps 0.41)."""
    scan, sums = rule[MAMBA3_REVERSE_SCAN.name], rule[MAMBA3_SUMS.name]
    by_tokens = {**sums, "order": BY_TOKENS, "BG": H // G, "num_warps": 4, "num_stages": 1}
    ahead: dict[str, Knob] = {**by_tokens, "num_stages": 3}
    # with fewer heads warps have no rows of their own
    many = H // G in _COUNTS[3:]
    return {
        MAMBA3_REVERSE_SCAN.name: [{**scan, "pairs": 1}],
        MAMBA3_SUMS.name: [by_tokens, ahead] if many else [],
    }


def sums_serve(knobs: Mapping[str, Knob], H: int, G: int) -> bool:
    """Whether a kernel with these knobs takes calls of H heads and G groups: one that loops over
    tokens has a lane for each head and no mask."""
    return knobs["order"] != BY_TOKENS or knobs["BG"] == H // G
