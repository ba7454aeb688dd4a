"""The stage of the mode `recurrent`: tokens one after the other, the state in registers.

Each program reads its tile of a state once, carries it in fp32 through the tokens of its sequence,
and writes it once, or after every token where tokens are guessed ahead. All that members differ in
is what they declare: the stage's operands are their inputs, and its template asks what decays,
erases and writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.family.compiled import Compiled
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.family.recurrence import Input
from gdn2gen.family.registry import RECURRENCES, recurrence_named
from gdn2gen.kernels.limits import WIDE, Domain, Knob, Limit, Setting
from gdn2gen.kernels.operands import OUTPUT
from gdn2gen.kernels.rows import is_row_wise, row_of
from gdn2gen.kernels.slices import covering
from gdn2gen.kernels.stage import Form, Operand, Stage

# What operands are where they lie; parameters and indices may be of other dtypes, too.
_DTYPES: Final = {"parameter": "fp32", "index": "int32"}
POOL: Final = Operand("state_pool", "slots HV K V", "state")
INDICES: Final = Operand("ssm_state_indices", "N", "int32")
SPECULATIVE: Final = Operand("ssm_state_indices", "N 1+S", "int32")
ACCEPTED: Final = Operand("num_accepted_tokens", "N", "int32")
FINAL: Final = Operand("final_state", "N HV K V", "state")


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenStage(Stage):
    """A stage over single tokens. Its operands are the inputs of a recurrence, whichever they are;
    then states, and what says where they lie; then outputs."""

    def operands(self, problem: Compiled, extras: Iterable[str] = ()) -> list[Operand]:
        assert isinstance(problem, DecodingProblem)
        given = recurrence_named(problem.op).inputs
        found = [_operand(x) for x in given if not x.when or getattr(problem, x.when)]
        if problem.pool:
            found.append(POOL)
            if problem.indexed:
                found.append(SPECULATIVE if problem.speculative else INDICES)
            if problem.accepted:
                found.append(ACCEPTED)
        found.append(OUTPUT)
        return [*found, FINAL] if problem.final_state else found

    def scalars_of(self, problem: Compiled) -> tuple[str, ...]:
        """The scalars of its kernel, in the order of its arguments: those alone that it reads."""
        assert isinstance(problem, DecodingProblem)
        operands = self.operands(problem)
        symbols = {symbol for x in operands for symbol in x.dims.split()}
        rows = [row_of(x.name) for x in operands if problem.strided and is_row_wise(x.dims)]
        wanted = {
            "scale": not recurrence_named(problem.op).stepped,
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
            "D_row": problem.tied_D,
        }
        return (*(name for name, is_read in wanted.items() if is_read), *rows)


def _operand(x: Input) -> Operand:
    return Operand(x.name, x.dims, _DTYPES.get(x.dtype, x.dtype))


_SCALARS: Final = (
    *("scale", "lower_bound", "N", "T", "H", "HV", "HG"),
    *("slots", "slot_stride", "index_row", "index_width", "null_slot", "D_row"),
)
_ROW_WISE: Final = {
    x.name for member in RECURRENCES.values() for x in member.inputs if is_row_wise(x.dims)
}
_ROWS: Final = tuple(row_of(name) for name in (*sorted(_ROW_WISE), OUTPUT.name))
_BV: Final[Domain] = (8, 16, 32, 64, 128)
_NUM_WARPS: Final[Domain] = (1, 2, 4, 8)
# Tiles of BV values that a program takes one after the other: their loads are under way together.
_TILES: Final[Domain] = (1, 2, 4)
# Where the state's loads stand: behind the branch that leaves at padding, or ahead of it. Behind it
# ptxas spreads them over what is computed, to save registers: of a head's decay in bf16 it waits
# for memory six times one after the other, ahead of it twice.
_LOADS: Final[Domain] = ("behind", "ahead")
# Whether lines of a state are the first to leave the L2.
_EVICT: Final[Domain] = ("usual", "first")
_MAXNREG: Final[Domain] = (0, 128, 168)

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
            knobs={
                "BV": _BV,
                "num_warps": _NUM_WARPS,
                "num_stages": (1,),
                "tiles": _TILES,
                "loads": _LOADS,
                "evict": _EVICT,
                "maxnreg": _MAXNREG,
            },
            defaults=(
                Setting({"BV": 16, "num_warps": 1}),
                Setting({"BV": 8}, {"K": WIDE}),
            ),
            leads={},
            limits=(
                Limit(
                    "loads",
                    _LOADS[:1],
                    "where no index says which slot, nothing is left for padding",
                    {"indexed": (False,)},
                ),
                Limit(
                    "tiles",
                    _TILES[:1],
                    "tiles one after the other share the factors of one token, and its slot",
                    {"one_token": (False,)},
                ),
                Limit(
                    "tiles",
                    _TILES[:1],
                    "of a state that begins with zeros nothing is loaded",
                    {"pool": (False,), "initial_state": (False,)},
                ),
            ),
        ),
    ),
    chunks=(1,),
)

# Elements of a state that a program and a thread of it hold, by the layout: each takes a register,
# and so does what the thread has of the token's factors.
_TILE: Final = {"V first": 2048, "K first": 8192}
_OF_THREAD: Final = {"V first": 64, "K first": 128}
# Programs to a multiprocessor at least, where a batch is small: their loads are what hides how long
# the first of them takes.
_PROGRAMS: Final = 16
# Of rows of values at least, where those lie side by side (K first): two sectors of a cache line.
_ROW_BYTES: Final = 64


def knobs_for(problem: DecodingProblem, sequences: int, heads: int, sms: int) -> dict[str, Knob]:
    """The knobs for so many sequences and value heads on a GPU of `sms` multiprocessors.

    A tile is what one warp holds, so that no sum waits for another one; with K first two have rows
    of 64 values. Where there are less than 16 programs to a multiprocessor it is halved until there
    are, to 8 rows of values or, with K first, to rows of 64 bytes.

    That is what was fastest, or within 4% of it, in a sweep on an H200 of 33 configs for 1 to 256
    sequences of 16 heads of 128: docs/experiments.md.
    """
    order = "V first" if problem.state_v_first else "K first"
    width = covering(problem.K)
    least = 8
    if not problem.state_v_first:
        least = max(least, _ROW_BYTES // DTYPE[problem.dtype_of("state")].nbytes)
    BV = max(least, min(_TILE[order] // width, covering(problem.V), max(map(int, _BV))))
    while least < BV and sequences * heads * -(-problem.V // BV) < _PROGRAMS * sms:
        BV //= 2
    warps = BV * width // (32 * _OF_THREAD[order])
    return {"BV": BV, "num_warps": max(warps, 1)}
