"""The script that compares predicted and measured ranks: its reading of tables, and the ranks."""

from __future__ import annotations

from typing import Any

import pytest
from script_module import load_script

from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import default_config


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("prediction")


@pytest.mark.parametrize(
    ("measured", "expected"),
    [([1.0, 2.0, 9.0, 10.0], 1.0), ([4.0, 3.0, 2.0, 1.0], -1.0), ([1.0, 3.0, 2.0, 4.0], 0.8)],
)
def test_ranks_and_not_sizes_are_compared(
    script: Any, measured: list[float], expected: float
) -> None:
    assert script.rank_correlation([0.1, 0.2, 0.3, 0.4], measured) == pytest.approx(expected)


def test_both_kinds_of_tables_are_read(script: Any) -> None:
    config = default_config("scan", Problem())
    written = [{"stage": "scan", "config": str(config), "ms": 1.0}]
    refused = {"config": dict(config), "ms": None, "refused": "wrong"}
    assert list(script.timed({"rows": written})) == [(config, 1.0)]
    table = {"stage": "scan", "rows": [{"config": dict(config), "ms": 2.0}, refused]}
    assert list(script.timed(table)) == [(config, 2.0)]
