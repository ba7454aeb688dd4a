"""Tests marked `gpu` skip where no GPU is present, those marked `tilelang` where no compiler is.

Nothing else here touches CUDA.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

_CACHE = pytest.StashKey[str]()
# Tensors of tests are small: two processes that wait for each other's threads on two cores took
# 26 s of them for what one thread each does in 6. Here, for a folder's conftest.py imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """A cache of their own: no test sees what the user has set or tuned, or leaves anything
    behind."""
    for name in [x for x in os.environ if x.startswith("GDN2GEN_") or x == "COLUMNS"]:
        del os.environ[name]
    # What is synced outlives a loss of power, which no test plays; a search with a fake GPU syncs
    # its journal 6,000 times, and two thirds of its time went into waiting for the disk.
    os.fsync = lambda _: None
    config.stash[_CACHE] = tempfile.mkdtemp(prefix="gdn2gen-tests-")
    os.environ["GDN2GEN_CACHE_DIR"] = config.stash[_CACHE]


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the files of tests/golden anew"
    )
    parser.addoption(
        "--compiled",
        choices=("believe", "check", "update"),
        default="believe",
        help="what tests/unit/codegen/ahead_of_time.json says of kernels that take a compiler long",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _skip_unless(_has_gpu, "gpu", "no CUDA GPU is present", items)
    _skip_unless(_has_compiler, "tilelang", "neither nvcc nor NVRTC, for TileLang", items)


def pytest_collection_finish() -> None:
    """What is there now stays: to look through it for garbage took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each process begins with a part of the files, and takes from another's end when it is done:
    kernels that tests of a file share are loaded in one process, and none waits for the last."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def _skip_unless(
    has: Callable[[], bool], marker: str, reason: str, items: list[pytest.Item]
) -> None:
    """Skip what is marked where the machine lacks it; asked only if something is marked."""
    marked = [item for item in items if item.get_closest_marker(marker)]
    if not marked or has():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    from gdn2gen.base.device import has_gpu

    return has_gpu()


def _has_compiler() -> bool:
    from gdn2gen.codegen.nvrtc import has_compiler

    return has_compiler()
