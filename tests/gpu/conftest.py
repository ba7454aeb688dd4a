"""Compile what most tests run before the first of them, and say what failed when it fails."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from as_it_happens import AsItHappens
from gpu_support import Kernels, compile_all, every_kernel, free_memory

from gdn2gen.base.environment import verifying


def pytest_configure(config: pytest.Config) -> None:
    # by xdist's workers nothing is printed: their reports come to the process that prints
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(AsItHappens(config, Path(__file__).resolve().parent))


@pytest.fixture(scope="session", autouse=True)
def unverified() -> Iterator[None]:
    """What these tests run need not have been verified: they do that."""
    with verifying():
        yield


@pytest.fixture(scope="session")
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Kernels], None]:
    """compile_all by one of the pytest workers, while the others wait for what is named so.

    Of several runs side by side one compiles at a time: all cores are its, and what the others then
    ask for is mostly in the compiler's cache.
    """

    def compile_in_turn(kernels: Kernels) -> None:
        with (Path(tempfile.gettempdir()) / f"gdn2gen-compiles-{os.getuid()}").open("a") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            compile_all(kernels)

    def once(name: str, kernels: Kernels) -> None:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            return compile_in_turn(kernels)
        # a worker's folder lies in one of the whole run
        with (tmp_path_factory.getbasetemp().parent / f"compiled-{name}").open("a") as done:
            fcntl.flock(done, fcntl.LOCK_EX)
            if os.fstat(done.fileno()).st_size == 0:
                compile_in_turn(kernels)
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
