"""Gated linear attention of one decay per head: nothing is erased, values are written as they are.

Mamba-2's recurrence, too (arXiv 2405.21060): q = C, k = B, v = dt x, g = A dt, scale = 1.
"""

from __future__ import annotations

from typing import Final

from gdn2gen.family.recurrence import (
    KEY,
    PLAIN_HEAD_DECAY,
    QUERY,
    SEQUENCES,
    STATE,
    VALUE,
    Decay,
    Public,
    Recurrence,
)

SIMPLE_GLA: Final = Recurrence(
    name="simple_gla",
    title="Simple gated linear attention",
    source="arXiv 2405.21060",
    inputs=(
        QUERY,
        KEY,
        VALUE,
        PLAIN_HEAD_DECAY,
        STATE,
        SEQUENCES,
    ),
    decay=Decay("g"),
    erase=None,
    write=None,
    public=Public(
        chunk="chunk_simple_gla",
        fla="fla.ops.simple_gla",
        arguments=(
            "g_gamma",
            "scale",
            "initial_state",
            "output_final_state",
            "state_v_first",
            "cu_seqlens",
            "cu_seqlens_cpu",
            "chunk_size",
            "disable_recompute",
        ),
        recurrent="fused_recurrent_simple_gla",
        recurrent_arguments=(
            "g_gamma",
            "scale",
            "initial_state",
            "output_final_state",
            "reverse",
            "state_v_first",
            "cu_seqlens",
        ),
    ),
    plans=("linear_direct", "linear_direct_states"),
)
