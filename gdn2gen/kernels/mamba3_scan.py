"""Mamba-3's states and outputs in one stage, and where a call runs it instead of two.

The state before a chunk stays in the registers of the program that goes from chunk to chunk: it is
not written to be read again, and neither are keys and values read twice. In Triton its products
want more registers than there are, so that the stage is in TileLang alone; where that cannot run,
or too few programs would, the two stages of `mamba3_chunks` do the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.limits import Limit
from gdn2gen.kernels.mamba3_chunks import MAMBA3_OUTPUT, MAMBA3_STATES
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.stage import Form

_STATES: Final = {x.name: x for x in (*MAMBA3_STATES.inputs, *MAMBA3_STATES.outputs)}
_OUTPUT: Final = {x.name: x for x in (*MAMBA3_OUTPUT.inputs, *MAMBA3_OUTPUT.outputs)}

MAMBA3_SCAN: Final = PartStage(
    made_for=Mamba3Problem,
    name="mamba3_scan",
    inputs=(
        *(_OUTPUT[x] for x in ("q", "k", "V", "within")),
        _STATES["tail_decay"],
        *(_OUTPUT[x] for x in ("weight_s", "own_dt", "D", "Z")),
        _STATES["initial_ssm"],
    ),
    outputs=(
        *(_OUTPUT[x] for x in ("out", "ungated")),
        *(_STATES[x] for x in ("h", "final_ssm")),
    ),
    scalars=("T",),
    count="n_sequences",
    forms=(
        Form(
            "mamba3_scan",
            "tilelang",
            "mamba3_scan",
            # what is left for a backward: nothing, y before its gate, that and states before chunks
            knobs={"keep": (0, 1, 2), "BV": (64,), "num_warps": (4,), "num_stages": (2, 1)},
            leads={},
            limits=(
                Limit("arch", (None, "sm_90"), "it was written for products of that arch's groups"),
                Limit("BT", (64,), "tokens are the 64 rows of a warp group's products"),
                Limit("K", (64, 128), "other sizes of a state were not compiled"),
                Limit("V", (64, 128), "other head dims were not compiled"),
            ),
            tiles=(),
        ),
    ),
    chunks=(64,),
)
# TMA takes rows of numbers that begin at multiples of 16 bytes.
_TOKENS: Final = 4


def scan_problem(problem: Mamba3Problem) -> Mamba3Problem:
    """What is compiled into it: queries and keys come turned, and weights are made."""
    usual = Mamba3Problem()
    return replace(problem, angles=0, trap_dtype=usual.trap_dtype, angle_dtype=usual.angle_dtype)


def scans_at_once(problem: Mamba3Problem, BT: int, T: int, programs: int, sms: int) -> bool:
    """Whether a call is one for this stage: `programs` are its sequences times heads.

    With fewer programs than half of the multiprocessors most of the GPU would wait for them, which
    chunks side by side do not. Predicted, and not measured.
    """
    given = BT == 64 and T > 0 and T % _TOKENS == 0 and not problem.packed
    sizes = problem.state_size in (64, 128) and problem.head_dim in (64, 128)
    return given and sizes and problem.dtype == "bf16" and 2 * programs >= sms
