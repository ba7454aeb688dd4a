"""Stages of plans whose backward takes the transitions of segments that the forward made.

In segments, a scan first makes what each segment does to any state: a transition, M. The backward's
is the same matrix, for the gradient goes through the chunks of a segment the other way round:

    S_end = M S_start + U        dS_start = M^T dS_end + W

With M kept, 64 KB a segment and head at K = 128, the reverse scan folds W alone, in half as many
programs: on an H200 7 for 13 of each of 16 heads and 8 segments, one wave of 132 instead of two.
What is kept follows from the plan, so these are plans of their own. They are for few heads and long
sequences: all their scans are parallel, and what they do not serve takes the plan without.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gdn2gen.kernels.blocks import BLOCK_STAGES
from gdn2gen.kernels.limits import Place
from gdn2gen.kernels.scans import SCAN
from gdn2gen.kernels.stage import Form, Stage

_BY_NAME: Final = {x.name: x for x in (SCAN, *BLOCK_STAGES)}
_HEAD_DIMS: Final = (64, 128)


def _why_no_width(place: Place) -> str | None:
    """Of other head dims a state and a transition may be several tiles, or parts of one."""
    K, V = (getattr(place.problem, name, 0) for name in ("K", "V"))
    if K in _HEAD_DIMS and V in _HEAD_DIMS:
        return None
    return (
        f"kept transitions take K and V of 64 or 128, not K={K}, V={V}; use a plan whose reverse "
        "scan makes its own"
    )


def _in_segments(stage: Stage) -> tuple[Form, ...]:
    """Parallel forms, of which Triton's is the default."""
    return tuple(
        replace(x, leads={} if x.language == "triton" else None, refuses=_why_no_width)
        for x in stage.forms
        if x.name == "parallel"
    )


def _keeping(name: str) -> Stage:
    """A scan that leaves its segments' transitions."""
    stage = _BY_NAME[name]
    return replace(
        stage,
        name=f"{name}_transitions",
        outputs=tuple(replace(x, scratch=False) if x.name == "M_seg" else x for x in stage.outputs),
        forms=_in_segments(stage),
        later={},
    )


def _given(name: str) -> Stage:
    """A reverse scan that takes them, and so has the forward's segments."""
    stage = _BY_NAME[name]
    (transitions,) = (x for x in stage.outputs if x.name == "M_seg")
    return replace(
        stage,
        name=f"{name}_transitions",
        inputs=(*stage.inputs, replace(transitions, scratch=False)),
        outputs=tuple(x for x in stage.outputs if x is not transitions),
        forms=tuple(
            replace(
                x,
                template="reverse_scan_blocks_turned",
                knobs={y: domain for y, domain in x.knobs.items() if y != "max_segments"},
                defaults=tuple(y for y in x.defaults if "max_segments" not in y.knobs),
                scratch=("dS_seg",),
            )
            for x in _in_segments(stage)
        ),
    )


TRANSITION_STAGES: Final = (
    _keeping("scan"),
    _keeping("scan_blocks2"),
    _given("reverse_scan_blocks2"),
)
