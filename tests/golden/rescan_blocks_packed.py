"""Scan the chunks of a segment in order, keeping what the backward needs.

One program per segment, value head and slice of V; the state is held transposed, S^T [BV, K], so
that it is the left operand of every product and never leaves the registers. What the first of every 2
chunks starts from is written out, and what each of them adds. The forward left the state at
every segment's start, so that segments run side by side.

    R^T = (w v)^T A^T + S^T Y^T          Y = -A E
    S^T <- S^T Diag(gamma_C) + R^T Ktail

    v              [B, T, HV, V]      bf16   values
    w              [B, T, HV, V]      bf16   write gate
    Y              [NT, HV, BT, K]    bf16   erasing keys through the inverse, -A E
    Ktail          [NT, HV, BT, K]    bf16   keys, decayed to the chunk's end
    gamma_C        [NT, HV, K]        fp32   decay of the whole chunk
    A              [NT, HV, BT, BT]   bf16   inverse of I + T, lower triangle
    S_seg          [N, HV, NS, V, K]  fp32   state at the segment's start, transposed
    cu_seqlens     [N+1]              int32  first token of each sequence
    chunk_offsets  [N+1]              int32  first chunk of each sequence
    h              [NT2, HV, V, K]    bf16   state at the block's start, transposed
    R              [NT, HV, BT, V]    bf16   what each token adds to the state

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm, packed sequences
Config:  BT=32 BV=64 language=triton num_stages=2 num_warps=4
Template digest bcac0ec294b52425; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with=varlen,initial_state,final_state --stage rescan_blocks2 --config \
      BT=32,BV=64,language=triton,num_stages=2,num_warps=4
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BV = 32, 64


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment"])
def rescan_blocks2_kernel(
    v,
    w,
    Y,
    Ktail,
    gamma_C,
    A,
    S_seg,
    cu_seqlens,
    chunk_offsets,
    h,
    R,
    T,
    HV,
    NS,
    segment,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BV)
    i_seg = tl.program_id(0) // (V // BV)
    i_nh, i_s = i_seg // NS, i_seg % NS
    i_n, i_h = i_nh // HV, i_nh % HV
    i_first = tl.load(chunk_offsets + i_n)
    n_chunks = tl.load(chunk_offsets + i_n + 1) - i_first
    i_start = tl.load(cu_seqlens + i_n).to(tl.int64)
    n_tokens = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - i_start.to(tl.int32)

    # past the blocks of all sequences before, each of which may begin within one of their chunks
    i_block = i_first // 2 + i_n

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
    b_w_next = tl.load(w + p_v, mask=m_v, other=0.0)
    b_gamma_next = tl.load(gamma_C + i_tile * K + o_k, mask=o_k < K * n_chunks, other=0.0)

    for i_t in range(n_chunks):
        i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
        p_k = o_t[:, None] * K + o_k[None, :]
        p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
        b_v, b_w, b_gamma = b_v_next, b_w_next, b_gamma_next
        i_row = i_t * BT + o_t
        p_v = ((i_start + i_row + BT) * HV + i_h)[None, :] * V + o_v[:, None]
        m_v = (i_row + BT < n_tokens)[None, :]
        b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
        b_w_next = tl.load(w + p_v, mask=m_v, other=0.0)
        m_gamma = o_k < K * (n_chunks - 1 - i_t)
        b_gamma_next = tl.load(gamma_C + (i_tile + HV) * K + o_k, mask=m_gamma, other=0.0)
        # stores come after the products that they would delay
        b_Sd = b_S.to(tl.bfloat16)
        b_Z = (b_v.to(tl.float32) * b_w.to(tl.float32)).to(tl.bfloat16)
        b_R = tl.dot(b_Z, tl.trans(tl.load(A + p_score)))
        b_R = tl.dot(b_Sd, tl.trans(tl.load(Y + i_tile * BT * K + p_k)), b_R)
        b_S *= b_gamma[None, :]
        b_Rd = b_R.to(tl.bfloat16)
        b_S = tl.dot(b_Rd, tl.load(Ktail + i_tile * BT * K + p_k), b_S)

        i_x = n_before + i_t
        tl.store(R + i_tile * BT * V + o_t[None, :] * V + o_v[:, None], b_Rd)
        if i_x % 2 == 0:
            p_kept = h + ((i_block + i_x // 2).to(tl.int64) * HV + i_h) * K * V
            tl.store(p_kept + o_v[:, None] * K + o_k[None, :], b_Sd)


def launch(
    v, w, Y, Ktail, gamma_C, A, S_seg, cu_seqlens, chunk_offsets, h, R, *, n_sequences, T, HV,
    NS, segment
):
    """Launch one program per segment, value head and slice of V on the current stream."""
    rescan_blocks2_kernel[(n_sequences * HV * NS * (V // BV),)](
        v, w, Y, Ktail, gamma_C, A, S_seg, cu_seqlens, chunk_offsets, h, R, T, HV, NS, segment,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=2,
    )
