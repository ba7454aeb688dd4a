"""Score the pairs of a chunk, invert, and leave what scans need beside q and k.

One program per chunk and value head. Nothing decays, and the products are those of keys and queries
as they are.

    T_ij   = <k_i, k_j> beta_j of normalised keys, i > j                 A = (I + T)^-1
    Aqk_ij = <q_i, k_j> beta_j scale of normalised queries, i >= j
    q_head = scale / |q|      k_head = 1 / |k|      k_tail = beta / |k|

    q       [B, T, H, K]      bf16  queries; normalised in the kernel
    k       [B, T, H, K]      bf16  keys; normalised in the kernel
    beta    [B, T, HV]        bf16  factor of what a token erases and writes
    q_rstd  [NT, HV, BT]      fp32  1 / norm of q
    k_rstd  [NT, HV, BT]      fp32  1 / norm of k
    k_beta  [NT, HV, BT]      fp32  beta, after its activation
    A       [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    Aqk     [NT, HV, BT, BT]  bf16  scores, lower triangle
    q_head  [NT, HV, BT]      fp32  scale / norm of q
    k_head  [NT, HV, BT]      fp32  1 / norm of k
    k_tail  [NT, HV, BT]      fp32  beta / norm of k

Problem: delta_rule K=128 V=128 bf16, l2norm
Config:  BK=64 BT=32 chunks=1 decay=outside language=triton maxnreg=0 num_stages=2 num_warps=2 solve=tf32x3
Template digest 6827ab7232b8b3cf; made by
    gdn2gen generate --op delta_rule --head-dim 128,128 --dtype bf16 --with= --stage prepare \
      --config \
      BK=64,BT=32,chunks=1,decay=outside,language=triton,maxnreg=0,num_stages=2,num_warps=2,solve=tf32x3
"""

import triton
import triton.language as tl


K = 128
BT, BK = 32, 64


@triton.jit
def meet_at(i_level, i, j):
    """Whether row i is in the upper and column j in the lower half of a block of 2 << i_level.

    Halves are numbered, the upper ones odd: one comparison a pair, the rest per row or column.
    """
    i_half = i >> i_level
    return tl.where(i_half % 2 == 1, i_half - 1, -1) == (j >> i_level)


@triton.jit
def invert(b_T, BT: tl.constexpr):
    """(I + T)^-1 by merging inverted diagonal blocks: X <- X - X L X, L the part below them."""
    o_t = tl.arange(0, BT)
    b_X = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0)
    b_X -= tl.where(meet_at(0, o_t[:, None], o_t[None, :]), b_T, 0.0)
    for i_level in tl.static_range(1, 5):
        b_L = tl.where(meet_at(i_level, o_t[:, None], o_t[None, :]), b_T, 0.0)
        b_XL = tl.dot(b_X, b_L, input_precision="tf32x3")
        b_X -= tl.dot(b_XL, b_X, input_precision="tf32x3")
    return b_X


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def prepare_kernel(
    q,
    k,
    beta,
    q_rstd,
    k_rstd,
    k_beta,
    A,
    Aqk,
    q_head,
    k_head,
    k_tail,
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
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    i_hq = i_h // (HV // H)
    i_tile = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, BT)
    o_i, o_j = o_t[:, None], o_t[None, :]
    m_t = o_t < n_rows
    # the program's own rows and tiles; offsets from here on fit 32 bits
    q += (i_start * H + i_hq) * K
    k += (i_start * H + i_hq) * K
    beta += i_start * HV + i_h
    A += i_tile * BT * BT
    Aqk += i_tile * BT * BT
    p_token = i_tile * BT + o_t

    # of keys and queries as they are: products of inputs are exact, and norms are factors of them
    b_kk = tl.zeros([BT, BT], tl.float32)
    b_qk = tl.zeros([BT, BT], tl.float32)
    b_q_norm = tl.zeros([BT], tl.float32)
    b_k_norm = tl.zeros([BT], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        p_q = o_t[:, None] * (H * K) + o_k[None, :]
        b_q = tl.load(q + p_q, mask=m_t[:, None], other=0.0)
        b_k = tl.load(k + p_q, mask=m_t[:, None], other=0.0)
        b_qk = tl.dot(b_q, tl.trans(b_k), b_qk)
        b_kk = tl.dot(b_k, tl.trans(b_k), b_kk)
        b_q_norm += tl.sum(b_q.to(tl.float32) * b_q.to(tl.float32), 1)
        b_k_norm += tl.sum(b_k.to(tl.float32) * b_k.to(tl.float32), 1)

    # what belongs to rows, and to columns of keys that are written
    b_q_row = tl.rsqrt(b_q_norm + 1e-6)
    b_k_row = tl.rsqrt(b_k_norm + 1e-6)
    tl.store(q_rstd + p_token, b_q_row)
    tl.store(k_rstd + p_token, b_k_row)
    b_q_row *= scale
    b_k_column = b_k_row
    b_beta = tl.load(beta + o_t * HV, mask=m_t, other=0.0).to(tl.float32)

    tl.store(k_beta + i_tile * BT + o_t, b_beta)
    b_k_column *= b_beta
    b_qk *= b_q_row[:, None] * b_k_column[None, :]
    b_kk *= b_k_row[:, None] * b_k_column[None, :]
    tl.store(q_head + p_token, b_q_row)
    tl.store(k_head + p_token, b_k_row)
    tl.store(k_tail + p_token, b_k_column)

    p_score = o_i * BT + o_j
    tl.store(Aqk + p_score, tl.where(o_i >= o_j, b_qk, 0.0).to(tl.bfloat16))
    tl.store(A + p_score, invert(b_kk, BT).to(tl.bfloat16))


def launch(
    q, k, beta, q_rstd, k_rstd, k_beta, A, Aqk, q_head, k_head, k_tail, *, scale, lower_bound,
    n_chunks, T, H, HV, HG
):
    """Launch one program per chunk and value head on the current stream."""
    prepare_kernel[(n_chunks * HV,)](
        q, k, beta, q_rstd, k_rstd, k_beta, A, Aqk, q_head, k_head, k_tail, scale, lower_bound,
        T, H, HV, HG,
        K=K, BT=BT, BK=BK,
        num_warps=2, num_stages=2,
    )
