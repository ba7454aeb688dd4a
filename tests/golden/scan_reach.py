"""Scan the segments of a sequence side by side, exactly.

A segment takes the state to S_end = M S_start + U, and both follow from the same scan: U from
a zero state, M from the identity, with nothing written. Three kernels,
and one that counts what fold needs,

    fold_kernel    where the first segment ends; U and M of the others but the last; one program
                   per slice of their rows
    merge_kernel   the state at every segment's start, one after the other
    scan_blocks2_kernel o, and what the backward needs, all segments at once

which is twice the work and a chain as short as one segment: for few heads and long sequences.
The state is held transposed, S^T [BV, K], so that it is the left operand of every product and
never leaves the registers.

    X^T = v^T - (S^T k^T) k_head          R^T = X^T A^T
    O^T = (S^T q^T) q_head + R^T Aqk^T
    S^T <- S^T gamma_C + (R^T k_tail) k

where q_head, k_head and k_tail, one number a token, make Qg, E and Ktail of q and k.

    v              [B, T, HV, V]      bf16  values
    q              [B, T, H, K]       bf16  queries; normalised in the kernel
    k              [B, T, H, K]       bf16  keys; normalised in the kernel
    q_head         [NT, HV, BT]       fp32  scale / norm of q, decayed from the chunk's start
    k_head         [NT, HV, BT]       fp32  1 / norm of k, decayed from the chunk's start
    k_tail         [NT, HV, BT]       fp32  beta / norm of k, decayed to the chunk's end
    gamma_C        [NT, HV]           fp32  decay of the whole chunk
    A              [NT, HV, BT, BT]   bf16  inverse of I + T, lower triangle
    Aqk            [NT, HV, BT, BT]   bf16  decayed scores, lower triangle
    k_beta         [NT, HV, BT]       fp32  beta, after its activation
    initial_state  [N, HV, K, V]      fp32  state before the first token
    o              [B, T, HV, V]      bf16  output
    h              [NT2, HV, V, K]    bf16  state at the block's start, transposed
    R              [NT, HV, BT, V]    bf16  u: a token adds (beta k) u^T to the state
    S_seg          [N, HV, NS, V, K]  fp32  state at the segment's start, transposed
    M_seg          [N, HV, NS, K, K]  fp32  scratch: transition of all segments but first and last
    final_state    [N, HV, K, V]      fp32  state after the last token

Problem: gated_delta_rule K=128 V=128 bf16, g fp32, l2norm
Config:  BT=32 BV=32 language=triton merge=cut num_stages=2 num_warps=4 reach=64 segments=parallel
Template digest 155e4f4498c3dba7; made by
    gdn2gen generate --op gated_delta_rule --head-dim 128,128 --dtype bf16 --gate-dtype fp32 \
      --gate none --with=initial_state,final_state --stage scan_blocks2 --config \
      BT=32,BV=32,language=triton,merge=cut,num_stages=2,num_warps=4,reach=64,segments=parallel
"""

import triton
import triton.language as tl


K, V = 128, 128
BT, BV = 32, 32
BM = 16  # rows of a program of merge_kernel, which waits for one product after the other
BC = 128  # chunks that reach_kernel reads at once
BITS = tl.constexpr(64)  # what decays below 2^-BITS does not count


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment", "H"])
def fold_kernel(
    v,
    q,
    k,
    q_head,
    k_head,
    k_tail,
    gamma_C,
    A,
    Aqk,
    k_beta,
    initial_state,
    o,
    h,
    R,
    S_seg,
    M_seg,
    final_state,
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
    n_folded = (V + K) // BV * (NS - 1) - K // BV
    i_nh, i_x = tl.program_id(0) // n_folded, tl.program_id(0) % n_folded
    # past the first segment's rows of values, which starts from what is given
    i_x += tl.where(i_x < V // BV, 0, K // BV)
    i_s, i_v = i_x // ((V + K) // BV), i_x % ((V + K) // BV)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_hq = i_h // (HV // H)
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
    # of those the ones that count: rows of values begin with those that reach the end
    p_counts = S_seg + (i_nh.to(tl.int64) * NS + 0) * K * V + i_s
    n_all = n_chunks
    n_chunks = tl.load(p_counts + tl.where(i_v * BV < V, 0, K * V // 2)).to(tl.int32)
    i_skipped = tl.where(i_v * BV < V, n_all - n_chunks, 0)
    i_begin = i_skipped
    i_first += i_begin
    i_start += i_begin * BT
    n_tokens -= i_begin * BT
    # rows past V start at the identity, and have no tokens to read v of
    n_written = tl.where(i_v * BV < V, n_tokens, 0)
    b_S = tl.where((o_v - V)[:, None] == o_k[None, :], 1.0, 0.0)
    if i_s + i_skipped == 0:
        p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
        b_S = tl.load(initial_state + p_state)
    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    i_tile = i_first.to(tl.int64) * HV + i_h
    p_v = ((i_start + o_t) * HV + i_h)[None, :] * V + o_v[:, None]
    m_v = (o_t < n_written)[None, :]
    b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
    i_next = i_tile
    m_next = o_t < BT * tl.minimum(n_chunks, 1)
    b_k_head_next = tl.load(k_head + i_next * BT + o_t, mask=m_next, other=0.0)
    b_k_tail_next = tl.load(k_tail + i_next * BT + o_t, mask=m_next, other=0.0)
    # one number, of a row of itself: 0 where there is no chunk
    b_gamma_next = tl.max(tl.load(gamma_C + i_next + 0 * o_t, mask=m_next, other=0.0), 0)

    for i_t in range(n_chunks):
        i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
        p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
        b_v = b_v_next
        b_k_head = b_k_head_next
        b_k_tail = b_k_tail_next
        b_gamma = b_gamma_next
        i_row = i_t * BT + o_t
        p_v = ((i_start + i_row + BT) * HV + i_h)[None, :] * V + o_v[:, None]
        m_v = (i_row + BT < n_written)[None, :]
        b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
        i_next = i_tile + HV * tl.minimum(n_chunks - 1 - i_t, 1)
        b_k_head_next = tl.load(k_head + i_next * BT + o_t)
        b_k_tail_next = tl.load(k_tail + i_next * BT + o_t)
        b_gamma_next = tl.load(gamma_C + i_next)

        p_k = ((i_start + i_row) * H + i_hq)[:, None] * K + o_k[None, :]
        b_k = tl.load(k + p_k, mask=(i_row < n_tokens)[:, None], other=0.0)

        # stores come after the products that they would delay
        b_Sd = b_S.to(tl.bfloat16)
        b_ES = tl.dot(b_Sd, tl.trans(b_k))
        b_ES *= b_k_head[None, :]
        b_X = (b_v.to(tl.float32) - b_ES).to(tl.bfloat16)
        b_R = tl.dot(b_X, tl.trans(tl.load(A + p_score)))
        b_S *= b_gamma
        b_outer = (b_R * b_k_tail[None, :]).to(tl.bfloat16)
        b_S = tl.dot(b_outer, b_k, b_S)

    if i_v * BV < V:
        p_kept = (i_nh.to(tl.int64) * NS + i_s + 1) * K * V + o_v[:, None] * K + o_k[None, :]
        tl.store(S_seg + p_kept, b_S)
    else:
        p_M = (i_nh.to(tl.int64) * NS + i_s) * K * K
        b_S = tl.where(n_chunks < n_all, 0.0, b_S)  # nothing is left
        tl.store(M_seg + p_M + (o_v - V)[:, None] * K + o_k[None, :], b_S)


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment", "H"])
def reach_kernel(
    v,
    q,
    k,
    q_head,
    k_head,
    k_tail,
    gamma_C,
    A,
    Aqk,
    k_beta,
    initial_state,
    o,
    h,
    R,
    S_seg,
    M_seg,
    final_state,
    T,
    HV,
    NS,
    segment,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Count the chunks that fold needs, of one segment and head."""
    i_nh, i_s = tl.program_id(0) // (NS - 1), tl.program_id(0) % (NS - 1)
    i_n, i_h = i_nh // HV, i_nh % HV
    n_all = tl.cdiv(T, BT)
    i_first = i_n * n_all + i_s * segment
    n_all = tl.minimum(n_all - i_s * segment, segment)
    # log2 of what steps could make a state longer by, in all: 0 where beta is in [0, 2]
    grown = 0.0
    for i_c in range(0, n_all, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < n_all
        p_c = (i_first + o_c).to(tl.int64) * HV + i_h
        p_t = p_c[:, None] * BT + tl.arange(0, BT)[None, :]
        b_gamma = tl.load(gamma_C + p_c, mask=m_c, other=1.0)
        b_step = tl.abs(1.0 - tl.load(k_beta + p_t, mask=m_c[:, None], other=0.0))
        # not a maximum: a NaN has to stay one, and then all chunks count
        b_step = tl.log2(tl.where(b_step <= 1.0, 1.0, b_step))
        grown += tl.sum(tl.log2(tl.where(b_gamma > 1.0, b_gamma, 1.0)) + tl.sum(b_step, 1), 0)
    least = -BITS - grown
    # log2 of what is left over the chunks so far, from the start on and from the end back
    left, left_back = 0.0, 0.0
    n_front, n_back = 0, 0
    for i_c in range(0, n_all, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < n_all
        p_front = (i_first + o_c).to(tl.int64) * HV + i_h
        p_back = (i_first + n_all - 1 - o_c).to(tl.int64) * HV + i_h
        b_front = tl.load(gamma_C + p_front, mask=m_c, other=1.0)
        b_back = tl.load(gamma_C + p_back, mask=m_c, other=1.0)
        # differences of sums have to be finite; a NaN stays one, and counts as no decay
        b_front = tl.where(b_front < 2.0**-120, 2.0**-120, b_front)
        b_back = tl.where(b_back < 2.0**-120, 2.0**-120, b_back)
        b_front = tl.log2(tl.where(b_front > 1.0, 1.0, b_front))
        b_back = tl.log2(tl.where(b_back > 1.0, 1.0, b_back))
        # over those before a chunk
        b_over = left + tl.cumsum(b_front, 0) - b_front
        b_over_back = left_back + tl.cumsum(b_back, 0) - b_back
        n_front += tl.sum(tl.where(m_c & (b_over < least), 0, m_c.to(tl.int32)), 0)
        n_back += tl.sum(tl.where(m_c & (b_over_back < least), 0, m_c.to(tl.int32)), 0)
        left += tl.sum(b_front, 0)
        left_back += tl.sum(b_back, 0)
    p_counts = S_seg + (i_nh.to(tl.int64) * NS + 0) * K * V + i_s
    tl.store(p_counts, n_back.to(tl.float32))
    tl.store(p_counts + K * V // 2, n_front.to(tl.float32))


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment", "H"])
def merge_kernel(
    v,
    q,
    k,
    q_head,
    k_head,
    k_tail,
    gamma_C,
    A,
    Aqk,
    k_beta,
    initial_state,
    o,
    h,
    R,
    S_seg,
    M_seg,
    final_state,
    T,
    HV,
    NS,
    segment,
    H,
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
    for i_m in tl.range(1, NS - 1, num_stages=3):
        b_M = tl.load(M_seg + p_M + i_m * K * K)
        p_next = S_seg + p_kept + (i_m + 1) * K * V
        # halves without F2F: M's are cut, those of S, which are few, rounded
        M_high = (b_M.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        M_low = (b_M - M_high).to(tl.bfloat16)
        S_high = b_S.to(tl.int32, bitcast=True) + 32768 & -65536
        S_high = S_high.to(tl.float32, bitcast=True)
        S_low = (b_S - S_high).to(tl.bfloat16)
        M_high, S_high = M_high.to(tl.bfloat16), S_high.to(tl.bfloat16)
        b_S = tl.dot(S_low, M_high) + tl.dot(S_high, M_low)
        b_S += tl.dot(S_high, M_high, tl.load(p_next))
        tl.store(p_next, b_S)


@triton.jit(do_not_specialize=["T", "HV", "NS", "segment", "H"])
def scan_blocks2_kernel(
    v,
    q,
    k,
    q_head,
    k_head,
    k_tail,
    gamma_C,
    A,
    Aqk,
    k_beta,
    initial_state,
    o,
    h,
    R,
    S_seg,
    M_seg,
    final_state,
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
    b_q_head_next = tl.load(q_head + i_next * BT + o_t, mask=m_next, other=0.0)
    b_k_head_next = tl.load(k_head + i_next * BT + o_t, mask=m_next, other=0.0)
    b_k_tail_next = tl.load(k_tail + i_next * BT + o_t, mask=m_next, other=0.0)
    # one number, of a row of itself: 0 where there is no chunk
    b_gamma_next = tl.max(tl.load(gamma_C + i_next + 0 * o_t, mask=m_next, other=0.0), 0)

    for i_t in range(n_chunks):
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

        i_x = n_before + i_t
        tl.store(R + i_tile * BT * V + o_t[None, :] * V + o_v[:, None], b_Rd)
        if i_x % 2 == 0:
            p_kept = h + ((i_block + i_x // 2).to(tl.int64) * HV + i_h) * K * V
            tl.store(p_kept + o_v[:, None] * K + o_k[None, :], b_Sd)
    if i_s == NS - 1:
        p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
        tl.store(final_state + p_state, b_S)


def launch(
    v, q, k, q_head, k_head, k_tail, gamma_C, A, Aqk, k_beta, initial_state, o, h, R, S_seg,
    M_seg, final_state, *, n_sequences, T, HV, NS, segment, H
):
    """Launch the four kernels on the current stream."""
    arguments = (
        v, q, k, q_head, k_head, k_tail, gamma_C, A, Aqk, k_beta, initial_state, o, h, R, S_seg,
        M_seg, final_state, T, HV, NS, segment, H,
    )
    options = {
        "K": K, "V": V, "BT": BT,
        "num_warps": 4, "num_stages": 2,
    }
    heads = n_sequences * HV
    if NS > 1:
        reach_kernel[(heads * (NS - 1),)](*arguments, K=K, V=V, BT=BT, BC=BC, num_warps=4)
        fold_kernel[(heads * ((V + K) // BV * (NS - 1) - K // BV),)](*arguments, BV=BV, **options)
    # one short product after the other: what more warps save in it is most of the time
    merge_kernel[(heads * (V // BM),)](*arguments, BM=BM, **options | {"num_warps": 8})
    scan_blocks2_kernel[(heads * NS * (V // BV),)](*arguments, BV=BV, **options)
