"""Every op in torch.compile: one whole graph for all lengths, on the reference; and opcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import compiled_checks
import pytest

from gdn2gen.family.registry import OPS

# Of the others on a GPU, and what is slow here; of gdn2 see test_torch.py.
QUICK: Final = ("gated_delta_rule",)
CASES: Final = [
    *(
        pytest.param(x, i % 2 == 1, marks=() if x in QUICK else pytest.mark.slow)
        for i, x in enumerate(compiled_checks.PLAIN)
    ),
    *(("mamba2", False), ("mamba2", True), ("parts", False)),
]


@pytest.mark.parametrize(("name", "packed"), CASES)
def test_one_graph_serves_all_lengths(name: str, packed: bool) -> None:
    assert compiled_checks.lengths_of(name, packed) == 1


def test_opcheck_of_parts(interpreter: Callable[..., Any]) -> None:
    interpreter("compiled_checks:opcheck_parts")


@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_backwards(op: str) -> None:
    compiled_checks.opcheck_backward(op)
