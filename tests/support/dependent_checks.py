"""Recipes whose launches depend on programs of the ones before, in Triton's interpreter."""

from __future__ import annotations

import torch

from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import public_op, run_op
from gdn2gen.measure.check import drawn, forced


def same_bits(op: str, plan: str) -> str:
    """Waits change nothing of what is computed, forward and backward."""
    problem = Problem(op, K=16, V=16, initial_state=True, final_state=True)
    recipe = Recipe.default(problem, plan, 16)
    given = drawn(problem, Shape("tiny", 1, 20, 1), "layer", "cpu")
    results = []
    for chosen in (recipe, recipe.dependent()):
        with forced(chosen):
            results.append(run_op(public_op(op), problem, *given))
    one, other = results
    assert recipe.distance(recipe.dependent()) == len(recipe.configs)
    assert one.keys() == other.keys() and len(one) > 6
    for name, x in one.items():
        assert torch.equal(x, other[name]), name
    return "the same"
