"""Passes: operands come in the order that the kernels take them in."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
from tilelang_configs import tilelang_anchored

from gdn2gen.config import Config, default_config, language_of
from gdn2gen.problem import Problem
from gdn2gen.render import render
from gdn2gen.stages import STAGES

_PROBLEM = Problem(
    gate="softplus", has_A_log=True, has_dt_bias=True, initial_state=True, final_state=True
)


def _configs() -> list[Config]:
    """The default of every stage, and what there is in TileLang."""
    scans = ("scan", "rescan", "reverse_scan")
    return [
        *(default_config(stage, _PROBLEM) for stage in STAGES),
        *(default_config(stage, _PROBLEM).replace(language="tilelang") for stage in scans),
        *(tilelang_anchored(stage, _PROBLEM) for stage in ("prepare", "grad_key")),
    ]


@pytest.mark.parametrize("config", _configs(), ids=lambda x: f"{x.stage}-{language_of(x)}")
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_launches_take_the_operands_in_their_order(config: Config, packed: bool) -> None:
    """A pass hands the tensors over by position, and the scalars by name."""
    problem = replace(_PROBLEM, varlen=packed)
    tree = ast.parse(render(problem, config.stage, config).source)
    (launch,) = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "launch"]
    stage = STAGES[config.stage]
    assert [x.arg for x in launch.args.args] == [x.name for x in stage.operands(problem)]
    assert {x.arg for x in launch.args.kwonlyargs} == {stage.count, *stage.scalars}
