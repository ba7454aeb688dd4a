"""Gated DeltaNet: one decay per head; one factor per head, which erases and writes."""

from __future__ import annotations

from typing import Final

from gdn2gen.family.recurrence import (
    BETA,
    HEAD_BIAS,
    HEAD_DECAY,
    HEAD_GATES,
    HEAD_RATE,
    KEY,
    QUERY,
    SEQUENCES,
    STATE,
    VALUE,
    Decay,
    Public,
    Recurrence,
)

GATED_DELTA_RULE: Final = Recurrence(
    name="gated_delta_rule",
    title="Gated DeltaNet",
    source="arXiv 2412.06464",
    inputs=(
        QUERY,
        KEY,
        VALUE,
        HEAD_DECAY,
        BETA,
        STATE,
        HEAD_RATE,
        HEAD_BIAS,
        SEQUENCES,
    ),
    decay=Decay("g", HEAD_GATES),
    erase="beta",
    write="beta",
    public=Public(
        chunk="chunk_gated_delta_rule",
        fla="fla.ops.gated_delta_rule",
        arguments=(
            "scale",
            "initial_state",
            "output_final_state",
            "use_qk_l2norm_in_kernel",
            "use_beta_sigmoid_in_kernel",
            "allow_neg_eigval",
            "state_v_first",
            "cu_seqlens",
            "cu_seqlens_cpu",
            "use_gate_in_kernel",
            "A_log",
            "dt_bias",
            "chunk_size",
            "disable_recompute",
        ),
        recurrent="fused_recurrent_gated_delta_rule",
        recurrent_arguments=(
            "gk",
            "gv",
            "beta",
            "scale",
            "initial_state",
            "output_final_state",
            "use_qk_l2norm_in_kernel",
            "use_gate_in_kernel",
            "A_log",
            "dt_bias",
            "use_beta_sigmoid_in_kernel",
            "allow_neg_eigval",
            "state_v_first",
            "cu_seqlens",
        ),
    ),
    plans=(
        *("direct", "direct_states"),
        *("direct_blocks1", "direct_blocks2"),
        *("direct_blocks1_states", "direct_blocks2_states"),
    ),
)
