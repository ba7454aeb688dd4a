"""What the accuracy suite has passed on a GPU: ops, dtypes and head dims, by architecture.

`verified.json` in the packaged folder of tuned files says what ships as such; the user's, what
`gdn2gen verify` found on their GPUs by the same version of gdn2gen. What failed there counts, too.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from gdn2gen import __version__
from gdn2gen.base.device import Device
from gdn2gen.base.errors import StoreError, TunedFileWarning
from gdn2gen.base.files import check_replaceable, locked, replace_file
from gdn2gen.base.paths import packaged_tuned_dir, user_tuned_dir
from gdn2gen.family.mamba3_problem import MAMBA3, STEP, Mamba3Problem
from gdn2gen.family.problem import Problem
from gdn2gen.family.registry import RECURRENCES

NAME: Final = "verified.json"
SCHEMA: Final = 1
_LISTS: Final = ("dims", "failed")

Run = dict[str, Any]


class Place(NamedTuple):
    """One op at one pair of head dims, in one dtype.

    An op over chunks goes by its recurrence's name, one over single tokens by its public name.
    """

    op: str
    dtype: str
    K: int
    V: int

    @classmethod
    def of(cls, problem: Problem | Mamba3Problem) -> Place:
        """Of the op over whole sequences that runs the problem."""
        return cls(problem.op, problem.dtype, problem.K, problem.V)

    @property
    def command(self) -> str:
        """What verifies it on the GPU at hand."""
        of_tokens = {x.public.recurrent: x.name for x in RECURRENCES.values()} | {STEP: MAMBA3}
        return f"gdn2gen verify --op {of_tokens.get(self.op, self.op)} --head-dim {self.K},{self.V}"


def is_verified(op: str, dtype: str, K: int, V: int, arch: str | None) -> bool:
    """Whether it has passed on GPUs of `arch`; where that is None, as in an interpreter, on any."""
    archs = archs_of(op, dtype, K, V)
    return bool(archs) if arch is None else arch in archs


@lru_cache(maxsize=512)  # every call asks
def archs_of(op: str, dtype: str, K: int, V: int) -> tuple[str, ...]:
    """The architectures that it has passed on."""
    place = Place(op, dtype, K, V)
    shipped, own = _runs(packaged_tuned_dir() / NAME), _of_this_version()
    found = {x["arch"] for x in (*shipped, *own) if _holds(x, "dims", place)}
    return tuple(sorted(found - {x["arch"] for x in own if _holds(x, "failed", place)}))


def other_versions(place: Place, arch: str | None) -> list[str]:
    """The versions of gdn2gen by which it has passed on this user's GPUs, but for the present."""
    runs = _runs(user_tuned_dir() / NAME)
    found = {x["version"] for x in runs if x["arch"] == arch and _holds(x, "dims", place)}
    return sorted(found - {__version__})


_look = 0


def current_look() -> int:
    """Counts this process's looks at the files: what one look found holds until the next."""
    return _look


def look_anew() -> None:
    """Forget what was read: later calls read the files anew."""
    global _look
    _look += 1
    archs_of.cache_clear()
    _runs.cache_clear()


def check_fileable(folder: Path) -> None:
    """Raise the StoreError that `file_found` would raise: before a suite runs for it."""
    _ = _reading(folder)


def file_found(
    folder: Path,
    passed: Collection[Place],
    failed: Collection[Place],
    device: Device,
    *,
    command: str,
    toolchain: Mapping[str, str],
    few: Collection[Place] = (),
) -> Path:
    """Add what has passed and what has failed on `device` to the file in `folder`; its path.

    What an older run says of the same is replaced, but for a failure where `few` cases alone have
    passed now. Raises StoreError if it cannot be written, or
    is not one of ours.
    """
    path = _path_in(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a lock of its own: the file itself is another one once it was replaced
        with locked(path.with_name(f"{path.name}.lock")):
            anew = {*passed, *failed}
            stays = {*few} - {*failed}
            runs = [_without(x, device.arch, anew, stays) for x in _reading(folder)]
            made = {
                "arch": device.arch,
                "gpu": device.name,
                "version": __version__,
                "command": command,
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "toolchain": dict(toolchain),
            }
            for op, dtype in sorted({(x.op, x.dtype) for x in anew}):
                lists = [
                    [[x.K, x.V] for x in sorted(found) if (x.op, x.dtype) == (op, dtype)]
                    for found in (passed, failed)
                ]
                of_it = dict(zip(_LISTS, lists, strict=True))
                runs.append({"op": op, "dtype": dtype, **made, **of_it})
            replace_file(path, _text([x for x in runs if any(x.get(name) for name in _LISTS)]))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error}; what was there is unchanged"
        ) from error
    look_anew()
    return path


def _path_in(folder: Path) -> Path:
    return Path(os.path.realpath(folder / NAME))


def _of_this_version() -> list[Run]:
    return [x for x in _runs(user_tuned_dir() / NAME) if x["version"] == __version__]


def _holds(run: Run, kind: str, place: Place) -> bool:
    same = (run["op"], run["dtype"]) == (place.op, place.dtype)
    return same and [place.K, place.V] in run.get(kind, [])


def _without(run: Run, arch: str, places: Collection[Place], stays: Collection[Place]) -> Run:
    """The run less `places`; those of `stays` still count as failed where they did."""
    if run["arch"] != arch:
        return run

    def dims(found: Collection[Place]) -> list[list[int]]:
        return [[x.K, x.V] for x in found if (x.op, x.dtype) == (run["op"], run["dtype"])]

    anew, kept = dims(places), dims(stays)
    return run | {
        kind: [x for x in run.get(kind, []) if x not in anew or (kind == "failed" and x in kept)]
        for kind in _LISTS
    }


@lru_cache(maxsize=8)
def _runs(path: Path) -> tuple[Run, ...]:
    """Of a file that cannot be read nothing, with a warning."""
    try:
        return tuple(_read(path))
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(
            f"{path} is ignored ({error}): what has passed there counts as not verified until the "
            "file is mended or removed",
            TunedFileWarning,
            stacklevel=2,
        )
        return ()


def _reading(folder: Path) -> list[Run]:
    """The runs of the file in `folder`. Raises StoreError where it is not one of ours."""
    path = _path_in(folder)
    try:
        check_replaceable(path)  # before it is read: a FIFO would be waited for
        return _read(path)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} is not what `gdn2gen verify` files what passed in ({error}): mend it or move "
            "it away; it was not changed"
        ) from error


def _read(path: Path) -> list[Run]:
    """The runs of a file, none where there is none. Raises ValueError where it is no such file."""
    if not path.is_file():
        if path.exists():
            raise ValueError("it is no regular file")
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"it has no schema {SCHEMA}")
    runs = document.get("runs")
    if not isinstance(runs, list) or not all(map(_is_run, runs)):
        raise ValueError("its runs are not as `gdn2gen verify` files them")
    return runs


def _is_run(run: object) -> bool:
    words = ("op", "dtype", "arch", "gpu", "version", "command", "date")
    if not isinstance(run, dict) or not all(isinstance(run.get(x), str) for x in words):
        return False
    lists = [run.get(name, []) for name in _LISTS]
    return all(
        isinstance(pairs, list)
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)
            for pair in pairs
        )
        for pairs in lists
    )


def _text(runs: list[Run]) -> str:
    """One line for each list of head dims, which may be long."""
    lines = []
    for run in sorted(runs, key=lambda x: (x["arch"], x["op"], x["dtype"], x["date"])):
        head = json.dumps({name: x for name, x in run.items() if name not in _LISTS}, indent=2)
        lists = "".join(
            f',\n  "{name}": {json.dumps(run[name], separators=(",", ":"))}'
            for name in _LISTS
            if run.get(name)
        )
        lines.append(f"{head.removesuffix('}').rstrip()}{lists}\n}}")
    return f'{{"schema": {SCHEMA}, "runs": [\n' + ",\n".join(lines) + "\n]}\n"
