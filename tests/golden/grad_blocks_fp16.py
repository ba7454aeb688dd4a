"""The gradients of queries, keys and gates: dq, dk, dg and db.

One program per chunk, value head and slice of K.Through the state first,

    dQg = dO S^T       dE = -dX S^T       dKtail = R dS^T       dgamma_C = rows of S dS
    dT = -strict lower triangle of dX R^T         dAqk = lower triangle of dO R^T

then through the scores, where a pair (i, j) met at an anchor a:

    dq_i += scale exp(G_i - a) sum_j dAqk_ij k_j exp(a - G_j)
    de_i +=       exp(G_i - a) sum_j dT_ij   k_j exp(a - G_j)                   e = b k
    dk_j +=       exp(a - G_j) sum_i (dT_ij e_i + scale dAqk_ij q_i) exp(G_i - a)

and dg is the reverse cumulative sum of dG = q dq + e de - k dk within the chunk.

grad_blocks1_kernel has its anchor at the chunk's start, a = 0: exact where every channel of the slice
keeps at least 2^-96 over the chunk. strong_decay_kernel: for all other slices, frame by frame.

    q        [B, T, H, K]      fp16  queries; normalised in the kernel
    k        [B, T, H, K]      fp16  keys; normalised in the kernel
    g        [B, T, HG, K]     fp32  log decay
    b        [B, T, HG, K]     fp16  erase gate
    q_rstd   [NT, HV, BT]      fp32  1 / norm of q
    k_rstd   [NT, HV, BT]      fp32  1 / norm of k
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk
    h        [NT, HV, V, K]    fp16  state at the block's start, transposed
    R        [NT, HV, BT, V]   fp16  what each token adds to the state
    dh       [NT, HV, V, K]    fp16  gradient of the state at the block's end, transposed
    dX       [NT, HV, BT, V]   fp16  gradient of X = w v - E S, where R = A X
    do       [B, T, HV, V]     fp16  gradient of o
    o        [B, T, HV, V]     fp16  output
    z_dot    [NT, HV, BT, NZ]  fp32  <dX, w v>, by 16 values
    dq       [B, T, HV, K]     fp16  gradient of q, per value head
    dk       [B, T, HV, K]     fp16  gradient of k, per value head
    dg       [B, T, HV, K]     fp32  gradient of g, per value head
    db       [B, T, HV, K]     fp16  gradient of b, per value head

Problem: gdn2 K=64 V=128 fp16, g fp32, l2norm
Config:  BK=64 BT=32 chunks=1 decay=anchored language=triton maxnreg=0 num_stages=1 num_warps=4
Template digest 90c2b25b4d2f7726; made by
    gdn2gen generate --op gdn2 --head-dim 64,128 --dtype fp16 --gate-dtype fp32 --gate none \
      --with=initial_state,final_state --stage grad_blocks1 --config \
      BK=64,BT=32,chunks=1,decay=anchored,language=triton,maxnreg=0,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


K, V = 64, 128
BT, BK = 32, 64
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


@triton.jit
def in_tf32(x):
    """To the nearest with 10 bits, as many as fp16 has, in the range of fp32."""
    bits = x.to(tl.int32, bitcast=True) + 0x1000
    return (bits & -0x2000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG"])
def grad_blocks1_kernel(
    q,
    k,
    g,
    b,
    q_rstd,
    k_rstd,
    gamma_C,
    h,
    R,
    dh,
    dX,
    do,
    o,
    z_dot,
    dq,
    dk,
    dg,
    db,
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
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, V)
    p_kept = (i_own.to(tl.int64) * HV + i_h) * K * V + o_v[:, None] * K + o_k[None, :]
    b_Sd = tl.load(h + p_kept)
    b_dSd = tl.load(dh + p_kept)

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
    b_dgamma_C = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1)
    o_i, o_j = o_t[:, None], o_t[None, :]
    b_diagonal = tl.sum(tl.where(o_i == o_j, b_dAqk, 0.0), 1)[:, None]
    b_dAqk = tl.where(o_i > o_j, b_dAqk, 0.0).to(tl.float16).to(tl.float32)
    b_dT = tl.where(o_i > o_j, -b_dT, 0.0).to(tl.float16).to(tl.float32)

    b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
    b_b = tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)
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
    b_kc = in_tf32(b_k * b_column)
    b_qr = in_tf32(b_q * b_row)
    b_er = in_tf32(b_k * b_b * b_row)
    b_dk *= b_gamma_C[None, :]
    # The chunk's last token reaches the end undecayed: it would add to dG_C what it takes from
    # its own dG. Left out of both, as in strong_decay_kernel.
    m_inner = (o_t < n_rows - 1)[:, None]
    b_dG_C = tl.sum(tl.where(m_inner, b_dk * b_kc, 0.0), 0) + b_gamma_C * b_dgamma_C
    b_dq = tl.dot(b_dAqk, b_kc, b_dq, input_precision="tf32")
    b_de = tl.dot(b_dT, b_kc, -b_de, input_precision="tf32")
    b_dk = tl.dot(tl.trans(b_dAqk), b_qr, b_dk, input_precision="tf32")
    b_dk = tl.dot(tl.trans(b_dT), b_er, b_dk, input_precision="tf32")
    b_dG = b_qr * b_dq + b_er * b_de - tl.where(m_inner, b_kc * b_dk, 0.0)
    b_dq *= b_row
    b_de *= b_row
    b_dk *= b_column
    # NaN, of which nothing is less, belongs to this kernel
    n_exact = tl.where(tl.min(b_gamma_C) < LEAST_GAMMA, 0, n_rows)
    m_out = (o_t < n_exact)[:, None] & (o_k < K)[None, :]
    # b_q holds scale q, and b_dq the gradient of q over scale
    tl.store(db + p_out, (b_de * b_k).to(tl.float16), mask=m_out)
    b_dq += b_diagonal * b_k
    b_dk += b_diagonal * b_q + b_de * b_b
    b_q_dot = tl.sum(b_q * b_dq, 1)
    b_k_dot = tl.sum(b_k * b_dk, 1)
    b_dq = b_dq * (scale * b_q_rstd)[:, None] - b_q * (b_q_dot * b_q_rstd / scale)[:, None]
    b_dk = (b_dk - b_k * b_k_dot[:, None]) * b_k_rstd[:, None]
    tl.store(dq + p_out, b_dq.to(tl.float16), mask=m_out)
    tl.store(dk + p_out, b_dk.to(tl.float16), mask=m_out)
    b_dg = sum_of_later(b_dG, BT) + b_dG_C[None, :]
    tl.store(dg + p_out, b_dg.to(tl.float32), mask=m_out)


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG", "NT"])
def strong_decay_kernel(
    q,
    k,
    g,
    b,
    q_rstd,
    k_rstd,
    gamma_C,
    h,
    R,
    dh,
    dX,
    do,
    o,
    z_dot,
    dq,
    dk,
    dg,
    db,
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
            o_v = tl.arange(0, V)
            p_kept = (i_own.to(tl.int64) * HV + i_h) * K * V + o_v[:, None] * K + o_k[None, :]
            b_Sd = tl.load(h + p_kept)
            b_dSd = tl.load(dh + p_kept)

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
            b_dgamma_C = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1)
            o_i, o_j = o_t[:, None], o_t[None, :]
            b_diagonal = tl.sum(tl.where(o_i == o_j, b_dAqk, 0.0), 1)[:, None]
            b_dAqk = tl.where(o_i > o_j, b_dAqk, 0.0).to(tl.float16).to(tl.float32)
            b_dT = tl.where(o_i > o_j, -b_dT, 0.0).to(tl.float16).to(tl.float32)

            b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_b = tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)
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
            b_dG_C = tl.sum(tl.where(m_inner, b_dk * b_k, 0.0), 0) + b_gamma_C * b_dgamma_C
            b_dG = b_q * b_dq + b_k * b_b * b_de - tl.where(m_inner, b_k * b_dk, 0.0)
            b_anchor = tl.full([BK], 2.0 * RANGE, tl.float32)
            while tl.max(b_anchor - b_G_C) > RANGE:
                b_anchor, b_row, b_column = next_frame(b_G, b_anchor)
                b_kc = in_tf32(b_k * b_column)
                b_qr = in_tf32(b_q * b_row)
                b_er = in_tf32(b_k * b_b * b_row)
                b_pairs = tl.dot(b_dAqk, b_kc, input_precision="tf32")
                b_dq += b_row * b_pairs
                # the same rounded factors at both ends of a pair, so that it cancels out of dG
                b_dG += b_qr * b_pairs
                b_pairs = tl.dot(b_dT, b_kc, input_precision="tf32")
                b_de += b_row * b_pairs
                b_dG += b_er * b_pairs
                b_pairs = tl.dot(tl.trans(b_dAqk), b_qr, input_precision="tf32")
                b_pairs = tl.dot(tl.trans(b_dT), b_er, b_pairs, input_precision="tf32")
                b_dk += b_column * b_pairs
                b_dG -= b_kc * b_pairs
            # b_q holds scale q, and b_dq the gradient of q over scale
            tl.store(db + p_out, (b_de * b_k).to(tl.float16), mask=m_tk)
            b_dq += b_diagonal * b_k
            b_dk += b_diagonal * b_q + b_de * b_b
            b_q_dot = tl.sum(b_q * b_dq, 1)
            b_k_dot = tl.sum(b_k * b_dk, 1)
            b_dq = b_dq * (scale * b_q_rstd)[:, None] - b_q * (b_q_dot * b_q_rstd / scale)[:, None]
            b_dk = (b_dk - b_k * b_k_dot[:, None]) * b_k_rstd[:, None]
            tl.store(dq + p_out, b_dq.to(tl.float16), mask=m_tk)
            tl.store(dk + p_out, b_dk.to(tl.float16), mask=m_tk)
            b_dg = sum_of_later(b_dG, BT) + b_dG_C[None, :]
            tl.store(dg + p_out, b_dg.to(tl.float32), mask=m_tk)


def launch(
    q, k, g, b, q_rstd, k_rstd, gamma_C, h, R, dh, dX, do, o, z_dot, dq, dk, dg, db, *,
    n_chunks, scale, lower_bound, T, H, HV, HG, n_sequences
):
    """Launch both kernels on the current stream."""
    grad_blocks1_kernel[(n_chunks * HV * (K // BK),)](
        q, k, g, b, q_rstd, k_rstd, gamma_C, h, R, dh, dX, do, o, z_dot, dq, dk, dg, db, scale,
        lower_bound, T, H, HV, HG,
        K=K, V=V, BT=BT, BK=BK,
        num_warps=4, num_stages=1,
    )
    strong_decay_kernel[(-(-n_chunks // LOOKED_AT) * HV * (K // BK),)](
        q, k, g, b, q_rstd, k_rstd, gamma_C, h, R, dh, dX, do, o, z_dot, dq, dk, dg, db, scale,
        lower_bound, T, H, HV, HG,
        NT=n_chunks, K=K, V=V, BT=BT, BK=BK, LOOKED_AT=LOOKED_AT,
        num_warps=4, num_stages=1,
    )
