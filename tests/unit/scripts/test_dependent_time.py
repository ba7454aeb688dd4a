"""The script that times launches that depend on programs of the ones before: what it compares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from script_module import load_script

from gdn2gen.base.device import named_device
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape

SHAPE = Shape("1x64x16", 1, 64, 16)


@pytest.fixture(name="script")
def _script(monkeypatch: pytest.MonkeyPatch) -> Any:
    script = load_script("dependent_time")
    monkeypatch.setattr(script, "present_device", lambda: named_device("H200"))
    monkeypatch.setattr(script, "drawn", lambda *_: ({}, {}))
    monkeypatch.setattr(script, "check_quick", lambda _: SimpleNamespace(ok=True))
    return script


def test_what_a_call_runs_beside_the_same_with_the_knob(script: Any) -> None:
    """As it is changed for few chunks."""
    plain, waiting, signalling = script.recipes_of(Problem(final_state=True), SHAPE, "lean")
    assert plain["prepare"]["chunks"] == 1 and plain["scan"]["segments"] == "serial"
    assert waiting["scan"]["pdl"] == signalling["scan"]["pdl"] == "wait"
    assert "pdl" not in waiting["prepare"] and signalling["prepare"]["pdl"] == "signal"
    assert plain == waiting.independent() == signalling.independent()


def test_other_bits_are_told_and_not_timed(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def run_op(*_: Any) -> dict[str, torch.Tensor]:
        calls.append(0)
        return {"o": torch.zeros(1), "dq": torch.tensor(float(len(calls) == 25))}

    monkeypatch.setattr(script, "run_op", run_op)
    recipes = script.recipes_of(Problem(), SHAPE, "lean")
    assert script.differs(Problem(), SHAPE, recipes) == "signal: other bits of dq in call 4"
    assert script.differs(Problem(), SHAPE, recipes) == "" and len(calls) == 25 + 41
