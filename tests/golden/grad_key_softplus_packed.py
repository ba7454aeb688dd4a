"""The key side of the gradients: dq, dk, dg and db.

One program per chunk, value head and slice of K. Through the state first,

    dQg = dO S^T       dE = -dX S^T       dKtail = R dS^T       dgamma_C = rows of S dS

then through the scores, where a pair (i, j) met in the middle m of its dyadic block:

    dq_i += scale exp(G_i - G_m) sum_j dAqk_ij k_j exp(G_m - G_j)
    de_i +=       exp(G_i - G_m) sum_j dT_ij   k_j exp(G_m - G_j)               e = b k
    dk_j +=       exp(G_m - G_j) sum_i (dT_ij e_i + scale dAqk_ij q_i) exp(G_i - G_m)

and dg is the reverse cumulative sum of dG = q dq + e de - k dk within the chunk.

    q              [B, T, H, K]      fp16   queries; normalised in the kernel
    k              [B, T, H, K]      fp16   keys; normalised in the kernel
    g              [B, T, HG, K]     fp32   pre-activation of the log decay
    b              [B, T, HG, K]     fp16   erase gate
    A_log          [HG]              fp32   log of the decay's rate
    dt_bias        [HG, K]           fp32   added to g before its activation
    q_rstd         [NT, HV, BT]      fp32   1 / norm of q
    k_rstd         [NT, HV, BT]      fp32   1 / norm of k
    G              [B, T, HV, K]     fp32   decay since the chunk's start, log2; dg takes its place
    gamma_C        [NT, HV, K]       fp32   decay of the whole chunk
    h              [NT, HV, V, K]    fp16   state at the chunk's start, transposed
    R              [NT, HV, BT, V]   fp16   what each token adds to the state
    dh             [NT, HV, V, K]    fp16   gradient of the state at the chunk's end, transposed
    dX             [NT, HV, BT, V]   fp16   gradient of X = w v - E S, where R = A X
    dT             [NT, HV, BT, BT]  fp16   gradient of T, strict lower triangle
    dAqk           [NT, HV, BT, BT]  fp16   gradient of Aqk, strict lower triangle
    dAqk_diagonal  [NT, HV, BT]      fp32   gradient of Aqk's diagonal: <do, R>
    do             [B, T, HV, V]     fp16   gradient of o
    q_dot          [NT, HV, BT]      fp32   <q, dq> of the normalised q
    k_dot          [NT, HV, BT]      fp32   <k, dk> of the normalised k
    chunk_table    [NT, 2]           int32  first token and number of tokens of each chunk
    dq             [B, T, HV, K]     fp16   gradient of q, per value head
    dk             [B, T, HV, K]     fp16   gradient of k, per value head
    dg             [B, T, HV, K]     fp32   gradient of g, per value head
    db             [B, T, HV, K]     fp16   gradient of b, per value head
    dA_log         [NT, HV, K]       fp32   gradient of A_log: sums over the chunk's tokens
    ddt_bias       [NT, HV, K]       fp32   gradient of dt_bias: sums over the chunk's tokens

Problem: gdn2 K=64 V=32 fp16, g fp32, l2norm, softplus gate, packed sequences
Config:  BK=16 BT=32 BV=32 chunks=1 decay=log language=triton maxnreg=128 num_stages=1 num_warps=2
Template digest 10a26bf893f685db; made by
    gdn2gen generate --op gdn2 --head-dim 64,32 --dtype fp16 --gate-dtype fp32 --gate softplus \
      --with=A_log,dt_bias,varlen --stage grad_key --config \
      BK=16,BT=32,BV=32,chunks=1,decay=log,language=triton,maxnreg=128,num_stages=1,num_warps=2
"""

import triton
import triton.language as tl


K, V = 64, 32
BT, BK, BV = 32, 16, 32
LEVELS = tl.constexpr(5)  # log2(BT)
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


@triton.jit
def meet_at(i_level, i, j):
    """Whether row i is in the upper and column j in the lower half of a block of 2 << i_level.

    Halves are numbered, the upper ones odd: one comparison a pair, the rest per row or column.
    """
    i_half = i >> i_level
    return tl.where(i_half % 2 == 1, i_half - 1, -1) == (j >> i_level)


@triton.jit
def middle_factor(p_G, b_G, i_level, o_t, n_rows, stride):
    """Decay between each token and the middle of its block of 2 << i_level tokens; at most 1.

    Tokens of the upper half are rows: exp2(G_i - G_m). Tokens of the lower half are columns:
    exp2(G_m - G_j). Token m, the last of the lower half, is read back from memory: one vector
    load for 4 channels, where a masked sum over the block takes 2 instructions a channel.
    """
    half = 1 << i_level
    o_m = (o_t & -(2 * half)) + half - 1
    # rows past the last token would hold what the last one holds
    b_m = tl.load(p_G + tl.minimum(o_m, n_rows - 1)[:, None] * stride)
    return tl.exp2(tl.where((o_t & half != 0)[:, None], b_G - b_m, b_m - b_G))


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def grad_key_kernel(
    q,
    k,
    g,
    b,
    A_log,
    dt_bias,
    q_rstd,
    k_rstd,
    G,
    gamma_C,
    h,
    R,
    dh,
    dX,
    dT,
    dAqk,
    dAqk_diagonal,
    do,
    q_dot,
    k_dot,
    chunk_table,
    dq,
    dk,
    dg,
    db,
    dA_log,
    ddt_bias,
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
    BV: tl.constexpr,
):
    i_k = tl.program_id(0) % (K // BK)
    i_ch = tl.program_id(0) // (K // BK)
    i_c, i_h = i_ch // HV, i_ch % HV
    i_start = tl.load(chunk_table + i_c * 2).to(tl.int64)
    n_rows = tl.load(chunk_table + i_c * 2 + 1)
    if n_rows == 0:
        return

    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    i_tile = i_ch.to(tl.int64)
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    m_t = o_t < n_rows
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    # the program's own rows and tiles; offsets from here on fit 32 bits
    q += (i_start * H + i_hq) * K
    k += (i_start * H + i_hq) * K
    g += (i_start * HG + i_hg) * K
    b += (i_start * HG + i_hg) * K
    do += (i_start * HV + i_h) * V
    G += (i_start * HV + i_h) * K
    dq += (i_start * HV + i_h) * K
    dk += (i_start * HV + i_h) * K
    dg += (i_start * HV + i_h) * K
    db += (i_start * HV + i_h) * K
    R += i_tile * BT * V
    dX += i_tile * BT * V
    dT += i_tile * BT * BT
    dAqk += i_tile * BT * BT
    h += i_tile * K * V
    dh += i_tile * K * V
    p_token = i_tile * BT + o_t

    # through the state, one slice of V at a time
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_de = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_dgamma_C = tl.zeros([BK], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        p_h = o_v[:, None] * K + o_k[None, :]
        p_tile = o_t[:, None] * V + o_v[None, :]
        p_o = o_t[:, None] * (HV * V) + o_v[None, :]
        b_h = tl.load(h + p_h)
        b_dh = tl.load(dh + p_h)
        b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
        b_dq = tl.dot(b_do, b_h, b_dq)
        b_de = tl.dot(tl.load(dX + p_tile), b_h, b_de)
        b_dk = tl.dot(tl.load(R + p_tile), b_dh, b_dk)
        b_dgamma_C += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 0)

    p_q = o_t[:, None] * (H * K) + o_k[None, :]
    p_g = o_t[:, None] * (HG * K) + o_k[None, :]
    p_G = G + o_k[None, :]
    b_G = tl.load(p_G + tl.minimum(o_t, n_rows - 1)[:, None] * (HV * K))
    b_G_C = tl.load(G + (n_rows - 1) * (HV * K) + o_k)
    b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32) * scale
    b_k_rstd = tl.load(k_rstd + p_token)
    b_q_rstd = tl.load(q_rstd + p_token)
    b_k *= b_k_rstd[:, None]
    b_q *= b_q_rstd[:, None]
    b_e = b_k * tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)
    b_gamma = tl.exp2(b_G)
    b_dq *= b_gamma
    b_de *= -b_gamma
    b_dk *= tl.exp2(b_G_C[None, :] - b_G)
    # The chunk's last token reaches the end undecayed: it would add to dG_C what it takes from its
    # own dG. Left out of both, since under strong decay that cancellation is all that remains.
    m_inner = (o_t < n_rows - 1)[:, None]
    b_dG_C = tl.sum(tl.where(m_inner, b_dk * b_k, 0.0), 0) + tl.load(gamma_C + i_tile * K + o_k) * b_dgamma_C

    b_dG = b_q * b_dq + b_e * b_de - tl.where(m_inner, b_k * b_dk, 0.0)

    # Through the scores, one dyadic level at a time; 16-bit operands halve the registers. A pair adds
    # to dG_i what it takes from dG_j, and under strong decay little else remains: both ends take the
    # factors as the products do, rounded, so that it cancels.
    b_q = b_q.to(tl.float16)
    b_k = b_k.to(tl.float16)
    b_e = b_e.to(tl.float16)
    p_score = o_t[:, None] * BT + o_t[None, :]
    b_dAqk = tl.load(dAqk + p_score)
    b_dT = tl.load(dT + p_score)
    for i_level in range(LEVELS):
        b_f = middle_factor(p_G, b_G, i_level, o_t, n_rows, HV * K)
        b_column = (b_k * b_f).to(tl.float16)
        m_pairs = meet_at(i_level, o_t[:, None], o_t[None, :])
        b_pairs = tl.where(m_pairs, b_dAqk, 0.0)
        b_row = (b_q * b_f).to(tl.float16)
        b_dq_pairs = tl.dot(b_pairs, b_column)
        b_dq += b_f * b_dq_pairs
        b_dG += b_row * b_dq_pairs
        b_dk_pairs = tl.dot(tl.trans(b_pairs), b_row)
        b_pairs = tl.where(m_pairs, b_dT, 0.0)
        b_row = (b_e * b_f).to(tl.float16)
        b_de_pairs = tl.dot(b_pairs, b_column)
        b_de += b_f * b_de_pairs
        b_dG += b_row * b_de_pairs
        b_dk_pairs = tl.dot(tl.trans(b_pairs), b_row, b_dk_pairs)
        b_dk += b_f * b_dk_pairs
        b_dG -= b_column * b_dk_pairs

    # q and k once more: held through the levels in 32 bits they would cost 48 registers
    tl.debug_barrier()
    b_b = tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)
    b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_qn = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_k *= b_k_rstd[:, None]
    b_qn *= b_q_rstd[:, None]
    b_q = b_qn * scale

    # b_q holds scale q, and b_dq the gradient of q over scale
    b_dg = tl.cumsum(b_dG, 0, reverse=True) + b_dG_C[None, :]
    b_diagonal = tl.load(dAqk_diagonal + p_token)[:, None]
    b_dq = (b_dq + b_diagonal * b_k) * scale
    b_dk += b_diagonal * b_q
    b_dk += b_de * b_b
    b_q_dot = tl.load(q_dot + p_token)
    b_k_dot = tl.load(k_dot + p_token)
    b_dq = (b_dq - b_qn * b_q_dot[:, None]) * b_q_rstd[:, None]
    b_db = b_de * b_k
    b_dk = (b_dk - b_k * b_k_dot[:, None]) * b_k_rstd[:, None]
    p_out = o_t[:, None] * (HV * K) + o_k[None, :]
    tl.store(dq + p_out, b_dq.to(tl.float16), mask=m_tk)
    tl.store(dk + p_out, b_dk.to(tl.float16), mask=m_tk)
    tl.store(db + p_out, b_db.to(tl.float16), mask=m_tk)

    # through the gate's activation
    b_rate = tl.exp(tl.load(A_log + i_hg).to(tl.float32))
    b_x = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
    b_x += tl.load(dt_bias + i_hg * K + o_k)[None, :]
    b_dA = tl.where(m_tk, -b_dg * b_rate * softplus(b_x), 0.0)
    b_dg *= -b_rate / (1.0 + tl.exp(-b_x))
    tl.store(dA_log + i_tile * K + o_k, tl.sum(b_dA, 0))
    tl.store(ddt_bias + i_tile * K + o_k, tl.sum(tl.where(m_tk, b_dg, 0.0), 0))
    tl.store(dg + p_out, b_dg.to(tl.float32), mask=m_tk)


def launch(
    q, k, g, b, A_log, dt_bias, q_rstd, k_rstd, G, gamma_C, h, R, dh, dX, dT, dAqk,
    dAqk_diagonal, do, q_dot, k_dot, chunk_table, dq, dk, dg, db, dA_log, ddt_bias, *, scale,
    lower_bound, n_chunks, T, H, HV, HG
):
    """Launch one program per chunk, value head and slice of K on the current stream."""
    grad_key_kernel[(n_chunks * HV * (K // BK),)](
        q, k, g, b, A_log, dt_bias, q_rstd, k_rstd, G, gamma_C, h, R, dh, dX, dT, dAqk,
        dAqk_diagonal, do, q_dot, k_dot, chunk_table, dq, dk, dg, db, dA_log, ddt_bias, scale,
        lower_bound, T, H, HV, HG,
        K=K, V=V, BT=BT, BK=BK, BV=BV,
        num_warps=2, num_stages=1, maxnreg=128,
    )
