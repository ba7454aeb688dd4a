"""The kernels around Mamba-3's scan and of its one token, loaded: their knobs are what is forced,
what is tuned, or what a rule on the sizes says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import torch

from gdn2gen.base.environment import is_batch_invariant
from gdn2gen.family.mamba3_problem import MAMBA3, Mamba3Problem
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.limits import Knob
from gdn2gen.kernels.mamba3 import (
    AROUND,
    MAMBA3_STEP,
    ONE_TOKEN,
    known_around,
    known_of,
    mamba3_knobs,
    mamba3_step_knobs,
    tile_of,
)
from gdn2gen.kernels.mamba3_chunks import CHUNKS, chunk_knobs, chunk_of, chunk_problem
from gdn2gen.kernels.mamba3_scan import MAMBA3_SCAN, scan_problem, scans_at_once
from gdn2gen.kernels.parts import PartStage
from gdn2gen.runtime._loading import launcher_if_any, stage_launcher
from gdn2gen.runtime.lookup import device_of
from gdn2gen.store.part_files import PartEntry, nearest_parts
from gdn2gen.store.tuned_files import current_look

_forced: dict[str, dict[str, Knob]] = {}
_forced_tile: list[int] = []
_forced_scan: list[bool] = []


def force(stage: str, knobs: dict[str, Knob] | None) -> None:
    """Have all calls of a stage in this process take these knobs (not BT, which kernels share), as
    measuring wants; None ends that."""
    _forced.pop(stage, None)
    if knobs is not None:
        _forced[stage] = knobs
    for cache in _CACHES:
        cache.cache_clear()


# What all sizes of a batch count as where results may not depend on them.
_ANY_TOKENS: Final = 16384
_ANY_SEQUENCES: Final = 32
MOST_SEQUENCES: Final = 65535
"""Of TileLang's kernels: the last dim of a grid in CUDA. Those in Triton have them in the first."""


def counted_tokens(tokens: int) -> int:
    """By which knobs are found."""
    return _ANY_TOKENS if is_batch_invariant() else tokens


def tile_at(
    problem: Mamba3Problem, tokens: int, H: int, G: int, device: torch.device, kind: str = AROUND
) -> int:
    """Tokens of a tile, which all kernels of a kind share in a call: what is tuned for it, or the
    rule's."""
    if _forced_tile:
        return _forced_tile[0]
    return _tile_at(problem, counted_tokens(tokens), H, G, device, kind, current_look())


def forced_knobs(stage: str) -> dict[str, Knob]:
    """Those, none where nothing is forced."""
    return _forced.get(stage, {})


def force_tile(BT: int | None) -> None:
    """Have all calls in this process that are no tracer's take tiles of so many tokens; None ends
    that."""
    _forced_tile[:] = [] if BT is None else [BT]


def force_scan(chosen: bool | None) -> None:
    """Have all calls in this process that can be scanned at once be, or none, whatever their number
    of programs; None ends that."""
    _forced_scan[:] = [] if chosen is None else [chosen]


def counted_sequences(sequences: int) -> int:
    """By which the knobs of a step are found."""
    return _ANY_SEQUENCES if is_batch_invariant() else sequences


@lru_cache(maxsize=512)
def _tile_at(
    problem: Mamba3Problem,
    tokens: int,
    H: int,
    G: int,
    device: torch.device,
    kind: str,
    _look: int,
) -> int:
    found = nearest_parts(MAMBA3, kind, known_around(problem, H, G), tokens, device_of(device))
    if found is not None and found.knobs:
        return int(next(iter(found.knobs.values()))["BT"])
    rule = chunk_of if kind == CHUNKS else tile_of
    return rule(problem.dtype, problem.state_size)


@lru_cache(maxsize=512)
def knobs_of(
    stage: PartStage,
    problem: Mamba3Problem,
    BT: int,
    tiles: int,
    H: int,
    G: int,
    device: torch.device,
    _look: int,
) -> dict[str, Any]:
    gpu = device_of(device)
    rule = mamba3_knobs(stage, problem, tiles, H, G, gpu.sms)
    tuned = nearest_parts(MAMBA3, AROUND, known_of(stage, problem, H, G), tiles * BT, gpu)
    return _taken(stage, BT, rule, tuned)


def _taken(
    stage: PartStage, BT: int, rule: dict[str, Knob], tuned: PartEntry | None
) -> dict[str, Any]:
    """The rule's knobs, with what is tuned and what is forced in their place."""
    found = rule
    # the other direction of a call may be under way with another tile
    if tuned is not None and tuned.knobs.get(stage.name, {}).get("BT") == BT:
        found = {**rule, **tuned.knobs[stage.name]}
    return found | {"BT": BT} | forced_knobs(stage.name)


@lru_cache(maxsize=512)
def stage_launch(
    stage: PartStage,
    problem: Mamba3Problem,
    BT: int,
    tiles: int,
    H: int,
    G: int,
    device: torch.device,
    look: int,
) -> Callable[..., None]:
    knobs = knobs_of(stage, problem, BT, tiles, H, G, device, look)
    return _loaded(problem, stage.name, tuple(sorted(knobs.items())), device)


@lru_cache(maxsize=512)
def _loaded(
    problem: Mamba3Problem, stage: str, knobs: tuple[tuple[str, Any], ...], _device: torch.device
) -> Callable[..., None]:
    return stage_launcher(problem, default_config(stage, problem).replace(**dict(knobs)))


@lru_cache(maxsize=512)
def step_launcher(
    problem: Mamba3Problem, B: int, H: int, G: int, device: torch.device, _look: int
) -> Callable[..., None]:
    gpu = device_of(device)
    knobs = mamba3_step_knobs(problem, B, H, gpu.sms)
    tuned = nearest_parts(MAMBA3, ONE_TOKEN, known_around(problem, H, G), B, gpu)
    if tuned is not None:
        knobs |= tuned.knobs.get(MAMBA3_STEP.name, {})
    knobs |= forced_knobs(MAMBA3_STEP.name)
    return _loaded(problem, MAMBA3_STEP.name, tuple(sorted(knobs.items())), device)


@lru_cache(maxsize=512)
def chunk_knobs_of(
    stage: PartStage,
    problem: Mamba3Problem,
    BT: int,
    tiles: int,
    H: int,
    G: int,
    device: torch.device,
    _look: int,
) -> dict[str, Any]:
    """Of one of the kernels over chunks, for a call of this problem."""
    gpu = device_of(device)
    rule = chunk_knobs(stage, problem, tiles, H, G, gpu.sms)
    tuned = nearest_parts(MAMBA3, CHUNKS, known_around(problem, H, G), tiles * BT, gpu)
    return _taken(stage, BT, rule, tuned)


@lru_cache(maxsize=512)
def chunk_launch(
    stage: PartStage,
    problem: Mamba3Problem,
    BT: int,
    tiles: int,
    H: int,
    G: int,
    device: torch.device,
    look: int,
) -> Callable[..., None]:
    knobs = chunk_knobs_of(stage, problem, BT, tiles, H, G, device, look)
    own = chunk_problem(stage, problem)
    return _loaded(own, stage.name, tuple(sorted(knobs.items())), device)


def scan_launch(
    problem: Mamba3Problem,
    keep: int,
    BT: int,
    T: int,
    sequences: int,
    H: int,
    device: torch.device,
    look: int,
) -> Callable[..., None] | None:
    """Of states and outputs in one stage; None of a call that takes two. `keep` is its knob.

    Where results may not depend on the batch all calls take two: packed sequences have no other.
    """
    if _forced_scan == [False] or is_batch_invariant() or sequences > MOST_SEQUENCES:
        return None
    gpu = device_of(device)
    # one that is forced has programs enough
    programs = gpu.sms if _forced_scan else sequences * H
    if gpu.arch != "sm_90" or not scans_at_once(problem, BT, T, programs, gpu.sms):
        return None
    knobs = tuple(sorted(({"keep": keep} | forced_knobs(MAMBA3_SCAN.name)).items()))
    return _scan_launch(scan_problem(problem), knobs, device, look)


def loaded(
    problem: Mamba3Problem, stage: str, knobs: Mapping[str, Knob], device: torch.device
) -> Callable[..., None]:
    """The launch of a stage with these knobs."""
    return _loaded(problem, stage, tuple(sorted(knobs.items())), device)


@lru_cache(maxsize=64)
def _scan_launch(
    problem: Mamba3Problem, knobs: tuple[tuple[str, Knob], ...], _device: torch.device, _look: int
) -> Callable[..., None] | None:
    config = default_config(MAMBA3_SCAN.name, problem)
    return launcher_if_any(problem, config.replace(**dict(knobs)))


_CACHES: Final = (
    *(_tile_at, knobs_of, stage_launch, step_launcher),
    *(chunk_knobs_of, chunk_launch),
)
