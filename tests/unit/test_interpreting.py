"""Checks that share a process do not see one another, whichever runs first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_check_finds_nothing_of_those_before_it(interpreter: Callable[..., Any]) -> None:
    before = interpreter("interpreting_checks:find")
    left = interpreter("interpreting_checks:leave")
    assert [x for x, y in before.items() if left[x] == y] == [], "all of it can be told"
    assert interpreter("interpreting_checks:find") == before


def test_recipes_of_other_checks_are_none_of_a_checks_own(
    interpreter: Callable[..., Any], tmp_path: Path
) -> None:
    """Both run one problem at the same sizes; the first by a plan without a scan, as its last look
    at what is on file found it."""
    for name in ("torch", "decay"):
        (tmp_path / name).mkdir()
    changes = "torch_checks:recipe_changes_before_the_backward"
    interpreter(changes, "checkpointed", str(tmp_path / "torch"))
    interpreter("expected_decay_checks:expected", str(tmp_path / "decay"), "call")
