"""A process in which tests have kernels interpreted, one check after another.

Which ones went before depends on which process of the tests was idle: one takes from the end of
another's part, so that a file's checks run before an earlier file's. What a check finds must not.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def prepare() -> None:
    """Before the first check."""
    import gdn2gen.measure.accuracy  # torch, Triton and the ops with it

    assert gdn2gen.measure.accuracy
    gc.collect()
    gc.freeze()


def alone(target: str, *args: Any) -> Any:
    """What `module:function` returns, called as if no check had been before it: no recipe was noted
    or pinned and no graph compiled, settings are the process's own, random numbers torch's first.

    Kernels that were loaded stay, which the process is shared for.
    """
    import torch

    from gdn2gen.store import pins

    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    pins.forget()
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
        dynamo.utils.counters.clear()
    with _settings(), torch.random.fork_rng(devices=[]):
        return function(*args)


@contextmanager
def _settings() -> Iterator[None]:
    """As before, afterwards; what libraries set when they are imported stays."""
    before = _set()
    try:
        yield
    finally:
        for name in {*_set()} - {*before}:
            del os.environ[name]
        os.environ.update(before)


def _set() -> dict[str, str]:
    return {x: y for x, y in os.environ.items() if x.startswith(("GDN2GEN_", "TRITON_"))}
