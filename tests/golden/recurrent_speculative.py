"""Gated DeltaNet-2 token by token.

    S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T
    o_t = scale * S_t^T q_t

One program per sequence, value head and BV values. It carries its part of the state as S^T [BV, K]
in fp32, in registers: read once, and written after every token.
A slot is one of the pool's states. An index that is none (below 0, null_slot, past the end) is
padding: a sequence that would read it gets zeros in o, and no slot of it is written.
The state after token t of sequence n is written to slot ssm_state_indices[n, t].

    q                    [B, T, H, K]       bf16   queries; normalised in the kernel
    k                    [B, T, H, K]       bf16   keys; normalised in the kernel
    v                    [B, T, HV, V]      bf16   values
    g                    [B, T, HG, K]      fp32   pre-activation of the log decay
    b                    [B, T, HG, K]      bf16   erase gate
    w                    [B, T, HV, V]      bf16   write gate
    A_log                [HG]               fp32   log of the decay's rate
    dt_bias              [HG, K]            fp32   added to g before its activation
    cu_seqlens           [N+1]              int32  first token of each sequence
    state_pool           [slots, HV, V, K]  fp32   states, read and written in place
    ssm_state_indices    [N, 1+S]           int32  slots of each sequence
    num_accepted_tokens  [N]                int32  tokens accepted of those guessed
    o                    [B, T, HV, V]      bf16   output

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm, softplus gate, packed sequences
Config:  BT=1 BV=16 evict=usual language=triton loads=behind maxnreg=0 num_stages=1 num_warps=1 tiles=1
Template digest 1884d1c53c467279; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate softplus \
      --with=A_log,dt_bias,varlen,state_v_first,pool,indexed,speculative,accepted --stage \
      recurrent --config \
      BT=1,BV=16,evict=usual,language=triton,loads=behind,maxnreg=0,num_stages=1,num_warps=1,tiles=1
"""

import triton
import triton.language as tl


K, V = 128, 128
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
        "scale", "N", "T", "H", "HV", "HG", "slots", "slot_stride", "index_row", "index_width",
        "null_slot"
    ],
    do_not_specialize_on_alignment=[
        "A_log", "cu_seqlens", "ssm_state_indices", "num_accepted_tokens"
    ],
)
def recurrent_kernel(
    q,
    k,
    v,
    g,
    b,
    w,
    A_log,
    dt_bias,
    cu_seqlens,
    state_pool,
    ssm_state_indices,
    num_accepted_tokens,
    o,
    scale,
    N,
    T,
    H,
    HV,
    HG,
    slots,
    slot_stride,
    index_row,
    index_width,
    null_slot,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BV)
    i_nh = tl.program_id(0) // (V // BV)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_hq = i_h * H // HV
    i_hg = i_h * HG // HV
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    # whatever cu_seqlens holds, tokens are those of the batch
    i_first = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n), 0), T).to(tl.int64)
    i_end = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n + 1), i_first), T)
    n_tokens = (i_end - i_first).to(tl.int32)
    # rows before the first and after the last sequence are shared out to all of them
    i_covered = tl.minimum(tl.maximum(tl.load(cu_seqlens), 0), T).to(tl.int64)
    for i_row in range(i_n.to(tl.int64), i_covered, N):
        tl.store(o + (i_row * HV + i_h) * V + o_v, tl.zeros([BV], tl.bfloat16))
    i_covered = tl.minimum(tl.maximum(tl.load(cu_seqlens + N), 0), T).to(tl.int64)
    for i_row in range(i_covered + i_n, T, N):
        tl.store(o + (i_row * HV + i_h) * V + o_v, tl.zeros([BV], tl.bfloat16))
    if n_tokens == 0:
        return

    b_rate = tl.exp(tl.load(A_log + i_hg).to(tl.float32))
    b_bias = tl.load(dt_bias + i_hg * K + o_k).to(tl.float32)
    p_slot = ssm_state_indices + i_n.to(tl.int64) * index_row
    i_accepted = tl.load(num_accepted_tokens + i_n).to(tl.int32)
    i_slot = tl.load(p_slot + tl.minimum(tl.maximum(i_accepted, 1), index_width) - 1).to(tl.int64)
    if (i_slot < 0) | (i_slot >= slots) | (i_slot == null_slot):
        for i_t in range(n_tokens):
            i_row = i_first + i_t
            tl.store(o + (i_row * HV + i_h) * V + o_v, tl.zeros([BV], tl.bfloat16))
        return
    p_state = state_pool + i_slot * slot_stride * 8 + i_h * (K * V)
    b_S = tl.load(p_state + o_v[:, None] * K + o_k[None, :])

    for i_t in range(n_tokens):
        i_row = i_first + i_t
        b_q = tl.load(q + (i_row * H + i_hq) * K + o_k).to(tl.float32)
        b_k = tl.load(k + (i_row * H + i_hq) * K + o_k).to(tl.float32)
        b_g = tl.load(g + (i_row * HG + i_hg) * K + o_k).to(tl.float32)
        b_e = tl.load(b + (i_row * HG + i_hg) * K + o_k).to(tl.float32)
        b_u = tl.load(v + (i_row * HV + i_h) * V + o_v).to(tl.float32)
        b_w = tl.load(w + (i_row * HV + i_h) * V + o_v).to(tl.float32)
        b_q_rstd = tl.rsqrt(tl.sum(b_q * b_q, 0) + 1e-6) * scale
        b_k_rstd = tl.rsqrt(tl.sum(b_k * b_k, 0) + 1e-6)
        b_q *= b_q_rstd
        b_k *= b_k_rstd
        b_e *= b_k
        b_g += b_bias
        b_g = -b_rate * softplus(b_g)
        b_alpha = tl.exp(b_g)
        b_S *= b_alpha[None, :]
        b_u *= b_w
        # both sums are of the decayed state, so that neither waits for the other
        b_erased = tl.sum(b_S * b_e[None, :], 1)
        b_o = tl.sum(b_S * b_q[None, :], 1)
        b_u -= b_erased
        b_o += b_u * (tl.sum(b_q * b_k, 0))
        b_S += b_u[:, None] * b_k[None, :]
        tl.store(o + (i_row * HV + i_h) * V + o_v, b_o.to(tl.bfloat16))
        i_slot = tl.load(p_slot + i_t, mask=i_t < index_width, other=-1).to(tl.int64)
        if (i_slot >= 0) & (i_slot < slots) & (i_slot != null_slot):
            p_state = state_pool + i_slot * slot_stride * 8 + i_h * (K * V)
            tl.store(p_state + o_v[:, None] * K + o_k[None, :], b_S)


def launch(
    q, k, v, g, b, w, A_log, dt_bias, cu_seqlens, state_pool, ssm_state_indices,
    num_accepted_tokens, o, *, n_sequences, scale, N, T, H, HV, HG, slots, slot_stride,
    index_row, index_width, null_slot
):
    """Launch one program per sequence, value head and BV values on the current stream."""
    recurrent_kernel[(n_sequences * HV * (V // BV),)](
        q, k, v, g, b, w, A_log, dt_bias, cu_seqlens, state_pool, ssm_state_indices,
        num_accepted_tokens, o, scale, N, T, H, HV, HG, slots, slot_stride, index_row,
        index_width, null_slot,
        K=K, V=V, BV=BV,
        num_warps=1, num_stages=1,
    )
