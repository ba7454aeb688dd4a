"""Where templates, tuned files and generated sources live, installed or in the source tree."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _data(name: str) -> Path:
    """`name` beside the package (source tree, editable install) or inside it (wheel)."""
    inside = _PACKAGE / "_data" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def templates_dir() -> Path:
    """Folder of the Jinja templates: `<language>/<stage>.py.jinja`."""
    return _data("templates")


def packaged_tuned_dir() -> Path:
    """Folder of the tuned files that ship with gdn2gen: `<op>/<gpu>.json`."""
    return _data("tuned")


def user_tuned_dir() -> Path:
    """The user's own folder of tuned files, looked at first: GDN2GEN_TUNED_DIR, or the cache's."""
    value = os.environ.get("GDN2GEN_TUNED_DIR")
    return Path(value).expanduser() if value else cache_dir() / "tuned"


def cache_dir() -> Path:
    """Folder for kernels, studies and ledgers (GDN2GEN_CACHE_DIR, or the user's cache)."""
    value = os.environ.get("GDN2GEN_CACHE_DIR")
    if value:
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "gdn2gen"
