"""tuned/<op>/<gpu>.json: read, look up, merge under a lock, replace atomically."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gdn2gen.base.device import Device
from gdn2gen.base.errors import FileError, Gdn2genError, StoreError, TunedFileWarning
from gdn2gen.base.files import check_replaceable, locked, replace_file
from gdn2gen.kernels.plans import LEVELS, Level
from gdn2gen.store.format import (
    PROVENANCES,
    TUNED_SCHEMA,
    Entry,
    Provenance,
    TunedFile,
    Unread,
    check_configs,
    check_entry,
    format_file,
    parse_file,
    raw_key,
)
from gdn2gen.store.ranking import (
    by_size,
    digest_of,
    drop_outdone,
    is_stale,
    rank,
    serves_as_much,
    speed,
    stale_stages,
    stand_ins,
)

__all__ = [
    "LEVELS",
    "PROVENANCES",
    "TUNED_SCHEMA",
    "Entry",
    "Level",
    "Provenance",
    "TunedFile",
    "Unread",
    "by_size",
    "check_configs",
    "check_entry",
    "check_mergeable",
    "current_look",
    "digest_of",
    "is_stale",
    "load_tuned",
    "look_anew",
    "merge_entries",
    "metadata_for",
    "rank",
    "read_tuned",
    "serves_as_much",
    "speed",
    "stale_stages",
    "stand_ins",
    "tuned_path",
    "warn_unread",
    "write_tuned",
]


def tuned_path(folder: Path, op: str, device: Device) -> Path:
    """Where the tuned file of `op` on `device` lies under `folder`."""
    return folder / op / f"{device.slug}.json"


def metadata_for(
    device: Device, toolchain: Mapping[str, str], command: str, date: str | None = None
) -> dict[str, Any]:
    """The `_metadata` of a tuned file; `date` is ISO 8601, by default now in UTC."""
    return {
        "schema": TUNED_SCHEMA,
        "gpu": device.name,
        "arch": device.arch,
        "sms": device.sms,
        "toolchain": dict(toolchain),
        "command": command,
        "date": date or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def read_tuned(path: Path, device: Device | None = None) -> TunedFile | None:
    """The tuned file at `path`, or None if there is none or it cannot be used.

    A file that is truncated, not JSON, of an unknown schema, or (with `device`) of another GPU
    gives a TunedFileWarning; so do entries that are skipped, once for each reason. Raises nothing,
    writes nothing.
    """
    try:
        file = load_tuned(path, device)
    except StoreError as error:
        warnings.warn(str(error), TunedFileWarning, stacklevel=2)
        return None
    if file is not None:
        warn_unread(path, file)
    return file


def load_tuned(path: Path, device: Device | None = None) -> TunedFile | None:
    """Like `read_tuned`, but raises StoreError with what the warning would say.

    Skipped entries are in `unread` of the answer, without a warning. None if there is no file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(_ignored(path, f"it cannot be read as text ({error})")) from error
    try:
        file = parse_file(text)
    except StoreError as error:
        raise StoreError(_ignored(path, str(error))) from error
    if device is not None and file.metadata["gpu"] != device.name:
        reason = f"it is of the GPU {file.metadata['gpu']!r}, but {device.name!r} was expected"
        raise StoreError(_ignored(path, reason))
    return file


def _ignored(path: Path, reason: str) -> str:
    return (
        f"the tuned file {path} is ignored: {reason}. Restore it, or move it away and run "
        "`gdn2gen tune` again; it was not changed"
    )


def warn_unread(path: Path, file: TunedFile) -> None:
    """Give a TunedFileWarning for the entries that were skipped, one for each reason."""
    positions: dict[str, list[str]] = {}
    for item in file.unread:
        positions.setdefault(item.reason, []).append(str(item.position))
    for reason, found in positions.items():
        which = f"entry {found[0]}" if len(found) == 1 else f"entries {', '.join(found)}"
        warnings.warn(
            f"{which} of the tuned file {path} {'is' if len(found) == 1 else 'are'} skipped: "
            f"{reason}. Tune {'this problem' if len(found) == 1 else 'these problems'} again, or "
            "upgrade gdn2gen if a newer one wrote it",
            TunedFileWarning,
            stacklevel=3,
        )


def write_tuned(path: Path, file: TunedFile) -> None:
    """Replace `path` by `file` at one stroke: a reader sees the old file or the new one.

    The same content gives the same bytes. Raises StoreError, and leaves the old file, if an entry
    is not valid or the folder cannot be written.
    """
    _check_entries(path, file.entries, file.metadata.get("gpu"))
    text = format_file(file)
    try:
        parse_file(text)
    except StoreError as error:
        raise StoreError(f"{path} is not written, for it could not be read: {error}") from error
    try:
        replace_file(path, text)
    except OSError as error:
        raise StoreError(_unwritable(path, error)) from error
    look_anew()


def _unwritable(path: Path, error: OSError) -> str:
    if isinstance(error, FileError):  # says all of it
        return str(error)
    return (
        f"{path} cannot be written ({error}); what was there is unchanged. Free some space, or "
        "name a place that you may write (--out, --to, GDN2GEN_TUNED_DIR)"
    )


_look = 0


def current_look() -> int:
    """Counts this process's looks at the tuned files: what one look found holds until the next.

    What a call runs must not change while it runs: between a forward and its backward, its
    recomputation, or on one rank of many. So a file that another program writes counts from the
    next look on.
    """
    return _look


def look_anew() -> None:
    """Forget what the tuned files held: later calls read them anew."""
    global _look
    _look += 1


def _check_entries(path: Path, entries: Iterable[Entry], gpu: object) -> None:
    for entry in entries:
        try:
            check_entry(entry, str(gpu))
        except Gdn2genError as error:
            raise StoreError(
                f"{path} is not written: the entry {entry.problem_key}, {entry.regime_key} is not "
                f"valid: {error}"
            ) from error


def merge_entries(path: Path, metadata: Mapping[str, Any], entries: Iterable[Entry]) -> TunedFile:
    """Merge `entries` into the tuned file at `path`, and return what the file then holds.

    Of two entries for the same problem, regime, level and decay the better stays: templates that
    still fit before stale ones, measured before transferred before predicted, then the shorter
    `forward_backward_ms` (and `forward_ms`), of predicted ones the lower cost; a tie keeps the old
    one. Beside an entry that needs TileLang, the best one that does not stays, too, for machines
    that cannot compile it; beside one that refuses options of calls, the best one that serves all.
    Other processes may merge at the same time (`<path>.lock` orders them).
    A merge that changes no entry leaves the file alone.

    Raises StoreError, and changes nothing, if an entry is not valid, or if the file at `path`
    cannot be read or is of another GPU.
    """
    path = Path(os.path.realpath(path))
    entries = tuple(entries)
    _check_entries(path, entries, metadata.get("gpu"))
    with _locked(path):
        old = _mergeable(path, metadata.get("gpu"))
        best: dict[tuple[str, ...], Entry] = {}
        for entry in (*(old.entries if old else ()), *entries):
            rival = best.get(entry.key)
            if rival is None or rank(entry) < rank(rival):
                best[entry.key] = entry
        drop_outdone(best)
        known = {key[:-1] for key in best}
        unread = tuple(x for x in (old.unread if old else ()) if raw_key(x.raw) not in known)
        merged = tuple(best[key] for key in sorted(best))
        if old is not None and merged == _by_key(old.entries) and unread == old.unread:
            return old
        file = TunedFile(dict(metadata), merged, unread)
        write_tuned(path, file)
        return file


def check_mergeable(path: Path, gpu: str) -> None:
    """Raise the StoreError that a merge of entries of `gpu` into the file at `path` would raise.

    For what a search finds: before it. Makes the folder and the lock, as a merge does.
    """
    path = Path(os.path.realpath(path))
    with _locked(path):
        _mergeable(path, gpu)


def _mergeable(path: Path, gpu: object) -> TunedFile | None:
    """The tuned file that entries of `gpu` are to be merged into."""
    try:
        check_replaceable(path)  # before it is read: a FIFO would be waited for
    except OSError as error:
        raise StoreError(_unwritable(path, error)) from error
    try:
        old = load_tuned(path)
    except StoreError as error:
        raise StoreError(f"nothing is merged: {error}") from error
    if old is not None and old.metadata["gpu"] != gpu:
        raise StoreError(
            f"nothing is merged: {path} is of the GPU {old.metadata['gpu']!r}, but the new "
            f"entries are of {gpu!r}; give another path"
        )
    return old


def amend_entries(path: Path, amended: Sequence[tuple[Entry, Entry | None]]) -> None:
    """In the tuned file at `path`, put the second of each pair in place of the first.

    None takes it out. What is not on file (any more) is passed over, and so is a missing file;
    other processes may write at the same time. Raises StoreError, and changes nothing, if an entry
    is not valid or the file cannot be read.
    """
    path = Path(os.path.realpath(path))
    with _locked(path):
        file = load_tuned(path)
        if file is None:
            return
        found = [next((new for old, new in amended if old == x), x) for x in file.entries]
        kept = tuple(x for x in found if x is not None)
        if kept != file.entries:
            write_tuned(path, replace(file, entries=kept))


def _by_key(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.key))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `<path>.lock`, waiting for whoever holds it."""
    lock = path.with_name(f"{path.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock))
        except OSError as error:
            raise StoreError(_unwritable(lock, error)) from error
        yield
