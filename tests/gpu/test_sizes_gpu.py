"""Sizes at which 32-bit offsets wrap and grids reach their cap."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, PROBLEMS, draw, moved, recipe_of, run, sized
from torch import Tensor

from gdn2gen.kernels.recipe import Recipe
from gdn2gen.ops.chunk import chunk_gdn2
from gdn2gen.store.dispatch import forced_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu_alone,
    pytest.mark.usefixtures("kernels", "whole_memory"),
]

# B T H K = 2.29e9 elements; the last row of the batch starts just past 2^31.
WRAP = sized(16, 17477, 64)
WRAP_GB = 100
# 2050 * 32 = 65600 programs: past the 65535 of a grid's second and third dim.
DOCUMENTS, TOKENS, HEADS = 2050, 16, 32
MANY_GB = 60


def need_memory(gigabytes: int) -> None:
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    if total < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, and there are {total / 1e9:.0f}")


def forward(recipe: Recipe, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    call: dict[str, Any] = inputs
    with torch.no_grad(), forced_recipe(recipe):
        o, state = chunk_gdn2(**call, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert state is not None
    return {"o": o, "final_state": state}


def test_case_6_offsets_past_32_bits() -> None:
    """The last row of the batch gives the bits that it gives alone."""
    need_memory(WRAP_GB)
    recipe = recipe_of("bf16", "lean")
    last = WRAP.B - 1
    row = WRAP.T * WRAP.H * recipe.problem.K
    assert last * row > 2**31
    inputs, _ = draw(recipe.problem, WRAP, "layer")
    together = {name: x[last:].clone() for name, x in forward(recipe, inputs).items()}
    alone = forward(recipe, {name: x[last:].clone() for name, x in inputs.items()})
    assert all(x.isfinite().all() and x.any() for x in alone.values())
    assert not moved(together, alone)


@pytest.mark.parametrize("level", ["lean", "fast"])
def test_case_7_more_documents_than_a_grid_dim_holds(level: str) -> None:
    """Forward and backward of the documents packed, against the same as a dense batch."""
    need_memory(MANY_GB)
    packed = recipe_of("packed", level)
    dense = replace(packed, problem=PROBLEMS["bf16"])
    ends = tuple(range(0, DOCUMENTS * TOKENS + 1, TOKENS))
    inputs, grads = draw(packed.problem, sized(1, ends[-1], HEADS, ends), "layer")
    together = run(packed, inputs, grads)
    rows = {name: by_document(x, name) for name, x in inputs.items() if name != "cu_seqlens"}
    seeds = {name: by_document(x, name) for name, x in grads.items()}
    apart = run(dense, rows, seeds)
    assert all(x.isfinite().all() for x in apart.values())
    assert not moved({name: by_document(x, name) for name, x in together.items()}, apart)


def by_document(x: Tensor, name: str) -> Tensor:
    """[1, documents * tokens, ...] -> [documents, tokens, ...]; states are so already."""
    return x if "state" in name else x.view(DOCUMENTS, TOKENS, *x.shape[2:])
