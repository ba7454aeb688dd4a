"""Switches of the environment: every one reads no, and yes, in the same words."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from source_tree import python_path

from gdn2gen.base import environment
from gdn2gen.nn import _triangles
from gdn2gen.store.surroundings import Surroundings

OFF: Final = ("", "0", "false", "False", "NO", "off")
ON: Final = ("1", "true", "yes", "on")


class OnHopper:
    """Of q, k and v what says that windows may be triangles."""

    shape = (1, 64, 2, 64)
    is_cuda = True
    device = "cuda"


def _triangles_wanted() -> bool:
    x: Any = OnHopper()
    return _triangles.wanted(x, x, x, 32)


SWITCHES: Final[dict[str, Callable[[], bool]]] = {
    "GDN2GEN_UNVERIFIED": lambda: environment.unverified() is not None,
    "GDN2GEN_SLOPES_TOGETHER": environment.slopes_together,
    "GDN2GEN_NORM_PROJECTS": environment.norm_projects,
    "GDN2GEN_BATCH_INVARIANT": environment.is_batch_invariant,
    "GDN2GEN_VERBOSE": environment.verbose,
    "GDN2GEN_STRICT": lambda: Surroundings.of().strict,
    "GDN2GEN_WINDOW_TRIANGLES": _triangles_wanted,
    "TRITON_INTERPRET": environment.interpreted,
}


@pytest.fixture(params=SWITCHES)
def switch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(_triangles, "is_watched", lambda _: False)
    monkeypatch.delenv("GDN2GEN_BATCH_INVARIANT", raising=False)
    monkeypatch.delenv(request.param, raising=False)
    return str(request.param)


def test_a_switch_is_off_in_all_words_for_it(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not SWITCHES[switch]()
    for word in OFF:
        monkeypatch.setenv(switch, word)
        assert not SWITCHES[switch](), word
    for word in ON:
        monkeypatch.setenv(switch, word)
        assert SWITCHES[switch](), word


def test_a_switch_that_is_on_by_itself_is_off_in_the_same_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for word in ("", *ON, "programs"):
        monkeypatch.setenv("GDN2GEN_BOUND", word)
        assert environment.binds_launches(), word
    for word in OFF[1:]:
        monkeypatch.setenv("GDN2GEN_BOUND", word)
        assert not environment.binds_launches(), word


def test_a_switch_of_three_says_nothing_where_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in OFF:
        monkeypatch.setenv("GDN2GEN_GATE_APART", word)
        assert Surroundings.of().gate_apart is (False if word else None), word
    for word in ON:
        monkeypatch.setenv("GDN2GEN_GATE_APART", word)
        assert Surroundings.of().gate_apart is True, word


@pytest.mark.parametrize("word", ["1", "TRUE", "y", "0", "false", "2", " 1", "t"])
def test_the_interpreter_is_on_where_triton_says_so(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else kernels would be launched on tensors of the CPU, or interpreted on those of a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", word)
    said = subprocess.run(
        [sys.executable, "-c", "from triton import knobs; print(knobs.runtime.interpret)"],
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == str(environment.interpreted())
