"""Stages that make a chunk's factors of q, k, g and b or beta: prepare, reprepare, sum_decay.

Where the decay is outside of products, prepare alone: it leaves what scans need beside q and k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.family.registry import LINEAR_OPS, OPS, OUTSIDE_OPS, recurrence_named
from gdn2gen.kernels.anchors import CENTRED, ERASING_OPS, INSIDE, OUTSIDE, REACH, bounded
from gdn2gen.kernels.languages import TILED_DIMS
from gdn2gen.kernels.limits import FP32, LOADS_AHEAD, Limit, Setting
from gdn2gen.kernels.operands import (
    BETA,
    CHUNK_SCALARS,
    CHUNK_TABLE,
    DECAY,
    FACTORS,
    GATE,
    HEAD_FACTORS,
    K_BETA,
    LOG_DECAY,
    Q_HEAD,
    QKGB,
    RSTD,
    SCORES,
    A,
    G,
)
from gdn2gen.kernels.stage import Form, Operand, Product, Stage, erasing

# Members whose erase and write gate is one number a head, which prepare loads as a tile of its own.
_TIED: Final = tuple(op for op in OPS if recurrence_named(op).tied)
_UP_TO_128: Final = tuple(x for x in TILED_DIMS["K"] if x <= 128)
_OVER_128: Final = tuple(x for x in TILED_DIMS["K"] if x > 128)
_UP_TO_192: Final = Limit(
    "K",
    tuple(x for x in TILED_DIMS["K"] if x <= 192),
    "its tiles of 256 channels take 267 KB",
    {"BT": (64,)},
)
_UNDECAYED: Final = tuple(
    op for op in OPS if recurrence_named(op).decay is None and op not in LINEAR_OPS
)
_MAKE_Y: Final = Product("BT K BT", "erases", "channel")

# A is rounded to 8 bits in bf16: the inverse with 10 is as good, and 0.16 ms faster.
_EXACT_SOLVE: Final = (
    Setting({"solve": "tf32x3"}, {"dtype": ("fp16", "fp32")}),
    Setting({"solve": "ieee"}, {"op": LINEAR_OPS}),
    Setting({"solve": "tf32x3"}, {"op": _UNDECAYED}),
)
_NOTHING_SOLVED: Final = Limit(
    "solve", ("ieee",), "nothing is erased, and nothing inverted", {"op": LINEAR_OPS}
)
# Correlated keys, dbeta after 1100 tokens on an H200: 3.05e-2, where 3e-2 are allowed; after 2011
# it is 3.3e-2 with tf32 and 2.8e-2 with an exact inverse, by Triton's interpreter.
_NOTHING_FORGOTTEN: Final = Limit(
    "solve",
    ("tf32x3", "bf16x3", "ieee"),
    "where nothing is forgotten, what tf32 rounds adds up over a sequence",
    {"op": _UNDECAYED},
)

# Pairs meet in the middle of dyadic blocks, by products of factors. It reads back what it wrote,
# and 64 channels at a time would spill 2 KB a thread.
_TREE: Final = Form(
    "tree",
    "triton",
    "prepare",
    knobs={
        "chunks": (1,),
        "BK": (32,),
        "solve": ("tf32", "tf32x3", "bf16x3", "ieee"),
        "num_warps": (1,),
        "num_stages": LOADS_AHEAD,
        "maxnreg": (0, 80, 128, 168, 208),  # 64 spill
    },
    defaults=_EXACT_SOLVE,
    leads={},
    limits=(INSIDE, _NOTHING_SOLVED),
    scratch=("gamma_B",),
)
# Pairs meet at the chunk's start, and tokens that lost much since at later anchors.
_ANCHORED: Final = Form(
    "anchored",
    "triton",
    "prepare_anchored",
    steady=False,
    knobs={**_TREE.knobs, "BK": (32, 64, 128), "num_warps": (1, 2, 4)},
    defaults=(
        *_EXACT_SOLVE,
        Setting({"BK": 64, "num_warps": 2}),
        Setting({"BK": 32, "num_warps": 1}, FP32),
    ),
    leads={"dtype": ("bf16",)},  # whose exponents reach as far as those of fp32
    limits=(REACH, INSIDE, _NOTHING_SOLVED),
)
# Scores of keys and queries as they are, and one matrix of decays for all channels.
_OUTSIDE: Final = Form(
    "outside",
    "triton",
    "prepare_outside",
    knobs={
        **_TREE.knobs,
        "BK": (32, 64, 128),
        "num_warps": (1, 2, 4),
        "maxnreg": (0, 64, 80, 128, 168),
    },
    defaults=(
        *_EXACT_SOLVE,
        Setting({"BK": 64, "num_warps": 2, "num_stages": 2}),
        Setting({"num_warps": 4}, {"BT": (64,)}),
        Setting({"BK": 32, "num_stages": 1}, FP32),
    ),
    leads={"op": OUTSIDE_OPS},
    limits=(OUTSIDE, _NOTHING_SOLVED, _NOTHING_FORGOTTEN),
)
# A warp group takes all channels. From the config nearest to Triton's default, one program to a
# multiprocessor, a search from an empty store left prepare in Triton: train4k 1.60 ms on an H200,
# where 1.46 was known.
_ANCHORED_TILELANG: Final = Form(
    "anchored",
    "tilelang",
    "prepare_anchored",
    steady=False,
    knobs={
        "chunks": (1, 2, 4, 8, 16),
        "BK": TILED_DIMS["K"],
        # by substitution in fp32, all at once or that of either half
        "solve": ("ieee", "halves"),
        "num_warps": (4,),
        "num_stages": LOADS_AHEAD,
        # one program to a multiprocessor, four, three or two: where their shared memory allows them
        "maxnreg": (0, 64, 80, 128),
    },
    defaults=(
        Setting({"chunks": 4, "solve": "halves", "maxnreg": 80}),
        Setting({"maxnreg": 64}, {"K": (32, 64)}),
        Setting({"maxnreg": 128}, {"K": _OVER_128}),
        Setting({"maxnreg": 80}, {"K": _OVER_128, "BT": (16,)}),
        Setting({"maxnreg": 0}, {"K": (96,), "BT": (64,)}),
        Setting({"solve": "ieee"}, {"op": LINEAR_OPS}),
    ),
    limits=(
        REACH,
        INSIDE,
        _NOTHING_SOLVED,
        Limit("BT", (32, 64), "its scores alone are of 32 tokens and more", {"op": LINEAR_OPS}),
        # "misaligned address" on an H200: TMA writes to multiples of 128 bytes
        Limit(
            "num_stages",
            (1,),
            "a chunk's betas are 64 bytes in chunks of 16: of several stages, every second is off",
            {"BT": (16,), "op": _TIED},
        ),
        Limit("solve", ("ieee",), "halves give two columns to a thread", {"BT": (16, 64)}),
        Limit(
            "K",
            (32, 64, 96, 128),
            "of more channels a thread holds all 64 tokens of two, and spills 448 to 768 bytes",
            {"BT": (64,)},
        ),
        Limit("maxnreg", (0, 80, 128), "four do not fit", {"K": (128,)}),
        Limit("maxnreg", (0, 80, 128), "four do not fit", {"K": (96,), "BT": (32,)}),
        Limit("maxnreg", (0, 80, 128), "four do not fit", {"K": _OVER_128, "BT": (16,)}),
        Limit("maxnreg", (0, 128), "three do not fit", {"K": _OVER_128, "BT": (32,)}),
        Limit("maxnreg", (0,), "two do not fit", {"K": (96,), "BT": (64,)}),
        Limit("maxnreg", (0, 128), "a thread holds the norms of 64 tokens", {"BT": (64,)}),
    ),
    whole=("BK",),
    exact=True,
)

# As in Triton; it multiplies tiles of a chunk's pairs.
_OUTSIDE_TILELANG: Final = replace(
    _ANCHORED_TILELANG,
    name="outside",
    steady=True,
    template="prepare_outside",
    defaults=(
        *_ANCHORED_TILELANG.defaults,
        Setting({"maxnreg": 80}, {"K": (96, *_OVER_128)}),
        Setting({"maxnreg": 0}, {"BT": (64,)}),
        Setting({"solve": "ieee"}, {"BT": (64,)}),
        Setting({"solve": "ieee"}, {"op": LINEAR_OPS}),
    ),
    limits=(
        OUTSIDE,
        _NOTHING_SOLVED,
        Limit("BT", (32, 64), "it multiplies tiles of 32 tokens and more"),
        Limit("solve", ("ieee",), "halves give two columns to a thread", {"BT": (64,)}),
        Limit("maxnreg", (0, 128), "of pairs alone a thread holds 128", {"BT": (64,)}),
    ),
)
# Factors are centred about 1, and rows that one anchor does not reach are scored by dyadic blocks,
# in the same program: its time hardly depends on the decay.
_CENTRED_TILELANG: Final = replace(
    _ANCHORED_TILELANG,
    name="centred",
    steady=True,
    template="prepare_centred",
    limits=(
        *CENTRED,
        Limit("K", _UP_TO_128, "more were not compiled for", {"op": ERASING_OPS}),
        *_ANCHORED_TILELANG.limits,
    ),
)

PREPARE: Final = Stage(
    name="prepare",
    inputs=(*QKGB, BETA, *GATE, *CHUNK_TABLE),
    outputs=(
        *RSTD,
        K_BETA,
        *SCORES,
        *FACTORS,
        Q_HEAD,
        *HEAD_FACTORS,
        LOG_DECAY,
        Operand("gamma_B", "NT HV NB K", "fp32", scratch=True),
    ),
    scalars=CHUNK_SCALARS,
    products=("BT BT K", *erasing("BT BT K", "BT BT BT"), _MAKE_Y),  # Aqk; T, inverse; Y
    selector="decay",
    forms=(
        replace(_TREE, name="log", leads=None),  # the same by exponentials of sums
        _TREE,
        _ANCHORED,
        bounded(_ANCHORED, "prepare"),
        _OUTSIDE,
        _ANCHORED_TILELANG,
        bounded(_ANCHORED_TILELANG, "prepare"),
        _OUTSIDE_TILELANG,
        _CENTRED_TILELANG,
    ),
    later={"language": "triton", "chunks": 1},
)

# Of reprepare, and of sum_decay as far as they are the same.
_SLICES: Final = Form(
    "slices",
    "triton",
    "reprepare",
    knobs={
        "chunks": (1,),
        "BK": (32, 64, 128),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (1,),  # it has no loop
        "maxnreg": (0, 64, 80, 96, 128),
    },
    defaults=(Setting({"BK": 64, "num_warps": 2}), Setting({"BK": 32}, FP32)),
    leads={},
)
_WHOLE: Final = Form(
    "whole",
    "tilelang",
    "reprepare",
    knobs={
        "chunks": (1, 4, 16),
        "BK": TILED_DIMS["K"],
        "num_warps": (4,),
        "num_stages": LOADS_AHEAD,
        "maxnreg": (0, 80, 128),
    },
    defaults=(
        Setting({"chunks": 4, "maxnreg": 80}),
        Setting({"maxnreg": 128}, {"K": (160, 192), "BT": (32,)}),
        Setting({"maxnreg": 0}, {"K": (224, 256), "BT": (32,)}),
        Setting({"maxnreg": 0}, {"K": _OVER_128, "BT": (64,)}),
    ),
    limits=(
        Limit("num_stages", (1,), "of a token's norms, 64 bytes, one is off", {"BT": (16,)}),
        Limit("maxnreg", (0, 128), "three do not fit", {"K": (160, 192), "BT": (32,)}),
        Limit("maxnreg", (0,), "two do not fit", {"K": (224, 256), "BT": (32,)}),
        Limit("maxnreg", (0,), "two do not fit", {"K": _OVER_128, "BT": (64,)}),
        Limit("maxnreg", (0, 128), "ptxas 13.0 aborts", {"BT": (64,), "K": (128,)}),
    ),
    whole=("BK",),
    exact=True,
)

REPREPARE: Final = Stage(
    name="reprepare",
    inputs=(*QKGB, *GATE, *CHUNK_TABLE, *RSTD, K_BETA, A),
    outputs=(G, *FACTORS),
    scalars=CHUNK_SCALARS,
    products=(_MAKE_Y,),
    forms=(_SLICES, replace(_WHOLE, limits=(*_WHOLE.limits, _UP_TO_192))),
    later={"language": "triton", "chunks": 1},
)

SUM_DECAY: Final = Stage(
    name="sum_decay",
    inputs=(DECAY, *GATE, *CHUNK_TABLE),
    outputs=(G,),
    scalars=CHUNK_SCALARS,
    forms=(
        replace(_SLICES, knobs={**_SLICES.knobs, "num_warps": (1, 2, 4), "maxnreg": (0,)}),
        replace(
            _WHOLE,
            knobs={**_WHOLE.knobs, "maxnreg": (0,)},
            defaults=(Setting({"chunks": 4}),),
        ),
    ),
    later={"language": "triton", "chunks": 1},
)
