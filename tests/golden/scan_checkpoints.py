"""Scan the chunks of a sequence in order.

One program per sequence, value head and slice of V; the state is held transposed, S^T [BV, K], so
that it is the left operand of every product and never leaves the registers. Before every segment of
chunks it is written to the slot that checkpoint_indices names for it, if it names one: column c is
of the state before segment c + first_checkpoint. An index below 0, equal to null_slot or past the
last slot names none.

    R^T = (w v)^T A^T + S^T Y^T          Y = -A E
    O^T = S^T Qg^T + R^T Aqk^T
    S^T <- S^T Diag(gamma_C) + R^T Ktail

    v                 [B, T, HV, V]      fp16   values
    w                 [B, T, HV, V]      fp16   write gate
    Qg                [NT, HV, BT, K]    fp16   queries, scaled and decayed from the chunk's start
    Y                 [NT, HV, BT, K]    fp16   erasing keys through the inverse, -A E
    Ktail             [NT, HV, BT, K]    fp16   keys, decayed to the chunk's end
    gamma_C           [NT, HV, K]        fp32   decay of the whole chunk
    A                 [NT, HV, BT, BT]   fp16   inverse of I + T, lower triangle
    Aqk               [NT, HV, BT, BT]   fp16   decayed scores, lower triangle
    cu_seqlens        [N+1]              int32  first token of each sequence
    chunk_offsets     [N+1]              int32  first chunk of each sequence
    checkpoint_slots  [N, NC]            int32  slots of each sequence for states on the way
    checkpoints       [slots, HV, K, V]  bf16   states on the way, each in its slot
    o                 [B, T, HV, V]      fp16   output

Problem: gdn2 K=96 V=32 fp16, g fp32, l2norm, softplus gate, packed sequences
Config:  BT=32 BV=32 language=triton num_stages=2 num_warps=4 segments=serial
Template digest 737b7da71ba60727; made by
    gdn2gen generate --op gdn2 --head-dim 96,32 --dtype fp16 --gate-dtype fp32 --gate softplus \
      --with=A_log,dt_bias,varlen --stage scan --config \
      BT=32,BV=32,language=triton,num_stages=2,num_warps=4,segments=serial
"""

import triton
import triton.language as tl


K, V = 96, 32
BT, BV = 32, 32


@triton.jit(
    do_not_specialize=[
        "T", "HV", "NS", "segment", "NC", "first_checkpoint", "slot_stride"
    ]
)
def scan_kernel(
    v,
    w,
    Qg,
    Y,
    Ktail,
    gamma_C,
    A,
    Aqk,
    cu_seqlens,
    chunk_offsets,
    checkpoint_slots,
    checkpoints,
    o,
    T,
    HV,
    NS,
    segment,
    NC,
    first_checkpoint,
    slot_stride,
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

    o_t = tl.arange(0, BT)
    o_k0 = tl.arange(0, 64)
    o_k1 = 64 + tl.arange(0, 32)
    o_v = i_v * BV + tl.arange(0, BV)
    b_S0 = tl.zeros([BV, 64], tl.float32)
    b_S1 = tl.zeros([BV, 32], tl.float32)

    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    i_tile = i_first.to(tl.int64) * HV + i_h
    p_v = ((i_start + o_t) * HV + i_h)[None, :] * V + o_v[:, None]
    m_v = (o_t < n_tokens)[None, :]
    b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
    b_w_next = tl.load(w + p_v, mask=m_v, other=0.0)
    b_gamma0_next = tl.load(gamma_C + i_tile * K + o_k0, mask=o_k0 < K * n_chunks, other=0.0)
    b_gamma1_next = tl.load(gamma_C + i_tile * K + o_k1, mask=o_k1 < K * n_chunks, other=0.0)
    for i_s in range(tl.cdiv(n_chunks, segment)):
        i_k = i_s - first_checkpoint
        p_slot = checkpoint_slots + i_n.to(tl.int64) * NC + i_k
        i_slot = tl.load(p_slot, mask=(i_k >= 0) & (i_k < NC), other=-1).to(tl.int64)
        if i_slot >= 0:
            p_kept0 = i_slot * slot_stride + i_h * (K * V) + o_k0[None, :] * V + o_v[:, None]
            p_kept1 = i_slot * slot_stride + i_h * (K * V) + o_k1[None, :] * V + o_v[:, None]
            tl.store(checkpoints + p_kept0, b_S0)
            tl.store(checkpoints + p_kept1, b_S1)
        for i_t in range(i_s * segment, tl.minimum(n_chunks, (i_s + 1) * segment)):
            i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
            p_k0 = o_t[:, None] * K + o_k0[None, :]
            p_k1 = o_t[:, None] * K + o_k1[None, :]
            p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
            b_v, b_w, b_gamma0, b_gamma1 = b_v_next, b_w_next, b_gamma0_next, b_gamma1_next
            i_row = i_t * BT + o_t
            p_o = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
            p_v = ((i_start + i_row + BT) * HV + i_h)[None, :] * V + o_v[:, None]
            m_v = (i_row + BT < n_tokens)[None, :]
            b_v_next = tl.load(v + p_v, mask=m_v, other=0.0)
            b_w_next = tl.load(w + p_v, mask=m_v, other=0.0)
            m_gamma = o_k0 < K * (n_chunks - 1 - i_t)
            b_gamma0_next = tl.load(gamma_C + (i_tile + HV) * K + o_k0, mask=m_gamma, other=0.0)
            m_gamma = o_k1 < K * (n_chunks - 1 - i_t)
            b_gamma1_next = tl.load(gamma_C + (i_tile + HV) * K + o_k1, mask=m_gamma, other=0.0)
            # stores come after the products that they would delay
            b_Sd0 = b_S0.to(tl.float16)
            b_Sd1 = b_S1.to(tl.float16)
            b_Z = (b_v.to(tl.float32) * b_w.to(tl.float32)).to(tl.float16)
            b_R = tl.dot(b_Z, tl.trans(tl.load(A + p_score)))
            b_R = tl.dot(b_Sd0, tl.trans(tl.load(Y + i_tile * BT * K + p_k0)), b_R)
            b_R = tl.dot(b_Sd1, tl.trans(tl.load(Y + i_tile * BT * K + p_k1)), b_R)
            b_o = tl.dot(b_Sd0, tl.trans(tl.load(Qg + i_tile * BT * K + p_k0)))
            b_o = tl.dot(b_Sd1, tl.trans(tl.load(Qg + i_tile * BT * K + p_k1)), b_o)
            b_S0 *= b_gamma0[None, :]
            b_S1 *= b_gamma1[None, :]
            b_Rd = b_R.to(tl.float16)
            b_S0 = tl.dot(b_Rd, tl.load(Ktail + i_tile * BT * K + p_k0), b_S0)
            b_S1 = tl.dot(b_Rd, tl.load(Ktail + i_tile * BT * K + p_k1), b_S1)
            b_o = tl.dot(b_Rd, tl.trans(tl.load(Aqk + p_score)), b_o)
            tl.store(o + p_o, b_o.to(tl.float16), mask=(i_row < n_tokens)[None, :])


def launch(
    v, w, Qg, Y, Ktail, gamma_C, A, Aqk, cu_seqlens, chunk_offsets, checkpoint_slots,
    checkpoints, o, *, n_sequences, T, HV, NS, segment, NC, first_checkpoint, slot_stride
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    scan_kernel[(n_sequences * HV * (V // BV),)](
        v, w, Qg, Y, Ktail, gamma_C, A, Aqk, cu_seqlens, chunk_offsets, checkpoint_slots,
        checkpoints, o, T, HV, NS, segment, NC, first_checkpoint, slot_stride,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=2,
    )
