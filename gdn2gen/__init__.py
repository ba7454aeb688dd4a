"""Kernels for gated linear attention with the delta rule: generated, tuned per GPU, dispatched."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "chunk_gated_delta_rule",
    "chunk_gdn2",
    "chunk_kda",
    "fused_recurrent_gdn2",
    "fused_recurrent_kda",
    "gated_rms_norm",
    "generate",
    "reload",
    "short_convolution",
    "short_convolution_step",
]

if TYPE_CHECKING:
    from gdn2gen.ops.chunk import chunk_gated_delta_rule, chunk_gdn2, chunk_kda
    from gdn2gen.ops.parts import gated_rms_norm, short_convolution, short_convolution_step
    from gdn2gen.ops.recurrent import fused_recurrent_gdn2, fused_recurrent_kda
    from gdn2gen.store.dispatch import reload
    from gdn2gen.tune.packages import generate

# Lazy, so that the command line and the tuner's parent need not load torch.
_HOMES = {
    "chunk_gated_delta_rule": "gdn2gen.ops.chunk",
    "chunk_gdn2": "gdn2gen.ops.chunk",
    "chunk_kda": "gdn2gen.ops.chunk",
    "fused_recurrent_gdn2": "gdn2gen.ops.recurrent",
    "fused_recurrent_kda": "gdn2gen.ops.recurrent",
    "gated_rms_norm": "gdn2gen.ops.parts",
    "generate": "gdn2gen.tune.packages",
    "reload": "gdn2gen.store.dispatch",
    "short_convolution": "gdn2gen.ops.parts",
    "short_convolution_step": "gdn2gen.ops.parts",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What there is for a caller, loaded or not."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
