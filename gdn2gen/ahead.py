"""TileLang programs compiled by threads, all of a pass at once.

A program takes 5 to 10 s where no cache has it, most of it in C++ and in nvcc: four of them in turn
would be most of a first training step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any


class AwaitedLaunch:
    """The `launch` of a module, once its program is compiled; raises what the compiler raised."""

    def __init__(self, launch: Callable[..., None], compiling: Future[Any]) -> None:
        self._launch = launch
        self._compiling: Future[Any] | None = compiling

    def __call__(self, **arguments: Any) -> None:
        if self._compiling is not None:
            self._compiling.result()
            self._compiling = None
        self._launch(**arguments)


def launch_when_compiled(module: ModuleType, launch: Callable[..., None]) -> AwaitedLaunch:
    """Have the module's program compiled by a thread from now on."""
    return AwaitedLaunch(launch, _compiling(module))


@cache
def _compiling(module: ModuleType) -> Future[Any]:
    return _pool().submit(module.compiled)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "gdn2gen-compile")
