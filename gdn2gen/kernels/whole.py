"""The stage `forward`: what prepare and scan do, in one kernel, in TileLang alone.

What prepare writes for the scan, 896 bytes a token and head (512 at K = 64), passes through shared
memory and not through memory. It keeps what plan `lean` keeps, so that any backward of such a plan
goes on from it. There is no form in Triton, which has no programs that write to each other's shared
memory: a plan with this stage serves some problems alone, and names the one that does the same in
stages that serve all (`Plan.instead`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.kernels.languages import PANEL
from gdn2gen.kernels.limits import Limit, Setting
from gdn2gen.kernels.operands import (
    BETA,
    FACTORS,
    HEAD_FACTORS,
    INITIAL,
    K_BETA,
    LOG_DECAY,
    OUTPUT,
    Q_HEAD,
    QKGB,
    RSTD,
    SCORES,
    VW,
    H,
    R,
)
from gdn2gen.kernels.outside_blocks import OUTSIDE
from gdn2gen.kernels.scans import SCAN
from gdn2gen.kernels.stage import Form, Stage, erasing

# Of 128 values two programs take half each, of 64 one takes all: a product has 64 rows, which are
# values. So V of 16 to 64 beside K of 65 to 128 is one half of what 128 x 128 is.
_KEYS: Final = Limit(
    "K", (64, 128), "its slots are of tiles so wide; use a plan with prepare and scan"
)
_VALUES: Final = Limit("V", (64, 128), "one program scans 64 values, and two 128")
# K and V in tiles of one width
_WIDTHS: Final = (
    _KEYS,
    *(
        Limit("V", (width,), "it scans values in tiles as wide as keys", {"K": (width,)})
        for width in (64, 128)
    ),
)

_TWO_GROUPS: Final = Limit("num_stages", (2,), "no more of its slots fit", {"K": (128,)})

# Two programs, a cluster, take a head. At 128 two groups of either prepare and one scans: 384
# threads take 168 registers each, all that there are, and 231,424 bytes of shared memory. At 64 one
# group of both scans, and `num_stages` is of the groups that prepare beside it; the other program
# has one more. 3 (four groups of 128 registers, 228,608 bytes) give each scheduler four warps. At
# K = 128, V = 64 one group of both scans, too, but a fifth that prepares would take 28 KB more than
# there are: the other program's third group has nothing to do. At K = 64, V = 128 all is as at 128,
# with three groups that prepare.
_CLUSTER: Final = Form(
    "cluster",
    "tilelang",
    "forward",
    steady=False,
    # nothing else that was worth varying: registers handed from group to group by setmaxnreg would
    # be those of the launch
    knobs={"BV": (64,), "num_warps": (4,), "num_stages": (2, 3)},
    defaults=(Setting({"num_stages": 3}, {"K": (64,)}),),
    leads={},
    limits=(
        _KEYS,
        _VALUES,
        _TWO_GROUPS,
        Limit("BT", (32,), "its slots are those of 32 tokens"),
        Limit("dtype", ("bf16",), "factors of pairs are out of the range of fp16"),
        Limit("gate_dtype", ("fp32",), "it loads g by TMA into tiles of fp32"),
        Limit("l2norm", (True,), "it normalises q and k, and counts on that in its range"),
        Limit("gate", ("none",), "the gate's activation is in prepare alone"),
        Limit("varlen", (False,), "packed sequences take prepare and scan"),
        Limit("arch", (None, "sm_90"), "its clusters and products are of that generation"),
    ),
    tiles=(),  # of other head dims there are none
    tiled_by=PANEL,
)

# of segments, and the final one
_STATES: Final = tuple(x for x in SCAN.outputs if x.name in ("S_seg", "final_state"))

FORWARD: Final = Stage(
    name="forward",
    inputs=(*QKGB, BETA, *VW, *INITIAL),
    outputs=(OUTPUT, *RSTD, K_BETA, *SCORES, *_STATES),
    scalars=("scale", "T", "H", "HV", "HG", "NS", "segment"),
    count="n_sequences",
    # Aqk; T, inverse, Y; then the scan's
    products=("BT BT K", *erasing("BT BT K", "BT BT BT", "BT K BT"), *SCAN.products),
    forms=(_CLUSTER,),
)


# What scan_blocks1 keeps, too: the factors, R, and the state at every chunk's start.
FORWARD_BLOCKS1: Final = replace(
    FORWARD,
    name="forward_blocks1",
    outputs=(OUTPUT, *RSTD, K_BETA, *SCORES, *FACTORS, H, R, _STATES[-1]),
    scalars=("scale", "T", "H", "HV", "HG"),
    forms=(
        replace(
            _CLUSTER,
            defaults=(),
            limits=(
                *_CLUSTER.limits,
                # at 128 shared memory is full without what states and R are stored from
                Limit("K", (64,), "no shared memory is left at 128 to store states from"),
                Limit("num_stages", (2,), "no more of its slots fit beside what it stores from"),
            ),
        ),
    ),
)

# And what scan_blocks2 keeps: the state at the start of every two chunks. Slots take all shared
# memory, so that R and states are stored from registers: 32 bytes of a thread a chunk, 128 a block.
FORWARD_BLOCKS2: Final = replace(
    FORWARD_BLOCKS1,
    name="forward_blocks2",
    outputs=tuple(
        replace(x, dims=x.dims.replace("NT", "NT2")) if x is H else x
        for x in FORWARD_BLOCKS1.outputs
    ),
    forms=(
        replace(
            _CLUSTER,
            defaults=(),
            limits=(
                *_CLUSTER.limits,
                Limit("K", (128,), "of 64 forward_blocks1 keeps every state"),
            ),
        ),
    ),
    every=2,
)


# The same where the decay is outside of products: a slot has q and k as they were loaded, and what
# one product and the inverse make of them. At 64 one group of both programs scans, as of `forward`,
# and each that prepares has two slots: 3 beside it (four groups of 122 registers) are 212,992
# bytes, and 226,304 with the tiles that states and R are stored from.
FORWARD_OUTSIDE: Final = replace(
    FORWARD,
    name="forward_outside",
    outputs=(OUTPUT, *RSTD, K_BETA, *SCORES, Q_HEAD, *HEAD_FACTORS, LOG_DECAY, *_STATES),
    products=("BT BT K", *erasing("BT BT K", "BT BT BT"), *SCAN.products),  # Aqk; T, inverse
    forms=(
        Form(
            "cluster",
            "tilelang",
            "forward_outside",
            knobs={"BV": (64,), "num_warps": (4,), "num_stages": (2, 3)},
            defaults=(Setting({"num_stages": 3}, {"K": (64,)}),),
            leads={},
            limits=(
                OUTSIDE,
                *_WIDTHS,
                _TWO_GROUPS,
                Limit("BT", (32,), "its slots are those of 32 tokens"),
                Limit(
                    "dtype", ("bf16",), "factors of keys as they are may leave the range of fp16"
                ),
                *(x for x in _CLUSTER.limits if x.name in ("gate", "varlen", "arch")),
            ),
            tiles=(),
        ),
    ),
)

# What scan_blocks2 keeps, too: R, and the state at the start of every two chunks.
FORWARD_OUTSIDE_BLOCKS2: Final = replace(
    FORWARD_OUTSIDE,
    name="forward_outside_blocks2",
    outputs=(
        *(x for x in FORWARD_OUTSIDE.outputs if x.name not in ("S_seg", "final_state")),
        replace(H, dims=H.dims.replace("NT", "NT2")),
        R,
        _STATES[-1],
    ),
    scalars=("scale", "T", "H", "HV", "HG"),
    every=2,
)
