"""Carry the gradient of the state through the chunks of a sequence, last to first, by the scores of a group.

One program per sequence, value head and slice of V; the mirror of the scan, with the gradient of
the state held transposed, dS^T [BV, K]. dY is the gradient of o.

    dv^T = dY^T P + (dS^T k^T) tail step + D dY^T          P_ij = decay_ij step_j scores_ij
    dS^T <- dS^T gamma_C + (dY^T head) q

where decay_ij is what the state keeps from token j to token i, head from the chunk's start to a token,
tail from a token to the chunk's end, and gamma_C over all of it: factors of no channel.

    q          [B, T, H, K]     bf16  queries
    k          [B, T, H, K]     bf16  keys
    log_decay  [NT, HV, BT]     fp32  decay of each token, log2
    step       [NT, HV, BT]     fp32  step of each token, after its activation
    scores     [NT, H, BT, BT]  bf16  <q_i, k_j> of a group, as they are
    D          [HV, V]          fp32  factor of a token's own value, added to o
    do         [B, T, HV, V]    bf16  gradient of o
    dh         [NT, HV, V, K]   bf16  gradient of the state at the chunk's end, transposed
    dv         [B, T, HV, V]    bf16  gradient of v

Problem: mamba2 K=128 V=64 bf16, g bf16, softplus gate
Config:  BT=64 BV=64 heads=1 language=triton num_stages=2 num_warps=4
Template digest 85d69250f4267f2e; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,rate,D --stage reverse_scan_group --config \
      BT=64,BV=64,heads=1,language=triton,num_stages=2,num_warps=4
"""

import triton
import triton.language as tl


K, V = 128, 64
BT, BV = 64, 64


@triton.jit(do_not_specialize=["T", "H", "HV"])
def reverse_scan_group_kernel(
    q,
    k,
    log_decay,
    step,
    scores,
    D,
    do,
    dh,
    dv,
    T,
    H,
    HV,
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
    b_dS = tl.zeros([BV, K], tl.float32)

    b_skip = tl.load(D + i_h * V + o_v)[:, None]

    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    i_next = (i_first + n_chunks - 1).to(tl.int64)
    m_next = o_t < BT * tl.minimum(n_chunks, 1)
    b_log_decay_next = tl.load(log_decay + (i_next * HV + i_h) * BT + o_t, mask=m_next, other=0.0)
    b_step_next = tl.load(step + (i_next * HV + i_h) * BT + o_t, mask=m_next, other=0.0)
    p_score = (i_next * H + i_hq) * BT * BT + o_i * BT + o_j
    b_scores_next = tl.load(scores + p_score, mask=m_next[:, None], other=0.0)
    for i_back in range(n_chunks):
        i_t = n_chunks - 1 - i_back
        b_scores = b_scores_next

        b_log_decay, b_step = b_log_decay_next, b_step_next
        i_next = (i_first + i_t).to(tl.int64) - tl.minimum(i_t, 1)
        b_log_decay_next = tl.load(log_decay + (i_next * HV + i_h) * BT + o_t)
        b_step_next = tl.load(step + (i_next * HV + i_h) * BT + o_t)
        p_score = (i_next * H + i_hq) * BT * BT + o_i * BT + o_j
        b_scores_next = tl.load(scores + p_score)

        i_row = i_t * BT + o_t
        m_o = (i_row < n_tokens)[None, :]
        # well before the products that read it
        p_o = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
        b_do = tl.load(do + p_o, mask=m_o, other=0.0)
        p_k = ((i_start + i_row) * H + i_hq)[:, None] * K + o_k[None, :]
        b_k = tl.load(k + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)
        b_q = tl.load(q + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)

        i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
        # decay from the chunk's start to a token, from there to its end, and over all of it
        b_head = tl.exp2(tl.cumsum(b_log_decay, 0))
        b_tail = tl.exp2(tl.cumsum(b_log_decay, 0, reverse=True) - b_log_decay) * b_step
        b_gamma = tl.exp2(tl.sum(b_log_decay, 0))
        b_G = tl.cumsum(b_log_decay, 0)
        b_D = b_G[:, None] - b_G[None, :]
        b_D = tl.exp2(tl.where(o_i >= o_j, b_D, float("-inf")))
        b_P = (b_scores.to(tl.float32) * b_D * b_step[None, :]).to(tl.bfloat16)

        # stores come after the products that they would delay
        b_dSd = b_dS.to(tl.bfloat16)
        b_dv = tl.dot(b_dSd, tl.trans(b_k))
        b_dv *= b_tail[None, :]
        b_dv = tl.dot(b_do, b_P, b_dv)
        b_dv += b_do.to(tl.float32) * b_skip
        tl.store(dh + i_tile * K * V + o_v[:, None] * K + o_k[None, :], b_dSd)
        b_dS *= b_gamma
        b_outer = (b_do.to(tl.float32) * b_head[None, :]).to(tl.bfloat16)
        b_dS = tl.dot(b_outer, b_q, b_dS)

        tl.store(dv + p_o, b_dv.to(tl.bfloat16), mask=m_o)


def launch(
    q, k, log_decay, step, scores, D, do, dh, dv, *, n_sequences, T, H, HV, NS, segment
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    reverse_scan_group_kernel[(n_sequences * HV * (V // BV),)](
        q, k, log_decay, step, scores, D, do, dh, dv, T, H, HV,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=2,
    )
