"""Tests marked `gpu` skip where no GPU is present. Nothing else here touches CUDA."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

_CACHE = pytest.StashKey[str]()
_SETTINGS = (
    *("GDN2GEN_CACHE_DIR", "GDN2GEN_TUNED_DIR", "GDN2GEN_STRICT", "GDN2GEN_DEBUG"),
    *("GDN2GEN_VERBOSE", "COLUMNS"),
)


def pytest_configure(config: pytest.Config) -> None:
    """A cache of their own: no test sees what the user has tuned, or leaves anything behind."""
    for name in _SETTINGS:
        os.environ.pop(name, None)
    config.stash[_CACHE] = tempfile.mkdtemp(prefix="gdn2gen-tests-")
    os.environ["GDN2GEN_CACHE_DIR"] = config.stash[_CACHE]


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the files of tests/golden anew"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from gdn2gen.device import has_gpu

    if has_gpu():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU is present")
    for item in marked:
        item.add_marker(skip)
