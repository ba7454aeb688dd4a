"""One token of Mamba-3, of each sequence.

    Theta' = Theta + dt pi tanh(angle)                     mod 2 pi
    q      = R(Theta') (Q + Q_bias),   k' likewise
    h'     = exp(ADT) (h + (1 - lambda) dt v k^T) + lambda dt v' k'^T,   lambda = sigmoid(trap)
    out    = (h' q + D v') silu(z)

A program takes BR rows of a head's state: it reads them once and writes them once.

    Q            [B, G, N]     bf16  queries, without biases
    K            [B, G, N]     bf16  keys, without biases
    V            [B, H, P]     bf16  values
    ADT          [B, H]        fp32  log decay
    DT           [B, H]        fp32  steps
    Trap         [B, H]        fp32  trapezoidal factor, before its sigmoid
    Q_bias       [H, N]        fp32  added to queries
    K_bias       [H, N]        fp32  added to keys
    Angles       [B, H, S]     fp32  rates of rotation, before tanh
    D            [H]           fp32  factor of a token's own value, added to o
    Z            [B, H, P]     bf16  output gate, before SiLU
    angle_state  [B, H, S]     fp32  Theta before the first token, radians
    ssm_state    [B, H, P, N]  fp32  state before the token
    k_state      [B, H, N]     fp32  key of the token before, biased and rotated
    v_state      [B, H, P]     fp32  value of the token before
    out          [B, H, P]     bf16  output
    last_angle   [B, H, S]     fp32  Theta after the last token, radians
    last_ssm     [B, H, P, N]  fp32  state after the token
    last_k       [B, H, N]     fp32  key of the token, biased and rotated

Problem: mamba3 bf16, skip, gate, carried
Config:  BR=32 BT=1 language=triton num_stages=1 num_warps=1
Template digest 78bc194cd71c44b2; made by
    gdn2gen generate --dtype bf16 --with=skip,gate,carried --stage mamba3_step --config \
      BR=32,BT=1,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BR = 32
N, P, S = 128, 64, 32  # channels of keys, of values, and pairs that are rotated
BN, BS = 64, 32  # tiles of what is not rotated, and of pairs


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), fp32."""
    # approximate to 2 units in the last place; -log2(e), 1.0
    asm: tl.constexpr = """{
        .reg .f32 t;
        mul.ftz.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.ftz.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
    }"""
    return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh(x):
    """fp32, to 2e-7 of its value."""
    a = tl.abs(x)
    t = tl.exp(-2.0 * a)
    x2 = x * x
    # by its series where 1 - t would lose digits
    s = -0.053968253968 + x2 * 0.021869488536
    s = a * (1.0 + x2 * (-0.333333333333 + x2 * (0.133333333333 + x2 * s)))
    y = tl.where(a < 0.3, s, (1.0 - t) / (1.0 + t))
    return tl.where(x < 0.0, -y, y)


@triton.jit
def in_int32(x):
    """x turns in units of 2^-32."""
    x -= tl.floor(x + 0.5)
    return tl.floor(tl.minimum(x * 4294967296.0, 2147483520.0) + 0.5).to(tl.int32)


@triton.jit
def cosine_and_sine(n):
    """Of n turns in units of 2^-32; off by 5e-7."""
    x = n.to(tl.float32) * 1.4629180792671596e-09  # pi / 2^31
    cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return cos, sin


@triton.jit(do_not_specialize=["B", "H", "G"])
def mamba3_step_kernel(
    Q,
    K,
    V,
    ADT,
    DT,
    Trap,
    Q_bias,
    K_bias,
    Angles,
    D,
    Z,
    angle_state,
    ssm_state,
    k_state,
    v_state,
    out,
    last_angle,
    last_ssm,
    last_k,
    B,
    H,
    G,
    N: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
):
    n_blocks = tl.cdiv(P, BR)
    i_bh, i_p = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    i_b, i_h = i_bh // H, i_bh % H
    o_p = i_p * BR + tl.arange(0, BR)
    m_p = o_p < P
    o_s, o_c = tl.arange(0, BS), tl.arange(0, 2 * BS)
    o_r = 2 * S + tl.arange(0, BN)

    i_head = i_bh.to(tl.int64)
    p_group = (i_b * G + i_h // (H // G)).to(tl.int64) * N

    b_dt = tl.load(DT + i_bh)
    b_share = sigmoid(tl.load(Trap + i_bh).to(tl.float32))
    b_alpha = tl.exp(tl.load(ADT + i_bh))
    b_v = tl.load(V + i_head * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_before = b_alpha * (1.0 - b_share) * b_dt * tl.load(v_state + i_head * P + o_p, mask=m_p, other=0.0)
    b_now = b_share * b_dt * b_v
    b_y = tl.zeros([BR], tl.float32)
    b_q = tl.load(Q + p_group + o_c).to(tl.float32)[None, :] + tl.load(Q_bias + i_h * N + o_c).to(tl.float32)[None, :]
    b_k = tl.load(K + p_group + o_c).to(tl.float32)[None, :] + tl.load(K_bias + i_h * N + o_c).to(tl.float32)[None, :]
    b_rate = 0.5 * tanh(tl.load(Angles + i_head * S + o_s).to(tl.float32))
    b_angle = tl.load(angle_state + i_head * S + o_s)
    b_turns = in_int32(b_angle * 0.15915494309189535) + in_int32(b_dt * b_rate)  # 1 / 2 pi
    b_cos, b_sin = cosine_and_sine(b_turns)
    b_cos += 0.0 * b_rate  # a NaN, which is no integer
    b_q0, b_q1 = tl.split(tl.reshape(b_q, [BS, 2]))
    b_k0, b_k1 = tl.split(tl.reshape(b_k, [BS, 2]))
    b_q = tl.reshape(tl.join(b_q0 * b_cos - b_q1 * b_sin, b_q0 * b_sin + b_q1 * b_cos), [1, 2 * BS])
    b_k = tl.reshape(tl.join(b_k0 * b_cos - b_k1 * b_sin, b_k0 * b_sin + b_k1 * b_cos), [1, 2 * BS])
    if i_p == 0:
        b_last = b_turns.to(tl.float32)
        b_last = tl.where(b_last < 0.0, b_last + 4294967296.0, b_last) * 1.4629180792671596e-09  # pi / 2^31
        tl.store(last_angle + i_head * S + o_s, b_last)
    b_k_before = tl.load(k_state + i_head * N + o_c).to(tl.float32)[None, :]
    p_state = (i_head * P + o_p)[:, None] * N + o_c[None, :]
    b_h = tl.load(ssm_state + p_state, mask=m_p[:, None], other=0.0)
    b_h = b_alpha * b_h + b_before[:, None] * b_k_before + b_now[:, None] * b_k
    b_y += tl.sum(b_h * b_q, 1)
    tl.store(last_ssm + p_state, b_h, mask=m_p[:, None])
    if i_p == 0:
        tl.store(last_k + i_head * N + o_c[None, :], b_k)
    b_q = tl.load(Q + p_group + o_r).to(tl.float32)[None, :] + tl.load(Q_bias + i_h * N + o_r).to(tl.float32)[None, :]
    b_k = tl.load(K + p_group + o_r).to(tl.float32)[None, :] + tl.load(K_bias + i_h * N + o_r).to(tl.float32)[None, :]
    b_k_before = tl.load(k_state + i_head * N + o_r).to(tl.float32)[None, :]
    p_state = (i_head * P + o_p)[:, None] * N + o_r[None, :]
    b_h = tl.load(ssm_state + p_state, mask=m_p[:, None], other=0.0)
    b_h = b_alpha * b_h + b_before[:, None] * b_k_before + b_now[:, None] * b_k
    b_y += tl.sum(b_h * b_q, 1)
    tl.store(last_ssm + p_state, b_h, mask=m_p[:, None])
    if i_p == 0:
        tl.store(last_k + i_head * N + o_r[None, :], b_k)
    b_y += tl.load(D + i_h).to(tl.float32) * b_v
    b_z = tl.load(Z + i_head * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_y *= b_z * sigmoid(b_z)
    tl.store(out + i_head * P + o_p, b_y.to(tl.bfloat16), mask=m_p)


def launch(
    Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, angle_state, ssm_state, k_state,
    v_state, out, last_angle, last_ssm, last_k, *, B, H, G
):
    """One token of B sequences on the current stream."""
    mamba3_step_kernel[(B * H * triton.cdiv(P, BR),)](
        Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, angle_state, ssm_state, k_state,
        v_state, out, last_angle, last_ssm, last_k, B, H, G,
        N=N, P=P, S=S, BR=BR, BN=BN, BS=BS,
        num_warps=1, num_stages=1,
    )  # fmt: skip
