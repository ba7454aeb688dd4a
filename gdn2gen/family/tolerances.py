"""How far from the exact result a kernel may be, for verify, the tuner and what is filed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gdn2gen.family.decays import DecayPattern
from gdn2gen.family.registry import recurrence_named

# Relative error against fp64 (norm of the difference over norm of the reference) that a kernel may
# have, by dtype of its inputs. Worst found on an H200: see docs/results.
LIMITS: Final = {"bf16": 1e-2, "fp16": 4e-3, "fp32": 1e-4}
# Keys correlated at 0.9 with b near 2 make I + T ill-conditioned: what 16 bits round off in T and A
# comes back amplified. Measured 2.6 times the other patterns' worst here, 3.5 in a peer.
_AMPLIFIED: Final = {"correlated": 3.0}


def limit_of(dtype: str, pattern: str | DecayPattern) -> float:
    """Relative error that outputs and gradients may have in a pattern of `inputs.PATTERNS`."""
    more = 1.0 if isinstance(pattern, DecayPattern) else _AMPLIFIED.get(pattern, 1.0)
    return LIMITS[dtype] * more


def slack_of(op: str) -> dict[str, float]:
    """Times as much as `limit_of` that a gradient of the recurrence may be off, by d<input>."""
    return {f"d{x.name}": x.slack for x in recurrence_named(op).differentiable}


def over(errors: Mapping[str, float], limit: float, op: str) -> dict[str, float]:
    """The errors above `limit`, NaN among them, with the slack of the recurrence."""
    slack = slack_of(op)
    return {name: x for name, x in errors.items() if not x <= limit * slack.get(name, 1.0)}


def widest_limit(dtype: str) -> float:
    """What `limit_of` allows in the pattern where it allows most."""
    return LIMITS[dtype] * max(1.0, *_AMPLIFIED.values())
