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

from gdn2gen.codegen.programs import compiled_program, programs_of


def compile_in_thread(module: ModuleType) -> None:
    """Have the module's programs compiled, or loaded, by threads from now on.

    Its `launch` waits for them, and raises what the compiler raised.
    """
    for name in programs_of(module):
        setattr(module, name, _compiling(module, name).result)


@cache
def _compiling(module: ModuleType, name: str) -> Future[Any]:
    # the function itself: what it is called by is replaced before the thread begins
    return _pool().submit(compiled_program, module, name, getattr(module, name))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "gdn2gen-compile")
