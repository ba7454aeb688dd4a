"""What an entry of kernels that are in no plan claims, and whether it can be true.

As `_claims` asks it of recipes: a file may come from anybody, and a merge keeps the faster entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from gdn2gen.base.dtypes import DTYPE
from gdn2gen.base.errors import Gdn2genError, StoreError
from gdn2gen.family.mamba3_problem import Mamba3Problem
from gdn2gen.family.tolerances import ROUNDING, widest_limit
from gdn2gen.kernels.mamba3 import AROUND, MAMBA3_AROUND, MAMBA3_STEP, ONE_TOKEN
from gdn2gen.kernels.mamba3_chunks import CHUNKS, MAMBA3_CHUNK_STAGES, MAMBA3_TURNS
from gdn2gen.kernels.mamba3_reverse_scan import MAMBA3_REVERSE_STAGES, REVERSE
from gdn2gen.kernels.parts import PartStage
from gdn2gen.kernels.stages import EVERY_STAGE
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.store._claims import most_gbps
from gdn2gen.store.part_files import PartEntry, is_time, stale_parts

_STAGES: Final = {
    AROUND: MAMBA3_AROUND,
    CHUNKS: MAMBA3_CHUNK_STAGES,
    REVERSE: MAMBA3_REVERSE_STAGES,
    ONE_TOKEN: (MAMBA3_STEP,),
}
_SIZES: Final = ("heads", "groups")


def op_of(entry: PartEntry) -> str | None:
    """The op that its kernels are of; None where there are no such kernels."""
    stages = [EVERY_STAGE.get(x) for x in entry.knobs]
    ops = {x.made_for.op for x in stages if isinstance(x, PartStage)}
    return ops.pop() if len(ops) == 1 else None


def check_part(entry: PartEntry, gpu: str, arch: str) -> None:
    """Raise StoreError with the reason, unless a call could run the entry, or could under its
    templates where these are others, and its times and errors can be that GPU's."""
    for stage in entry.knobs:
        for name in ("ms", "default_ms"):
            value = entry.measured[stage].get(name)
            if not is_time(value):
                raise StoreError(
                    f"measured.{stage}.{name} must be milliseconds above 0, but is {value!r}"
                )
    _check_errors(entry)
    if stale_parts(entry):
        return  # calls pass over it, and nobody knows its kernels' knobs
    problem = _problem(entry)
    _check_stages(entry, problem, arch)
    least = _least_bytes(entry, problem) / most_gbps(gpu) / 1e6
    if entry.ms < least:
        raise StoreError(
            f"its kernels are said to take {entry.ms!r} ms, but {gpu} takes {least:.3g} ms to "
            "read what they must read"
        )


def _problem(entry: PartEntry) -> Mamba3Problem:
    """What it is of; StoreError where there is no such problem."""
    known: dict[str, Any] = {x: y for x, y in entry.at.items() if x not in _SIZES}
    _check_values("at", entry.at)
    try:
        problem = Mamba3Problem(**known)
    except (Gdn2genError, TypeError) as error:
        raise StoreError(f"it is of no problem that there is: {error}") from error
    heads, groups = (entry.at.get(x) for x in _SIZES)
    if type(heads) is not int or type(groups) is not int or groups < 1 or heads % groups:
        raise StoreError(
            f"heads must be a multiple of groups, but they are {heads!r} and {groups!r}"
        )
    return problem


def _check_stages(entry: PartEntry, problem: Mamba3Problem, arch: str) -> None:
    """That it has knobs of all kernels of its kind, which serve there and share a tile."""
    if entry.kind not in _STAGES:
        raise StoreError(f"kind must be one of {', '.join(_STAGES)}, but is {entry.kind!r}")
    stages = _STAGES[entry.kind]
    needed = {x.name for x in stages if x is not MAMBA3_TURNS or problem.rotated}
    if not needed <= {*entry.knobs} <= {x.name for x in stages}:
        raise StoreError(
            f"{entry.kind!r} are the kernels {sorted(needed)}, but knobs are given for "
            f"{sorted(entry.knobs)}"
        )
    for stage, knobs in entry.knobs.items():
        _check_values(f"knobs.{stage}", knobs)
    try:
        configs = {x: entry.config(x, problem) for x in entry.knobs}
    except Gdn2genError as error:
        raise StoreError(str(error)) from error
    for stage, config in configs.items():
        reason = why_invalid(config, problem, arch)
        if reason is not None:
            raise StoreError(f"{stage} [{config}] cannot serve this problem: {reason}")
    tiles = {x: config["BT"] for x, config in configs.items()}
    if len({*tiles.values()}) > 1:
        raise StoreError(f"the kernels of an entry share BT, but it is {tiles}")


def _check_values(name: str, values: Mapping[str, object]) -> None:
    for key, value in values.items():
        if type(value) not in (int, str):
            raise StoreError(f"{name}.{key} must be an integer or a text, but is {value!r}")


def _check_errors(entry: PartEntry) -> None:
    dtype = str(entry.at.get("dtype"))
    if dtype not in ROUNDING:
        raise StoreError(f"at.dtype must be one of {', '.join(ROUNDING)}, but is {dtype!r}")
    # of gradients of logits in bf16, beside what the kernels may be off
    limit = widest_limit(dtype) + max(ROUNDING.values())
    numbers = {x: y for x, y in entry.errors.items() if type(y) in (int, float)}
    bad = {x: y for x, y in entry.errors.items() if not 0 <= numbers.get(x, math.nan) <= limit}
    if bad or not entry.errors:
        found = ", ".join(f"{name} {x!r}" for name, x in bad.items()) or "none"
        raise StoreError(f"errors must be those found, of at most {limit:.2g}, but has {found}")


def _least_bytes(entry: PartEntry, problem: Mamba3Problem) -> float:
    """Bytes that its kernels read with a cold L2, each of them timed by itself: V, and in the
    backward V and dout; of a step the states."""
    heads = entry.tokens * int(entry.at["heads"])
    if entry.kind == ONE_TOKEN:
        return heads * problem.head_dim * problem.state_size * DTYPE["fp32"].nbytes
    return 3 * heads * problem.head_dim * DTYPE[problem.dtype].nbytes
