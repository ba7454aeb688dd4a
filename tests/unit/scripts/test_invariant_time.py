"""The script that says what batch-invariant mode costs: what it has run on either side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from script_module import load_script

from gdn2gen.base.device import named_device
from gdn2gen.base.environment import is_batch_invariant
from gdn2gen.family.shapes import SHAPES


@pytest.fixture(name="script")
def _script(monkeypatch: pytest.MonkeyPatch) -> Any:
    script = load_script("invariant_time")
    monkeypatch.setattr(script, "present_device", lambda: named_device("H200"))
    monkeypatch.setattr(script, "time_ms", lambda run, *_: run())
    return script


@pytest.fixture(name="timed")
def _timed(script: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What was captured, and under which mode; each takes 2 without it, and 3 with it."""
    captured: list[tuple[str, bool]] = []

    class Time(float):
        median = property(float)

    def replay_of(run: Callable[[], str]) -> Callable[[], Time]:
        captured.append((run(), is_batch_invariant()))
        took = Time(3.0 if is_batch_invariant() else 2.0)
        return lambda: took

    def graph_us(run: Callable[[], str], _: int) -> float:
        captured.append((run(), is_batch_invariant()))
        return 30.0 if is_batch_invariant() else 20.0

    class Step:
        calls = 20

        def __init__(self, op: str, batch: int, *_: Any, **named: Any) -> None:
            self.name = f"{op} {batch}"

        def ours(self) -> Callable[[], str]:
            return lambda: self.name

    monkeypatch.setattr(script, "replay_of", replay_of)
    monkeypatch.setattr(script, "graph_us", graph_us)
    monkeypatch.setattr(script, "Step", Step)
    monkeypatch.setattr(script, "passes", lambda *_: (lambda: "forward", lambda: "both"))
    return captured


def test_either_side_is_captured_in_its_mode(
    script: Any, timed: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        script, "compile_all", lambda given: compiled.extend(x.stage for _, x in given)
    )
    found = [*script.rows(["gdn2"], [SHAPES["train4k"]], ["lean"], [256])]
    assert [x[:5] for x in found] == [
        ["gdn2 train4k lean", "forward, ms", "2.000", "3.000", "1.50"],
        ["gdn2 train4k lean", "forward+backward, ms", "2.000", "3.000", "1.50"],
        ["gdn2 256 sequences", "a token, us", "20.00", "30.00", "1.50"],
    ]
    sides = [(x, y) for x in ("forward", "both") for y in (False, True)]
    assert timed == sides + [("gdn2 256", x) for x in (False, True)] * script.TURNS
    assert not is_batch_invariant()
    assert {"forward", "prepare", "scan"} <= {*compiled}


def test_what_a_call_runs_in_the_mode_serves_any_batch(script: Any) -> None:
    """At train4k another plan than usual, and that of a packed batch."""
    train, packed = SHAPES["train4k"], SHAPES["varlen8k"]
    usual, invariant = script.recipes_of(script.problem_of("gdn2", train), train, "lean")
    assert usual.plan.name == "whole_blocks2" and invariant.plan.name == "lean"
    _, of_packed = script.recipes_of(script.problem_of("gdn2", packed), packed, "lean")
    changed = of_packed["scan"].replace(**{x: y for x, y in invariant["scan"].items()})
    assert of_packed.plan is invariant.plan and changed == invariant["scan"]
