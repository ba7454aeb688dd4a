"""Slices of one projection: Mamba-2's kernels read dt and z where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numpy.lib.stride_tricks import as_strided

from gdn2gen.family.parts import WIDTHS
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import RECURRENCES
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.parts import PART_STAGES
from gdn2gen.kernels.plans import stages_of
from gdn2gen.kernels.rows import FARTHEST, UNIT
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.stream_parts import STREAM_STAGES
from gdn2gen.runtime._operands import row_between
from gdn2gen.runtime.parts import in_rows

ALL = ["dt", "z"]


@pytest.mark.parametrize("packed", [False, True])
def test_they_are_read_as_they_lie(packed: bool, interpreter: Callable[..., Any]) -> None:
    """The same bits as of tensors of their own: output, state and gradients."""
    assert interpreter("apart_checks:slices", packed, False) == [ALL] * 9


def test_hooks_may_lay_them_out_anew(interpreter: Callable[..., Any]) -> None:
    """As where what is saved goes to the host and back."""
    assert interpreter("apart_checks:slices", False, True) == [ALL, [], ALL] * 3


def test_what_lies_otherwise_is_copied(interpreter: Callable[..., Any]) -> None:
    shifted, expanded, bent, turned, negated = interpreter("apart_checks:copied")
    assert shifted == ["dt"] and expanded == turned == negated == [] and bent == []


def test_rows_that_lie_too_far_apart_are_copied(interpreter: Callable[..., Any]) -> None:
    assert interpreter("apart_checks:far") == [ALL, []]


@pytest.mark.parametrize(
    ("row", "found"),
    [(FARTHEST, FARTHEST), (FARTHEST + UNIT, 0), (2**25, 0), (2**31, 0), (2**33, 0)],
)
def test_a_distance_that_no_kernel_can_count_is_none(row: int, found: int) -> None:
    """Of views without the memory that they claim."""
    few = torch.zeros(64).numpy()
    bytes_apart = tuple(4 * x for x in (7 * row, row, 8, 1))
    view = torch.from_numpy(as_strided(few, (3, 7, 2, 8), bytes_apart))
    assert view.stride() == (7 * row, row, 8, 1)
    assert row_between(view, UNIT) == found
    x = view[:, :, 0]
    if found:
        assert in_rows(x) is x
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "clone", lambda *_, **__: "copied")  # nobody could read it
        assert in_rows(x) == "copied"


def test_kernels_count_tokens_in_32_bits_up_to_there() -> None:
    """Those of a tile, and of a convolution's run with the taps before it."""
    stages = (*STAGES.values(), *PART_STAGES, *STREAM_STAGES)
    tokens = max(x for stage in stages for x in stage.chunks if isinstance(x, int))
    assert (tokens + max(WIDTHS)) * FARTHEST < 2**31


def test_a_call_like_one_that_began_at_an_odd_address(interpreter: Callable[..., Any]) -> None:
    """What was copied then is read as it lies now, by kernels that know of it."""
    found = interpreter("apart_checks:after_an_odd_address")
    assert [x for x in found if x] == [[72], *[[9, 72]] * 3]


@pytest.mark.parametrize("op", RECURRENCES)
def test_every_stage_that_reads_such_an_input_is_told_how_far_its_rows_lie_apart(op: str) -> None:
    problem = Problem(op, has_z=True, has_D=True) if op == "mamba2" else Problem(op)
    apart = {x.name for x in RECURRENCES[op].inputs if x.apart}
    assert apart == ({*ALL} if op == "mamba2" else set())
    for name in stages_of(op):
        config = default_config(name, problem)
        read = {x.name for x in config.operands(problem)} & apart
        scalars = STAGES[name].scalars_of(problem)
        assert {f"{x}_row" for x in read} <= {x for x in scalars if x.endswith("_row")}
