"""Stages that go from chunk to chunk: scan, scan_states, rescan and reverse_scan."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.family.registry import CHANNEL_OPS, OUTSIDE_OPS
from gdn2gen.kernels.languages import AMPERE
from gdn2gen.kernels.limits import FP32, WIDE, Limit, Setting, Where
from gdn2gen.kernels.operands import (
    CHECKPOINTS,
    DH,
    DO,
    DV,
    DX,
    DX_REST,
    FACTORS,
    HEAD_FACTORS,
    INITIAL,
    K_BETA,
    ONLY_WRITES,
    OUTPUT,
    OUTSIDE_QK,
    Q_HEAD,
    S_SEG,
    SCORES,
    SEQUENCES,
    VW,
    A,
    H,
    R,
)
from gdn2gen.kernels.stage import TILES, Form, Operand, Product, Stage, erasing

# Chunks of a segment at least: 32 at BT = 32 cost 64 bytes per token and head kept.
SEGMENT: Final = 32
# Segments of all heads and sequences at most, unless the scan's knob says otherwise. Two programs
# each (slices of V) are two to a multiprocessor of an H200: at long32k 8 segments a head instead of
# 32 take the parallel scans from 0.73 and 0.85 ms to 0.59 and 0.70.
MAX_SEGMENTS: Final = 132

# Of few heads, segments of half as many chunks: at few8k a scan is a chain of 16 instead of 32.
SHORT_SEGMENTS: Final = 2 * MAX_SEGMENTS

_SCALARS: Final = ("T", "HV", "NS", "segment")
# Columns of checkpoint_slots, which segment the first is of, and how far slots lie apart.
CHECKPOINT_SCALARS: Final = ("NC", "first_checkpoint", "slot_stride")
_FINAL: Final = Operand("final_state", "N HV K V", "fp32", "final_state")
# Of the parallel forms: from a segment's start to its end; gradients at its end.
_M_SEG: Final = Operand("M_seg", "N HV NS K K", "fp32", scratch=True)
_DS_SEG: Final = Operand("dS_seg", "N HV NS V K", "fp32", scratch=True)
# Where scans read q and k themselves.
_DIRECT: Final = (*OUTSIDE_QK, Q_HEAD, *HEAD_FACTORS)
# R = A w v + Y S, then the state from R; o from the state and from R
_CARRY: Final[tuple[str | Product, ...]] = (*erasing("BT V BT", "BT V K"), "K V BT")
_MAKE_O: Final = ("BT V K", "BT V BT")

# One chain per sequence. Measured on an H200 at train4k, then kept small enough for GPUs with 99 KB
# of shared memory: at BT = 64 the scans alone need 114 KB.
_SERIAL: Final = Form(
    "serial",
    "triton",
    "scan",
    knobs={"BV": (16, 32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4)},
    defaults=(
        Setting({"BV": 64, "num_warps": 4, "num_stages": 2}),
        # Where products of 64 rows go to tensor memory, Triton 3.6 to 3.8 spill up to 888 bytes a
        # thread in the loops (3.9: 56); with 32 rows none of them more than 16.
        Setting({"BV": 32}, {"arch": ("sm_100", "sm_101", "sm_103")}),
        # The state of 64 rows takes all registers: it would spill 136 to 264 bytes a thread.
        Setting({"BV": 32}, {"K": WIDE}),
        # Products take three passes, and their operands the registers: 32 rows spill.
        Setting({"BV": 16, "num_stages": 1}, FP32),
    ),
    leads={},
)
# Where scans load a number a token, of chunks whose rows of them are short.
_SHORT_ROWS: Final[Where] = {"BT": (16,), "op": OUTSIDE_OPS}
# A warp group has 64 rows of the state, and a program may be of two.
_TWO_GROUPS: Final = (
    Limit("BV", (64,), "128 rows were compiled for sm_90 alone", {"arch": AMPERE}),
    Limit("BV", (64,), "two warp groups want loads ahead of both", {"BT": (16, 64)}),
)
# Of more than 128 channels a warp group takes so many registers that no other program shares its
# multiprocessor: train4k's 256 programs at K = V = 256, or 192 at 160 and at 192, are two waves on
# the 132 of an H200. Those of two warp groups are 128, and one wave; a chunk's factors, of which
# they come from the L2 half as often, are 0.9 GB there at 256 instead of 1.8.
_IN_ORDER: Final = (
    Limit("BV", (64,), "half as many programs were slower", {"K": range(1, 128 + 1)}),
    Limit("BV", (64,), "128 would spill 528 bytes a thread and more", {"op": OUTSIDE_OPS}),
)
_WIDE_ROWS: Final = Setting({"BV": 128}, {"K": WIDE, "BT": (32,), "op": CHANNEL_OPS})
_SERIAL_TILELANG: Final = Form(
    "serial",
    "tilelang",
    "scan",
    knobs={"BV": (64, 128), "num_warps": (4,), "num_stages": (1, 2, 3, 4)},
    defaults=(
        Setting({"num_stages": 3}),
        # a search begins there, and with what is on file: 64 rows
        _WIDE_ROWS,
        # three of scan_states take 228 KB
        Setting({"num_stages": 2}, {"K": (256,)}),
        Setting({"num_stages": 1}, {"K": WIDE, "BT": (64,)}),
        Setting({"num_stages": 1}, _SHORT_ROWS),
    ),
    limits=(
        # "misaligned address" on an H200: TMA writes to multiples of 128 bytes
        Limit(
            "num_stages",
            (1,),
            "a chunk's factors are 64 bytes there: of several stages, every second is off",
            _SHORT_ROWS,
        ),
        *_TWO_GROUPS,
        *_IN_ORDER,
    ),
)
_SERIAL_FORMS: Final = (_SERIAL, _SERIAL_TILELANG)
# Of segments two warp groups share what a chunk's products read: of values and transition 53 KB a
# chunk come from the L2 where programs of 64 rows take 90, and backwards 61 for 114.
_NOT_128: Final = (*range(1, 128), *range(128 + 1, 512 + 1))
_ALONE: Final = "two warp groups take 128 rows of values, and 128 of the transition"
_SIDE_BY_SIDE: Final = tuple(Limit("BV", (64,), _ALONE, {dim: _NOT_128}) for dim in ("K", "V"))
_WIDE_START: Final = Setting({"BV": 128}, {"K": (128,), "V": (128,), "BT": (32,)})


def least_chunks(segment: int, max_segments: int) -> int:
    """Chunks of a segment at least, which `segment` says of up to MAX_SEGMENTS of them."""
    if max_segments <= MAX_SEGMENTS:
        return segment
    return max(1, segment * MAX_SEGMENTS // max_segments)


NO_CHECKPOINTS: Final = Limit(
    "checkpoints", ("",), "only the serial scan in Triton keeps states on the way"
)


def _with_segments(serial: Form) -> tuple[Form, Form]:
    """The form, and beside it its parallel one: every segment's transition first, then all at once.

    They share knobs, so that configs of either have the same.
    """
    segments = Limit("max_segments", (MAX_SEGMENTS,), "only the parallel scans have segments")
    one = replace(
        serial,
        knobs={**serial.knobs, "max_segments": (64, 80, 112, MAX_SEGMENTS, SHORT_SEGMENTS)},
        defaults=(*serial.defaults, Setting({"max_segments": MAX_SEGMENTS})),
        limits=(
            *serial.limits,
            segments,
            *(() if serial.language == "triton" else (NO_CHECKPOINTS,)),
        ),
    )
    groups = serial.language == "tilelang"
    parallel = replace(
        one,
        name="parallel",
        template=f"{serial.template}_parallel",
        leads=None,
        # likewise
        defaults=(
            *(x for x in one.defaults if x is not _WIDE_ROWS),
            *((_WIDE_START,) if groups else ()),
        ),
        limits=(
            *(x for x in serial.limits if x not in _IN_ORDER),
            *(_SIDE_BY_SIDE if groups else ()),
            Limit("varlen", (False,), "packed sequences are one segment each"),
            NO_CHECKPOINTS,
        ),
        # BV are also rows of the transition
        tiles=(*TILES, ("BV", "K")),
        scratch=("S_seg", "M_seg", "dS_seg"),
    )
    return one, parallel


def _forms(*serial: Form, template: str = "scan", ahead: tuple[Operand, ...]) -> tuple[Form, ...]:
    """Both forms of each, those of a language together."""
    given = (replace(x, template=template, ahead=ahead) for x in serial)
    return tuple(form for x in given for form in _with_segments(x))


_QUERIES: Final = tuple(replace(x, dims="BT K") for x in (FACTORS[0], OUTSIDE_QK[0]))
_KEYS: Final = tuple(replace(x, dims="BT K") for x in (*FACTORS[1:3], OUTSIDE_QK[1]))
_INVERSE, _SCORES = (replace(x, dims="BT BT") for x in SCORES)
_AHEAD: Final = (*_QUERIES, *_KEYS, _INVERSE, _SCORES)
_FORMS: Final = _forms(*_SERIAL_FORMS, ahead=_AHEAD)

# What `reach` has fold know of steps beside their decay: whether they make a state longer.
_STEPS: Final = replace(K_BETA, of="head", extra="reach")

SCAN: Final = Stage(
    name="scan",
    inputs=(*VW, *FACTORS, *_DIRECT, *SCORES, _STEPS, *INITIAL, *SEQUENCES, *CHECKPOINTS),
    outputs=(OUTPUT, replace(S_SEG, when="segments"), _M_SEG, _FINAL),
    scalars=_SCALARS,
    outside_scalars=("H",),
    checkpoint_scalars=CHECKPOINT_SCALARS,
    count="n_sequences",
    products=(*_CARRY, *_MAKE_O),
    selector="segments",
    forms=_FORMS,
    later={"max_segments": MAX_SEGMENTS},
)

SCAN_STATES: Final = Stage(
    name="scan_states",
    inputs=SCAN.inputs,
    outputs=(OUTPUT, H, R, replace(S_SEG, scratch=True), _M_SEG, _FINAL),
    scalars=_SCALARS,
    outside_scalars=("H",),
    count="n_sequences",
    products=SCAN.products,
    selector="segments",
    forms=_FORMS,
)

RESCAN: Final = Stage(
    name="rescan",
    inputs=(*VW, *FACTORS[1:], OUTSIDE_QK[1], *HEAD_FACTORS, A, S_SEG, *SEQUENCES),
    outputs=(H, R),
    scalars=_SCALARS,
    outside_scalars=("H",),
    count="n_sequences",
    products=_CARRY,
    forms=tuple(replace(x, ahead=(*_KEYS, _INVERSE)) for x in _SERIAL_FORMS),
)

REVERSE_SCAN: Final = Stage(
    name="reverse_scan",
    inputs=(
        *FACTORS,
        *_DIRECT,
        *SCORES,
        _STEPS,
        DO,
        Operand("dht", "N HV K V", "fp32", "final_state"),
        *SEQUENCES,
    ),
    outputs=(
        DH,
        DX,
        DX_REST,
        replace(DV, when=ONLY_WRITES),
        _DS_SEG,
        _M_SEG,
        Operand("dh0", "N HV K V", "fp32", "initial_state"),
    ),
    scalars=_SCALARS,
    outside_scalars=("H",),
    count="n_sequences",
    # dR from dO and from dS; dS from dO and from dR; dX
    products=("BT V BT", "BT V K", "K V BT", *erasing("K V BT", "BT V BT")),
    selector="segments",
    forms=_forms(*_SERIAL_FORMS, template="reverse_scan", ahead=(*_AHEAD, Operand("do", "BT BV"))),
    later={"max_segments": MAX_SEGMENTS},
)
