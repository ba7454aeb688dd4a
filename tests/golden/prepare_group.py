"""Score the pairs of a chunk once for all heads of a group, and leave what its heads decay by and write.

prepare_group_kernel, a program per chunk and group, makes the products of queries and keys as they are,

    scores_ij = <q_i, k_j>, i >= j

and step_kernel, a program per chunk and BH heads, which lie side by side in memory, turns steps about:

    step      = softplus(dt + dt_bias)          log_decay = rate step / log 2

    q          [B, T, H, K]     bf16  queries
    k          [B, T, H, K]     bf16  keys
    rate       [HV]             fp32  decay of a step of 1
    dt         [B, T, HV]       bf16  step: what a token decays by and writes
    dt_bias    [HV]             fp32  added to dt before its activation
    scores     [NT, H, BT, BT]  bf16  <q_i, k_j> of a group, as they are
    log_decay  [NT, HV, BT]     fp32  decay of each token, log2
    step       [NT, HV, BT]     fp32  step of each token, after its activation

Problem: mamba2 K=128 V=64 bf16, g bf16, softplus gate
Config:  BK=64 BT=64 language=triton maxnreg=0 num_stages=2 num_warps=4
Template digest a63f963137d1c60d; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,rate,D,z --stage prepare_group --config \
      BK=64,BT=64,language=triton,maxnreg=0,num_stages=2,num_warps=4
"""

import triton
import triton.language as tl


K = 128
BT, BK = 64, 64
BH = 16  # heads of a program of step_kernel
LOG2E = tl.constexpr(1.4426950408889634)
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
SMALLEST_LOG2 = tl.constexpr(-150.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + y), y = exp(-|x|), with every digit where x < -10.

    log(1 + y) / y by Chebyshev's polynomial of degree 7 on [0, 1], off by 3e-7 in fp32.
    """
    y = tl.exp(-tl.abs(x))
    ratio = -0.10685003 + y * (0.0434939 - y * 0.008371153)
    ratio = -0.49997175 + y * (0.33271928 + y * (-0.24474774 + y * (0.17687477 + y * ratio)))
    return tl.maximum(x, 0.0) + y * (0.99999978 + y * ratio)


@triton.jit(do_not_specialize=["T", "H"])
def prepare_group_kernel(
    q,
    k,
    scores,
    T,
    H,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    i_c, i_hq = tl.program_id(0) // H, tl.program_id(0) % H
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    o_t = tl.arange(0, BT)
    o_i, o_j = o_t[:, None], o_t[None, :]
    m_t = (o_t < n_rows)[:, None]
    # the program's own rows; offsets from here on fit 32 bits
    q += (i_start * H + i_hq) * K
    k += (i_start * H + i_hq) * K
    b_scores = tl.zeros([BT, BT], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        p_q = o_t[:, None] * (H * K) + o_k[None, :]
        b_q = tl.load(q + p_q, mask=m_t, other=0.0)
        b_k = tl.load(k + p_q, mask=m_t, other=0.0)
        b_scores = tl.dot(b_q, tl.trans(b_k), b_scores)
    b_scores = tl.where(o_i >= o_j, b_scores, 0.0)
    p_score = tl.program_id(0).to(tl.int64) * BT * BT + o_i * BT + o_j
    tl.store(scores + p_score, b_scores.to(tl.bfloat16))


@triton.jit(do_not_specialize=["T", "HV", "dt_row"])
def step_kernel(
    rate,
    dt,
    dt_bias,
    log_decay,
    step,
    T,
    HV,
    dt_row,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    i_c = tl.program_id(0)
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)

    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    m_h = o_h < HV
    m_th = (o_t < n_rows)[:, None] & m_h[None, :]
    p_dt = (i_start + o_t)[:, None] * dt_row + o_h[None, :]
    b_step = tl.load(dt + p_dt, mask=m_th, other=0.0).to(tl.float32)
    b_step += tl.load(dt_bias + o_h, mask=m_h, other=0.0)[None, :]
    b_step = tl.where(m_th, softplus(b_step), 0.0)
    b_decay = b_step * tl.load(rate + o_h, mask=m_h, other=0.0)[None, :]
    b_log_decay = tl.maximum(b_decay * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
    p_step = (i_c.to(tl.int64) * HV + o_h)[None, :] * BT + o_t[:, None]
    tl.store(log_decay + p_step, b_log_decay, mask=m_h[None, :])
    tl.store(step + p_step, b_step, mask=m_h[None, :])


def launch(
    q, k, rate, dt, dt_bias, scores, log_decay, step, *, n_chunks, T, H, HV, dt_row
):
    """Launch both kernels on the current stream."""
    prepare_group_kernel[(n_chunks * H,)](
        q, k, scores, T, H, K=K, BT=BT, BK=BK,
        num_warps=4, num_stages=2,
    )
    step_kernel[(n_chunks, -(-HV // BH))](
        rate, dt, dt_bias, log_decay, step, T, HV, dt_row, BT=BT, BH=BH,
        num_warps=1,
    )
