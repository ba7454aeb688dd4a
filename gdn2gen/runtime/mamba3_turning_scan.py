"""Where Mamba-3's scan turns queries and keys itself, and launches of it: by the rule where nothing
is forced."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdn2gen.base.environment import is_batch_invariant
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3_chunks import MAMBA3_ROTATE, chunk_knobs
from gdn2gen.kernels.mamba3_turning_scan import (
    MAMBA3_TURNING_SCAN,
    MAMBA3_WEIGHTS,
    TURNS_WITHIN,
    turning_knobs,
    turning_problem,
    turns_within,
    weights_problem,
)
from gdn2gen.runtime._loading import launcher_if_any
from gdn2gen.runtime._operands import readable
from gdn2gen.runtime.lookup import device_of
from gdn2gen.runtime.mamba3_loaded import MOST_SEQUENCES, forced_knobs, loaded
from gdn2gen.runtime.parts import _on
from gdn2gen.store.tuned_files import current_look

if TYPE_CHECKING:
    from gdn2gen.runtime.mamba3_chunks import Call

Launch = Callable[..., None]
_forced: list[bool] = []


def force_turning_scan(chosen: bool | None) -> None:
    """Have all calls in this process that can be turned within the scan be, or none; None leaves it
    to the rule."""
    _forced[:] = [] if chosen is None else [chosen]


def turning_launches(
    problem: Mamba3Problem,
    keep: int,
    BT: int,
    T: int,
    sequences: int,
    H: int,
    G: int,
    device: torch.device,
    look: int,
) -> tuple[Launch, Launch] | None:
    """Of numbers of tokens, and of the scan; None of a call that turns queries and keys before.
    `keep` is the scan's knob."""
    chosen = _forced[0] if _forced else TURNS_WITHIN
    if not chosen or is_batch_invariant() or sequences > MOST_SEQUENCES:
        return None
    gpu = device_of(device)
    # one that is forced has programs enough
    programs = gpu.sms if _forced else sequences * H
    if gpu.arch != "sm_90" or not turns_within(problem, BT, T, programs, gpu.sms):
        return None
    asked = turning_knobs(problem, keep) | forced_knobs(MAMBA3_TURNING_SCAN.name)
    scan = _scan(turning_problem(problem), tuple(sorted(asked.items())), device, look)
    tiles = sequences * -(-T // BT)
    usual = chunk_knobs(MAMBA3_ROTATE, problem, tiles, H, G, gpu.sms)
    knobs: dict[str, Knob] = {"BT": BT, "BH": usual["BH"]} | forced_knobs(MAMBA3_WEIGHTS.name)
    own = weights_problem(problem)
    return None if scan is None else (loaded(own, MAMBA3_WEIGHTS.name, knobs, device), scan)


@lru_cache(maxsize=64)
def _scan(
    problem: Mamba3Problem, knobs: tuple[tuple[str, Knob], ...], _device: torch.device, _look: int
) -> Launch | None:
    config = default_config(MAMBA3_TURNING_SCAN.name, problem)
    return launcher_if_any(problem, config.replace(**dict(knobs)))


def turning_scan(call: Call, keep: int) -> dict[str, Tensor] | None:
    """By the names of the scan's operands what a forward makes, of what is kept; None where
    queries and keys are turned before."""
    x, sizes = call.x, call.sizes
    B, T, H, G = (sizes[y] for y in "BTHG")
    found = turning_launches(call.problem, keep, x.BT, T, B, H, G, x.V.device, current_look())
    if found is None:
        return None
    numbers = _numbers(call, found[0])
    places: dict[str, Tensor] = {
        "out": call.like(x.V),
        "ungated": call.like(x.V) if keep and x.Z is not None else x.V.new_empty(0),
        "h": x.V.new_empty(0),
        "final_ssm": call.empty("n_sequences", "H", "P", "N"),
        **{y: x.V.new_empty(0) for y in "qk"},
        "theta": x.V.new_empty(0, dtype=torch.int32),
        "turns": call.empty("n_tiles", "H", "S", dtype=torch.int32),
        "last_angle": call.empty("n_sequences", "H", "S"),
    }
    if keep == _MUCH:
        places["h"] = call.empty("n_tiles", "H", "P", "N", dtype=x.V.dtype)
        places |= {y: call.empty("B", "T", "H", "N", dtype=x.V.dtype) for y in "qk"}
        places["theta"] = call.empty("B", "T", "H", "S", dtype=torch.int32)
    given: dict[str, Tensor | None] = {
        **{"Q": x.Q, "K": x.K, "Q_bias": x.biases[0], "K_bias": x.biases[1]},
        **{"DT": x.numbers[1], "angle_state": x.angle_state, "V": x.V, **numbers},
        **{"D": x.D, "Z": x.Z, "initial_ssm": x.ssm_state, **places},
    }
    operands = MAMBA3_TURNING_SCAN.operands(turning_problem(call.problem))
    tensors = [y for y in (given[z.name] for z in operands) if y is not None]
    with _on(x.V.device):
        found[1](*readable(tensors), T=T)
    return numbers | places


# What `keep` is where all is kept (`mamba3_chunks.MUCH`).
_MUCH = 2


def _numbers(call: Call, launch: Launch) -> dict[str, Tensor]:
    """Decays and weights of tokens and heads, and rates of the angles."""
    x, rotated = call.x, call.problem.rotated
    HA = call.sizes["H"] if call.sizes["angle_head"] else 1
    made = {y: call.empty("B", "H", "T") for y in ("within", "tail_decay", "weight_s", "own_dt")}
    if rotated:
        made["rates"] = call.empty("B", HA, "T", "S")
    sizes = {**call.sizes, "HA": HA}
    with _on(x.V.device):
        launch(
            *readable([*x.numbers, *call.rotated, *made.values()]),
            **{y: sizes[y] for y in MAMBA3_WEIGHTS.scalars},
        )
    return made
