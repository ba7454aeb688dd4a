"""What an entry claims, and whether it can be true.

A file may come from anybody, and a merge keeps the faster entry: one that claims a time which no
memory allows, or no time, or errors that the accuracy check would not pass, is refused wherever it
comes in. What it claims within these bounds, `gdn2gen verify --tuned` shows to be true or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from gdn2gen.base.device import known_device
from gdn2gen.base.errors import StoreError
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.registry import recurrence_named
from gdn2gen.family.tolerances import over, roundings_of, widest_limit
from gdn2gen.kernels.floor import least_ms

_TIMES: Final = ("forward_ms", "forward_backward_ms")
# Memory may be clocked higher than its data sheet says; of a GPU that is not listed nothing is
# known but that it is no faster than this, four times a B200.
_OVERCLOCKED: Final = 1.2
_UNKNOWN_GBPS: Final = 32000.0


def check_claims(
    provenance: str,
    problem: Problem,
    regime: Regime,
    measured: Mapping[str, Any],
    errors: Mapping[str, Any],
    gpu: str,
) -> None:
    """Raise StoreError with the reason, unless an entry's times and errors can be a GPU's."""
    for name, value in measured.items():
        if name.endswith("_ms") and not (_is_number(value) and 0 < value < math.inf):
            raise StoreError(f"measured.{name} must be milliseconds above 0, but is {value!r}")
    if provenance == "predicted":
        claimed = [name for name in _TIMES if name in measured]
        if claimed:
            raise StoreError(f"it is predicted, so nothing was timed, but it claims {claimed}")
        return
    if "forward_backward_ms" not in measured:
        raise StoreError(f"it is {provenance}, but claims no forward_backward_ms: {dict(measured)}")
    if provenance == "measured":
        _check_times(problem, regime, measured, gpu)
    _check_errors(problem, errors)


def _check_times(problem: Problem, regime: Regime, measured: Mapping[str, Any], gpu: str) -> None:
    gbps = most_gbps(gpu)
    for name, ms in measured.items():
        if not name.endswith("_ms"):
            continue
        least = least_ms(problem, regime, "backward" in name, gbps)
        if ms < least:
            raise StoreError(
                f"measured.{name} is {ms!r} ms, but {gpu} takes {least:.3g} ms to move the least "
                "bytes of this problem"
            )


def most_gbps(gpu: str) -> float:
    """What the memory of the GPU of that name may move at most, in GB/s."""
    known = known_device(gpu)
    listed = known.memory_gbps if known else None
    return listed * _OVERCLOCKED if listed else _UNKNOWN_GBPS


def always_checked(op: str) -> tuple[str, ...]:
    """What the tuner always files the error of; whether of more depends on the problem."""
    return ("o", *(f"d{x.name}" for x in recurrence_named(op).required))


def _check_errors(problem: Problem, errors: Mapping[str, Any]) -> None:
    missing = [name for name in always_checked(problem.op) if name not in errors]
    if missing:
        raise StoreError(f"gate must list the errors that were found, but lacks those of {missing}")
    bad = {name: x for name, x in errors.items() if not (_is_number(x) and 0 <= x < math.inf)}
    bad = bad or over(errors, widest_limit(problem.dtype), problem.op, roundings_of(problem))
    if bad:
        found = ", ".join(f"{name} {x!r}" for name, x in bad.items())
        raise StoreError(
            f"gate must list errors of at most {widest_limit(problem.dtype):.2g} for "
            f"{problem.dtype}, but has {found}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
