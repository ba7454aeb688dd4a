"""Problems of any member, with what its ops cannot be asked for left out."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from gdn2gen.family.problem import Problem, untaken

_P = TypeVar("_P", bound=Problem)


def of_op(problem: _P, op: str) -> _P:
    """`problem` of another recurrence."""
    left_out = untaken(op)
    given: dict[str, Any] = {x.name: getattr(problem, x.name) for x in fields(problem)}
    kept = {name: x for name, x in given.items() if name not in left_out}
    return type(problem)(**kept | {"op": op})
