"""Which configs serve calls with every option, and what those calls are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tilelang_configs import tilelang_config, tilelang_recipe

from gdn2gen.family.problem import Problem, gate_parameters
from gdn2gen.family.registry import OPS, RECURRENCES
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.options import calls_of, serves_every_option
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.validity import why_invalid

PARALLEL = default_config("scan", Problem()).replace(segments="parallel")


@pytest.mark.parametrize("op", OPS)
def test_calls_have_each_option_that_an_op_takes_and_all_together(op: str) -> None:
    member = RECURRENCES[op]
    calls = calls_of(Problem(op))
    assert {x.gate for x in calls} == {*member.activations}
    assert {x.l2norm for x in calls} == ({True, False} if member.normalises else {False})
    assert len({x.gate_dtype for x in calls}) == (1 if member.decay is None else 3)
    for name in ("varlen", "initial_state", "final_state"):
        assert {getattr(x, name) for x in calls} == {True, False}
    assert {x.neg_eigval for x in calls} == {False, member.activates_beta}
    every = calls[-1]
    assert every.varlen and every.initial_state and every.beta_sigmoid == member.activates_beta
    assert all({**x.key, "op": op} == x.key and (x.K, x.V) == (128, 128) for x in calls)


def test_under_a_bound_there_is_one_gate() -> None:
    bounded = Problem(gate="sigmoid", bound=2)
    assert {(x.gate, x.bound) for x in calls_of(bounded)} == {("sigmoid", 2)}
    config = default_config("prepare", bounded).replace(decay="bounded")
    assert why_invalid(config, bounded) is None
    # keys that come as they are, not normalised, leave its factors less room
    assert not serves_every_option(config, bounded)
    assert serves_every_option(config, replace(bounded, bound=1))


@pytest.mark.parametrize(
    ("config", "serves"),
    [
        (default_config("scan", Problem()), True),
        (tilelang_config("scan", Problem()), True),
        (tilelang_config("prepare", Problem()), True),
        (tilelang_config("grad_key", Problem()), True),
        (default_config("grad_blocks2", Problem()), True),
        (PARALLEL, False),  # no packed sequences
        (tilelang_config("grad_blocks2", Problem()), False),  # nor gates
        (tilelang_config("scan_blocks2", Problem()), False),
        (default_config("forward", Problem()), False),
    ],
)
def test_what_serves_them_all(config: Config, serves: bool) -> None:
    assert serves_every_option(config, Problem()) == serves
    # whichever call of the same key is asked about
    packed = Problem(varlen=True, initial_state=True)
    assert serves_every_option(config, packed) == serves
    refused = [x for x in calls_of(Problem()) if why_invalid(config, x) is not None]
    assert bool(refused) != serves


@pytest.mark.parametrize("op", OPS)
def test_default_recipes_serve_every_option(op: str) -> None:
    """But those of plans that name another one instead. So there is always one to be filed."""
    for plan in RECURRENCES[op].plans:
        recipe = Recipe.default(Problem(op, **gate_parameters(op, "none")), plan, arch="sm_90")
        assert recipe.serves_every_option == (not PLANS[plan].instead)


def test_one_stage_is_enough_to_refuse_some() -> None:
    assert tilelang_recipe(Problem(), "lean").serves_every_option
    blocks = Recipe.default(Problem(), "blocks2")
    assert blocks.serves_every_option
    few = blocks.with_config(tilelang_config("grad_blocks2", Problem()))
    assert not few.serves_every_option
    assert not Recipe.default(Problem()).with_config(PARALLEL).serves_every_option
