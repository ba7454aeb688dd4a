"""Gated linear attention: decay per channel of K; nothing is erased, values are written as they
are."""

from __future__ import annotations

from typing import Final

from gdn2gen.family.recurrence import (
    KEY,
    PLAIN_CHANNEL_DECAY,
    QUERY,
    SEQUENCES,
    STATE,
    VALUE,
    Decay,
    Public,
    Recurrence,
)

GLA: Final = Recurrence(
    name="gla",
    title="Gated linear attention",
    source="arXiv 2312.06635",
    inputs=(
        QUERY,
        KEY,
        VALUE,
        PLAIN_CHANNEL_DECAY,
        STATE,
        SEQUENCES,
    ),
    decay=Decay("g"),
    erase=None,
    write=None,
    public=Public(
        chunk="chunk_gla",
        fla="fla.ops.gla",
        arguments=(
            "scale",
            "initial_state",
            "output_final_state",
            "state_v_first",
            "cu_seqlens",
            "cu_seqlens_cpu",
            "disable_recompute",
        ),
        recurrent="fused_recurrent_gla",
        recurrent_arguments=(
            "gv",
            "scale",
            "initial_state",
            "output_final_state",
            "reverse",
            "state_v_first",
            "cu_seqlens",
        ),
        recurrent_names=(("g", "gk"),),
    ),
    plans=("linear", "linear_fast", "linear_states"),
)
