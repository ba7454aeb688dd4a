"""Gated DeltaNet-2: decay and erase factor per channel of K, write factor per channel of V."""

from __future__ import annotations

from typing import Final

from gdn2gen.family.recurrence import (
    BIAS,
    CHANNEL_DECAY,
    GATES,
    KEY,
    QUERY,
    RATE,
    SEQUENCES,
    STATE,
    VALUE,
    Decay,
    Input,
    Public,
    Recurrence,
)

GDN2: Final = Recurrence(
    name="gdn2",
    title="Gated DeltaNet-2",
    source="arXiv 2605.22791",
    inputs=(
        QUERY,
        KEY,
        VALUE,
        CHANNEL_DECAY,
        Input("b", "B T HG K", "erase gate in [0, 1], or [0, 2]", draw="unit"),
        Input("w", "B T HV V", "write gate, usually in [0, 1]", draw="unit"),
        STATE,
        RATE,
        BIAS,
        SEQUENCES,
    ),
    decay=Decay("g", GATES),
    erase="b",
    write="w",
    public=Public(
        chunk="chunk_gdn2",
        fla="fla.ops.gdn2",
        arguments=(
            "scale",
            "initial_state",
            "output_final_state",
            "use_qk_l2norm_in_kernel",
            "use_gate_in_kernel",
            "cu_seqlens",
            "cu_seqlens_cpu",
            "safe_gate",
            "lower_bound",
            "disable_recompute",
            "return_intermediate_states",
            "state_v_first",
            "A_log",
            "dt_bias",
            "chunk_size",
        ),
        recurrent="fused_recurrent_gdn2",
        recurrent_arguments=(
            "A_log",
            "dt_bias",
            "scale",
            "initial_state",
            "output_final_state",
            "use_qk_l2norm_in_kernel",
            "use_gate_in_kernel",
            "lower_bound",
            "state_v_first",
            "cu_seqlens",
        ),
    ),
    plans=(
        *("lean", "fast", "states"),
        *("blocks1", "blocks2", "blocks4"),
        *("blocks1_states", "blocks2_states", "blocks4_states"),
        *("whole", "whole_blocks1", "whole_blocks2"),
        *("whole_blocks1_states", "whole_blocks2_states"),
        *("blocks2_transitions", "blocks2_states_transitions"),
    ),
)
