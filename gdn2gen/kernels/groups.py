"""Stages of members whose heads share the scores of their group (`Recurrence.stepped`).

A group's q and k score a chunk once. What its heads differ in is one decay between two tokens and
one step of the token that is written, numbers by which the scans multiply the scores as they read
them; they add the skip and take the output through its gate, too. Gradients of q and k are summed
over heads where they are made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.family.registry import STEP_OPS
from gdn2gen.kernels.limits import FP32, LOADS_AHEAD, WIDE, Limit, Setting
from gdn2gen.kernels.operands import (
    CHECKPOINTS,
    CHUNK_TABLE,
    DH,
    DO,
    INITIAL,
    OUTPUT,
    QK,
    S_SEG,
    SEQUENCES,
    VW,
    H,
)
from gdn2gen.kernels.scans import CHECKPOINT_SCALARS, NO_CHECKPOINTS
from gdn2gen.kernels.stage import Form, Operand, Stage

HEADS: Final = (1, 2, 4, 8, 16, 32)
"""Heads of a group that a program of grad_group may take, one after the other."""

_Q, _K = QK
_V: Final = VW[0]
_RATE: Final = Operand("rate", "HV", "fp32", "rate")
_DT: Final = (Operand("dt", "B T HV", "gate"), Operand("dt_bias", "HV", "fp32", "dt_bias"))
# From prepare_group on: of a group, and what the scans make each head's factors of.
_SCORES: Final = Operand("scores", "NT H BT BT")
_STEPS: Final = (
    Operand("log_decay", "NT HV BT", "fp32"),
    Operand("step", "NT HV BT", "fp32"),
)
# What follows o, and the gradient before it.
_SKIP: Final = Operand("D", "HV V", "fp32", "D")
_GATE: Final = Operand("z", "B T HV V", when="z")
_DY: Final = Operand("dy", "B T HV V", when="z")
# Sums over a chunk's tokens: where there is a gate, made of dy as it is before it is rounded.
_DD: Final = Operand("dD", "NT HV V", "fp32", "D")
# Without a gate that of o itself.
_DO_OR_DY: Final = (replace(DO, when="no z"), _DY)
_SCALARS: Final = ("T", "H", "HV")
_SCAN_SCALARS: Final = ("T", "H", "HV", "NS", "segment")

_ONLY_STEPS: Final = Limit("op", STEP_OPS, "the heads of other members have scores of their own")

PREPARE_GROUP: Final = Stage(
    name="prepare_group",
    inputs=(*QK, _RATE, *_DT, *CHUNK_TABLE),
    outputs=(_SCORES, *_STEPS),
    scalars=_SCALARS,
    rows=("dt",),
    products=("BT BT K",),
    forms=(
        Form(
            "groups",
            "triton",
            "prepare_group",
            knobs={
                "BK": (32, 64, 128),
                "num_warps": (1, 2, 4, 8),
                "num_stages": LOADS_AHEAD,
                "maxnreg": (0, 128),
            },
            defaults=(
                Setting({"BK": 64, "num_warps": 4, "num_stages": 2}),
                Setting({"BK": 32, "num_stages": 1}, FP32),
            ),
            leads={},
            limits=(_ONLY_STEPS,),
        ),
    ),
)

# Whose products of 64 rows are made of a warp's, or in tensor memory.
_NO_WGMMA: Final = (
    *("sm_80", "sm_86", "sm_87", "sm_89"),
    *("sm_100", "sm_101", "sm_103", "sm_120", "sm_121"),
)

# One chain per sequence, as of the scans of other members.
_SERIAL: Final = Form(
    "serial",
    "triton",
    "scan_group",
    # two heads of a program read their group's q and k once, which is most of what a scan reads
    knobs={
        "heads": (1, 2),
        "BV": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3, 4),
    },
    defaults=(
        Setting({"BV": 64, "num_warps": 4, "num_stages": 2}),
        # left alone, ptxas gives up at 32 registers a thread on sm_80, and 4.7 KB of spills
        Setting({"BV": 32, "num_warps": 8}, {"arch": _NO_WGMMA}),
        Setting({"BV": 32}, {"K": WIDE}),
        Setting({"BV": 16, "num_stages": 1}, FP32),
    ),
    leads={},
    limits=(_ONLY_STEPS,),
    ahead=(Operand("q", "BT K"), Operand("k", "BT K")),
)
_BACK: Final = (*_SERIAL.ahead, Operand("do", "BT BV"))
# Its products have the 64 tokens of a chunk as rows, and 64 values of a state.
_IN_TILELANG: Final = (
    _ONLY_STEPS,
    Limit("arch", (None, "sm_90"), "it was written for products of that arch's warp groups"),
    Limit("dtype", ("bf16",), "factors of fp16 would leave its range"),
    Limit("BT", (64,), "tokens are the 64 rows of a warp group's products"),
    Limit("K", (64, 128), "other head dims were not compiled"),
    Limit("V", (64, 128), "other head dims were not compiled"),
)
_SERIAL_TILELANG: Final = Form(
    "serial",
    "tilelang",
    "scan_group",
    # with one stage of loads, two programs to a multiprocessor
    knobs={"heads": (1,), "BV": (64,), "num_warps": (4,), "num_stages": (1, 2, 3)},
    limits=(*_IN_TILELANG, NO_CHECKPOINTS),
)

SCAN_GROUP: Final = Stage(
    name="scan_group",
    inputs=(_V, *QK, *_STEPS, _SCORES, _SKIP, _GATE, *INITIAL, *SEQUENCES, *CHECKPOINTS),
    outputs=(
        OUTPUT,
        replace(S_SEG, when="segments"),
        Operand("final_state", "N HV K V", "fp32", "final_state"),
    ),
    scalars=_SCAN_SCALARS,
    checkpoint_scalars=CHECKPOINT_SCALARS,
    rows=("z",),
    count="n_sequences",
    products=("K V BT", "BT V K", "BT V BT"),
    forms=(_SERIAL, _SERIAL_TILELANG),
)

RESCAN_GROUP: Final = Stage(
    name="rescan_group",
    inputs=(
        _V,
        # what o goes through its gate as, made again: the gate's gradient reads it
        replace(_Q, when="z"),
        _K,
        *_STEPS,
        replace(_SCORES, when="z"),
        replace(_SKIP, when="D and z"),
        _GATE,
        replace(DO, when="z"),
        S_SEG,
        *SEQUENCES,
        # of the form whose gate goes through the chunks side by side
        *(replace(x, scratch=True) for x in CHUNK_TABLE),
    ),
    outputs=(H, Operand("dz", "B T HV V", when="z"), _DY, replace(_DD, when="D and z")),
    scalars=_SCAN_SCALARS,
    rows=("z",),
    count="n_sequences",
    products=("K V BT",),
    forms=(
        # four warps would spill 384 bytes a thread where it makes o again
        replace(
            _SERIAL,
            name="inside",
            defaults=(*_SERIAL.defaults, Setting({"num_warps": 8}, {"BT": (64,)})),
        ),
        # no chunk waits for what the gate needs
        replace(
            _SERIAL,
            name="apart",
            template="rescan_group_apart",
            knobs={**_SERIAL.knobs, "heads": (1,)},
            ahead=(Operand("k", "BT K"),),
            scratch=("chunk_table",),
        ),
        replace(_SERIAL_TILELANG, name="inside"),
    ),
    selector="gating",
    later={"gating": "inside"},
)

REVERSE_SCAN_GROUP: Final = Stage(
    name="reverse_scan_group",
    inputs=(
        *QK,
        *_STEPS,
        _SCORES,
        _SKIP,
        *_DO_OR_DY,
        Operand("dht", "N HV K V", "fp32", "final_state"),
        *SEQUENCES,
    ),
    outputs=(
        DH,
        Operand("dv", "B T HV V"),
        Operand("dh0", "N HV K V", "fp32", "initial_state"),
    ),
    scalars=_SCAN_SCALARS,
    count="n_sequences",
    products=("BT V BT", "BT V K", "K V BT"),
    forms=(
        replace(_SERIAL, template="reverse_scan_group", ahead=_BACK),
        replace(_SERIAL_TILELANG, template="reverse_scan_group"),
    ),
)

# Scratch of grad_group, of tokens and of pairs.
_OF_PAIRS: Final = ("decay_pairs", "step_pairs", "head_decay", "tail_step")

# A program makes pairs of tokens anew for each slice of channels.
_INSIDE: Final = Form(
    "inside",
    "triton",
    "grad_group",
    knobs={
        "heads": HEADS,
        "BK": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": LOADS_AHEAD,
        "maxnreg": (0, 128, 168, 208),
    },
    defaults=(
        Setting({"heads": 8, "BK": 64, "num_warps": 4, "num_stages": 1}),
        Setting({"num_warps": 8}, {"BT": (64,)}),
        Setting({"BK": 32}, {"arch": _NO_WGMMA}),
        Setting({"BK": 32}, {"V": WIDE}),
        # left alone, ptxas gives up at 32 registers a thread and 5 KB of spills; 1.8 KB
        Setting({"BK": 16, "num_warps": 8, "maxnreg": 208}, FP32),
    ),
    leads={},
    limits=(_ONLY_STEPS,),
    ahead=(
        *(Operand(name, "V BK") for name in ("h", "dh")),
        *(Operand(name, "BT V") for name in ("v", "do")),
    ),
    scratch=("decay_part", "step_part"),
)
# Pairs are a kernel of their own, once for all channels.
_APART: Final = replace(
    _INSIDE,
    name="apart",
    template="grad_group_apart",
    defaults=(
        # two programs to a multiprocessor, of chunks of 64 as of 32
        Setting({"heads": 8, "BK": 64, "num_warps": 4, "num_stages": 2}),
        *_INSIDE.defaults[2:],
    ),
    scratch=(*_OF_PAIRS, "taken", "written", "kept", "dscores"),
)
# A program has pairs of tokens for its slice of channels, and leaves a token's sums with its decay.
_ONCE: Final = Form(
    "once",
    "tilelang",
    "grad_group",
    knobs={
        "heads": HEADS,
        "BK": (64,),
        "num_warps": (4,),
        "num_stages": LOADS_AHEAD,
        "maxnreg": (0, 128),
    },
    defaults=(Setting({"heads": 16, "maxnreg": 128}),),
    limits=(*_IN_TILELANG, Limit("V", (64,), "values are the 64 rows of <S, dS>")),
    scratch=("decay_pairs", "step_pairs", "taken", "written", "kept"),
)

GRAD_GROUP: Final = Stage(
    name="grad_group",
    inputs=(*QK, _RATE, *_DT, *_STEPS, H, _V, DH, *_DO_OR_DY, *CHUNK_TABLE),
    outputs=(
        Operand("dq", "B T HP K"),
        Operand("dk", "B T HP K"),
        # of the form that has pairs inside, and of the one that has them apart
        Operand("decay_part", "NT HV NK BT", "fp32", scratch=True),
        Operand("step_part", "NT HV NK BT", "fp32", scratch=True),
        *(Operand(name, "NT HV BT", "fp32", scratch=True) for name in _OF_PAIRS),
        *(Operand(name, "NT HV NK BT", "fp32", scratch=True) for name in ("taken", "written")),
        Operand("kept", "NT HV NK", "fp32", scratch=True),
        Operand("dscores", "NT HP BT BT", scratch=True),
        Operand("ddt", "B T HV", "gate"),
        Operand("drate", "NT HV", "fp32", "rate"),
        Operand("ddt_bias", "NT HV", "fp32", "dt_bias"),
        replace(_DD, when="D, no z"),
    ),
    scalars=_SCALARS,
    rows=("dt",),
    # of the state for q and k; of pairs. What is made once for all heads is left out, and <S, dS>
    products=("BT K V", "BT K V", "BT BT V"),
    forms=(_INSIDE, _APART, _ONCE),
    selector="pairs",
    later={"pairs": "inside"},
)
