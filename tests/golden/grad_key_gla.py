"""The key side of the gradients, decay anchored at the chunk's start: dq, dk and dg.

Through the state first,

    dQg = dO S^T       dKtail = v dS^T       dgamma_C = rows of S dS

then through the scores, where a pair (i, j) met at an anchor a:

    dq_i += scale exp(G_i - a) sum_j dAqk_ij k_j exp(a - G_j)
    dk_j += scale exp(a - G_j) sum_i dAqk_ij q_i exp(G_i - a)

and dg is the reverse cumulative sum of dG = q dq - k dk within the chunk.

grad_key_kernel: one program per CHUNKS chunks, value head and slice of K, which loads one
chunk ahead. Its anchor is the chunk's start, a = 0: exact where every channel of the slice keeps at
least 2^-64 over the chunk. strong_decay_kernel: programs of LOOKED_AT chunks, for all other
slices, frame by frame.

    q        [B, T, H, K]    bf16  queries
    k        [B, T, H, K]    bf16  keys
    g        [B, T, HG, K]   fp32  log decay
    G        [B, T, HV, K]   fp32  decay since the chunk's start, log2; dg takes its place
    gamma_C  [NT, HV, K]     fp32  decay of the whole chunk
    h        [NT, HV, V, K]  bf16  state at the chunk's start, transposed
    v        [B, T, HV, V]   bf16  values
    dh       [NT, HV, V, K]  bf16  gradient of the state at the chunk's end, transposed
    do       [B, T, HV, V]   bf16  gradient of o
    dq       [B, T, HV, K]   bf16  gradient of q, per value head
    dk       [B, T, HV, K]   bf16  gradient of k, per value head
    dg       [B, T, HV, K]   fp32  gradient of g, per value head

Problem: gla K=128 V=128 bf16, g fp32
Config:  BK=64 BT=32 BV=128 chunks=4 decay=anchored language=triton maxnreg=0 num_stages=2 num_warps=4
Template digest 7a80d76feb664c21; made by
    gdn2gen generate --op gla --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage grad_key --config \
      BK=64,BT=32,BV=128,chunks=4,decay=anchored,language=triton,maxnreg=0,num_stages=2,num_warps=4
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BK = 32, 64
CHUNKS, STAGES = 4, 2
LOOKED_AT = 4  # chunks a program of strong_decay_kernel
LEAST_GAMMA = tl.constexpr(2.0**-64)


# Factors stay within this range in log2 of their anchor: fp32 and bf16 end at 2^127, and the rest is
# room for keys of any norm, gradients and sums.
RANGE = tl.constexpr(64.0)


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


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG", "NT"])
def grad_key_kernel(
    q,
    k,
    g,
    G,
    gamma_C,
    h,
    v,
    dh,
    do,
    dq,
    dk,
    dg,
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
    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    # a bound that the compiler knows keeps 100 bytes a thread out of the stack: chunks past the last
    # are the last one again, and store nothing
    for i_n in tl.range(0, CHUNKS, num_stages=STAGES):
        i_c = tl.minimum(i_first + i_n, NT - 1)
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

        o_v = tl.arange(0, V)
        p_h = i_tile * K * V + o_v[:, None] * K + o_k[None, :]
        p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
        b_h = tl.load(h + p_h)
        b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
        b_dq = tl.dot(b_do, b_h)
        b_dh = tl.load(dh + p_h)
        b_v = tl.load(v + p_o, mask=m_t[:, None], other=0.0)
        b_dk = tl.dot(b_v, b_dh)
        b_dAqk = tl.dot(b_do, tl.trans(b_v))
        # rows of S dS as the diagonal of a product: tiles that only products read are laid out
        # without bank conflicts, which is worth 0.08 ms at train4k
        b_SdS = tl.dot(tl.trans(b_dh), b_h)
        b_dgamma_C = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1)
        b_G = tl.load(G + p_out, mask=m_tk, other=0.0)
        b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
        b_q *= scale

        b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
        b_row = tl.exp2(b_G)
        b_column = tl.exp2(-b_G)
        # A pair adds to dG_i what it takes from dG_j, and under strong decay little else remains: both
        # ends take the factors as the products do, rounded, so that it cancels.
        b_kc = (b_k * b_column).to(tl.bfloat16)
        b_qr = (b_q * b_row).to(tl.bfloat16)
        b_dk *= b_gamma_C[None, :]
        # The chunk's last token reaches the end undecayed: it would add to dG_C what it takes from
        # its own dG. Left out of both, as in strong_decay_kernel.
        m_inner = (o_t < n_rows - 1)[:, None]
        b_dG_C = tl.sum(tl.where(m_inner, b_dk * b_kc, 0.0), 0) + b_gamma_C * b_dgamma_C
        # dO v^T, which another stage would have to read both for
        o_i, o_j = o_t[:, None], o_t[None, :]
        b_diagonal = tl.sum(tl.where(o_i == o_j, b_dAqk, 0.0), 1)[:, None]
        b_dAqk = tl.where(o_i > o_j, b_dAqk, 0.0).to(tl.bfloat16)
        b_dq = tl.dot(b_dAqk, b_kc, b_dq)
        b_dk = tl.dot(tl.trans(b_dAqk), b_qr, b_dk)
        b_dG = b_qr * b_dq - tl.where(m_inner, b_kc * b_dk, 0.0)
        b_dq *= b_row
        b_dk *= b_column
        # NaN, of which nothing is less, belongs to this kernel
        n_exact = tl.where(tl.min(b_gamma_C) < LEAST_GAMMA, 0, n_rows)
        n_exact = tl.where(i_first + i_n < NT, n_exact, 0)
        m_out = (o_t < n_exact)[:, None] & (o_k < K)[None, :]
        # b_q holds scale q, and b_dq the gradient of q over scale
        b_dq += b_diagonal * b_k
        b_dk += b_diagonal * b_q
        b_dq *= scale
        tl.store(dq + p_out, b_dq.to(tl.bfloat16), mask=m_out)
        tl.store(dk + p_out, b_dk.to(tl.bfloat16), mask=m_out)
        b_dg = sum_of_later(b_dG, BT) + b_dG_C[None, :]
        tl.store(dg + p_out, b_dg.to(tl.float32), mask=m_out)


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG", "NT"])
def strong_decay_kernel(
    q,
    k,
    g,
    G,
    gamma_C,
    h,
    v,
    dh,
    do,
    dq,
    dk,
    dg,
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
    for i_n in range(n_left):
        i_c = i_first + i_n
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

        b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
        if tl.where(tl.min(b_gamma_C) < LEAST_GAMMA, n_rows, 0) > 0:
            o_v = tl.arange(0, V)
            p_h = i_tile * K * V + o_v[:, None] * K + o_k[None, :]
            p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
            b_h = tl.load(h + p_h)
            b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
            b_dq = tl.dot(b_do, b_h)
            b_dh = tl.load(dh + p_h)
            b_v = tl.load(v + p_o, mask=m_t[:, None], other=0.0)
            b_dk = tl.dot(b_v, b_dh)
            b_dAqk = tl.dot(b_do, tl.trans(b_v))
            # rows of S dS as the diagonal of a product: tiles that only products read are laid out
            # without bank conflicts, which is worth 0.08 ms at train4k
            b_SdS = tl.dot(tl.trans(b_dh), b_h)
            b_dgamma_C = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1)
            b_G = tl.load(G + p_out, mask=m_tk, other=0.0)
            b_G_C = tl.min(b_G, 0)
            b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_q *= scale

            b_gamma = tl.exp2(b_G)
            b_dq *= b_gamma
            b_dk *= tl.exp2(b_G_C[None, :] - b_G)
            # The chunk's last token reaches the end undecayed: it would add to dG_C what it takes
            # from its own dG. Left out of both, since under strong decay that cancellation is all
            # that remains.
            m_inner = (o_t < n_rows - 1)[:, None]
            b_dG_C = tl.sum(tl.where(m_inner, b_dk * b_k, 0.0), 0) + b_gamma_C * b_dgamma_C
            b_dG = b_q * b_dq - tl.where(m_inner, b_k * b_dk, 0.0)
            # dO v^T, which another stage would have to read both for
            o_i, o_j = o_t[:, None], o_t[None, :]
            b_diagonal = tl.sum(tl.where(o_i == o_j, b_dAqk, 0.0), 1)[:, None]
            b_dAqk = tl.where(o_i > o_j, b_dAqk, 0.0).to(tl.bfloat16)
            b_anchor = tl.full([BK], 2.0 * RANGE, tl.float32)
            while tl.max(b_anchor - b_G_C) > RANGE:
                b_anchor, b_row, b_column = next_frame(b_G, b_anchor)
                b_kc = (b_k * b_column).to(tl.bfloat16)
                b_qr = (b_q * b_row).to(tl.bfloat16)
                b_pairs = tl.dot(b_dAqk, b_kc)
                b_dq += b_row * b_pairs
                # the same rounded factors at both ends of a pair, so that it cancels out of dG
                b_dG += b_qr * b_pairs
                b_pairs = tl.dot(tl.trans(b_dAqk), b_qr)
                b_dk += b_column * b_pairs
                b_dG -= b_kc * b_pairs
            # b_q holds scale q, and b_dq the gradient of q over scale
            b_dq += b_diagonal * b_k
            b_dk += b_diagonal * b_q
            b_dq *= scale
            tl.store(dq + p_out, b_dq.to(tl.bfloat16), mask=m_tk)
            tl.store(dk + p_out, b_dk.to(tl.bfloat16), mask=m_tk)
            b_dg = sum_of_later(b_dG, BT) + b_dG_C[None, :]
            tl.store(dg + p_out, b_dg.to(tl.float32), mask=m_tk)


def launch(
    q, k, g, G, gamma_C, h, v, dh, do, dq, dk, dg, *, scale, lower_bound, n_chunks, T, H, HV, HG
):
    """Launch both kernels on the current stream."""
    grad_key_kernel[(-(-n_chunks // CHUNKS) * HV * (K // BK),)](
        q, k, g, G, gamma_C, h, v, dh, do, dq, dk, dg, scale, lower_bound, T, H, HV, HG,
        NT=n_chunks, K=K, V=V, BT=BT, BK=BK, CHUNKS=CHUNKS, STAGES=STAGES,
        num_warps=4, num_stages=2,
    )
    strong_decay_kernel[(-(-n_chunks // LOOKED_AT) * HV * (K // BK),)](
        q, k, g, G, gamma_C, h, v, dh, do, dq, dk, dg, scale, lower_bound, T, H, HV, HG,
        NT=n_chunks, K=K, V=V, BT=BT, BK=BK, LOOKED_AT=LOOKED_AT,
        num_warps=4, num_stages=2,
    )
