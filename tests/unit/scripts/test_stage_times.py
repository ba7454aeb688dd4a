"""The script that times single stages: what it makes of its words."""

from __future__ import annotations

from typing import Any

import pytest
from script_module import load_script

from gdn2gen.base.errors import ConfigError
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.recipe import Recipe


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("stage_times")


def test_the_stage_named_alone_leaves_its_default(script: Any) -> None:
    tilelang = "language=tilelang,chunks=16,maxnreg=128"
    given = ["grad_blocks1", f"grad_blocks1:{tilelang}", "rescan_blocks1:num_stages=1"]
    found = list(script.recipes(Problem(), "blocks1", given, "sm_90"))
    base = Recipe.default(Problem(), "blocks1", arch="sm_90")
    assert [stage for stage, _ in found] == ["grad_blocks1", "grad_blocks1", "rescan_blocks1"]
    assert [recipe.distance(base) for _, recipe in found] == [0, 3, 1]
    assert found[1][1]["grad_blocks1"]["language"] == "tilelang"


def test_a_member_is_timed_as_layers_call_it(script: Any) -> None:
    """Mamba-2 with D and z, and in chunks that are asked for."""
    assert script.problem_of("gdn2") == Problem()
    problem = script.problem_of("mamba2")
    assert (problem.K, problem.V, problem.has_D, problem.has_z) == (128, 64, True, True)
    ((_, recipe),) = script.recipes(problem, "grouped", ["grad_group:BT=32,heads=8"], "sm_90")
    assert recipe.BT == 32 and recipe["grad_group"]["heads"] == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("grad_key", "blocks1 has the stages"),
        ("grad_blocks1:chunks", "name=value"),
        ("grad_blocks1:language=tilelang,BK=32", "takes BK of 64"),
    ],
)
def test_other_words_are_refused(script: Any, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(script.recipes(Problem(), "blocks1", [given], "sm_90"))
