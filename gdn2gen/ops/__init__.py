"""The public ops, one import line away from flash-linear-attention's and mamba_ssm's.

chunk      chunk_gdn2, chunk_kda, chunk_gated_delta_rule, chunk_delta_rule, chunk_gla,
           chunk_simple_gla, chunk_mamba2
recurrent  fused_recurrent_gdn2, fused_recurrent_kda, fused_recurrent_gated_delta_rule,
           fused_recurrent_delta_rule, fused_recurrent_gla, fused_recurrent_simple_gla,
           fused_recurrent_mamba2
parts      short_convolution, short_convolution_step, gated_rms_norm: what layers have beside
decay_gate  decay_gate: the gate of a decay by itself
mamba      mamba_chunk_scan_combined
selective  selective_state_update
mamba3     mamba3_siso_combined, mamba3_siso_step
"""
