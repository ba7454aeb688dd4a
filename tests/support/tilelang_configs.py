"""Configs and recipes of TileLang stages, for several test files."""

from __future__ import annotations

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import LINEAR_OPS, OUTSIDE_OPS
from gdn2gen.kernels.config import Config, default_config
from gdn2gen.kernels.languages import PANEL, TILED_BY
from gdn2gen.kernels.limits import Knob, rounded_up
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid


def tilelang_by_chunk(stage: str, problem: Problem, BT: int = 32, chunks: int = 4) -> Config:
    """The config of a stage in TileLang that takes least registers; not of the scans.

    Of wider heads as many as there are: fewer would spill.
    """
    K, V = (rounded_up(x, TILED_BY) for x in (problem.K, problem.V))
    whole = rounded_up(problem.K, PANEL)
    knobs: dict[str, Knob] = {"num_warps": 4, "num_stages": 1, "chunks": chunks}
    decay = "outside" if problem.op in OUTSIDE_OPS else "anchored"
    halves = BT == 32 and problem.op not in LINEAR_OPS
    own: dict[str, dict[str, Knob]] = {
        "prepare": {
            "decay": decay,
            "BK": K,
            "solve": "halves" if halves else "ieee",
            "maxnreg": 80 if K in (96, 128) else 64,
        },
        "reprepare": {"BK": K, "maxnreg": 80},
        "sum_decay": {"BK": K},
        "grad_value": {"BV": V, "maxnreg": 80},
        "grad_key": {"decay": decay, "BK": 64, "BV": V, "maxnreg": 128},
        "grad_blocks1": {"decay": decay, "BK": 64, "maxnreg": 128},
        "grad_blocks2": {"decay": decay, "BK": whole, "maxnreg": 128 if whole == 64 else 168},
    }
    if decay == "outside":
        own["grad_blocks1"] = own["grad_blocks2"] = {"decay": decay, "BK": K, "maxnreg": 168}
    config = default_config(stage, problem, BT=BT)
    config = config.replace(language="tilelang", **knobs, **own[stage])
    wide = "maxnreg" in config and max(K, V) > 128
    return config.replace(maxnreg=0) if wide else config


def tilelang_config(stage: str, problem: Problem, BT: int = 32) -> Config:
    """The same, of the scans one that fits beside any other, and of what has one form alone it."""
    if {x.language for x in STAGES[stage].forms} != {"triton", "tilelang"}:
        return default_config(stage, problem, BT=BT, arch="sm_90")
    if STAGES[stage].is_chain:
        config = default_config(stage, problem, BT=BT)
        return config.replace(language="tilelang", BV=64, num_warps=4, num_stages=2)
    return tilelang_by_chunk(stage, problem, BT)


def tilelang_recipe(problem: Problem, plan: str, BT: int = 32) -> Recipe:
    """Every stage in TileLang; where it has no form for these head dims, the default."""

    def config(stage: str) -> Config:
        wanted = tilelang_config(stage, problem, BT)
        served = why_invalid(wanted, problem, "sm_90") is None
        return wanted if served else default_config(stage, problem, BT=BT)

    return Recipe.of(problem, plan, {x: config(x) for x in PLANS[plan].stages})
