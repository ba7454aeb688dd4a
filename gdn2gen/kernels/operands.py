"""Operands that stages share: the op's inputs, and what one stage hands to the next."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.kernels.stage import Operand

# What a caller gives as cu_seqlens; the kernels read what is made of it.
GIVEN_SEQUENCES: Final = "given_cu_seqlens"
# Made from the cu_seqlens that was given, before the first stage of a forward.
TABLES: Final = (
    Operand("cu_seqlens", "N+1", "int32", "varlen"),
    Operand("chunk_offsets", "N+1", "int32", "varlen"),
    Operand("chunk_table", "NT 2", "int32", "varlen"),
)
SEQUENCES, CHUNK_TABLE = TABLES[:2], TABLES[2:]

# Inputs, and parameters of the gate
DECAY: Final = Operand("g", "B T HG K", "gate")
QKGB: Final = (
    Operand("q", "B T H K"),
    Operand("k", "B T H K"),
    DECAY,
    Operand("b", "B T HG K", when="b"),
)
BETA: Final = Operand("beta", "B T HV", "factor", "beta")
GATE: Final = (
    Operand("A_log", "HG", "fp32", "A_log"),
    Operand("dt_bias", "HG K", "fp32", "dt_bias"),
)
VW: Final = (Operand("v", "B T HV V"), Operand("w", "B T HV V", when="w"))
INITIAL: Final = (Operand("initial_state", "N HV K V", "fp32", "initial_state"),)
OUTPUT: Final = Operand("o", "B T HV V")
DO: Final = Operand("do", "B T HV V")

CHUNK_SCALARS: Final = ("scale", "lower_bound", "T", "H", "HV", "HG")

# From prepare on
RSTD: Final = (
    Operand("q_rstd", "NT HV BT", "fp32", "l2norm"),
    Operand("k_rstd", "NT HV BT", "fp32", "l2norm"),
)
K_BETA: Final = Operand("k_beta", "NT HV BT", "fp32", "beta")
A: Final = Operand("A", "NT HV BT BT")
SCORES: Final = (A, Operand("Aqk", "NT HV BT BT"))
GAMMA_C: Final = Operand("gamma_C", "NT HV K", "fp32")
FACTORS: Final = (
    Operand("Qg", "NT HV BT K"),
    Operand("Y", "NT HV BT K"),
    Operand("Ktail", "NT HV BT K"),
    GAMMA_C,
)
G: Final = Operand("G", "B T HV K", "fp32")

# From the scans on
H: Final = Operand("h", "NT HV V K")
R: Final = Operand("R", "NT HV BT V")
DH: Final = Operand("dh", "NT HV V K")
DX: Final = Operand("dX", "NT HV BT V")
# dv and dw are dX times an input, and would show what 16 bits of dX round off.
DX_REST: Final = replace(DX, name="dX_rest", when="w, rounded")
S_SEG: Final = Operand("S_seg", "N HV NS V K", "fp32")
