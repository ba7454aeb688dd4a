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
DECAY: Final = Operand("g", "B T HG K", "gate", of="channel")
QK: Final = (Operand("q", "B T H K"), Operand("k", "B T H K"))
QKGB: Final = (
    *QK,
    DECAY,
    Operand("g", "B T HG", "gate", of="head"),
    Operand("b", "B T HG K", when="b"),
)
BETA: Final = Operand("beta", "B T HV", "factor", "beta")
GATE: Final = (
    Operand("A_log", "HG", "fp32", "A_log"),
    Operand("dt_bias", "HG K", "fp32", "dt_bias", of="channel"),
    Operand("dt_bias", "HG", "fp32", "dt_bias", of="head"),
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
A: Final = Operand("A", "NT HV BT BT", when="erases")
SCORES: Final = (A, Operand("Aqk", "NT HV BT BT"))
GAMMA_C: Final = Operand("gamma_C", "NT HV K", "fp32", of="channel")
FACTORS: Final = (
    Operand("Qg", "NT HV BT K", of="channel"),
    Operand("Y", "NT HV BT K", when="erases", of="channel"),
    Operand("Ktail", "NT HV BT K", of="channel"),
    GAMMA_C,
)
G: Final = Operand("G", "B T HV K", "fp32", of="channel")
# Where the decay is outside of products over channels, scans read q and k themselves, and numbers a
# token that make the same of them.
Q_HEAD: Final = Operand("q_head", "NT HV BT", "fp32", of="outside")
HEAD_FACTORS: Final = (
    Operand("k_head", "NT HV BT", "fp32", "erases", of="outside"),
    Operand("k_tail", "NT HV BT", "fp32", of="outside"),
    Operand("gamma_C", "NT HV", "fp32", of="head"),
)
LOG_DECAY: Final = Operand("log_decay", "NT HV BT", "fp32", of="head")
OUTSIDE_QK: Final = tuple(replace(x, of="outside") for x in QK)

# From the scans on
H: Final = Operand("h", "NT HV V K")
R: Final = Operand("R", "NT HV BT V", when="erases")
DH: Final = Operand("dh", "NT HV V K")
DV: Final = Operand("dv", "B T HV V", when="erases")
# When values are written as they are: nothing is erased, so that R is v, and dX is dv.
ONLY_WRITES: Final = "only writes"
DX: Final = Operand("dX", "NT HV BT V", when="erases")
# dv and dw are dX times an input, and would show what 16 bits of dX round off.
DX_REST: Final = replace(DX, name="dX_rest", when="w, rounded")
S_SEG: Final = Operand("S_seg", "N HV NS V K", "fp32")
# States on the way, where each goes to a slot of its own: who checkpoints keeps no segments'.
CHECKPOINTS: Final = (
    Operand("checkpoint_slots", "N NC", "int32", "checkpoints"),
    Operand("checkpoints", "slots HV K V", "checkpoint", "checkpoints"),
)
