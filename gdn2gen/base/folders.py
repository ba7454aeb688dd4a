"""Folders to write to, and whether code that lies in one may be run."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

# A first call on an H200 leaves 9 MB in the compilers' caches.
_LEAST_FREE_BYTES: Final = 16 << 20
_PROBE_BYTES: Final = 64 << 10


def expanded(value: str) -> Path | None:
    """`value` with `~` or `~name` replaced by a home; None where there is no such home."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        return None


def why_unusable(folder: Path) -> str | None:
    """Make `folder` and write to it; why that cannot be done, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(folder)
        if disk.f_blocks and disk.f_bavail * disk.f_frsize < _LEAST_FREE_BYTES:
            return f"its disk has {disk.f_bavail * disk.f_frsize >> 10} KiB left"
        # a quota shows only when something is written
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        return str(error)
    return None


def why_untrusted(folder: Path) -> str | None:
    """Which part of the path others than this user and root could put code into, or None.

    The folder itself belongs to one of the two, and nobody else may write to it, nor to a folder
    above it, save one whose entries only their owners may replace (as /tmp).
    """
    try:
        folder = folder.resolve()
        for place in (folder, *folder.parents):
            found = place.stat()
            if place == folder and not _is_ours(found):
                return f"{place} belongs to user {found.st_uid}"
            sticky = place != folder and found.st_mode & stat.S_ISVTX
            if others_write(found) and not sticky:
                return f"others may write to {place} (mode {stat.S_IMODE(found.st_mode):o})"
    except OSError as error:
        return str(error)
    return None


def is_trusted_file(path: Path) -> bool:
    """Whether only this user and root could have written the file; a link is no such file."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and _is_ours(found) and not others_write(found)


def others_write(found: os.stat_result) -> bool:
    # where every user has a group of that number, group members are the user alone
    group = stat.S_IWGRP if found.st_gid != found.st_uid else 0
    return bool(found.st_mode & (stat.S_IWOTH | group))


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0)


@cache
def private_dir() -> Path:
    """A temporary folder of this user alone: the same one in every process where it can be."""
    path = Path(tempfile.gettempdir()) / f"gdn2gen-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if private and found.st_uid == os.geteuid():
            return path
    except OSError:
        pass
    path = Path(tempfile.mkdtemp(prefix="gdn2gen-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
