"""Times of configs of a layer's parts, for the rules of kernels/parts.py: `layer_time.py --sweep`.

What a GPU is to time was compiled before (compile_side_by_side.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from compile_side_by_side import compile_all

from gdn2gen.base.terminal import Sheet, console
from gdn2gen.family.parts import PartProblem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.measure.timing import time_ms
from gdn2gen.runtime import parts

Run = Callable[[], Any]
SHOWN: Final = 8
# Tokens that are loaded at once, and whether a turn before they are needed.
_LOADS: Final = {
    "short_conv": ((4, 0), (8, 0), (4, 1), (8, 1)),
    "short_conv_backward": ((4, 0), (2, 1), (4, 1)),
}
_WIDTHS: Final = {"short_conv": (128, 256), "short_conv_backward": (64, 128)}
_TILES: Final = {
    "gated_norm": ((1, 0), (2, 0), (2, 1), (4, 1)),
    "gated_norm_backward": ((16, 0), (32, 0), (8, 1), (16, 1), (32, 1)),
}


def sweep(parts_of: Sequence[tuple[str, PartProblem, Run]]) -> None:
    """Times of each stage's configs in its run, the fastest first, and that of the rule's own."""
    compile_all(
        (problem, default_config(stage, problem).replace(**x))
        for stage, problem, _ in parts_of
        for x in knobs_of(stage)
    )
    for stage, _, run in parts_of:
        given = [*knobs_of(stage)]
        by_rule = _ms(stage, None, run)
        found = sorted(((_ms(stage, x, run), x) for x in given), key=lambda x: x[0])
        sheet = Sheet(stage, (*given[0], "ms"), words=())
        for took, knobs in found[:SHOWN]:
            sheet.add(*map(str, knobs.values()), f"{took:.4f}")
        sheet.add("rule", *[""] * (len(given[0]) - 1), f"{by_rule:.4f}")
        console().print(sheet)


def _ms(stage: str, knobs: dict[str, Knob] | None, run: Run) -> float:
    parts.force(stage, knobs)
    try:
        return time_ms(run, warmup_ms=5, rep_ms=25).median
    finally:
        parts.force(stage, None)


def knobs_of(stage: str) -> Iterator[dict[str, Knob]]:
    if stage in _TILES:
        for BR in (4, 8, 16, 32):
            for warps in (2, 4, 8):
                for BT, early in _TILES[stage]:
                    if 1 <= 4 * BR // warps <= 32:  # elements that a lane has of 128 channels
                        yield {"BR": BR, "num_warps": warps, "BT": BT, "early": early}
        return
    for BD in _WIDTHS[stage]:
        for warps in (2, 4):
            shared = {"BD": BD, "BR": warps, "num_warps": warps}
            for BT in (32, 64, 128):
                for ahead, early in _LOADS[stage]:
                    yield {"BT": BT, **shared, "ahead": ahead, "early": early}
            if stage == "short_conv":  # a run of one turn
                yield {"BT": 16, **shared, "ahead": 16, "early": 0}
