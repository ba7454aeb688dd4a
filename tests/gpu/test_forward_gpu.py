"""The forward in one kernel, through the op: against the reference, the same bits, what it may be
given; its backward is that of the plan that keeps the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
import torch
from gpu_support import Kernels, kernels_of
from torch import Tensor

from gdn2gen.base.device import present_device
from gdn2gen.family import reference
from gdn2gen.family.inputs import PATTERNS, make_inputs
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.tolerances import limit_of
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import public_op, relative_errors
from gdn2gen.measure.check import FULL_REPEATS, check_recipe, check_shapes, full_problem
from gdn2gen.store.dispatch import forced_recipe

pytestmark = pytest.mark.gpu

_TIED: Final = Problem("kda", beta_sigmoid=True, neg_eigval=True, beta_fp32=True)
PROBLEMS: Final = {"gdn2": Problem(), "kda": Problem("kda"), "kda-sigmoid": _TIED}
CASES: Final = [
    ("gdn2", "whole"),
    ("gdn2", "whole_blocks2"),
    ("kda", "whole"),
    ("kda", "whole_blocks2"),
    ("kda-sigmoid", "whole"),
]


def recipe_of(name: str, plan: str) -> Recipe:
    return Recipe.default(full_problem(PROBLEMS[name]), plan, arch=present_device().arch)


@pytest.fixture(scope="module")
def compiled(compile_once: Callable[[str, Kernels], None]) -> None:
    if present_device().arch != "sm_90":
        pytest.skip("its clusters and products are those of sm_90")
    compile_once("forward", kernels_of(recipe_of(*case) for case in CASES))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("name", "plan"), CASES)
def test_every_output_and_gradient_in_every_pattern(name: str, plan: str) -> None:
    recipe = recipe_of(name, plan)
    found = check_recipe(
        recipe,
        patterns=tuple(PATTERNS),
        repeats=FULL_REPEATS,
        shapes=check_shapes(recipe.problem),
    )
    assert found.ok, found.reason


def outputs(op: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad(), forced_recipe(recipe_of(op, "whole")):
        o, state = public_op(op)(**given, use_qk_l2norm_in_kernel=True, output_final_state=True)
    return {"o": o, "final_state": state}


# Sequences, tokens, heads of keys and of values: less than a chunk, one, a slot each, each slot
# twice with a tail, and all that a training step has.
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize(
    ("B", "T", "H", "HV"),
    [(1, 1, 1, 1), (1, 7, 1, 1), (1, 32, 1, 1), (1, 64, 2, 2), (1, 128, 2, 2), (2, 200, 3, 6),
     (2, 1100, 8, 8), (4, 4096, 16, 16)],
)  # fmt: skip
def test_sizes(op: str, B: int, T: int, H: int, HV: int) -> None:
    x = make_inputs(
        B, T, H, 128, 128, op=op, HV=HV, dtype=torch.bfloat16, device="cuda", pattern="layer",
        initial_state=True,
    )  # fmt: skip
    found = outputs(op, x)
    exact = {name: value.double() for name, value in x.items()}
    o, state = reference.chunk(
        recurrence_named(op), exact, use_qk_l2norm_in_kernel=True, compute_dtype=torch.float64
    )
    errors = relative_errors(found, {"o": o, "final_state": state})
    assert max(errors.values()) < limit_of("bf16", "layer"), errors


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("op", ["gdn2", "kda"])
def test_a_token_that_forgets_all_moves_no_bit_before_it(op: str) -> None:
    """It is in no first frame, so that its chunk is scored frame by frame."""
    x = make_inputs(
        2, 96, 4, 128, 128, op=op, dtype=torch.bfloat16, device="cuda", pattern="layer",
        initial_state=True,
    )  # fmt: skip
    before = outputs(op, x)["o"].clone()
    x["g"][:, 45] = -300.0
    after = outputs(op, x)["o"]
    assert torch.equal(before[:, :45], after[:, :45])
    assert not torch.equal(before[:, 46:], after[:, 46:])
