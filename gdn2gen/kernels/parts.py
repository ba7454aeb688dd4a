"""The stages of a layer's parts: short convolutions with SiLU, the gated RMSNorm, a decay's gate.

They are in no plan. Bytes are their floor, so each reads its inputs once and writes its outputs
once, in vectors of 16 bytes; gradients of parameters are partial sums, one row a program, which a
second kernel adds up in a fixed order. Programs take BT tokens (rows) one after another, and
several such runs side by side: a warp each, so that no sum but that of a norm crosses lanes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from gdn2gen.family.compiled import Compiled
from gdn2gen.family.parts import ConvolutionProblem, DecayGateProblem, NormProblem, PartProblem
from gdn2gen.kernels.extras import can_depend
from gdn2gen.kernels.limits import Domain, Knob
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stage import Form, Operand, Stage


@dataclass(frozen=True, eq=False, kw_only=True)
class PartStage(Stage):
    """A stage of a layer's part. Operands with channels D of their own are there once for each of
    the tensors that a convolution takes; `when` is a flag of the problem."""

    made_for: type[PartProblem]

    def operands(self, problem: Compiled, extras: Iterable[str] = ()) -> list[Operand]:
        assert isinstance(problem, PartProblem)
        found = []
        for x in (*self.inputs, *self.outputs):
            if x.when == "always" or getattr(problem, x.when):
                of_each = "D" in x.dims.split()
                found += [replace(x, name=x.name + n) for n in suffixes(problem, of_each)]
        return found

    def scalars_of(self, problem: Compiled) -> tuple[str, ...]:
        assert isinstance(problem, PartProblem)
        found = []
        for name in self.scalars:
            if name in _PACKED and not problem.varlen:
                continue
            if name in _BOUNDED and getattr(problem, "gate", None) != "sigmoid":
                continue
            found += [f"{name}{n}" for n in suffixes(problem, name in _OF_EACH)]
        return tuple(found)


def suffixes(problem: PartProblem, of_each: bool = True) -> list[str]:
    """What ends the names of what there is for each tensor: its number, if there are several."""
    tensors = problem.tensors if isinstance(problem, ConvolutionProblem) else 1
    return [str(i) for i in range(tensors)] if of_each and tensors > 1 else [""]


# Scalars of each tensor, of packed sequences alone, and of gates with a lower bound.
_OF_EACH: Final = ("units", "x_row", "dx_row")
_PACKED: Final = ("bits",)
_BOUNDED: Final = ("lower_bound",)

_X: Final = Operand("x", "B T D")
_WEIGHT: Final = Operand("weight", "D W", "weight")
_BIAS: Final = Operand("bias", "D", "weight", "bias")
_INITIAL: Final = Operand("initial_tail", "N W-1 D", when="initial_tail")
# Of packed sequences: where each token stands. Made by the forward.
_PLACES: Final = (
    Operand("place", "T", "int32", "varlen"),
    Operand("sequence", "T", "int32", "varlen"),
)
_SEQUENCES: Final = Operand("cu_seqlens", "N+1", "int32", "varlen")
_PARTIAL: Final = Operand("partial", "P W+1 DS", "fp32")

_TOKENS: Final[Domain] = (16, 32, 64, 128, 256)
# What runs may be: those, and any other that makes them as many as run at once.
_RUNS: Final[Domain] = tuple(range(16, 505, 8))
_CONVOLVING: Final[dict[str, Domain]] = {
    "BR": (1, 2, 4, 8),
    "BD": (64, 128, 256, 512),
    "ahead": (1, 2, 4, 8, 16),
    "early": (0, 1),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1,),
}

# Of all but steps: tokens leave the L2 before what the kernel writes.
_READING: Final[dict[str, Domain]] = {"read_once": (0, 1)}
# Of the backwards: tokens in 16 bits read as words of two channels, with fewer instructions to a
# gradient; and the kernel that adds up partial sums launched while what leaves them still runs.
_SUMMING: Final[dict[str, Domain]] = {"words": (0, 1), "overlap": (0, 1)}
# Of these, too: with words, and no loads a turn ahead into registers, turns on their way through
# shared memory; of the convolutions one run to a program, which is not packed.
_STAGED: Final[dict[str, Domain]] = {"num_stages": (1, 3, 4, 5)}


def _convolution(
    name: str,
    inputs: tuple[Operand, ...],
    outputs: tuple[Operand, ...],
    scalars: tuple[str, ...],
    knobs: dict[str, Domain] = _CONVOLVING,
) -> PartStage:
    return PartStage(
        made_for=ConvolutionProblem,
        name=name,
        inputs=inputs,
        outputs=outputs,
        scalars=scalars,
        forms=(Form(name, "triton", name, knobs=knobs, leads={}, tiles=()),),
        chunks=(1,) if name.endswith("step") else _RUNS,
    )


SHORT_CONV: Final = _convolution(
    "short_conv",
    (_X, _WEIGHT, _BIAS, _INITIAL, _SEQUENCES),
    (
        Operand("y", "B T D"),
        Operand("final_tail", "N W-1 D", when="final_tail"),
        *_PLACES,
    ),
    ("B", "T", "N", "bits", "units", "x_row"),
    _CONVOLVING | _READING,
)
SHORT_CONV_STEP: Final = _convolution(
    "short_conv_step",
    (_X, _WEIGHT, _BIAS, Operand("tail", "N W-1 D")),
    (Operand("y", "B T D"),),
    ("N", "units", "x_row"),
)
SHORT_CONV_BACKWARD: Final = _convolution(
    "short_conv_backward",
    (_X, _WEIGHT, _BIAS, _INITIAL, *_PLACES, Operand("dy", "B T D")),
    (
        Operand("dx", "B T D"),
        Operand("dweight", "D W", "weight"),
        Operand("dbias", "D", "weight", "bias"),
        _PARTIAL,
    ),
    ("B", "T", "units", "x_row", "dx_row"),
    _CONVOLVING
    | _READING
    | _SUMMING
    | _STAGED
    | {"maxnreg": (0, 96, 104, 112, 128), "prefetch": (0, 1, 2, 4)},
)

_ROWS: Final[Domain] = (1, 2, 4, 8, 16, 32)
_NORMING: Final[dict[str, Domain]] = {
    "BR": (1, 2, 4, 8, 16, 32, 64, 128),
    "early": (0, 1),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1,),
    **_READING,
}


def _norm(
    name: str,
    inputs: tuple[Operand, ...],
    outputs: tuple[Operand, ...],
    scalars: tuple[str, ...],
    knobs: dict[str, Domain] = _NORMING,
) -> PartStage:
    return PartStage(
        made_for=NormProblem,
        name=name,
        inputs=inputs,
        outputs=outputs,
        scalars=scalars,
        forms=(Form(name, "triton", name, knobs=knobs, leads={}, tiles=()),),
        chunks=tuple(range(1, 129)),
    )


_ROW_X: Final = Operand("x", "M D")
_ROW_GATE: Final = Operand("gate", "M D")
_ROW_WEIGHT: Final = Operand("weight", "D", "weight")
GATED_NORM: Final = _norm(
    "gated_norm",
    (_ROW_X, _ROW_GATE, _ROW_WEIGHT),
    (Operand("y", "M D"),),
    ("eps", "M"),
)
GATED_NORM_BACKWARD: Final = _norm(
    "gated_norm_backward",
    (_ROW_X, _ROW_GATE, _ROW_WEIGHT, Operand("dy", "M D")),
    (
        Operand("dx", "M D"),
        Operand("dgate", "M D"),
        Operand("dweight", "D", "weight"),
        Operand("partial", "P DS", "fp32"),
    ),
    ("eps", "M"),
    _NORMING | _SUMMING | _STAGED | {"spread": (0, 1)},
)
_GATING: Final[dict[str, Domain]] = {
    "BD": (128, 64, 256, 512),
    "BR": (4, 1, 2, 8),
    "ahead": (4, 1, 2, 8),
    "num_warps": (4, 1, 2, 8),
    "num_stages": (1,),
}


def _decay_gate(
    name: str,
    inputs: tuple[Operand, ...],
    outputs: tuple[Operand, ...],
    scalars: tuple[str, ...],
    knobs: dict[str, Domain] = _GATING,
) -> PartStage:
    return PartStage(
        made_for=DecayGateProblem,
        name=name,
        inputs=inputs,
        outputs=outputs,
        scalars=scalars,
        forms=(Form(name, "triton", name, knobs=knobs, leads={}, tiles=()),),
        # how many tokens a program takes is a scalar: the same kernel at all lengths
        chunks=(1,),
    )


# x [M, D]: tokens, and the channels of all heads.
_OF_GATE: Final = (
    Operand("x", "M D"),
    Operand("A_log", "HG", "fp32"),
    Operand("dt_bias", "D", "fp32"),
)
DECAY_GATE: Final = _decay_gate(
    "decay_gate",
    _OF_GATE,
    (Operand("g", "M D", "fp32"),),
    ("lower_bound", "M", "units"),
)
DECAY_GATE_BACKWARD: Final = _decay_gate(
    "decay_gate_backward",
    (*_OF_GATE, Operand("dg", "M D", "fp32")),
    (
        Operand("dx", "M D"),
        Operand("dA_log", "HG", "fp32"),
        Operand("ddt_bias", "D", "fp32"),
        Operand("partial", "P 2 DS", "fp32"),
    ),
    ("lower_bound", "M", "units", "turns"),
)
PART_STAGES: Final = (
    *(SHORT_CONV, SHORT_CONV_STEP, SHORT_CONV_BACKWARD),
    *(GATED_NORM, GATED_NORM_BACKWARD),
    *(DECAY_GATE, DECAY_GATE_BACKWARD),
)

# Programs to a multiprocessor at least, so that the last ones do not run alone; they share it with
# three others, or with five.
_PROGRAMS: Final = {"short_conv": 16, "short_conv_backward": 8}
# Of the gated norm's backward at most: each leaves a row of partial sums.
_SUMMING_PROGRAMS: Final = 4
# Of the backward of a decay's gate at most: two rounds of the seven that have room (66 registers).
_GATING_PROGRAMS: Final = 14
_CHANNELS: Final = 128


def convolution_knobs(
    stage: PartStage, problem: ConvolutionProblem, rows: int, T: int, channels: int, sms: int
) -> dict[str, Knob]:
    """The knobs for `rows` rows of T tokens of so many channels in all, on `sms` multiprocessors.

    A lane takes 8 bytes of a token in 16 bits, so that a multiprocessor has room for 24 warps of
    the forward and 16 of the backward (of 16 bytes 16, and 8). The forward's runs of 16 tokens are
    loaded whole: 0.104 ms of three times 2048 channels of 4 x 4096 tokens on an H200, 0.113 where
    runs of 64 load 8 tokens a turn before they compute. So do the backward, 4 tokens of x and dy,
    and packed sequences, whose places take registers (not measured): with runs as long as leaves
    enough programs, for each reads the tokens before it once more, and in the backward those after
    it. Of 16 bits, read as words, these have runs with which programs fill whole rounds: 0.162 ms
    in one of runs of 376, 0.169 in 2.9 of 128.
    """
    BD = max(64, min(_CHANNELS, covering(channels)))
    knobs: dict[str, Knob] = {"BD": BD, "BR": 4, "num_warps": 4}
    if stage is SHORT_CONV_STEP:
        return knobs | {"BT": 1, "BR": 4 if rows > 1 else 1, "ahead": 1, "early": 0}
    if stage is SHORT_CONV and not problem.packed:
        return knobs | {"BT": 16, "ahead": 16, "early": 0}
    for BT in reversed(_TOKENS):
        assert isinstance(BT, int)
        programs = -(-rows * -(-T // BT) // 4) * -(-channels // BD)
        if programs >= _PROGRAMS[stage.name] * sms:
            break
    if stage is SHORT_CONV_BACKWARD and problem.dtype != "fp32" and not problem.packed:
        knobs |= {"BR": 2, "num_warps": 2, "maxnreg": 128, "words": 1}
        most = _PROGRAMS[stage.name] * sms
        BT = _whole_rounds(rows, T, 2, -(-channels // BD), most) or BT
    ahead = 8 if stage is SHORT_CONV else 2 if problem.packed else 4
    return knobs | {"BT": BT, "ahead": ahead, "early": 1}


def _whole_rounds(rows: int, T: int, BR: int, tiles: int, most: int) -> int | None:
    """The shortest runs of which programs, BR of them in each, fill no more than a whole number of
    rounds of `most`; None where runs of 128 tokens do not fill one, or none here are so long."""
    for rounds in (1, 2, 3, 4):
        for BT in (int(x) for x in _RUNS if int(x) >= 128):
            if -(-rows * -(-T // BT) // BR) * tiles <= rounds * most:
                return BT if BT > 128 or rounds > 1 else None
    return None


def norm_knobs(
    stage: PartStage, problem: NormProblem, M: int, sms: int, arch: str
) -> dict[str, Knob]:
    """The knobs for M rows on `sms` multiprocessors: a thread has 8 elements of a tile, or 16 in
    the backward, whose programs are few and load a tile before they need it. On an H200 262,144
    rows of 128 take 0.053 ms, and 0.091 backward (0.098 without words, with tiles of a turn far
    apart and sums launched after all else; 0.0906 by 8 rows and two warps, 0.0911 by twice both).
    """
    backward, size = stage is GATED_NORM_BACKWARD, covering(problem.size)
    BR = max(1, 1024 // size)
    if not backward:
        return {"BR": min(BR, 128), "BT": 1, "num_warps": 4, "early": 0}
    fitting = (int(x) for x in _ROWS if -(-M // (BR * int(x))) <= _SUMMING_PROGRAMS * sms)
    BT = next(fitting, int(_ROWS[-1]))
    warps = max(2, min(8, BR * size // 512))
    usual: dict[str, Knob] = {"BR": min(BR, 128), "BT": BT, "num_warps": warps, "early": 1}
    return usual | {"words": 1, "spread": 1, "overlap": int(can_depend(arch))}


def decay_gate_knobs(stage: PartStage) -> dict[str, Knob]:
    """The same at all sizes, so that what is compiled ahead serves them all: a lane has 4 channels
    of each of `ahead` tokens, which are 8 bytes of x in 16 bits and 16 of g, and all that a turn
    reads is under way at once. Not measured yet: of the backward 2 tokens are as many bytes as 4 of
    the forward with room for more warps.
    """
    ahead = 2 if stage is DECAY_GATE_BACKWARD else 4
    return {"BT": 1, "BD": 128, "BR": 4, "num_warps": 4, "ahead": ahead}


def decay_gate_turns(rows: int, M: int, channels: int, BD: int, sms: int) -> int:
    """Turns of `rows` tokens that a program of the backward takes, so that there are at most
    `_GATING_PROGRAMS` to a multiprocessor: each leaves two rows of partial sums."""
    blocks = -(-channels // BD)
    most = max(1, _GATING_PROGRAMS * sms // blocks)
    return max(1, -(-M // (rows * most)))


def partial_rows(config_BT: int, BR: int, rows: int, T: int) -> int:
    """Rows of partial sums: as many as programs that take the same channels."""
    return -(-rows * -(-T // config_BT) // BR)
