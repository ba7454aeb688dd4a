"""The gradients of queries, keys, gates and beta, the decay outside of the products.

Of every chunk the scans kept the state before it, S, and its gradient after it, dS:

    dq_i = scale head_i dO_i S^T + scale sum_j dAqk_ij c_j         dAqk_ij = D_ij <dO_i, R_j>, i >= j
    de_i =        -head_i dX_i S^T +       sum_j dT_ij c_j           dT_ij = -D_ij <dX_i, R_j>, i > j
    dc_j =         tail_j R_j dS^T +       sum_i (dT_ij k_i + scale dAqk_ij q_i)
    dg_t = sum over j < t <= i of dT_ij <k_i, c_j> + scale dAqk_ij <q_i, c_j>
           + sum over i >= t of what i takes from S, over j < t of what j writes to dS
           + gamma <S, dS>

where D_ij is what the state keeps from token j to token i, head_i from the block's start to i, tail_j
from j to its end and gamma over all of it. No term of dg is taken from another, so that it is exact
however strong the decay is. fold_decay_kernel takes it from tiles to the caller's tensor.
e = k is the key that erases and c = beta k the one that is written, so that dk = de + beta dc; dX is
dv. fold_beta_kernel makes dbeta: the mean of three times <R, dX> / beta and <k, dc>.

queries_kernel makes dq, and grad_blocks1_kernel all else; one program per chunk, value head and slice of K.

    q           [B, T, H, K]      fp16  queries; normalised in the kernel
    k           [B, T, H, K]      fp16  keys; normalised in the kernel
    g           [B, T, HG]        fp32  log decay
    q_rstd      [NT, HV, BT]      fp32  1 / norm of q
    k_rstd      [NT, HV, BT]      fp32  1 / norm of k
    k_beta      [NT, HV, BT]      fp32  beta, after its activation
    log_decay   [NT, HV, BT]      fp32  decay of each token, log2
    h           [NT, HV, V, K]    fp16  state at the block's start, transposed
    R           [NT, HV, BT, V]   fp16  u: a token adds (beta k) u^T to the state
    dh          [NT, HV, V, K]    fp16  gradient of the state at the block's end, transposed
    dv          [B, T, HV, V]     fp16  gradient of v
    do          [B, T, HV, V]     fp16  gradient of o
    o           [B, T, HV, V]     fp16  output
    z_dot       [NT, HV, BT, NZ]  fp32  <dX, v>, by 16 values
    beta_dot    [NT, HV, BT]      fp32  <R, dX>, which is k_beta times its gradient
    dq          [B, T, HV, K]     fp16  gradient of q, per value head
    dk          [B, T, HV, K]     fp16  gradient of k, per value head
    dg_part     [NT, HV, NK, BT]  fp32  gradient of the log decay: sums over a slice of channels
    dg          [B, T, HV]        fp32  gradient of g, per value head
    dbeta_part  [NT, HV, NK, BT]  fp32  gradient of k_beta: sums over a slice of channels
    dbeta       [B, T, HV]        fp16  gradient of beta

Problem: gated_delta_rule K=160 V=128 fp16, g fp32, l2norm
Config:  BK=128 BT=32 chunks=1 decay=outside language=triton maxnreg=0 num_stages=1 num_warps=8
Template digest 0e0752aa0a64da71; made by
    gdn2gen generate --op gated_delta_rule --head-dim 160,128 --dtype fp16 --gate-dtype fp32 \
      --gate none --with=initial_state,final_state --stage grad_blocks1 --config \
      BK=128,BT=32,chunks=1,decay=outside,language=triton,maxnreg=0,num_stages=1,num_warps=8
"""

import triton
import triton.language as tl


K, V = 160, 128
BT, BK = 32, 128
TOKENS = BT  # of a block
BH = 16  # heads of a program of fold_beta_kernel
# Of a smaller beta, what is left of dX, which has it as a factor, may have lost digits in fp16.
LEAST_BETA = tl.constexpr(2.0**-4)


@triton.jit
def sum_of_later(b_x, BT: tl.constexpr):
    """Sum over each token and all later ones."""
    # a product with ones, of the first 8 bits and of the next 8: 0.3 ms less than a scan at train4k
    o_t = tl.arange(0, BT)
    b_ones = tl.where(o_t[:, None] <= o_t[None, :], 1.0, 0.0).to(tl.bfloat16)
    b_first = b_x.to(tl.bfloat16)
    b_next = (b_x - b_first.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(b_ones, b_first, tl.dot(b_ones, b_next))


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def queries_kernel(
    q,
    k,
    g,
    q_rstd,
    k_rstd,
    k_beta,
    log_decay,
    h,
    R,
    dh,
    dv,
    do,
    o,
    z_dot,
    beta_dot,
    dq,
    dk,
    dg_part,
    dg,
    dbeta_part,
    dbeta,
    scale,
    lower_bound,
    T,
    H,
    HV,
    HG,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    i_k = tl.program_id(0) % (K // BK + 1)
    i_xh = tl.program_id(0) // (K // BK + 1)
    i_x, i_h = i_xh // HV, i_xh % HV
    i_hq = i_h // (HV // H)
    o_t = tl.arange(0, TOKENS)
    o_i, o_j = o_t[:, None], o_t[None, :]
    o_k = i_k * BK + tl.arange(0, BK)
    n_blocks = tl.cdiv(T, TOKENS)
    i_n, i_t = i_x // n_blocks, i_x % n_blocks * TOKENS
    i_c = i_n * tl.cdiv(T, BT) + i_t // BT
    i_start = i_n.to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, TOKENS)

    m_t = o_t < n_rows
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
    i_tile = i_c.to(tl.int64) * HV + i_h
    p_token = i_tile * BT + o_t
    o_v = tl.arange(0, V)
    p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
    b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
    b_R = tl.load(R + p_token[:, None] * V + o_v[None, :], mask=m_t[:, None], other=0.0)
    b_o = tl.load(o + p_o, mask=m_t[:, None], other=0.0)

    b_dAqk = tl.dot(b_do, tl.trans(b_R))
    b_q_dot = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    b_log_decay = tl.load(log_decay + p_token, mask=m_t, other=0.0)
    b_G = tl.cumsum(b_log_decay, 0)
    b_D = b_G[:, None] - b_G[None, :]
    b_D = tl.exp2(tl.where(o_i >= o_j, b_D, float("-inf")))
    b_head = tl.exp2(b_G)
    b_dAqk = tl.where(o_i >= o_j, b_dAqk * b_D, 0.0)

    b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_q_rstd = tl.load(q_rstd + p_token, mask=m_t, other=0.0)
    b_k_rstd = tl.load(k_rstd + p_token, mask=m_t, other=0.0)
    b_q *= b_q_rstd[:, None]
    b_k *= b_k_rstd[:, None]
    b_beta = tl.load(k_beta + p_token, mask=m_t, other=0.0)
    b_qd = b_q.to(tl.float16)
    b_kd = b_k.to(tl.float16)

    # a pair decays by the tokens that are behind the first of both, and not behind the other
    b_pairs = tl.dot(b_qd, tl.trans(b_kd)) * (b_dAqk * scale)
    b_pairs = sum_of_later(tl.where(o_i > o_j, b_pairs * b_beta[None, :], 0.0), TOKENS)
    b_dg = tl.sum(tl.where(o_i > o_j, b_pairs, 0.0), 1)
    p_kept = (i_x.to(tl.int64) * HV + i_h) * K * V + o_v[:, None] * K + o_k[None, :]
    b_h = tl.load(h + p_kept, mask=(o_k < K)[None, :], other=0.0)
    b_dh = tl.load(dh + p_kept, mask=(o_k < K)[None, :], other=0.0)

    b_dq = tl.dot(b_do, b_h)
    # <S, dS> by the diagonal of a product: elementwise both tiles stay in registers, which spill twice as much
    b_SdS = tl.dot(tl.trans(b_dh), b_h)
    b_dq *= b_head[:, None]
    # what a token takes from the state decays by its own and all earlier tokens of the block
    b_SdS = tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0)
    b_dg += tl.exp2(tl.sum(b_log_decay, 0)) * tl.sum(tl.sum(b_SdS, 1), 0)
    b_taken = tl.sum(b_q * b_dq, 1) * scale
    b_dg += tl.sum(tl.where(o_i <= o_j, b_taken[None, :], 0.0), 1)
    p_part = (i_tile * (K // BK + 1) + i_k) * BT + o_t

    tl.store(dg_part + p_part, b_dg, mask=m_t)
    b_rows = (b_dAqk * b_beta[None, :]).to(tl.float16)
    b_dq = tl.dot(b_rows, b_kd, b_dq)
    p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
    b_dq *= scale
    b_dq = (b_dq - b_q * b_q_dot[:, None]) * b_q_rstd[:, None]
    tl.store(dq + p_out, b_dq.to(tl.float16), mask=m_tk)


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def grad_blocks1_kernel(
    q,
    k,
    g,
    q_rstd,
    k_rstd,
    k_beta,
    log_decay,
    h,
    R,
    dh,
    dv,
    do,
    o,
    z_dot,
    beta_dot,
    dq,
    dk,
    dg_part,
    dg,
    dbeta_part,
    dbeta,
    scale,
    lower_bound,
    T,
    H,
    HV,
    HG,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    i_k = tl.program_id(0) % (K // BK + 1)
    i_xh = tl.program_id(0) // (K // BK + 1)
    i_x, i_h = i_xh // HV, i_xh % HV
    i_hq = i_h // (HV // H)
    o_t = tl.arange(0, TOKENS)
    o_i, o_j = o_t[:, None], o_t[None, :]
    o_k = i_k * BK + tl.arange(0, BK)
    n_blocks = tl.cdiv(T, TOKENS)
    i_n, i_t = i_x // n_blocks, i_x % n_blocks * TOKENS
    i_c = i_n * tl.cdiv(T, BT) + i_t // BT
    i_start = i_n.to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, TOKENS)

    m_t = o_t < n_rows
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
    i_tile = i_c.to(tl.int64) * HV + i_h
    p_token = i_tile * BT + o_t
    o_v = tl.arange(0, V)
    p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
    b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
    b_dX = tl.load(dv + p_o, mask=m_t[:, None], other=0.0)
    b_R = tl.load(R + p_token[:, None] * V + o_v[None, :], mask=m_t[:, None], other=0.0)

    b_dAqk = tl.dot(b_do, tl.trans(b_R))
    b_dT = tl.dot(b_dX, tl.trans(b_R))
    b_RdX = tl.sum(tl.where(o_i == o_j, b_dT, 0.0), 1)
    tl.store(beta_dot + p_token, b_RdX, mask=o_t < n_rows * (1 - tl.minimum(i_k, 1)))
    # <k, dk> = <dX, 2 R - v>
    o_z = tl.arange(0, 8)
    b_z = tl.load(z_dot + p_token[:, None] * 8 + o_z[None, :], mask=m_t[:, None], other=0.0)
    b_k_dot = 2.0 * b_RdX - tl.sum(b_z, 1)
    b_log_decay = tl.load(log_decay + p_token, mask=m_t, other=0.0)
    b_G = tl.cumsum(b_log_decay, 0)
    b_D = b_G[:, None] - b_G[None, :]
    b_D = tl.exp2(tl.where(o_i >= o_j, b_D, float("-inf")))
    b_head = tl.exp2(b_G)
    b_tail = tl.exp2(tl.cumsum(b_log_decay, 0, reverse=True) - b_log_decay)
    b_dAqk = tl.where(o_i >= o_j, b_dAqk * b_D, 0.0)
    b_dT = tl.where(o_i > o_j, -b_dT * b_D, 0.0)

    b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_q_rstd = tl.load(q_rstd + p_token, mask=m_t, other=0.0)
    b_k_rstd = tl.load(k_rstd + p_token, mask=m_t, other=0.0)
    b_q *= b_q_rstd[:, None]
    b_k *= b_k_rstd[:, None]
    b_beta = tl.load(k_beta + p_token, mask=m_t, other=0.0)
    b_qd = b_q.to(tl.float16)
    b_kd = b_k.to(tl.float16)

    # a pair decays by the tokens that are behind the first of both, and not behind the other
    b_pairs = tl.dot(b_kd, tl.trans(b_kd)) * b_dT
    b_pairs = sum_of_later(tl.where(o_i > o_j, b_pairs * b_beta[None, :], 0.0), TOKENS)
    b_dg = tl.sum(tl.where(o_i > o_j, b_pairs, 0.0), 1)
    # of the key that is written, then of the one that erases: both at once take more registers
    b_of_queries = (b_dAqk * scale).to(tl.float16)
    b_of_keys = b_dT.to(tl.float16)
    b_rows = (b_dT * b_beta[None, :]).to(tl.float16)
    p_kept = (i_x.to(tl.int64) * HV + i_h) * K * V + o_v[:, None] * K + o_k[None, :]
    b_dh = tl.load(dh + p_kept, mask=(o_k < K)[None, :], other=0.0)

    b_dk = tl.dot(b_R, b_dh)
    b_dk *= b_tail[:, None]
    # what a token writes decays by all later ones of the block
    b_written = tl.sum(b_k * b_dk, 1) * b_beta
    b_dg += tl.sum(tl.where(o_i > o_j, b_written[None, :], 0.0), 1)
    b_dk = tl.dot(tl.trans(b_of_queries), b_qd, b_dk)
    b_dk = tl.dot(tl.trans(b_of_keys), b_kd, b_dk)
    p_part = (i_tile * (K // BK + 1) + i_k) * BT + o_t

    tl.store(dbeta_part + p_part, tl.sum(b_dk * b_k, 1), mask=m_t)
    b_dk *= b_beta[:, None]
    # read again, after a store: kept, it takes registers
    b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32) * b_k_rstd[:, None]
    p_kept = (i_x.to(tl.int64) * HV + i_h) * K * V + o_v[:, None] * K + o_k[None, :]
    b_h = tl.load(h + p_kept, mask=(o_k < K)[None, :], other=0.0)

    b_de = tl.dot(b_dX, b_h)
    b_de *= -b_head[:, None]
    b_taken = tl.sum(b_k * b_de, 1)
    b_dg += tl.sum(tl.where(o_i <= o_j, b_taken[None, :], 0.0), 1)
    # beside what goes through queries, which the kernel before left there
    b_dg += tl.load(dg_part + p_part, mask=m_t, other=0.0)
    tl.store(dg_part + p_part, b_dg, mask=m_t)
    b_de = tl.dot(b_rows, b_kd, b_de)
    b_dk += b_de
    b_dk = (b_dk - b_k * b_k_dot[:, None]) * b_k_rstd[:, None]
    p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
    tl.store(dk + p_out, b_dk.to(tl.float16), mask=m_tk)


@triton.jit(do_not_specialize=["T", "HV"])
def fold_beta_kernel(
    beta_dot,
    k_beta,
    dbeta_part,
    dbeta,
    T,
    HV,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """dbeta of a chunk, BH heads at a time: the mean of <k, dc> and three times <R, dX> / beta.

    Both are the gradient. The sum over channels is nearer to it, but of keys that have much in
    common, where it is a difference of large terms. Half of what rounding adds to one is not in
    the other, so the mean is off by less than the sum, wherever that is far off. It is <k, dc> alone where beta is so small
    that <R, dX> / beta has no digits left.
    """
    i_c = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)
    m_th = (o_t < n_rows)[:, None] & (o_h < HV)[None, :]
    p_beta = (i_start + o_t)[:, None] * HV + o_h[None, :]
    i_tile = i_c.to(tl.int64) * HV + o_h
    p_tile = i_tile[None, :] * BT + o_t[:, None]
    b_beta = tl.load(k_beta + p_tile, mask=m_th, other=0.0)
    b_dot = tl.load(beta_dot + p_tile, mask=m_th, other=0.0)
    b_dbeta = tl.zeros([BT, BH], tl.float32)
    for i_k in range(0, (K // BK + 1)):
        p_part = (i_tile * (K // BK + 1) + i_k)[None, :] * BT + o_t[:, None]
        b_dbeta += tl.load(dbeta_part + p_part, mask=m_th, other=0.0)
    m_small = tl.abs(b_beta) < LEAST_BETA
    b_mean = 0.25 * b_dbeta + 0.75 * b_dot / tl.where(m_small, 1.0, b_beta)
    b_dbeta = tl.where(m_small, b_dbeta, b_mean)
    tl.store(dbeta + p_beta, b_dbeta.to(tl.float16), mask=m_th)


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
    for i_k in range(0, (K // BK + 1)):
        p_part = (i_tile * (K // BK + 1) + i_k)[None, :] * BT + o_t[:, None]
        b_dg += tl.load(dg_part + p_part, mask=m_th, other=0.0)
    p_dg = (i_start + o_t)[:, None] * HV + o_h[None, :]
    tl.store(dg + p_dg, b_dg.to(tl.float32), mask=m_th)


def launch(
    q, k, g, q_rstd, k_rstd, k_beta, log_decay, h, R, dh, dv, do, o, z_dot, beta_dot, dq, dk,
    dg_part, dg, dbeta_part, dbeta, *, n_chunks, scale, lower_bound, T, H, HV, HG, n_sequences
):
    """Launch all kernels on the current stream."""
    n_blocks = n_sequences * -(-T // TOKENS)
    queries_kernel[(n_blocks * HV * (K // BK + 1),)](
        q, k, g, q_rstd, k_rstd, k_beta, log_decay, h, R, dh, dv, do, o, z_dot, beta_dot, dq,
        dk, dg_part, dg, dbeta_part, dbeta, scale, lower_bound, T, H, HV, HG,
        K=K, V=V, BT=BT, BK=BK, TOKENS=TOKENS,
        num_warps=8, num_stages=1,
    )
    grad_blocks1_kernel[(n_blocks * HV * (K // BK + 1),)](
        q, k, g, q_rstd, k_rstd, k_beta, log_decay, h, R, dh, dv, do, o, z_dot, beta_dot, dq,
        dk, dg_part, dg, dbeta_part, dbeta, scale, lower_bound, T, H, HV, HG,
        K=K, V=V, BT=BT, BK=BK, TOKENS=TOKENS,
        num_warps=8, num_stages=1,
    )
    fold_beta_kernel[(n_chunks, -(-HV // BH))](
        beta_dot, k_beta, dbeta_part, dbeta, T, HV,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
    fold_decay_kernel[(n_chunks, -(-HV // BH))](
        dg_part, dg, T, H, HV, HG,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
