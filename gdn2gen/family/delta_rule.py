"""DeltaNet: nothing decays; one factor per head, which erases and writes."""

from __future__ import annotations

from typing import Final

from gdn2gen.family.recurrence import (
    KEY,
    PLAIN_BETA,
    QUERY,
    SEQUENCES,
    STATE,
    VALUE,
    Public,
    Recurrence,
)

DELTA_RULE: Final = Recurrence(
    name="delta_rule",
    title="DeltaNet",
    source="arXiv 2406.06484",
    inputs=(
        QUERY,
        KEY,
        VALUE,
        PLAIN_BETA,
        STATE,
        SEQUENCES,
    ),
    decay=None,
    erase="beta",
    write="beta",
    public=Public(
        chunk="chunk_delta_rule",
        fla="fla.ops.delta_rule",
        arguments=(
            "scale",
            "initial_state",
            "output_final_state",
            "use_qk_l2norm_in_kernel",
            "cu_seqlens",
            "cu_seqlens_cpu",
            "chunk_size",
            "disable_recompute",
        ),
        recurrent="fused_recurrent_delta_rule",
        recurrent_arguments=(
            "scale",
            "initial_state",
            "output_final_state",
            "use_qk_l2norm_in_kernel",
            "cu_seqlens",
        ),
    ),
    plans=(
        *("direct", "direct_states"),
        *("direct_blocks1", "direct_blocks2"),
        *("direct_blocks1_states", "direct_blocks2_states"),
        *("whole_direct", "whole_direct_blocks1", "whole_direct_blocks2"),
        "whole_direct_blocks2_states",
        *("direct_blocks2_transitions", "direct_blocks2_states_transitions"),
    ),
)
