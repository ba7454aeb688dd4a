"""How far from the exact result a kernel may be, for verify, the tuner and what is filed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gdn2gen.family.decays import DecayPattern
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import recurrence_named

# Relative error against fp64 (norm of the difference over norm of the reference) that a kernel may
# have, by dtype of its inputs. Worst found on an H200: see docs/results.
LIMITS: Final = {"bf16": 1e-2, "fp16": 4e-3, "fp32": 1e-4}
# Keys correlated at 0.9 with b near 2 make I + T ill-conditioned: what 16 bits round off in T and A
# comes back amplified. Measured 2.6 times the other patterns' worst here, 3.5 in a peer.
_AMPLIFIED: Final = {"correlated": 3.0}


# What rounding to nearest takes of a number at most, as a part of it: of 8, 11 and 24 digits.
ROUNDING: Final = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}


def limit_of(dtype: str, pattern: str | DecayPattern) -> float:
    """Relative error that outputs and gradients may have in a pattern of `inputs.PATTERNS`."""
    more = 1.0 if isinstance(pattern, DecayPattern) else _AMPLIFIED.get(pattern, 1.0)
    return LIMITS[dtype] * more


def slack_of(op: str) -> dict[str, float]:
    """Times as much as `limit_of` that a gradient of the recurrence may be off, by d<input>."""
    return {f"d{x.name}": x.slack for x in recurrence_named(op).differentiable}


def roundings_of(problem: Problem) -> dict[str, float]:
    """What gradients lose by their own dtype, by d<input>: of inputs in a narrower one than q's,
    as a decay in bf16 beside q in fp32 is, nothing computes a nearer one."""
    given = {f"d{x.name}": x.dtype for x in recurrence_named(problem.op).differentiable}
    dtypes = {name: problem.dtype_of(role) for name, role in given.items()}
    return narrowings(problem.dtype, {x: y for x, y in dtypes.items() if y in ROUNDING})


def narrowings(dtype: str, dtypes: Mapping[str, str]) -> dict[str, float]:
    """Of tensors whose dtype is narrower than `dtype`, by name: what rounding to it takes."""
    return {x: ROUNDING[y] for x, y in dtypes.items() if ROUNDING[y] > ROUNDING[dtype]}


def over(
    errors: Mapping[str, float], limit: float, op: str, rounding: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The errors above `limit`, NaN among them; of some more is allowed (`wider_limits`)."""
    wider = wider_limits(limit, slack_of(op), rounding or {})
    return {name: x for name, x in errors.items() if not x <= wider.get(name, limit)}


def wider_limits(
    limit: float, slack: Mapping[str, float], rounding: Mapping[str, float]
) -> dict[str, float]:
    """Of outputs and gradients that may be off by more than `limit`: its slack times as much, and
    beside that what rounding takes of them."""
    wider = {x: limit * slack.get(x, 1.0) + rounding.get(x, 0.0) for x in {*slack, *rounding}}
    return {name: x for name, x in wider.items() if x > limit}


def widest_limit(dtype: str) -> float:
    """What `limit_of` allows in the pattern where it allows most."""
    return LIMITS[dtype] * max(1.0, *_AMPLIFIED.values())
