"""The key side of the gradients, the decay outside of the products: dq, dk, dg and dbeta.

Through the state first,

    dQg = dO S^T       dE = -dX S^T       dKtail = R dS^T       dgamma_C = <S, dS>

then through the scores, of which D_ij is what the state keeps from token j to token i:

    dq_i += scale sum_j D_ij dAqk_ij c_j
    de_i +=       sum_j D_ij dT_ij c_j
    dc_j +=       sum_i D_ij (dT_ij k_i + scale dAqk_ij q_i)
    dg_t +=       sum over j < t <= i of D_ij (dT_ij <k_i, c_j> + scale dAqk_ij <q_i, c_j>)

where e = k is the key that erases and c = beta k the one that is written, so that dk = de + beta dc.
fold_beta_kernel, a program per chunk and BH heads, makes dbeta: the mean of three times <R, dX> / beta and
<k, dc>, of which a program here has the part of its channels.
No term of dg is taken from another, so that it is exact however strong the decay is.
fold_decay_kernel adds up the parts that slices of channels have in it.

grad_key_kernel: one program per CHUNKS chunks, value head and slice of K, which loads one chunk ahead.

    q              [B, T, H, K]      bf16   queries; normalised in the kernel
    k              [B, T, H, K]      bf16   keys; normalised in the kernel
    g              [B, T, HG]        fp32   pre-activation of the log decay
    A_log          [HG]              fp32   log of the decay's rate
    dt_bias        [HG]              fp32   added to g before its activation
    q_rstd         [NT, HV, BT]      fp32   1 / norm of q
    k_rstd         [NT, HV, BT]      fp32   1 / norm of k
    k_beta         [NT, HV, BT]      fp32   beta, after its activation
    log_decay      [NT, HV, BT]      fp32   decay of each token, log2
    gamma_C        [NT, HV]          fp32   decay of the whole chunk
    h              [NT, HV, V, K]    bf16   state at the chunk's start, transposed
    R              [NT, HV, BT, V]   bf16   u: a token adds (beta k) u^T to the state
    dh             [NT, HV, V, K]    bf16   gradient of the state at the chunk's end, transposed
    dX             [NT, HV, BT, V]   bf16   gradient of X = v - E S, where R = A X
    dT             [NT, HV, BT, BT]  bf16   gradient of T, strict lower triangle
    dAqk           [NT, HV, BT, BT]  bf16   gradient of Aqk, strict lower triangle
    dAqk_diagonal  [NT, HV, BT]      fp32   gradient of Aqk's diagonal: <do, R>
    do             [B, T, HV, V]     bf16   gradient of o
    beta_dot       [NT, HV, BT]      fp32   <R, dX>, which is k_beta times its gradient
    q_dot          [NT, HV, BT]      fp32   <q, dq> of the normalised q
    k_dot          [NT, HV, BT]      fp32   <k, dk> of the normalised k
    chunk_table    [NT, 2]           int32  first token and number of tokens of each chunk
    dq             [B, T, HV, K]     bf16   gradient of q, per value head
    dk             [B, T, HV, K]     bf16   gradient of k, per value head
    dg_part        [NT, HV, NK, BT]  fp32   gradient of the log decay: sums over a slice of channels
    dg             [B, T, HV]        fp32   gradient of g, per value head
    dbeta_part     [NT, HV, NK, BT]  fp32   gradient of k_beta: sums over a slice of channels
    dbeta          [B, T, HV]        bf16   gradient of beta
    dA_log         [NT, HV]          fp32   gradient of A_log: sums over the chunk's tokens
    ddt_bias       [NT, HV]          fp32   gradient of dt_bias: sums over the chunk's tokens

Problem: gated_delta_rule K=128 V=128 bf16, g fp32, l2norm, softplus gate, packed sequences
Config:  BK=64 BT=32 BV=128 chunks=1 decay=outside language=triton maxnreg=0 num_stages=1 num_warps=4
Template digest f09289133cbf822d; made by
    gdn2gen generate --op gated_delta_rule --head-dim 128,128 --dtype bf16 --gate-dtype fp32 \
      --gate softplus --with=A_log,dt_bias,varlen --stage grad_key --config \
      BK=64,BT=32,BV=128,chunks=1,decay=outside,language=triton,maxnreg=0,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BK = 32, 64
BH = 16  # heads of a program of fold_beta_kernel
# Of a smaller beta, what is left of dX, which has it as a factor, may be 0.
LEAST_BETA = tl.constexpr(2.0**-60)
CHUNKS, STAGES = 1, 1
LOG2E = tl.constexpr(1.4426950408889634)
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
SMALLEST_LOG2 = tl.constexpr(-150.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + y), y = exp(-|x|), with every digit where x < -10.

    log(1 + y) / y by Chebyshev's polynomial of degree 7 on [0, 1], off by 3e-7 in fp32.
    """
    y = tl.exp(-tl.abs(x))
    ratio = -0.10685003 + y * (0.0434939 - y * 0.008371153)
    ratio = -0.49997175 + y * (0.33271928 + y * (-0.24474774 + y * (0.17687477 + y * ratio)))
    return tl.maximum(x, 0.0) + y * (0.99999978 + y * ratio)


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG", "NT"])
def grad_key_kernel(
    q,
    k,
    g,
    A_log,
    dt_bias,
    q_rstd,
    k_rstd,
    k_beta,
    log_decay,
    gamma_C,
    h,
    R,
    dh,
    dX,
    dT,
    dAqk,
    dAqk_diagonal,
    do,
    beta_dot,
    q_dot,
    k_dot,
    chunk_table,
    dq,
    dk,
    dg_part,
    dg,
    dbeta_part,
    dbeta,
    dA_log,
    ddt_bias,
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
        i_start = tl.load(chunk_table + i_c * 2).to(tl.int64)
        n_rows = tl.load(chunk_table + i_c * 2 + 1)
        m_t = o_t < n_rows
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        i_tile = i_c.to(tl.int64) * HV + i_h
        p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
        p_score = i_tile * BT * BT + o_i * BT + o_j
        p_token = i_tile * BT + o_t
        o_v = tl.arange(0, V)
        p_h = i_tile * K * V + o_v[:, None] * K + o_k[None, :]
        p_tile = i_tile * BT * V + o_t[:, None] * V + o_v[None, :]
        p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
        b_h = tl.load(h + p_h)
        b_dq = tl.dot(tl.load(do + p_o, mask=m_t[:, None], other=0.0), b_h)
        b_de = tl.dot(tl.load(dX + p_tile), b_h)
        b_dh = tl.load(dh + p_h)
        b_dk = tl.dot(tl.load(R + p_tile), b_dh)
        # rows of S dS as the diagonal of a product: tiles that only products read are laid out
        # without bank conflicts, which is worth 0.08 ms at train4k
        b_SdS = tl.dot(tl.trans(b_dh), b_h)
        b_dgamma_C = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1)
        b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_k_rstd = tl.load(k_rstd + p_token)[:, None]
        b_q_rstd = tl.load(q_rstd + p_token)[:, None]
        b_k *= b_k_rstd
        b_q *= b_q_rstd
        b_beta = tl.load(k_beta + p_token)
        b_log_decay = tl.load(log_decay + p_token)
        b_G = tl.cumsum(b_log_decay, 0)
        b_D = b_G[:, None] - b_G[None, :]
        b_D = tl.exp2(tl.where(o_i >= o_j, b_D, float("-inf")))
        b_head = tl.exp2(b_G)[:, None]
        b_tail = tl.exp2(tl.cumsum(b_log_decay, 0, reverse=True) - b_log_decay)[:, None]
        b_dq *= b_head
        b_de *= -b_head
        b_dk *= b_tail
        # gradients of pairs: of scores without their decay, of columns that are written without beta
        b_diagonal = tl.load(dAqk_diagonal + p_token)[:, None]
        b_dAqk = tl.load(dAqk + p_score).to(tl.float32) * b_D
        b_dAqk += tl.where(o_i == o_j, b_diagonal, 0.0)
        b_dT = tl.load(dT + p_score).to(tl.float32) * b_D
        b_kd = b_k.to(tl.bfloat16)
        b_qd = b_q.to(tl.bfloat16)
        b_dg = tl.zeros([BT], tl.float32)
        # what a token takes from the state decays by its own and all earlier tokens of the chunk, and
        # what it writes by all later ones; a pair by those behind the first of both
        b_taken = tl.sum(b_q * b_dq, 1) * scale + tl.sum(b_k * b_de, 1)
        b_written = tl.sum(b_k * b_dk, 1) * b_beta
        b_pairs = tl.dot(b_qd, tl.trans(b_kd)) * (b_dAqk * scale)
        b_pairs += tl.dot(b_kd, tl.trans(b_kd)) * b_dT
        b_pairs *= b_beta[None, :]
        b_pairs = tl.cumsum(tl.where(o_i > o_j, b_pairs, 0.0), 0, reverse=True)
        b_dg += tl.sum(tl.where(o_i > o_j, b_pairs + b_written[None, :], 0.0), 1)
        b_dg += tl.sum(tl.where(o_i <= o_j, b_taken[None, :], 0.0), 1)
        b_dg += tl.load(gamma_C + i_tile) * tl.sum(b_dgamma_C, 0)
        b_rows = (b_dAqk * b_beta[None, :]).to(tl.bfloat16)
        b_dq = tl.dot(b_rows, b_kd, b_dq)
        b_rows = (b_dT * b_beta[None, :]).to(tl.bfloat16)
        b_de = tl.dot(b_rows, b_kd, b_de)
        b_columns = tl.trans((b_dAqk * scale).to(tl.bfloat16))
        b_dk = tl.dot(b_columns, b_qd, b_dk)
        b_dk = tl.dot(tl.trans(b_dT.to(tl.bfloat16)), b_kd, b_dk)

        n_out = tl.where(i_first + i_n < NT, n_rows, 0)
        m_out = (o_t < n_out)[:, None] & (o_k < K)[None, :]
        p_part = (i_tile * (K // BK) + i_k) * BT + o_t
        tl.store(dg_part + p_part, b_dg, mask=o_t < n_out)
        tl.store(dbeta_part + p_part, tl.sum(b_dk * b_k, 1), mask=o_t < n_out)
        b_dk = b_dk * b_beta[:, None] + b_de
        b_dq *= scale
        b_dq = (b_dq - b_q * tl.load(q_dot + p_token)[:, None]) * b_q_rstd
        b_dk = (b_dk - b_k * tl.load(k_dot + p_token)[:, None]) * b_k_rstd
        p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
        tl.store(dq + p_out, b_dq.to(tl.bfloat16), mask=m_out)
        tl.store(dk + p_out, b_dk.to(tl.bfloat16), mask=m_out)


@triton.jit(do_not_specialize=["T", "HV"])
def fold_beta_kernel(
    beta_dot,
    k_beta,
    dbeta_part,
    dbeta,
    chunk_table,
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
    i_start = tl.load(chunk_table + i_c * 2).to(tl.int64)
    n_rows = tl.load(chunk_table + i_c * 2 + 1)
    m_th = (o_t < n_rows)[:, None] & (o_h < HV)[None, :]
    p_beta = (i_start + o_t)[:, None] * HV + o_h[None, :]
    i_tile = i_c.to(tl.int64) * HV + o_h
    p_tile = i_tile[None, :] * BT + o_t[:, None]
    b_beta = tl.load(k_beta + p_tile, mask=m_th, other=0.0)
    b_dot = tl.load(beta_dot + p_tile, mask=m_th, other=0.0)
    b_dbeta = tl.zeros([BT, BH], tl.float32)
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_dbeta += tl.load(dbeta_part + p_part, mask=m_th, other=0.0)
    m_small = tl.abs(b_beta) < LEAST_BETA
    b_mean = 0.25 * b_dbeta + 0.75 * b_dot / tl.where(m_small, 1.0, b_beta)
    b_dbeta = tl.where(m_small, b_dbeta, b_mean)
    tl.store(dbeta + p_beta, b_dbeta.to(tl.bfloat16), mask=m_th)


@triton.jit(do_not_specialize=["T", "H", "HV", "HG"])
def fold_decay_kernel(
    dg_part,
    dg,
    g,
    A_log,
    dt_bias,
    dA_log,
    ddt_bias,
    chunk_table,
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
    i_start = tl.load(chunk_table + i_c * 2).to(tl.int64)
    n_rows = tl.load(chunk_table + i_c * 2 + 1)
    m_h = o_h < HV
    m_th = (o_t < n_rows)[:, None] & m_h[None, :]
    i_tile = i_c.to(tl.int64) * HV + o_h
    b_dg = tl.zeros([BT, BH], tl.float32)
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_dg += tl.load(dg_part + p_part, mask=m_th, other=0.0)

    # through the gate's activation
    o_hg = o_h // (HV // HG)
    b_rate = tl.exp(tl.load(A_log + o_hg, mask=m_h, other=0.0))[None, :]
    b_x = tl.load(g + (i_start + o_t)[:, None] * HG + o_hg[None, :], mask=m_th, other=0.0).to(tl.float32)
    b_x += tl.load(dt_bias + o_hg, mask=m_h, other=0.0)[None, :]
    b_dA = tl.where(m_th, -b_dg * b_rate * softplus(b_x), 0.0)
    b_dg *= -b_rate / (1.0 + tl.exp(-b_x))
    tl.store(dA_log + i_tile, tl.sum(b_dA, 0), mask=o_h < HV * tl.minimum(n_rows, 1))
    tl.store(ddt_bias + i_tile, tl.sum(tl.where(m_th, b_dg, 0.0), 0), mask=o_h < HV * tl.minimum(n_rows, 1))
    p_dg = (i_start + o_t)[:, None] * HV + o_h[None, :]
    tl.store(dg + p_dg, b_dg.to(tl.float32), mask=m_th)


def launch(
    q, k, g, A_log, dt_bias, q_rstd, k_rstd, k_beta, log_decay, gamma_C, h, R, dh, dX, dT, dAqk,
    dAqk_diagonal, do, beta_dot, q_dot, k_dot, chunk_table, dq, dk, dg_part, dg, dbeta_part,
    dbeta, dA_log, ddt_bias, *, scale, lower_bound, n_chunks, T, H, HV, HG
):
    """Launch all kernels on the current stream."""
    grad_key_kernel[(-(-n_chunks // CHUNKS) * HV * (K // BK),)](
        q, k, g, A_log, dt_bias, q_rstd, k_rstd, k_beta, log_decay, gamma_C, h, R, dh, dX, dT,
        dAqk, dAqk_diagonal, do, beta_dot, q_dot, k_dot, chunk_table, dq, dk, dg_part, dg,
        dbeta_part, dbeta, dA_log, ddt_bias, scale, lower_bound, T, H, HV, HG,
        NT=n_chunks, K=K, V=V, BT=BT, BK=BK, CHUNKS=CHUNKS, STAGES=STAGES,
        num_warps=4, num_stages=1,
    )
    fold_beta_kernel[(n_chunks, -(-HV // BH))](
        beta_dot, k_beta, dbeta_part, dbeta, chunk_table, T, HV,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
    fold_decay_kernel[(n_chunks, -(-HV // BH))](
        dg_part, dg, g, A_log, dt_bias, dA_log, ddt_bias, chunk_table, T, H, HV, HG,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
