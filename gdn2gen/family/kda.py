"""Kimi Delta Attention: decay per channel of K; one factor per head, which erases and writes."""

from __future__ import annotations

from typing import Final

from gdn2gen.family.recurrence import (
    BETA,
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
    Public,
    Recurrence,
)

KDA: Final = Recurrence(
    name="kda",
    title="Kimi Delta Attention",
    source="arXiv 2510.26692",
    inputs=(
        QUERY,
        KEY,
        VALUE,
        CHANNEL_DECAY,
        BETA,
        STATE,
        RATE,
        BIAS,
        SEQUENCES,
    ),
    decay=Decay("g", GATES),
    erase="beta",
    write="beta",
    public=Public(
        chunk="chunk_kda",
        fla="fla.ops.kda",
        arguments=(
            "scale",
            "initial_state",
            "output_final_state",
            "use_qk_l2norm_in_kernel",
            "use_gate_in_kernel",
            "use_beta_sigmoid_in_kernel",
            "allow_neg_eigval",
            "safe_gate",
            "lower_bound",
            "disable_recompute",
            "return_intermediate_states",
            "state_v_first",
            "cu_seqlens",
            "cu_seqlens_cpu",
            "A_log",
            "dt_bias",
            "chunk_size",
        ),
        recurrent="fused_recurrent_kda",
        recurrent_arguments=(
            "A_log",
            "dt_bias",
            "scale",
            "initial_state",
            "output_final_state",
            "use_qk_l2norm_in_kernel",
            "use_gate_in_kernel",
            "use_beta_sigmoid_in_kernel",
            "allow_neg_eigval",
            "lower_bound",
            "state_v_first",
            "cu_seqlens",
        ),
    ),
    plans=(
        *("lean", "fast", "states"),
        *("blocks1", "blocks2", "blocks4"),
        *("blocks1_states", "blocks2_states", "blocks4_states"),
    ),
)
