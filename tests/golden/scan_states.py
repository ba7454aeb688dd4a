"""Scan the chunks of a sequence in order.

One program per sequence, value head and slice of V; the state is held transposed, S^T [BV, K], so
that it is the left operand of every product and never leaves the registers.

    R^T = U^T + S^T Y^T        O^T = S^T Qg^T + R^T Aqk^T
    S^T <- S^T Diag(gamma_C) + R^T Ktail

    Qg            [NT, HV, BT, K]   decayed, scaled queries
    Ktail, Y      [NT, HV, BT, K]   keys decayed to the chunk's end; minus the erasing factor
    U             [NT, HV, BT, V]   written values, solved
    gamma_C       [NT, HV, K] fp32  decay of a whole chunk
    Aqk           [NT, HV, BT, BT]  decayed scores
    o             [B, T, HV, V]
    initial_state [N, HV, K, V] fp32
    final_state   [N, HV, K, V] fp32

Problem: gdn2 K=64 V=128 fp32, g fp32, l2norm
Config:  BT=16 BV=32 num_stages=1 num_warps=4
Template digest a4f24d19ca28879b; made by
    gdn2gen generate --op gdn2 --head-dim 64,128 --dtype fp32 --gate-dtype fp32 --gate none \
      --with=initial_state,final_state --stage scan --config \
      BT=16,BV=32,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


K, V = 64, 128
BT, BV = 16, 32


@triton.jit(do_not_specialize=["T", "HV"])
def scan_kernel(
    Qg,
    Ktail,
    Y,
    U,
    gamma_C,
    Aqk,
    initial_state,
    o,
    final_state,
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
    n_chunks = tl.cdiv(T, BT)
    i_first = i_n * n_chunks
    i_start = i_n.to(tl.int64) * T
    n_tokens = T

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    p_state = i_nh.to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
    b_S = tl.load(initial_state + p_state)

    # the loads that no product reads directly are not pipelined by the compiler: fetched one ahead
    p_u = o_t[None, :] * V + o_v[:, None]
    i_tile = i_first.to(tl.int64) * HV + i_h
    n_next = tl.minimum(n_chunks, 1)
    b_U_next = tl.load(U + i_tile * BT * V + p_u, mask=(o_v < V * n_next)[:, None], other=0.0)
    b_gamma_next = tl.load(gamma_C + i_tile * K + o_k, mask=o_k < K * n_next, other=0.0)
    for i_t in range(n_chunks):
        i_tile = (i_first + i_t).to(tl.int64) * HV + i_h
        p_k = o_t[:, None] * K + o_k[None, :]
        b_U, b_gamma = b_U_next, b_gamma_next
        i_next = i_tile + HV
        n_next = tl.minimum(n_chunks - 1 - i_t, 1)
        b_U_next = tl.load(U + i_next * BT * V + p_u, mask=(o_v < V * n_next)[:, None], other=0.0)
        b_gamma_next = tl.load(gamma_C + i_next * K + o_k, mask=o_k < K * n_next, other=0.0)
        b_Sd = b_S.to(tl.float32)
        b_Y = tl.load(Y + i_tile * BT * K + p_k)
        b_R = tl.dot(b_Sd, tl.trans(b_Y), b_U.to(tl.float32), input_precision="tf32x3")
        b_Rd = b_R.to(tl.float32)
        b_Qg = tl.load(Qg + i_tile * BT * K + p_k)
        b_o = tl.dot(b_Sd, tl.trans(b_Qg), input_precision="tf32x3")
        b_Aqk = tl.load(Aqk + i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :])
        b_o = tl.dot(b_Rd, tl.trans(b_Aqk), b_o, input_precision="tf32x3")
        i_row = i_t * BT + o_t
        p_o = ((i_start + i_row) * HV + i_h)[None, :] * V + o_v[:, None]
        tl.store(o + p_o, b_o.to(tl.float32), mask=(i_row < n_tokens)[None, :])
        b_S *= b_gamma[None, :]
        b_S = tl.dot(b_Rd, tl.load(Ktail + i_tile * BT * K + p_k), b_S, input_precision="tf32x3")

    tl.store(final_state + p_state, b_S)


def launch(
    Qg, Ktail, Y, U, gamma_C, Aqk, initial_state, o, final_state, *, n_sequences, T, HV
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    scan_kernel[(n_sequences * HV * (V // BV),)](
        Qg, Ktail, Y, U, gamma_C, Aqk, initial_state, o, final_state, T, HV,
        K=K, V=V, BT=BT, BV=BV,
        num_warps=4, num_stages=1,
    )
