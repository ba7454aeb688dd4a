"""Tests marked `gpu` skip where no GPU is present. Nothing else here touches CUDA."""

from __future__ import annotations

import pytest


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
