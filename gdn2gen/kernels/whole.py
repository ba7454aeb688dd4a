"""The stage `forward`: what prepare and scan do, in one kernel, in TileLang alone.

What prepare writes for the scan, 896 bytes a token and head, passes through shared memory and not
through memory. It keeps what plan `lean` keeps, so that any backward of such a plan goes on from
it. There is no form in Triton, which has no programs that write to each other's shared memory: a
plan with this stage serves some problems alone, and names the one that does the same in stages that
serve all (`Plan.instead`).
"""

from __future__ import annotations

from typing import Final

from gdn2gen.kernels.limits import Limit, Place
from gdn2gen.kernels.operands import (
    BETA,
    INITIAL,
    K_BETA,
    OUTPUT,
    QKGB,
    RSTD,
    SCORES,
    VW,
)
from gdn2gen.kernels.scans import SCAN
from gdn2gen.kernels.stage import Form, Stage, erasing


def _why_no_width(place: Place) -> str | None:
    """Tiles would take 120 channels as 128: what lies past them was not tried."""
    problem = place.problem
    found = {"K": getattr(problem, "K", 0), "V": getattr(problem, "V", 0)}
    other = ", ".join(f"{name}={size}" for name, size in found.items() if size != 128)
    if not other:
        return None
    return (
        f"the forward in one kernel takes K=128 and V=128, not {other}: its slots fill shared "
        "memory; use a plan with prepare and scan"
    )


# Two programs, a cluster, take a head; four groups of theirs prepare, two scan. 384 threads take
# 168 registers each, all that there are, and 231,424 bytes of shared memory.
_CLUSTER: Final = Form(
    "cluster",
    "tilelang",
    "forward",
    steady=False,
    # nothing that was worth varying: registers handed from group to group by setmaxnreg would be
    # those of the launch, 384 x 168
    knobs={"BV": (64,), "num_warps": (4,), "num_stages": (2,)},
    leads={},
    limits=(
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
