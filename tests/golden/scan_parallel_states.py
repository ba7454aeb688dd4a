"""Scan the segments of a sequence side by side, exactly.

A segment takes the state to S_end = M S_start + U, and both follow from the same scan: U from
a zero state, M from the identity, with nothing written. Three kernels,

    fold_kernel    where the first segment ends; U and M of the others but the last; one program
                   per slice of their rows
    merge_kernel   the state at every segment's start, one after the other
    scan_kernel    o, all segments at once

which is twice the work and a chain as short as one segment: for few heads and long sequences.
The state is held transposed, S^T [BV, K], so that it is the left operand of every product and
never leaves the registers.

    R^T = (w v)^T A^T + S^T Y^T          Y = -A E
    O^T = S^T Qg^T + R^T Aqk^T
    S^T <- S^T Diag(gamma_C) + R^T Ktail

    v              [B, T, HV, V]      fp32  values
    w              [B, T, HV, V]      fp32  write gate
    Qg             [NT, HV, BT, K]    fp32  queries, scaled and decayed from the chunk's start
    Y              [NT, HV, BT, K]    fp32  erasing keys through the inverse, -A E
    Ktail          [NT, HV, BT, K]    fp32  keys, decayed to the chunk's end
    gamma_C        [NT, HV, K]        fp32  decay of the whole chunk
    A              [NT, HV, BT, BT]   fp32  inverse of I + T, lower triangle
    Aqk            [NT, HV, BT, BT]   fp32  decayed scores, lower triangle
    initial_state  [N, HV, K, V]      fp32  state before the first token
    o              [B, T, HV, V]      fp32  output
    S_seg          [N, HV, NS, V, K]  fp32  state at the segment's start, transposed
    M_seg          [N, HV, NS, K, K]  fp32  scratch: transition of all segments but first and last
    final_state    [N, HV, K, V]      fp32  state after the last token

Problem: gdn2 K=64 V=128 fp32, g fp32, l2norm
Config:  BT=16 BV=16 language=triton num_stages=1 num_warps=4 segments=parallel
Template digest a2c59599fa73fb9f; made by
    gdn2gen generate --op gdn2 --head-dim 64,128 --dtype fp32 --gate-dtype fp32 --gate none \
      --with=initial_state,final_state --stage scan --config \
      BT=16,BV=16,language=triton,num_stages=1,num_warps=4,segments=parallel
"""

import triton
import triton.language as tl


K, V = 64, 128
BT, BV = 16, 16
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
    initial_state,
    o,
    S_seg,
    M_seg,
    final_state,
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
    # past the first segment's rows of values, which starts from what is given
    i_x += tl.where(i_x < V // BV, 0, K // BV)
    i_s, i_v = i_x // ((V + K) // BV), i_x % ((V + K) // BV)
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
    # rows past V start at the identity, and have no tokens to read v and w of
    n_tokens = tl.where(i_v * BV < V, n_tokens, 0)
    b_S = tl.where((o_v - V)[:, None] == o_k[None, :], 1.0, 0.0)
    if i_s == 0:
        p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
        b_S = tl.load(initial_state + p_state)
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
        b_Sd = b_S.to(tl.float32)
        b_Z = (b_v.to(tl.float32) * b_w.to(tl.float32)).to(tl.float32)
        b_R = tl.dot(b_Z, tl.trans(tl.load(A + p_score)), input_precision="tf32x3")
        b_R = tl.dot(b_Sd, tl.trans(tl.load(Y + i_tile * BT * K + p_k)), b_R, input_precision="tf32x3")
        b_S *= b_gamma[None, :]
        b_Rd = b_R.to(tl.float32)
        b_S = tl.dot(b_Rd, tl.load(Ktail + i_tile * BT * K + p_k), b_S, input_precision="tf32x3")

    if i_v * BV < V:
        p_kept = (i_nh.to(tl.int64) * NS + i_s + 1) * K * V + o_v[:, None] * K + o_k[None, :]
        tl.store(S_seg + p_kept, b_S)
    else:
        p_M = (i_nh.to(tl.int64) * NS + i_s) * K * K
        tl.store(M_seg + p_M + (o_v - V)[:, None] * K + o_k[None, :], b_S)


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
    initial_state,
    o,
    S_seg,
    M_seg,
    final_state,
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
    b_S = tl.load(initial_state + p_state)
    p_kept = i_nh.to(tl.int64) * NS * K * V + o_v[:, None] * K + o_k[None, :]
    p_M = i_nh.to(tl.int64) * NS * K * K + o_k[:, None] * K + o_k[None, :]
    tl.store(S_seg + p_kept + 0 * K * V, b_S)
    if NS > 1:
        b_S = tl.load(S_seg + p_kept + 1 * K * V)
    for i_m in tl.range(1, NS - 1, num_stages=2):
        b_M = tl.load(M_seg + p_M + i_m * K * K)
        p_next = S_seg + p_kept + (i_m + 1) * K * V
        b_S = tl.dot(b_S, b_M, tl.load(p_next), input_precision="tf32x3")
        tl.store(p_next, b_S)


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment"])
def scan_kernel(
    v,
    w,
    Qg,
    Y,
    Ktail,
    gamma_C,
    A,
    Aqk,
    initial_state,
    o,
    S_seg,
    M_seg,
    final_state,
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
    b_S = tl.load(S_seg + i_seg.to(tl.int64) * K * V + o_v[:, None] * K + o_k[None, :])
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
        p_o = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
        p_v = ((i_start + i_row + BT) * HV + i_h)[None, :] * V + o_v[:, None]
        m_v = (i_row + BT < n_tokens)[None, :]
        b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
        b_w_next = tl.load(w + p_v, mask=m_v, other=0.0)
        m_gamma = o_k < K * (n_chunks - 1 - i_t)
        b_gamma_next = tl.load(gamma_C + (i_tile + HV) * K + o_k, mask=m_gamma, other=0.0)
        # stores come after the products that they would delay
        b_Sd = b_S.to(tl.float32)
        b_Z = (b_v.to(tl.float32) * b_w.to(tl.float32)).to(tl.float32)
        b_R = tl.dot(b_Z, tl.trans(tl.load(A + p_score)), input_precision="tf32x3")
        b_R = tl.dot(b_Sd, tl.trans(tl.load(Y + i_tile * BT * K + p_k)), b_R, input_precision="tf32x3")
        b_o = tl.dot(b_Sd, tl.trans(tl.load(Qg + i_tile * BT * K + p_k)), input_precision="tf32x3")
        b_S *= b_gamma[None, :]
        b_Rd = b_R.to(tl.float32)
        b_S = tl.dot(b_Rd, tl.load(Ktail + i_tile * BT * K + p_k), b_S, input_precision="tf32x3")
        b_o = tl.dot(b_Rd, tl.trans(tl.load(Aqk + p_score)), b_o, input_precision="tf32x3")
        tl.store(o + p_o, b_o.to(tl.float32), mask=(i_row < n_tokens)[None, :])

    if i_s == NS - 1:
        p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
        tl.store(final_state + p_state, b_S)


def launch(
    v, w, Qg, Y, Ktail, gamma_C, A, Aqk, initial_state, o, S_seg, M_seg, final_state, *,
    n_sequences, T, HV, NS, segment
):
    """Launch the three kernels on the current stream."""
    arguments = (
        v, w, Qg, Y, Ktail, gamma_C, A, Aqk, initial_state, o, S_seg, M_seg, final_state, T, HV,
        NS, segment,
    )
    options = {
        "K": K, "V": V, "BT": BT,
        "num_warps": 4, "num_stages": 1,
    }
    heads = n_sequences * HV
    if NS > 1:
        fold_kernel[(heads * ((V + K) // BV * (NS - 1) - K // BV),)](*arguments, BV=BV, **options)
    # one short product after the other: what more warps save in it is most of the time
    merge_kernel[(heads * (V // BM),)](*arguments, BM=BM, **options | {"num_warps": 8})
    scan_kernel[(heads * NS * (V // BV),)](*arguments, BV=BV, **options)
