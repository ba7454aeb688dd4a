"""Carry the gradient of the state back through all segments of a sequence side by side, exactly.

A segment takes the gradient to dS_start = dS_end M^T + W, where M is the forward's, which kept it, and
W follows from a zero gradient at the segment's end. Three kernels,

    fold_kernel          W of all segments but the first; one program per slice of its rows
    merge_kernel         the gradient at every segment's end, one after the other
    reverse_scan_blocks2_transitions_kernel  dh, dX and dv, all segments at once

with the gradient of the state held transposed, dS^T [BV, K].

    dR^T = dO^T Aqk + dS^T Ktail^T        dX^T = dR^T A
    dS^T <- dS^T Diag(gamma_C) + dO^T Qg + dR^T Y          Y = -A E

    v        [B, T, HV, V]      bf16  values
    Qg       [NT, HV, BT, K]    bf16  queries, scaled and decayed from the chunk's start
    Y        [NT, HV, BT, K]    bf16  erasing keys through the inverse, -A E
    Ktail    [NT, HV, BT, K]    bf16  beta times the keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]        fp32  decay of the whole chunk
    A        [NT, HV, BT, BT]   bf16  inverse of I + T, lower triangle
    Aqk      [NT, HV, BT, BT]   bf16  decayed scores, lower triangle
    do       [B, T, HV, V]      bf16  gradient of o
    dht      [N, HV, K, V]      fp32  gradient of final_state
    M_seg    [N, HV, NS, K, K]  fp32  transitions of segments, transposed
    dh       [NT2, HV, V, K]    bf16  gradient of the state at the block's end, transposed
    dX       [NT, HV, BT, V]    bf16  gradient of X = v - E S, where R = A X
    dv       [B, T, HV, V]      bf16  gradient of v
    z_dot    [NT, HV, BT, NZ]   fp32  <dX, v>, by 16 values
    dS_seg   [N, HV, NS, V, K]  fp32  scratch: gradient of the state at the segment's end
    dh0      [N, HV, K, V]      fp32  gradient of initial_state

Problem: kda K=64 V=64 bf16, g fp32, l2norm
Config:  BT=32 BV=64 language=triton num_stages=2 num_warps=4 segments=parallel
Template digest ed01a75a395ecc45; made by
    gdn2gen generate --op kda --head-dim 64,64 --dtype bf16 --gate-dtype fp32 --gate none \
      --with=initial_state,final_state --stage reverse_scan_blocks2_transitions --config \
      BT=32,BV=64,language=triton,num_stages=2,num_warps=4,segments=parallel
"""

import triton
import triton.language as tl


K, V = 64, 64
BT, BV = 32, 64
BM = 16  # rows of a program of merge_kernel, which waits for one product after the other


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment"])
def fold_kernel(
    v,
    Qg,
    Y,
    Ktail,
    gamma_C,
    A,
    Aqk,
    do,
    dht,
    M_seg,
    dh,
    dX,
    dv,
    z_dot,
    dS_seg,
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
    n_folded = V // BV * (NS - 1)
    i_nh, i_x = tl.program_id(0) // n_folded, tl.program_id(0) % n_folded
    i_s, i_v = NS - 1 - i_x // (V // BV), i_x % (V // BV)
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
    b_dS = tl.zeros([BV, K], tl.float32)
    if i_s == NS - 1:
        p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
        b_dS = tl.load(dht + p_state)

    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    p_k = o_t[:, None] * K + o_k[None, :]
    i_tile = (i_first + n_chunks - 1).to(tl.int64) * HV + i_h
    n_next = tl.minimum(n_chunks, 1)
    b_gamma_next = tl.load(gamma_C + i_tile * K + o_k, mask=o_k < K * n_next, other=0.0)
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

    p_kept = (i_nh.to(tl.int64) * NS + i_s - 1) * K * V + o_v[:, None] * K + o_k[None, :]
    tl.store(dS_seg + p_kept, b_dS)


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment"])
def merge_kernel(
    v,
    Qg,
    Y,
    Ktail,
    gamma_C,
    A,
    Aqk,
    do,
    dht,
    M_seg,
    dh,
    dX,
    dv,
    z_dot,
    dS_seg,
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
    p_kept = dS_seg + i_nh.to(tl.int64) * NS * K * V + o_v[:, None] * K + o_k[None, :]
    p_M = M_seg + i_nh.to(tl.int64) * NS * K * K + o_k[None, :] * K + o_k[:, None]
    tl.store(p_kept + (NS - 1) * K * V, b_S)
    if NS > 1:
        b_S = tl.load(p_kept + (NS - 2) * K * V)
    for i_m in tl.range(1, NS - 1, num_stages=2):
        b_M = tl.load(p_M + (NS - 1 - i_m) * K * K)
        p_next = p_kept + (NS - 2 - i_m) * K * V
        # In halves, without F2F, which is slow: those of M are cut, those of S, which are few, rounded
        # by hand. The product of the low ones is left out, and of two cut ones it would have the sign
        # of the whole. Sums are apart, so that no product waits for the one before.
        M_high = (b_M.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        M_low = (b_M - M_high).to(tl.bfloat16)
        S_high = b_S.to(tl.int32, bitcast=True) + 32768 & -65536
        S_high = S_high.to(tl.float32, bitcast=True)
        S_low = (b_S - S_high).to(tl.bfloat16)
        M_high, S_high = M_high.to(tl.bfloat16), S_high.to(tl.bfloat16)
        b_S = tl.dot(S_low, M_high) + tl.dot(S_high, M_low)
        b_S += tl.dot(S_high, M_high, tl.load(p_next))
        tl.store(p_next, b_S)


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment"])
def reverse_scan_blocks2_transitions_kernel(
    v,
    Qg,
    Y,
    Ktail,
    gamma_C,
    A,
    Aqk,
    do,
    dht,
    M_seg,
    dh,
    dX,
    dv,
    z_dot,
    dS_seg,
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

    i_block = i_n * tl.cdiv(n_chunks, 2)

    n_all = n_chunks
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    b_dS = tl.load(dS_seg + i_seg.to(tl.int64) * K * V + o_v[:, None] * K + o_k[None, :])
    n_before = i_s * segment
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
        m_o = (i_row < n_tokens)[None, :]
        b_dX = tl.dot(b_dRd, tl.load(A + p_score))
        b_dXd = b_dX.to(tl.bfloat16)
        tl.store(dX + i_tile * BT * V + o_t[None, :] * V + o_v[:, None], b_dXd)
        tl.store(dv + p_o, b_dXd, mask=m_o)
        # by 16 rows, which a warp has all of
        b_z = tl.sum(tl.reshape(b_dX * b_v, [BV // 16, 16, BT]), 1)
        o_z = i_v * (BV // 16) + tl.arange(0, BV // 16)
        p_z = (i_tile * BT + o_t)[None, :] * 4 + o_z[:, None]
        tl.store(z_dot + p_z, b_z)
        i_x = n_before + i_t
        if (i_x % 2 == 1) | (i_x == n_all - 1):
            p_kept = dh + ((i_block + i_x // 2).to(tl.int64) * HV + i_h) * K * V
            tl.store(p_kept + o_v[:, None] * K + o_k[None, :], b_dSd)
        i_row -= BT
        p_v = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
        m_v = ((i_row >= 0) & (i_row < n_tokens))[None, :]
        b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)

    if i_s == 0:
        p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
        tl.store(dh0 + p_state, b_dS)


def launch(
    v, Qg, Y, Ktail, gamma_C, A, Aqk, do, dht, M_seg, dh, dX, dv, z_dot, dS_seg, dh0, *,
    n_sequences, T, HV, NS, segment
):
    """Launch the three kernels on the current stream."""
    arguments = (
        v, Qg, Y, Ktail, gamma_C, A, Aqk, do, dht, M_seg, dh, dX, dv, z_dot, dS_seg, dh0, T, HV,
        NS, segment,
    )
    options = {
        "K": K, "V": V, "BT": BT,
        "num_warps": 4, "num_stages": 2,
    }
    heads = n_sequences * HV
    if NS > 1:
        fold_kernel[(heads * (NS - 1) * (V // BV),)](*arguments, BV=BV, **options)
    # one short product after the other: what more warps save in it is most of the time
    merge_kernel[(heads * (V // BM),)](*arguments, BM=BM, **options | {"num_warps": 8})
    reverse_scan_blocks2_transitions_kernel[(heads * NS * (V // BV),)](*arguments, BV=BV, **options)
