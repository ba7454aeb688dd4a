"""A check that leaves all that one can, and one that says what it finds."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch_checks import make, outputs

import gdn2gen
from gdn2gen.base.errors import DispatchError

SETTINGS = ("GDN2GEN_EXPECTED_DECAY", "GDN2GEN_CACHE_DIR", "TRITON_INTERPRET")


def leave() -> dict[str, Any]:
    """Everything that `find` looks at is another afterwards; what it says then."""
    os.environ["GDN2GEN_EXPECTED_DECAY"] = "strong"
    os.environ["GDN2GEN_CACHE_DIR"] += "/other"
    with torch.no_grad():
        outputs(**make())
    _graphs()
    gdn2gen.pin(gdn2gen.pin(), strict=True)
    torch.manual_seed(5)
    left = find()
    del os.environ["TRITON_INTERPRET"]  # last, for without it no kernel runs
    return left


def find() -> dict[str, Any]:
    return {
        "settings": {x: os.environ.get(x) for x in SETTINGS},
        "recipes": gdn2gen.pin()["recipes"],
        "refused": _is_refused(),
        "graphs": _graphs(),
        "drawn": torch.rand(2).tolist(),
    }


def _is_refused() -> bool:
    """Whether a call of another problem is, for what is pinned."""
    with torch.no_grad():
        try:
            outputs(**make(V=64))
        except DispatchError:
            return True
    return False


def _graphs() -> tuple[int, int]:
    """How many were compiled, before a call that is and after it: none more, if it was before."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        torch.compile(outputs, backend="eager")(**make())
    return before, counters["stats"]["unique_graphs"]
