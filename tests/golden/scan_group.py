"""Scan the chunks of a sequence in order, by the scores of a group.

One program per sequence, value head and slice of V; the state is held transposed, S^T [BV, K], so
that it is the left operand of every product and never leaves the registers. At the start of every
segment of chunks it is written out, for the backward to start from.

    Y^T = (S^T q^T) head + v^T P^T + D v^T          P_ij = decay_ij step_j scores_ij
    O^T = Y^T silu(z^T)
    S^T <- S^T gamma_C + (v^T tail step) k

where decay_ij is what the state keeps from token j to token i, head from the chunk's start to a token,
tail from a token to the chunk's end, and gamma_C over all of it: factors of no channel.

    v          [B, T, HV, V]      bf16  values
    q          [B, T, H, K]       bf16  queries
    k          [B, T, H, K]       bf16  keys
    log_decay  [NT, HV, BT]       fp32  decay of each token, log2
    step       [NT, HV, BT]       fp32  step of each token, after its activation
    scores     [NT, H, BT, BT]    bf16  <q_i, k_j> of a group, as they are
    D          [HV, V]            fp32  factor of a token's own value, added to o
    z          [B, T, HV, V]      bf16  output gate, before silu
    o          [B, T, HV, V]      bf16  output
    S_seg      [N, HV, NS, V, K]  fp32  state at the segment's start, transposed

Problem: mamba2 K=128 V=64 bf16, g bf16, softplus gate
Config:  BT=64 BV=64 heads=1 language=triton num_stages=2 num_warps=4
Template digest f43650211490a25f; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,rate,D,z --stage scan_group --config \
      BT=64,BV=64,heads=1,language=triton,num_stages=2,num_warps=4
"""

import triton
import triton.language as tl


K, V = 128, 64
BT, BV = 64, 64


@triton.jit(do_not_specialize=["T", "H", "HV", "NS", "segment", "z_row"])
def scan_group_kernel(
    v,
    q,
    k,
    log_decay,
    step,
    scores,
    D,
    z,
    o,
    S_seg,
    T,
    H,
    HV,
    NS,
    segment,
    z_row,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BV)
    i_nh = tl.program_id(0) // (V // BV)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_hq = i_h // (HV // H)

    n_chunks = tl.cdiv(T, BT)
    i_first = i_n * n_chunks
    i_start = i_n.to(tl.int64) * T
    n_tokens = T

    o_t = tl.arange(0, BT)
    o_i, o_j = o_t[:, None], o_t[None, :]
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    p_kept = ((i_n * HV + i_h).to(tl.int64) * NS) * K * V + o_v[:, None] * K + o_k[None, :]
    b_S = tl.zeros([BV, K], tl.float32)

    b_skip = tl.load(D + i_h * V + o_v)[:, None]

    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    m_v = (o_t < n_tokens)[None, :]
    p_v = ((i_start + o_t) * HV + i_h)[None, :] * V + o_v[:, None]
    b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
    i_next = tl.cast(i_first, tl.int64)
    m_next = o_t < BT * tl.minimum(n_chunks, 1)
    b_log_decay_next = tl.load(log_decay + (i_next * HV + i_h) * BT + o_t, mask=m_next, other=0.0)
    b_step_next = tl.load(step + (i_next * HV + i_h) * BT + o_t, mask=m_next, other=0.0)
    p_score = (i_next * H + i_hq) * BT * BT + o_i * BT + o_j
    b_scores_next = tl.load(scores + p_score, mask=m_next[:, None], other=0.0)
    for i_s in range(NS):
        tl.store(S_seg + p_kept + i_s * K * V, b_S)
        for i_t in range(i_s * segment, tl.minimum(n_chunks, (i_s + 1) * segment)):
            b_scores = b_scores_next

            b_v, b_log_decay, b_step = b_v_next, b_log_decay_next, b_step_next
            i_row = i_t * BT + o_t
            m_o = (i_row < n_tokens)[None, :]
            # rows of z may lie apart
            p_z = (i_start + i_row)[None, :] * (z_row * 8) + (i_h * V + o_v)[:, None]
            b_z = tl.load(z + p_z, mask=m_o, other=0.0)
            m_v = (i_row + BT < n_tokens)[None, :]
            p_v = ((i_start + i_row + BT) * HV + i_h)[None, :] * V + o_v[:, None]
            b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
            i_next = (i_first + i_t).to(tl.int64) + tl.minimum(n_chunks - 1 - i_t, 1)
            b_log_decay_next = tl.load(log_decay + (i_next * HV + i_h) * BT + o_t)
            b_step_next = tl.load(step + (i_next * HV + i_h) * BT + o_t)
            p_score = (i_next * H + i_hq) * BT * BT + o_i * BT + o_j
            b_scores_next = tl.load(scores + p_score)

            p_k = ((i_start + i_row) * H + i_hq)[:, None] * K + o_k[None, :]
            b_k = tl.load(k + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)
            b_q = tl.load(q + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)

            # decay from the chunk's start to a token, from there to its end, and over all of it
            b_head = tl.exp2(tl.cumsum(b_log_decay, 0))
            b_tail = tl.exp2(tl.cumsum(b_log_decay, 0, reverse=True) - b_log_decay) * b_step
            b_gamma = tl.exp2(tl.sum(b_log_decay, 0))
            b_G = tl.cumsum(b_log_decay, 0)
            b_D = b_G[:, None] - b_G[None, :]
            b_D = tl.exp2(tl.where(o_i >= o_j, b_D, float("-inf")))
            b_P = (b_scores.to(tl.float32) * b_D * b_step[None, :]).to(tl.bfloat16)

            # stores come after the products that they would delay
            b_Sd = b_S.to(tl.bfloat16)
            b_o = tl.dot(b_Sd, tl.trans(b_q))
            b_o *= b_head[None, :]
            b_S *= b_gamma
            b_outer = (b_v.to(tl.float32) * b_tail[None, :]).to(tl.bfloat16)
            b_S = tl.dot(b_outer, b_k, b_S)

            b_o = tl.dot(b_v, tl.trans(b_P), b_o)
            b_o += b_v.to(tl.float32) * b_skip
            b_x = b_z.to(tl.float32)
            b_sigmoid = tl.rsqrt(1.0 + tl.exp2(b_x * -1.4426950408889634))
            b_sigmoid *= b_sigmoid
            b_o *= b_x * b_sigmoid
            # offsets from the chunk's first row fit 32 bits
            p_o = o + ((i_start + i_t * BT) * HV + i_h) * V
            tl.store(p_o + o_t[None, :] * (HV * V) + o_v[:, None], b_o.to(tl.bfloat16), mask=m_o)


def launch(
    v, q, k, log_decay, step, scores, D, z, o, S_seg, *, n_sequences, T, H, HV, NS, segment,
    z_row
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    scan_group_kernel[(n_sequences * HV * (V // BV),)](
        v, q, k, log_decay, step, scores, D, z, o, S_seg, T, H, HV, NS, segment, z_row,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=2,
    )
