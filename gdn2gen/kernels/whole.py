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

from gdn2gen.kernels.limits import Limit, Place, Setting
from gdn2gen.kernels.operands import (
    BETA,
    FACTORS,
    INITIAL,
    K_BETA,
    OUTPUT,
    QKGB,
    RSTD,
    SCORES,
    VW,
    H,
    R,
)
from gdn2gen.kernels.scans import SCAN
from gdn2gen.kernels.stage import Form, Stage, erasing

# K and V alike: at 128 two programs take half the values each, at 64 one takes them all.
_HEAD_DIMS: Final = (64, 128)


def _why_no_width(place: Place) -> str | None:
    """Tiles would take 120 channels as 128: what lies past them was not tried."""
    K, V = (getattr(place.problem, name, 0) for name in ("K", "V"))
    if K == V and K in _HEAD_DIMS:
        return None
    return (
        "the forward in one kernel takes K and V of 64 both, or of 128 both, not "
        f"K={K}, V={V}: its slots are those of these; use a plan with prepare and scan"
    )


# Two programs, a cluster, take a head. At 128 two groups of either prepare and one scans: 384
# threads take 168 registers each, all that there are, and 231,424 bytes of shared memory. At 64 one
# group of both scans, and `num_stages` is of the groups that prepare beside it; the other program
# has one more. 3 (four groups of 128 registers, 228,608 bytes) give each scheduler four warps.
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
        Limit("num_stages", (2,), "no more of its slots fit", {"K": (128,)}),
        Limit("BT", (32,), "its slots are those of 32 tokens"),
        Limit("dtype", ("bf16",), "factors of pairs are out of the range of fp16"),
        Limit("gate_dtype", ("fp32",), "it loads g by TMA into tiles of fp32"),
        Limit("l2norm", (True,), "it normalises q and k, and counts on that in its range"),
        Limit("gate", ("none",), "the gate's activation is in prepare alone"),
        Limit("varlen", (False,), "packed sequences take prepare and scan"),
        Limit("arch", (None, "sm_90"), "its clusters and products are of that generation"),
    ),
    tiles=(),  # of other head dims there are none
    refuses=_why_no_width,
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


def _why_no_states(place: Place) -> str | None:
    """At 128 shared memory is full without what states and R are stored from."""
    if getattr(place.problem, "K", 0) == 128:
        return (
            "the forward in one kernel that keeps states takes K=64 and V=64, not K=128: there is "
            "no shared memory left to store them from; use a plan with prepare and scan_blocks1"
        )
    return _why_no_width(place)


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
                Limit("num_stages", (2,), "no more of its slots fit beside what it stores from"),
                *_CLUSTER.limits[1:],
            ),
            refuses=_why_no_states,
        ),
    ),
)
