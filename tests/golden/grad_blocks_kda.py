"""The gradients of queries, keys and gates: dq, dk, dg and dbeta.

One program per chunk, value head and slice of K. Of every 2 chunks, a block, the scans kept the state
before the first, and its gradient after the last. A program makes its chunk's of these:

    S^T <- S^T Diag(gamma_C) + R^T Ktail        dS^T <- dS^T Diag(gamma_C) + dO^T Qg - dX^T E

Through the state first,

    dQg = dO S^T       dE = -dX S^T       dKtail = R dS^T       dgamma_C = rows of S dS
    dT = -strict lower triangle of dX R^T         dAqk = lower triangle of dO R^T

then through the scores, where a pair (i, j) met at an anchor a:

    dq_i += scale exp(G_i - a) sum_j dAqk_ij c_j exp(a - G_j)
    de_i +=       exp(G_i - a) sum_j dT_ij   c_j exp(a - G_j)
    dc_j +=       exp(a - G_j) sum_i (dT_ij e_i + scale dAqk_ij q_i) exp(G_i - a)

where e = k is the key that erases and c = beta k the one that is written, so that dk = de + beta dc.
dg is the reverse cumulative sum of dG = q dq + e de - c dc within the chunk. fold_beta_kernel, a
program per chunk and BH heads, makes dbeta: the mean of <R, dX> / beta and <k, dc>, of which a program
here has the part of its channels.

grad_blocks2_kernel has its anchor at the chunk's start, a = 0: exact where every channel of the slice
keeps at least 2^-96 over the chunk. strong_decay_kernel: for all other slices, frame by frame.

    q           [B, T, H, K]      bf16  queries; normalised in the kernel
    k           [B, T, H, K]      bf16  keys; normalised in the kernel
    g           [B, T, HG, K]     fp32  log decay
    q_rstd      [NT, HV, BT]      fp32  1 / norm of q
    k_rstd      [NT, HV, BT]      fp32  1 / norm of k
    k_beta      [NT, HV, BT]      fp32  beta, after its activation
    gamma_C     [NT, HV, K]       fp32  decay of the whole chunk
    Ktail       [NT, HV, BT, K]   bf16  beta times the keys, decayed to the chunk's end
    h           [NT2, HV, V, K]   bf16  state at the block's start, transposed
    R           [NT, HV, BT, V]   bf16  u: a token adds (beta k) u^T to the state
    dh          [NT2, HV, V, K]   bf16  gradient of the state at the block's end, transposed
    dX          [NT, HV, BT, V]   bf16  gradient of X = v - E S, where R = A X
    do          [B, T, HV, V]     bf16  gradient of o
    o           [B, T, HV, V]     bf16  output
    z_dot       [NT, HV, BT, NZ]  fp32  <dX, v>, by 16 values
    beta_dot    [NT, HV, BT]      fp32  <R, dX>, which is k_beta times its gradient
    dq          [B, T, HV, K]     bf16  gradient of q, per value head
    dk          [B, T, HV, K]     bf16  gradient of k, per value head
    dg          [B, T, HV, K]     fp32  gradient of g, per value head
    dbeta_part  [NT, HV, NK, BT]  fp32  gradient of k_beta: sums over a slice of channels
    dbeta       [B, T, HV]        bf16  gradient of beta

Problem: kda K=128 V=128 bf16, g fp32, l2norm
Config:  BK=64 BT=32 chunks=1 decay=anchored language=triton maxnreg=0 num_stages=1 num_warps=4
Template digest 90c2b25b4d2f7726; made by
    gdn2gen generate --op kda --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with=initial_state,final_state --stage grad_blocks2 --config \
      BK=64,BT=32,chunks=1,decay=anchored,language=triton,maxnreg=0,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BK = 32, 64
BH = 16  # heads of a program of fold_beta_kernel
# Of a smaller beta, what is left of dX, which has it as a factor, may be 0.
LEAST_BETA = tl.constexpr(2.0**-60)
LOOKED_AT = 4  # chunks a program of strong_decay_kernel
LEAST_GAMMA = tl.constexpr(2.0**-96)
LOG2E = tl.constexpr(1.4426950408889634)
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
SMALLEST_LOG2 = tl.constexpr(-150.0)


# Factors stay within this range in log2 of their anchor: fp32 and bf16 end at 2^127, and the rest is
# room for gradients and sums.
RANGE = tl.constexpr(96.0)


@triton.jit
def next_frame(b_G, b_anchor):
    """Move each channel's anchor to its first token that lies more than RANGE below the last one.

    Rows of the new frame are the tokens up to RANGE below the anchor, with exp2(G_i - anchor);
    columns are these and all earlier tokens, with exp2(anchor - G_j). Other factors are zero, and
    all of them in a channel that has no token left (its anchor becomes -inf). NaN stays NaN.
    """
    b_left = tl.where(b_G < (b_anchor - RANGE)[None, :], b_G, float("-inf"))
    b_anchor = tl.max(b_left, 0)
    m_below = b_G < (b_anchor - RANGE)[None, :]
    m_other = m_below | (b_G > b_anchor[None, :])
    b_row = tl.where(m_other, 0.0, tl.exp2(b_G - b_anchor[None, :]))
    b_column = tl.where(m_below, 0.0, tl.exp2(b_anchor[None, :] - b_G))
    return b_anchor, b_row, b_column


@triton.jit
def sum_of_later(b_x, BT: tl.constexpr):
    """Sum over each token and all later ones."""
    # a product with ones, of the first 8 bits and of the next 8: 0.3 ms less than a scan at train4k
    o_t = tl.arange(0, BT)
    b_ones = tl.where(o_t[:, None] <= o_t[None, :], 1.0, 0.0).to(tl.bfloat16)
    b_first = b_x.to(tl.bfloat16)
    b_next = (b_x - b_first.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(b_ones, b_first, tl.dot(b_ones, b_next))


@triton.jit
def sum_of_earlier(b_x, BT: tl.constexpr):
    """Sum over each token and all earlier ones."""
    # a product with ones, of the first 8 bits, the next 8 and the last: all that fp32 has
    o_t = tl.arange(0, BT)
    b_ones = tl.where(o_t[:, None] >= o_t[None, :], 1.0, 0.0).to(tl.bfloat16)
    b_first = b_x.to(tl.bfloat16)
    b_x -= b_first.to(tl.float32)
    b_next = b_x.to(tl.bfloat16)
    b_last = (b_x - b_next.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(b_ones, b_first, tl.dot(b_ones, b_next, tl.dot(b_ones, b_last)))


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def grad_blocks2_kernel(
    q,
    k,
    g,
    q_rstd,
    k_rstd,
    k_beta,
    gamma_C,
    Ktail,
    h,
    R,
    dh,
    dX,
    do,
    o,
    z_dot,
    beta_dot,
    dq,
    dk,
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
):
    i_k = tl.program_id(0) % (K // BK)
    i_ch = tl.program_id(0) // (K // BK)
    i_own, i_h = i_ch // HV, i_ch % HV
    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    n_chunks = tl.cdiv(T, BT)
    i_t = i_own % n_chunks
    i_kept = i_own // n_chunks * tl.cdiv(n_chunks, 2) + i_t // 2
    n_before = i_t % 2
    n_after = tl.minimum(1 - n_before, n_chunks - 1 - i_t)
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, V)
    p_kept = (i_kept.to(tl.int64) * HV + i_h) * K * V + o_v[:, None] * K + o_k[None, :]
    b_S = tl.load(h + p_kept).to(tl.float32)
    for i_y in range(n_before):
        i_tile = (i_own - n_before + i_y).to(tl.int64) * HV + i_h
        b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
        b_Ktail = tl.load(Ktail + i_tile * BT * K + o_t[:, None] * K + o_k[None, :])
        b_R = tl.load(R + i_tile * BT * V + o_t[:, None] * V + o_v[None, :])
        b_S = tl.dot(tl.trans(b_R), b_Ktail, b_S * b_gamma_C[None, :])
    b_Sd = b_S.to(tl.bfloat16)

    b_dS = tl.load(dh + p_kept).to(tl.float32)
    for i_back in range(n_after):
        i_c = i_own + n_after - i_back
        n_chunks = tl.cdiv(T, BT)
        i_t = (i_c % n_chunks) * BT
        i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
        n_rows = tl.minimum(T - i_t, BT)
        m_t = o_t < n_rows
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        i_tile = i_c.to(tl.int64) * HV + i_h
        p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
        p_g = (i_start * HG + i_hg) * K + o_t[:, None] * (HG * K) + o_k[None, :]
        p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
        p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
        p_token = i_tile * BT + o_t
        b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_beta = tl.load(k_beta + i_tile * BT + o_t)[:, None]
        b_k_rstd = tl.load(k_rstd + p_token)
        b_q_rstd = tl.load(q_rstd + p_token)
        b_k *= b_k_rstd[:, None]
        b_q *= (b_q_rstd * scale)[:, None]
        b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
        b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
        b_G = sum_of_earlier(b_decay, BT)

        b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
        b_gamma = tl.exp2(b_G)
        b_Qg = (b_q * b_gamma).to(tl.bfloat16)
        b_E = (-b_k * b_gamma).to(tl.bfloat16)  # less
        p_tile = i_tile * BT * V + o_t[:, None] * V + o_v[None, :]
        p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
        b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
        b_dX = tl.load(dX + p_tile)
        b_dS = tl.dot(tl.trans(b_do), b_Qg, b_dS * b_gamma_C[None, :])
        b_dS = tl.dot(tl.trans(b_dX), b_E, b_dS)
    b_dSd = b_dS.to(tl.bfloat16)

    i_c = i_own
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)
    m_t = o_t < n_rows
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    i_tile = i_c.to(tl.int64) * HV + i_h
    p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
    p_g = (i_start * HG + i_hg) * K + o_t[:, None] * (HG * K) + o_k[None, :]
    p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
    p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
    p_token = i_tile * BT + o_t
    p_tile = i_tile * BT * V + o_t[:, None] * V + o_v[None, :]
    p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
    b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
    b_dX = tl.load(dX + p_tile)
    b_R = tl.load(R + p_tile)
    # rows of S dS as the diagonal of a product: elementwise they take 16% more instructions in all
    b_SdS = tl.dot(tl.trans(b_dSd), b_Sd)
    b_dq = tl.dot(b_do, b_Sd)
    b_de = tl.dot(b_dX, b_Sd)
    b_dk = tl.dot(b_R, b_dSd)
    b_dAqk = tl.dot(b_do, tl.trans(b_R))
    b_dT = tl.dot(b_dX, tl.trans(b_R))
    b_o = tl.load(o + p_o, mask=m_t[:, None], other=0.0).to(tl.float32)
    b_q_dot = tl.sum(b_do.to(tl.float32) * b_o, 1)
    b_dgamma_C = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1)
    o_i, o_j = o_t[:, None], o_t[None, :]
    b_diagonal = tl.sum(tl.where(o_i == o_j, b_dAqk, 0.0), 1)[:, None]
    b_RdX = tl.sum(tl.where(o_i == o_j, b_dT, 0.0), 1)
    # <k, dk> = <dX, 2 R - v>
    o_z = tl.arange(0, 8)
    b_z = tl.load(z_dot + p_token[:, None] * 8 + o_z[None, :])
    b_k_dot = 2.0 * b_RdX - tl.sum(b_z, 1)
    b_dAqk = tl.where(o_i > o_j, b_dAqk, 0.0).to(tl.bfloat16)
    b_dT = tl.where(o_i > o_j, -b_dT, 0.0).to(tl.bfloat16)

    b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_beta = tl.load(k_beta + i_tile * BT + o_t)[:, None]
    b_k_rstd = tl.load(k_rstd + p_token)
    b_q_rstd = tl.load(q_rstd + p_token)
    b_k *= b_k_rstd[:, None]
    b_q *= (b_q_rstd * scale)[:, None]
    b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
    b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
    b_G = sum_of_earlier(b_decay, BT)

    b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
    b_row = tl.exp2(b_G)
    b_column = tl.exp2(-b_G)
    # A pair adds to dG_i what it takes from dG_j, and under strong decay little else remains: both
    # ends take the factors as the products do, rounded, so that it cancels.
    b_kc = ((b_k * b_beta) * b_column).to(tl.bfloat16)
    b_qr = (b_q * b_row).to(tl.bfloat16)
    b_er = (b_k * b_row).to(tl.bfloat16)
    b_dk *= b_gamma_C[None, :]
    # The chunk's last token reaches the end undecayed: it would add to dG_C what it takes from
    # its own dG. Left out of both, as in strong_decay_kernel.
    m_inner = (o_t < n_rows - 1)[:, None]
    b_dG_C = tl.sum(tl.where(m_inner, b_dk * b_kc, 0.0), 0) + b_gamma_C * b_dgamma_C
    b_dq = tl.dot(b_dAqk, b_kc, b_dq)
    b_de = tl.dot(b_dT, b_kc, -b_de)
    b_dk = tl.dot(tl.trans(b_dAqk), b_qr, b_dk)
    b_dk = tl.dot(tl.trans(b_dT), b_er, b_dk)
    b_dG = b_qr * b_dq + b_er * b_de - tl.where(m_inner, b_kc * b_dk, 0.0)
    b_dq *= b_row
    b_de *= b_row
    b_dk *= b_column
    # NaN, of which nothing is less, belongs to this kernel
    n_exact = tl.where(tl.min(b_gamma_C) < LEAST_GAMMA, 0, n_rows)
    m_out = (o_t < n_exact)[:, None] & (o_k < K)[None, :]
    # b_q holds scale q, and b_dq the gradient of q over scale
    b_dq += b_diagonal * (b_k * b_beta)
    b_dk += b_diagonal * b_q
    tl.store(beta_dot + p_token, b_RdX, mask=(o_t < n_exact) & (o_t < BT * (1 - tl.minimum(i_k, 1))))
    p_part = (i_tile * (K // BK) + i_k) * BT + o_t
    tl.store(dbeta_part + p_part, tl.sum(b_dk * b_k, 1), mask=o_t < n_exact)
    b_dk = b_dk * b_beta + b_de
    b_dq = b_dq * (scale * b_q_rstd)[:, None] - b_q * (b_q_dot * b_q_rstd / scale)[:, None]
    b_dk = (b_dk - b_k * b_k_dot[:, None]) * b_k_rstd[:, None]
    tl.store(dq + p_out, b_dq.to(tl.bfloat16), mask=m_out)
    tl.store(dk + p_out, b_dk.to(tl.bfloat16), mask=m_out)
    b_dg = sum_of_later(b_dG, BT) + b_dG_C[None, :]
    tl.store(dg + p_out, b_dg.to(tl.float32), mask=m_out)


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG", "NT"])
def strong_decay_kernel(
    q,
    k,
    g,
    q_rstd,
    k_rstd,
    k_beta,
    gamma_C,
    Ktail,
    h,
    R,
    dh,
    dX,
    do,
    o,
    z_dot,
    beta_dot,
    dq,
    dk,
    dg,
    dbeta_part,
    dbeta,
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
    LOOKED_AT: tl.constexpr,
):
    i_k = tl.program_id(0) % (K // BK)
    i_gh = tl.program_id(0) // (K // BK)
    i_first, i_h = i_gh // HV * LOOKED_AT, i_gh % HV
    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    # one look at all chunks: where none is left to do, which is the rule, this is all
    i_all = tl.minimum(i_first + tl.arange(0, LOOKED_AT), NT - 1).to(tl.int64)
    b_all = tl.load(gamma_C + (i_all * HV + i_h)[:, None] * K + o_k[None, :])
    b_least = tl.min(b_all)
    n_left = tl.where(b_least < LEAST_GAMMA, tl.minimum(LOOKED_AT, NT - i_first), 0)
    for i_look in range(n_left):
        i_own = i_first + i_look
        i_c = i_own
        n_chunks = tl.cdiv(T, BT)
        i_t = (i_c % n_chunks) * BT
        i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
        n_rows = tl.minimum(T - i_t, BT)
        m_t = o_t < n_rows
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        i_tile = i_c.to(tl.int64) * HV + i_h
        p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
        p_g = (i_start * HG + i_hg) * K + o_t[:, None] * (HG * K) + o_k[None, :]
        p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
        p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
        p_token = i_tile * BT + o_t
        b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
        if tl.where(tl.min(b_gamma_C) < LEAST_GAMMA, n_rows, 0) > 0:
            n_chunks = tl.cdiv(T, BT)
            i_t = i_own % n_chunks
            i_kept = i_own // n_chunks * tl.cdiv(n_chunks, 2) + i_t // 2
            n_before = i_t % 2
            n_after = tl.minimum(1 - n_before, n_chunks - 1 - i_t)
            o_v = tl.arange(0, V)
            p_kept = (i_kept.to(tl.int64) * HV + i_h) * K * V + o_v[:, None] * K + o_k[None, :]
            b_S = tl.load(h + p_kept).to(tl.float32)
            for i_y in range(n_before):
                i_tile = (i_own - n_before + i_y).to(tl.int64) * HV + i_h
                b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
                b_Ktail = tl.load(Ktail + i_tile * BT * K + o_t[:, None] * K + o_k[None, :])
                b_R = tl.load(R + i_tile * BT * V + o_t[:, None] * V + o_v[None, :])
                b_S = tl.dot(tl.trans(b_R), b_Ktail, b_S * b_gamma_C[None, :])
            b_Sd = b_S.to(tl.bfloat16)

            b_dS = tl.load(dh + p_kept).to(tl.float32)
            for i_back in range(n_after):
                i_c = i_own + n_after - i_back
                n_chunks = tl.cdiv(T, BT)
                i_t = (i_c % n_chunks) * BT
                i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
                n_rows = tl.minimum(T - i_t, BT)
                m_t = o_t < n_rows
                m_tk = m_t[:, None] & (o_k < K)[None, :]
                i_tile = i_c.to(tl.int64) * HV + i_h
                p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
                p_g = (i_start * HG + i_hg) * K + o_t[:, None] * (HG * K) + o_k[None, :]
                p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
                p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
                p_token = i_tile * BT + o_t
                b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
                b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
                b_beta = tl.load(k_beta + i_tile * BT + o_t)[:, None]
                b_k_rstd = tl.load(k_rstd + p_token)
                b_q_rstd = tl.load(q_rstd + p_token)
                b_k *= b_k_rstd[:, None]
                b_q *= (b_q_rstd * scale)[:, None]
                b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
                b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
                b_G = sum_of_earlier(b_decay, BT)

                b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
                b_gamma = tl.exp2(b_G)
                b_Qg = (b_q * b_gamma).to(tl.bfloat16)
                b_E = (-b_k * b_gamma).to(tl.bfloat16)  # less
                p_tile = i_tile * BT * V + o_t[:, None] * V + o_v[None, :]
                p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
                b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
                b_dX = tl.load(dX + p_tile)
                b_dS = tl.dot(tl.trans(b_do), b_Qg, b_dS * b_gamma_C[None, :])
                b_dS = tl.dot(tl.trans(b_dX), b_E, b_dS)
            b_dSd = b_dS.to(tl.bfloat16)

            i_c = i_own
            n_chunks = tl.cdiv(T, BT)
            i_t = (i_c % n_chunks) * BT
            i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
            n_rows = tl.minimum(T - i_t, BT)
            m_t = o_t < n_rows
            m_tk = m_t[:, None] & (o_k < K)[None, :]
            i_tile = i_c.to(tl.int64) * HV + i_h
            p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
            p_g = (i_start * HG + i_hg) * K + o_t[:, None] * (HG * K) + o_k[None, :]
            p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
            p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
            p_token = i_tile * BT + o_t
            p_tile = i_tile * BT * V + o_t[:, None] * V + o_v[None, :]
            p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
            b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
            b_dX = tl.load(dX + p_tile)
            b_R = tl.load(R + p_tile)
            # rows of S dS as the diagonal of a product: elementwise they take 16% more instructions in all
            b_SdS = tl.dot(tl.trans(b_dSd), b_Sd)
            b_dq = tl.dot(b_do, b_Sd)
            b_de = tl.dot(b_dX, b_Sd)
            b_dk = tl.dot(b_R, b_dSd)
            b_dAqk = tl.dot(b_do, tl.trans(b_R))
            b_dT = tl.dot(b_dX, tl.trans(b_R))
            b_o = tl.load(o + p_o, mask=m_t[:, None], other=0.0).to(tl.float32)
            b_q_dot = tl.sum(b_do.to(tl.float32) * b_o, 1)
            b_dgamma_C = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1)
            o_i, o_j = o_t[:, None], o_t[None, :]
            b_diagonal = tl.sum(tl.where(o_i == o_j, b_dAqk, 0.0), 1)[:, None]
            b_RdX = tl.sum(tl.where(o_i == o_j, b_dT, 0.0), 1)
            # <k, dk> = <dX, 2 R - v>
            o_z = tl.arange(0, 8)
            b_z = tl.load(z_dot + p_token[:, None] * 8 + o_z[None, :])
            b_k_dot = 2.0 * b_RdX - tl.sum(b_z, 1)
            b_dAqk = tl.where(o_i > o_j, b_dAqk, 0.0).to(tl.bfloat16)
            b_dT = tl.where(o_i > o_j, -b_dT, 0.0).to(tl.bfloat16)

            b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_beta = tl.load(k_beta + i_tile * BT + o_t)[:, None]
            b_k_rstd = tl.load(k_rstd + p_token)
            b_q_rstd = tl.load(q_rstd + p_token)
            b_k *= b_k_rstd[:, None]
            b_q *= (b_q_rstd * scale)[:, None]
            b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
            b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
            b_G = sum_of_earlier(b_decay, BT)

            b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
            b_G_C = tl.min(b_G, 0)
            b_gamma = tl.exp2(b_G)
            b_dq *= b_gamma
            b_de *= -b_gamma
            b_dk *= tl.exp2(b_G_C[None, :] - b_G)
            # The chunk's last token reaches the end undecayed: it would add to dG_C what it takes
            # from its own dG. Left out of both, since under strong decay that cancellation is all
            # that remains.
            m_inner = (o_t < n_rows - 1)[:, None]
            b_c = b_k * b_beta
            b_dG_C = tl.sum(tl.where(m_inner, b_dk * b_c, 0.0), 0) + b_gamma_C * b_dgamma_C
            b_dG = b_q * b_dq + b_k * b_de - tl.where(m_inner, b_c * b_dk, 0.0)
            b_anchor = tl.full([BK], 2.0 * RANGE, tl.float32)
            while tl.max(b_anchor - b_G_C) > RANGE:
                b_anchor, b_row, b_column = next_frame(b_G, b_anchor)
                b_kc = ((b_k * b_beta) * b_column).to(tl.bfloat16)
                b_qr = (b_q * b_row).to(tl.bfloat16)
                b_er = (b_k * b_row).to(tl.bfloat16)
                b_pairs = tl.dot(b_dAqk, b_kc)
                b_dq += b_row * b_pairs
                # the same rounded factors at both ends of a pair, so that it cancels out of dG
                b_dG += b_qr * b_pairs
                b_pairs = tl.dot(b_dT, b_kc)
                b_de += b_row * b_pairs
                b_dG += b_er * b_pairs
                b_pairs = tl.dot(tl.trans(b_dAqk), b_qr)
                b_pairs = tl.dot(tl.trans(b_dT), b_er, b_pairs)
                b_dk += b_column * b_pairs
                b_dG -= b_kc * b_pairs
            # b_q holds scale q, and b_dq the gradient of q over scale
            b_dq += b_diagonal * (b_k * b_beta)
            b_dk += b_diagonal * b_q
            tl.store(beta_dot + p_token, b_RdX, mask=(m_t) & (o_t < BT * (1 - tl.minimum(i_k, 1))))
            p_part = (i_tile * (K // BK) + i_k) * BT + o_t
            tl.store(dbeta_part + p_part, tl.sum(b_dk * b_k, 1), mask=m_t)
            b_dk = b_dk * b_beta + b_de
            b_dq = b_dq * (scale * b_q_rstd)[:, None] - b_q * (b_q_dot * b_q_rstd / scale)[:, None]
            b_dk = (b_dk - b_k * b_k_dot[:, None]) * b_k_rstd[:, None]
            tl.store(dq + p_out, b_dq.to(tl.bfloat16), mask=m_tk)
            tl.store(dk + p_out, b_dk.to(tl.bfloat16), mask=m_tk)
            b_dg = sum_of_later(b_dG, BT) + b_dG_C[None, :]
            tl.store(dg + p_out, b_dg.to(tl.float32), mask=m_tk)


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
    """dbeta of a chunk, BH heads at a time: the mean of <k, dc> and <R, dX> / beta.

    Both are the gradient. The sum over channels is nearer to it, but of keys that have much in
    common, where it is a difference of large terms. Half of what rounding adds to one is not in
    the other, so the mean is off by less than either. It is <k, dc> alone where beta is so small
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
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_dbeta += tl.load(dbeta_part + p_part, mask=m_th, other=0.0)
    m_small = tl.abs(b_beta) < LEAST_BETA
    b_dbeta = tl.where(m_small, b_dbeta, 0.5 * (b_dbeta + b_dot / tl.where(m_small, 1.0, b_beta)))
    tl.store(dbeta + p_beta, b_dbeta.to(tl.bfloat16), mask=m_th)


def launch(
    q, k, g, q_rstd, k_rstd, k_beta, gamma_C, Ktail, h, R, dh, dX, do, o, z_dot, beta_dot, dq,
    dk, dg, dbeta_part, dbeta, *, n_chunks, scale, lower_bound, T, H, HV, HG, n_sequences
):
    """Launch all kernels on the current stream."""
    grad_blocks2_kernel[(n_chunks * HV * (K // BK),)](
        q, k, g, q_rstd, k_rstd, k_beta, gamma_C, Ktail, h, R, dh, dX, do, o, z_dot, beta_dot,
        dq, dk, dg, dbeta_part, dbeta, scale, lower_bound, T, H, HV, HG,
        K=K, V=V, BT=BT, BK=BK,
        num_warps=4, num_stages=1,
    )
    strong_decay_kernel[(-(-n_chunks // LOOKED_AT) * HV * (K // BK),)](
        q, k, g, q_rstd, k_rstd, k_beta, gamma_C, Ktail, h, R, dh, dX, do, o, z_dot, beta_dot,
        dq, dk, dg, dbeta_part, dbeta, scale, lower_bound, T, H, HV, HG,
        NT=n_chunks, K=K, V=V, BT=BT, BK=BK, LOOKED_AT=LOOKED_AT,
        num_warps=4, num_stages=1,
    )
    fold_beta_kernel[(n_chunks, -(-HV // BH))](
        beta_dot, k_beta, dbeta_part, dbeta, T, HV,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
