"""A process in which tests have kernels interpreted, before the first of them."""

from __future__ import annotations

import gc


def prepare() -> None:
    import gdn2gen.measure.accuracy  # torch, Triton and the ops with it

    assert gdn2gen.measure.accuracy
    gc.collect()
    gc.freeze()
