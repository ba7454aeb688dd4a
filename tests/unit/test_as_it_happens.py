"""tests/support/as_it_happens.py: failures of tests on a GPU are printed when they happen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from as_it_happens import AsItHappens

ROOT = Path("/there")


def _printed(outcome: Any, seconds: float, nodeid: str = "tests/gpu/test_a.py::test[x-y]") -> str:
    lines: list[str] = []
    terminal = SimpleNamespace(write_line=lines.append)
    plugins = SimpleNamespace(get_plugin={"terminalreporter": terminal}.get)
    config: Any = SimpleNamespace(rootpath=ROOT, pluginmanager=plugins)
    words = "E  assert 1 == 2" if outcome == "failed" else None
    report = pytest.TestReport(
        nodeid, ("", 0, ""), {}, outcome, words, "call", duration=seconds, start=0, stop=seconds
    )
    AsItHappens(config, ROOT / "tests/gpu").pytest_runtest_logreport(report)
    return "\n".join(lines)


def test_what_failed_and_why() -> None:
    found = _printed("failed", 1.0)
    assert "call failed: tests/gpu/test_a.py::test[x-y]" in found and "assert 1 == 2" in found


def test_what_took_long() -> None:
    assert "took 31 s" in _printed("passed", 31.0)
    assert _printed("passed", 1.0) == ""


def test_other_tests_have_their_summary() -> None:
    assert _printed("failed", 31.0, "tests/unit/test_a.py::test") == ""
