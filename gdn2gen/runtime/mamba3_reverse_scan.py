"""Where the products of Mamba-3's backward are one stage, and launches of it and of what it leaves
to be added up."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gdn2gen.base.environment import is_batch_invariant
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3 import known_around
from gdn2gen.kernels.mamba3_reverse_scan import (
    MAMBA3_REVERSE_SCAN,
    MAMBA3_SUMS,
    REVERSE,
    SUMS,
    reverse_scan_problem,
    reverse_scans_at_once,
    sums_knobs,
    sums_problem,
    sums_serve,
)
from gdn2gen.runtime._loading import launcher_if_any
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.lookup import device_of
from gdn2gen.runtime.mamba3_loaded import MOST_SEQUENCES, forced_knobs, loaded
from gdn2gen.runtime.parts import _on
from gdn2gen.store.part_files import nearest_parts
from gdn2gen.store.tuned_files import current_look

if TYPE_CHECKING:
    from gdn2gen.runtime.mamba3_chunks import Back, Call, Gradients, Made

Launch = Callable[..., None]
_forced: list[bool] = []


def force_reverse_scan(chosen: bool | None) -> None:
    """Have the backward of all calls in this process that can be scanned at once be, or none; None
    leaves it to what is tuned."""
    _forced[:] = [] if chosen is None else [chosen]


class Left(NamedTuple):
    """What `mamba3_reverse_scan` makes: gradients of the state before the first tokens and of V,
    and what the other stage adds up, in the order of its operands."""

    first: Tensor
    dV: Tensor
    rest: tuple[Tensor, ...]


def launches_at_once(
    problem: Mamba3Problem,
    BT: int,
    T: int,
    sequences: int,
    H: int,
    G: int,
    device: torch.device,
    look: int,
) -> tuple[Launch, Launch] | None:
    """Of the scan, and of what adds up what that leaves; None of a call that takes the stages of
    `mamba3_chunks`, as all do for which no entry on file says that the two are faster.

    Where results may not depend on the batch all calls take those: packed sequences have no other.
    """
    if _forced == [False] or is_batch_invariant() or sequences > MOST_SEQUENCES:
        return None
    gpu = device_of(device)
    if gpu.arch != "sm_90" or not reverse_scans_at_once(problem, BT, T):
        return None
    known, tokens = known_around(problem, H, G), sequences * T
    tuned = nearest_parts(MAMBA3, REVERSE, known, tokens, gpu)
    if not _forced and tuned is None:
        return None
    filed = {} if tuned is None else tuned.knobs
    usual = sums_knobs(BT, sequences * -(-T // BT), H, G, gpu.sms)
    knobs = {**usual, **filed.get(SUMS, {}), **forced_knobs(SUMS), "BT": BT}
    knobs = knobs if sums_serve(knobs, H, G) else usual
    asked = {**filed.get(MAMBA3_REVERSE_SCAN.name, {}), **forced_knobs(MAMBA3_REVERSE_SCAN.name)}
    scan = _scan(reverse_scan_problem(problem), tuple(sorted(asked.items())), device, look)
    return None if scan is None else (scan, loaded(sums_problem(problem), SUMS, knobs, device))


@lru_cache(maxsize=64)
def _scan(
    problem: Mamba3Problem, knobs: tuple[tuple[str, Knob], ...], _device: torch.device, _look: int
) -> Launch | None:
    config = default_config(MAMBA3_REVERSE_SCAN.name, problem)
    return launcher_if_any(problem, config.replace(**dict(knobs)))


def launches_of(call: Call) -> tuple[Launch, Launch] | None:
    """`launches_at_once`, with the knobs that are on file or forced by now."""
    x, (B, T, H, G) = call.x, (call.sizes[y] for y in "BTHG")
    return launches_at_once(call.problem, x.BT, T, B, H, G, x.V.device, current_look())


def reverse_scan(call: Call, back: Back, dssm: Tensor) -> tuple[Left, Launch] | None:
    """What the scan leaves, and the launch of what adds that up; None where a call takes chunks
    side by side."""
    x, found = call.x, launches_of(call)
    if found is None:
        return None
    scan, add = found
    first, dV, rotated = call.like(x.ssm_state), call.like(x.V), call.problem.rotated
    heads = [call.empty("B", "T", "H", "N", dtype=x.V.dtype) for _ in "QK"]
    rest = [*heads, *([call.empty("B", "T", "H", "S")] if rotated else [])]
    rest += [call.empty("B", "H", 5, "T"), call.empty("n_tiles", "H", "P")]
    rest += [call.empty("n_tiles", "H", 4, "S")] if rotated else []
    given = (*back.turned[:2], x.V, *back.turned[2:], x.D, back.dy, back.h, dssm)
    made = (dV, *rest, None if x.ssm_state is None else first)
    with _on(x.V.device):
        scan(*readable([y for y in (*given, *made) if y is not None]), T=call.sizes["T"])
    return Left(first, dV, tuple(rest)), add


def add_up(
    call: Call, made: Made, back: Back, at_once: tuple[Left, Launch], last: tuple[Tensor, Tensor]
) -> Gradients:
    """All but those of states. `last`: the gradient of the last angles, and what a turn of all
    tokens changes by the last state."""
    x, rotated, (left, add) = call.x, call.problem.rotated, at_once
    dQ, dK, dTrap = (call.like(y) for y in (x.Q, x.K, x.numbers[2]))
    dbiases = [call.empty("n_tiles", "H", "N") for _ in "qk"]
    dADT, dDT = (call.empty("B", "H", "T") for _ in range(2))
    dAngles = call.empty("B", "T", "H", "S", dtype=x.Angles.dtype)
    given = [*x.numbers[1:], *back.turned[2:5], *call.rotated]
    given += [*call.rotation(back.theta, made.turns), *left.rest, *(last if rotated else ())]
    places = [dQ, dK, *dbiases, dADT, dDT, dTrap, *([dAngles] if rotated else [])]
    with _on(x.V.device):
        add(*readable(given), *places, **{y: call.sizes[y] for y in MAMBA3_SUMS.scalars})
    return call.gradients((dQ, dK, left.dV), [dADT, dDT, dTrap], dbiases, dAngles, back)
