"""The stage of the mode `recurrent`: tokens one after the other, the state in registers.

Each program reads its tile of a state once, carries it in fp32 through the tokens of its sequence,
and writes it once, or after every token where tokens are guessed ahead. All that members differ in
is what they declare: the stage's operands are their inputs, and its template asks what decays,
erases and writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.problem import Problem
from gdn2gen.family.recurrence import Input
from gdn2gen.family.registry import RECURRENCES, recurrence_named
from gdn2gen.kernels.limits import WIDE, Domain, Knob, Setting
from gdn2gen.kernels.operands import OUTPUT
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stage import Form, Operand, Stage

# Distances of rows and slots are given to kernels in as many elements: 16 bytes of bf16, so that
# vector loads know all that they want of an address.
UNIT: Final = 8
# What operands are where they lie; parameters and indices may be of other dtypes, too.
_DTYPES: Final = {"parameter": "fp32", "index": "int32"}
POOL: Final = Operand("state_pool", "slots HV K V", "state")
INDICES: Final = Operand("ssm_state_indices", "N", "int32")
SPECULATIVE: Final = Operand("ssm_state_indices", "N 1+S", "int32")
ACCEPTED: Final = Operand("num_accepted_tokens", "N", "int32")
FINAL: Final = Operand("final_state", "N HV K V", "state")


def row_of(name: str) -> str:
    """The scalar that says how far two tokens of an operand lie apart."""
    return f"{name}_row"


def is_row_wise(dims: str) -> bool:
    """Whether an operand of these dims has a row for each token."""
    return dims.startswith("B T ")


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenStage(Stage):
    """A stage over single tokens. Its operands are the inputs of a recurrence, whichever they are;
    then states, and what says where they lie; then outputs."""

    def operands(self, problem: Problem) -> list[Operand]:
        given = recurrence_named(problem.op).inputs
        found = [_operand(x) for x in given if not x.when or getattr(problem, x.when)]
        if isinstance(problem, DecodingProblem) and problem.pool:
            found.append(POOL)
            if problem.indexed:
                found.append(SPECULATIVE if problem.speculative else INDICES)
            if problem.accepted:
                found.append(ACCEPTED)
        found.append(OUTPUT)
        return [*found, FINAL] if problem.final_state else found

    def scalars_of(self, problem: Problem) -> tuple[str, ...]:
        """The scalars of its kernel, in the order of its arguments: those alone that it reads."""
        assert isinstance(problem, DecodingProblem)
        operands = self.operands(problem)
        symbols = {symbol for x in operands for symbol in x.dims.split()}
        rows = [row_of(x.name) for x in operands if problem.strided and is_row_wise(x.dims)]
        wanted = {
            "scale": True,
            "lower_bound": problem.gate == "sigmoid",
            "N": problem.varlen,
            "T": not problem.one_token,
            "H": True,
            "HV": True,
            "HG": "HG" in symbols,
            "slots": problem.indexed,
            "slot_stride": problem.pool,
            "index_row": problem.indexed,
            "index_width": problem.speculative,
            "null_slot": problem.indexed,
        }
        return (*(name for name, is_read in wanted.items() if is_read), *rows)


def _operand(x: Input) -> Operand:
    return Operand(x.name, x.dims, _DTYPES.get(x.dtype, x.dtype))


_SCALARS: Final = (
    *("scale", "lower_bound", "N", "T", "H", "HV", "HG"),
    *("slots", "slot_stride", "index_row", "index_width", "null_slot"),
)
_ROW_WISE: Final = {
    x.name for member in RECURRENCES.values() for x in member.inputs if is_row_wise(x.dims)
}
_ROWS: Final = tuple(row_of(name) for name in (*sorted(_ROW_WISE), OUTPUT.name))
# Elements of a state that a thread holds, in registers of which each takes one.
_OF_THREAD: Final = 64
_BV: Final[Domain] = (8, 16, 32, 64, 128)
_BK: Final[Domain] = (32, 64, 128)
_NUM_WARPS: Final[Domain] = (1, 2, 4, 8)

RECURRENT: Final = TokenStage(
    name="recurrent",
    inputs=(),
    outputs=(),
    scalars=(*_SCALARS, *_ROWS),
    count="n_sequences",
    forms=(
        Form(
            "recurrent",
            "triton",
            "recurrent",
            knobs={"BV": _BV, "BK": _BK, "num_warps": _NUM_WARPS, "num_stages": (1,)},
            defaults=(
                Setting({"BV": 16, "BK": 32, "num_warps": 1}),
                Setting({"BV": 8, "BK": 64}, {"K": WIDE}),
            ),
            leads={},
        ),
    ),
    chunks=(1,),
)

# Programs to a multiprocessor at least, where a batch is small: their loads are what hides how long
# the first of them takes. On an H200 with 16 heads of 128, 8 rows and 16 take 6.7 and 7.1 us for 8
# sequences (8 programs of 16 rows to a multiprocessor), 37.5 and 37.7 us for 64.
_PROGRAMS: Final = 16
# Of rows of values at least, where those lie side by side (K first): two sectors of a cache line.
_ROW_BYTES: Final = 64


def knobs_for(problem: DecodingProblem, sequences: int, heads: int, sms: int) -> dict[str, Knob]:
    """The knobs for so many sequences and value heads on a GPU of `sms` multiprocessors.

    A tile is what one warp holds at 64 elements a thread, so that no sum waits for another warp;
    where that gives less than 16 programs to a multiprocessor, it is halved until it does, to 8
    rows of values or, with K first, to rows of 64 bytes.
    """
    width = covering(problem.K)
    least = 8
    if not problem.state_v_first:
        least = max(least, _ROW_BYTES // DTYPE[problem.dtype_of("state")].nbytes)
    of_warp = 32 * _OF_THREAD
    BV = max(least, min(of_warp // width, covering(problem.V), max(map(int, _BV))))
    while least < BV and sequences * heads * -(-problem.V // BV) < _PROGRAMS * sms:
        BV //= 2
    return {"BV": BV, "BK": _slice_width(problem), "num_warps": max(1, BV * width // of_warp)}


def _slice_width(problem: DecodingProblem) -> int:
    """Of slices of channels.

    Where rows of channels lie side by side, a warp takes them from several rows of values at once:
    a sum over 32 channels in fp32 is one over 8 threads, of each the products of all slices added
    up before. At K = 128 a token then takes 868 instructions of a warp, not 1,130 as with one slice
    (bf16 states 945, not 1,140), though a thread holds four times the factors; at 256, where those
    would take 128 registers, slices are of 64. With K first a warp has rows of values as it is.
    """
    most = max(map(int, _BK))
    if not problem.state_v_first:
        return min(most, covering(problem.K))
    return 64 if covering(problem.K) > most else 32
