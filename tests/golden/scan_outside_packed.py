"""Scan the chunks of a sequence in order.

One program per sequence, value head and slice of V; the state is held transposed, S^T [BV, K], so
that it is the left operand of every product and never leaves the registers. At the start of every
segment of chunks it is written out, for the backward to start from.

    X^T = v^T - (S^T k^T) k_head          R^T = X^T A^T
    O^T = (S^T q^T) q_head + R^T Aqk^T
    S^T <- S^T gamma_C + (R^T k_tail) k

where q_head, k_head and k_tail, one number a token, make Qg, E and Ktail of q and k.

    v              [B, T, HV, V]      bf16   values
    q              [B, T, H, K]       bf16   queries; normalised in the kernel
    k              [B, T, H, K]       bf16   keys; normalised in the kernel
    q_head         [NT, HV, BT]       fp32   scale / norm of q, decayed from the chunk's start
    k_head         [NT, HV, BT]       fp32   1 / norm of k, decayed from the chunk's start
    k_tail         [NT, HV, BT]       fp32   beta / norm of k, decayed to the chunk's end
    gamma_C        [NT, HV]           fp32   decay of the whole chunk
    A              [NT, HV, BT, BT]   bf16   inverse of I + T, lower triangle
    Aqk            [NT, HV, BT, BT]   bf16   decayed scores, lower triangle
    cu_seqlens     [N+1]              int32  first token of each sequence
    chunk_offsets  [N+1]              int32  first chunk of each sequence
    o              [B, T, HV, V]      bf16   output
    S_seg          [N, HV, NS, V, K]  fp32   state at the segment's start, transposed

Problem: gated_delta_rule K=128 V=128 bf16, g fp32, l2norm, softplus gate, packed sequences
Config:  BT=32 BV=64 language=triton num_stages=2 num_warps=4 segments=serial
Template digest 737b7da71ba60727; made by
    gdn2gen generate --op gated_delta_rule --head-dim 128,128 --dtype bf16 --gate-dtype fp32 \
      --gate softplus --with=A_log,dt_bias,varlen --stage scan --config \
      BT=32,BV=64,language=triton,num_stages=2,num_warps=4,segments=serial
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BV = 32, 64


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment", "H"])
def scan_kernel(
    v,
    q,
    k,
    q_head,
    k_head,
    k_tail,
    gamma_C,
    A,
    Aqk,
    cu_seqlens,
    chunk_offsets,
    o,
    S_seg,
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
    i_nh = tl.program_id(0) // (V // BV)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_hq = i_h // (HV // H)
    i_first = tl.load(chunk_offsets + i_n)
    n_chunks = tl.load(chunk_offsets + i_n + 1) - i_first
    i_start = tl.load(cu_seqlens + i_n).to(tl.int64)
    n_tokens = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - i_start.to(tl.int32)

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    p_kept = i_nh.to(tl.int64) * NS * K * V + o_v[:, None] * K + o_k[None, :]
    b_S = tl.zeros([BV, K], tl.float32)

    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    i_tile = i_first.to(tl.int64) * HV + i_h
    p_v = ((i_start + o_t) * HV + i_h)[None, :] * V + o_v[:, None]
    m_v = (o_t < n_tokens)[None, :]
    b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
    i_next = i_tile
    m_next = o_t < BT * tl.minimum(n_chunks, 1)
    b_q_head_next = tl.load(q_head + i_next * BT + o_t, mask=m_next, other=0.0)
    b_k_head_next = tl.load(k_head + i_next * BT + o_t, mask=m_next, other=0.0)
    b_k_tail_next = tl.load(k_tail + i_next * BT + o_t, mask=m_next, other=0.0)
    # one number, of a row of itself: 0 where there is no chunk
    b_gamma_next = tl.max(tl.load(gamma_C + i_next + 0 * o_t, mask=m_next, other=0.0), 0)
    for i_s in range(NS):
        tl.store(S_seg + p_kept + i_s * K * V, b_S)
        for i_t in range(i_s * segment, tl.minimum(n_chunks, (i_s + 1) * segment)):
            i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
            p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
            b_v = b_v_next
            b_q_head = b_q_head_next
            b_k_head = b_k_head_next
            b_k_tail = b_k_tail_next
            b_gamma = b_gamma_next
            i_row = i_t * BT + o_t
            p_o = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
            p_v = ((i_start + i_row + BT) * HV + i_h)[None, :] * V + o_v[:, None]
            m_v = (i_row + BT < n_tokens)[None, :]
            b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
            i_next = i_tile + HV * tl.minimum(n_chunks - 1 - i_t, 1)
            b_q_head_next = tl.load(q_head + i_next * BT + o_t)
            b_k_head_next = tl.load(k_head + i_next * BT + o_t)
            b_k_tail_next = tl.load(k_tail + i_next * BT + o_t)
            b_gamma_next = tl.load(gamma_C + i_next)

            p_k = ((i_start + i_row) * H + i_hq)[:, None] * K + o_k[None, :]
            b_k = tl.load(k + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)
            b_q = tl.load(q + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)

            # stores come after the products that they would delay
            b_Sd = b_S.to(tl.bfloat16)
            b_ES = tl.dot(b_Sd, tl.trans(b_k))
            b_ES *= b_k_head[None, :]
            b_X = (b_v.to(tl.float32) - b_ES).to(tl.bfloat16)
            b_R = tl.dot(b_X, tl.trans(tl.load(A + p_score)))
            b_o = tl.dot(b_Sd, tl.trans(b_q))
            b_o *= b_q_head[None, :]
            b_S *= b_gamma
            b_outer = (b_R * b_k_tail[None, :]).to(tl.bfloat16)
            b_S = tl.dot(b_outer, b_k, b_S)

            b_Rd = b_R.to(tl.bfloat16)
            b_o = tl.dot(b_Rd, tl.trans(tl.load(Aqk + p_score)), b_o)
            tl.store(o + p_o, b_o.to(tl.bfloat16), mask=(i_row < n_tokens)[None, :])


def launch(
    v, q, k, q_head, k_head, k_tail, gamma_C, A, Aqk, cu_seqlens, chunk_offsets, o, S_seg, *,
    n_sequences, T, HV, NS, segment, H
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    scan_kernel[(n_sequences * HV * (V // BV),)](
        v, q, k, q_head, k_head, k_tail, gamma_C, A, Aqk, cu_seqlens, chunk_offsets, o, S_seg,
        T, HV, NS, segment, H,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=2,
    )
