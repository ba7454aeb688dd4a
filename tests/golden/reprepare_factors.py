"""Make the factors for the scans again; the sum of the decay stays here.

One program per chunk, value head and slice of K.

    Qg = scale gamma q      Y = -A (gamma b k)      Ktail = (gamma_C / gamma) k
                                                    gamma = exp(cumulative decay)

    q        [B, T, H, K]      bf16  queries; normalised in the kernel
    k        [B, T, H, K]      bf16  keys; normalised in the kernel
    g        [B, T, HG, K]     fp32  log decay
    b        [B, T, HG, K]     bf16  erase gate
    q_rstd   [NT, HV, BT]      fp32  1 / norm of q
    k_rstd   [NT, HV, BT]      fp32  1 / norm of k
    A        [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    Qg       [NT, HV, BT, K]   bf16  queries, scaled and decayed from the chunk's start
    Y        [NT, HV, BT, K]   bf16  erasing keys through the inverse, -A E
    Ktail    [NT, HV, BT, K]   bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BK=64 BT=32 chunks=1 language=triton maxnreg=0 num_stages=1 num_warps=2
Template digest 162dbe1d0d0619e7; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with=initial_state,final_state --stage reprepare_factors --config \
      BK=64,BT=32,chunks=1,language=triton,maxnreg=0,num_stages=1,num_warps=2
"""

import triton
import triton.language as tl


K = 128
BT, BK = 32, 64
LOG2E = tl.constexpr(1.4426950408889634)
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
SMALLEST_LOG2 = tl.constexpr(-150.0)


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def reprepare_factors_kernel(
    q,
    k,
    g,
    b,
    q_rstd,
    k_rstd,
    A,
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
    i_k = tl.program_id(0) % (K // BK) * BK
    i_ch = tl.program_id(0) // (K // BK)
    i_c, i_h = i_ch // HV, i_ch % HV
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    i_tile = i_ch.to(tl.int64)
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

    o_k = i_k + tl.arange(0, BK)
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    p_g = o_t[:, None] * (HG * K) + o_k[None, :]
    p_q = o_t[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_b = tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)
    b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
    b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
    b_G = tl.cumsum(b_decay, 0)
    b_q *= tl.load(q_rstd + i_tile * BT + o_t)[:, None]
    b_k *= tl.load(k_rstd + i_tile * BT + o_t)[:, None]
    b_G_C = tl.sum(b_decay, 0)
    b_gamma = tl.exp2(b_G)
    b_tail = tl.exp2(b_G_C[None, :] - b_G)
    p_tile = o_t[:, None] * K + o_k[None, :]
    tl.store(Qg + p_tile, (b_q * b_gamma * scale).to(tl.bfloat16))
    tl.store(Ktail + p_tile, (b_k * b_tail).to(tl.bfloat16))
    tl.store(gamma_C + i_tile * K + o_k, tl.exp2(b_G_C))
    b_A = tl.load(A + o_t[:, None] * BT + o_t[None, :])
    b_Y = tl.dot(b_A, -(b_k * b_b * b_gamma).to(tl.bfloat16))
    tl.store(Y + p_tile, b_Y.to(tl.bfloat16))


def launch(
    q, k, g, b, q_rstd, k_rstd, A, Qg, Y, Ktail, gamma_C, *, scale, lower_bound, n_chunks, T, H,
    HV, HG
):
    """Launch one program per chunk, value head and slice of K on the current stream."""
    reprepare_factors_kernel[(n_chunks * HV * (K // BK),)](
        q, k, g, b, q_rstd, k_rstd, A, Qg, Y, Ktail, gamma_C, scale, lower_bound, T, H, HV, HG,
        K=K, BT=BT, BK=BK,
        num_warps=2, num_stages=1,
    )
