"""Members that lack a decay, or erase nothing, have no stage and no operand for what they lack."""

from __future__ import annotations

import pytest

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import LINEAR_OPS, OPS, STEP_OPS, recurrence_named
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.limits import Place
from gdn2gen.kernels.plans import stages_of
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import valid_configs, why_invalid

OF_ERASING = {"A", "Y", "R", "dX", "dT", "dAqk", "k_head", "k_beta", "beta_dot", "dbeta_part"}
OF_DECAY = {"g", "G", "gamma_C", "log_decay", "dg", "dg_part"}


def operands_of(op: str) -> set[str]:
    problem = Problem(op, initial_state=True, final_state=True)
    return {x.name for stage in stages_of(op) for x in STAGES[stage].operands(problem)}


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_nothing_is_launched_for_what_is_not_erased(op: str) -> None:
    assert "grad_value" not in stages_of(op)
    assert not OF_ERASING & operands_of(op)
    config = default_config("grad_value", Problem())
    said = why_invalid(config, Problem(op))
    assert said is not None and said.startswith(f"{op} has no such stage, but prepare")


@pytest.mark.parametrize("op", [op for op in OPS if recurrence_named(op).decay is None])
def test_nothing_is_read_for_what_does_not_decay(op: str) -> None:
    assert not OF_DECAY & operands_of(op)


@pytest.mark.parametrize("op", [op for op in LINEAR_OPS if op not in STEP_OPS])
def test_a_search_varies_no_precision_of_an_inverse(op: str) -> None:
    configs = [*valid_configs("prepare", Place(Problem(op), 32, "sm_90"))]
    assert configs and {x["solve"] for x in configs} == {"ieee"}
    assert {x["language"] for x in configs} == {"triton", "tilelang"}


@pytest.mark.parametrize("op", STEP_OPS)
def test_nothing_of_a_group_is_made_for_each_head(op: str) -> None:
    """Scores, and what of q and k goes through memory, but for the sums over some of its heads."""
    problem = Problem(op, initial_state=True, final_state=True, has_z=True)
    found = {y.name: y for x in stages_of(op) for y in STAGES[x].operands(problem)}
    assert found["scores"].dims == "NT H BT BT"
    assert {name for name, x in found.items() if "HV" in x.dims and "K" in x.dims.split()} == {
        *("h", "dh", "S_seg", "initial_state", "final_state", "dht", "dh0")
    }
