"""Kernels for gated linear attention with the delta rule: generated, tuned per GPU, dispatched."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "batch_invariant",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gdn2",
    "chunk_gla",
    "chunk_kda",
    "chunk_mamba2",
    "chunk_simple_gla",
    "compile_kernels",
    "expected_decay",
    "explain",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn2",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_mamba2",
    "fused_recurrent_simple_gla",
    "gated_rms_norm",
    "generate",
    "mamba3_siso_combined",
    "mamba3_siso_step",
    "mamba_chunk_scan_combined",
    "pin",
    "reload",
    "selective_state_update",
    "short_convolution",
    "short_convolution_step",
    "tune",
    "verify",
    "warmup",
]

if TYPE_CHECKING:
    from gdn2gen.base.decay import expected_decay
    from gdn2gen.base.environment import batch_invariant
    from gdn2gen.ops.chunk import (
        chunk_delta_rule,
        chunk_gated_delta_rule,
        chunk_gdn2,
        chunk_gla,
        chunk_kda,
        chunk_mamba2,
        chunk_simple_gla,
    )
    from gdn2gen.ops.mamba import mamba_chunk_scan_combined
    from gdn2gen.ops.mamba3 import mamba3_siso_combined, mamba3_siso_step
    from gdn2gen.ops.parts import gated_rms_norm, short_convolution, short_convolution_step
    from gdn2gen.ops.recurrent import (
        fused_recurrent_delta_rule,
        fused_recurrent_gated_delta_rule,
        fused_recurrent_gdn2,
        fused_recurrent_gla,
        fused_recurrent_kda,
        fused_recurrent_mamba2,
        fused_recurrent_simple_gla,
    )
    from gdn2gen.ops.selective import selective_state_update
    from gdn2gen.store.dispatch import reload
    from gdn2gen.store.pins import pin
    from gdn2gen.workflows.compiled import compile_kernels
    from gdn2gen.workflows.explain import explain
    from gdn2gen.workflows.generate import generate
    from gdn2gen.workflows.tune import tune
    from gdn2gen.workflows.verify import verify
    from gdn2gen.workflows.warmup import warmup

# Lazy, so that the command line and the tuner's parent need not load torch.
_HOMES = {
    "batch_invariant": "gdn2gen.base.environment",
    "chunk_delta_rule": "gdn2gen.ops.chunk",
    "chunk_gated_delta_rule": "gdn2gen.ops.chunk",
    "chunk_gdn2": "gdn2gen.ops.chunk",
    "chunk_gla": "gdn2gen.ops.chunk",
    "chunk_kda": "gdn2gen.ops.chunk",
    "chunk_mamba2": "gdn2gen.ops.chunk",
    "chunk_simple_gla": "gdn2gen.ops.chunk",
    "compile_kernels": "gdn2gen.workflows.compiled",
    "expected_decay": "gdn2gen.base.decay",
    "explain": "gdn2gen.workflows.explain",
    "fused_recurrent_delta_rule": "gdn2gen.ops.recurrent",
    "fused_recurrent_gated_delta_rule": "gdn2gen.ops.recurrent",
    "fused_recurrent_gdn2": "gdn2gen.ops.recurrent",
    "fused_recurrent_gla": "gdn2gen.ops.recurrent",
    "fused_recurrent_kda": "gdn2gen.ops.recurrent",
    "fused_recurrent_mamba2": "gdn2gen.ops.recurrent",
    "fused_recurrent_simple_gla": "gdn2gen.ops.recurrent",
    "gated_rms_norm": "gdn2gen.ops.parts",
    "generate": "gdn2gen.workflows.generate",
    "mamba3_siso_combined": "gdn2gen.ops.mamba3",
    "mamba3_siso_step": "gdn2gen.ops.mamba3",
    "mamba_chunk_scan_combined": "gdn2gen.ops.mamba",
    "pin": "gdn2gen.store.pins",
    "reload": "gdn2gen.store.dispatch",
    "selective_state_update": "gdn2gen.ops.selective",
    "short_convolution": "gdn2gen.ops.parts",
    "short_convolution_step": "gdn2gen.ops.parts",
    "tune": "gdn2gen.workflows.tune",
    "verify": "gdn2gen.workflows.verify",
    "warmup": "gdn2gen.workflows.warmup",
}


# `gdn2gen.nn.Mamba3` after `import gdn2gen` alone.
_PARTS = ("integrations", "nn", "ops")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What there is for a caller, loaded or not."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
