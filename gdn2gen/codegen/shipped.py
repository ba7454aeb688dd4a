"""Kernels that were compiled ahead and ship in a container: GDN2GEN_COMPILED_DIR names the folder.

`gdn2gen compile` writes it; it is read and never written, so its disk need not take anything. In it
are

    compiled.json   the toolchain and the GPU that it is for, and the recipes (`store.pins`)
    triton/         Triton's cache: binaries, and what Triton compiles in C to launch them
    programs/       TileLang's programs as libraries (`codegen.programs`)
    kernels/        the sources, for tracebacks

What is not in it is compiled as ever, and kept where that is kept.
"""

from __future__ import annotations

import json
import os
import sysconfig
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Final

from gdn2gen.base.device import versions_of
from gdn2gen.base.folders import is_trusted_file, why_untrusted
from gdn2gen.base.paths import compiled_dir

MANIFEST: Final = "compiled.json"
TRITON: Final = "triton"
SCHEMA: Final = 1
# Of the toolchain: what makes the binaries, and what loads them.
PACKAGES: Final = ("triton", "tilelang")


def shipped() -> Path | None:
    """The folder, if one is named, and was compiled by what is installed here."""
    return usable(compiled_dir())


def usable(named: Path | None) -> Path | None:
    """`shipped`, where this folder is named."""
    return None if named is None else _checked(named)


def source_of(file_name: str, source: str) -> Path | None:
    """The file of that source that ships, for whoever shows it."""
    folder = shipped()
    path = None if folder is None else folder / "kernels" / file_name
    try:
        return path if path is not None and path.read_bytes() == source.encode() else None
    except OSError:
        return None


def toolchain() -> dict[str, str]:
    """What a folder is compiled by, and can be read by."""
    return {**versions_of(PACKAGES), "extensions": str(sysconfig.get_config_var("EXT_SUFFIX"))}


@cache
def _checked(folder: Path) -> Path | None:
    why = _why_unfit(folder)
    if why is None:
        return folder
    warnings.warn(
        f"the kernels in {folder} (GDN2GEN_COMPILED_DIR) are not used: {why}. Write the folder "
        "anew with `gdn2gen compile`, or unset the variable",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _why_unfit(folder: Path) -> str | None:
    try:
        found = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    why = why_untrusted(folder)
    if why is not None:
        return f"they could be someone else's, for {why}"
    made_by, here = found.get("toolchain"), toolchain()
    if found.get("schema") != SCHEMA or made_by != here:
        return f"they were compiled by {made_by}, but {here} is here"
    return None


@cache
def read_manifest(folder: Path) -> dict[str, Any]:
    """compiled.json of a folder. Raises OSError and ValueError where there is none."""
    path = folder / MANIFEST
    if not is_trusted_file(path):
        raise OSError(f"{path} is not there, or others may write to it")
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


@cache
def install() -> None:
    """Have Triton look into the folder before it compiles, if one ships."""
    if shipped() is None:
        return
    from triton import knobs

    from gdn2gen.codegen.overlay import ShippedCache

    # not by assignment, which would name the class to all processes that this one starts
    before = knobs.cache.manager_class
    ShippedCache.otherwise = before or ShippedCache.otherwise
    vars(knobs.cache)["manager_class"] = ShippedCache


def look_anew() -> None:
    """Forget what was read of folders: later calls read them anew."""
    _checked.cache_clear()
    read_manifest.cache_clear()


def write_manifest(folder: Path, gpu: str, arch: str, recipes: list[dict[str, Any]]) -> Path:
    """Say what lies in the folder: last, so that a folder without it is none."""
    from gdn2gen.base.files import replace_file

    said = {"schema": SCHEMA, "toolchain": toolchain(), "gpu": gpu, "arch": arch}
    path = folder / MANIFEST
    replace_file(path, json.dumps({**said, "recipes": recipes}, indent=1) + "\n")
    os.chmod(path, 0o644)
    look_anew()
    return path
