"""Which stored entry is nearest to a problem, a regime and a GPU; `dispatch` makes a recipe."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal, NamedTuple

from gdn2gen.base.decay import WEAK
from gdn2gen.base.device import Device, known_device
from gdn2gen.base.errors import Gdn2genError, StoreError, TunedFileWarning
from gdn2gen.family.problem import DIMS, Problem, Regime
from gdn2gen.kernels.languages import TILED_BY
from gdn2gen.kernels.limits import rounded_up
from gdn2gen.kernels.plans import filed_level, plan_named
from gdn2gen.kernels.validity import why_not_there
from gdn2gen.store import tuned_files
from gdn2gen.store.format import MINOR_KEYS
from gdn2gen.store.tuned_files import Entry, TunedFile

Tier = Literal["exact", "nearest", "transferred", "predicted"]
TIERS: Final[tuple[Tier, ...]] = ("exact", "nearest", "transferred", "predicted")


class Query(NamedTuple):
    """What a call asks for."""

    problem: Problem
    regime: Regime
    device: Device
    level: str
    """What the forward may keep, as entries are filed (`plans.filed_level`)."""
    triton_alone: bool = False
    """Nothing but Triton can be compiled: entries that need no more come before all others."""
    scan_apart: bool = False
    """Its scan keeps states on the way: nothing serves whose forward has no scan of its own."""
    decay: str = WEAK
    """What is expected of it."""


class Match(NamedTuple):
    """An entry that could serve, and how far it is from what was asked; the least is taken."""

    tier: int
    """Index into `TIERS`."""
    stands_in: bool
    """Whether it is there for machines without a compiler for TileLang, and this is none."""
    minor: int
    """How many minor keys of the problem differ."""
    gpu_distance: float
    distance: float
    """Of the regimes."""
    slower: int
    """Entries of its file and size that are faster: it serves calls that those refuse."""
    folder: int
    """Index of the place."""
    path: str
    place: int
    entry: Entry
    gpu: str


class Place(NamedTuple):
    """One folder of tuned files, and the file of the GPU at hand in it."""

    folder: str
    own: str


class Nearest(NamedTuple):
    """What a look-up found: the entry to use, a better one that is stale, and what was ignored."""

    best: Match | None
    passed: Match | None
    notes: tuple[str, ...]
    refused: Refused | None = None


class Refused(NamedTuple):
    """The first entry before the best one that does not serve the call, and why."""

    match: Match
    why: str


def nearest_entry(query: Query, places: Sequence[Place]) -> Nearest:
    """The least match whose templates are as they were; an earlier place wins a tie.

    Files of other GPUs are read only if this GPU's hold nothing measured that fits. Where strong
    decay is expected, what was tuned under it comes before all else, of whatever regime: under it
    the best for weak decay takes more than twice as long (4.54 for 2.05 ms, train4k on an H200).
    """
    if query.triton_alone:
        found = _of_decays(query, places)
        if found.best is not None:
            return found
    return _of_decays(query._replace(triton_alone=False), places)


def _of_decays(query: Query, places: Sequence[Place]) -> Nearest:
    """The nearest that was tuned under the decay that is expected, or else under weak decay."""
    found = _nearest(query, places)
    if found.best is not None or query.decay == WEAK:
        return found
    weak = _nearest(query._replace(decay=WEAK), places)
    return weak._replace(passed=found.passed or weak.passed, refused=found.refused or weak.refused)


def _nearest(query: Query, places: Sequence[Place]) -> Nearest:
    notes: list[str] = []
    own = [(n, place.own) for n, place in enumerate(places)]
    found = _matches(own, query, notes, own=True)
    nearest = _first_fresh(found, query)
    if nearest.best is None or TIERS[nearest.best.tier] not in ("exact", "nearest"):
        others = [
            (n, path)
            for n, place in enumerate(places)
            for path in _files(place.folder, tuned_files.current_look())
            if path != place.own
        ]
        found += _matches(others, query, notes, own=False)
        nearest = _first_fresh(found, query)
    return nearest._replace(notes=tuple(notes))


def _first_fresh(found: list[Match], query: Query) -> Nearest:
    """The least match that fits and is not stale; before it the least that is, and the least that
    does not fit."""
    passed, refused = None, None
    for match in sorted(found):
        why = _why_unfit(match.entry, query)
        if why is not None:
            refused = refused or Refused(match, why)
        elif not tuned_files.is_stale(match.entry):
            return Nearest(match, passed, (), refused)
        else:
            passed = passed or match
    return Nearest(None, passed, (), refused)


def _matches(
    files: Sequence[tuple[int, str]], query: Query, notes: list[str], *, own: bool
) -> list[Match]:
    """Every entry of `files` for this level, decay and problem; what was ignored is told in
    `notes`."""
    found = []
    device, key = query.device, query.problem.key
    for folder, path in files:
        loaded = _load(path, tuned_files.current_look(), device if own else None, device.arch)
        if isinstance(loaded, str):
            notes.append(loaded)
            continue
        if loaded is None:
            continue
        gpu = str(loaded.metadata["gpu"])
        gpu_distance = 0.0 if own else _gpu_distance(device, loaded)
        given = [
            (place, entry, minor) for place, entry in enumerate(loaded.entries)
            if (minor := differing(key, entry)) is not None
            and filed_level(entry.level, query.problem.op) == query.level
            and entry.decay == query.decay
            and (entry.needs_triton_alone or not query.triton_alone)
        ]  # fmt: skip
        sizes = tuned_files.by_size(entry for _, entry, _ in given)
        for place, entry, minor in given:
            faster = [
                x for x in sizes[entry.size] if tuned_files.speed(x) < tuned_files.speed(entry)
            ]
            distance = regime_distance(query.regime, entry.regime)
            # an entry that was filed without a bound holds for every bound
            exact = distance == 0 and not {*minor} - {"bound"}
            stands_in = entry.needs_triton_alone and not all(x.needs_triton_alone for x in faster)
            tier = TIERS.index(_tier(entry, exact and not stands_in, own))
            rank = (tier, stands_in, len(minor), gpu_distance, distance, len(faster), folder)
            found.append(Match(*rank, path, place, entry, gpu))
    return found


def _tier(entry: Entry, exact: bool, own: bool) -> Tier:
    if entry.provenance == "predicted":
        return "predicted"
    if entry.provenance == "transferred" or not own:
        return "transferred"
    return "exact" if exact else "nearest"


@lru_cache(maxsize=64)
def _files(folder: str, _look: int) -> tuple[str, ...]:
    return tuple(str(path) for path in sorted(Path(folder).glob("*.json")))


@lru_cache(maxsize=256)
def _load(name: str, _look: int, device: Device | None, arch: str) -> TunedFile | str | None:
    """The tuned file, None if there is none or it is of another arch, or why it was ignored.

    With `device`, a file of another GPU is ignored. Warns once in each look.
    """
    path = Path(name)
    try:
        file = tuned_files.load_tuned(path, device)
    except StoreError as error:
        warnings.warn(str(error), TunedFileWarning, stacklevel=2)
        return str(error)
    if file is None or file.metadata["arch"] != arch:
        return None
    tuned_files.warn_unread(path, file)
    return file


def differing(key: Mapping[str, object], entry: Entry) -> list[str] | None:
    """Minor keys in which the entry's problem differs from `key`; None if a major one does.

    An entry that was filed under a bound serves that bound alone: its kernels may count on it. A
    head dim is minor if it is less than the entry's and rounds up to it: TileLang's tiles are the
    same, and Triton's slices no wider, so that they take no more shared memory.
    """
    filed = entry.problem_key
    if "bound" in filed and filed["bound"] != key.get("bound"):
        return None
    names = [name for name, value in key.items() if filed.get(name) != value]
    for name in names:
        if name in MINOR_KEYS:
            continue
        size, wider = key[name], filed.get(name)
        if name not in DIMS or not isinstance(size, int) or rounded_up(size, TILED_BY) != wider:
            return None
    return names


def _why_unfit(entry: Entry, query: Query) -> str | None:
    """Why an entry cannot serve a call, or None if it can."""
    plan = plan_named(entry.plan)
    if query.scan_apart and plan.instead:
        return f"plan {plan.name} has no scan of its own, which could keep states on the way"
    try:
        tuned_files.check_configs(entry.plan, entry.configs, query.problem)
    except Gdn2genError as error:
        return str(error)
    arch, problem = query.device.arch, query.problem
    for stage, config in entry.configs.items():
        reason = why_not_there(config, problem, arch)
        if reason is not None:
            return f"{stage} [{config}] cannot run there: {reason}"
    return None


def regime_distance(a: Regime, b: Regime) -> float:
    """Sum of |log2| of the ratios of tokens, sequences and heads; 0 for equal ones."""
    pairs = ((a.tokens, b.tokens), (a.sequences, b.sequences), (a.heads, b.heads))
    return sum(_log_ratio(x, y) if x != y else 0.0 for x, y in pairs)


def _gpu_distance(device: Device, file: TunedFile) -> float:
    """|log2| of the ratio of SMs, and of the bandwidths where both are known."""
    other = known_device(str(file.metadata["gpu"]))
    distance = _log_ratio(device.sms, file.metadata["sms"])
    if device.memory_gbps and other is not None and other.memory_gbps:
        distance += _log_ratio(device.memory_gbps, other.memory_gbps)
    return distance


def _log_ratio(x: float, y: float) -> float:
    return abs(math.log2(max(x, 0.5) / max(y, 0.5)))
