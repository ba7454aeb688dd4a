"""Stage: a kernel's contract, its operands by symbols for their sizes.

Symbols in `dims` (the same as in the templates' glossaries):

    B batch          T tokens of a sequence (all tokens of a packed batch: B = 1)
    H heads of q, k  HV heads of v, w, o     HG heads of g, b (H or HV)
    K, V head dims   N sequences             NT chunks over all sequences, BT tokens each
    NB sub-blocks of a chunk, 16 tokens each
    NS segments of a sequence, of equal length (see `Call.segments`)

Per chunk the workspace holds whole tiles of BT tokens, so only user-facing tensors need masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from gdn2gen.family.gdn2 import GDN2
from gdn2gen.family.problem import Problem

# Chunks of a segment at least: 32 at BT = 32 cost 64 bytes per token and head kept.
SEGMENT: Final = 32
# Segments of all heads and sequences at most, unless the scan's knob says otherwise. Two programs
# each (slices of V) are two to a multiprocessor of an H200: at long32k 8 segments a head instead of
# 32 take the parallel scans from 0.73 and 0.85 ms to 0.59 and 0.70.
MAX_SEGMENTS: Final = 132

DTYPE_BYTES: Final = {"bf16": 2, "fp16": 2, "fp32": 4, "int32": 4}


@dataclass(frozen=True)
class Operand:
    """One tensor of a stage: name in the kernel, dims by symbol, dtype or its role.

    dtype `io` is the problem's dtype, `gate` the dtype of g, `fp32` and `int32` themselves.
    `when` names the condition under which the kernel has this argument (see `has_operand`).
    `scratch` names the knobs' values whose templates need it between their kernels; if it is given,
    the operand is empty for all others.
    """

    name: str
    dims: str
    dtype: str = "io"
    when: str = "always"
    scratch: tuple[str, ...] = ()

    def dtype_in(self, problem: Problem) -> str:
        return {"io": problem.dtype, "gate": problem.gate_dtype}.get(self.dtype, self.dtype)

    def is_idle(self, config: Mapping[str, int | str]) -> bool:
        """Whether a kernel with this config makes no use of it."""
        return bool(self.scratch) and not {*self.scratch} & {*config.values()}

    def nbytes(self, problem: Problem, sizes: dict[str, int]) -> int:
        """Bytes of the whole tensor, for the given value of each symbol in `dims`."""
        elements = prod(sizes[symbol] for symbol in self.dims.split())
        return elements * DTYPE_BYTES[self.dtype_in(problem)]


def has_operand(operand: Operand, problem: Problem) -> bool:
    """Whether the kernels of `problem` take this operand."""
    conditions = {
        "always": True,
        "rounded": problem.dtype != "fp32",
        "l2norm": problem.l2norm,
        "gate": problem.gate != "none",
        "A_log": problem.has_A_log,
        "dt_bias": problem.has_dt_bias,
        "varlen": problem.varlen,
        "initial_state": problem.initial_state,
        "final_state": problem.final_state,
    }
    return conditions[operand.when]


@dataclass(frozen=True)
class Stage:
    """A kernel's contract: what it reads, what it writes, and which template it comes from."""

    name: str
    template: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    scalars: tuple[str, ...]
    products: tuple[str, ...] = ()
    """Matrix products of a chunk and head, each as rows, columns and what is summed over. Scores
    count as one product each, as where one anchor serves a chunk, and so does the inverse."""

    @property
    def count(self) -> str:
        """The scalar that counts its programs, beside heads and slices."""
        return "n_sequences" if self.template in ("scan", "reverse_scan") else "n_chunks"

    def operands(self, problem: Problem) -> list[Operand]:
        """Inputs, then outputs, in the order of the kernel's arguments."""
        return [x for x in (*self.inputs, *self.outputs) if has_operand(x, problem)]

    def nbytes(self, problem: Problem, sizes: dict[str, int]) -> int:
        """Least bytes to move: every operand but scratch, read or written once."""
        return sum(x.nbytes(problem, sizes) for x in self.operands(problem) if not x.scratch)

    def flops(self, sizes: Mapping[str, int]) -> int:
        """Operations of its products, two for each multiplication; scans count as serial ones."""
        chunk = sum(prod(sizes[symbol] for symbol in one.split()) for one in self.products)
        return 2 * chunk * sizes["NT"] * sizes["HV"]


# Inputs in the order of the op's arguments, and their gradients.
GRADIENT_OF: Final = GDN2.gradients
# What a caller gives as cu_seqlens; the kernels read what is made of it.
GIVEN_SEQUENCES: Final = "given_cu_seqlens"
# Made from the cu_seqlens that was given, before the first stage of a forward.
TABLES: Final = (
    Operand("cu_seqlens", "N+1", "int32", "varlen"),
    Operand("chunk_offsets", "N+1", "int32", "varlen"),
    Operand("chunk_table", "NT 2", "int32", "varlen"),
)
_SEQUENCES, _VARLEN = TABLES[:2], TABLES[2:]
_QKGB = (
    Operand("q", "B T H K"),
    Operand("k", "B T H K"),
    Operand("g", "B T HG K", "gate"),
    Operand("b", "B T HG K"),
)
_GATE = (
    Operand("A_log", "HG", "fp32", "A_log"),
    Operand("dt_bias", "HG K", "fp32", "dt_bias"),
)
_VW = (Operand("v", "B T HV V"), Operand("w", "B T HV V"))
_RSTD = (
    Operand("q_rstd", "NT HV BT", "fp32", "l2norm"),
    Operand("k_rstd", "NT HV BT", "fp32", "l2norm"),
)
_SCORES = (Operand("A", "NT HV BT BT"), Operand("Aqk", "NT HV BT BT"))
_FACTORS = (
    Operand("Qg", "NT HV BT K"),
    Operand("Y", "NT HV BT K"),
    Operand("Ktail", "NT HV BT K"),
    Operand("gamma_C", "NT HV K", "fp32"),
)
_GAMMA_B = Operand("gamma_B", "NT HV NB K", "fp32", scratch=("log", "tree"))
_G = Operand("G", "B T HV K", "fp32")
_H = Operand("h", "NT HV V K")
_DH = Operand("dh", "NT HV V K")
_R = Operand("R", "NT HV BT V")
_S_SEG = Operand("S_seg", "N HV NS V K", "fp32")
# Of the parallel scans: from a segment's start to its end; gradients at its end.
_M_SEG = Operand("M_seg", "N HV NS K K", "fp32", scratch=("parallel",))
_DS_SEG = Operand("dS_seg", "N HV NS V K", "fp32", scratch=("parallel",))
_DX = Operand("dX", "NT HV BT V")
# dv and dw are dX times an input, and would show what 16 bits of dX round off.
_DX_REST = Operand("dX_rest", "NT HV BT V", when="rounded")
_DO = Operand("do", "B T HV V")
OUTPUT: Final = Operand("o", "B T HV V")
_SCORE_GRADS = (
    Operand("dT", "NT HV BT BT"),
    Operand("dAqk", "NT HV BT BT"),
    Operand("dAqk_diagonal", "NT HV BT", "fp32"),
)
_DOTS = (
    Operand("q_dot", "NT HV BT", "fp32", "l2norm"),
    Operand("k_dot", "NT HV BT", "fp32", "l2norm"),
)
_INITIAL = (Operand("initial_state", "N HV K V", "fp32", "initial_state"),)
_CHUNKED = ("scale", "lower_bound", "T", "H", "HV", "HG")
_MAKE_Y = "BT K BT"
# R = A w v + Y S, then the state from R; o from the state and from R
_CARRY = ("BT V BT", "BT V K", "K V BT")
_MAKE_O = ("BT V K", "BT V BT")

STAGES: Final = {
    stage.name: stage
    for stage in (
        Stage(
            "prepare",
            "prepare",
            (*_QKGB, *_GATE, *_VARLEN),
            (*_RSTD, *_SCORES, *_FACTORS, _GAMMA_B),
            _CHUNKED,
            ("BT BT K", "BT BT K", "BT BT BT", _MAKE_Y),  # T, Aqk, inverse, Y
        ),
        Stage(
            "reprepare",
            "reprepare",
            (*_QKGB, *_GATE, *_VARLEN, *_RSTD, _SCORES[0]),
            (_G, *_FACTORS),
            _CHUNKED,
            (_MAKE_Y,),
        ),
        Stage("sum_decay", "reprepare", (_QKGB[2], *_GATE, *_VARLEN), (_G,), _CHUNKED),
        Stage(
            "scan",
            "scan",
            (*_VW, *_FACTORS, *_SCORES, *_INITIAL, *_SEQUENCES),
            (
                OUTPUT,
                _S_SEG,
                _M_SEG,
                Operand("final_state", "N HV K V", "fp32", "final_state"),
            ),
            ("T", "HV", "NS", "segment"),
            (*_CARRY, *_MAKE_O),
        ),
        Stage(
            "scan_states",
            "scan",
            (*_VW, *_FACTORS, *_SCORES, *_INITIAL, *_SEQUENCES),
            (
                OUTPUT,
                _H,
                _R,
                replace(_S_SEG, scratch=("parallel",)),
                _M_SEG,
                Operand("final_state", "N HV K V", "fp32", "final_state"),
            ),
            ("T", "HV", "NS", "segment"),
            (*_CARRY, *_MAKE_O),
        ),
        Stage(
            "rescan",
            "scan",
            (*_VW, *_FACTORS[1:], _SCORES[0], _S_SEG, *_SEQUENCES),
            (_H, _R),
            ("T", "HV", "NS", "segment"),
            _CARRY,
        ),
        Stage(
            "reverse_scan",
            "reverse_scan",
            (
                *_FACTORS,
                *_SCORES,
                _DO,
                Operand("dht", "N HV K V", "fp32", "final_state"),
                *_SEQUENCES,
            ),
            (
                _DH,
                _DX,
                _DX_REST,
                _DS_SEG,
                _M_SEG,
                Operand("dh0", "N HV K V", "fp32", "initial_state"),
            ),
            ("T", "HV", "NS", "segment"),
            # dR from dO and from dS; dS from dO and from dR; dX
            ("BT V BT", "BT V K", "K V BT", "K V BT", "BT V BT"),
        ),
        Stage(
            "grad_value",
            "grad_value",
            (
                *_VW,
                _R,
                _DX,
                _DX_REST,
                _DO,
                Operand("o", "B T HV V", when="l2norm"),
                *_VARLEN,
            ),
            (
                *_SCORE_GRADS,
                Operand("dv", "B T HV V"),
                Operand("dw", "B T HV V"),
                *_DOTS,
            ),
            ("T", "HV"),
            ("BT BT V", "BT BT V"),  # dT, dAqk
        ),
        Stage(
            "grad_key",
            "grad_key",
            (
                *_QKGB,
                *_GATE,
                *_RSTD,
                _G,
                _FACTORS[3],
                _H,
                _R,
                _DH,
                _DX,
                *_SCORE_GRADS,
                _DO,
                *_DOTS,
                *_VARLEN,
            ),
            (
                Operand("dq", "B T HV K"),
                Operand("dk", "B T HV K"),
                Operand("dg", "B T HV K", "gate"),
                Operand("db", "B T HV K"),
                Operand("dA_log", "NT HV K", "fp32", "A_log"),
                Operand("ddt_bias", "NT HV K", "fp32", "dt_bias"),
            ),
            _CHUNKED,
            # of the state for q, e and k; of pairs for q, e, and twice for k
            (*("BT K V",) * 3, *("BT K BT",) * 4),
        ),
    )
}
