"""Whether a call has its decay's gate apart: in a kernel of its own before it, and a call without a
gate after that, where such a one is served by what is faster.

The plans of blocks and of the forward in one kernel read a decay in fp32 and have no gate. A kernel
more costs its bytes, and the fp32 decay that the backward keeps; what it wins, tuned files know.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

from gdn2gen.base.decay import WEAK
from gdn2gen.base.device import Device, present_device
from gdn2gen.base.dtypes import DTYPE
from gdn2gen.base.errors import DispatchError
from gdn2gen.family.problem import Problem, Regime
from gdn2gen.family.registry import CHANNEL_OPS, recurrence_named
from gdn2gen.kernels.plans import LEVELS
from gdn2gen.store.dispatch import Found, find_recipe
from gdn2gen.store.surroundings import Surroundings, surroundings

# What starts and ends a kernel beside the bytes it moves, and makes small calls keep their gate.
_LAUNCH_MS: Final = 0.005
# Of a gate of channels: forward one; with the backward and its sums three. That of heads, a number
# for all of a head's channels, is torch's: each of its passes is a launch and next to no bytes.
_KERNELS: Final = (1, 3)
_KERNELS_OF_HEADS: Final = (5, 20)


def find_call(
    problem: Problem, regime: Regime, device: Device | None = None, **options: Any
) -> Found:
    """What a call runs: `dispatch.find_recipe`, or where its gate is apart what that finds for the
    call without one, which says so (`Found.gate_apart`). `options` are those of `find_recipe`."""
    device = present_device() if device is None else device
    read = surroundings()
    options["around"] = Surroundings.of(read)
    known = {"level", "decay", "scan_apart"} & {*options}
    if is_apart(problem, regime, device, read=read, **{x: options[x] for x in known}):
        found = find_recipe(without_gate(problem), regime, device, **options)
        return replace(found, gate_apart=f"{problem.gate} of {problem.gate_dtype}")
    return find_recipe(problem, regime, device, **options)


def without_gate(problem: Problem) -> Problem:
    """That of the call after the gate: it reads a decay in fp32."""
    return replace(
        problem, gate="none", gate_dtype="fp32", has_A_log=False, has_dt_bias=False, bound=0
    )


def can_be_apart(problem: Problem) -> bool:
    """Whether it has a gate that makes a decay of its input, A_log and dt_bias."""
    has = any(x.name == "A_log" for x in recurrence_named(problem.op).optional)
    return has and problem.gate != "none"


def is_apart(
    problem: Problem,
    regime: Regime,
    device: Device,
    *,
    level: str = LEVELS[0],
    decay: str = WEAK,
    scan_apart: bool = False,
    read: tuple[Any, ...] | None = None,
) -> bool:
    """Whether such calls on a GPU have their gate apart.

    They do where what is on file for the call without a gate takes, with the bytes and launches of
    the gate, fewer milliseconds forward and backward than what is for the call with it; at level
    lean, whose forwards calls without a gradient run at all levels, also forward alone. Where the
    latter was measured at other sizes, they are compared there, and both are taken to go by tokens
    and heads. And where the former is pinned, or compiled ahead, and the latter not.

    Never where a call is so small that its recipe is changed for it, nor within `forced_recipe`,
    nor in batch-invariant mode, where the same tokens are to have the same bits in every call;
    unless GDN2GEN_GATE_APART=1. `read`: the `surroundings`, where they were read before.
    """
    read = surroundings() if read is None else read
    around = Surroundings.of(read)
    said = around.gate_apart
    if said is not None or not can_be_apart(problem):
        return bool(said) and can_be_apart(problem)
    if around.forced is not None or around.batch_invariant:
        return False
    return _is_better(problem, regime, device, level, decay, scan_apart, read)


@lru_cache(maxsize=4096)
def _is_better(
    problem: Problem,
    regime: Regime,
    device: Device,
    level: str,
    decay: str,
    scan_apart: bool,
    read: tuple[Any, ...],
) -> bool:
    options = level, decay, scan_apart, Surroundings.of(read)
    apart = _found(without_gate(problem), regime, device, *options)
    if apart is None:
        return False
    within = _found(problem, regime, device, *options)
    if within is None or within.source == "pinned":
        return within is None and apart.source == "pinned"
    if apart.source == "pinned":
        return True
    if apart.recipe.by_stage == within.recipe.by_stage or device.memory_gbps is None:
        return False
    if apart.tuned_decay != within.tuned_decay:
        return apart.tuned_decay == decay
    if apart.agreed_segments is not None or within.agreed_segments is not None:
        return False  # changed for so few chunks, where a launch more is much
    if within.entry is not None and within.entry.regime != regime:
        at_filed = _found(without_gate(problem), within.entry.regime, device, *options)
        apart = apart if at_filed is None else at_filed
    directions = (False, True) if level == LEVELS[0] else (True,)
    return all(_wins(apart, within, problem, regime, device, x) for x in directions)


def _found(
    problem: Problem,
    regime: Regime,
    device: Device,
    level: str,
    decay: str,
    scan_apart: bool,
    around: Surroundings,
) -> Found | None:
    """None where something else is pinned, strictly."""
    options: dict[str, Any] = {"level": level, "decay": decay, "scan_apart": scan_apart}
    try:
        return find_recipe(problem, regime, device, strict=False, around=around, **options)
    except DispatchError:
        return None


def _wins(
    apart: Found, within: Found, problem: Problem, regime: Regime, device: Device, backward: bool
) -> bool:
    ms = _ms(apart, regime, backward)
    if ms is None:
        return False
    other = _ms(within, regime, backward)
    return other is None or ms + _gate_ms(problem, regime, device, backward) < other


def _ms(found: Found, regime: Regime, backward: bool) -> float | None:
    """Of its entry, at the call's sizes; None where nothing was measured."""
    if found.entry is None:
        return None
    ms = found.entry.measured.get("forward_backward_ms" if backward else "forward_ms")
    if ms is None:
        return None
    filed = found.entry.regime
    return float(ms) * (regime.tokens * regime.heads) / (filed.tokens * filed.heads)


def _gate_ms(problem: Problem, regime: Regime, device: Device, backward: bool) -> float:
    """Of the kernels of the gate: what they read and write at the memory's pace, and launches."""
    assert device.memory_gbps is not None
    if problem.op not in CHANNEL_OPS:
        return _KERNELS_OF_HEADS[backward] * _LAUNCH_MS
    x, g = DTYPE[problem.gate_dtype].nbytes, DTYPE["fp32"].nbytes
    moved = x + g + (x + g + x if backward else 0)
    channels = regime.tokens * regime.heads * problem.K
    return moved * channels / device.memory_gbps / 1e6 + _KERNELS[backward] * _LAUNCH_MS
