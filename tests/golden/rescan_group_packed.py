"""Scan the chunks of each segment in order, keeping what the backward needs, by the steps of heads.

rescan_group_kernel, one program per segment, value head and slice of V: the forward left the state at every
segment's start, so that segments run side by side. The state is held transposed, S^T [BV, K], so that it is
the left operand of every product and never leaves the registers.

    S^T <- S^T gamma_C + (v^T tail step) k

where what the state keeps is tail from a token to the chunk's end, and gamma_C over all of it: factors of no
channel.

gate_group_kernel, one program per chunk and HEADS heads of a group, one after the other, has no chunk to wait
for: it makes what o is before its gate again, with P_ij = decay_ij step_j scores_ij, and of it

    Y = (q S) head + P v + D v          dY = dO silu(z)          dz = dO Y silu'(z)

with decay_ij what the state keeps from token j to token i, head from the chunk's start to a token.

    v              [B, T, HV, V]      bf16   values
    q              [B, T, H, K]       bf16   queries
    k              [B, T, H, K]       bf16   keys
    log_decay      [NT, HV, BT]       fp32   decay of each token, log2
    step           [NT, HV, BT]       fp32   step of each token, after its activation
    scores         [NT, H, BT, BT]    bf16   <q_i, k_j> of a group, as they are
    D              [HV, V]            fp32   factor of a token's own value, added to o
    z              [B, T, HV, V]      bf16   output gate, before silu
    do             [B, T, HV, V]      bf16   gradient of o
    S_seg          [N, HV, NS, V, K]  fp32   state at the segment's start, transposed
    cu_seqlens     [N+1]              int32  first token of each sequence
    chunk_offsets  [N+1]              int32  first chunk of each sequence
    chunk_table    [NT, 2]            int32  first token and number of tokens of each chunk
    h              [NT, HV, V, K]     bf16   state at the chunk's start, transposed
    dz             [B, T, HV, V]      bf16   gradient of z
    dy             [B, T, HV, V]      bf16   gradient of o before its gate
    dD             [NT, HV, V]        fp32   gradient of D: sums over the chunk's tokens

Problem: mamba2 K=128 V=64 bf16, g bf16, softplus gate, packed sequences
Config:  BT=64 BV=64 gating=apart heads=1 language=triton num_stages=2 num_warps=4
Template digest bbe6d3030fa95415; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,varlen,rate,D,z --stage rescan_group --config \
      BT=64,BV=64,gating=apart,heads=1,language=triton,num_stages=2,num_warps=4
"""

import triton
import triton.language as tl


K, V = 128, 64
BT, BV = 64, 64
HEADS = 8  # heads of a program of gate_group_kernel


@triton.jit(do_not_specialize=["T", "H", "HV", "NS", "segment"])
def rescan_group_kernel(
    v,
    k,
    log_decay,
    step,
    S_seg,
    cu_seqlens,
    chunk_offsets,
    h,
    T,
    H,
    HV,
    NS,
    segment,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BV)
    i_seg = tl.program_id(0) // (V // BV)
    i_nh, i_s = i_seg // NS, i_seg % NS
    i_n, i_h = i_nh // HV, i_nh % HV
    i_hq = i_h // (HV // H)
    i_first = tl.load(chunk_offsets + i_n)
    n_chunks = tl.load(chunk_offsets + i_n + 1) - i_first
    i_start = tl.load(cu_seqlens + i_n).to(tl.int64)
    n_tokens = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - i_start.to(tl.int32)

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    p_kept = (i_nh.to(tl.int64) * NS + i_s) * K * V + o_v[:, None] * K + o_k[None, :]
    b_S = tl.load(S_seg + p_kept)
    # the segment's own chunks and tokens
    n_chunks = tl.minimum(n_chunks - i_s * segment, segment)
    i_first += i_s * segment
    i_start += i_s * segment * BT
    n_tokens -= i_s * segment * BT
    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    m_v = (o_t < n_tokens)[None, :]
    p_v = ((i_start + o_t) * HV + i_h)[None, :] * V + o_v[:, None]
    b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
    m_next = o_t < BT * tl.minimum(n_chunks, 1)
    p_next = (i_first.to(tl.int64) * HV + i_h) * BT + o_t
    b_log_decay_next = tl.load(log_decay + p_next, mask=m_next, other=0.0)
    b_step_next = tl.load(step + p_next, mask=m_next, other=0.0)
    for i_t in range(n_chunks):
        b_v, b_log_decay, b_step = b_v_next, b_log_decay_next, b_step_next
        i_row = i_t * BT + o_t
        i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
        m_v = (i_row + BT < n_tokens)[None, :]
        p_v = ((i_start + i_row + BT) * HV + i_h)[None, :] * V + o_v[:, None]
        b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
        p_next = (i_tile + HV * tl.minimum(n_chunks - 1 - i_t, 1)) * BT + o_t
        b_log_decay_next = tl.load(log_decay + p_next)
        b_step_next = tl.load(step + p_next)
        p_k = ((i_start + i_row) * H + i_hq)[:, None] * K + o_k[None, :]
        b_k = tl.load(k + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)
        # decay from a token to the chunk's end, and over all of it
        b_tail = tl.exp2(tl.cumsum(b_log_decay, 0, reverse=True) - b_log_decay) * b_step
        b_gamma = tl.exp2(tl.sum(b_log_decay, 0))
        tl.store(h + i_tile * K * V + o_v[:, None] * K + o_k[None, :], b_S.to(tl.bfloat16))
        b_S *= b_gamma
        b_outer = (b_v.to(tl.float32) * b_tail[None, :]).to(tl.bfloat16)
        b_S = tl.dot(b_outer, b_k, b_S)


@triton.jit(do_not_specialize=["T", "H", "HV", "z_row"])
def gate_group_kernel(
    v,
    q,
    log_decay,
    step,
    scores,
    D,
    z,
    do,
    h,
    dz,
    dy,
    dD,
    chunk_table,
    T,
    H,
    HV,
    z_row,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    HEADS: tl.constexpr,
):
    # as many programs of a chunk to each group
    of_group = HV // H
    n_parts = tl.cdiv(of_group, HEADS)
    i_c, i_p = tl.program_id(0) // (H * n_parts), tl.program_id(0) % (H * n_parts)
    i_hq, i_part = i_p // n_parts, i_p % n_parts
    i_first = i_hq * of_group + i_part * HEADS
    n_heads = tl.minimum(of_group - i_part * HEADS, HEADS)
    i_start = tl.load(chunk_table + i_c * 2).to(tl.int64)
    n_rows = tl.load(chunk_table + i_c * 2 + 1)
    if n_rows == 0:
        return

    o_t = tl.arange(0, BT)
    o_i, o_j = o_t[:, None], o_t[None, :]
    m_t = (o_t < n_rows)[:, None]
    o_k = tl.arange(0, K)
    p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q + p_q, mask=m_t, other=0.0)
    p_score = (i_c.to(tl.int64) * H + i_hq) * BT * BT + o_i * BT + o_j
    b_scores = tl.load(scores + p_score).to(tl.float32)
    for i_n in tl.range(0, n_heads):
        i_h = i_first + i_n
        i_tile = i_c.to(tl.int64) * HV + i_h
        b_log_decay = tl.load(log_decay + i_tile * BT + o_t)
        b_step = tl.load(step + i_tile * BT + o_t)
        b_head = tl.exp2(tl.cumsum(b_log_decay, 0))
        b_G = tl.cumsum(b_log_decay, 0)
        b_D = b_G[:, None] - b_G[None, :]
        b_D = tl.exp2(tl.where(o_i >= o_j, b_D, float("-inf")))
        b_P = (b_scores * b_D * b_step[None, :]).to(tl.bfloat16)
        o_v = tl.arange(0, V)
        p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
        p_z = i_start * (z_row * 8) + i_h * V + o_t[:, None] * (z_row * 8) + o_v[None, :]
        b_z = tl.load(z + p_z, mask=m_t, other=0.0)
        b_do = tl.load(do + p_o, mask=m_t, other=0.0)
        b_h = tl.load(h + i_tile * K * V + o_v[:, None] * K + o_k[None, :])
        b_y = tl.dot(b_q, tl.trans(b_h))
        b_v = tl.load(v + p_o, mask=m_t, other=0.0)
        b_y = tl.dot(b_P, b_v, b_y * b_head[:, None])
        b_skip = tl.load(D + i_h * V + o_v)
        b_y += b_v.to(tl.float32) * b_skip[None, :]
        b_x = b_z.to(tl.float32)
        b_sigmoid = tl.rsqrt(1.0 + tl.exp2(b_x * -1.4426950408889634))
        b_sigmoid *= b_sigmoid
        b_dx = b_do.to(tl.float32) * b_sigmoid
        # before dy is rounded: a sum over all tokens shows what each of them lost
        b_dD = tl.sum(b_dx * b_x * b_v.to(tl.float32), 0)
        tl.store(dD + i_tile * V + o_v, b_dD)
        tl.store(dy + p_o, (b_dx * b_x).to(tl.bfloat16), mask=m_t)
        # first what is of z and dO, so that one tile alone is laid out as the product is
        b_dx *= 1.0 + b_x * (1.0 - b_sigmoid)
        tl.store(dz + p_o, (b_dx * b_y).to(tl.bfloat16), mask=m_t)


def launch(
    v, q, k, log_decay, step, scores, D, z, do, S_seg, cu_seqlens, chunk_offsets, chunk_table,
    h, dz, dy, dD, *, n_sequences, T, H, HV, NS, segment, z_row
):
    """Launch one program per segment, value head and slice of V on the current stream; then the gate."""
    rescan_group_kernel[(n_sequences * HV * NS * (V // BV),)](
        v, k, log_decay, step, S_seg, cu_seqlens, chunk_offsets, h, T, H, HV, NS, segment,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=2,
    )
    # chunks that there are, or of a packed batch may be
    n_chunks = T // BT + n_sequences
    gate_group_kernel[(n_chunks * H * -(-HV // H // HEADS),)](
        v, q, log_decay, step, scores, D, z, do, h, dz, dy, dD, chunk_table, T, H, HV, z_row,
        K=K, V=V, BT=BT, HEADS=HEADS, num_warps=4, num_stages=2,
    )
