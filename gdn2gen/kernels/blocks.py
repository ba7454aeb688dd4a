"""Stages that keep the state of every few chunks: the scans of `blocks` plans, and grad_blocks.

A state of every chunk of 32 tokens, and its gradient, are a fifth of all bytes that a training step
moves. Kept at the ends of blocks of chunks they are a part of that, and what lies between is made
again where it is read: both recursions are separable in the channels of keys, given R, dX and dO,

    S_(c+1) = Diag(gamma_C) S_c + Ktail^T R        dS_c = Diag(gamma_C) dS_(c+1) + Qg^T dO - E^T dX

so that grad_blocks, a program of which takes a chunk and a slice of channels, has all it needs: it
goes from the block's start up to its chunk, and from the block's end down to it. (In TileLang a
program takes the block, and makes of pairs of tokens what would come of the state between them.) It
sums the decay itself, and makes dT and dAqk of what it reads. So no stage leaves the sum of the
decay, and dv and dw are the reverse scan's, of dX as it is in fp32. Where the decay is outside of
products, `outside_blocks` says what is otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from gdn2gen.kernels.anchors import INSIDE, REACH, bounded
from gdn2gen.kernels.gradients import GRAD_KEY
from gdn2gen.kernels.languages import PANEL
from gdn2gen.kernels.limits import FP32, WIDE, Limit, Setting
from gdn2gen.kernels.operands import (
    CHUNK_SCALARS,
    CHUNK_TABLE,
    DH,
    DO,
    DV,
    DX,
    FACTORS,
    GAMMA_C,
    GATE,
    K_BETA,
    LOG_DECAY,
    OUTPUT,
    QKGB,
    RSTD,
    SEQUENCES,
    VW,
    H,
    R,
)
from gdn2gen.kernels.outside_blocks import outside_tilelang, outside_triton
from gdn2gen.kernels.plans import EVERY
from gdn2gen.kernels.prepare import REPREPARE
from gdn2gen.kernels.scans import RESCAN, REVERSE_SCAN, SCAN_STATES
from gdn2gen.kernels.stage import Form, Operand, Stage

# <dX, w v>, by 16 values: what a warp of the reverse scan has of a token in its rows.
_Z_DOT: Final = Operand("z_dot", "NT HV BT NZ", "fp32", "l2norm", of="channel")
# What the norms' backward wants where the decay is outside of products: only of slices of channels.
_IN_SLICES: Final = "l2norm, in slices"
_Z_DOTS: Final = (_Z_DOT, replace(_Z_DOT, of="outside", when=_IN_SLICES))
_KTAIL: Final = FACTORS[2]


def _kept(operand: Operand, every: int) -> Operand:
    """A state, or its gradient, of every block instead of every chunk."""
    dims = operand.dims if every == 1 else operand.dims.replace("NT", f"NT{every}")
    return replace(operand, dims=dims)


# Of the forms in TileLang, which were compiled for nothing else so far. Head dims are those of
# tiles, of 64 for all up to it and of 128 for 65 to 128: loads fill what is past a head dim.
_WIDTHS, _WIDTHS_OF_SCANS = (
    tuple(Limit(x, sizes, "tiles of other widths were not compiled for") for x in ("K", "V"))
    # 96 are those that `tile_step=32` asks for
    for sizes in ((64, 128), (64, 96, 128))
)
_PLAIN: Final = (
    Limit("varlen", (False,), "packed sequences are in Triton's forms alone"),
    Limit("arch", (None, "sm_90"), "others were not compiled for"),
)
_CHUNKS_OF_32: Final = Limit("BT", (32,), "its tiles are those of 32 tokens")


def _in_tilelang(stage: Stage, template: str, *limits: Limit) -> tuple[Form, ...]:
    """Its forms in TileLang, of templates of their own."""
    return tuple(
        replace(x, limits=(*x.limits, *_WIDTHS_OF_SCANS, *_PLAIN, *limits), tiled_by=PANEL)
        for x in _made_of(template, stage, "tilelang")
    )


def _in_triton(stage: Stage, template: str) -> tuple[Form, ...]:
    """Its forms in Triton, of templates of their own."""
    return tuple(_made_of(template, stage, "triton"))


def _made_of(template: str, stage: Stage, language: str) -> Iterator[Form]:
    """The stage's forms in a language, of `template` and, in segments, of the one beside it."""
    for x in stage.forms:
        if x.language == language:
            segments = "_parallel" * x.template.endswith("_parallel")
            yield replace(x, template=f"{template}{segments}")


REPREPARE_FACTORS: Final = replace(
    REPREPARE,
    name="reprepare_factors",
    outputs=FACTORS,
    forms=_in_triton(REPREPARE, "reprepare_factors"),
    later={},
)


def _scan_blocks(every: int) -> Stage:
    return replace(
        SCAN_STATES,
        name=f"scan_blocks{every}",
        outputs=tuple(_kept(x, every) if x is H else x for x in SCAN_STATES.outputs),
        # of every chunk the contract is that of scan_states
        forms=(
            *_in_triton(SCAN_STATES, "scan_blocks"),
            *_in_tilelang(SCAN_STATES, "scan" if every == 1 else "scan_blocks"),
        ),
        every=every,
    )


def _rescan_blocks(every: int) -> Stage:
    return replace(
        RESCAN,
        name=f"rescan_blocks{every}",
        outputs=(_kept(H, every), R),
        # of every chunk the contract is that of rescan
        forms=(
            *_in_triton(RESCAN, "scan_blocks"),
            *_in_tilelang(RESCAN, "scan"),
        ),
        every=every,
    )


def _reverse_scan_blocks(every: int) -> Stage:
    scratch = tuple(x for x in REVERSE_SCAN.outputs if x.scratch)
    return replace(
        REVERSE_SCAN,
        name=f"reverse_scan_blocks{every}",
        inputs=(
            *(replace(x, of="channel") for x in VW),
            replace(VW[0], of="outside", when=_IN_SLICES),
            *REVERSE_SCAN.inputs,
        ),
        outputs=(
            _kept(DH, every),
            replace(DX, of="channel"),  # else it is dv
            DV,
            Operand("dw", "B T HV V", when="w"),
            *_Z_DOTS,
            *scratch,
            REVERSE_SCAN.outputs[-1],
        ),
        forms=(
            *_in_triton(REVERSE_SCAN, "reverse_scan_blocks"),
            *_in_tilelang(REVERSE_SCAN, "reverse_scan_blocks", _CHUNKS_OF_32),
        ),
        later={},
        every=every,
    )


# Pairs meet at the chunk's start, and tokens that lost much since at later anchors. In fp16, which
# ends at 2^16, factors of pairs have the 10 bits of tf32, as many, and its range.
_ANCHORED: Final = Form(
    "anchored",
    "triton",
    "grad_blocks",
    steady=False,
    knobs={
        "chunks": (1,),
        "BK": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2),  # of the loops that make states again alone
        "maxnreg": (0, 96, 128, 168),
    },
    defaults=(
        Setting({"BK": 64, "num_warps": 4}),
        Setting({"BK": 32}, {"V": WIDE}),
        Setting({"BK": 32}, {"BT": (64,)}),
        Setting({"BK": 16}, FP32),
    ),
    leads={},
    limits=(
        INSIDE,
        # Illegal accesses and gradients off by 0.2 to 5.7e2 on an H200. What Triton wrote is right:
        # for one in ten products of strong_decay_kernel ptxas 12.8.93, which comes with Triton 3.6,
        # makes the operand's address of a register that holds something else, as the number of the
        # thread; 12.9.86 and 13.0.88 make it of the right one.
        Limit(
            "BT",
            (16, 32),
            "in chunks of 64 ptxas 12.8 gives products of 64 rows operands at wrong addresses",
            {"arch": ("sm_90",)},
        ),
    ),
)
# As TileLang's grad_key: loads ahead, and warp groups that take 64 channels each.
_ANCHORED_TILELANG: Final = Form(
    "anchored",
    "tilelang",
    "grad_blocks",
    steady=False,
    knobs={
        "chunks": (1, 4, 16),
        "BK": (64, 128),
        "num_warps": (4,),
        "num_stages": (1,),
        "maxnreg": (128, 168),
    },
    defaults=(Setting({"chunks": 16, "maxnreg": 128}),),
    limits=(
        REACH,
        INSIDE,
        Limit("dtype", ("bf16",), "factors of pairs are out of the range of fp16"),
        _CHUNKS_OF_32,
        Limit("gate", ("none",), "the gate's activation is in Triton's form alone"),
        *_WIDTHS,
        *_PLAIN,
    ),
    tiled_by=PANEL,
)
# Blocks of two, each of which is within one program.
_PAIRS_TILELANG: Final = replace(
    _ANCHORED_TILELANG,
    knobs={**_ANCHORED_TILELANG.knobs, "chunks": (2, 4, 16)},
    defaults=(
        Setting({"chunks": 16, "BK": 128, "maxnreg": 168}),
        Setting({"maxnreg": 128}, {"K": (64,)}),
    ),
)


def _grad_blocks(every: int) -> Stage:
    taken = ("dq", "dk", "dg", "dg_part", "db", "dbeta_part", "dbeta", "dA_log", "ddt_bias")
    return Stage(
        name=f"grad_blocks{every}",
        inputs=(
            *QKGB,
            *GATE,
            *RSTD,
            K_BETA,
            GAMMA_C,
            LOG_DECAY,
            *((_KTAIL,) if every > 1 else ()),
            _kept(H, every),
            R,
            _kept(DH, every),
            replace(DX, of="channel"),
            replace(DV, of="outside"),
            DO,
            replace(OUTPUT, when="l2norm", of="channel"),
            replace(OUTPUT, when=_IN_SLICES, of="outside"),
            *_Z_DOTS,
            *((replace(SEQUENCES[0], of="outside"), SEQUENCES[1]) if every > 1 else ()),
            *CHUNK_TABLE,
        ),
        outputs=(
            Operand("beta_dot", "NT HV BT", "fp32", "beta"),
            *(x for x in GRAD_KEY.outputs if x.name in taken),
        ),
        scalars=(*CHUNK_SCALARS, "n_sequences"),
        # dq, de, dk from the states; dAqk and dT; of pairs; states made again, a product for each
        # chunk on the way, and their gradients, two: half of the block in all
        products=(
            *("BT K V",) * 3,
            *("BT BT V",) * 2,
            *("BT K BT",) * 4,
            *("BT K V",) * (3 * (every - 1) // 2),
        ),
        forms=(
            _ANCHORED,
            bounded(_ANCHORED, "grad_key"),
            outside_triton(every),
            *((_ANCHORED_TILELANG if every == 1 else _PAIRS_TILELANG,) if every < 4 else ()),
            *((outside_tilelang(every),) if every < 4 else ()),
        ),
        selector="decay",
        every=every,
    )


BLOCK_STAGES: Final = (
    REPREPARE_FACTORS,
    *(
        make(every)
        for every in EVERY
        for make in (_scan_blocks, _rescan_blocks, _reverse_scan_blocks, _grad_blocks)
    ),
)
