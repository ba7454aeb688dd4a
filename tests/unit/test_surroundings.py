"""What surrounds a call of the op changes nothing: hooks, threads, autocast, transforms, tracers.

By the reference and by kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import surroundings_checks

Check = Callable[..., Any]
CHECKS: Final = surroundings_checks


@pytest.mark.parametrize("watched", [False, True], ids=["eager", "watched"])
@pytest.mark.parametrize("layout", ["strided", "shifted"])
def test_hooks_that_lay_out_anew_what_was_saved(layout: str, watched: bool, run: Check) -> None:
    run("hooks", layout, watched)


@pytest.mark.parametrize("change", ["data", "in place"])
def test_cu_seqlens_written_to_before_the_backward(change: str, run: Check) -> None:
    run("cu_seqlens_written_to_before_the_backward", change)


@pytest.mark.parametrize(
    "check",
    [
        "autocast",
        "threads",
        "no_tokens",
        "outputs_are_no_views",
        "vmap_of_nothing",
        "vmap_of_gradients",
        "gradients_in_batches",
        "traced_with_symbols",
        "compiled_lower_bounds",
    ],
)
def test_surroundings(check: str, run: Check) -> None:
    run(check)
