"""The key side of the gradients where heads share the scores of their group: dq, dk, ddt and drate.

Programs go through some heads of a group one after the other. pair_group_kernel, one program per chunk and
HEADS heads, makes what pairs of tokens have, dP = dY v^T: the gradient of the scores, summed over the heads,

    dscores_ij = sum of decay_ij step_j dP_ij

with decay_ij what the state keeps from token j to token i, and of each head the sums over pairs

    step_pairs_j = sum over i of decay_ij dP_ij scores_ij
    decay_pairs_t = sum over j < t <= i of step_j decay_ij dP_ij scores_ij

the second by a product with ones, [j < t] ((step_j decay_ij dP_ij scores_ij) [i >= t]): rows are tokens j. Nothing
of it depends on a slice of channels. grad_group_kernel, one program per slice of K beside, makes what goes
through the state,

    taken_i = <q_i, (dY S^T)_i>          dq_i += head_i (dY S^T)_i
    written_j = <k_j, (v dS^T)_j>        dk_j += tail_j step_j (v dS^T)_j
    kept = <S, dS>                       dq += dscores k          dk += dscores^T q

head_i is the decay from the chunk's start to a token, tail_j from a token to the chunk's end. fold_parts_kernel
adds up slices of channels, and takes decays to tokens: a token decays what it and later ones take from the
state, and what earlier ones write. What a token writes is its step times k v^T, and it decays by rate times
that. No term of it is taken from another, so that it is exact however strong the decay is.

    q            [B, T, H, K]      bf16  queries
    k            [B, T, H, K]      bf16  keys
    rate         [HV]              fp32  decay of a step of 1
    dt           [B, T, HV]        bf16  step: what a token decays by and writes
    dt_bias      [HV]              fp32  added to dt before its activation
    log_decay    [NT, HV, BT]      fp32  decay of each token, log2
    step         [NT, HV, BT]      fp32  step of each token, after its activation
    h            [NT, HV, V, K]    bf16  state at the chunk's start, transposed
    v            [B, T, HV, V]     bf16  values
    dh           [NT, HV, V, K]    bf16  gradient of the state at the chunk's end, transposed
    dy           [B, T, HV, V]     bf16  gradient of o before its gate
    dq           [B, T, HP, K]     bf16  gradient of q: sums over heads of a group
    dk           [B, T, HP, K]     bf16  gradient of k: sums over heads of a group
    decay_pairs  [NT, HV, BT]      fp32  scratch: gradient of the log decay, of pairs
    step_pairs   [NT, HV, BT]      fp32  scratch: the same of what a token writes, by its step
    head_decay   [NT, HV, BT]      fp32  scratch: decay from the chunk's start to a token
    tail_step    [NT, HV, BT]      fp32  scratch: step of a token, decayed to the chunk's end
    taken        [NT, HV, NK, BT]  fp32  scratch: <q, dY S^T>: sums over a slice of channels
    written      [NT, HV, NK, BT]  fp32  scratch: <k, v dS^T>: the same
    kept         [NT, HV, NK]      fp32  scratch: <S, dS>: the same
    dscores      [NT, HP, BT, BT]  bf16  scratch: gradient of scores, transposed; sums over heads
    ddt          [B, T, HV]        bf16  gradient of dt
    drate        [NT, HV]          fp32  gradient of rate: sums over the chunk's tokens
    ddt_bias     [NT, HV]          fp32  gradient of dt_bias: sums over the chunk's tokens

Problem: mamba2 K=128 V=64 bf16, g bf16, softplus gate
Config:  BK=64 BT=64 heads=8 language=triton maxnreg=0 num_stages=2 num_warps=4 pairs=apart
Template digest 8e8c9bdaf021506a; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,rate,D,z --stage grad_group --config \
      BK=64,BT=64,heads=8,language=triton,maxnreg=0,num_stages=2,num_warps=4,pairs=apart
"""

import triton
import triton.language as tl


K, V = 128, 64
BT, BK = 64, 64
HEADS, STAGES = 8, 2
PAIR_WARPS = 4
BH = 16  # heads of a program of fold_parts_kernel


@triton.jit(do_not_specialize=["T", "H", "HV"])
def pair_group_kernel(
    q,
    k,
    log_decay,
    step,
    v,
    dy,
    dscores,
    decay_pairs,
    step_pairs,
    head_decay,
    tail_step,
    T,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_cp = tl.program_id(0)
    # HP programs of a chunk, as many to each group
    of_group = HV // H
    n_parts = tl.cdiv(of_group, HEADS)
    i_c, i_p = i_cp // (H * n_parts), i_cp % (H * n_parts)
    i_hq, i_part = i_p // n_parts, i_p % n_parts
    i_first = i_hq * of_group + i_part * HEADS
    n_heads = tl.minimum(of_group - i_part * HEADS, HEADS)
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    o_t = tl.arange(0, BT)
    m_t = o_t < n_rows
    # rows are tokens j that write, columns tokens i that read
    o_j, o_i = o_t[:, None], o_t[None, :]
    o_k = tl.arange(0, K)
    p_k = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_k = tl.load(k + p_k, mask=m_t[:, None], other=0.0)
    b_q = tl.load(q + p_k, mask=m_t[:, None], other=0.0)
    b_scores = tl.dot(b_k, tl.trans(b_q))
    b_ones = tl.where(o_j >= o_i, 1.0, 0.0).to(tl.bfloat16)
    b_dscores = tl.zeros([BT, BT], tl.float32)
    for i_n in tl.range(0, n_heads, num_stages=STAGES):
        i_h = i_first + i_n
        i_tile = i_c.to(tl.int64) * HV + i_h
        p_token = i_tile * BT + o_t
        o_v = tl.arange(0, V)
        p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
        b_do = tl.load(dy + p_o, mask=m_t[:, None], other=0.0)
        b_v = tl.load(v + p_o, mask=m_t[:, None], other=0.0)
        b_dP = tl.dot(b_v, tl.trans(b_do))
        b_log_decay = tl.load(log_decay + p_token)
        b_step = tl.load(step + p_token)
        b_G = tl.cumsum(b_log_decay, 0)
        tl.store(head_decay + p_token, tl.exp2(b_G))
        b_tail = tl.exp2(tl.cumsum(b_log_decay, 0, reverse=True) - b_log_decay)
        tl.store(tail_step + p_token, b_tail * b_step)
        b_D = b_G[None, :] - b_G[:, None]
        b_dP *= tl.exp2(tl.where(o_i >= o_j, b_D, float("-inf")))
        b_pairs = b_scores * b_dP
        tl.store(step_pairs + p_token, tl.sum(b_pairs, 1))
        b_dscores += b_dP * b_step[:, None]
        b_pairs *= b_step[:, None]
        # [j, t]: sums over i >= t
        # in two parts, which have 16 bits of it
        b_high = (b_pairs.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        b_low = b_pairs - b_high
        b_later = tl.dot(b_high.to(tl.bfloat16), b_ones)
        b_later = tl.dot(b_low.to(tl.bfloat16), b_ones, b_later)
        tl.store(decay_pairs + p_token, tl.sum(tl.where(o_j < o_i, b_later, 0.0), 0))

    p_scores = i_cp.to(tl.int64) * BT * BT + o_j * BT + o_i
    tl.store(dscores + p_scores, b_dscores.to(tl.bfloat16))


@triton.jit(do_not_specialize=["T", "H", "HV"])
def grad_group_kernel(
    q,
    k,
    h,
    v,
    dh,
    dy,
    dscores,
    head_decay,
    tail_step,
    dq,
    dk,
    taken,
    written,
    kept,
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
    i_cp = tl.program_id(0) // (K // BK)
    # HP programs of a chunk, as many to each group
    of_group = HV // H
    n_parts = tl.cdiv(of_group, HEADS)
    i_c, i_p = i_cp // (H * n_parts), i_cp % (H * n_parts)
    i_hq, i_part = i_p // n_parts, i_p % n_parts
    i_first = i_hq * of_group + i_part * HEADS
    n_heads = tl.minimum(of_group - i_part * HEADS, HEADS)
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    o_t = tl.arange(0, BT)
    m_t = o_t < n_rows
    o_k = i_k * BK + tl.arange(0, BK)
    p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q + p_q, mask=m_t[:, None], other=0.0)
    b_k = tl.load(k + p_q, mask=m_t[:, None], other=0.0)
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    for i_n in tl.range(0, n_heads, num_stages=STAGES):
        i_h = i_first + i_n
        i_tile = i_c.to(tl.int64) * HV + i_h
        p_token = i_tile * BT + o_t
        b_head = tl.load(head_decay + p_token)
        b_tail = tl.load(tail_step + p_token)
        o_v = tl.arange(0, V)
        p_h = i_tile * K * V + o_v[:, None] * K + o_k[None, :]
        p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
        b_h = tl.load(h + p_h)
        b_do = tl.load(dy + p_o, mask=m_t[:, None], other=0.0)
        b_dqh = tl.dot(b_do, b_h)
        b_dh = tl.load(dh + p_h)
        b_v = tl.load(v + p_o, mask=m_t[:, None], other=0.0)
        b_dkh = tl.dot(b_v, b_dh)
        # <S, dS> as the diagonal of a product, the smaller of two: tiles that only products read are
        # laid out without bank conflicts
        b_SdS = tl.dot(b_dh, tl.trans(b_h))
        b_kept = tl.sum(tl.sum(tl.where(o_v[:, None] == o_v[None, :], b_SdS, 0.0), 1), 0)
        p_part = i_tile * (K // BK) + i_k
        tl.store(taken + p_part * BT + o_t, tl.sum(b_q.to(tl.float32) * b_dqh, 1))
        tl.store(written + p_part * BT + o_t, tl.sum(b_k.to(tl.float32) * b_dkh, 1))
        tl.store(kept + p_part, b_kept)
        b_dq += b_dqh * b_head[:, None]
        b_dk += b_dkh * b_tail[:, None]

    # rows are tokens j
    p_scores = i_cp.to(tl.int64) * BT * BT + o_t[:, None] * BT + o_t[None, :]
    b_dscores = tl.load(dscores + p_scores)
    b_dq = tl.dot(tl.trans(b_dscores), b_k, b_dq)
    b_dk = tl.dot(b_dscores, b_q, b_dk)
    p_out = (i_start * (H * n_parts) + i_p) * K + o_t[:, None] * (H * n_parts * K) + o_k[None, :]
    tl.store(dq + p_out, b_dq.to(tl.bfloat16), mask=m_t[:, None])
    tl.store(dk + p_out, b_dk.to(tl.bfloat16), mask=m_t[:, None])


@triton.jit(do_not_specialize=["T", "HV", "dt_row"])
def fold_parts_kernel(
    rate,
    dt,
    dt_bias,
    log_decay,
    step,
    decay_pairs,
    step_pairs,
    taken,
    written,
    kept,
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
    # what the token before it writes: of the first one, nothing
    m_before = (o_t > 0)[:, None] & m_th
    i_tile = i_c.to(tl.int64) * HV + o_h
    p_token = i_tile[None, :] * BT + o_t[:, None]
    b_log_decay = tl.load(log_decay + p_token, mask=m_th, other=0.0)
    b_taken = tl.zeros([BT, BH], tl.float32)
    b_written = tl.zeros([BT, BH], tl.float32)
    b_before = tl.zeros([BT, BH], tl.float32)
    b_kept = tl.zeros([BH], tl.float32)
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_taken += tl.load(taken + p_part, mask=m_th, other=0.0)
        b_written += tl.load(written + p_part, mask=m_th, other=0.0)
        b_before += tl.load(written + p_part - 1, mask=m_before, other=0.0)
        b_kept += tl.load(kept + i_tile * (K // BK) + i_k, mask=m_h, other=0.0)
    # decay from the chunk's start to a token, and from the one before it to the chunk's end
    b_head = tl.exp2(tl.cumsum(b_log_decay, 0))
    b_left = tl.cumsum(b_log_decay, 0, reverse=True)
    b_before *= tl.exp2(b_left) * tl.load(step + p_token - 1, mask=m_before, other=0.0)
    b_dg = tl.load(decay_pairs + p_token, mask=m_th, other=0.0)
    b_dg += tl.cumsum(b_head * b_taken, 0, reverse=True) + tl.cumsum(b_before, 0)
    b_dg += (tl.exp2(tl.sum(b_log_decay, 0)) * b_kept)[None, :]
    b_dg = tl.where(m_th, b_dg, 0.0)
    b_dstep = tl.load(step_pairs + p_token, mask=m_th, other=0.0)
    b_dstep += b_written * tl.exp2(b_left - b_log_decay)
    b_step = tl.load(step + p_token, mask=m_th, other=0.0)
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
    q, k, rate, dt, dt_bias, log_decay, step, h, v, dh, dy, dq, dk, decay_pairs, step_pairs,
    head_decay, tail_step, taken, written, kept, dscores, ddt, drate, ddt_bias, *, n_chunks, T,
    H, HV, dt_row
):
    """Launch all three kernels on the current stream."""
    n_parts = H * -(-HV // H // HEADS)
    pair_group_kernel[(n_chunks * n_parts,)](
        q, k, log_decay, step, v, dy, dscores, decay_pairs, step_pairs, head_decay, tail_step,
        T, H, HV,
        K=K, V=V, BT=BT, HEADS=HEADS, STAGES=STAGES, num_warps=PAIR_WARPS, num_stages=STAGES,
    )
    grad_group_kernel[(n_chunks * n_parts * (K // BK),)](
        q, k, h, v, dh, dy, dscores, head_decay, tail_step, dq, dk, taken, written, kept, T, H,
        HV,
        K=K, V=V, BT=BT, BK=BK, HEADS=HEADS, STAGES=STAGES,
        num_warps=4, num_stages=2,
    )
    fold_parts_kernel[(n_chunks, -(-HV // BH))](
        rate, dt, dt_bias, log_decay, step, decay_pairs, step_pairs, taken, written, kept, ddt,
        drate, ddt_bias, T, HV, dt_row,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
