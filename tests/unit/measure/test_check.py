"""The check lets the reference through, and nothing that is wrong, partial or unsteady."""

from __future__ import annotations

import pytest
import torch
from reference_op import ReferenceOp

from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.measure import check
from gdn2gen.measure.timing import call_of
from gdn2gen.ops import chunk

PROBLEM = Problem(K=32, V=64, dtype="fp32")
SHAPES = (Shape("ragged", 1, 41, 2), Shape("even", 2, 32, 1))


def right(*args, output_final_state, **kwargs):
    """The reference under the signature of the op: what the check must let through."""
    o, state = ReferenceOp("gdn2")(*args, **kwargs)
    return o, state if output_final_state else None


def checked(problem=PROBLEM, shapes=SHAPES, repeats=3):
    recipe = Recipe.default(problem, "lean")
    return check.check_recipe(
        recipe, patterns=("layer", "sparse"), repeats=repeats, shapes=shapes, device="cpu"
    )


def replace_op(monkeypatch, change):
    def changed(*args, **kwargs):
        o, state = right(*args, **kwargs)
        return change(o), state

    monkeypatch.setattr(chunk, "chunk_gdn2", changed)


@pytest.fixture(autouse=True)
def op(monkeypatch):
    monkeypatch.setattr(chunk, "chunk_gdn2", right)


def test_the_reference_passes_with_every_output_named():
    result = checked(check.full_problem(PROBLEM))
    assert result.ok, result.reason
    names = {"o", "final_state", "dq", "dk", "dv", "dg", "db", "dw", "dinitial_state"}
    assert set(result.errors) == names


def test_packed_batches_and_gates_in_the_kernel_pass():
    packed = Problem(K=32, V=32, dtype="fp32", varlen=True)
    assert checked(packed, check.TINY_PACKED).ok
    gated = Problem(K=32, V=32, dtype="fp32", gate="softplus", has_A_log=True, has_dt_bias=True)
    result = checked(gated)
    assert result.ok and {"dA_log", "ddt_bias"} <= set(result.errors)


def test_a_wrong_output_is_named_with_error_pattern_and_size(monkeypatch):
    replace_op(monkeypatch, lambda o: o * 1.05)
    result = checked()
    assert not result.ok
    assert "o is off by 5.00e-02" in result.reason
    assert "layer" in result.reason and "1x41x2" in result.reason


def test_nan_in_one_element_is_seen(monkeypatch):
    def poke(o):
        mask = torch.zeros_like(o)
        mask[0, -1, 0, 0] = float("nan")
        return o + mask

    replace_op(monkeypatch, poke)
    assert not checked().ok


def test_a_wrong_gradient_is_seen(monkeypatch):
    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return dx * 1.01

    replace_op(monkeypatch, Skewed.apply)
    result = checked()
    assert not result.ok and "dq" in result.reason


def test_results_that_change_between_calls_are_seen(monkeypatch):
    calls = []

    def drift(o):
        calls.append(None)
        return o * (1 + 1e-6 * (len(calls) % 2))

    replace_op(monkeypatch, drift)
    result = checked()
    assert not result.ok and "not deterministic" in result.reason


def test_the_second_size_has_blocks_enough_for_races():
    for problem in (Problem(), Problem(varlen=True)):
        _, shape = check.check_shapes(problem)
        assert shape.regime.sequences * shape.H >= 256
        ragged, _ = check.check_shapes(problem)
        assert all(ragged.T % BT for BT in (16, 32, 64))


def test_parallel_scans_are_gated_where_a_transition_is_taken(monkeypatch):
    """What is wrong only past the first two segments is seen at the size made for it."""
    default = Recipe.default(PROBLEM, "lean", 16)
    assert check.segmented_shape(default) is None
    scan = default.by_stage["scan"].replace(segments="parallel", BV=16, max_segments=64)
    recipe = default.with_config(scan)
    shape = check.segmented_shape(recipe)
    call = call_of(PROBLEM, shape, torch.device("cpu"))
    NS, segment = call.segments(recipe.BT, scan.size("max_segments"))
    assert NS == 4 and 0 < -(-shape.T // recipe.BT) - (NS - 1) * segment < segment
    start = 2 * segment * recipe.BT

    def wrong(o):
        return torch.cat([o[:, :start], o[:, start:] * 1.01], 1)

    replace_op(monkeypatch, wrong)
    found = check.check_recipe(
        recipe,
        patterns=("layer",),
        repeats=1,
        shapes=SHAPES,
        segmented=shape,
        device="cpu",
    )
    assert not found.ok and f"layer, 1x{shape.T}x2" in found.reason
