"""Kernels for gated linear attention with the delta rule: generated, tuned per GPU, dispatched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "chunk_gdn2"]

if TYPE_CHECKING:
    from gdn2gen.ops import chunk_gdn2


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line and the tuner's parent need not load torch.
    if name == "chunk_gdn2":
        from gdn2gen.ops import chunk_gdn2

        return chunk_gdn2
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
