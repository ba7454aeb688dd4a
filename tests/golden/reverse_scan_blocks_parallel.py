"""Carry the gradient of the state back through all segments of a sequence side by side, exactly.

The mirror of the parallel scan: a segment takes the gradient to dS_start = dS_end M^T + W, where
W follows from a zero gradient at its end, and M^T from the identity without dO. Three kernels,

    fold_kernel          where the last segment starts; W and M of the others but the first; one
                         program per slice of their rows
    merge_kernel         the gradient at every segment's end, one after the other
    reverse_scan_blocks1_kernel  dh, dX, dv and dw, all segments at once

with the gradient of the state held transposed, dS^T [BV, K].

    dR^T = dO^T Aqk + dS^T Ktail^T        dX^T = dR^T A
    dS^T <- dS^T Diag(gamma_C) + dO^T Qg + dR^T Y          Y = -A E

    v        [B, T, HV, V]      bf16  values
    w        [B, T, HV, V]      bf16  write gate
    Qg       [NT, HV, BT, K]    bf16  queries, scaled and decayed from the chunk's start
    Y        [NT, HV, BT, K]    bf16  erasing keys through the inverse, -A E
    Ktail    [NT, HV, BT, K]    bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]        fp32  decay of the whole chunk
    A        [NT, HV, BT, BT]   bf16  inverse of I + T, lower triangle
    Aqk      [NT, HV, BT, BT]   bf16  decayed scores, lower triangle
    do       [B, T, HV, V]      bf16  gradient of o
    dht      [N, HV, K, V]      fp32  gradient of final_state
    dh       [NT, HV, V, K]     bf16  gradient of the state at the block's end, transposed
    dX       [NT, HV, BT, V]    bf16  gradient of X = w v - E S, where R = A X
    dv       [B, T, HV, V]      bf16  gradient of v
    dw       [B, T, HV, V]      bf16  gradient of w
    z_dot    [NT, HV, BT, NZ]   fp32  <dX, w v>, by 16 values
    dS_seg   [N, HV, NS, V, K]  fp32  scratch: gradient of the state at the segment's end
    M_seg    [N, HV, NS, K, K]  fp32  scratch: transition of all segments but first and last
    dh0      [N, HV, K, V]      fp32  gradient of initial_state

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BT=32 BV=64 language=triton num_stages=2 num_warps=4 segments=parallel
Template digest 9516c3cdd10bc795; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with=initial_state,final_state --stage reverse_scan_blocks1 --config \
      BT=32,BV=64,language=triton,num_stages=2,num_warps=4,segments=parallel
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BV = 32, 64
BM = 16  # rows of a program of merge_kernel, which waits for one product after the other


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment"])
def fold_kernel(
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
    dh,
    dX,
    dv,
    dw,
    z_dot,
    dS_seg,
    M_seg,
    dh0,
    T,
    HV,
    NS,
    segment,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    n_folded = (V + K) // BV * (NS - 1) - K // BV
    i_nh, i_x = tl.program_id(0) // n_folded, tl.program_id(0) % n_folded
    # past the last segment's rows of values, which starts from what is given
    i_x += tl.where(i_x < V // BV, 0, K // BV)
    i_s, i_v = NS - 1 - i_x // ((V + K) // BV), i_x % ((V + K) // BV)
    i_n, i_h = i_nh // HV, i_nh % HV
    n_chunks = tl.cdiv(T, BT)
    i_first = i_n * n_chunks
    i_start = i_n.to(tl.int64) * T
    n_tokens = T

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    # the segment's own chunks and tokens
    n_chunks = tl.minimum(n_chunks - i_s * segment, segment)
    i_first += i_s * segment
    i_start += i_s * segment * BT
    n_tokens -= i_s * segment * BT
    # rows past V start at the identity, and have no dO
    b_dS = tl.where((o_v - V)[:, None] == o_k[None, :], 1.0, 0.0)
    if i_s == NS - 1:
        p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
        b_dS = tl.load(dht + p_state)

    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    p_k = o_t[:, None] * K + o_k[None, :]
    i_tile = (i_first + n_chunks - 1).to(tl.int64) * HV + i_h
    n_next = tl.minimum(n_chunks, 1)
    b_gamma_next = tl.load(gamma_C + i_tile * K + o_k, mask=o_k < K * n_next, other=0.0)
    if i_v * BV < V:
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

    else:
        for i_back in range(n_chunks):
            i_t = n_chunks - 1 - i_back
            i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
            b_gamma = b_gamma_next
            i_next = i_tile - HV
            n_next = tl.minimum(i_t, 1)
            b_gamma_next = tl.load(gamma_C + i_next * K + o_k, mask=o_k < K * n_next, other=0.0)
            # stores come after the products that they would delay
            b_dSd = b_dS.to(tl.bfloat16)
            b_Ktail = tl.trans(tl.load(Ktail + i_tile * BT * K + p_k))
            b_dR = tl.dot(b_dSd, b_Ktail)
            b_dS *= b_gamma[None, :]
            b_dRd = b_dR.to(tl.bfloat16)
            b_dS = tl.dot(b_dRd, tl.load(Y + i_tile * BT * K + p_k), b_dS)

    if i_v * BV < V:
        p_kept = (i_nh.to(tl.int64) * NS + i_s - 1) * K * V + o_v[:, None] * K + o_k[None, :]
        tl.store(dS_seg + p_kept, b_dS)
    else:
        p_M = (i_nh.to(tl.int64) * NS + i_s - 1) * K * K
        tl.store(M_seg + p_M + (o_v - V)[:, None] * K + o_k[None, :], b_dS)


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment"])
def merge_kernel(
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
    dh,
    dX,
    dv,
    dw,
    z_dot,
    dS_seg,
    M_seg,
    dh0,
    T,
    HV,
    NS,
    segment,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BM)
    i_nh = tl.program_id(0) // (V // BM)
    o_k = tl.arange(0, K)
    o_v = i_v * BM + tl.arange(0, BM)
    p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
    b_S = tl.load(dht + p_state)
    p_kept = i_nh.to(tl.int64) * NS * K * V + o_v[:, None] * K + o_k[None, :]
    p_M = i_nh.to(tl.int64) * NS * K * K + o_k[:, None] * K + o_k[None, :]
    tl.store(dS_seg + p_kept + (NS - 1) * K * V, b_S)
    if NS > 1:
        b_S = tl.load(dS_seg + p_kept + (NS - 2) * K * V)
    for i_m in tl.range(1, NS - 1, num_stages=2):
        b_M = tl.load(M_seg + p_M + (NS - 2 - i_m) * K * K)
        p_next = dS_seg + p_kept + (NS - 2 - i_m) * K * V
        b_S = tl.dot(b_S, b_M, tl.load(p_next), input_precision="bf16x3")
        tl.store(p_next, b_S)


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment"])
def reverse_scan_blocks1_kernel(
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
    dh,
    dX,
    dv,
    dw,
    z_dot,
    dS_seg,
    M_seg,
    dh0,
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
    n_chunks = tl.cdiv(T, BT)
    i_first = i_n * n_chunks
    i_start = i_n.to(tl.int64) * T
    n_tokens = T

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    b_dS = tl.load(dS_seg + i_seg.to(tl.int64) * K * V + o_v[:, None] * K + o_k[None, :])
    # the segment's own chunks and tokens
    n_chunks = tl.minimum(n_chunks - i_s * segment, segment)
    i_first += i_s * segment
    i_start += i_s * segment * BT
    n_tokens -= i_s * segment * BT

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
        tl.store(dh + i_tile * K * V + o_v[:, None] * K + o_k[None, :], b_dSd)
        i_row -= BT
        p_v = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
        m_v = ((i_row >= 0) & (i_row < n_tokens))[None, :]
        b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
        b_w_next = tl.load(w + p_v, mask=m_v, other=0.0)

    if i_s == 0:
        p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
        tl.store(dh0 + p_state, b_dS)


def launch(
    v, w, Qg, Y, Ktail, gamma_C, A, Aqk, do, dht, dh, dX, dv, dw, z_dot, dS_seg, M_seg, dh0, *,
    n_sequences, T, HV, NS, segment
):
    """Launch the three kernels on the current stream."""
    arguments = (
        v, w, Qg, Y, Ktail, gamma_C, A, Aqk, do, dht, dh, dX, dv, dw, z_dot, dS_seg, M_seg, dh0,
        T, HV, NS, segment,
    )
    options = {
        "K": K, "V": V, "BT": BT,
        "num_warps": 4, "num_stages": 2,
    }
    heads = n_sequences * HV
    if NS > 1:
        fold_kernel[(heads * ((V + K) // BV * (NS - 1) - K // BV),)](*arguments, BV=BV, **options)
    # one short product after the other: what more warps save in it is most of the time
    merge_kernel[(heads * (V // BM),)](*arguments, BM=BM, **options | {"num_warps": 8})
    reverse_scan_blocks1_kernel[(heads * NS * (V // BV),)](*arguments, BV=BV, **options)
