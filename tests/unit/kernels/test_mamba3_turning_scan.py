"""Which calls of Mamba-3 turn queries and keys within the scan: those for which it is forced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from gdn2gen.base.environment import batch_invariant
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.mamba3_turning_scan import (
    MAMBA3_TURNING_SCAN,
    turning_knobs,
    turning_problem,
    turns_within,
)
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.runtime import mamba3_turning_scan as runtime

USUAL = Mamba3Problem()
SMS = 132
GIVEN = (USUAL, 0, 64, 128, 4, 64, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "BT", "T", "wanted"),
    [
        ({}, 64, 4096, True),
        ({"carried": True, "gate": True, "skip": True, "angles": 64}, 64, 132, True),
        ({"state_size": 64, "angles": 7}, 64, 4, True),
        ({}, 64, 4095, False),
        ({}, 64, 0, False),
        ({}, 32, 4096, False),
        ({"packed": True}, 64, 4096, False),
        ({"dtype": "fp16"}, 64, 4096, False),
        ({"state_size": 96}, 64, 4096, False),
        ({"head_dim": 128}, 64, 4096, False),
    ],
)
def test_which_calls(change: dict[str, object], BT: int, T: int, wanted: bool) -> None:
    problem = replace(USUAL, **change)  # type: ignore[arg-type]
    assert turns_within(problem, BT, T, SMS, SMS) == wanted
    if wanted:
        own = turning_problem(problem)
        knobs = turning_knobs(problem, 2)
        assert knobs["ahead"] == (problem.angles <= 32)
        config = default_config(MAMBA3_TURNING_SCAN.name, own).replace(**knobs)
        assert why_invalid(config, own, "sm_90") is None


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What is loaded in the places of the two launches."""
    found: list[object] = [object(), object()]
    monkeypatch.setattr(runtime, "loaded", lambda *_: found[0])
    monkeypatch.setattr(runtime, "launcher_if_any", lambda *_: found[1])
    yield found
    runtime.force_turning_scan(None)
    runtime._scan.cache_clear()


def test_no_call_takes_it_that_is_not_forced(made: list[object]) -> None:
    assert runtime.turning_launches(*GIVEN, -1) is None
    runtime.force_turning_scan(False)
    assert runtime.turning_launches(*GIVEN, -1) is None
    runtime.force_turning_scan(True)
    assert runtime.turning_launches(*GIVEN, -1) == tuple(made)
    runtime.force_turning_scan(None)
    assert runtime.turning_launches(*GIVEN, -1) is None


def test_by_a_rule_it_takes_programs_enough(
    made: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `mamba3_scan` does, and what is forced goes before."""
    monkeypatch.setattr(runtime, "TURNS_WITHIN", True)
    assert runtime.turning_launches(*GIVEN, -4) == tuple(made)
    few = (*GIVEN[:4], 1, 1, 1, GIVEN[7])
    assert runtime.turning_launches(*few, -4) is None
    runtime.force_turning_scan(True)
    assert runtime.turning_launches(*few, -4) == tuple(made)
    runtime.force_turning_scan(False)
    assert runtime.turning_launches(*GIVEN, -4) is None


def test_what_it_cannot_do_is_turned_before(made: list[object]) -> None:
    """As where a batch may not change bits, rows are more than a grid has, or nothing compiles."""
    runtime.force_turning_scan(True)
    wider = replace(USUAL, head_dim=128)
    assert runtime.turning_launches(wider, *GIVEN[1:], -2) is None
    assert runtime.turning_launches(*GIVEN[:4], 65536, *GIVEN[5:], -2) is None
    with batch_invariant():
        assert runtime.turning_launches(*GIVEN, -2) is None
    assert runtime.turning_launches(*GIVEN, -2) is not None
    made[1] = None
    assert runtime.turning_launches(*GIVEN, -3) is None
