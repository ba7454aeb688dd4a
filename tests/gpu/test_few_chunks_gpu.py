"""What a call of few chunks runs: the recipe on file for larger sizes, changed for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpu_support import PROBLEMS, Kernels, draw, kernels_of, levels_of, off, run, sized

from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import run_reference
from gdn2gen.runtime.passes import poisoned
from gdn2gen.store.dispatch import find_recipe

pytestmark = pytest.mark.gpu

# 16 chunks of 32 tokens a head, the last one not full
SHAPE = sized(1, 500, 8)
NAMES = ("bf16", "kda", "gdn", "delta", "gla", "simple-gla")


def recipes(name: str) -> dict[str, Recipe]:
    """By level."""
    return {
        level: find_recipe(PROBLEMS[name], SHAPE.regime, level=level).recipe
        for level in levels_of(name)
        if " " not in level  # plans that a test asks for by name are nobody's choice
    }


@pytest.fixture(scope="module")
def compiled(compile_once: Callable[[str, Kernels], None]) -> None:
    wanted = kernels_of(recipe for name in NAMES for recipe in recipes(name).values())
    compile_once("few-chunks", wanted)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", NAMES)
def test_against_the_reference(name: str) -> None:
    inputs, grads = draw(PROBLEMS[name], SHAPE, "layer")
    exact = run_reference(PROBLEMS[name], inputs, grads)
    for level, recipe in recipes(name).items():
        assert recipe.for_few(SHAPE.regime) == recipe
        with poisoned():
            results = run(recipe, inputs, grads)
        assert not off(results, exact, PROBLEMS[name], "layer"), level
