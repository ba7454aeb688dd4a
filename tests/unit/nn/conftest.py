"""What tests of layers share."""

from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Graphs are counted by code and process: those of earlier tests, whichever a worker drew,
    would be among the eight that torch.compile allows a layer's code."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
