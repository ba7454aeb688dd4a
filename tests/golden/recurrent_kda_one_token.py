"""Kimi Delta Attention token by token.

    S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T
    o_t = scale * S_t^T q_t

One program per sequence, value head and BV values. It carries its part of the state as S^T [BV, K]
in fp32, in registers: read once, and written once.
A slot is one of the pool's states. An index that is none (below 0, null_slot, past the end) is
padding: a sequence that would read it gets zeros in o, and no slot of it is written.

    q                  [B, T, H, K]       bf16   queries; normalised in the kernel
    k                  [B, T, H, K]       bf16   keys; normalised in the kernel
    v                  [B, T, HV, V]      bf16   values
    g                  [B, T, HG, K]      fp32   log decay
    beta               [B, T, HV]         bf16   factor of what a token erases and writes
    state_pool         [slots, HV, K, V]  bf16   states, read and written in place
    ssm_state_indices  [N]                int32  slots of each sequence
    o                  [B, T, HV, V]      bf16   output

Problem: kda K=80 V=48 bf16, g fp32, l2norm
Config:  BT=1 BV=16 evict=usual language=triton loads=behind maxnreg=0 num_stages=1 num_warps=1 tiles=1
Template digest 1884d1c53c467279; made by
    gdn2gen generate --op kda --head-dim 80,48 --dtype bf16 --gate-dtype fp32 --gate none \
      --with=beta_sigmoid,state_bf16,pool,indexed,one_token,strided --stage recurrent \
      --config \
      BT=1,BV=16,evict=usual,language=triton,loads=behind,maxnreg=0,num_stages=1,num_warps=1,tiles=1
"""

import triton
import triton.language as tl


K, V = 80, 48
BV = 16


@triton.jit(
    do_not_specialize=[
        "scale", "H", "HV", "HG", "slots", "slot_stride", "index_row", "null_slot", "q_row",
        "k_row", "v_row", "g_row", "beta_row", "o_row"
    ],
    do_not_specialize_on_alignment=[
        "beta", "ssm_state_indices"
    ],
)
def recurrent_kernel(
    q,
    k,
    v,
    g,
    beta,
    state_pool,
    ssm_state_indices,
    o,
    scale,
    H,
    HV,
    HG,
    slots,
    slot_stride,
    index_row,
    null_slot,
    q_row,
    k_row,
    v_row,
    g_row,
    beta_row,
    o_row,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BV)
    i_nh = tl.program_id(0) // (V // BV)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_hq = i_h * H // HV
    i_hg = i_h * HG // HV
    o_k0 = tl.arange(0, 64)
    o_k1 = 64 + tl.arange(0, 16)
    o_v = i_v * BV + tl.arange(0, BV)
    i_first = i_n.to(tl.int64)

    p_slot = ssm_state_indices + i_n.to(tl.int64) * index_row
    i_slot = tl.load(p_slot).to(tl.int64)
    # the token is on its way while the slot's index is, and the state while the token is made ready
    i_row = i_first
    b_q0 = tl.load(q + i_row * q_row * 8 + i_hq * K + o_k0).to(tl.float32)
    b_q1 = tl.load(q + i_row * q_row * 8 + i_hq * K + o_k1).to(tl.float32)
    b_k0 = tl.load(k + i_row * k_row * 8 + i_hq * K + o_k0).to(tl.float32)
    b_k1 = tl.load(k + i_row * k_row * 8 + i_hq * K + o_k1).to(tl.float32)
    b_g0 = tl.load(g + i_row * g_row * 8 + i_hg * K + o_k0).to(tl.float32)
    b_g1 = tl.load(g + i_row * g_row * 8 + i_hg * K + o_k1).to(tl.float32)
    b_erase = tl.load(beta + i_row * beta_row + i_h).to(tl.float32)
    b_erase = 1.0 / (1.0 + tl.exp(-b_erase))
    b_u = tl.load(v + i_row * v_row * 8 + i_h * V + o_v).to(tl.float32)
    if (i_slot < 0) | (i_slot >= slots) | (i_slot == null_slot):
        tl.store(o + i_row * o_row * 8 + i_h * V + o_v, tl.zeros([BV], tl.bfloat16))
        return
    p_state = state_pool + i_slot * slot_stride * 8 + i_h * (K * V)
    b_S0 = tl.load(p_state + o_k0[None, :] * V + o_v[:, None]).to(tl.float32)
    b_S1 = tl.load(p_state + o_k1[None, :] * V + o_v[:, None]).to(tl.float32)

    b_q_rstd = tl.rsqrt(tl.sum(b_q0 * b_q0, 0) + tl.sum(b_q1 * b_q1, 0) + 1e-6) * scale
    b_k_rstd = tl.rsqrt(tl.sum(b_k0 * b_k0, 0) + tl.sum(b_k1 * b_k1, 0) + 1e-6)
    b_q0 *= b_q_rstd
    b_k0 *= b_k_rstd
    b_q1 *= b_q_rstd
    b_k1 *= b_k_rstd
    b_alpha0 = tl.exp(b_g0)
    b_alpha1 = tl.exp(b_g1)
    b_S0 *= b_alpha0[None, :]
    b_S1 *= b_alpha1[None, :]
    # both sums are of the decayed state, so that neither waits for the other
    b_erased = tl.sum(b_S0 * b_k0[None, :], 1)
    b_erased += tl.sum(b_S1 * b_k1[None, :], 1)
    b_o = tl.sum(b_S0 * b_q0[None, :], 1)
    b_o += tl.sum(b_S1 * b_q1[None, :], 1)
    b_u = b_erase * (b_u - b_erased)
    b_o += b_u * (tl.sum(b_q0 * b_k0, 0) + tl.sum(b_q1 * b_k1, 0))
    b_S0 += b_u[:, None] * b_k0[None, :]
    b_S1 += b_u[:, None] * b_k1[None, :]
    tl.store(o + i_row * o_row * 8 + i_h * V + o_v, b_o.to(tl.bfloat16))
    tl.store(p_state + o_k0[None, :] * V + o_v[:, None], b_S0.to(tl.bfloat16))
    tl.store(p_state + o_k1[None, :] * V + o_v[:, None], b_S1.to(tl.bfloat16))


def launch(
    q, k, v, g, beta, state_pool, ssm_state_indices, o, *, n_sequences, scale, H, HV, HG, slots,
    slot_stride, index_row, null_slot, q_row, k_row, v_row, g_row, beta_row, o_row
):
    """Launch one program per sequence, value head and BV values on the current stream."""
    recurrent_kernel[(n_sequences * HV * (V // BV),)](
        q, k, v, g, beta, state_pool, ssm_state_indices, o, scale, H, HV, HG, slots,
        slot_stride, index_row, null_slot, q_row, k_row, v_row, g_row, beta_row, o_row,
        K=K, V=V, BV=BV,
        num_warps=1, num_stages=1,
    )
