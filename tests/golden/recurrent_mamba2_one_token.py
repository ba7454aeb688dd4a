"""Mamba-2 token by token.

    S_t = exp(rate dt_t) S_{t-1} + dt_t k_t v_t^T
    o_t = (S_t^T q_t + D v_t) * silu(z_t)

One program per sequence, value head and BV values. It carries its part of the state as S^T [BV, K]
in fp32, in registers: read once, and written once.
A slot is one of the pool's states. An index that is none (below 0, null_slot, past the end) is
padding: a sequence that would read it gets zeros in o, and no slot of it is written.

    q                  [B, T, H, K]       bf16   queries
    k                  [B, T, H, K]       bf16   keys
    v                  [B, T, HV, V]      bf16   values
    dt                 [B, T, HV]         bf16   step: what a token decays by and writes
    rate               [HV]               fp32   decay of a step of 1
    dt_bias            [HV]               fp32   added to dt before its activation
    D                  [HV, V]            fp32   factor of a token's own value, added to o
    z                  [B, T, HV, V]      bf16   output gate, before silu
    state_pool         [slots, HV, V, K]  fp32   states, read and written in place
    ssm_state_indices  [N]                int32  slots of each sequence
    o                  [B, T, HV, V]      bf16   output

Problem: mamba2 K=128 V=64 bf16, g bf16, softplus gate
Config:  BT=1 BV=16 evict=usual language=triton loads=behind maxnreg=0 num_stages=1 num_warps=1 tiles=1
Template digest 1884d1c53c467279; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,state_v_first,rate,D,z,pool,indexed,one_token,strided,tied_D \
      --stage recurrent --config \
      BT=1,BV=16,evict=usual,language=triton,loads=behind,maxnreg=0,num_stages=1,num_warps=1,tiles=1
"""

import triton
import triton.language as tl


K, V = 128, 64
BV = 16


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + y), y = exp(-|x|), with every digit where x < -10.

    log(1 + y) / y by Chebyshev's polynomial of degree 7 on [0, 1], off by 3e-7 in fp32.
    """
    y = tl.exp(-tl.abs(x))
    ratio = -0.10685003 + y * (0.0434939 - y * 0.008371153)
    ratio = -0.49997175 + y * (0.33271928 + y * (-0.24474774 + y * (0.17687477 + y * ratio)))
    return tl.maximum(x, 0.0) + y * (0.99999978 + y * ratio)


@triton.jit(
    do_not_specialize=[
        "H", "HV", "slots", "slot_stride", "index_row", "null_slot", "D_row", "q_row", "k_row",
        "v_row", "dt_row", "z_row", "o_row"
    ],
    do_not_specialize_on_alignment=[
        "dt", "rate", "dt_bias", "D", "ssm_state_indices"
    ],
)
def recurrent_kernel(
    q,
    k,
    v,
    dt,
    rate,
    dt_bias,
    D,
    z,
    state_pool,
    ssm_state_indices,
    o,
    H,
    HV,
    slots,
    slot_stride,
    index_row,
    null_slot,
    D_row,
    q_row,
    k_row,
    v_row,
    dt_row,
    z_row,
    o_row,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BV)
    i_nh = tl.program_id(0) // (V // BV)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_hq = i_h * H // HV
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    i_first = i_n.to(tl.int64)

    b_rate = tl.load(rate + i_h).to(tl.float32)
    b_bias = tl.load(dt_bias + i_h).to(tl.float32)
    b_D = tl.load(D + i_h * D_row).to(tl.float32)
    p_slot = ssm_state_indices + i_n.to(tl.int64) * index_row
    i_slot = tl.load(p_slot).to(tl.int64)
    # the token is on its way while the slot's index is, and the state while the token is made ready
    i_row = i_first
    b_q = tl.load(q + i_row * q_row * 8 + i_hq * K + o_k).to(tl.float32)
    b_k = tl.load(k + i_row * k_row * 8 + i_hq * K + o_k).to(tl.float32)
    b_step = tl.load(dt + i_row * dt_row + i_h).to(tl.float32)
    b_u = tl.load(v + i_row * v_row * 8 + i_h * V + o_v).to(tl.float32)
    b_z = tl.load(z + i_row * z_row * 8 + i_h * V + o_v).to(tl.float32)
    if (i_slot < 0) | (i_slot >= slots) | (i_slot == null_slot):
        tl.store(o + i_row * o_row * 8 + i_h * V + o_v, tl.zeros([BV], tl.bfloat16))
        return
    p_state = state_pool + i_slot * slot_stride * 8 + i_h * (K * V)
    b_S = tl.load(p_state + o_v[:, None] * K + o_k[None, :])

    b_step += b_bias
    b_step = softplus(b_step)
    b_alpha = tl.exp(b_rate * b_step)
    b_S *= b_alpha
    b_skip = b_D * b_u
    b_u *= b_step
    # both sums are of the decayed state, so that neither waits for the other
    b_o = tl.sum(b_S * b_q[None, :], 1)
    b_o += b_u * (tl.sum(b_q * b_k, 0)) + b_skip
    b_o *= b_z / (1.0 + tl.exp(-b_z))
    b_S += b_u[:, None] * b_k[None, :]
    tl.store(o + i_row * o_row * 8 + i_h * V + o_v, b_o.to(tl.bfloat16))
    tl.store(p_state + o_v[:, None] * K + o_k[None, :], b_S)


def launch(
    q, k, v, dt, rate, dt_bias, D, z, state_pool, ssm_state_indices, o, *, n_sequences, H, HV,
    slots, slot_stride, index_row, null_slot, D_row, q_row, k_row, v_row, dt_row, z_row, o_row
):
    """Launch one program per sequence, value head and BV values on the current stream."""
    recurrent_kernel[(n_sequences * HV * (V // BV),)](
        q, k, v, dt, rate, dt_bias, D, z, state_pool, ssm_state_indices, o, H, HV, slots,
        slot_stride, index_row, null_slot, D_row, q_row, k_row, v_row, dt_row, z_row, o_row,
        K=K, V=V, BV=BV,
        num_warps=1, num_stages=1,
    )
