"""Files are replaced at one stroke: who reads one sees the old content or the new, never a part.

Every file that gdn2gen writes as a whole goes through here, under one set of rules:

- Only regular files are written. A device node, a FIFO, a socket or a folder is refused by name.
- A symlink is followed: the file that it leads to is replaced, and the link stays.
- A file that may not be written is not replaced, though its folder would let it be.
- A replaced file keeps its permission bits and owner, a new one has those of the umask.
- A failure leaves nothing behind. What a killed process left is removed by a later write.

Other hard links of a replaced file keep the old content.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from gdn2gen.base.errors import FileError

_SUFFIX: Final = ".tmp"
# No write takes as long: what is older was left by a process that is gone.
_LEFT_SECONDS: Final = 3600
# Of the 255 bytes that a name may have, for the dots, the token and the suffix.
_NAME_BYTES: Final = 200


def replace_file(path: Path | str, content: str | bytes, *, durable: bool = True) -> None:
    """Put `content` (text as UTF-8) in place of the file at `path`, whose folder is made.

    `durable`: the content is on the disk before the old one is gone, so that a power cut leaves one
    of them. Raises FileError for what is no regular file, and another OSError where the folder or
    the file cannot be written; what was there is unchanged then.
    """
    target = _target(Path(path))
    data = content.encode() if isinstance(content, str) else content
    with _named(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target) as (temporary, handle):
            with open(handle, "wb", closefd=False) as file:
                file.write(data)
            if durable:
                os.fsync(handle)
            os.replace(temporary, target)
    if durable:
        sync_folder(target.parent)


def check_replaceable(path: Path | str) -> None:
    """Raise what `replace_file` would raise at `path`, as far as can be told; write nothing there.

    Makes the folder, as `replace_file` does.
    """
    target = _target(Path(path))
    with _named(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target):
            pass


@contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """Errors of the system name `path`, which was given, and not a name that was made up for it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` survive a power cut, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path`, a file made for this, waiting for whoever holds it; ends with the process.

    Who may only read the file can hold it, too. Raises FileError for what is no regular file, and
    another OSError where it can neither be made nor read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a link could lead anywhere, and a FIFO would wait for a reader
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags | os.O_CREAT | os.O_RDWR, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        handle = os.open(path, flags | os.O_RDONLY)
    try:
        _check_regular(path, os.fstat(handle))
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """One process at a time changes what lies in `folder`, which is made.

    Leaves no file there. Where the file system has no such locks nobody waits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _target(path: Path) -> Path:
    """The file that `path` leads to, if it may be replaced."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        # a link to nothing leads to where the file will be
        return Path(os.path.realpath(path))
    _check_regular(path, found)
    target = Path(os.path.realpath(path))
    # links of /proc lead to files that may have no path any more
    if not (target.exists() and os.path.samestat(found, os.stat(target))):
        raise FileError(f"{path} leads to a file that has no path of its own; give a path")
    if not os.access(target, os.W_OK):
        raise FileError(
            f"{path} is read-only, and is not replaced; change its permissions, or give another "
            "path"
        )
    return target


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise FileError(
            f"{path} is {_kind(found.st_mode)}; only a regular file is ever written, give a path "
            "that is one, or where nothing is"
        )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a symbolic link",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


@contextmanager
def _temporary(target: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside `target`, open for writing, with the permissions that it should have.

    Removed if it is still there. What earlier processes left of this kind goes, too.
    """
    prefix = temporary_prefix(target)
    path = target.parent / f"{prefix}{secrets.token_hex(8)}{_SUFFIX}"
    old = os.stat(target) if target.exists() else None
    # what the old file's permissions hide is never seen under others
    mode = 0o666 if old is None else 0o600
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        if old is not None:
            with suppress(OSError):  # only root gives files away
                os.fchown(handle, old.st_uid, old.st_gid)
            os.fchmod(handle, stat.S_IMODE(old.st_mode))
        _remove_left(target.parent, prefix, os.fstat(handle).st_mtime)
        yield path, handle
    finally:
        os.close(handle)
        path.unlink(missing_ok=True)


def temporary_prefix(target: Path) -> str:
    """How names of what is to become `target` begin; they end in `.tmp`."""
    return f".{os.fsdecode(os.fsencode(target.name)[:_NAME_BYTES])}."


def _remove_left(folder: Path, prefix: str, now: float) -> None:
    """Remove what killed processes left; `now` is a time by the clock of the file system."""
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            if not (entry.name.startswith(prefix) and entry.name.endswith(_SUFFIX)):
                continue
            with suppress(OSError):
                left = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(left.st_mode) and now - left.st_mtime > _LEFT_SECONDS:
                    os.unlink(entry.path)
