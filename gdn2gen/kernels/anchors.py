"""How far factors may lie from their anchor, and what a gate's bound says of a whole chunk."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import CHANNEL_OPS, LINEAR_OPS, OUTSIDE_OPS
from gdn2gen.kernels.limits import Limit, Place
from gdn2gen.kernels.stage import Form

# Of forms whose pairs meet at the chunk's start.
REACH: Final = Limit(
    "dtype",
    ("bf16", "fp32"),
    "{form} factors reach 2^96, which fp16 cannot hold: use a dyadic placement",
)
# Of forms whose pairs meet inside of products over channels; and of the form where they do not.
INSIDE: Final = Limit(
    "op", CHANNEL_OPS, "a decay that is no channel's stays outside of products, in decay=outside"
)
OUTSIDE: Final = Limit(
    "op", OUTSIDE_OPS, "a decay per channel is inside of products, as in decay=anchored"
)

# Those of the first whose chunks have an inverse.
ERASING_OPS: Final = tuple(x for x in CHANNEL_OPS if x not in LINEAR_OPS)
# Of forms whose factors are centred about 1.
CENTRED: Final = (
    Limit("BT", (32,), "in chunks of 64 its grad_key spills 744 bytes a thread"),
    Limit("arch", (None, "sm_90"), "its threads write what products of that generation read"),
)
# How far in log2 factors of one anchor may lie apart where they are centred, half of it above 1 and
# half below: elements of q and k have 66 bits either way before fp32 ends.
CENTRED_RANGE: Final = 120


def bounded(anchored: Form, stage: str) -> Form:
    """The same without the later anchors: where a gate's bound keeps every chunk in one frame."""
    return replace(
        anchored,
        name="bounded",
        leads=None,
        steady=True,
        refuses=lambda x: why_unbounded(x, stage),
    )


def anchor_range(problem: Problem, stage: str) -> int:
    """How far in log2 factors may lie from their anchor, where fp32 ends at 2^-126 and 2^127.

    prepare leaves 22 bits for the elements of q and k, whose smaller ones no sum would show;
    grad_key 31 for gradients and their sums. Without the norm keys may be large, and with them all.
    """
    if not problem.l2norm:
        return 64
    return 104 if stage in ("prepare", "forward", "forward_blocks1", "forward_blocks2") else 96


def chunk_loss(problem: Problem, BT: int) -> int:
    """Bits that a channel loses at most over BT tokens, rounded up: 2^-bits of it stays.

    By the gate's bound; 0 where none is known.
    """
    return math.ceil(BT * problem.bound / math.log(2.0))


def why_unbounded(place: Place, stage: str) -> str | None:
    """Why some chunk may leave the first frame of `stage`; None if none can."""
    problem, BT = place.problem, place.BT
    assert isinstance(problem, Problem)
    remedy = "use decay=anchored, which serves every decay"
    if problem.gate != "sigmoid":
        return (
            f"the bounded placement needs a gate with a bound, gate=sigmoid, but got "
            f"gate={problem.gate}: {remedy}"
        )
    if problem.bound == 0:
        return (
            "the bounded placement needs the gate's bound, but none is known (bound=0): give it "
            f"(--lower-bound, in [-5, 0)), or {remedy}"
        )
    loss, limit = chunk_loss(problem, BT), anchor_range(problem, stage)
    if loss > limit:
        return (
            f"{BT} tokens of at most {problem.bound} nats each may lose 2^-{loss}, but the bounded "
            f"{stage} takes no more than 2^-{limit} a chunk: use a smaller BT, or {remedy}"
        )
    return None
