"""Stages that make the inputs' gradients, chunk by chunk: grad_value and grad_key."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.family.registry import CHANNEL_OPS, LINEAR_OPS, OUTSIDE_OPS
from gdn2gen.kernels.anchors import CENTRED, ERASING_OPS, INSIDE, OUTSIDE, REACH, bounded
from gdn2gen.kernels.languages import TILED_DIMS
from gdn2gen.kernels.limits import FP32, LOADS_AHEAD, WIDE, Limit, Setting, Where
from gdn2gen.kernels.operands import (
    CHUNK_SCALARS,
    CHUNK_TABLE,
    DH,
    DO,
    DV,
    DX,
    DX_REST,
    GAMMA_C,
    GATE,
    HEAD_FACTORS,
    K_BETA,
    LOG_DECAY,
    ONLY_WRITES,
    OUTPUT,
    QKGB,
    RSTD,
    VW,
    G,
    H,
    R,
)
from gdn2gen.kernels.stage import Form, Operand, Product, Stage, erasing

_SCORE_GRADS: Final = (
    Operand("dT", "NT HV BT BT", when="erases"),
    Operand("dAqk", "NT HV BT BT", when="erases"),
    Operand("dAqk_diagonal", "NT HV BT", "fp32", "erases"),
)
_BETA_DOT: Final = Operand("beta_dot", "NT HV BT", "fp32", "beta")
_DOTS: Final = (
    Operand("q_dot", "NT HV BT", "fp32", "l2norm"),
    Operand("k_dot", "NT HV BT", "fp32", "l2norm"),
)

# What is added to the state where nothing is erased.
_VALUES: Final = replace(VW[0], when=ONLY_WRITES)

# A load by TMA takes 256 columns; of more they come in blocks of 64.
_WHOLE_V: Final = tuple(x for x in TILED_DIMS["V"] if x <= 256 or x % 64 == 0)
_OVER_192: Final = tuple(x for x in TILED_DIMS["V"] if x > 192)


def _up_to(most: int) -> tuple[int, ...]:
    """Values of V that TileLang's tiles of them fit with."""
    return tuple(x for x in TILED_DIMS["V"] if x <= most)


GRAD_VALUE: Final = Stage(
    name="grad_value",
    inputs=(*VW, R, DX, DX_REST, DO, replace(OUTPUT, when="l2norm"), *CHUNK_TABLE),
    outputs=(
        *_SCORE_GRADS,
        DV,
        Operand("dw", "B T HV V", when="w"),
        _BETA_DOT,
        *_DOTS,
    ),
    scalars=("T", "HV"),
    products=("BT BT V", "BT BT V"),  # dT, dAqk
    forms=(
        Form(
            "slices",
            "triton",
            "grad_value",
            knobs={
                "chunks": (1,),
                "BV": (32, 64, 128),
                "num_warps": (2, 4, 8),
                "num_stages": LOADS_AHEAD,
                "maxnreg": (0, 80, 96, 128, 168, 208),
            },
            defaults=(Setting({"BV": 64, "num_warps": 4}), Setting({"BV": 32}, FP32)),
            leads={},
        ),
        Form(
            "whole",
            "tilelang",
            "grad_value",
            knobs={
                "chunks": (1, 4, 16),
                "BV": _WHOLE_V,
                "num_warps": (4,),
                "num_stages": LOADS_AHEAD,
                "maxnreg": (0, 80, 128),
            },
            defaults=(
                Setting({"maxnreg": 80}),
                Setting({"maxnreg": 128}, {"V": (160, 192)}),
                Setting({"maxnreg": 0}, {"V": _OVER_192}),
                Setting({"maxnreg": 0}, {"V": WIDE, "BT": (64,)}),
            ),
            limits=(
                Limit("BT", (32, 64), "it multiplies tiles of 32 tokens and more"),
                Limit("V", _up_to(384), "of more its nine tiles exceed 227 KB", {"BT": (32,)}),
                Limit("V", _up_to(192), "of more its nine tiles exceed 227 KB", {"BT": (64,)}),
                Limit("maxnreg", (0, 128), "three do not fit", {"V": (160, 192)}),
                Limit("maxnreg", (0,), "two do not fit", {"V": _OVER_192}),
                Limit("maxnreg", (0,), "two do not fit", {"V": (160, 192), "BT": (64,)}),
            ),
            whole=("BV",),
            exact=True,
        ),
    ),
    later={"language": "triton", "chunks": 1},
)

# grad_key. On an H200 slices of 32 channels, which spill up to 616 bytes in fp16 and 1144 in fp32,
# cost less than slices of 16: at train4k fp16 takes 1.12 ms instead of 1.48, fp32 4.03 instead of
# 6.92.
_WIDE_SLICES: Final = Setting({"BK": 32, "num_warps": 2}, {"arch": ("sm_90",), "BT": (16, 32)})
# Where four warps multiply by wgmma, whose operands ptxas 12.8.93 then loses: with slices of 16 and
# of 32 channels, at K = V = 64 and 128. Two warps have no wgmma, and spill 88 bytes.
_NARROW_WGMMA: Final[Where] = {
    "BT": (64,),
    "op": tuple(x for x in CHANNEL_OPS if x in LINEAR_OPS),
    "dtype": ("bf16", "fp16"),
}
# Pairs meet in the middle of dyadic blocks.
_LOG: Final = Form(
    "log",
    "triton",
    "grad_key",
    knobs={
        "chunks": (1,),
        "BK": (16, 32, 64, 128),
        "BV": (32, 64, 128),
        "num_warps": (1, 2, 4, 8),
        "num_stages": LOADS_AHEAD,
        "maxnreg": (0, 96, 128, 168, 208),
    },
    defaults=(
        # slices of 32 spill up to 664 bytes a thread (fp16, sm_120, Triton 3.8); of 16, 16
        Setting({"BK": 16, "BV": 128, "num_warps": 2}),
        # two warps spill up to 448 bytes in fp32, and 1 KB in chunks of 64; four 136 and 248
        Setting({"BV": 32, "num_warps": 4}, FP32),
        Setting({"num_warps": 4}, {"BT": (64,)}),
        _WIDE_SLICES,
        Setting({"num_warps": 2}, _NARROW_WGMMA),
    ),
    leads={},
    limits=(
        INSIDE,
        # dq and dg were infinite on an H200. Slices of 64 channels, which pass, spill 792 bytes.
        Limit(
            "num_warps",
            (1, 2),
            "ptxas 12.8 gives products of more warps operands at wrong addresses",
            {**_NARROW_WGMMA, "arch": ("sm_90",)},
        ),
    ),
)
# Pairs meet at the chunk's start, and tokens that lost much since at later anchors.
_ANCHORED: Final = Form(
    "anchored",
    "triton",
    "grad_key_anchored",
    steady=False,
    knobs={**_LOG.knobs, "chunks": (1, 4, 16)},
    defaults=(
        Setting({"BK": 64, "num_warps": 4, "num_stages": 2, "chunks": 4}),
        # two slices of values, loaded ahead, take 147 KB of shared memory
        Setting({"num_stages": 1}, {"V": WIDE}),
        # like log: its loads ahead take 250 KB of shared memory in chunks of 64 tokens
        Setting({"BK": 16, "num_stages": 1, "chunks": 1}, {"BT": (64,)}),
        Setting({"BK": 16, "num_stages": 1, "chunks": 1}, FP32),
        replace(_WIDE_SLICES, where={**_WIDE_SLICES.where, **FP32}),
    ),
    leads={"dtype": ("bf16",), "BT": (16, 32)},
    limits=(
        REACH,
        INSIDE,
        # Seen nine times on an H200, and never with other sizes: ptxas 12.8.93 loses the address of
        # an operand of wgmma (`codegen.faults`).
        Limit(
            "BK",
            (64, 128),
            "Triton 3.6 compiles slices of fewer channels to a kernel that reads past its memory",
            {"BT": (64,), "arch": ("sm_90",)},
        ),
    ),
    whole=("BV",),
    ahead=(
        *(Operand(name, "V BK") for name in ("h", "dh")),
        *(replace(x, dims="BT V") for x in (R, DX, _VALUES, DO)),
        *(Operand(name, "BT BK") for name in ("q", "k")),
        Operand("b", "BT BK", when="b"),
        replace(G, dims="BT BK"),
    ),
)
# One matrix of decays for all channels; sums over slices of them in kernels of their own.
_OUTSIDE: Final = Form(
    "outside",
    "triton",
    "grad_key_outside",
    knobs=_ANCHORED.knobs,
    defaults=(
        Setting({"BK": 64, "num_warps": 4, "num_stages": 1}),
        Setting({"BK": 32}, {"V": WIDE}),
        Setting({"BK": 16}, {"BT": (64,)}),
        Setting({"BK": 16}, FP32),
        # with dO v^T the tiles of 128 values do not fit: left alone, ptxas 12.9 gives up at 32
        # registers a thread and 8.8 KB of spills on some archs, where 208 spill 3.1 KB
        Setting({"maxnreg": 208}, {**FP32, "op": LINEAR_OPS}),
    ),
    leads={"op": OUTSIDE_OPS},
    limits=(OUTSIDE,),
    whole=("BV",),
    ahead=_ANCHORED.ahead,
)
# A warp group takes 64 channels.
_ANCHORED_TILELANG: Final = Form(
    "anchored",
    "tilelang",
    "grad_key_anchored",
    steady=False,
    knobs={
        "chunks": (1, 4, 16),
        "BK": (64,),
        "BV": _WHOLE_V,
        "num_warps": (4,),
        "num_stages": LOADS_AHEAD,
        "maxnreg": (0, 128),
    },
    defaults=(
        Setting({"chunks": 16, "maxnreg": 128}),
        Setting({"maxnreg": 0}, {"V": WIDE}),
    ),
    limits=(
        REACH,
        INSIDE,
        Limit("BT", (32, 64), "it multiplies tiles of 32 tokens and more", {"op": LINEAR_OPS}),
        Limit("V", _up_to(352), "with a gate's, those of 384 take 228 KB", {"BT": (32,)}),
        Limit("V", _up_to(128), "of more its tiles exceed 227 KB", {"BT": (64,)}),
        Limit("maxnreg", (0,), "two do not fit", {"V": WIDE, "BT": (32,)}),
        # "misaligned address" on an H200: TMA writes to multiples of 128 bytes
        Limit(
            "num_stages",
            (1,),
            "a token's sums are 64 bytes in chunks of 16: of several stages, every second is off",
            {"BT": (16,)},
        ),
    ),
    whole=("BV",),
    exact=True,
)
# As in Triton; it multiplies tiles of a chunk's pairs.
_OUTSIDE_TILELANG: Final = replace(
    _ANCHORED_TILELANG,
    name="outside",
    steady=True,
    template="grad_key_outside",
    limits=(
        OUTSIDE,
        Limit("BT", (32, 64), "it multiplies tiles of 32 tokens and more"),
        Limit("V", _up_to(256), "more were not compiled for", {"BT": (32,)}),
        Limit("V", _up_to(128), "of more its tiles exceed 227 KB", {"BT": (64,)}),
        Limit("maxnreg", (0,), "two do not fit", {"V": WIDE, "BT": (32,)}),
        Limit("maxnreg", (0,), "two do not fit", {"BT": (64,)}),
    ),
    defaults=(*_ANCHORED_TILELANG.defaults, Setting({"maxnreg": 0}, {"BT": (64,)})),
)
# Pairs meet half of fp32's range below the chunk's start, and where a channel lost more in the
# middle of dyadic blocks, in the same program: its time hardly depends on the decay.
_CENTRED_TILELANG: Final = replace(
    _ANCHORED_TILELANG,
    name="centred",
    steady=True,
    template="grad_key_centred",
    limits=(
        *CENTRED,
        Limit("V", _up_to(128), "more were not compiled for", {"op": ERASING_OPS}),
        *_ANCHORED_TILELANG.limits,
    ),
)

GRAD_KEY: Final = Stage(
    name="grad_key",
    inputs=(
        *QKGB,
        *GATE,
        *RSTD,
        K_BETA,
        G,
        GAMMA_C,
        LOG_DECAY,
        HEAD_FACTORS[-1],
        H,
        _VALUES,
        R,
        DH,
        DX,
        *_SCORE_GRADS,
        DO,
        _BETA_DOT,
        *_DOTS,
        *CHUNK_TABLE,
    ),
    outputs=(
        Operand("dq", "B T HV K"),
        Operand("dk", "B T HV K"),
        Operand("dg", "B T HV K", "gate", of="channel"),
        Operand("dg_part", "NT HV NK BT", "fp32", of="head"),
        Operand("dg", "B T HV", "gate", of="head"),
        Operand("db", "B T HV K", when="b"),
        Operand("dbeta_part", "NT HV NK BT", "fp32", "beta"),
        Operand("dbeta", "B T HV", "factor", "beta"),
        Operand("dA_log", "NT HV K", "fp32", "A_log", of="channel"),
        Operand("dA_log", "NT HV", "fp32", "A_log", of="head"),
        Operand("ddt_bias", "NT HV K", "fp32", "dt_bias", of="channel"),
        Operand("ddt_bias", "NT HV", "fp32", "dt_bias", of="head"),
    ),
    scalars=CHUNK_SCALARS,
    # of the state for q and k, of pairs for both; of the state for e, of pairs for e, and once more
    # for k; or dAqk
    products=(
        *("BT K V",) * 2,
        *("BT K BT",) * 2,
        *erasing("BT K V", *("BT K BT",) * 2),
        Product("BT BT V", ONLY_WRITES),
    ),
    selector="decay",
    forms=(
        _LOG,
        _ANCHORED,
        bounded(_ANCHORED, "grad_key"),
        _OUTSIDE,
        _ANCHORED_TILELANG,
        bounded(_ANCHORED_TILELANG, "grad_key"),
        _OUTSIDE_TILELANG,
        _CENTRED_TILELANG,
    ),
    later={"language": "triton"},
)
