"""Carry the gradient of the state through the chunks of a sequence, last to first.

One program per sequence, value head and slice of V; the mirror of the scan, with the gradient of
the state held transposed, dS^T [BV, K].

    dR^T = dO^T Aqk + (dS^T k^T) k_tail        dX^T = dR^T A
    dS^T <- dS^T + (dO^T q_head) q - (dX^T k_head) k

where q_head, k_head and k_tail, one number a token, make Qg, E and Ktail of q and k.

    q       [B, T, H, K]      bf16  queries; normalised in the kernel
    k       [B, T, H, K]      bf16  keys; normalised in the kernel
    q_head  [NT, HV, BT]      fp32  scale / norm of q
    k_head  [NT, HV, BT]      fp32  1 / norm of k
    k_tail  [NT, HV, BT]      fp32  beta / norm of k
    A       [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    Aqk     [NT, HV, BT, BT]  bf16  scores, lower triangle
    do      [B, T, HV, V]     bf16  gradient of o
    dh      [NT, HV, V, K]    bf16  gradient of the state at the chunk's end, transposed
    dX      [NT, HV, BT, V]   bf16  gradient of X = v - E S, where R = A X

Problem: delta_rule K=128 V=128 bf16, l2norm
Config:  BT=32 BV=64 language=triton num_stages=2 num_warps=4 segments=serial
Template digest ee16cde0dfaa15e7; made by
    gdn2gen generate --op delta_rule --head-dim 128,128 --dtype bf16 --with= --stage \
      reverse_scan --config \
      BT=32,BV=64,language=triton,num_stages=2,num_warps=4,segments=serial
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BV = 32, 64


@triton.jit(do_not_specialize=["T", "HV", "H"])
def reverse_scan_kernel(
    q,
    k,
    q_head,
    k_head,
    k_tail,
    A,
    Aqk,
    do,
    dh,
    dX,
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
    n_chunks = tl.cdiv(T, BT)
    i_first = i_n * n_chunks
    i_start = i_n.to(tl.int64) * T
    n_tokens = T

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
    for i_back in range(n_chunks):
        i_t = n_chunks - 1 - i_back
        i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
        b_q_head = b_q_head_next
        b_k_head = b_k_head_next
        b_k_tail = b_k_tail_next
        i_next = i_tile - HV * tl.minimum(i_t, 1)
        b_q_head_next = tl.load(q_head + i_next * BT + o_t)
        b_k_head_next = tl.load(k_head + i_next * BT + o_t)
        b_k_tail_next = tl.load(k_tail + i_next * BT + o_t)

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
        tl.store(dh + i_tile * K * V + o_v[:, None] * K + o_k[None, :], b_dSd)
        b_outer = (b_do.to(tl.float32) * b_q_head[None, :]).to(tl.bfloat16)
        b_dS = tl.dot(b_outer, b_q, b_dS)

        b_outer = (b_dX * -b_k_head[None, :]).to(tl.bfloat16)
        b_dS = tl.dot(b_outer, b_k, b_dS)

        p_tile = i_tile * BT * V + o_t[None, :] * V + o_v[:, None]
        tl.store(dX + p_tile, b_dX.to(tl.bfloat16))


def launch(
    q, k, q_head, k_head, k_tail, A, Aqk, do, dh, dX, *, n_sequences, T, HV, NS, segment, H
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    reverse_scan_kernel[(n_sequences * HV * (V // BV),)](
        q, k, q_head, k_head, k_tail, A, Aqk, do, dh, dX, T, HV, H,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=2,
    )
