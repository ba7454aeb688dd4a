"""Compile what most tests run before the first of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gpu_support import compile_all, every_kernel, free_memory


@pytest.fixture(scope="session")
def kernels() -> None:
    compile_all(every_kernel())


@pytest.fixture
def whole_memory() -> Iterator[None]:
    """For tests that need tens of GB: the cache of torch is emptied before and after."""
    free_memory()
    yield
    free_memory()
