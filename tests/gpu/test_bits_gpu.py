"""What has to hold bit for bit: repetition, causality, documents apart, buffers written in full."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from gpu_support import (
    DEFAULTS,
    DEVICE,
    LEVELS,
    PROBLEMS,
    at_levels,
    draw,
    moved,
    recipe_of,
    run,
    sized,
    states_of,
    tokens_of,
)

from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.shapes import Shape
from gdn2gen.measure.accuracy import op_flags, public_op
from gdn2gen.measure.case_runs import run_case
from gdn2gen.measure.cases import Case
from gdn2gen.runtime.passes import poisoned
from gdn2gen.store.dispatch import forced_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

# Fewer calls, or fewer blocks than fill the GPU twice over, have hidden races.
REPEATS = 30
# 8 * 32 = 256 programs even in a scan that takes a whole head.
MANY_BLOCKS = sized(8, 509, 32)
MANY_DOCUMENTS = sized(1, 4072, 32, tuple(range(0, 4073, 509)))
# Empty ones, one token, just under, at and just over the chunks, and long ones.
DOCUMENTS = (0, 0, 1, 64, 128, 128, 193, 225, 1000, 2011, 2011)
FEW_HEADS = 3
RAGGED = sized(2, 333, 3)
RAGGED_DOCUMENTS = sized(1, 333, 3, (0, 0, 100, 101, 333))
# Every recipe of one problem of each op.
RECIPES = [
    *(("bf16", level) for level in (*LEVELS, *DEFAULTS)),
    *at_levels("kda", "gdn", "delta", "gla", "simple-gla"),
]


def shape_for(name: str, dense: Shape, packed: Shape) -> Shape:
    return packed if PROBLEMS[name].varlen else dense


@pytest.mark.parametrize(("name", "level"), at_levels(*PROBLEMS))
def test_thirty_calls_agree(name: str, level: str) -> None:
    check_repeats(name, level)


@pytest.mark.parametrize("level", DEFAULTS)
def test_thirty_calls_of_the_default_agree(level: str) -> None:
    check_repeats("bf16", level)


@pytest.mark.parametrize(("name", "level"), RECIPES)
def test_a_call_that_wants_no_gradient_gives_the_same_bits(name: str, level: str) -> None:
    """Its serial scan goes through three segments as one."""
    recipe = recipe_of(name, level)
    inputs, grads = draw(recipe.problem, sized(2, 2200, FEW_HEADS))
    kept = run(recipe, inputs, grads)
    with forced_recipe(recipe), torch.no_grad():
        op = public_op(recipe.problem.op)
        o, state = op(**inputs, **op_flags(recipe.problem), output_final_state=True)
    assert state is not None
    assert not moved({"o": o, "final_state": state}, {x: kept[x] for x in ("o", "final_state")})


def check_repeats(name: str, level: str) -> None:
    recipe = recipe_of(name, level)
    inputs, grads = draw(recipe.problem, shape_for(name, MANY_BLOCKS, MANY_DOCUMENTS), "layer")
    first = run(recipe, inputs, grads)
    assert all(x.isfinite().all() for x in first.values())
    for call in range(2, REPEATS + 1):
        assert not moved(first, run(recipe, inputs, grads)), f"call {call}"


@pytest.mark.parametrize(("name", "level"), RECIPES)
@pytest.mark.parametrize("T", [22, 300])
def test_the_future_is_not_seen(T: int, name: str, level: str) -> None:
    """Case 5: change token 21 of 22 (or one within a chunk); all before it must not move."""
    recipe = recipe_of(name, level)
    case = Case("causality", recipe.problem, sized(2, T, 4), check="causality")
    with forced_recipe(recipe):
        result = run_case(case, DEVICE)
    assert result.passed, result.message


@pytest.mark.parametrize(("name", "level"), at_levels("packed", "kda-packed", "gla-packed"))
def test_documents_do_not_see_each_other(name: str, level: str) -> None:
    """Change one document throughout, gradients of its outputs included: no other may move."""
    recipe = recipe_of(name, level)
    shape = sized(1, DOCUMENTS[-1], FEW_HEADS, DOCUMENTS)
    inputs, grads = draw(recipe.problem, shape)
    n = DOCUMENTS.index(225)
    start, end = DOCUMENTS[n], DOCUMENTS[n + 1]
    other = {name: x.clone() for name, x in (inputs | grads).items()}
    for x in tokens_of(other, start, end).values():
        x.mul_(0.5)
    for x in states_of(other, n).values():
        x.mul_(-2.0)
    before = run(recipe, inputs, grads)
    after = run(recipe, {x: other[x] for x in inputs}, {x: other[x] for x in grads})
    for first, last in ((0, start), (end, DOCUMENTS[-1])):
        assert not moved(tokens_of(before, first, last), tokens_of(after, first, last))
    # o, and a gradient of each input
    expected = 1 + len(recurrence_named(recipe.problem.op).required)
    assert len(moved(tokens_of(before, start, end), tokens_of(after, start, end))) == expected
    for m in set(range(len(DOCUMENTS) - 1)) - {n}:
        assert not moved(states_of(before, m), states_of(after, m)), m


@pytest.mark.parametrize(("name", "level"), at_levels("packed", "kda-packed"))
@pytest.mark.parametrize("alone", ["packed", "dense"])
def test_packed_is_one_sequence_at_a_time(alone: str, name: str, level: str) -> None:
    """Bit for bit, and not to rounding: chunks start with their document either way.

    Against a packed batch of one document, which runs the same binary; and against a dense call,
    whose kernels differ in the addresses only.
    """
    packed = recipe_of(name, level)
    dense = replace(packed, problem=replace(packed.problem, varlen=False))
    recipe = packed if alone == "packed" else dense
    shape = sized(1, DOCUMENTS[-1], FEW_HEADS, DOCUMENTS)
    inputs, grads = draw(packed.problem, shape)
    together = run(packed, inputs, grads)
    for n, (start, end) in enumerate(pairwise(DOCUMENTS)):
        one = tokens_of(inputs, start, end) | states_of(inputs, n)
        if alone == "packed":
            one["cu_seqlens"] = torch.tensor([0, end - start], device=DEVICE)
        seeds = tokens_of(grads, start, end) | states_of(grads, n)
        expected = tokens_of(together, start, end) | states_of(together, n)
        assert not moved(run(recipe, one, seeds), expected), f"document {n}: {start} to {end}"


@pytest.mark.parametrize("pattern", ["layer", "mixed"])
@pytest.mark.parametrize(("name", "level"), at_levels(*PROBLEMS))
def test_nothing_is_left_unwritten(name: str, level: str, pattern: str) -> None:
    """With NaN in every buffer beforehand, the bits are those of a call without."""
    recipe = recipe_of(name, level)
    inputs, grads = draw(recipe.problem, shape_for(name, RAGGED, RAGGED_DOCUMENTS), pattern)
    clean = run(recipe, inputs, grads)
    with poisoned():
        poisonous = run(recipe, inputs, grads)
    assert not moved(clean, poisonous)


@pytest.mark.parametrize("name", ["bf16", "kda", "gdn"])
def test_a_batch_row_is_what_it_is_alone(name: str) -> None:
    """Results do not depend on what else is in the batch."""
    recipe = recipe_of(name, "lean")
    inputs, grads = draw(recipe.problem, sized(5, 333, 4))
    together = run(recipe, inputs, grads)
    for n in range(5):
        one = {name: x[n : n + 1] for name, x in inputs.items()}
        seeds = {name: x[n : n + 1] for name, x in grads.items()}
        expected = {name: x[n : n + 1] for name, x in together.items()}
        assert not moved(run(recipe, one, seeds), expected), f"row {n}"
