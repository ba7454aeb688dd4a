"""What the accuracy suite has passed on a GPU: members, dtypes and head dims, by architecture.

`verified.json` in the packaged folder of tuned files says what ships as such; the user's, what
`gdn2gen verify` has passed on their GPUs by the same version of gdn2gen.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from gdn2gen import __version__
from gdn2gen.base.device import Device
from gdn2gen.base.errors import StoreError, TunedFileWarning
from gdn2gen.base.files import locked, replace_file
from gdn2gen.base.paths import packaged_tuned_dir, user_tuned_dir

NAME: Final = "verified.json"
SCHEMA: Final = 1


class Passed(NamedTuple):
    """One member at one pair of head dims, in one dtype, on GPUs of one architecture."""

    op: str
    arch: str
    dtype: str
    K: int
    V: int


def is_verified(op: str, dtype: str, K: int, V: int, arch: str | None) -> bool:
    """Whether it has passed on GPUs of `arch`; where that is None, on any."""
    archs = archs_of(op, dtype, K, V)
    return bool(archs) if arch is None else arch in archs


@lru_cache(maxsize=512)  # every call asks
def archs_of(op: str, dtype: str, K: int, V: int) -> tuple[str, ...]:
    """The architectures that it has passed on."""
    found = (x.arch for x in passed() if (x.op, x.dtype, x.K, x.V) == (op, dtype, K, V))
    return tuple(sorted(found))


@lru_cache(maxsize=1)
def passed() -> frozenset[Passed]:
    """All that is on file, read once; see `look_anew`."""
    own = user_tuned_dir() / NAME
    shipped = packaged_tuned_dir() / NAME
    runs = [*_runs(shipped), *(x for x in _runs(own) if x["version"] == __version__)]
    return frozenset(
        Passed(x["op"], x["arch"], x["dtype"], K, V) for x in runs for K, V in x["dims"]
    )


def look_anew() -> None:
    """Forget what was read: later calls read the files anew."""
    passed.cache_clear()
    archs_of.cache_clear()


def file_passed(
    folder: Path,
    found: Iterable[tuple[str, str, int, int]],
    device: Device,
    *,
    command: str,
    toolchain: Mapping[str, str],
) -> Path:
    """Add op, dtype, K, V of what has passed on `device` to the file in `folder`; its path.

    What an older run says of the same is replaced. Raises StoreError if it cannot be written, or
    is not one of ours.
    """
    path, dims = folder / NAME, _grouped(found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path):
            runs = [_without(x, device.arch, dims) for x in _read(path)]
            for (op, dtype), pairs in dims.items():
                runs.append(
                    {
                        "op": op,
                        "dtype": dtype,
                        "arch": device.arch,
                        "gpu": device.name,
                        "version": __version__,
                        "command": command,
                        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                        "toolchain": dict(toolchain),
                        "dims": sorted(pairs),
                    }
                )
            replace_file(path, _text([x for x in runs if x["dims"]]))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be written: {error}; what was there is unchanged"
        ) from error
    look_anew()
    return path


def _grouped(
    found: Iterable[tuple[str, str, int, int]],
) -> dict[tuple[str, str], list[list[int]]]:
    dims: dict[tuple[str, str], list[list[int]]] = {}
    for op, dtype, K, V in sorted(set(found)):
        dims.setdefault((op, dtype), []).append([K, V])
    return dims


def _without(
    run: dict[str, Any], arch: str, dims: Mapping[tuple[str, str], list[list[int]]]
) -> dict[str, Any]:
    if run["arch"] != arch:
        return run
    anew = dims.get((run["op"], run["dtype"]), [])
    return {**run, "dims": [pair for pair in run["dims"] if pair not in anew]}


def _runs(path: Path) -> list[dict[str, Any]]:
    """Of a file that cannot be read nothing, with a warning."""
    try:
        return _read(path)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{path} is ignored ({error}): what has passed there counts as not verified, until "
            "`gdn2gen verify` files it again or the file is removed",
            TunedFileWarning,
            stacklevel=2,
        )
        return []


def _read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file, none where there is none. Raises ValueError where it is no such file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text:  # as `locked` makes it
        return []
    document = json.loads(text)
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
    dims = run.get("dims")
    return isinstance(dims, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)
        for pair in dims
    )


def _text(runs: list[dict[str, Any]]) -> str:
    """One line for each run's head dims, which are many."""
    lines = []
    for run in sorted(runs, key=lambda x: (x["arch"], x["op"], x["dtype"], x["date"])):
        head = json.dumps({name: x for name, x in run.items() if name != "dims"}, indent=2)
        dims = json.dumps(run["dims"], separators=(",", ":"))
        lines.append(f'{head.removesuffix("}").rstrip()},\n  "dims": {dims}\n}}')
    return f'{{"schema": {SCHEMA}, "runs": [\n' + ",\n".join(lines) + "\n]}\n"
