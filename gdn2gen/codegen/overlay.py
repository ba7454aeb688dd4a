"""Triton's cache, with a folder of kernels that ship in front of it (`codegen.shipped`).

Triton asks for a manager by the key of what it wants, and compiles what the manager lacks. Imports
Triton.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from triton.runtime.cache import CacheManager, FileCacheManager

from gdn2gen.base.paths import cache_dir
from gdn2gen.codegen.shipped import TRITON, shipped

# What Triton compiles in C whatever the kernel. Its key names where the build machine keeps the
# driver's library and Triton itself, which need not be where this one does; what it says does not
# depend on them (`shipped` has seen to Triton's version and Python's).
_FOR_ANY_KERNEL: Final = "cuda_utils"


class ShippedCache(CacheManager):  # type: ignore[misc]  # triton is untyped
    """What ships, and otherwise what there was: nothing is written to the folder that ships."""

    otherwise: type = FileCacheManager

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._given = (key, override, dump)
        folder = None if override or dump else shipped()
        self._root = None if folder is None else folder / TRITON

    @cached_property
    def _other(self) -> Any:
        cache_dir()  # moves the compilers' own caches where they cannot be written
        return self.otherwise(*self._given)

    def get_file(self, filename: str) -> str | None:
        found = self._path(filename)
        if found is not None:
            return str(found)
        other: str | None = self._other.get_file(filename)
        return other

    def get_group(self, filename: str) -> dict[str, str] | None:
        group = self._path(f"__grp__{filename}")
        if group is not None:
            # the paths in it are those of the machine that compiled
            names = json.loads(group.read_text())["child_paths"]
            paths = {name: self._path(name) for name in names}
            if filename in paths and all(paths.values()):
                return {name: str(path) for name, path in paths.items()}
        other: dict[str, str] | None = self._other.get_group(filename)
        return other

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        return str(self._other.put(data, filename, binary))

    def put_group(self, filename: str, group: dict[str, str]) -> Any:
        return self._other.put_group(filename, group)

    def _path(self, filename: str) -> Path | None:
        if self._root is None:
            return None
        path = self._root / self._given[0] / filename
        if path.is_file():
            return path
        if filename.startswith(_FOR_ANY_KERNEL):
            return next(self._root.glob(f"*/{filename}"), None)
        return None
