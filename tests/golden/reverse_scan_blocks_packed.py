"""Carry the gradient of the state through the chunks of a sequence, last to first; dv and dw.

One program per sequence, value head and slice of V; the mirror of the scan, with the gradient of
the state held transposed, dS^T [BV, K]. What the last of every 2 chunks ends with is written out.

    dR^T = dO^T Aqk + dS^T Ktail^T        dX^T = dR^T A
    dS^T <- dS^T Diag(gamma_C) + dO^T Qg + dR^T Y          Y = -A E
    dv = dX w         dw = dX v

    v              [B, T, HV, V]     bf16   values
    w              [B, T, HV, V]     bf16   write gate
    Qg             [NT, HV, BT, K]   bf16   queries, scaled and decayed from the chunk's start
    Y              [NT, HV, BT, K]   bf16   erasing keys through the inverse, -A E
    Ktail          [NT, HV, BT, K]   bf16   keys, decayed to the chunk's end
    gamma_C        [NT, HV, K]       fp32   decay of the whole chunk
    A              [NT, HV, BT, BT]  bf16   inverse of I + T, lower triangle
    Aqk            [NT, HV, BT, BT]  bf16   decayed scores, lower triangle
    do             [B, T, HV, V]     bf16   gradient of o
    dht            [N, HV, K, V]     fp32   gradient of final_state
    cu_seqlens     [N+1]             int32  first token of each sequence
    chunk_offsets  [N+1]             int32  first chunk of each sequence
    dh             [NT2, HV, V, K]   bf16   gradient of the state at the block's end, transposed
    dX             [NT, HV, BT, V]   bf16   gradient of X = w v - E S, where R = A X
    dv             [B, T, HV, V]     bf16   gradient of v
    dw             [B, T, HV, V]     bf16   gradient of w
    z_dot          [NT, HV, BT, NZ]  fp32   <dX, w v>, by 16 values
    dh0            [N, HV, K, V]     fp32   gradient of initial_state

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm, packed sequences
Config:  BT=32 BV=64 language=triton num_stages=2 num_warps=4 segments=serial
Template digest d1d6ce5569b96e03; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with=varlen,initial_state,final_state --stage reverse_scan_blocks2 --config \
      BT=32,BV=64,language=triton,num_stages=2,num_warps=4,segments=serial
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BV = 32, 64


@triton.jit(do_not_specialize=["T", "HV"])
def reverse_scan_blocks2_kernel(
    v,
    w,
    Qg,
    Y,
    Ktail,
    gamma_C,
    A,
    Aqk,
    do,
    dht,
    cu_seqlens,
    chunk_offsets,
    dh,
    dX,
    dv,
    dw,
    z_dot,
    dh0,
    T,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BV)
    i_nh = tl.program_id(0) // (V // BV)
    i_n, i_h = i_nh // HV, i_nh % HV
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
    p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
    b_dS = tl.load(dht + p_state)

    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    p_k = o_t[:, None] * K + o_k[None, :]
    i_tile = (i_first + n_chunks - 1).to(tl.int64) * HV + i_h
    n_next = tl.minimum(n_chunks, 1)
    b_gamma_next = tl.load(gamma_C + i_tile * K + o_k, mask=o_k < K * n_next, other=0.0)
    i_row = (n_chunks - 1) * BT + o_t
    p_v = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
    m_v = ((i_row >= 0) & (i_row < n_tokens))[None, :]
    b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
    b_w_next = tl.load(w + p_v, mask=m_v, other=0.0)

    for i_back in range(n_chunks):
        i_t = n_chunks - 1 - i_back
        i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
        b_gamma = b_gamma_next
        i_next = i_tile - HV
        n_next = tl.minimum(i_t, 1)
        b_gamma_next = tl.load(gamma_C + i_next * K + o_k, mask=o_k < K * n_next, other=0.0)
        i_row = i_t * BT + o_t
        p_o = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
        # stores come after the products that they would delay
        b_dSd = b_dS.to(tl.bfloat16)
        b_Ktail = tl.trans(tl.load(Ktail + i_tile * BT * K + p_k))
        b_do = tl.load(do + p_o, mask=(i_row < n_tokens)[None, :], other=0.0)
        p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
        b_dR = tl.dot(b_do, tl.load(Aqk + p_score))
        b_dR = tl.dot(b_dSd, b_Ktail, b_dR)
        b_dS *= b_gamma[None, :]
        b_dRd = b_dR.to(tl.bfloat16)
        b_dS = tl.dot(b_do, tl.load(Qg + i_tile * BT * K + p_k), b_dS)
        b_dS = tl.dot(b_dRd, tl.load(Y + i_tile * BT * K + p_k), b_dS)

        b_v = b_v_next.to(tl.float32)
        b_w = b_w_next.to(tl.float32)
        m_o = (i_row < n_tokens)[None, :]
        b_dX = tl.dot(b_dRd, tl.load(A + p_score))
        b_dXd = b_dX.to(tl.bfloat16)
        tl.store(dX + i_tile * BT * V + o_t[None, :] * V + o_v[:, None], b_dXd)
        tl.store(dv + p_o, (b_dX * b_w).to(tl.bfloat16), mask=m_o)
        tl.store(dw + p_o, (b_dX * b_v).to(tl.bfloat16), mask=m_o)
        # by 16 rows, which a warp has all of
        b_z = tl.sum(tl.reshape(b_dX * b_v * b_w, [BV // 16, 16, BT]), 1)
        o_z = i_v * (BV // 16) + tl.arange(0, BV // 16)
        p_z = (i_tile * BT + o_t)[None, :] * 8 + o_z[:, None]
        tl.store(z_dot + p_z, b_z)
        i_x = i_t
        if (i_x % 2 == 1) | (i_x == n_all - 1):
            p_kept = dh + ((i_block + i_x // 2).to(tl.int64) * HV + i_h) * K * V
            tl.store(p_kept + o_v[:, None] * K + o_k[None, :], b_dSd)
        i_row -= BT
        p_v = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
        m_v = ((i_row >= 0) & (i_row < n_tokens))[None, :]
        b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
        b_w_next = tl.load(w + p_v, mask=m_v, other=0.0)

    tl.store(dh0 + p_state, b_dS)


def launch(
    v, w, Qg, Y, Ktail, gamma_C, A, Aqk, do, dht, cu_seqlens, chunk_offsets, dh, dX, dv, dw,
    z_dot, dh0, *, n_sequences, T, HV, NS, segment
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    reverse_scan_blocks2_kernel[(n_sequences * HV * (V // BV),)](
        v, w, Qg, Y, Ktail, gamma_C, A, Aqk, do, dht, cu_seqlens, chunk_offsets, dh, dX, dv, dw,
        z_dot, dh0, T, HV,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=2,
    )
