"""Slices of one projection: Mamba-2's kernels read dt and z where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import RECURRENCES
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import stages_of
from gdn2gen.kernels.stages import STAGES

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
