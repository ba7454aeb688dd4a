"""Scan the chunks of a segment in order, keeping what the backward needs.

One program per segment, value head and slice of V; the state is held transposed, S^T [BV, K], so
that it is the left operand of every product and never leaves the registers. What the first of every 2
chunks starts from is written out, and what each of them adds. The forward left the state at
every segment's start, so that segments run side by side.

    X^T = v^T - (S^T k^T) k_head          R^T = X^T A^T
    S^T <- S^T + (R^T k_tail) k

where q_head, k_head and k_tail, one number a token, make Qg, E and Ktail of q and k.

    v       [B, T, HV, V]      bf16  values
    k       [B, T, H, K]       bf16  keys; normalised in the kernel
    k_head  [NT, HV, BT]       fp32  1 / norm of k
    k_tail  [NT, HV, BT]       fp32  beta / norm of k
    A       [NT, HV, BT, BT]   bf16  inverse of I + T, lower triangle
    S_seg   [N, HV, NS, V, K]  fp32  state at the segment's start, transposed
    h       [NT2, HV, V, K]    bf16  state at the block's start, transposed
    R       [NT, HV, BT, V]    bf16  u: a token adds (beta k) u^T to the state

Problem: delta_rule K=128 V=128 bf16, l2norm
Config:  BT=32 BV=64 language=triton num_stages=2 num_warps=4
Template digest bcac0ec294b52425; made by
    gdn2gen generate --op delta_rule --head-dim 128,128 --dtype bf16 \
      --with=initial_state,final_state --stage rescan_blocks2 --config \
      BT=32,BV=64,language=triton,num_stages=2,num_warps=4
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BV = 32, 64


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment", "H"])
def rescan_blocks2_kernel(
    v,
    k,
    k_head,
    k_tail,
    A,
    S_seg,
    h,
    R,
    T,
    HV,
    NS,
    segment,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BV)
    i_seg = tl.program_id(0) // (V // BV)
    i_nh, i_s = i_seg // NS, i_seg % NS
    i_n, i_h = i_nh // HV, i_nh % HV
    i_hq = i_h // (HV // H)
    n_chunks = tl.cdiv(T, BT)
    i_first = i_n * n_chunks
    i_start = i_n.to(tl.int64) * T
    n_tokens = T

    i_block = i_n * tl.cdiv(n_chunks, 2)

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    b_S = tl.load(S_seg + i_seg.to(tl.int64) * K * V + o_v[:, None] * K + o_k[None, :])
    n_before = i_s * segment
    # the segment's own chunks and tokens
    n_chunks = tl.minimum(n_chunks - i_s * segment, segment)
    i_first += i_s * segment
    i_start += i_s * segment * BT
    n_tokens -= i_s * segment * BT

    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    i_tile = i_first.to(tl.int64) * HV + i_h
    p_v = ((i_start + o_t) * HV + i_h)[None, :] * V + o_v[:, None]
    m_v = (o_t < n_tokens)[None, :]
    b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
    i_next = i_tile
    m_next = o_t < BT * tl.minimum(n_chunks, 1)
    b_k_head_next = tl.load(k_head + i_next * BT + o_t, mask=m_next, other=0.0)
    b_k_tail_next = tl.load(k_tail + i_next * BT + o_t, mask=m_next, other=0.0)

    for i_t in range(n_chunks):
        i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
        p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
        b_v = b_v_next
        b_k_head = b_k_head_next
        b_k_tail = b_k_tail_next
        i_row = i_t * BT + o_t
        p_v = ((i_start + i_row + BT) * HV + i_h)[None, :] * V + o_v[:, None]
        m_v = (i_row + BT < n_tokens)[None, :]
        b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
        i_next = i_tile + HV * tl.minimum(n_chunks - 1 - i_t, 1)
        b_k_head_next = tl.load(k_head + i_next * BT + o_t)
        b_k_tail_next = tl.load(k_tail + i_next * BT + o_t)

        p_k = ((i_start + i_row) * H + i_hq)[:, None] * K + o_k[None, :]
        b_k = tl.load(k + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)

        # stores come after the products that they would delay
        b_Sd = b_S.to(tl.bfloat16)
        b_ES = tl.dot(b_Sd, tl.trans(b_k))
        b_ES *= b_k_head[None, :]
        b_X = (b_v.to(tl.float32) - b_ES).to(tl.bfloat16)
        b_R = tl.dot(b_X, tl.trans(tl.load(A + p_score)))
        b_outer = (b_R * b_k_tail[None, :]).to(tl.bfloat16)
        b_S = tl.dot(b_outer, b_k, b_S)

        i_x = n_before + i_t
        tl.store(R + i_tile * BT * V + o_t[None, :] * V + o_v[:, None], b_R.to(tl.bfloat16))
        if i_x % 2 == 0:
            p_kept = h + ((i_block + i_x // 2).to(tl.int64) * HV + i_h) * K * V
            tl.store(p_kept + o_v[:, None] * K + o_k[None, :], b_Sd)


def launch(
    v, k, k_head, k_tail, A, S_seg, h, R, *, n_sequences, T, HV, NS, segment, H
):
    """Launch one program per segment, value head and slice of V on the current stream."""
    rescan_blocks2_kernel[(n_sequences * HV * NS * (V // BV),)](
        v, k, k_head, k_tail, A, S_seg, h, R, T, HV, NS, segment, H,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=2,
    )
