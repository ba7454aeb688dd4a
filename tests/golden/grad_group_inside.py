"""The key side of the gradients where heads share the scores of their group: dq, dk, ddt and drate.

A program goes through some heads of a group one after the other, and adds up what they have in the
gradients of its q and k. Through the state, where v and dY are a head's,

    dq_i += head_i (dY S^T)_i          dk_j += tail_j step_j (v dS^T)_j

and through the scores, whose gradient dP = dY v^T is summed over the heads first:

    dscores_ij = sum of decay_ij step_j dP_ij          dq += dscores k          dk += dscores^T q

decay_ij is what the state keeps from token j to token i, head from the chunk's start to a token, tail from
a token to the chunk's end. What a token writes is its step times k v^T, and it decays by rate times
that: step_part holds the gradient of the first, and decay_part that of the second, to which pairs add
between their tokens, reads from the chunk's start on and writes up to its end,

    decay_part_t = sum over j < t <= i of decay_ij step_j dP_ij scores_ij  and so on.

No term of it is taken from another, so that it is exact however strong the decay is. fold_step_kernel
adds up the parts that slices of channels have in both.

grad_group_kernel: one program per chunk, HEADS heads of a group and slice of K.

    q           [B, T, H, K]      bf16  queries
    k           [B, T, H, K]      bf16  keys
    rate        [HV]              fp32  decay of a step of 1
    dt          [B, T, HV]        bf16  step: what a token decays by and writes
    dt_bias     [HV]              fp32  added to dt before its activation
    log_decay   [NT, HV, BT]      fp32  decay of each token, log2
    step        [NT, HV, BT]      fp32  step of each token, after its activation
    h           [NT, HV, V, K]    bf16  state at the chunk's start, transposed
    v           [B, T, HV, V]     bf16  values
    dh          [NT, HV, V, K]    bf16  gradient of the state at the chunk's end, transposed
    dy          [B, T, HV, V]     bf16  gradient of o before its gate
    dq          [B, T, HP, K]     bf16  gradient of q: sums over heads of a group
    dk          [B, T, HP, K]     bf16  gradient of k: sums over heads of a group
    decay_part  [NT, HV, NK, BT]  fp32  gradient of the log decay: sums over a slice of channels
    step_part   [NT, HV, NK, BT]  fp32  gradient of what a token writes, by its step: the same
    ddt         [B, T, HV]        bf16  gradient of dt
    drate       [NT, HV]          fp32  gradient of rate: sums over the chunk's tokens
    ddt_bias    [NT, HV]          fp32  gradient of dt_bias: sums over the chunk's tokens

Problem: mamba2 K=128 V=64 bf16, g bf16, softplus gate
Config:  BK=64 BT=64 heads=8 language=triton maxnreg=0 num_stages=2 num_warps=4 pairs=inside
Template digest 81847b2dfd5118a0; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,rate,D,z --stage grad_group --config \
      BK=64,BT=64,heads=8,language=triton,maxnreg=0,num_stages=2,num_warps=4,pairs=inside
"""

import triton
import triton.language as tl


K, V = 128, 64
BT, BK = 64, 64
HEADS, STAGES = 8, 2
BH = 16  # heads of a program of fold_step_kernel


@triton.jit(do_not_specialize=["T", "H", "HV"])
def grad_group_kernel(
    q,
    k,
    log_decay,
    step,
    h,
    v,
    dh,
    dy,
    dq,
    dk,
    decay_part,
    step_part,
    T,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_k = tl.program_id(0) % (K // BK)
    # HP programs of a chunk, as many to each group
    of_group = HV // H
    n_parts = tl.cdiv(of_group, HEADS)
    i_cp = tl.program_id(0) // (K // BK)
    i_c, i_p = i_cp // (H * n_parts), i_cp % (H * n_parts)
    i_hq, i_part = i_p // n_parts, i_p % n_parts
    i_first = i_hq * of_group + i_part * HEADS
    n_heads = tl.minimum(of_group - i_part * HEADS, HEADS)
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    o_t = tl.arange(0, BT)
    o_i, o_j = o_t[:, None], o_t[None, :]
    o_k = i_k * BK + tl.arange(0, BK)
    m_t = o_t < n_rows
    p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q + p_q, mask=m_t[:, None], other=0.0)
    b_k = tl.load(k + p_q, mask=m_t[:, None], other=0.0)
    # of this slice of channels
    b_scores = tl.where(o_i >= o_j, tl.dot(b_q, tl.trans(b_k)), 0.0)
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_dscores = tl.zeros([BT, BT], tl.float32)
    for i_n in tl.range(0, n_heads, num_stages=STAGES):
        i_h = i_first + i_n
        i_tile = i_c.to(tl.int64) * HV + i_h
        p_token = i_tile * BT + o_t
        o_v = tl.arange(0, V)
        p_h = i_tile * K * V + o_v[:, None] * K + o_k[None, :]
        p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
        b_h = tl.load(h + p_h)
        b_do = tl.load(dy + p_o, mask=m_t[:, None], other=0.0)
        b_dqh = tl.dot(b_do, b_h)
        b_dh = tl.load(dh + p_h)
        b_v = tl.load(v + p_o, mask=m_t[:, None], other=0.0)
        b_dkh = tl.dot(b_v, b_dh)
        b_dP = tl.dot(b_do, tl.trans(b_v))
        b_SdS = tl.dot(tl.trans(b_dh), b_h)
        # <S, dS> as the diagonal of a product: tiles that only products read are laid out without
        # bank conflicts
        b_dgamma_C = tl.sum(tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1), 0)
        b_log_decay = tl.load(log_decay + p_token)
        b_step = tl.load(step + p_token)
        b_G = tl.cumsum(b_log_decay, 0)
        b_D = b_G[:, None] - b_G[None, :]
        b_D = tl.exp2(tl.where(o_i >= o_j, b_D, float("-inf")))
        b_dP *= b_D
        b_dqh *= tl.exp2(tl.cumsum(b_log_decay, 0))[:, None]
        b_dkh *= tl.exp2(tl.cumsum(b_log_decay, 0, reverse=True) - b_log_decay)[:, None]
        # what a token takes from the state decays by its own and all earlier tokens of the chunk, and
        # what it writes by all later ones; a pair by those behind the first of both
        b_taken = tl.sum(b_q.to(tl.float32) * b_dqh, 1)
        b_written = tl.sum(b_k.to(tl.float32) * b_dkh, 1)
        b_pairs = b_scores * b_dP
        b_dstep = b_written + tl.sum(b_pairs, 0)
        b_pairs *= b_step[None, :]
        b_pairs = tl.cumsum(tl.where(o_i > o_j, b_pairs, 0.0), 0, reverse=True)
        b_written *= b_step
        b_dg = tl.sum(tl.where(o_i > o_j, b_pairs + b_written[None, :], 0.0), 1)
        b_dg += tl.sum(tl.where(o_i <= o_j, b_taken[None, :], 0.0), 1)
        b_dg += tl.exp2(tl.sum(b_log_decay, 0)) * b_dgamma_C
        b_dq += b_dqh
        b_dk += b_dkh * b_step[:, None]
        b_dscores += b_dP * b_step[None, :]
        p_part = (i_tile * (K // BK) + i_k) * BT + o_t
        tl.store(decay_part + p_part, b_dg, mask=m_t)
        tl.store(step_part + p_part, b_dstep, mask=m_t)

    b_dscores = tl.where(o_i >= o_j, b_dscores, 0.0).to(tl.bfloat16)
    b_dq = tl.dot(b_dscores, b_k, b_dq)
    b_dk = tl.dot(tl.trans(b_dscores), b_q, b_dk)
    p_out = (i_start * (H * n_parts) + i_p) * K + o_t[:, None] * (H * n_parts * K) + o_k[None, :]
    tl.store(dq + p_out, b_dq.to(tl.bfloat16), mask=m_t[:, None])
    tl.store(dk + p_out, b_dk.to(tl.bfloat16), mask=m_t[:, None])


@triton.jit(do_not_specialize=["T", "HV", "dt_row"])
def fold_step_kernel(
    rate,
    dt,
    dt_bias,
    step,
    decay_part,
    step_part,
    ddt,
    drate,
    ddt_bias,
    T,
    HV,
    dt_row,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """ddt and what its rate has of it, of a chunk and BH heads: sums over the slices of channels."""
    i_c = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    m_h = o_h < HV
    m_th = (o_t < n_rows)[:, None] & m_h[None, :]
    i_tile = i_c.to(tl.int64) * HV + o_h
    b_dg = tl.zeros([BT, BH], tl.float32)
    b_dstep = tl.zeros([BT, BH], tl.float32)
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_dg += tl.load(decay_part + p_part, mask=m_th, other=0.0)
        b_dstep += tl.load(step_part + p_part, mask=m_th, other=0.0)
    b_step = tl.load(step + i_tile[None, :] * BT + o_t[:, None], mask=m_th, other=0.0)
    tl.store(drate + i_tile, tl.sum(b_dg * b_step, 0), mask=m_h)
    b_dstep += b_dg * tl.load(rate + o_h, mask=m_h, other=0.0)[None, :]
    # through the activation
    p_dt = (i_start + o_t)[:, None] * dt_row + o_h[None, :]
    b_x = tl.load(dt + p_dt, mask=m_th, other=0.0).to(tl.float32)
    b_x += tl.load(dt_bias + o_h, mask=m_h, other=0.0)[None, :]
    b_dstep *= 1.0 / (1.0 + tl.exp(-b_x))
    tl.store(ddt_bias + i_tile, tl.sum(tl.where(m_th, b_dstep, 0.0), 0), mask=m_h)
    p_ddt = (i_start + o_t)[:, None] * HV + o_h[None, :]
    tl.store(ddt + p_ddt, b_dstep.to(tl.bfloat16), mask=m_th)


def launch(
    q, k, rate, dt, dt_bias, log_decay, step, h, v, dh, dy, dq, dk, decay_part, step_part, ddt,
    drate, ddt_bias, *, n_chunks, T, H, HV, dt_row
):
    """Launch both kernels on the current stream."""
    n_parts = H * -(-HV // H // HEADS)
    grad_group_kernel[(n_chunks * n_parts * (K // BK),)](
        q, k, log_decay, step, h, v, dh, dy, dq, dk, decay_part, step_part, T, H, HV,
        K=K, V=V, BT=BT, BK=BK, HEADS=HEADS, STAGES=STAGES,
        num_warps=4, num_stages=2,
    )
    fold_step_kernel[(n_chunks, -(-HV // BH))](
        rate, dt, dt_bias, step, decay_part, step_part, ddt, drate, ddt_bias, T, HV, dt_row,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
