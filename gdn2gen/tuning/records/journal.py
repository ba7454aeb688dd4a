"""The journal file that studies lie in: told from other files, read, opened to write, pruned.

A journal is one JSON object per line, appended under a lock. Whoever writes to one holds a shared
lock (flock) on it while it is open, so that it is rewritten only where nobody else has it open.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.storages import journal

from gdn2gen.base.errors import TuneError
from gdn2gen.base.files import replace_file

Log = dict[str, Any]

# A trial at three shapes takes 5.8 KB as it is appended, and 3 KB rewritten; 7 to 20 MB are read in
# a second. A journal past the first is rewritten to the second, which are 2,700 trials.
_PRUNED_ABOVE: Final = 16 * 2**20
_PRUNED_TO: Final = 8 * 2**20
_FIRST_BYTES: Final = 2**16
_BEGINS: Final = b'{"op_code":'
_SQLITE_BEGINS: Final = b"SQLite format 3\0"
_GRACE_SECONDS: Final = 30
_SILENT_SECONDS: Final = 2.0


def open_journal(path: Path, *, prune: bool = False) -> journal.JournalStorage:
    """Open a journal to write, or begin one; the torn last line that a kill leaves goes.

    `prune`: where it has grown large and no other process has it open, only its latest studies are
    kept. Raises TuneError, and leaves the file alone, if it is no journal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check(path, missing=True)
    path.touch()
    lock = _Lock(path)
    lock.acquire()
    try:
        _check(path, missing=True)
        _cut_torn_line(path)
        handle = _in_use(path)
        if prune and os.fstat(handle).st_size > _PRUNED_ABOVE and _is_alone(handle):
            replace_file(path, _pruned(path, _PRUNED_TO))
            os.close(handle)
            handle = _in_use(path)
    finally:
        lock.release()
    storage = journal.JournalStorage(journal.JournalFileBackend(str(path), lock))
    weakref.finalize(storage, os.close, handle)
    return storage


def read_journal(path: Path) -> journal.JournalStorage:
    """What a journal holds now, in memory: the file is only read. TuneError if it is no journal."""
    _check(path)
    return journal.JournalStorage(_InMemory(_logs(path)))


class _InMemory(journal.BaseJournalBackend):
    """A journal that is in no file."""

    def __init__(self, logs: list[Log]) -> None:
        self.logs = logs

    def read_logs(self, log_number_from: int) -> Iterator[Log]:
        yield from self.logs[log_number_from:]

    def append_logs(self, logs: list[Log]) -> None:
        self.logs += json.loads(json.dumps(logs))


class _Lock(journal.JournalFileSymlinkLock):
    """Optuna's lock, which says what it waits for."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.grace_period = _GRACE_SECONDS
        self._path, self._name = str(path), f"{path}.lock"

    def acquire(self) -> bool:
        with suppress(OSError):  # mostly free: a thread a line took a third of a search's own time
            os.symlink(self._path, self._name)
            return True
        tell = threading.Timer(_SILENT_SECONDS, self._tell)
        tell.daemon = True
        tell.start()
        try:
            return super().acquire()
        finally:
            tell.cancel()

    def _tell(self) -> None:
        warnings.warn(
            f"waiting for the lock {self._name}: another process writes to the study, or was "
            f"killed while it did; what was left is taken over after {_GRACE_SECONDS} s",
            stacklevel=2,
        )


def _check(path: Path, *, missing: bool = False) -> None:
    """Raise TuneError unless `path` is a journal, or (with `missing`) nothing at all."""
    reason = _why_no_journal(path)
    if reason is not None and not (missing and not path.exists()):
        anew = " a path where nothing is," if missing else ""
        raise TuneError(
            f"the study storage {path} is not used: {reason}; it was not changed. Give a journal "
            f"that `gdn2gen tune` wrote,{anew} or the URL of a database"
        )


def _why_no_journal(path: Path) -> str | None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "it is no regular file"
        with path.open("rb") as file:
            begin = file.read(_FIRST_BYTES)
    except FileNotFoundError:
        return "there is no such file"
    if begin.startswith(_SQLITE_BEGINS):
        return f"it is an SQLite database, whose URL is sqlite:///{path}"
    first, newline, _ = begin.partition(b"\n")
    if not newline:  # nothing yet, or a first line that a kill has torn
        torn = begin.startswith(_BEGINS) or _BEGINS.startswith(begin)
        return None if torn else "it is no journal of Optuna"
    try:
        log = json.loads(first)
    except ValueError:
        return "it is no journal of Optuna"
    ours = isinstance(log, dict) and type(log.get("op_code")) is int and "worker_id" in log
    return None if ours else "it is no journal of Optuna"


def _cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _logs(path: Path) -> list[Log]:
    """Every whole line. Raises ValueError for one that is damaged."""
    *lines, _torn = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines]


def _in_use(path: Path) -> int:
    """A handle that keeps others from rewriting the journal; who rewrites it now is waited for."""
    while True:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with suppress(OSError):  # a file system without such locks: then nobody rewrites it
            fcntl.flock(handle, fcntl.LOCK_SH)
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)


def _is_alone(handle: int) -> bool:
    """Whether no other process has the journal open."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _pruned(path: Path, most: int) -> str:
    """The journal with its latest studies alone, in `most` bytes or in one study."""
    storage, kept, lines = read_journal(path), _InMemory([]), list[str]()
    copies = journal.JournalStorage(kept)
    for name in sorted(optuna.get_all_study_names(storage), key=_last_use(storage), reverse=True):
        optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=copies)
        new = [json.dumps(log, separators=(",", ":")) + "\n" for log in kept.logs[len(lines) :]]
        most -= sum(map(len, new))
        if lines and most < 0:
            break
        lines += new
    return "".join(lines)


def _last_use(storage: journal.JournalStorage) -> Callable[[str], datetime]:
    def last(name: str) -> datetime:
        trials = storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
        dates = [x.datetime_complete or x.datetime_start for x in trials]
        return max((date for date in dates if date is not None), default=datetime.min)

    return last
