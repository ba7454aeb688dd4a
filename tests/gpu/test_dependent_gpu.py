"""Launches that begin before the one before them has ended, and prepare whose programs take chunks
until none is left: the bits of the same recipe without, wherever one kernel could overtake another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from gpu_support import (
    Kernels,
    Tensors,
    draw,
    kernels_of,
    moved,
    other_stream,
    recipe_of,
    sized,
)

from gdn2gen.base.device import present_device
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.measure.accuracy import public_op, run_op
from gdn2gen.measure.check import forced
from gdn2gen.runtime.passes import poisoned

pytestmark = pytest.mark.gpu

# Each is some ten kernels to compile.
RECIPES: Final = (
    ("bf16", "lean"),
    ("bf16", "tilelang states"),
    ("packed", "tilelang lean"),
    ("kda", "tilelang lean"),
    ("gdn-packed", "default direct"),
    ("gla", "tilelang linear"),
)
MORE: Final = (
    ("bf16", "default fast"),
    ("bf16", "default blocks1"),
    ("fp32", "default lean"),
    ("packed", "default fast"),
    ("kda-packed", "tilelang lean"),
    ("gdn", "tilelang direct"),
    ("simple-gla-packed", "default linear_direct"),
)
EVERY: Final = (*RECIPES, *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE))
# A few programs, which end soon; more chunks than programs that run at once; 40 segments, packed.
SHAPES: Final = {"few": sized(1, 40, 2), "many": sized(2, 2500, 16), "long": sized(1, 9000, 2)}
LENGTHS: Final = (0, 1, 1, 1300, 1301, 2400, 2500)
TURNS: Final = 20


def resident(recipe: Recipe) -> Recipe:
    """With a prepare that takes chunks until none is left, where it can."""
    prepare = recipe["prepare"]
    if prepare["language"] != "tilelang":
        return recipe
    found = prepare.replace(chunks=1, programs="resident")
    served = why_invalid(found, recipe.problem, present_device().arch) is None
    return recipe.with_config(found) if served else recipe


def pair(name: str, level: str) -> tuple[Recipe, Recipe]:
    plain = recipe_of(name, level)
    other = resident(plain.dependent(present_device().arch))
    assert other != plain
    return plain, other


@pytest.fixture(scope="module")
def compiled(compile_once: Callable[[str, Kernels], None]) -> None:
    compile_once("dependent", kernels_of(x for one in RECIPES for x in pair(*one)))


def run(recipe: Recipe, inputs: Tensors, grads: Tensors) -> Tensors:
    with forced(recipe):
        return run_op(public_op(recipe.problem.op), recipe.problem, inputs, grads)


def shape_of(problem: Problem, size: str) -> Shape:
    shape = SHAPES[size]
    if not problem.varlen:
        return shape
    T = shape.B * shape.T
    return sized(1, T, shape.H, tuple(x * T // LENGTHS[-1] for x in LENGTHS))


def drawn(problem: Problem, size: str) -> list[tuple[Tensors, Tensors]]:
    return [draw(problem, shape_of(problem, size), x) for x in ("mixed", "layer", "zero")]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(("name", "level"), EVERY)
def test_calls_in_a_row_on_memory_that_is_used_again(name: str, level: str, size: str) -> None:
    """Whose buffers the last call has just freed; inputs are written just before, and outputs are
    read and freed just after."""
    plain, other = pair(name, level)
    given = drawn(plain.problem, size)
    expected = [run(plain, *x) for x in given]
    with other_stream():
        for turn in range(TURNS):
            inputs, grads = given[turn % len(given)]
            copies = {key: x.clone() for key, x in inputs.items()}
            results = run(other, copies, grads)
            assert not moved(expected[turn % len(given)], results), turn
    with poisoned():
        assert not moved(expected[0], run(other, *given[0]))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(("name", "level"), EVERY)
def test_graphs(name: str, level: str, size: str) -> None:
    """Of two calls one after the other, replayed without a pause on other contents."""
    plain, other = pair(name, level)
    given = drawn(plain.problem, size)
    expected = [run(plain, *x) for x in given]
    inputs, grads = ({key: x.clone() for key, x in y.items()} for y in given[0])
    with other_stream():
        for _ in range(3):
            run(other, inputs, grads)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [run(other, inputs, grads) for _ in range(2)]
    for turn in range(TURNS):
        wanted = given[turn % len(given)]
        for into, source in zip((inputs, grads), wanted, strict=True):
            for key, x in into.items():
                x.copy_(source[key])
        for results in held:
            for x in results.values():
                x.fill_(torch.nan)
        graph.replay()
        for results in held:
            assert not moved(expected[turn % len(given)], results), turn
