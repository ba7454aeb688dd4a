"""Compile what the tests run before the first of them, on all cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from gpu_support import every_kernel, free_memory

from gdn2gen.build import compile_ahead
from gdn2gen.device import present_device
from gdn2gen.errors import BuildError


@pytest.fixture(scope="session")
def kernels() -> None:
    """Fill Triton's cache: some 100 kernels at 1 to 10 s each would take minutes one by one.

    One that does not compile is left to the tests that launch it.
    """
    device = present_device()
    workers = min(14, max(2, (os.cpu_count() or 4) - 2))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        running = [pool.submit(compile_ahead, *kernel, device) for kernel in every_kernel()]
        for future in running:
            error = future.exception()
            if error is not None and not isinstance(error, BuildError):
                raise error


@pytest.fixture
def whole_memory() -> Iterator[None]:
    """For tests that need tens of GB: the cache of torch is emptied before and after."""
    free_memory()
    yield
    free_memory()
