"""Conformance of every head dim: outputs and gradients against fp64, buffers poisoned.

Each test compiles kernels of its own: `pytest -n 10` takes as many minutes as tens of sizes a core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest
import torch
from gpu_support import draw, moved, off, run, sized
from tilelang_configs import tilelang_config, tilelang_recipe

from gdn2gen.family.problem import DIMS, Problem
from gdn2gen.family.shapes import SHAPES
from gdn2gen.kernels.recipe import Recipe, fitted
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.accuracy import run_reference
from gdn2gen.runtime.passes import poisoned
from gdn2gen.store.dispatch import find_recipe

pytestmark = pytest.mark.gpu

# 16 heads: in strong decay db is that of the last token of each head and little else, and of four
# such vectors the error of a draw is 4.5e-3 at the median and 1.2e-2 at worst (30 draws)
SHAPE: Final = sized(1, 333, 16)
PACKED: Final = sized(1, 333, 4, (0, 0, 100, 101, 333))
# 100 chunks of 16 tokens: segments that run side by side start from one another
LONG: Final = sized(1, 1600, 2)
PAIRS: Final = (
    *((64, 128), (128, 64), (96, 192), (192, 96), (128, 256), (256, 512), (80, 112), (48, 16)),
    *((16, 512), (256, 16), (104, 40), (24, 344)),
)
SQUARES: Final = tuple((size, size) for size in DIMS["K"])
SOME: Final = (
    (16, 16),
    (40, 40),
    (80, 112),
    (96, 96),
    (96, 192),
    (160, 160),
    (192, 96),
    (256, 256),
)


def problem_of(op: str, size: tuple[int, int], **fields: object) -> Problem:
    given = {"initial_state": True, "final_state": True, **fields}
    return Problem(op=op, K=size[0], V=size[1], **given)  # type: ignore[arg-type]


def check(recipe: Recipe, *patterns: str, shape: object = SHAPE) -> None:
    for pattern in patterns:
        inputs, grads = draw(recipe.problem, shape, pattern)  # type: ignore[arg-type]
        exact = run_reference(recipe.problem, inputs, grads)
        with poisoned():
            results = run(recipe, inputs, grads)
        assert results.keys() == exact.keys()
        assert not off(results, exact, recipe.problem, pattern), pattern


def named(sizes: tuple[tuple[int, int], ...]) -> dict[str, object]:
    return {"argvalues": sizes, "ids": [f"K{K}-V{V}" for K, V in sizes]}


@pytest.mark.parametrize("size", **named(SQUARES + PAIRS))
def test_every_size_in_bf16(size: tuple[int, int]) -> None:
    recipe = Recipe.default(problem_of("gdn2", size))
    check(recipe, "layer", "strong", "mixed", "zero")
    inputs, grads = draw(recipe.problem, SHAPE)
    first = run(recipe, inputs, grads)
    assert not any(moved(first, run(recipe, inputs, grads)) for _ in range(3))


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("size", **named(SOME))
def test_the_other_dtypes(size: tuple[int, int], dtype: str) -> None:
    check(Recipe.default(problem_of("gdn2", size, dtype=dtype), "fast"), "layer", "mixed")


@pytest.mark.parametrize("size", **named(SOME))
def test_a_second_member(size: tuple[int, int]) -> None:
    check(Recipe.default(problem_of("kda", size), "states"), "layer", "strong")


@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize("size", **named(SOME))
def test_gates_packed_batches_and_transposed_states(size: tuple[int, int], op: str) -> None:
    gates = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True}
    problem = problem_of(op, size, varlen=True, state_v_first=True, **gates)
    check(Recipe.default(problem), "layer", shape=PACKED)


@pytest.mark.parametrize("size", **named(SOME))
def test_segments_side_by_side(size: tuple[int, int]) -> None:
    recipe = Recipe.default(problem_of("gdn2", size), "fast", 16)
    chains = [x for x in recipe.configs if STAGES[x.stage].selector == "segments"]
    check(recipe.with_config(*(x.replace(segments="parallel") for x in chains)), "zero", shape=LONG)


# Partial slices of channels and of values, frames beside them, and what only a whole tile serves;
# then tiles that reach past a head dim.
TILED: Final = (
    *((96, 96), (96, 160), (160, 64), (192, 192), (256, 256), (128, 384), (256, 512)),
    *((16, 40), (40, 136), (72, 72), (112, 112), (184, 200)),
)


@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize("size", **named(TILED))
def test_tilelang(size: tuple[int, int], op: str) -> None:
    recipe = tilelang_recipe(problem_of(op, size), "lean")
    served = [x for x in recipe.configs if x["language"] == "tilelang"]
    assert len(served) >= len(recipe.configs) - 2
    check(recipe, "layer", "strong", "mixed", "zero", "sparse")
    inputs, grads = draw(recipe.problem, SHAPE)
    first = run(recipe, inputs, grads)
    assert not any(moved(first, run(recipe, inputs, grads)) for _ in range(3))


@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize("size", **named(TILED))
def test_tilelang_packed_with_gates_and_states(size: tuple[int, int], op: str) -> None:
    gates = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True}
    problem = problem_of(op, size, varlen=True, state_v_first=True, **gates)
    check(tilelang_recipe(problem, "states"), "layer", "strong", shape=PACKED)


def wide_recipe(problem: Problem, plan: str) -> Recipe:
    """Scans of 128 rows, two warp groups, and two programs of prepare to a multiprocessor."""
    recipe = tilelang_recipe(problem, plan)
    chains = [x for x in recipe.configs if STAGES[x.stage].is_chain]
    prepare = recipe["prepare"].replace(maxnreg=128)
    return recipe.with_config(prepare, *(x.replace(BV=128) for x in chains))


@pytest.mark.parametrize("plan", ["lean", "states"])
@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize(
    "size", **named(((160, 160), (192, 192), (256, 256), (152, 200), (232, 136), (256, 512)))
)
def test_tilelang_of_wide_heads(size: tuple[int, int], op: str, plan: str) -> None:
    recipe = wide_recipe(problem_of(op, size), plan)
    check(recipe, "layer", "strong", "mixed", "zero", "sparse")
    inputs, grads = draw(recipe.problem, SHAPE)
    first = run(recipe, inputs, grads)
    assert not any(moved(first, run(recipe, inputs, grads)) for _ in range(3))


@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize("size", **named(((160, 160), (248, 248), (256, 256))))
def test_tilelang_of_wide_heads_packed_with_gates(size: tuple[int, int], op: str) -> None:
    gates = {"gate": "softplus", "has_A_log": True, "has_dt_bias": True}
    problem = problem_of(op, size, varlen=True, state_v_first=True, **gates)
    check(wide_recipe(problem, "lean"), "layer", "strong", shape=PACKED)


@pytest.mark.parametrize("K", [24, 56, 80, 104, 112, 176, 216, 248])
def test_what_a_call_finds(K: int) -> None:
    """What is tuned for wider heads, in tiles that reach past these."""
    problem = problem_of("gdn2", (K, K))
    found = find_recipe(problem, SHAPES["train4k"].regime)
    check(found.recipe, "layer", "strong", "mixed")


# Below tiles of 64 and of 128, of which blocks in TileLang and the forward in one kernel are.
BELOW: Final = (
    *((40, 40), (48, 48), (56, 56), (104, 104), (112, 112), (120, 120)),
    *((112, 128), (48, 64)),
)
# By more than the 32 channels of other tiles: a call finds what is tuned for them, or a default.
FAR_BELOW: Final = (
    *((16, 16), (24, 24), (32, 32), (72, 72), (80, 80), (88, 88), (96, 96)),
    *((96, 128), (24, 64)),
)
# Values in other tiles than keys: the forward in one kernel, which an entry alone takes there.
APART: Final = ((128, 64), (96, 48), (72, 64), (128, 16), (64, 128), (48, 104), (16, 72))
BELOW_PLANS: Final = tuple(
    (size, plan)
    for size in BELOW + FAR_BELOW + APART
    for plan in (
        *("whole_blocks1", "whole_blocks2", "blocks2"),
        *("whole_blocks1_states", "whole_blocks2_states"),
    )
    # of 64 channels one, and one of 128
    if not plan.endswith("_states") or ("1" in plan) == (size[0] <= 64)
    if size[1] > 32 or plan != "blocks2"  # whose forward's scan has tiles of 32 there
)


def in_tiles(problem: Problem, plan: str) -> Recipe:
    """Every stage in TileLang that has a form there."""
    recipe = Recipe.default(problem, plan, arch="sm_90")
    ours = [x for x in recipe.plan.stages if any(y.language == "tilelang" for y in STAGES[x].forms)]
    return recipe.with_config(*(tilelang_config(x, problem) for x in ours))


def of_tiles(problem: Problem) -> Problem:
    """The same with head dims that fill the tiles."""
    K, V = (64 if x <= 64 else 128 for x in (problem.K, problem.V))
    return replace(problem, K=K, V=V)


@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize(
    ("size", "plan"), BELOW_PLANS, ids=[f"K{K}-V{V}-{plan}" for (K, V), plan in BELOW_PLANS]
)
def test_blocks_of_head_dims_below_their_tiles(size: tuple[int, int], plan: str, op: str) -> None:
    recipe = in_tiles(problem_of(op, size), plan)
    assert all(why_invalid(x, recipe.problem, "sm_90") is None for x in recipe.configs)
    check(recipe, "layer", "strong", "mixed", "zero", "sparse")
    inputs, grads = draw(recipe.problem, SHAPE)
    first = run(recipe, inputs, grads)
    assert not any(moved(first, run(recipe, inputs, grads)) for _ in range(3))


def with_tiles(recipe: Recipe, tiles: int) -> Recipe:
    """Whole head dims in tiles of other steps, in every stage that has such."""
    others = (fitted(x.replace(tile_step=tiles), recipe.problem, "sm_90") for x in recipe.configs)
    return recipe.with_config(*(x for x in others if "tile_step" in x))


@pytest.mark.parametrize("make", [tilelang_recipe, wide_recipe])
@pytest.mark.parametrize("op", ["gdn2", "kda"])
@pytest.mark.parametrize("size", **named(((160, 160), (136, 200), (224, 224))))
def test_tiles_of_64_channels(
    size: tuple[int, int], op: str, make: Callable[[Problem, str], Recipe]
) -> None:
    recipe = with_tiles(make(problem_of(op, size), "lean"), 64)
    assert {x.stage for x in recipe.configs if "tile_step" in x} > {
        "scan",
        "rescan",
        "reverse_scan",
    }
    check(recipe, "layer", "strong", "mixed", "zero")
    inputs, grads = draw(recipe.problem, SHAPE)
    first = run(recipe, inputs, grads)
    assert not any(moved(first, run(recipe, inputs, grads)) for _ in range(3))


@pytest.mark.parametrize(
    ("plan", "scan"),
    [("whole_blocks1", "rescan_blocks1"), ("whole_blocks2", "rescan_blocks2"),
     ("blocks2_states", "scan_blocks2")],
)  # fmt: skip
@pytest.mark.parametrize("size", **named(((96, 96), (72, 96))))
def test_tiles_of_96_channels_in_scans_of_blocks(
    size: tuple[int, int], plan: str, scan: str
) -> None:
    recipe = with_tiles(in_tiles(problem_of("gdn2", size), plan), 32)
    every = scan.removeprefix("re").removeprefix("scan_")
    assert "tile_step" in recipe[scan] and "tile_step" in recipe[f"reverse_scan_{every}"]
    check(recipe, "layer", "strong", "mixed", "zero")


@pytest.mark.parametrize("size", **named(((48, 48), (104, 112), (24, 32), (96, 72))))
def test_segments_of_blocks_below_their_tiles(size: tuple[int, int]) -> None:
    recipe = in_tiles(problem_of("gdn2", size), "blocks2_states")
    chains = [x for x in recipe.configs if STAGES[x.stage].selector == "segments"]
    parallel = recipe.with_config(*(x.replace(segments="parallel") for x in chains))
    check(parallel, "zero", "mixed", shape=sized(1, 3200, 2))


@pytest.mark.parametrize("level", ["lean", "fast"])
@pytest.mark.parametrize("size", **named(BELOW))
def test_what_is_tuned_for_full_tiles_serves_below_their_tiles(
    size: tuple[int, int], level: str
) -> None:
    """The configs that were found at 64 and 128, as they are; a call finds them."""
    problem, regime = problem_of("gdn2", size), SHAPES["train4k"].regime
    tuned = find_recipe(of_tiles(problem), regime, level=level).recipe
    recipe = tuned.fitted(problem, "sm_90")
    assert tuned.plan.every and (recipe.plan, recipe.configs) == (tuned.plan, tuned.configs)
    assert find_recipe(problem, regime, level=level).recipe == recipe
    check(recipe, "layer", "strong", "mixed")


@pytest.mark.parametrize("level", ["lean", "fast"])
@pytest.mark.parametrize("size", **named(FAR_BELOW))
def test_what_is_tuned_for_full_tiles_can_serve_far_below_them(
    size: tuple[int, int], level: str
) -> None:
    """Outside of blocks with tiles that are no wider than these head dims need."""
    problem, regime = problem_of("gdn2", size), SHAPES["train4k"].regime
    tuned = find_recipe(of_tiles(problem), regime, level=level).recipe
    recipe = tuned.fitted(problem, "sm_90")
    assert tuned.plan.every and recipe.plan == tuned.plan
    pairs = zip(tuned.configs, recipe.configs, strict=True)
    assert all(a == b or a["language"] == "triton" or a.stage == "prepare" for a, b in pairs)
    assert all(a.form is b.form for a, b in pairs)
    check(recipe, "layer", "strong", "mixed")


@pytest.mark.parametrize(
    ("make", "size", "plan"),
    [
        (Recipe.default, (40, 72), "lean"),
        (tilelang_recipe, (40, 72), "lean"),
        (in_tiles, (40, 56), "whole_blocks1"),
        (in_tiles, (56, 40), "whole_blocks1_states"),
        (in_tiles, (104, 120), "whole_blocks2"),
        (in_tiles, (72, 96), "whole_blocks2"),
        (in_tiles, (24, 16), "whole_blocks1_states"),
        (in_tiles, (96, 72), "whole_blocks2_states"),
        (in_tiles, (96, 48), "whole_blocks2"),
        (in_tiles, (104, 24), "whole_blocks2_states"),
        (in_tiles, (48, 104), "whole_blocks1_states"),
    ],
)
def test_what_lies_behind_a_tensor_is_neither_read_nor_written(
    make: Callable[[Problem, str], Recipe], size: tuple[int, int], plan: str
) -> None:
    """Inputs and gradients in the middle of NaN; a head's channels past its own are the next's."""
    problem = replace(problem_of("gdn2", size), final_state=False, initial_state=False)
    recipe = make(problem, plan)
    inputs, grads = draw(problem, SHAPE)

    def embedded(x: torch.Tensor) -> torch.Tensor:
        room = torch.full((x.numel() + 512,), float("nan"), dtype=x.dtype, device=x.device)
        room[256:-256] = x.flatten()
        return room[256:-256].view(x.shape)

    expected = run(recipe, inputs, grads)
    inside = {name: embedded(x) for name, x in inputs.items()}
    with poisoned():
        found = run(recipe, inside, {name: embedded(x) for name, x in grads.items()})
    assert not moved(expected, found)
