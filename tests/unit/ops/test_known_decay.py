"""Calls that are known, told of their decay in every way: which word they were known by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from faked_driver import Driver, faked
from recorded_launches import FLAGS, make

from gdn2gen import chunk_gdn2, expected_decay
from gdn2gen.base.decay import VARIABLE
from gdn2gen.base.errors import InputError
from gdn2gen.ops import _call

WAYS: tuple[tuple[str | None, str | None, str | None, str], ...] = (
    (None, None, None, "weak"),
    ("strong", None, None, "strong"),
    (None, "strong", None, "strong"),
    (None, None, "strong", "strong"),
    ("weak", "strong", "strong", "weak"),
    (None, "weak", "strong", "weak"),
)
"""What the call says, the process, and the environment; and what holds."""


@pytest.fixture(name="driver")
def _driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    monkeypatch.delenv(VARIABLE, raising=False)
    yield from faked(monkeypatch, tmp_path, [0])


@pytest.fixture(name="words")
def _words(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of calls that were known."""
    words, run = [], _call._Ready.run

    def noting(self: Any, *given: Any, **named: Any) -> Any:
        words.append(self._decay)
        return run(self, *given, **named)

    monkeypatch.setattr(_call._Ready, "run", noting)
    return words


def test_a_known_call_runs_what_its_word_asks_for(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make()

    def call(own: Any, process: str | None, environment: str | None) -> None:
        with monkeypatch.context() as patch, torch.no_grad():
            if environment is not None:
                patch.setenv(VARIABLE, environment)
            with nullcontext() if process is None else expected_decay(process):
                chunk_gdn2(**inputs, **FLAGS, expected_decay=own)

    for turn in range(4):
        for own, process, environment, holds in WAYS:
            words.clear()
            call(own, process, environment)
            assert words == ([holds] if words or turn else [])
    assert words
    for wrong in ("Weak", "", ["weak"], 1):
        with pytest.raises(InputError, match="expected_decay"):
            call(wrong, None, None)
    with pytest.raises(InputError, match=VARIABLE):
        call(None, None, "mild")
    words.clear()
    call(None, None, None)
    assert words == ["weak"]


def test_a_call_is_known_by_the_word_that_it_ran_by(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another thread says something else as soon as the call was asked what it is."""
    inputs, key_of, elsewhere = make(), _call.short_key, expected_decay("strong")

    def overtaken(*given: Any) -> Any:
        found = key_of(*given)
        thread = Thread(target=elsewhere.__enter__)
        thread.start()
        thread.join()
        return found

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(_call, "short_key", overtaken)
            chunk_gdn2(**inputs, **FLAGS)
        elsewhere.__exit__(None, None, None)
        for _ in range(2):
            chunk_gdn2(**inputs, **FLAGS)
    assert words == ["weak", "weak"]
