"""Recipes of small prefills: what the words of a command make of what a call runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from script_module import load_script

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import ConfigError
from gdn2gen.family import reference
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.store.dispatch import find_recipe

H200 = named_device("H200")
SHAPE = Shape("1x1024x16", 1, 1024, 16)


@pytest.fixture(name="script")
def _script() -> Any:
    return load_script("prefill_recipes")


def usual(op: str) -> Recipe:
    problem = Problem(op, 128, 128, final_state=True)
    return find_recipe(problem, SHAPE.regime, H200, level="lean").recipe


def test_knobs_of_stages_are_changed(script: Any) -> None:
    plain = usual("gdn2")
    found = script.recipe_of(plain, H200, ["prepare:chunks=2", "scan:num_stages=2"])
    assert found["prepare"] == plain["prepare"].replace(chunks=2)
    assert found["scan"] == plain["scan"].replace(num_stages=2)
    assert script.recipe_of(plain, H200, []) == plain
    for words, said in (
        (["rescan:num_stages=2"], "of prepare, scan"),
        (["prepare:maxnreg=64"], "four do not fit"),
        (["chunks=2"], "STAGE:KNOB"),
    ):
        with pytest.raises(ConfigError, match=said):
            script.recipe_of(plain, H200, words)


@pytest.mark.parametrize("op", ["gdn2", "kda", "gated_delta_rule", "simple_gla"])
def test_chunks_of_64_keep_language_and_form(script: Any, op: str) -> None:
    plain = usual(op)
    found = script.recipe_of(plain, H200, ["BT=64"])
    for stage in plain.plan.forward:
        assert found[stage]["BT"] == 64
        assert why_invalid(found[stage], plain.problem, "sm_90") is None
        assert found[stage].form is plain[stage].form
    assert found["scan"]["segments"] == "serial"


def test_where_a_form_has_no_such_chunks_the_default_stands_in(script: Any) -> None:
    plain = usual("gla")
    assert plain["prepare"]["decay"] == "centred"
    found = script.recipe_of(plain, H200, ["BT=64"])
    assert found["prepare"]["decay"] == "anchored" and found["scan"]["language"] == "tilelang"


def test_what_is_wrong_is_told(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off from the reference; and other bits in another call."""
    shape, recipe = Shape("1x40x1", 1, 40, 1), usual("gdn2")
    monkeypatch.setattr(
        script, "inputs_of",
        lambda *_: make_inputs(1, 40, 1, 16, 16, op="gdn2", dtype=torch.bfloat16),
    )  # fmt: skip
    calls: list[int] = []

    def op(factor: float, moved: float) -> Any:
        def call(**given: Any) -> Any:
            calls.append(0)
            flags = {x: given.pop(x) for x in ("output_final_state",)}
            del flags
            doubles = {
                x: y.double() if isinstance(y, torch.Tensor) else y for x, y in given.items()
            }
            names = {x.name for x in recurrence_named("gdn2").inputs}
            inputs = {x: y for x, y in doubles.items() if x in names}
            options = {x: y for x, y in doubles.items() if x not in names}
            o, state = reference.chunk(
                recurrence_named("gdn2"), inputs, **options, compute_dtype=torch.float64
            )
            return o * factor, state + moved * len(calls)

        return call

    for factor, moved, said in (
        (1.0, 0.0, ""),
        (1.5, 0.0, "layer: o is off by 5.0e-01 of 1e-02"),
        (1.0, 1e-9, "layer: final_state has other bits in another call"),
    ):
        calls.clear()
        monkeypatch.setattr(script, "public_op", lambda _, x=factor, y=moved: op(x, y))
        assert script.why_wrong(recipe, shape) == said
