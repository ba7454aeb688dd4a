"""Finish the scores and the triangular inverse, and make the factors for the scan.

One program per chunk and value head.

    T     = strict lower triangle of  (gamma b k) (k / gamma)^T        A = (I + T)^-1
    Aqk   = lower triangle of  scale (gamma q) (k / gamma)^T
    Qg    = scale gamma q       Ktail = (gamma_C / gamma) k
    Y     = -A (gamma b k)      U     = A (w v)                   gamma = exp(cumulative decay)

The sub-blocks of BC tokens on the diagonal are done (stage `diagonal`); here come the pairs of
different sub-blocks. A pair (i, j) meets in the middle m of the smallest dyadic block that holds
both, as exp(G_i - G_m) exp(G_m - G_j), both factors at most 1: gamma is never divided by.

    q, k      [B, T, H, K]         queries, keys; normalised here
    v, w      [B, T, HV, V]        values, write gate
    g, b      [B, T, HG, K]        log decay, erase gate
    q_rstd, k_rstd  [B, T, HV] fp32  1 / norm
    A_d, Aqk_d  [NT, HV, BT, BC] fp32  the inverse and the scores within each sub-block
    A, Aqk    [NT, HV, BT, BT]
    Qg, Ktail, Y  [NT, HV, BT, K]  U  [NT, HV, BT, V]   whole tiles, zero on padding
    gamma_C   [NT, HV, K] fp32     decay of a whole chunk

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BK=64 BT=64 BV=64 maxnreg=0 num_stages=1 num_warps=2 solve=bf16x3
Template digest 7e99f19929c4e4e4; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage prepare --config \
      BK=64,BT=64,BV=64,maxnreg=0,num_stages=1,num_warps=2,solve=bf16x3
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BC, BK, BV = 64, 16, 64, 64
LOG2E = tl.constexpr(1.4426950408889634)
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
SMALLEST_LOG2 = tl.constexpr(-150.0)


@triton.jit
def meet_at(i_level, i, j):
    """Whether row i is in the upper and column j in the lower half of a block of 2 << i_level.

    Halves are numbered, the upper ones odd: one comparison a pair, the rest per row or column.
    """
    i_half = i >> i_level
    return tl.where(i_half % 2 == 1, i_half - 1, -1) == (j >> i_level)


@triton.jit
def middle_factor(b_G, S: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Decay between each token and the middle of its block of S tokens; never above 1.

    Tokens of the upper half are rows: exp2(G_i - G_m). Tokens of the lower half are columns:
    exp2(G_m - G_j). Token m is the last of the lower half.
    """
    b_block = tl.reshape(b_G, (BT // S, S, BK))
    o_s = tl.arange(0, S)[None, :, None]
    b_m = tl.sum(tl.where(o_s == S // 2 - 1, b_block, 0.0), 1)[:, None, :]
    b_d = tl.where(o_s < S // 2, b_m - b_block, b_block - b_m)
    return tl.reshape(tl.exp2(b_d), (BT, BK))


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def prepare_kernel(
    q,
    k,
    g,
    b,
    v,
    w,
    q_rstd,
    k_rstd,
    A_d,
    Aqk_d,
    A,
    Aqk,
    Qg,
    Ktail,
    Y,
    U,
    gamma_C,
    scale,
    lower_bound,
    T,
    H,
    HV,
    HG,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    i_c, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    i_tile = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, BT)
    m_t = o_t < n_rows
    # the program's own rows and tiles; offsets from here on fit 32 bits
    q += (i_start * H + i_hq) * K
    k += (i_start * H + i_hq) * K
    g += (i_start * HG + i_hg) * K
    b += (i_start * HG + i_hg) * K
    v += (i_start * HV + i_h) * V
    w += (i_start * HV + i_h) * V
    Qg += i_tile * BT * K
    Ktail += i_tile * BT * K
    Y += i_tile * BT * K
    U += i_tile * BT * V
    p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
    p_norm = (i_start + o_t) * HV + i_h
    b_q_rstd = tl.load(q_rstd + p_norm, mask=m_t, other=0.0)
    b_k_rstd = tl.load(k_rstd + p_norm, mask=m_t, other=0.0)
    b_T = tl.zeros([BT, BT], tl.float32)
    b_Aqk = tl.zeros([BT, BT], tl.float32)

    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        p_q = o_t[:, None] * (H * K) + o_k[None, :]
        p_g = o_t[:, None] * (HG * K) + o_k[None, :]
        p_tile = o_t[:, None] * K + o_k[None, :]
        b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
        b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2)

        b_G = tl.cumsum(b_decay, 0)
        b_G_C = tl.sum(b_decay, 0)
        tl.store(gamma_C + i_tile * K + o_k, tl.exp2(b_G_C))
        b_gamma = tl.exp2(b_G)
        b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_k *= b_k_rstd[:, None]
        b_e = b_k * tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)
        b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_q *= b_q_rstd[:, None]
        b_tail = tl.exp2(b_G_C[None, :] - b_G)
        tl.store(Ktail + p_tile, (b_k * b_tail).to(tl.bfloat16))
        tl.store(Qg + p_tile, (b_q * b_gamma * scale).to(tl.bfloat16))
        # parked in Y until A is known
        tl.store(Y + p_tile, (b_e * b_gamma).to(tl.bfloat16))
        b_q = b_q.to(tl.float16)
        b_k = b_k.to(tl.float16)
        b_e = b_e.to(tl.float16)

        # pairs across the middle of blocks of 64
        b_f = middle_factor(b_G, 64, BT, BK).to(tl.float16)
        b_column = tl.trans(b_k * b_f)
        b_T_pairs = tl.dot(b_e * b_f, b_column)
        b_Aqk_pairs = tl.dot(b_q * b_f, b_column)
        m_pairs = meet_at(5, o_t[:, None], o_t[None, :])
        b_T += tl.where(m_pairs, b_T_pairs, 0.0)
        b_Aqk += tl.where(m_pairs, b_Aqk_pairs, 0.0)

        # pairs across the middle of blocks of 32
        b_f = middle_factor(b_G, 32, BT, BK).to(tl.float16)
        b_column = tl.trans(b_k * b_f)
        b_T_pairs = tl.dot(b_e * b_f, b_column)
        b_Aqk_pairs = tl.dot(b_q * b_f, b_column)
        m_pairs = meet_at(4, o_t[:, None], o_t[None, :])
        b_T += tl.where(m_pairs, b_T_pairs, 0.0)
        b_Aqk += tl.where(m_pairs, b_Aqk_pairs, 0.0)

    m_block = (o_t[:, None] // BC) == (o_t[None, :] // BC)
    p_block = i_tile * BT * BC + o_t[:, None] * BC + (o_t % BC)[None, :]
    b_Aqk = b_Aqk * scale + tl.load(Aqk_d + p_block, mask=m_block, other=0.0)
    tl.store(Aqk + p_score, b_Aqk.to(tl.bfloat16))

    # (I + T)^-1 by merging inverted diagonal blocks: X <- X - X L X, L the part below them
    b_X = tl.load(A_d + p_block, mask=m_block, other=0.0)
    for i_level in range(4, 6):
        b_L = tl.where(meet_at(i_level, o_t[:, None], o_t[None, :]), b_T, 0.0)
        b_XL = tl.dot(b_X, b_L, input_precision="bf16x3")
        b_X -= tl.dot(b_XL, b_X, input_precision="bf16x3")
    b_A = b_X.to(tl.bfloat16)
    tl.store(A + p_score, b_A)

    tl.debug_barrier()
    for i_k in range(0, K, BK):
        p_tile = o_t[:, None] * K + i_k + tl.arange(0, BK)[None, :]
        b_Y = -tl.dot(b_A, tl.load(Y + p_tile))
        tl.store(Y + p_tile, b_Y.to(tl.bfloat16))

    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        p_v = o_t[:, None] * (HV * V) + o_v[None, :]
        b_v = tl.load(v + p_v, mask=m_t[:, None], other=0.0).to(tl.float32)
        b_z = b_v * tl.load(w + p_v, mask=m_t[:, None], other=0.0).to(tl.float32)
        b_U = tl.dot(b_A, b_z.to(tl.bfloat16))
        tl.store(U + o_t[:, None] * V + o_v[None, :], b_U.to(tl.bfloat16))


def launch(
    q, k, g, b, v, w, q_rstd, k_rstd, A_d, Aqk_d, A, Aqk, Qg, Ktail, Y, U, gamma_C, *, scale,
    lower_bound, n_chunks, T, H, HV, HG
):
    """Launch one program per chunk and value head on the current stream."""
    prepare_kernel[(n_chunks * HV,)](
        q, k, g, b, v, w, q_rstd, k_rstd, A_d, Aqk_d, A, Aqk, Qg, Ktail, Y, U, gamma_C, scale,
        lower_bound, T, H, HV, HG,
        K=K, V=V, BT=BT, BC=BC, BK=BK, BV=BV,
        num_warps=2, num_stages=1,
    )
