"""Configs of the TileLang prepare and grad_key, for several test files."""

from __future__ import annotations

from gdn2gen.config import Config, Knob, default_config
from gdn2gen.problem import Problem


def tilelang_anchored(stage: str, problem: Problem, BT: int = 32, chunks: int = 4) -> Config:
    """The config of prepare or grad_key in TileLang that takes least registers."""
    knobs: dict[str, Knob] = {"num_warps": 4, "num_stages": 1, "chunks": chunks}
    own: dict[str, Knob] = (
        {"BK": problem.K, "solve": "ieee", "maxnreg": 80}
        if stage == "prepare"
        else {"BK": 64, "BV": problem.V, "maxnreg": 128}
    )
    config = default_config(stage, problem, BT=BT)
    return config.replace(language="tilelang", decay="anchored", **knobs, **own)
