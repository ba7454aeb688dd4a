"""The files of a generated package: told from other files, and replaced all at once.

Each ends in the digest of its text, so that what a user edited is not lost. The new package is
written beside the folder, under a hidden name, and the two change places: whoever looks, or kills
the process, finds the old package or the new one, never a mixture.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from gdn2gen.base.errors import FileError, InputError
from gdn2gen.base.files import locked_folder, replace_file, sync_folder

# Every generated file says which command made it.
_MARK: Final = "made by\n    gdn2gen generate "
_DIGEST: Final = "as generated: the digest of all above is "
# How a comment begins and ends, by what a file is.
_COMMENTS: Final = {".py": ("# ", ""), ".md": ("<!-- ", " -->")}
# What a package's files were called on their way, before packages were replaced as one.
_TEMPORARY: Final = re.compile(r"\.\w+\.py\.\w{8}")
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2

Kind = Literal["generated", "edited", "foreign"]


def write_package(folder: Path, texts: Mapping[str, str], *, force: bool = False) -> list[Path]:
    """Replace the package in `folder` by files of these names and texts; return their paths.

    Without `force` files that were edited since they were generated are refused, others' files
    always, both by InputError; FileError where the folder cannot be replaced as one.
    """
    target = Path(os.path.realpath(folder))
    signed = {name: _signed(name, text) for name, text in texts.items()}
    _check_place(folder, target)
    with locked_folder(target.parent):
        _clear_left(target)
        old = _checked(folder, target, force)
        if old != signed:
            _replace(target, old, signed)
    return [folder / name for name in sorted(texts)]


def check_folder(folder: Path, *, force: bool = False) -> None:
    """Raise what `write_package` would raise for what lies there, before there is anything to
    write."""
    target = Path(os.path.realpath(folder))
    _check_place(folder, target)
    _checked(folder, target, force)


def _signed(name: str, text: str) -> str:
    start, end = _COMMENTS[Path(name).suffix]
    return f"{text}{start}{_DIGEST}{_digest(text)}{end}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kind_of(path: Path) -> Kind:
    if path.is_symlink() or not path.is_file():
        return "foreign"
    if _TEMPORARY.fullmatch(path.name):
        return "generated"
    if path.suffix not in _COMMENTS:
        return "foreign"
    text = path.read_text(errors="replace")
    start, end = _COMMENTS[path.suffix]
    body, found, digest = text.rpartition(f"{start}{_DIGEST}")
    if found and digest == f"{_digest(body)}{end}\n":
        return "generated"
    return "edited" if found or _MARK in text else "foreign"


def _checked(folder: Path, target: Path, force: bool) -> dict[str, str]:
    """Texts of the package that is to be replaced, which nothing else may lie beside."""
    if not target.exists():
        return {}
    if not target.is_dir():
        raise InputError(f"--out {folder} is not a folder; choose a new or empty one")
    paths = sorted(x for x in target.iterdir() if not _is_bytecode(x))
    kinds = {path: _kind_of(path) for path in paths}
    foreign = [path.name for path, kind in kinds.items() if kind == "foreign"]
    if foreign:
        raise InputError(
            f"--out {folder} holds what `gdn2gen generate` did not write ({_some(foreign)}); "
            "choose a new or empty folder, or move it away"
        )
    edited = [path.name for path, kind in kinds.items() if kind == "edited"]
    if edited and not force:
        raise InputError(
            f"--out {folder} holds files that were edited since they were generated, or are of an "
            f"earlier gdn2gen ({_some(edited)}); choose another folder, or give --force to replace "
            "them"
        )
    return {path.name: path.read_text(errors="replace") for path in paths}


def _is_bytecode(path: Path) -> bool:
    if path.name != "__pycache__" or path.is_symlink() or not path.is_dir():
        return False
    return all(x.is_file() and x.suffix == ".pyc" for x in path.iterdir())


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check_place(folder: Path, target: Path) -> None:
    """Raise FileError where the folder itself cannot be replaced by another."""
    reason = None
    with suppress(FileNotFoundError):  # the folder this runs in is gone itself
        if Path.cwd().is_relative_to(target):
            reason = "is the folder that this runs in, or holds it"
    if os.path.ismount(target):
        reason = "is a mount point"
    if reason is not None:
        raise FileError(
            f"--out {folder} {reason}, and a package is replaced as a whole folder; give a folder "
            f"inside it, such as {folder / 'kernels'}"
        )


def _replace(target: Path, old: Mapping[str, str], texts: Mapping[str, str]) -> None:
    """Put a folder of `texts` in place of `target`, which holds `old`."""
    new = _beside(target, "new")
    try:
        new.mkdir()
        for name, text in texts.items():
            replace_file(new / name, text)
            if name in old:
                (new / name).chmod(stat.S_IMODE((target / name).stat().st_mode))
        if target.exists():
            new.chmod(stat.S_IMODE(target.stat().st_mode))
            _exchange(new, target)
            _keep_changed(new, old, target)
        else:
            new.rename(target)
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"{target} cannot be written ({error.strerror}): a package is written beside its "
            f"folder first, into {target.parent}; give --out in a folder that can be written"
        ) from error
    finally:
        # the new package if something failed, else the old one
        shutil.rmtree(new, ignore_errors=True)
    sync_folder(target.parent)


def _keep_changed(replaced: Path, old: Mapping[str, str], target: Path) -> None:
    """Keep what was replaced, if somebody wrote to it after it was looked at."""
    paths = [x for x in replaced.iterdir() if not _is_bytecode(x)]
    if {x.name: x.read_text(errors="replace") if x.is_file() else "" for x in paths} == old:
        return
    kept = target.with_name(f"{target.name}.{secrets.token_hex(8)}.kept")
    replaced.rename(kept)
    raise FileError(f"{target} was written to while it was replaced; what was there is in {kept}")


def _exchange(new: Path, target: Path) -> None:
    """Have two folders change places: at one stroke where the file system can.

    Elsewhere a kill in between leaves the old one beside, and `_clear_left` puts it back.
    """
    if _renamed_at_one_stroke(new, target):
        return
    old = _beside(target, "old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    old.rename(new)


def _renamed_at_one_stroke(a: Path, b: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        return False
    paths = (os.fsencode(a), os.fsencode(b))
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _clear_left(target: Path) -> None:
    """What a killed predecessor left: its old package goes back where none is, the rest goes."""
    left = [x for state in ("old", "new") for x in _left(target, state)]
    for path in left:
        if path.name.endswith(".old") and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _left(target: Path, state: str) -> Iterable[Path]:
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.{state}")
    return [x for x in target.parent.iterdir() if name.fullmatch(x.name) and not x.is_symlink()]


def _beside(target: Path, state: str) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(8)}.{state}"
