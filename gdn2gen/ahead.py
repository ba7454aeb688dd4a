"""TileLang programs compiled by threads, all of a pass at once.

A program takes 5 to 10 s where no cache has it, most of it in C++ and in nvcc: four of them in turn
would be most of a first training step.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any

from gdn2gen.programs import compiled_program


def compile_in_thread(module: ModuleType) -> None:
    """Have the module's program compiled, or loaded, by a thread from now on.

    Its `launch` waits for it, and raises what the compiler raised.
    """
    module.compiled = _compiling(module).result  # type: ignore[attr-defined]


@cache
def _compiling(module: ModuleType) -> Future[Any]:
    return _pool().submit(compiled_program, module, module.compiled)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "gdn2gen-compile")
