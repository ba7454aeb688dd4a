"""Recipes of a process as data, and taken by another."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

import gdn2gen
from gdn2gen.base.device import named_device
from gdn2gen.base.errors import DispatchError, InputError
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.runtime import lookup
from gdn2gen.store import pins
from gdn2gen.store.dispatch import Found, find_recipe
from gdn2gen.store.surroundings import surroundings

H200 = named_device("H200")
SMALL = Regime(tokens=64, sequences=1, heads=4)
TRAIN = Regime(tokens=16384, sequences=4, heads=16)
PROBLEM = Problem()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    pins.forget()
    yield
    pins.forget()
    lookup._found.cache_clear()


def _default(**knobs: Any) -> dict[str, Any]:
    """What a rank might give that has no tuned files: the default, at the regime of train4k."""
    recipe = Recipe.default(PROBLEM, arch="sm_90")
    if knobs:
        recipe = recipe.with_config(recipe["scan"].replace(**knobs))
    return {"recipes": [pins.Pin(recipe, TRAIN, "lean", H200.name, "sm_90").document]}


def _run() -> Found:
    """As a call does."""
    found = find_recipe(PROBLEM, TRAIN, H200)
    pins.record(found.recipe, TRAIN, H200, "lean")
    return found


def test_a_call_with_options_runs_what_is_pinned_for_such_calls() -> None:
    """However near the sizes of a recipe that refuses them: a rank that ran both has both."""
    parallel = _default(segments="parallel")["recipes"]
    packed = Problem(varlen=True)
    ran = find_recipe(packed, SMALL, H200).recipe
    far = [pins.Pin(ran, SMALL, "lean", H200.name, "sm_90").document]
    gdn2gen.pin({"recipes": [*parallel, *far]})
    assert find_recipe(PROBLEM, TRAIN, H200).recipe["scan"]["segments"] == "parallel"
    assert find_recipe(packed, TRAIN, H200).recipe == ran
    gdn2gen.pin({"recipes": parallel})
    words = "does not fit the call's .*packed sequences are one segment each"
    with pytest.raises(DispatchError, match=words):
        find_recipe(packed, TRAIN, H200)


def test_looking_is_not_running() -> None:
    gdn2gen.explain("train4k", target="sm_80")
    assert gdn2gen.pin()["recipes"] == []


def test_pins_of_several_architectures_serve_each_its_own() -> None:
    both = _default()
    other = copy.deepcopy(both["recipes"][0]) | {"arch": "sm_80", "gpu": "NVIDIA A100"}
    gdn2gen.pin({"recipes": [other, *both["recipes"]]})
    assert find_recipe(PROBLEM, TRAIN, H200).source == "pinned"


def test_what_one_process_ran_is_what_another_runs() -> None:
    ran = _run()
    given = json.loads(json.dumps(gdn2gen.pin()))
    assert [x["regime"] for x in given["recipes"]] == [TRAIN.key]
    pins.forget()
    gdn2gen.pin(given)
    found = _run()
    assert (found.recipe, found.source) == (ran.recipe, "pinned")
    assert gdn2gen.pin()["recipes"] == given["recipes"]


def test_pins_come_before_what_is_tuned_and_serve_other_sizes_and_arguments() -> None:
    given = _default(num_warps=8)
    before = surroundings()
    gdn2gen.pin(given)
    assert surroundings() != before, "what was looked up before must not be found again"
    wanted = pins.Pin.of_document(given["recipes"][0]).recipe
    assert find_recipe(PROBLEM, SMALL, H200).recipe == wanted
    with_state = Problem(initial_state=True, final_state=True)
    assert find_recipe(with_state, SMALL, H200).recipe.configs == wanted.configs
    assert find_recipe(PROBLEM, TRAIN, H200, level="fast").source != "pinned"
    gdn2gen.pin({})
    assert find_recipe(PROBLEM, TRAIN, H200).source == "exact"


def test_a_recipe_that_ran_otherwise_is_an_error_that_names_both() -> None:
    ran = _run().recipe
    given = _default()
    with pytest.raises(DispatchError) as error:
        gdn2gen.pin(given)
    assert str(ran) in str(error.value)
    assert str(pins.Pin.of_document(given["recipes"][0]).recipe) in str(error.value)
    assert find_recipe(PROBLEM, TRAIN, H200).recipe == ran, "nothing was taken"


def test_another_template_or_gpu_is_an_error_that_names_both() -> None:
    given = _default()
    other = copy.deepcopy(given)
    other["recipes"][0]["templates"]["scan"] = "0123456789abcdef"
    with pytest.raises(DispatchError, match=r"scan of .* template 0123456789abcdef, but .* has"):
        gdn2gen.pin(other)
    gdn2gen.pin(given)
    with pytest.raises(DispatchError, match=r"NVIDIA H200 \(sm_90\), but .* A100.* \(sm_80\)"):
        find_recipe(PROBLEM, TRAIN, named_device("A100"))


def test_strict_pins_refuse_what_they_do_not_name() -> None:
    gdn2gen.pin(_default(), strict=True)
    assert find_recipe(PROBLEM, TRAIN, H200).source == "pinned"
    with pytest.raises(DispatchError, match=r"nothing is pinned for kda .*; pinned are gdn2 K=128"):
        find_recipe(Problem(op="kda"), TRAIN, H200)


def test_strict_pins_that_name_nothing_are_refused() -> None:
    given = gdn2gen.pin()
    assert given["recipes"] == []
    with pytest.raises(InputError, match=r"recipes list none, .*gdn2gen.warmup"):
        gdn2gen.pin(given, strict=True)
    gdn2gen.pin(given)


@pytest.mark.parametrize("broken", [{"plan": "none"}, {"regime": {}}, {"configs": {}}])
def test_what_cannot_be_read_is_refused_by_name(broken: dict[str, Any]) -> None:
    raw = {**_default()["recipes"][0], **broken}
    with pytest.raises(DispatchError, match="a pinned recipe cannot be read: "):
        gdn2gen.pin({"recipes": [raw]})


@pytest.mark.parametrize(
    "given", [{"recipes": None}, {"recipes": [1]}, {"recipe": []}, [1], "recipes"]
)
def test_what_no_process_gave_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"recipes must be what `gdn2gen.pin\(\)` gave"):
        gdn2gen.pin(given)
