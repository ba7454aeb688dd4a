"""The public ops, one import line away from flash-linear-attention's.

chunk      chunk_gdn2, chunk_kda, chunk_gated_delta_rule
recurrent  fused_recurrent_gdn2, fused_recurrent_kda
parts      short_convolution, short_convolution_step, gated_rms_norm: what layers have beside
"""
