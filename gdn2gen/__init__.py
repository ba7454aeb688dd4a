"""Kernels for gated linear attention with the delta rule: generated, tuned per GPU, dispatched."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gdn2",
    "chunk_gla",
    "chunk_kda",
    "chunk_simple_gla",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn2",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_simple_gla",
    "generate",
    "mamba_chunk_scan_combined",
    "reload",
]

if TYPE_CHECKING:
    from gdn2gen.ops.chunk import (
        chunk_delta_rule,
        chunk_gated_delta_rule,
        chunk_gdn2,
        chunk_gla,
        chunk_kda,
        chunk_simple_gla,
    )
    from gdn2gen.ops.mamba import mamba_chunk_scan_combined
    from gdn2gen.ops.recurrent import (
        fused_recurrent_delta_rule,
        fused_recurrent_gated_delta_rule,
        fused_recurrent_gdn2,
        fused_recurrent_gla,
        fused_recurrent_kda,
        fused_recurrent_simple_gla,
    )
    from gdn2gen.store.dispatch import reload
    from gdn2gen.tune.packages import generate

# Lazy, so that the command line and the tuner's parent need not load torch.
_HOMES = {
    "chunk_delta_rule": "gdn2gen.ops.chunk",
    "chunk_gated_delta_rule": "gdn2gen.ops.chunk",
    "chunk_gdn2": "gdn2gen.ops.chunk",
    "chunk_gla": "gdn2gen.ops.chunk",
    "chunk_kda": "gdn2gen.ops.chunk",
    "chunk_simple_gla": "gdn2gen.ops.chunk",
    "fused_recurrent_delta_rule": "gdn2gen.ops.recurrent",
    "fused_recurrent_gated_delta_rule": "gdn2gen.ops.recurrent",
    "fused_recurrent_gdn2": "gdn2gen.ops.recurrent",
    "fused_recurrent_gla": "gdn2gen.ops.recurrent",
    "fused_recurrent_kda": "gdn2gen.ops.recurrent",
    "fused_recurrent_simple_gla": "gdn2gen.ops.recurrent",
    "generate": "gdn2gen.tune.packages",
    "mamba_chunk_scan_combined": "gdn2gen.ops.mamba",
    "reload": "gdn2gen.store.dispatch",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What there is for a caller, loaded or not."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
