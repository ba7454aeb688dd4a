"""Where templates, tuned files and generated sources live, installed or in the source tree."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from gdn2gen.base.errors import TunedFileWarning
from gdn2gen.base.folders import expanded, private_dir, why_untrusted, why_unusable

Said = Mapping[str, str | None]
"""What the environment said of variables by the time they were read, which may change."""

_PACKAGE = Path(__file__).resolve().parents[1]


def _data(name: str) -> Path:
    """`name` beside the package (source tree, editable install) or inside it (wheel)."""
    inside = _PACKAGE / "_data" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def templates_dir() -> Path:
    """Folder of the Jinja templates: `<language>/stages/<stage>.py.jinja`, and what they share."""
    return _data("templates")


def packaged_tuned_dir() -> Path:
    """Folder of the tuned files that ship with gdn2gen: `<op>/<gpu>.json`."""
    return _data("tuned")


def user_tuned_dir(said: Said | None = None) -> Path:
    """The user's own folder of tuned files, looked at first: GDN2GEN_TUNED_DIR, or the cache's.

    `said`: of these two variables, where they were read before.
    """
    value = (os.environ if said is None else said).get("GDN2GEN_TUNED_DIR")
    return _named_tuned_dir(value) or cache_dir(said) / "tuned"


def _named_tuned_dir(value: str | None) -> Path | None:
    folder = expanded(value) if value else None
    if value and folder is None:
        _warn_of_tuned_dir(value, "there is no such home")
    return folder


def to_be_read(folder: Path) -> Path | None:
    """The user's folder of tuned files, or None if it cannot be read, with a warning.

    One that is named and not there is warned of, too, but may still be made.
    """
    try:
        os.listdir(folder)
    except FileNotFoundError as error:
        if folder == _named_tuned_dir(os.environ.get("GDN2GEN_TUNED_DIR")):
            _warn_of_tuned_dir(str(folder), str(error.strerror))
    except OSError as error:
        _warn_of_tuned_dir(str(folder), error.strerror or str(error))
        return None
    return folder


@cache
def _warn_of_tuned_dir(value: str, why: str) -> None:
    warnings.warn(
        f"no tuned files are read from {value} ({why}). Set GDN2GEN_TUNED_DIR to a folder of tuned "
        "files that can be read, or unset it",
        TunedFileWarning,
        stacklevel=3,
    )


def compiled_dir(said: Said | None = None) -> Path | None:
    """Kernels compiled ahead (GDN2GEN_COMPILED_DIR, or what was `said` of it): read, and never
    written."""
    value = (os.environ if said is None else said).get("GDN2GEN_COMPILED_DIR")
    return expanded(value) if value else None


def cache_dir(said: Said | None = None) -> Path:
    """Folder for kernels, studies and ledgers (GDN2GEN_CACHE_DIR, or what was `said` of it; or the
    user's cache).

    Where that cannot be written, a private temporary folder, with a warning; the compilers' own
    caches, without which no kernel compiles, are then moved there if need be.
    """
    read = {name: os.environ.get(name) for name in _SETTLING}
    if said is not None:
        read["GDN2GEN_CACHE_DIR"] = said.get("GDN2GEN_CACHE_DIR")
    key = (*read.values(),)
    if key not in _settled:
        folder = _settle(read)
        _settled[key] = _settled[(*read.values(),)] = folder
    return _settled[key]


def code_dir(name: str) -> Path:
    """The folder `name` of `cache_dir`, for code that is run; a private one if others write to it.

    With a warning, once for each folder.
    """
    folder = cache_dir() / name
    with suppress(OSError):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    return _trusted(folder)


_settled: dict[tuple[str | None, ...], Path] = {}


# All that `_settle` depends on.
_SETTLING: Final = (
    "GDN2GEN_CACHE_DIR",
    "XDG_CACHE_HOME",
    "HOME",
    "TRITON_CACHE_DIR",
    "TRITON_HOME",
    "TILELANG_CACHE_DIR",
)


def _settle(read: dict[str, str | None]) -> Path:
    """Of what was `read`, which is changed as the environment is."""
    user_cache = read["XDG_CACHE_HOME"] or "~/.cache"
    home = read["TRITON_HOME"] or "~"
    wanted = {
        "GDN2GEN_CACHE_DIR": f"{user_cache}/gdn2gen",
        "TRITON_CACHE_DIR": f"{home}/.triton/cache",
        "TILELANG_CACHE_DIR": "~/.tilelang/cache",
    }
    own, reasons = None, []
    for variable, usual in wanted.items():
        value = read[variable] or usual
        folder = expanded(value)
        why = why_unusable(folder) if folder else "there is no such home"
        if folder and why is None:
            own = own or (folder if variable == "GDN2GEN_CACHE_DIR" else None)
            continue
        reasons.append(f"{variable} ({value}: {why})")
        if variable != "GDN2GEN_CACHE_DIR":
            own_cache = str(private_dir() / variable.partition("_")[0].lower())
            os.environ[variable] = read[variable] = own_cache
    if reasons and compiled_dir() is not None:
        # nothing needs to be kept by a process whose kernels are compiled: it may lack any home
        try:
            return own or private_dir()
        except OSError:
            return Path(os.devnull)
    if reasons:
        warnings.warn(
            f"{private_dir()} is used where a folder cannot be written: {', '.join(reasons)}. To "
            "keep what is compiled, set each variable to a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )
    return own or private_dir()


@cache
def _trusted(folder: Path) -> Path:
    why = why_untrusted(folder)
    if why is None:
        return folder
    private = private_dir() / folder.name
    warnings.warn(
        f"code in {folder} could be someone else's, for {why}: {private} is used instead. Take "
        "the right to write from others (chmod go-w), or set GDN2GEN_CACHE_DIR to another folder",
        RuntimeWarning,
        stacklevel=3,
    )
    with suppress(OSError):
        private.mkdir(mode=0o755, parents=True, exist_ok=True)
    return private
