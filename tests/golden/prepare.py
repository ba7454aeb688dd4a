"""Score the pairs of a chunk, invert, and make the decayed factors for the scan.

One program of one warp per chunk and value head: small programs hide each other's latency.
First each sub-block of BC tokens by itself, then what lies between the sub-blocks.

    T     = strict lower triangle of  (gamma b k) (k / gamma)^T        A = (I + T)^-1
    Aqk   = lower triangle of  scale (gamma q) (k / gamma)^T
    Qg    = scale gamma q      E = gamma b k      Y = -A E      Ktail = (gamma_C / gamma) k
                                                                gamma = exp(cumulative decay)

gamma is never divided by: a pair (i, j) meets in the middle m of the smallest dyadic block that
holds both, as exp(G_i - G_m) exp(G_m - G_j), both factors at most 1. Every token keeps the decay
from the start of its block (prefix) and to its end (suffix) while blocks double.

    q        [B, T, H, K]      bf16  queries; normalised in the kernel
    k        [B, T, H, K]      bf16  keys; normalised in the kernel
    g        [B, T, HG, K]     fp32  log decay
    b        [B, T, HG, K]     bf16  erase gate
    q_rstd   [NT, HV, BT]      fp32  1 / norm of q
    k_rstd   [NT, HV, BT]      fp32  1 / norm of k
    A        [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    Aqk      [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    Qg       [NT, HV, BT, K]   bf16  queries, scaled and decayed from the chunk's start
    Y        [NT, HV, BT, K]   bf16  erasing keys through the inverse, -A E
    Ktail    [NT, HV, BT, K]   bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk
    gamma_B  [NT, HV, NB, K]   fp32  scratch: decay of each sub-block

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BK=32 BT=64 chunks=1 decay=tree language=triton maxnreg=0 num_stages=1 num_warps=1 solve=tf32
Template digest 1547121db400e34f; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage prepare --config \
      BK=32,BT=64,chunks=1,decay=tree,language=triton,maxnreg=0,num_stages=1,num_warps=1,solve=tf32
"""

import triton
import triton.language as tl


K = 128
BT, BC, BK = 64, 16, 32
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
def swap_halves(x, S: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """Exchange the halves of every block of 2 * S rows of [R, BK], bit for bit."""
    y = tl.reshape(x.to(tl.int32, bitcast=True), (R // (2 * S), 2, S, BK))
    y = y ^ tl.xor_sum(y, 1, keep_dims=True)
    return tl.reshape(y, (R, BK)).to(tl.float32, bitcast=True)


@triton.jit
def double_blocks(b_prefix, b_suffix, S: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """Decay from the start (inclusive) and to the end (exclusive) of each token's block.

    From blocks of S rows to blocks of 2 * S. Prefix and suffix of a token multiply to its whole block,
    so that the other half's decay is one exchange away.
    """
    m_upper = (tl.arange(0, R) // S % 2 == 1)[:, None]
    b_other = swap_halves(b_prefix * b_suffix, S, R, BK)
    return b_prefix * tl.where(m_upper, b_other, 1.0), b_suffix * tl.where(m_upper, 1.0, b_other)


@triton.jit
def in_mma_order(x, R: tl.constexpr, BK: tl.constexpr):
    """Reorder the channels of [R, BK], which a sum over channels does not notice.

    A thread that loads 8 neighbouring channels holds, in this order, just what the tensor cores
    want of it as an operand: nothing moves between threads.
    """
    y = tl.reshape(x, (R, BK // 32, 4, 2, 2, 2))
    return tl.reshape(tl.permute(y, (0, 1, 3, 4, 2, 5)), (R, BK))


@triton.jit
def invert(b_T, BC: tl.constexpr):
    """(I + T)^-1 by merging inverted diagonal blocks: X <- X - X L X, L the part below them."""
    o_c = tl.arange(0, BC)
    b_X = tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0)
    b_X -= tl.where(meet_at(0, o_c[:, None], o_c[None, :]), b_T, 0.0)
    for i_level in tl.static_range(1, 4):
        b_L = tl.where(meet_at(i_level, o_c[:, None], o_c[None, :]), b_T, 0.0)
        b_XL = tl.dot(b_X, b_L, input_precision="tf32")
        b_X -= tl.dot(b_XL, b_X, input_precision="tf32")
    return b_X


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def prepare_kernel(
    q,
    k,
    g,
    b,
    q_rstd,
    k_rstd,
    A,
    Aqk,
    Qg,
    Y,
    Ktail,
    gamma_C,
    gamma_B,
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
    i_c, i_h = tl.program_id(0) // HV, tl.program_id(0) % HV
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    i_tile = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
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
    gamma_B += i_tile * (BT // BC) * K

    for i_b in range(BT // BC):
        o_t = i_b * BC + o_c
        m_t = o_t < n_rows
        # a token with itself, where no decay lies between, and the norms
        b_self = tl.zeros([BC], tl.float32)
        b_q_norm = tl.zeros([BC], tl.float32)
        b_k_norm = tl.zeros([BC], tl.float32)
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

        b_T = tl.zeros([BC, BC], tl.float32)
        b_Aqk = tl.zeros([BC, BC], tl.float32)
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
            b_q = b_q.to(tl.float16)
            b_k = b_k.to(tl.float16)
            b_e = b_e.to(tl.float16)
            b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
            b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
            b_prefix = tl.exp2(b_decay)
            b_suffix = tl.full(b_decay.shape, 1.0, tl.float32)
            for i_level in tl.static_range(0, 4):
                # pairs across the middle of blocks of 2 << i_level tokens
                b_row = b_prefix.to(tl.float16)
                b_column = b_k * b_suffix.to(tl.float16)
                b_column = tl.trans(in_mma_order(b_column, BC, BK))
                m_pairs = meet_at(i_level, o_c[:, None], o_c[None, :])
                b_pairs = tl.dot(in_mma_order(b_e * b_row, BC, BK), b_column)
                b_T += tl.where(m_pairs, b_pairs, 0.0)
                b_pairs = tl.dot(in_mma_order(b_q * b_row, BC, BK), b_column)
                b_Aqk += tl.where(m_pairs, b_pairs, 0.0)
                b_prefix, b_suffix = double_blocks(b_prefix, b_suffix, 1 << i_level, BC, BK)

            # the whole sub-block is one block now
            b_head = b_prefix
            b_tail = b_suffix
            p_tile = o_t[:, None] * K + o_k[None, :]
            # kept as float16 bits until they are multiplied once more below
            b_column = b_k * b_tail.to(tl.float16)
            tl.store(Ktail + p_tile, b_column.to(tl.bfloat16, bitcast=True))
            if i_b == 0:
                # the first sub-block's are done; float16 would lose what decays below 6e-8
                tl.store(Qg + p_tile, (b_q * b_head).to(tl.bfloat16))
                tl.store(Y + p_tile, (b_e * b_head).to(tl.bfloat16))
            else:
                b_row = b_head.to(tl.float16)
                tl.store(Qg + p_tile, (b_q * b_row).to(tl.bfloat16, bitcast=True))
                tl.store(Y + p_tile, (b_e * b_row).to(tl.bfloat16, bitcast=True))
            # in every row head times tail is the decay of the sub-block: the first row's is stored
            p_first = i_b * K + tl.zeros([BC, 1], tl.int32) + o_k[None, :]
            tl.store(gamma_B + p_first, b_head * b_tail, mask=(o_c == 0)[:, None])

        m_diagonal = o_c[:, None] == o_c[None, :]
        b_Aqk += tl.where(m_diagonal, b_self[:, None], 0.0)
        p_score = o_t[:, None] * BT + i_b * BC + o_c[None, :]
        tl.store(A + p_score, invert(b_T, BC).to(tl.bfloat16))
        tl.store(Aqk + p_score, b_Aqk.to(tl.bfloat16))

    # between sub-blocks i > j lie the decays of those in between
    tl.debug_barrier()
    b_T10 = tl.zeros([BC, BC], tl.float32)
    b_Aqk10 = tl.zeros([BC, BC], tl.float32)
    b_T20 = tl.zeros([BC, BC], tl.float32)
    b_Aqk20 = tl.zeros([BC, BC], tl.float32)
    b_T21 = tl.zeros([BC, BC], tl.float32)
    b_Aqk21 = tl.zeros([BC, BC], tl.float32)
    b_T30 = tl.zeros([BC, BC], tl.float32)
    b_Aqk30 = tl.zeros([BC, BC], tl.float32)
    b_T31 = tl.zeros([BC, BC], tl.float32)
    b_Aqk31 = tl.zeros([BC, BC], tl.float32)
    b_T32 = tl.zeros([BC, BC], tl.float32)
    b_Aqk32 = tl.zeros([BC, BC], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        p_tile = o_c[:, None] * K + o_k[None, :]
        b_gamma0 = tl.load(gamma_B + 0 * K + o_k)[None, :]
        b_gamma1 = tl.load(gamma_B + 1 * K + o_k)[None, :]
        b_gamma2 = tl.load(gamma_B + 2 * K + o_k)[None, :]
        b_gamma3 = tl.load(gamma_B + 3 * K + o_k)[None, :]
        b_k0 = tl.load(Ktail + 0 * BC * K + p_tile).to(tl.float16, bitcast=True)
        b_k1 = tl.load(Ktail + 1 * BC * K + p_tile).to(tl.float16, bitcast=True)
        b_k2 = tl.load(Ktail + 2 * BC * K + p_tile).to(tl.float16, bitcast=True)
        b_k3 = tl.load(Ktail + 3 * BC * K + p_tile).to(tl.float16, bitcast=True)
        b_q = tl.load(Qg + 1 * BC * K + p_tile).to(tl.float16, bitcast=True)
        b_e = tl.load(Y + 1 * BC * K + p_tile).to(tl.float16, bitcast=True)
        b_q_row, b_e_row = in_mma_order(b_q, BC, BK), in_mma_order(b_e, BC, BK)
        b_column = b_k0
        b_between = b_gamma0
        b_column = tl.trans(in_mma_order(b_column, BC, BK))
        b_T10 = tl.dot(b_e_row, b_column, b_T10)
        b_Aqk10 = tl.dot(b_q_row, b_column, b_Aqk10)
        tl.store(Qg + 1 * BC * K + p_tile, (b_q * b_between).to(tl.bfloat16))
        tl.store(Y + 1 * BC * K + p_tile, (b_e * b_between).to(tl.bfloat16))
        b_q = tl.load(Qg + 2 * BC * K + p_tile).to(tl.float16, bitcast=True)
        b_e = tl.load(Y + 2 * BC * K + p_tile).to(tl.float16, bitcast=True)
        b_q_row, b_e_row = in_mma_order(b_q, BC, BK), in_mma_order(b_e, BC, BK)
        b_column = b_k1
        b_between = b_gamma1
        b_column = tl.trans(in_mma_order(b_column, BC, BK))
        b_T21 = tl.dot(b_e_row, b_column, b_T21)
        b_Aqk21 = tl.dot(b_q_row, b_column, b_Aqk21)
        b_column = b_k0 * b_between.to(tl.float16)
        b_between *= b_gamma0
        b_column = tl.trans(in_mma_order(b_column, BC, BK))
        b_T20 = tl.dot(b_e_row, b_column, b_T20)
        b_Aqk20 = tl.dot(b_q_row, b_column, b_Aqk20)
        tl.store(Qg + 2 * BC * K + p_tile, (b_q * b_between).to(tl.bfloat16))
        tl.store(Y + 2 * BC * K + p_tile, (b_e * b_between).to(tl.bfloat16))
        b_q = tl.load(Qg + 3 * BC * K + p_tile).to(tl.float16, bitcast=True)
        b_e = tl.load(Y + 3 * BC * K + p_tile).to(tl.float16, bitcast=True)
        b_q_row, b_e_row = in_mma_order(b_q, BC, BK), in_mma_order(b_e, BC, BK)
        b_column = b_k2
        b_between = b_gamma2
        b_column = tl.trans(in_mma_order(b_column, BC, BK))
        b_T32 = tl.dot(b_e_row, b_column, b_T32)
        b_Aqk32 = tl.dot(b_q_row, b_column, b_Aqk32)
        b_column = b_k1 * b_between.to(tl.float16)
        b_between *= b_gamma1
        b_column = tl.trans(in_mma_order(b_column, BC, BK))
        b_T31 = tl.dot(b_e_row, b_column, b_T31)
        b_Aqk31 = tl.dot(b_q_row, b_column, b_Aqk31)
        b_column = b_k0 * b_between.to(tl.float16)
        b_between *= b_gamma0
        b_column = tl.trans(in_mma_order(b_column, BC, BK))
        b_T30 = tl.dot(b_e_row, b_column, b_T30)
        b_Aqk30 = tl.dot(b_q_row, b_column, b_Aqk30)
        tl.store(Qg + 3 * BC * K + p_tile, (b_q * b_between).to(tl.bfloat16))
        tl.store(Y + 3 * BC * K + p_tile, (b_e * b_between).to(tl.bfloat16))
        tl.store(Ktail + 3 * BC * K + p_tile, b_k3.to(tl.bfloat16))
        b_after = b_gamma3
        tl.store(Ktail + 2 * BC * K + p_tile, (b_k2 * b_after).to(tl.bfloat16))
        b_after *= b_gamma2
        tl.store(Ktail + 1 * BC * K + p_tile, (b_k1 * b_after).to(tl.bfloat16))
        b_after *= b_gamma1
        tl.store(Ktail + 0 * BC * K + p_tile, (b_k0 * b_after).to(tl.bfloat16))
        b_after *= b_gamma0
        p_first = tl.zeros([BC, 1], tl.int32) + o_k[None, :]
        b_after = tl.zeros([BC, 1], tl.float32) + b_after
        tl.store(gamma_C + p_first, b_after, mask=(o_c == 0)[:, None])
    # the inverse by sub-blocks: A_ij = -A_ii (sum over j <= k < i of T_ik A_kj)
    p_score = o_c[:, None] * BT + o_c[None, :]
    b_zero = tl.zeros([BC, BC], tl.bfloat16)
    b_A00 = tl.load(A + p_score + 0 * BC * (BT + 1)).to(tl.float32)
    b_A11 = tl.load(A + p_score + 1 * BC * (BT + 1)).to(tl.float32)
    b_A22 = tl.load(A + p_score + 2 * BC * (BT + 1)).to(tl.float32)
    b_A33 = tl.load(A + p_score + 3 * BC * (BT + 1)).to(tl.float32)
    b_TA = tl.dot(b_T10, b_A00, input_precision="tf32")
    b_A10 = -tl.dot(b_A11, b_TA, input_precision="tf32")
    tl.store(A + p_score + 1 * BC * BT + 0 * BC, b_A10.to(tl.bfloat16))
    tl.store(A + p_score + 0 * BC * BT + 1 * BC, b_zero)
    tl.store(Aqk + p_score + 1 * BC * BT + 0 * BC, b_Aqk10.to(tl.bfloat16))
    tl.store(Aqk + p_score + 0 * BC * BT + 1 * BC, b_zero)
    b_TA = tl.dot(b_T20, b_A00, input_precision="tf32")
    b_TA = tl.dot(b_T21, b_A10, b_TA, input_precision="tf32")
    b_A20 = -tl.dot(b_A22, b_TA, input_precision="tf32")
    tl.store(A + p_score + 2 * BC * BT + 0 * BC, b_A20.to(tl.bfloat16))
    tl.store(A + p_score + 0 * BC * BT + 2 * BC, b_zero)
    tl.store(Aqk + p_score + 2 * BC * BT + 0 * BC, b_Aqk20.to(tl.bfloat16))
    tl.store(Aqk + p_score + 0 * BC * BT + 2 * BC, b_zero)
    b_TA = tl.dot(b_T21, b_A11, input_precision="tf32")
    b_A21 = -tl.dot(b_A22, b_TA, input_precision="tf32")
    tl.store(A + p_score + 2 * BC * BT + 1 * BC, b_A21.to(tl.bfloat16))
    tl.store(A + p_score + 1 * BC * BT + 2 * BC, b_zero)
    tl.store(Aqk + p_score + 2 * BC * BT + 1 * BC, b_Aqk21.to(tl.bfloat16))
    tl.store(Aqk + p_score + 1 * BC * BT + 2 * BC, b_zero)
    b_TA = tl.dot(b_T30, b_A00, input_precision="tf32")
    b_TA = tl.dot(b_T31, b_A10, b_TA, input_precision="tf32")
    b_TA = tl.dot(b_T32, b_A20, b_TA, input_precision="tf32")
    b_A30 = -tl.dot(b_A33, b_TA, input_precision="tf32")
    tl.store(A + p_score + 3 * BC * BT + 0 * BC, b_A30.to(tl.bfloat16))
    tl.store(A + p_score + 0 * BC * BT + 3 * BC, b_zero)
    tl.store(Aqk + p_score + 3 * BC * BT + 0 * BC, b_Aqk30.to(tl.bfloat16))
    tl.store(Aqk + p_score + 0 * BC * BT + 3 * BC, b_zero)
    b_TA = tl.dot(b_T31, b_A11, input_precision="tf32")
    b_TA = tl.dot(b_T32, b_A21, b_TA, input_precision="tf32")
    b_A31 = -tl.dot(b_A33, b_TA, input_precision="tf32")
    tl.store(A + p_score + 3 * BC * BT + 1 * BC, b_A31.to(tl.bfloat16))
    tl.store(A + p_score + 1 * BC * BT + 3 * BC, b_zero)
    tl.store(Aqk + p_score + 3 * BC * BT + 1 * BC, b_Aqk31.to(tl.bfloat16))
    tl.store(Aqk + p_score + 1 * BC * BT + 3 * BC, b_zero)
    b_TA = tl.dot(b_T32, b_A22, input_precision="tf32")
    b_A32 = -tl.dot(b_A33, b_TA, input_precision="tf32")
    tl.store(A + p_score + 3 * BC * BT + 2 * BC, b_A32.to(tl.bfloat16))
    tl.store(A + p_score + 2 * BC * BT + 3 * BC, b_zero)
    tl.store(Aqk + p_score + 3 * BC * BT + 2 * BC, b_Aqk32.to(tl.bfloat16))
    tl.store(Aqk + p_score + 2 * BC * BT + 3 * BC, b_zero)

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
    q, k, g, b, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, gamma_B, *, scale, lower_bound,
    n_chunks, T, H, HV, HG
):
    """Launch one program per chunk and value head on the current stream."""
    prepare_kernel[(n_chunks * HV,)](
        q, k, g, b, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, gamma_B, scale, lower_bound,
        T, H, HV, HG,
        K=K, BT=BT, BC=BC, BK=BK,
        num_warps=1, num_stages=1,
    )
