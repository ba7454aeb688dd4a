"""The script that times whole passes: what it makes of its words."""

from __future__ import annotations

from typing import Any

import pytest
from script_module import load_script

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import ConfigError
from gdn2gen.family.problem import Problem
from gdn2gen.kernels.recipe import Recipe

H200 = named_device("H200")


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("recipe_times")


def made(script: Any, *words: str, shape: str = "long32k") -> Recipe:
    recipe: Recipe = script.recipe_of(Problem(), script.one_shape(shape), H200, words)
    return recipe


def test_recipes_stand_between_signs(script: Any) -> None:
    words = ["lean", "pdl=wait", "+", "fast", "+", "+"]
    assert [*script.split(words)] == [["lean", "pdl=wait"], ["fast"]]


def test_a_level_is_what_is_on_file(script: Any) -> None:
    filed = made(script, "fast")
    assert filed.level == "fast" and filed == made(script, filed.plan.name)
    changed = made(script, "fast", "prepare:chunks=8")
    assert changed.distance(filed) == 1 and changed["prepare"]["chunks"] == 8


def test_variants_have_the_knobs_of_what_they_vary(script: Any) -> None:
    filed, found = made(script, "fast"), made(script, "blocks2_states_transitions")
    apart = made(script, "blocks2_states")
    assert found.plan.name == "blocks2_states_transitions"
    for stage in apart.plan.stages:
        own = found.by_stage.get(stage) or found[f"{stage}_transitions"]
        assert all(apart[stage][name] == x for name, x in own.items()), (stage, filed)


def test_a_knob_alone_is_for_all_that_can_have_it(script: Any) -> None:
    found = made(script, "lean", "pdl=signal", shape="few8k")
    have = [x.stage for x in found.configs if x.get("pdl") == "signal"]
    assert "prepare" in have and found.plan.stages[-1] not in have
    assert found.independent() == made(script, "lean", shape="few8k")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lean", "grad_group:heads=8"), "has the stages"),
        (("lean", "prepare:chunks"), "name=value"),
        (("blocks2", "prepare:maxnreg=64"), "four do not fit"),
    ],
)
def test_other_words_are_refused(script: Any, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(script, *words)
