"""The key side of the gradients, the decay outside of the products: dq, dk and dg.

Through the state first,

    dQg = dO S^T       dKtail = v dS^T       dgamma_C = <S, dS>

then through the scores, of which D_ij is what the state keeps from token j to token i:

    dq_i += scale sum_j D_ij dAqk_ij k_j
    dk_j +=       sum_i D_ij (scale dAqk_ij q_i)
    dg_t +=       sum over j < t <= i of D_ij (scale dAqk_ij <q_i, k_j>)

No term of dg is taken from another, so that it is exact however strong the decay is.
fold_decay_kernel adds up the parts that slices of channels have in it.

grad_key_kernel: one program per CHUNKS chunks, value head and slice of K, which loads one chunk ahead.

    q          [B, T, H, K]      bf16  queries
    k          [B, T, H, K]      bf16  keys
    g          [B, T, HG]        fp32  log decay
    log_decay  [NT, HV, BT]      fp32  decay of each token, log2
    gamma_C    [NT, HV]          fp32  decay of the whole chunk
    h          [NT, HV, V, K]    bf16  state at the chunk's start, transposed
    v          [B, T, HV, V]     bf16  values
    dh         [NT, HV, V, K]    bf16  gradient of the state at the chunk's end, transposed
    do         [B, T, HV, V]     bf16  gradient of o
    dq         [B, T, HV, K]     bf16  gradient of q, per value head
    dk         [B, T, HV, K]     bf16  gradient of k, per value head
    dg_part    [NT, HV, NK, BT]  fp32  gradient of the log decay: sums over a slice of channels
    dg         [B, T, HV]        fp32  gradient of g, per value head

Problem: simple_gla K=128 V=128 bf16, g fp32
Config:  BK=64 BT=32 BV=128 chunks=1 decay=outside language=triton maxnreg=0 num_stages=1 num_warps=4
Template digest f09289133cbf822d; made by
    gdn2gen generate --op simple_gla --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate \
      none --with= --stage grad_key --config \
      BK=64,BT=32,BV=128,chunks=1,decay=outside,language=triton,maxnreg=0,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BK = 32, 64
BH = 16  # heads of a program of fold_decay_kernel
CHUNKS, STAGES = 1, 1


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG", "NT"])
def grad_key_kernel(
    q,
    k,
    g,
    log_decay,
    gamma_C,
    h,
    v,
    dh,
    do,
    dq,
    dk,
    dg_part,
    dg,
    scale,
    lower_bound,
    T,
    H,
    HV,
    HG,
    NT,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_k = tl.program_id(0) % (K // BK)
    i_gh = tl.program_id(0) // (K // BK)
    i_first, i_h = i_gh // HV * CHUNKS, i_gh % HV
    i_hq = i_h // (HV // H)
    o_t = tl.arange(0, BT)
    o_i, o_j = o_t[:, None], o_t[None, :]
    o_k = i_k * BK + tl.arange(0, BK)
    # chunks past the last are the last one again, and store nothing
    for i_n in tl.range(0, CHUNKS, num_stages=STAGES):
        i_c = tl.minimum(i_first + i_n, NT - 1)
        n_chunks = tl.cdiv(T, BT)
        i_t = (i_c % n_chunks) * BT
        i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
        n_rows = tl.minimum(T - i_t, BT)
        m_t = o_t < n_rows
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        i_tile = i_c.to(tl.int64) * HV + i_h
        p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
        p_token = i_tile * BT + o_t
        o_v = tl.arange(0, V)
        p_h = i_tile * K * V + o_v[:, None] * K + o_k[None, :]
        p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
        b_h = tl.load(h + p_h)
        b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
        b_dq = tl.dot(b_do, b_h)
        b_dh = tl.load(dh + p_h)
        b_v = tl.load(v + p_o, mask=m_t[:, None], other=0.0)
        b_dk = tl.dot(b_v, b_dh)
        b_dAqk = tl.dot(b_do, tl.trans(b_v))
        # rows of S dS as the diagonal of a product: tiles that only products read are laid out
        # without bank conflicts, which is worth 0.08 ms at train4k
        b_SdS = tl.dot(tl.trans(b_dh), b_h)
        b_dgamma_C = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1)
        b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_log_decay = tl.load(log_decay + p_token)
        b_G = tl.cumsum(b_log_decay, 0)
        b_D = b_G[:, None] - b_G[None, :]
        b_D = tl.exp2(tl.where(o_i >= o_j, b_D, float("-inf")))
        b_head = tl.exp2(b_G)[:, None]
        b_tail = tl.exp2(tl.cumsum(b_log_decay, 0, reverse=True) - b_log_decay)[:, None]
        b_dq *= b_head
        b_dk *= b_tail
        # gradients of pairs: of scores without their decay
        # dO v^T, which another stage would have to read both for
        b_dAqk = tl.where(o_i >= o_j, b_dAqk, 0.0) * b_D
        b_kd = b_k.to(tl.bfloat16)
        b_qd = b_q.to(tl.bfloat16)
        b_dg = tl.zeros([BT], tl.float32)
        # what a token takes from the state decays by its own and all earlier tokens of the chunk, and
        # what it writes by all later ones; a pair by those behind the first of both
        b_taken = tl.sum(b_q * b_dq, 1) * scale
        b_written = tl.sum(b_k * b_dk, 1)
        b_pairs = tl.dot(b_qd, tl.trans(b_kd)) * (b_dAqk * scale)
        b_pairs = tl.cumsum(tl.where(o_i > o_j, b_pairs, 0.0), 0, reverse=True)
        b_dg += tl.sum(tl.where(o_i > o_j, b_pairs + b_written[None, :], 0.0), 1)
        b_dg += tl.sum(tl.where(o_i <= o_j, b_taken[None, :], 0.0), 1)
        b_dg += tl.load(gamma_C + i_tile) * tl.sum(b_dgamma_C, 0)
        b_dq = tl.dot(b_dAqk.to(tl.bfloat16), b_kd, b_dq)
        b_columns = tl.trans((b_dAqk * scale).to(tl.bfloat16))
        b_dk = tl.dot(b_columns, b_qd, b_dk)

        n_out = tl.where(i_first + i_n < NT, n_rows, 0)
        m_out = (o_t < n_out)[:, None] & (o_k < K)[None, :]
        p_part = (i_tile * (K // BK) + i_k) * BT + o_t
        tl.store(dg_part + p_part, b_dg, mask=o_t < n_out)
        b_dq *= scale
        p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
        tl.store(dq + p_out, b_dq.to(tl.bfloat16), mask=m_out)
        tl.store(dk + p_out, b_dk.to(tl.bfloat16), mask=m_out)


@triton.jit(do_not_specialize=["T", "H", "HV", "HG"])
def fold_decay_kernel(
    dg_part,
    dg,
    T,
    H,
    HV,
    HG,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """dg of a chunk, BH heads at a time: sums over the slices of channels."""
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
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_dg += tl.load(dg_part + p_part, mask=m_th, other=0.0)
    p_dg = (i_start + o_t)[:, None] * HV + o_h[None, :]
    tl.store(dg + p_dg, b_dg.to(tl.float32), mask=m_th)


def launch(
    q, k, g, log_decay, gamma_C, h, v, dh, do, dq, dk, dg_part, dg, *, scale, lower_bound,
    n_chunks, T, H, HV, HG
):
    """Launch all kernels on the current stream."""
    grad_key_kernel[(-(-n_chunks // CHUNKS) * HV * (K // BK),)](
        q, k, g, log_decay, gamma_C, h, v, dh, do, dq, dk, dg_part, dg, scale, lower_bound, T,
        H, HV, HG,
        NT=n_chunks, K=K, V=V, BT=BT, BK=BK, CHUNKS=CHUNKS, STAGES=STAGES,
        num_warps=4, num_stages=1,
    )
    fold_decay_kernel[(n_chunks, -(-HV // BH))](
        dg_part, dg, T, H, HV, HG,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
