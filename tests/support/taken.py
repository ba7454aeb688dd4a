"""Problems of any member, with what its ops cannot be asked for left out."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from gdn2gen.family.problem import Problem, untaken
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.kernels.plans import stages_of

_P = TypeVar("_P", bound=Problem)


def of_op(problem: _P, op: str) -> _P:
    """`problem` of another recurrence."""
    left_out = untaken(op)
    given: dict[str, Any] = {x.name: getattr(problem, x.name) for x in fields(problem)}
    kept = {name: x for name, x in given.items() if name not in left_out}
    return type(problem)(**kept | {"op": op})


def having(problem: _P, stage: str) -> _P:
    """`problem`, or the same of a member that has that stage of plans, by its name, and of head
    dims and batches that the stage serves."""
    narrow = stage.startswith("forward_outside") and problem.K == problem.V == 64
    if (stage.startswith("forward_outside") and not narrow) or stage == "forward_blocks2":
        problem = replace(problem, K=128, V=128)
    if stage == "forward_blocks1":
        problem = replace(problem, K=64, V=64)
    if stage.endswith("_transitions"):
        K, V = (x if x in (64, 128) else 64 for x in (problem.K, problem.V))
        problem = replace(problem, K=K, V=V, varlen=False)
    if stage in stages_of(problem.op):
        return problem
    op = next(x for x in OPS if stage in stages_of(x))
    if problem.gate not in recurrence_named(op).activations:
        problem = replace(problem, gate="none", bound=0, has_A_log=False, has_dt_bias=False)
    return of_op(problem, op)
