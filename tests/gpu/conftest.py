"""Compile what most tests run before the first of them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator

import pytest
from gpu_support import Kernels, compile_all, every_kernel, free_memory

from gdn2gen.base.environment import verifying


@pytest.fixture(scope="session", autouse=True)
def unverified() -> Iterator[None]:
    """What these tests run need not have been verified: they do that."""
    with verifying():
        yield


@pytest.fixture(scope="session")
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Kernels], None]:
    """compile_all by one of the pytest workers, while the others wait for what is named so."""

    def once(name: str, kernels: Kernels) -> None:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            return compile_all(kernels)
        # a worker's folder lies in one of the whole run
        with (tmp_path_factory.getbasetemp().parent / f"compiled-{name}").open("a") as done:
            fcntl.flock(done, fcntl.LOCK_EX)
            if os.fstat(done.fileno()).st_size == 0:
                compile_all(kernels)
                done.write("all")

    return once


@pytest.fixture(scope="session")
def kernels(compile_once: Callable[[str, Kernels], None]) -> None:
    compile_once("every-kernel", every_kernel())


@pytest.fixture
def whole_memory() -> Iterator[None]:
    """For tests that need tens of GB: the cache of torch is emptied before and after."""
    free_memory()
    yield
    free_memory()
