"""Segments whose transitions are kept for the backward, shorter segments, and a shorter chain over
them, through the op: every output and gradient in every pattern, and the same bits again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
import torch
from gpu_support import Kernels, kernels_of

from gdn2gen.base.device import present_device
from gdn2gen.family.inputs import PATTERNS
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.extras import EXTRAS
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.accuracy import public_op, run_op
from gdn2gen.measure.check import (
    FULL_REPEATS,
    check_recipe,
    check_shapes,
    drawn,
    forced,
    full_problem,
    segmented_shape,
)

pytestmark = pytest.mark.gpu

PROBLEMS: Final = {
    "gdn2": Problem(),
    "kda": Problem("kda", beta_sigmoid=True),
    "gdn2-64": Problem(K=64, V=64),
    **{x: Problem(x) for x in ("gated_delta_rule", "delta_rule")},
}
_WIDE: Final[dict[str, Knob]] = {"language": "tilelang", "BV": 128, "num_stages": 3}
_NARROW: Final[dict[str, Knob]] = {"language": "tilelang", "BV": 64, "num_stages": 2}
_TRITON: Final[dict[str, Knob]] = {"language": "triton", "BV": 64, "num_stages": 2}
# Knobs of the scans that can have them; the other stages are at their defaults.
CASES: Final = [
    ("gdn2", "blocks2_transitions", _WIDE | {"merge": "cut", "max_segments": 264}),
    ("gdn2", "blocks2_transitions", _TRITON),
    ("gdn2", "blocks2_states_transitions", _WIDE),
    ("gdn2", "blocks2_states_transitions", _NARROW | {"merge": "near"}),
    ("kda", "blocks2_transitions", _NARROW | {"max_segments": 264}),
    ("kda", "blocks2_states_transitions", _WIDE | {"merge": "cut"}),
    ("gdn2-64", "blocks2_states_transitions", _NARROW | {"merge": "cut"}),
    ("gated_delta_rule", "direct_blocks2_transitions", _WIDE | {"merge": "cut"}),
    ("gated_delta_rule", "direct_blocks2_states_transitions", _NARROW),
    ("gated_delta_rule", "direct_blocks2_transitions", _NARROW | {"reach": 64}),
    ("gated_delta_rule", "direct_blocks2_transitions", _WIDE | {"reach": 32, "merge": "cut"}),
    ("gated_delta_rule", "direct_blocks2_states_transitions", _NARROW | {"reach": 100}),
    ("gated_delta_rule", "direct_blocks2", _TRITON | {"segments": "parallel", "reach": 64}),
    ("gated_delta_rule", "direct_blocks2", _NARROW | {"segments": "parallel", "reach": 64}),
    ("delta_rule", "direct_blocks2_transitions", _NARROW | {"max_segments": 264}),
    ("gdn2", "states", _NARROW | {"segments": "parallel", "merge": "cut", "max_segments": 264}),
    ("gdn2", "lean", _TRITON | {"segments": "parallel", "merge": "near"}),
]


def recipe_of(name: str, plan: str, knobs: dict[str, Knob]) -> Recipe:
    arch = present_device().arch
    recipe = Recipe.default(full_problem(PROBLEMS[name]), plan, arch=arch)
    for config in (x for x in recipe.configs if "segments" in x):
        known = {*STAGES[config.stage].domains, *EXTRAS}
        given = {x: y for x, y in knobs.items() if x in known}
        changed = config.replace(**given)
        if why_invalid(changed, recipe.problem, arch) is not None:  # it makes no transitions
            changed = config.replace(**{x: y for x, y in given.items() if x not in EXTRAS})
        if why_invalid(changed, recipe.problem, arch) is None:
            recipe = recipe.with_config(changed)
    return recipe


@pytest.fixture(scope="module")
def compiled(compile_once: Callable[[str, Kernels], None]) -> None:
    if present_device().arch != "sm_90":
        pytest.skip("programs of two warp groups are those of sm_90")
    compile_once("transitions", kernels_of(recipe_of(*case) for case in CASES))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("name", "plan", "knobs"), CASES)
def test_every_output_and_gradient_in_every_pattern(
    name: str, plan: str, knobs: dict[str, Knob]
) -> None:
    recipe = recipe_of(name, plan, knobs)
    found = check_recipe(
        recipe,
        patterns=tuple(PATTERNS),
        repeats=FULL_REPEATS,
        shapes=check_shapes(recipe.problem),
        segmented=segmented_shape(recipe),
    )
    assert found.ok, found.reason


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda x: x[1])
def test_many_segments_have_the_same_bits_again(case: tuple[str, str, dict[str, Knob]]) -> None:
    """Of 8 heads of 8192 tokens, and 2 sequences of 5000, whose last segment is shorter."""
    recipe = recipe_of(*case)
    op = public_op(recipe.problem.op)
    for B, T, H in ((1, 8192, 8), (2, 5000, 16)):
        inputs, grads = drawn(recipe.problem, Shape(f"{B}x{T}x{H}", B, T, H), "layer", "cuda")
        with forced(recipe):
            first = run_op(op, recipe.problem, inputs, grads)
            for _ in range(20):
                again = run_op(op, recipe.problem, inputs, grads)
                assert all(torch.equal(x, again[name]) for name, x in first.items())
        assert all(x.isfinite().all() for x in first.values())
