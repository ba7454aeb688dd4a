"""Where rounding A, the inverse of a chunk's I + T, to 16 bits hands on what it takes.

R = A X and dX = A^T dR take away what tokens have in common; to nearest, each element's rounding
keeps a part of that, and of keys correlated at 0.9 with b near 2 it is the most of what is wrong.
Handed on within a row, the errors of 16 neighbours add up to almost nothing.
"""

from __future__ import annotations

from typing import Final

from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named

# The fewer channels, the worse I + T of correlated keys: db after 1100 tokens is off by 2.8 to
# 3.8e-2 at 16 channels, 2.5 to 3.1e-2 at 32 and 2.3 to 2.7e-2 at 64, where 3e-2 are allowed (six
# draws); handed on, by 2.3 to 3.0, 2.0 to 2.5 and 1.9 to 2.1e-2.
FEW_CHANNELS: Final = 32


def feeds_back(problem: Problem) -> bool:
    """Whether its kernels do. In bf16 alone: 11 bits leave an eighth of it, of 12e-3 allowed."""
    erases = recurrence_named(problem.op).erases
    return erases and problem.dtype == "bf16" and problem.K <= FEW_CHANNELS
