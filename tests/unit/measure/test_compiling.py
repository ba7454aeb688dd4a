"""Kernels compiled side by side: each once, and what no compiler takes is said."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Final

import pytest

from gdn2gen.base.device import named_device
from gdn2gen.base.outcome import BUILD_ERROR, OK, Outcome
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.measure import compiling

H200: Final = named_device("H200")
SOUND: Final = default_config("prepare", Problem())
WRONG: Final = SOUND.replace(num_warps=4)


class Compilers:
    """In this process."""

    asked: list[Config]
    slots: int

    def __init__(self, slots: int) -> None:
        type(self).asked, type(self).slots = [], slots

    def submit(self, _: str, *given: Any, timeout: float) -> Future[Outcome[None]]:
        config = given[2]
        self.asked.append(config)
        done: Future[Outcome[None]] = Future()
        done.set_result(Outcome(OK) if config == SOUND else Outcome(BUILD_ERROR, detail="ptxas"))
        return done

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "CompilePool", Compilers)
    monkeypatch.setattr(compiling, "present_device", lambda: H200)


def test_what_no_compiler_takes_is_said_and_returned(capsys: pytest.CaptureFixture[str]) -> None:
    given = [(Problem(), x) for x in (SOUND, WRONG, SOUND)]
    assert compiling.compile_side_by_side(given, H200) == {WRONG: "build error: ptxas"}
    assert Compilers.asked == [SOUND, WRONG]
    assert capsys.readouterr().err == ""
    assert compiling.compile_all(given) == {WRONG}
    assert capsys.readouterr().err == "build error: ptxas\n"
    assert compiling.compile_all([(Problem(), SOUND)]) == set() == compiling.compile_all([])
    assert capsys.readouterr().err == ""


def test_no_more_processes_than_there_are_kernels() -> None:
    compiling.compile_side_by_side([(Problem(), SOUND)], H200, 16)
    assert Compilers.slots == 1
