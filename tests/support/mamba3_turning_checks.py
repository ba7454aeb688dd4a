"""mamba3_siso_combined with queries and keys that are turned within the scan, beside fp64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from mamba3_checks import CASES, arguments, draw, poisoned
from mamba3_scans import recurrent
from mamba3_turning_scans import UNIT, turned
from torch import Tensor

from gdn2gen import mamba3_siso_combined
from gdn2gen.base.environment import verifying
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.mamba3_turning_scan import (
    MAMBA3_TURNING_SCAN,
    MAMBA3_WEIGHTS,
    turning_problem,
    weights_problem,
)
from gdn2gen.measure.accuracy import relative_errors
from gdn2gen.measure.mamba3_runs import mamba3_results
from gdn2gen.runtime import mamba3_chunk_ops, mamba3_chunks
from gdn2gen.runtime import mamba3_turning_scan as runtime
from gdn2gen.runtime.mamba3_chunk_ops import chunks_forced
from gdn2gen.runtime.mamba3_loaded import force_tile, loaded


def in_int32(turns: Tensor) -> Tensor:
    units = (turns * UNIT).round()
    return ((units + UNIT / 2) % UNIT - UNIT / 2).clamp_max(2**31 - 1).int()


def by_recurrence(x: dict[str, Tensor], S: int, BT: int, keep: int) -> dict[str, Tensor]:
    """What the scan makes, in fp64."""
    right = turned(x, S, BT)
    found = recurrent({**x, **{y: right[y] for y in "qk"}}, BT)
    made = {"out": found.out, "final_ssm": found.last}
    if S:
        made["last_angle"] = right["last_angle"] % (2 * torch.pi)
    if keep and S:
        made["turns"] = in_int32(right["turns"])
    if keep and "Z" in x:
        made["ungated"] = found.y
    if keep == 2:
        made |= {"h": found.h, "q": right["q"], "k": right["k"]}
        made |= {"theta": in_int32(right["theta"])} if S else {}
    return made


@verifying()
def errors_turned_within(name: str, fast: bool) -> tuple[list[tuple[int, bool]], dict[str, float]]:
    """By the kernels over chunks, with the scan's recurrence in fp64 in the place of its kernel and
    numbers of tokens from theirs: what it was asked to keep, and whether of tensors of the shapes
    that it makes and what a forward hands on is of the kinds that it is without; and errors."""
    kept: list[tuple[int, bool]] = []
    before = mamba3_chunks.forward

    def forward(x: mamba3_chunks.Given, keep: int) -> mamba3_chunks.Made:
        made = before(x, keep)
        with pytest.MonkeyPatch.context() as without:
            without.setattr(runtime, "turning_launches", lambda *_: None)
            usual = before(x, keep)
        same = [(y.dtype, y.shape) for y in made] == [(y.dtype, y.shape) for y in usual]
        kept[-1] = keep, kept[-1][1] and same
        return made

    def launches(problem: Mamba3Problem, keep: int, BT: int, *_: Any) -> Any:
        own, S = turning_problem(problem), problem.angles
        operands = MAMBA3_TURNING_SCAN.operands(own)

        def scan(*given: Tensor, T: int) -> None:
            x = dict(zip([y.name for y in operands], given, strict=True))
            outputs = {y.name for y in MAMBA3_TURNING_SCAN.outputs}
            made = by_recurrence({y: z for y, z in x.items() if y not in outputs}, S, BT, keep)
            kept.append((keep, all(x[y].shape == z.shape for y, z in made.items())))
            for y, z in made.items():
                x[y].copy_(z)

        knobs = {"BT": BT, "BH": 1}
        numbers = loaded(weights_problem(problem), MAMBA3_WEIGHTS.name, knobs, torch.device("cpu"))
        return numbers, scan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "turning_launches", launches)
        patch.setattr(mamba3_chunk_ops, "forward", forward)
        force_tile(16)
        try:
            with chunks_forced(True), poisoned():
                op = partial(mamba3_siso_combined, disable_recompute=fast)
                found = relative_errors(*mamba3_results(draw(CASES[name]), op))
                with torch.no_grad():
                    # where V has another dtype than the numbers of tokens
                    mamba3_siso_combined(**arguments(draw(CASES[name], torch.float16)))
        finally:
            force_tile(None)
    return kept, found
