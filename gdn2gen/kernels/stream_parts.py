"""The stages of a model beside its mixers: the norm of its residual stream, SwiGLU, rotary
positions, attention of one token over a window; and what a layer's sigmoids hand back.

As those of a layer's parts: in no plan, each input read once and each output written once.
"""

from __future__ import annotations

from typing import Final

from gdn2gen.family.parts import (
    ProjectedNormProblem,
    RotaryProblem,
    SigmoidProblem,
    StreamNormProblem,
    SwigluProblem,
    WindowProblem,
)
from gdn2gen.kernels.limits import Domain, Knob
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stage import Form, Operand

_ROWS: Final[Domain] = (1, 2, 4, 8, 16, 32)
_NORMING: Final[dict[str, Domain]] = {
    "BR": (1, 2, 4, 8, 16, 32, 64, 128),
    "early": (0, 1),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1,),
}


def _norm(
    name: str, inputs: tuple[Operand, ...], outputs: tuple[Operand, ...], scalars: tuple[str, ...]
) -> PartStage:
    return PartStage(
        made_for=StreamNormProblem,
        name=name,
        inputs=inputs,
        outputs=outputs,
        scalars=scalars,
        forms=(Form(name, "triton", name, knobs=_NORMING, leads={}, tiles=()),),
        chunks=_ROWS,
    )


_X: Final = Operand("x", "M D", "stream")
_WEIGHT: Final = Operand("weight", "D", "weight")
STREAM_NORM: Final = _norm(
    "stream_norm",
    (_X, Operand("added", "M D", when="added"), _WEIGHT),
    (Operand("total", "M D", "stream", "added"), Operand("y", "M D")),
    ("eps", "M"),
)
STREAM_NORM_BACKWARD: Final = _norm(
    "stream_norm_backward",
    (_X, _WEIGHT, Operand("dy", "M D"), Operand("dtotal", "M D", "stream")),
    (
        Operand("dx", "M D", "stream"),
        Operand("dadded", "M D", when="added"),
        Operand("dweight", "D", "weight"),
        Operand("partial", "P DS", "fp32"),
    ),
    ("eps", "M"),
)


def _swiglu(name: str, inputs: tuple[Operand, ...], outputs: tuple[Operand, ...]) -> PartStage:
    knobs: dict[str, Domain] = {"BE": (256, 512, 1024, 2048), "num_warps": (4,), "num_stages": (1,)}
    return PartStage(
        made_for=SwigluProblem,
        name=name,
        inputs=inputs,
        outputs=outputs,
        scalars=("units",),
        forms=(Form(name, "triton", name, knobs=knobs, leads={}, tiles=()),),
        chunks=(1,),
    )


_GATE: Final = Operand("gate", "E")
_UP: Final = Operand("up", "E")
SWIGLU: Final = _swiglu("swiglu", (_GATE, _UP), (Operand("y", "E"),))
SWIGLU_BACKWARD: Final = _swiglu(
    "swiglu_backward",
    (_GATE, _UP, Operand("dy", "E")),
    (Operand("dgate", "E"), Operand("dup", "E")),
)

SIGMOID_BACKWARD: Final = PartStage(
    made_for=SigmoidProblem,
    name="sigmoid_backward",
    inputs=(Operand("y", "M D"), Operand("dy", "M D")),
    outputs=(Operand("dx", "M D"),),
    scalars=("M", "units", "dx_row"),
    forms=(
        Form(
            "sigmoid_backward",
            "triton",
            "sigmoid_backward",
            knobs={
                "BR": (1, 2, 4, 8, 16),
                "BD": (128, 256, 512),
                "num_warps": (4, 2, 8),
                "num_stages": (1,),
            },
            leads={},
            tiles=(),
        ),
    ),
    chunks=(1,),
)
SIGMOID_KNOBS: Final[dict[str, Knob]] = {"BT": 1, "BR": 8, "BD": 256, "num_warps": 4}
"""A thread takes 16 elements: four loads of 16 bytes are under way at once. Not measured."""

PROJECTED_NORM: Final = PartStage(
    made_for=ProjectedNormProblem,
    name="projected_norm",
    inputs=(
        Operand("x", "M H D"),
        Operand("low", "M R"),
        Operand("proj", "HD R", "weight"),
        Operand("gate_bias", "HD", "weight", "bias"),
        Operand("weight", "D", "weight"),
    ),
    outputs=(Operand("y", "M H D"),),
    scalars=("eps", "M", "H", "low_row"),
    forms=(
        Form(
            "projected_norm",
            "triton",
            "projected_norm",
            knobs={
                "BM": (64, 32, 128),
                "turns": (1, 2, 4, 8),
                "num_warps": (4, 8),
                "num_stages": (1, 2, 3),
                "maxnreg": (0, 128),
            },
            leads={},
            tiles=(),
        ),
    ),
    chunks=(1,),
)
_RUNS: Final[Domain] = (64, 128, 256)
"""Rows of the ring that a program takes."""
WINDOW_STEP: Final = PartStage(
    made_for=WindowProblem,
    name="window_step",
    inputs=(
        *(Operand(name, "B H D") for name in "qkv"),
        *(Operand(name, "B W H D") for name in ("k_ring", "v_ring")),
        Operand("seen", "B", "int64"),
        *(Operand(name, "B D/2", "fp32") for name in ("cos", "sin")),
    ),
    outputs=(
        Operand("o", "B H D"),
        Operand("part_o", "B H S D", "fp32"),
        *(Operand(name, "B H S", "fp32") for name in ("part_m", "part_l")),
    ),
    scalars=("B", "H", "W", "S"),
    forms=(
        Form(
            "window_step",
            "triton",
            "window_step",
            knobs={"BW": (16, 32, 64, 128), "num_warps": (1, 2, 4, 8), "num_stages": (1,)},
            leads={},
            tiles=(),
        ),
    ),
    chunks=_RUNS,
)
WINDOW_KNOBS: Final[dict[str, Knob]] = {"BT": 128, "BW": 64, "num_warps": 4}
"""A window of 2048 rows of 16 heads is 256 programs for one sequence. It does not go by how many
sequences there are, so that these have the same bits beside others. Not measured."""
ROTARY: Final = PartStage(
    made_for=RotaryProblem,
    name="rotary",
    inputs=(
        Operand("x", "M H D"),
        *(Operand(name, "R D/2", "fp32") for name in ("cos", "sin")),
    ),
    outputs=(Operand("y", "M H D"),),
    scalars=("M", "H", "R"),
    forms=(
        Form(
            "rotary",
            "triton",
            "rotary",
            knobs={"BR": (8, 16, 32, 64), "num_warps": (1, 2, 4, 8), "num_stages": (1,)},
            leads={},
            tiles=(),
        ),
    ),
    chunks=(1,),
)
ROTARY_KNOBS: Final[dict[str, Knob]] = {"BT": 1, "BR": 32, "num_warps": 4}
STREAM_STAGES: Final = (
    *(STREAM_NORM, STREAM_NORM_BACKWARD, SWIGLU, SWIGLU_BACKWARD),
    *(ROTARY, WINDOW_STEP, SIGMOID_BACKWARD, PROJECTED_NORM),
)

# Of the norm's backward at most, to a multiprocessor: each leaves a row of partial sums.
_SUMMING_PROGRAMS: Final = 4
SWIGLU_KNOBS: Final[dict[str, Knob]] = {"BT": 1, "BE": 1024, "num_warps": 4}
"""A thread takes 8 elements, 16 bytes in 16 bits, of each tensor."""


def projected_knobs(M: int, H: int, sms: int) -> dict[str, Knob]:
    """The knobs for M tokens of H heads: tiles of 32 tokens take 110 registers by Triton 3.6, so
    that a multiprocessor has room for four programs, with 32 KB of x on their way; as many turns as
    leave so many programs, for each reads its head's projection. Not measured."""
    turns = next((x for x in (8, 4, 2) if -(-M // (32 * x)) * H >= 4 * sms), 1)
    return {"BT": 1, "BM": 32, "turns": turns, "num_warps": 4, "num_stages": 2}


def stream_norm_knobs(
    stage: PartStage, problem: StreamNormProblem, M: int, sms: int
) -> dict[str, Knob]:
    """The knobs for M rows on `sms` multiprocessors: 16 elements of a tile to a thread, and 8 in
    the backward, which holds a tile of three tensors, the next one, and its sums. Not measured."""
    size = covering(problem.size)
    elements = 8 if stage is STREAM_NORM_BACKWARD else 16
    BR = max(1, 1024 // size)
    warps = max(1, min(16, BR * size // (32 * elements)))
    if stage is STREAM_NORM:
        return {"BR": min(BR, 128), "BT": 1, "num_warps": warps, "early": 0}
    fitting = (int(x) for x in _ROWS if -(-M // (BR * int(x))) <= _SUMMING_PROGRAMS * sms)
    BT = next(fitting, int(_ROWS[-1]))
    return {"BR": min(BR, 128), "BT": BT, "num_warps": warps, "early": 1}
