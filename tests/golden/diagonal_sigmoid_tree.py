"""Score the pairs within each sub-block of BC tokens, and invert there.

One program of one warp per sub-block and value head: small programs hide each other's latency,
where one program for a whole chunk would wait at log2(BC) levels of barriers.

    T_d    = strict lower triangle of  (gamma b k) (k / gamma)^T  in the sub-block
    A_d    = (I + T_d)^-1
    Aqk_d  = lower triangle of  scale (gamma q) (k / gamma)^T     in the sub-block

gamma is never divided by: a pair (i, j) meets in the middle m of the smallest dyadic block that
holds both, as exp(G_i - G_m) exp(G_m - G_j), both factors at most 1.

    q, k      [B, T, H, K]         queries, keys
    g, b      [B, T, HG, K]        pre-activation of the decay, erase gate
    A_d       [NT, HV, BT, BC] fp32
    Aqk_d     [NT, HV, BT, BC] fp32

Problem: gdn2 K=64 V=64 bf16, g bf16, sigmoid gate
Config:  BK=32 BT=32 decay=tree maxnreg=0 num_stages=1 num_warps=1 solve=tf32x3 vec=8
Template digest 9f8222649c6f8bce; made by
    gdn2gen generate --op gdn2 --head-dim 64,64 --dtype bf16 --gate-dtype bf16 --gate sigmoid \
      --no-l2norm --with= --stage diagonal --config \
      BK=32,BT=32,decay=tree,maxnreg=0,num_stages=1,num_warps=1,solve=tf32x3,vec=8
"""

import triton
import triton.language as tl


K = 64
BT, BC, BK = 32, 16, 32
VEC = tl.constexpr(8)  # channels a thread loads at once; it then holds all BC rows
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
def middle_factor(b_prefix, b_suffix, S: tl.constexpr, BT: tl.constexpr):
    """Decay between each token and the middle of its block of S tokens; never above 1.

    b_prefix, b_suffix: inclusive prefix and exclusive suffix products in blocks of S // 2.
    """
    o_t = tl.arange(0, BT)[:, None]
    return tl.where((o_t & (S // 2)) != 0, b_prefix, b_suffix)


@triton.jit
def double_blocks(b_prefix, b_suffix, S: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Prefix and suffix products in blocks of S tokens from those in blocks of S // 2."""
    o_s = tl.arange(0, S)[None, :, None]
    b_p = tl.reshape(b_prefix, (BT // S, S, BK))
    b_s = tl.reshape(b_suffix, (BT // S, S, BK))
    b_lower = tl.sum(tl.where(o_s == S // 2 - 1, b_p, 0.0), 1)[:, None, :]
    b_upper = tl.sum(tl.where(o_s == S - 1, b_p, 0.0), 1)[:, None, :]
    b_p = tl.where(o_s < S // 2, b_p, b_p * b_lower)
    b_s = tl.where(o_s < S // 2, b_s * b_upper, b_s)
    return tl.reshape(b_p, (BT, BK)), tl.reshape(b_s, (BT, BK))


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def diagonal_kernel(
    q,
    k,
    g,
    b,
    A_d,
    Aqk_d,
    scale,
    lower_bound,
    T,
    H,
    HV,
    HG,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    i_block = tl.program_id(0) % (BT // BC)
    i_ch = tl.program_id(0) // (BT // BC)
    i_c, i_h = i_ch // HV, i_ch % HV
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    o_t = tl.arange(0, BC)
    m_t = i_block * BC + o_t < n_rows
    i_start += i_block * BC
    # the program's own rows; offsets from here on fit 32 bits
    q += (i_start * H + i_hq) * K
    k += (i_start * H + i_hq) * K
    g += (i_start * HG + i_hg) * K
    b += (i_start * HG + i_hg) * K

    b_T = tl.zeros([BC, BC], tl.float32)
    b_Aqk = tl.zeros([BC, BC], tl.float32)
    b_self = tl.zeros([BC, BC], tl.float32)  # only its diagonal is used: i = j, no decay between

    for i_k in range(0, K, BK):
        o_k = tl.max_contiguous(i_k + tl.arange(0, BK), VEC)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        p_q = o_t[:, None] * (H * K) + o_k[None, :]
        p_g = o_t[:, None] * (HG * K) + o_k[None, :]
        b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_e = (b_k * tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)).to(tl.bfloat16)
        b_q = b_q.to(tl.bfloat16)
        b_k = b_k.to(tl.bfloat16)
        b_self = tl.dot(b_q, tl.trans(b_k), b_self)
        b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
        b_decay = tl.where(m_tk, lower_bound * LOG2E / (1.0 + tl.exp(-b_g)), 0.0)

        b_prefix = tl.exp2(b_decay)
        b_suffix = tl.full(b_decay.shape, 1.0, tl.float32)

        # pairs across the middle of blocks of 2
        b_f = middle_factor(b_prefix, b_suffix, 2, BC)
        b_prefix, b_suffix = double_blocks(b_prefix, b_suffix, 2, BC, BK)
        b_f = b_f.to(tl.bfloat16)
        b_column = tl.trans(b_k * b_f)
        b_T_pairs = tl.dot(b_e * b_f, b_column)
        b_Aqk_pairs = tl.dot(b_q * b_f, b_column)
        m_pairs = meet_at(0, o_t[:, None], o_t[None, :])
        b_T += tl.where(m_pairs, b_T_pairs, 0.0)
        b_Aqk += tl.where(m_pairs, b_Aqk_pairs, 0.0)

        # pairs across the middle of blocks of 4
        b_f = middle_factor(b_prefix, b_suffix, 4, BC)
        b_prefix, b_suffix = double_blocks(b_prefix, b_suffix, 4, BC, BK)
        b_f = b_f.to(tl.bfloat16)
        b_column = tl.trans(b_k * b_f)
        b_T_pairs = tl.dot(b_e * b_f, b_column)
        b_Aqk_pairs = tl.dot(b_q * b_f, b_column)
        m_pairs = meet_at(1, o_t[:, None], o_t[None, :])
        b_T += tl.where(m_pairs, b_T_pairs, 0.0)
        b_Aqk += tl.where(m_pairs, b_Aqk_pairs, 0.0)

        # pairs across the middle of blocks of 8
        b_f = middle_factor(b_prefix, b_suffix, 8, BC)
        b_prefix, b_suffix = double_blocks(b_prefix, b_suffix, 8, BC, BK)
        b_f = b_f.to(tl.bfloat16)
        b_column = tl.trans(b_k * b_f)
        b_T_pairs = tl.dot(b_e * b_f, b_column)
        b_Aqk_pairs = tl.dot(b_q * b_f, b_column)
        m_pairs = meet_at(2, o_t[:, None], o_t[None, :])
        b_T += tl.where(m_pairs, b_T_pairs, 0.0)
        b_Aqk += tl.where(m_pairs, b_Aqk_pairs, 0.0)

        # pairs across the middle of blocks of 16
        b_f = middle_factor(b_prefix, b_suffix, 16, BC)
        b_f = b_f.to(tl.bfloat16)
        b_column = tl.trans(b_k * b_f)
        b_T_pairs = tl.dot(b_e * b_f, b_column)
        b_Aqk_pairs = tl.dot(b_q * b_f, b_column)
        m_pairs = meet_at(3, o_t[:, None], o_t[None, :])
        b_T += tl.where(m_pairs, b_T_pairs, 0.0)
        b_Aqk += tl.where(m_pairs, b_Aqk_pairs, 0.0)

    m_diagonal = o_t[:, None] == o_t[None, :]
    b_Aqk = scale * tl.where(m_diagonal, b_self, b_Aqk)
    p_score = ((i_ch.to(tl.int64) * BT + i_block * BC) + o_t)[:, None] * BC + o_t[None, :]
    tl.store(Aqk_d + p_score, b_Aqk)

    # (I + T)^-1 by merging inverted diagonal blocks: X <- X - X L X, L the part below them
    b_X = tl.where(m_diagonal, 1.0, 0.0)
    b_X -= tl.where(meet_at(0, o_t[:, None], o_t[None, :]), b_T, 0.0)
    for i_level in tl.static_range(1, 4):
        b_L = tl.where(meet_at(i_level, o_t[:, None], o_t[None, :]), b_T, 0.0)
        b_XL = tl.dot(b_X, b_L, input_precision="tf32x3")
        b_X -= tl.dot(b_XL, b_X, input_precision="tf32x3")
    tl.store(A_d + p_score, b_X)


def launch(
    q, k, g, b, A_d, Aqk_d, *, scale, lower_bound, n_chunks, T, H, HV, HG
):
    """Launch one program per sub-block and value head on the current stream."""
    diagonal_kernel[(n_chunks * HV * (BT // BC),)](
        q, k, g, b, A_d, Aqk_d, scale, lower_bound, T, H, HV, HG,
        K=K, BT=BT, BC=BC, BK=BK,
        num_warps=1, num_stages=1,
    )
