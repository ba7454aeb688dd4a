"""PrefillProblem: whole sequences for serving, whose states at given tokens are kept on the way.

Words: a *slot* is one sequence's state in a *pool* of them (see `decoding`). A *checkpoint* is the
state between two tokens of a sequence, every n tokens, for a cache of prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from gdn2gen.family.problem import Problem

# Keywords of the ops over whole sequences that are of serving.
PREFILL_KEYWORDS: Final = (
    "state_pool",
    "ssm_state_indices",
    "has_initial_state",
    "null_slot",
    "checkpoint_every_n_tokens",
    "checkpoint_state_indices",
)
# Tokens from one state to the next of `return_intermediate_states`, as in
# flash-linear-attention; and what checkpoints come at multiples of: all chunks end there.
INTERMEDIATE_TOKENS: Final = 64


@dataclass(frozen=True, order=True)
class PrefillProblem(Problem):
    """One recurrence over whole sequences, forward, as the stage that makes states is compiled."""

    checkpoints: str = ""
    """dtype of the states that are kept on the way; empty where none are."""
    odd_slots: bool = False
    """They do not begin at multiples of 8 elements, which vector stores want."""

    @classmethod
    def of(cls, problem: Problem, checkpoints: str, odd_slots: bool) -> PrefillProblem:
        given = {x.name: getattr(problem, x.name) for x in fields(Problem)}
        return cls(**given, checkpoints=checkpoints, odd_slots=odd_slots)

    def dtype_of(self, role: str) -> str:
        return self.checkpoints if role == "checkpoint" else super().dtype_of(role)


def plain(problem: Problem) -> Problem:
    """What the other stages are compiled for."""
    if not isinstance(problem, PrefillProblem):
        return problem
    return Problem(**{x.name: getattr(problem, x.name) for x in fields(Problem)})
