"""Carry the gradient of the state through the chunks of a sequence, last to first; dv.

One program per sequence, value head and slice of V; the mirror of the scan, with the gradient of
the state held transposed, dS^T [BV, K]. What the last of every 2 chunks ends with is written out.

    dR^T = dO^T Aqk + (dS^T k^T) k_tail        dX^T = dR^T A
    dS^T <- dS^T gamma_C + (dO^T q_head) q - (dX^T k_head) k

where q_head, k_head and k_tail, one number a token, make Qg, E and Ktail of q and k.
    dv = dX

    q              [B, T, H, K]      bf16   queries; normalised in the kernel
    k              [B, T, H, K]      bf16   keys; normalised in the kernel
    q_head         [NT, HV, BT]      fp32   scale / norm of q, decayed from the chunk's start
    k_head         [NT, HV, BT]      fp32   1 / norm of k, decayed from the chunk's start
    k_tail         [NT, HV, BT]      fp32   beta / norm of k, decayed to the chunk's end
    gamma_C        [NT, HV]          fp32   decay of the whole chunk
    A              [NT, HV, BT, BT]  bf16   inverse of I + T, lower triangle
    Aqk            [NT, HV, BT, BT]  bf16   decayed scores, lower triangle
    do             [B, T, HV, V]     bf16   gradient of o
    cu_seqlens     [N+1]             int32  first token of each sequence
    chunk_offsets  [N+1]             int32  first chunk of each sequence
    dh             [NT2, HV, V, K]   bf16   gradient of the state at the block's end, transposed
    dv             [B, T, HV, V]     bf16   gradient of v

Problem: gated_delta_rule K=128 V=128 bf16, g fp32, l2norm, softplus gate, packed sequences
Config:  BT=32 BV=64 language=triton num_stages=2 num_warps=4 segments=serial
Template digest d1d6ce5569b96e03; made by
    gdn2gen generate --op gated_delta_rule --head-dim 128,128 --dtype bf16 --gate-dtype fp32 \
      --gate softplus --with=A_log,dt_bias,varlen --stage reverse_scan_blocks2 --config \
      BT=32,BV=64,language=triton,num_stages=2,num_warps=4,segments=serial
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BV = 32, 64


@triton.jit(do_not_specialize=["T", "HV", "H"])
def reverse_scan_blocks2_kernel(
    q,
    k,
    q_head,
    k_head,
    k_tail,
    gamma_C,
    A,
    Aqk,
    do,
    cu_seqlens,
    chunk_offsets,
    dh,
    dv,
    T,
    HV,
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

    # past the blocks of all sequences before, each of which may begin within one of their chunks
    i_block = i_first // 2 + i_n

    n_all = n_chunks
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    b_dS = tl.zeros([BV, K], tl.float32)

    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    i_tile = (i_first + n_chunks - 1).to(tl.int64) * HV + i_h
    i_next = i_tile
    m_next = o_t < BT * tl.minimum(n_chunks, 1)
    b_q_head_next = tl.load(q_head + i_next * BT + o_t, mask=m_next, other=0.0)
    b_k_head_next = tl.load(k_head + i_next * BT + o_t, mask=m_next, other=0.0)
    b_k_tail_next = tl.load(k_tail + i_next * BT + o_t, mask=m_next, other=0.0)
    # one number, of a row of itself: 0 where there is no chunk
    b_gamma_next = tl.max(tl.load(gamma_C + i_next + 0 * o_t, mask=m_next, other=0.0), 0)

    for i_back in range(n_chunks):
        i_t = n_chunks - 1 - i_back
        i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
        b_q_head = b_q_head_next
        b_k_head = b_k_head_next
        b_k_tail = b_k_tail_next
        b_gamma = b_gamma_next
        i_next = i_tile - HV * tl.minimum(i_t, 1)
        b_q_head_next = tl.load(q_head + i_next * BT + o_t)
        b_k_head_next = tl.load(k_head + i_next * BT + o_t)
        b_k_tail_next = tl.load(k_tail + i_next * BT + o_t)
        b_gamma_next = tl.load(gamma_C + i_next)

        i_row = i_t * BT + o_t
        p_k = ((i_start + i_row) * H + i_hq)[:, None] * K + o_k[None, :]
        b_k = tl.load(k + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)
        b_q = tl.load(q + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)

        p_o = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
        p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
        # stores come after the products that they would delay
        b_dSd = b_dS.to(tl.bfloat16)
        b_dR = tl.dot(b_dSd, tl.trans(b_k))
        b_dR *= b_k_tail[None, :]
        b_do = tl.load(do + p_o, mask=(i_row < n_tokens)[None, :], other=0.0)
        b_dR = tl.dot(b_do, tl.load(Aqk + p_score), b_dR)
        b_dX = tl.dot(b_dR.to(tl.bfloat16), tl.load(A + p_score))
        b_dS *= b_gamma
        b_outer = (b_do.to(tl.float32) * b_q_head[None, :]).to(tl.bfloat16)
        b_dS = tl.dot(b_outer, b_q, b_dS)

        b_outer = (b_dX * -b_k_head[None, :]).to(tl.bfloat16)
        b_dS = tl.dot(b_outer, b_k, b_dS)

        m_o = (i_row < n_tokens)[None, :]
        b_dXd = b_dX.to(tl.bfloat16)
        tl.store(dv + p_o, b_dXd, mask=m_o)
        i_x = i_t
        if (i_x % 2 == 1) | (i_x == n_all - 1):
            p_kept = dh + ((i_block + i_x // 2).to(tl.int64) * HV + i_h) * K * V
            tl.store(p_kept + o_v[:, None] * K + o_k[None, :], b_dSd)


def launch(
    q, k, q_head, k_head, k_tail, gamma_C, A, Aqk, do, cu_seqlens, chunk_offsets, dh, dv, *,
    n_sequences, T, HV, NS, segment, H
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    reverse_scan_blocks2_kernel[(n_sequences * HV * (V // BV),)](
        q, k, q_head, k_head, k_tail, gamma_C, A, Aqk, do, cu_seqlens, chunk_offsets, dh, dv, T,
        HV, H,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=2,
    )
