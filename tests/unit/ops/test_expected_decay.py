"""What a call expects of its decay, through eager mode, checkpoints, tracers and serving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    "ways",
    [
        ("call", "process", "checkpointed"),
        ("compiled",),
        pytest.param(("compiled and told",), marks=pytest.mark.slow),
    ],
    ids=", ".join,
)
def test_it_chooses_the_kernels_of_both_passes(
    ways: tuple[str, ...], tmp_path: Path, interpreter: Callable[..., Any]
) -> None:
    interpreter("expected_decay_checks:expected", str(tmp_path), *ways)


def test_it_chooses_those_of_serving(tmp_path: Path, interpreter: Callable[..., Any]) -> None:
    interpreter("expected_decay_checks:serving", str(tmp_path))
