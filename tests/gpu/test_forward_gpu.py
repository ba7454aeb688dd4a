"""The forward in one kernel, through the op: against the reference, the same bits, what it may be
given; its backward is that of the plan that keeps the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from gdn2gen.kernels.outside_blocks import BLOCK_OPS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure.accuracy import public_op, relative_errors
from gdn2gen.measure.check import FULL_REPEATS, check_recipe, check_shapes, full_problem
from gdn2gen.store.dispatch import forced_recipe

pytestmark = pytest.mark.gpu

_TIED: Final = Problem("kda", beta_sigmoid=True, neg_eigval=True, beta_fp32=True)
PROBLEMS: Final = {
    **{"gdn2-128": Problem(), "kda-128": Problem("kda"), "kda-sigmoid": _TIED},
    **{f"{op}-64": Problem(op, K=64, V=64) for op in ("gdn2", "kda")},
    "kda-sigmoid-64": replace(_TIED, K=64, V=64),
    # values in other tiles than keys
    **{
        f"{op}-{K}x{V}": Problem(op, K=K, V=V)
        for op in ("gdn2", "kda")
        for K, V in ((128, 64), (96, 48), (128, 16), (64, 128), (48, 104))
    },
    "kda-sigmoid-128x64": replace(_TIED, V=64),
    **{
        f"{op}-{size}": Problem(op, K=size, V=size)
        for op in ("gated_delta_rule", "delta_rule")
        for size in (64, 128)
    },
    "gated_delta_rule-48": Problem("gated_delta_rule", K=48, V=56, l2norm=False),
    "gated_delta_rule-104": Problem("gated_delta_rule", K=104, V=112, l2norm=False),
}
# Head dims, and groups that prepare beside the one that scans, or in each of two programs.
WIDTHS: Final = [(128, 2), (64, 2), (64, 3)]
APART: Final = [("128x64", 2), ("96x48", 2), ("64x128", 2), ("64x128", 3)]
OPS_OF_WIDTHS: Final = [
    *((op, *width) for op in ("gdn2", "kda", "gated_delta_rule", "delta_rule") for width in WIDTHS),
    *((op, *width) for op in ("gdn2", "kda") for width in APART),
]
CASES: Final = [
    ("gdn2-128", "whole", 2),
    ("gdn2-128", "whole_blocks2", 2),
    ("kda-128", "whole", 2),
    ("kda-128", "whole_blocks2", 2),
    ("kda-sigmoid", "whole", 2),
    ("gdn2-64", "whole", 2),
    ("gdn2-64", "whole", 3),
    ("gdn2-64", "whole_blocks1", 3),
    ("gdn2-64", "whole_blocks2", 3),
    ("kda-64", "whole", 2),
    ("kda-64", "whole_blocks1", 3),
    ("kda-sigmoid-64", "whole", 3),
    ("gated_delta_rule-128", "whole_direct", 2),
    ("gated_delta_rule-104", "whole_direct", 2),
    ("delta_rule-128", "whole_direct", 2),
    ("gated_delta_rule-128", "whole_direct_blocks2_states", 2),
    ("delta_rule-128", "whole_direct_blocks2_states", 2),
    ("gated_delta_rule-64", "whole_direct", 2),
    ("gated_delta_rule-64", "whole_direct", 3),
    ("gated_delta_rule-64", "whole_direct_blocks2", 3),
    ("gated_delta_rule-48", "whole_direct", 3),
    ("delta_rule-64", "whole_direct", 2),
    ("delta_rule-64", "whole_direct", 3),
    ("delta_rule-64", "whole_direct_blocks2", 3),
    ("gated_delta_rule-64", "whole_direct_blocks2_states", 2),
    ("gated_delta_rule-64", "whole_direct_blocks2_states", 3),
    ("gated_delta_rule-48", "whole_direct_blocks2_states", 3),
    ("delta_rule-64", "whole_direct_blocks2_states", 3),
    ("gdn2-64", "whole_blocks1_states", 2),
    ("kda-64", "whole_blocks1_states", 2),
    ("gdn2-128", "whole_blocks2_states", 2),
    ("kda-128", "whole_blocks2_states", 2),
    ("kda-sigmoid", "whole_blocks2_states", 2),
    ("gdn2-128x64", "whole", 2),
    ("gdn2-128x64", "whole_blocks2", 2),
    ("gdn2-128x64", "whole_blocks2_states", 2),
    ("gdn2-96x48", "whole_blocks2", 2),
    ("gdn2-128x16", "whole", 2),
    ("gdn2-64x128", "whole", 2),
    ("gdn2-64x128", "whole_blocks2", 3),
    ("gdn2-48x104", "whole", 3),
    ("gdn2-64x128", "whole_blocks1_states", 2),
    ("kda-128x64", "whole_blocks2", 2),
    ("kda-96x48", "whole_blocks2_states", 2),
    ("kda-sigmoid-128x64", "whole", 2),
    ("kda-48x104", "whole_blocks1", 3),
]


def recipe_of(name: str, plan: str, groups: int) -> Recipe:
    recipe = Recipe.default(full_problem(PROBLEMS[name]), plan, arch=present_device().arch)
    return recipe.with_config(recipe[recipe.plan.forward[0]].replace(num_stages=groups))


@pytest.fixture(scope="module")
def compiled(compile_once: Callable[[str, Kernels], None]) -> None:
    if present_device().arch != "sm_90":
        pytest.skip("its clusters and products are those of sm_90")
    compile_once("forward", kernels_of(recipe_of(*case) for case in CASES))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("name", "plan", "groups"), CASES)
def test_every_output_and_gradient_in_every_pattern(name: str, plan: str, groups: int) -> None:
    recipe = recipe_of(name, plan, groups)
    found = check_recipe(
        recipe,
        patterns=tuple(PATTERNS),
        repeats=FULL_REPEATS,
        shapes=check_shapes(recipe.problem),
    )
    assert found.ok, found.reason


def outputs(op: str, size: int | str, groups: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
    plan = "whole_direct" if op in BLOCK_OPS else "whole"
    with torch.no_grad(), forced_recipe(recipe_of(f"{op}-{size}", plan, groups)):
        o, state = public_op(op)(**given, use_qk_l2norm_in_kernel=True, output_final_state=True)
    return {"o": o, "final_state": state}


# Sequences, tokens, heads of keys and of values: less than a chunk, one, a slot each of four, each
# slot twice with a tail (of seven slots once), and all that a training step has.
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("op", "size", "groups"), OPS_OF_WIDTHS)
@pytest.mark.parametrize(
    ("B", "T", "H", "HV"),
    [(1, 1, 1, 1), (1, 7, 1, 1), (1, 32, 1, 1), (1, 64, 2, 2), (1, 128, 2, 2), (2, 200, 3, 6),
     (2, 1100, 8, 8), (4, 4096, 16, 16)],
)  # fmt: skip
def test_sizes(op: str, size: int | str, groups: int, B: int, T: int, H: int, HV: int) -> None:
    problem = PROBLEMS[f"{op}-{size}"]
    x = make_inputs(
        B, T, H, problem.K, problem.V, op=op, HV=HV, dtype=torch.bfloat16, device="cuda",
        pattern="layer", initial_state=True,
    )  # fmt: skip
    found = outputs(op, size, groups, x)
    exact = {name: value.double() for name, value in x.items()}
    o, state = reference.chunk(
        recurrence_named(op), exact, use_qk_l2norm_in_kernel=True, compute_dtype=torch.float64
    )
    errors = relative_errors(found, {"o": o, "final_state": state})
    assert max(errors.values()) < limit_of("bf16", "layer"), errors


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("op", "size", "groups"), [x for x in OPS_OF_WIDTHS if x[0] != "delta_rule"]
)
def test_a_token_that_forgets_all_moves_no_bit_before_it(
    op: str, size: int | str, groups: int
) -> None:
    """It is in no first frame, so that its chunk is scored frame by frame."""
    problem = PROBLEMS[f"{op}-{size}"]
    x = make_inputs(
        2, 96, 4, problem.K, problem.V, op=op, dtype=torch.bfloat16, device="cuda", pattern="layer",
        initial_state=True,
    )  # fmt: skip
    before = outputs(op, size, groups, x)["o"].clone()
    x["g"][:, 45] = -300.0
    after = outputs(op, size, groups, x)["o"]
    assert torch.equal(before[:, :45], after[:, :45])
    assert not torch.equal(before[:, 46:], after[:, 46:])
