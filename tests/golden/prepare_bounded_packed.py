"""Score the pairs of a chunk, invert, and make the decayed factors for the scan.

One program per chunk and value head.

    T     = strict lower triangle of  (gamma b k) (k / gamma)^T        A = (I + T)^-1
    Aqk   = lower triangle of  scale (gamma q) (k / gamma)^T
    Qg    = scale gamma q      E = gamma b k      Y = -A E      Ktail = (gamma_C / gamma) k
                                                                gamma = exp(cumulative decay)

A pair (i, j) meets at the chunk's start, as exp(G_i) exp(-G_j). The gate's bound makes this one frame
enough: a token keeps at least exp(-2), so that no channel loses more than 2^-93 over a chunk, and one
product serves all pairs.

    q            [B, T, H, K]      bf16   queries; normalised in the kernel
    k            [B, T, H, K]      bf16   keys; normalised in the kernel
    g            [B, T, HG, K]     fp32   pre-activation of the log decay
    b            [B, T, HG, K]     bf16   erase gate
    A_log        [HG]              fp32   log of the decay's rate
    dt_bias      [HG, K]           fp32   added to g before its activation
    chunk_table  [NT, 2]           int32  first token and number of tokens of each chunk
    q_rstd       [NT, HV, BT]      fp32   1 / norm of q
    k_rstd       [NT, HV, BT]      fp32   1 / norm of k
    A            [NT, HV, BT, BT]  bf16   inverse of I + T, lower triangle
    Aqk          [NT, HV, BT, BT]  bf16   decayed scores, lower triangle
    Qg           [NT, HV, BT, K]   bf16   queries, scaled and decayed from the chunk's start
    Y            [NT, HV, BT, K]   bf16   erasing keys through the inverse, -A E
    Ktail        [NT, HV, BT, K]   bf16   keys, decayed to the chunk's end
    gamma_C      [NT, HV, K]       fp32   decay of the whole chunk

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm, sigmoid gate, packed sequences
Config:  BK=64 BT=32 chunks=1 decay=bounded language=triton maxnreg=0 num_stages=1 num_warps=2 solve=tf32
Template digest 7b8ea7051ec2a085; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate sigmoid \
      --lower-bound -2 --with=A_log,dt_bias,varlen --stage prepare --config \
      BK=64,BT=32,chunks=1,decay=bounded,language=triton,maxnreg=0,num_stages=1,num_warps=2,solve=tf32
"""

import triton
import triton.language as tl


K = 128
BT, BK = 32, 64
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def meet_at(i_level, i, j):
    """Whether row i is in the upper and column j in the lower half of a block of 2 << i_level.

    Halves are numbered, the upper ones odd: one comparison a pair, the rest per row or column.
    """
    i_half = i >> i_level
    return tl.where(i_half % 2 == 1, i_half - 1, -1) == (j >> i_level)


@triton.jit
def score(b_T, b_Aqk, b_q_row, b_e_row, b_k_column):
    """Add what one slice of channels contributes to the scores of all pairs."""
    b_column = tl.trans(b_k_column)
    b_T = tl.dot(b_e_row, b_column, b_T)
    return b_T, tl.dot(b_q_row, b_column, b_Aqk)


@triton.jit
def invert(b_T, BT: tl.constexpr):
    """(I + T)^-1 by merging inverted diagonal blocks: X <- X - X L X, L the part below them."""
    o_t = tl.arange(0, BT)
    b_X = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0)
    b_X -= tl.where(meet_at(0, o_t[:, None], o_t[None, :]), b_T, 0.0)
    for i_level in tl.static_range(1, 5):
        b_L = tl.where(meet_at(i_level, o_t[:, None], o_t[None, :]), b_T, 0.0)
        b_XL = tl.dot(b_X, b_L, input_precision="tf32")
        b_X -= tl.dot(b_XL, b_X, input_precision="tf32")
    return b_X


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def prepare_kernel(
    q,
    k,
    g,
    b,
    A_log,
    dt_bias,
    chunk_table,
    q_rstd,
    k_rstd,
    A,
    Aqk,
    Qg,
    Y,
    Ktail,
    gamma_C,
    scale,
    lower_bound,
    T,
    H,
    HV,
    HG,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    i_c, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    i_start = tl.load(chunk_table + i_c * 2).to(tl.int64)
    n_rows = tl.load(chunk_table + i_c * 2 + 1)
    if n_rows == 0:
        return

    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    i_tile = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, BT)
    m_t = o_t < n_rows
    # the program's own rows and tiles; offsets from here on fit 32 bits
    q += (i_start * H + i_hq) * K
    k += (i_start * H + i_hq) * K
    g += (i_start * HG + i_hg) * K
    b += (i_start * HG + i_hg) * K
    Qg += i_tile * BT * K
    Y += i_tile * BT * K
    Ktail += i_tile * BT * K
    A += i_tile * BT * BT
    Aqk += i_tile * BT * BT
    gamma_C += i_tile * K

    # a token with itself, where no decay lies between, and the norms
    b_self = tl.zeros([BT], tl.float32)
    b_q_norm = tl.zeros([BT], tl.float32)
    b_k_norm = tl.zeros([BT], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        p_q = o_t[:, None] * (H * K) + o_k[None, :]
        b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_self += tl.sum(b_q * b_k, 1)
        b_q_norm += tl.sum(b_q * b_q, 1)
        b_k_norm += tl.sum(b_k * b_k, 1)
    b_q_rstd = tl.rsqrt(b_q_norm + 1e-6)
    b_k_rstd = tl.rsqrt(b_k_norm + 1e-6)
    tl.store(q_rstd + i_tile * BT + o_t, b_q_rstd)
    tl.store(k_rstd + i_tile * BT + o_t, b_k_rstd)
    b_q_rstd *= scale
    b_self *= b_q_rstd * b_k_rstd

    b_T = tl.zeros([BT, BT], tl.float32)
    b_Aqk = tl.zeros([BT, BT], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        p_q = o_t[:, None] * (H * K) + o_k[None, :]
        p_g = o_t[:, None] * (HG * K) + o_k[None, :]
        b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_q *= b_q_rstd[:, None]
        b_k *= b_k_rstd[:, None]
        b_e = b_k * tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)
        b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
        b_g += tl.load(dt_bias + i_hg * K + o_k)[None, :]
        b_g *= tl.exp(tl.load(A_log + i_hg).to(tl.float32))
        b_decay = tl.where(m_tk, lower_bound * LOG2E / (1.0 + tl.exp(-b_g)), 0.0)
        b_G = tl.cumsum(b_decay, 0)
        b_G_C = tl.min(b_G, 0)
        b_row = tl.exp2(b_G)
        b_column = tl.exp2(-b_G)
        b_q = (b_q * b_row).to(tl.bfloat16)
        b_e = (b_e * b_row).to(tl.bfloat16)
        b_T, b_Aqk = score(b_T, b_Aqk, b_q, b_e, (b_k * b_column).to(tl.bfloat16))
        p_tile = o_t[:, None] * K + o_k[None, :]
        tl.store(Qg + p_tile, b_q)
        tl.store(Y + p_tile, b_e)
        b_tail = tl.exp2(b_G_C[None, :] - b_G)
        tl.store(Ktail + p_tile, (b_k * b_tail).to(tl.bfloat16))
        tl.store(gamma_C + o_k, tl.exp2(b_G_C))

    o_i, o_j = o_t[:, None], o_t[None, :]
    p_score = o_i * BT + o_j
    b_Aqk = tl.where(o_i > o_j, b_Aqk, tl.where(o_i == o_j, b_self[:, None], 0.0))
    tl.store(Aqk + p_score, b_Aqk.to(tl.bfloat16))
    tl.store(A + p_score, invert(b_T, BT).to(tl.bfloat16))
    # every row of a result takes rows of E from other threads
    tl.debug_barrier()
    o_t = tl.arange(0, BT)
    b_A = tl.load(A + o_t[:, None] * BT + o_t[None, :])
    for i_k in range(0, K, BK):
        p_tile = o_t[:, None] * K + i_k + tl.arange(0, BK)[None, :]
        b_Y = -tl.dot(b_A, tl.load(Y + p_tile))
        tl.debug_barrier()
        tl.store(Y + p_tile, b_Y.to(tl.bfloat16))


def launch(
    q, k, g, b, A_log, dt_bias, chunk_table, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, *,
    scale, lower_bound, n_chunks, T, H, HV, HG
):
    """Launch one program per chunk and value head on the current stream."""
    prepare_kernel[(n_chunks * HV,)](
        q, k, g, b, A_log, dt_bias, chunk_table, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C,
        scale, lower_bound, T, H, HV, HG,
        K=K, BT=BT, BK=BK,
        num_warps=2, num_stages=1,
    )
