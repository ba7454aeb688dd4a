"""Configs and recipes of TileLang stages, for several test files."""

from __future__ import annotations

from gdn2gen.family.problem import Problem
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stages import STAGES


def tilelang_by_chunk(stage: str, problem: Problem, BT: int = 32, chunks: int = 4) -> Config:
    """The config of a stage in TileLang that takes least registers; not of the scans."""
    knobs: dict[str, Knob] = {"num_warps": 4, "num_stages": 1, "chunks": chunks}
    own: dict[str, dict[str, Knob]] = {
        "prepare": {
            "decay": "anchored",
            "BK": problem.K,
            "solve": "halves" if BT == 32 else "ieee",
            "maxnreg": 80 if problem.K in (96, 128) else 64,
        },
        "reprepare": {"BK": problem.K, "maxnreg": 80},
        "sum_decay": {"BK": problem.K},
        "grad_value": {"BV": problem.V, "maxnreg": 80},
        "grad_key": {"decay": "anchored", "BK": 64, "BV": problem.V, "maxnreg": 128},
    }
    config = default_config(stage, problem, BT=BT)
    return config.replace(language="tilelang", **knobs, **own[stage])


def tilelang_config(stage: str, problem: Problem, BT: int = 32) -> Config:
    """The same, and of the scans one that fits beside any other."""
    if STAGES[stage].is_chain:
        config = default_config(stage, problem, BT=BT)
        return config.replace(language="tilelang", BV=64, num_warps=4, num_stages=2)
    return tilelang_by_chunk(stage, problem, BT)


def tilelang_recipe(problem: Problem, plan: str, BT: int = 32) -> Recipe:
    """Every stage in TileLang; of K and V that are 64 or 128."""
    stages = PLANS[plan].stages
    return Recipe.of(problem, plan, {x: tilelang_config(x, problem, BT) for x in stages})
