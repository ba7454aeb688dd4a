"""Mamba-3's states: before each chunk of a sequence, and after the last.

    k_t  = R(Theta_t) (K_t + K_bias)
    s_t  = lambda_t dt_t + (1 - lambda_(t + 1)) dt_(t + 1),   lambda = sigmoid(trap)
    S^T <- S^T gamma_C + (v^T tail s) k

tail is the decay from a token to the chunk's end, gamma_C over all of it. Of the last token of a sequence s is
lambda dt. One program per sequence, head and slice of values: it goes from chunk to chunk, turns keys as it reads
them, and holds the state transposed, [BV, channels], in registers.

    K          [B, T, G, N]  bf16   keys, without biases
    V          [B, T, H, P]  bf16   values
    ADT        [B, H, T]     fp32   log decay
    DT         [B, H, T]     fp32   steps
    Trap       [B, H, T]     fp32   trapezoidal factor, before its sigmoid
    K_bias     [H, N]        fp32   added to keys
    theta      [B, T, H, S]  int32  Theta of each token within its tile, in units of 2^-32 turns
    turns      [M, H, S]     int32  Theta before each tile, in units of 2^-32 turns
    h          [M, H, P, N]  bf16   state at the chunk's start, transposed
    final_ssm  [n, H, P, N]  fp32   state after the last token

Problem: mamba3 bf16
Config:  BT=32 BV=64 language=triton num_stages=1 num_warps=1
Template digest f430a2aca0200c35; made by
    gdn2gen generate --dtype bf16 --with= --stage mamba3_states --config \
      BT=32,BV=64,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BV = 32, 64
N, P, S = 128, 64, 32  # channels of keys and values, and pairs that are rotated
BN, BS = 64, 32  # tiles of what is not rotated, and of pairs
NO_TURN = tl.constexpr(-2147483648)  # what stands for a Theta that is no number
LOG2E = tl.constexpr(1.4426950408889634)
# a decay below it is none that a sum in fp32 could show, and differences stay numbers
SMALLEST_LOG2 = tl.constexpr(-150.0)


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


@triton.jit(do_not_specialize=["T", "H", "G"])
def mamba3_states_kernel(
    K,
    V,
    ADT,
    DT,
    Trap,
    K_bias,
    theta,
    turns,
    h,
    final_ssm,
    T,
    H,
    G,
    N: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
):
    o_v = (tl.program_id(0) % 1) * BV + tl.arange(0, BV)
    i_nh = tl.program_id(0) // 1
    i_n, i_h = i_nh // H, i_nh % H
    NT = tl.cdiv(T, BT)
    i_begin, i_end = i_n * NT, (i_n + 1) * NT

    n_tokens = T
    p_numbers, i_rows = i_nh.to(tl.int64) * T, i_n.to(tl.int64) * T
    o_t = tl.arange(0, BT)
    o_s, o_c = tl.arange(0, BS), tl.arange(0, 2 * BS)
    o_r = 2 * S + tl.arange(0, BN)

    b_bias_c = tl.load(K_bias + i_h * N + o_c).to(tl.float32)[None, :]
    b_bias_r = tl.load(K_bias + i_h * N + o_r).to(tl.float32)[None, :]
    p_state = i_nh.to(tl.int64) * P * N + o_v[:, None] * N
    b_Sc = tl.zeros([BV, 2 * BS], tl.float32)
    b_Sr = tl.zeros([BV, BN], tl.float32)

    # of the first chunk; then each is read while the one before it is worked on
    i_next = tl.cast(0, tl.int32)
    o_next = i_next * BT + o_t
    m_next = (o_next >= 0) & (o_next < n_tokens)
    p_next = ((i_rows + o_next) * G + i_h // (H // G))[:, None] * N
    b_kc_next = tl.load(K + p_next + o_c[None, :], mask=m_next[:, None], other=0.0)
    b_kr_next = tl.load(K + p_next + o_r[None, :], mask=m_next[:, None], other=0.0)
    p_next = ((i_rows + o_next) * H + i_h)[:, None] * S + o_s[None, :]
    b_theta_next = tl.load(theta + p_next, mask=m_next[:, None], other=0)
    i_next += i_begin
    p_next = turns + (i_next * H + i_h).to(tl.int64) * S + o_s
    n_turns = tl.where((i_next >= i_begin) & (i_next < i_end), S, 0)
    b_before_next = tl.load(p_next, mask=o_s < n_turns, other=0)
    b_adt_next = tl.load(ADT + p_numbers + o_next, mask=m_next, other=0.0)
    p_next = p_numbers + o_next
    b_dt_next = tl.load(DT + p_next, mask=m_next, other=0.0)
    b_trap_next = tl.load(Trap + p_next, mask=m_next, other=0.0).to(tl.float32)
    m_after = o_next < n_tokens - 1
    b_dt_after_next = tl.load(DT + p_next + 1, mask=m_after, other=0.0)
    b_trap_after_next = tl.load(Trap + p_next + 1, mask=m_after, other=0.0).to(tl.float32)
    p_next = ((i_rows + o_next) * H + i_h)[None, :] * P + o_v[:, None]
    b_v_next = tl.load(V + p_next, mask=m_next[None, :], other=0.0)

    for i in range(i_end - i_begin):
        b_kc = b_kc_next
        b_kr = b_kr_next
        b_theta = b_theta_next
        b_before = b_before_next
        b_adt = b_adt_next
        b_v = b_v_next
        b_dt = b_dt_next
        b_trap = b_trap_next
        b_dt_after = b_dt_after_next
        b_trap_after = b_trap_after_next

        i_next = i + 1
        o_next = i_next * BT + o_t
        m_next = (o_next >= 0) & (o_next < n_tokens)
        p_next = ((i_rows + o_next) * G + i_h // (H // G))[:, None] * N
        b_kc_next = tl.load(K + p_next + o_c[None, :], mask=m_next[:, None], other=0.0)
        b_kr_next = tl.load(K + p_next + o_r[None, :], mask=m_next[:, None], other=0.0)
        p_next = ((i_rows + o_next) * H + i_h)[:, None] * S + o_s[None, :]
        b_theta_next = tl.load(theta + p_next, mask=m_next[:, None], other=0)
        i_next += i_begin
        p_next = turns + (i_next * H + i_h).to(tl.int64) * S + o_s
        n_turns = tl.where((i_next >= i_begin) & (i_next < i_end), S, 0)
        b_before_next = tl.load(p_next, mask=o_s < n_turns, other=0)
        b_adt_next = tl.load(ADT + p_numbers + o_next, mask=m_next, other=0.0)
        p_next = p_numbers + o_next
        b_dt_next = tl.load(DT + p_next, mask=m_next, other=0.0)
        b_trap_next = tl.load(Trap + p_next, mask=m_next, other=0.0).to(tl.float32)
        m_after = o_next < n_tokens - 1
        b_dt_after_next = tl.load(DT + p_next + 1, mask=m_after, other=0.0)
        b_trap_after_next = tl.load(Trap + p_next + 1, mask=m_after, other=0.0).to(tl.float32)
        p_next = ((i_rows + o_next) * H + i_h)[None, :] * P + o_v[:, None]
        b_v_next = tl.load(V + p_next, mask=m_next[None, :], other=0.0)
        b_cos, b_sin = cosine_and_sine(b_theta + b_before[None, :])
        b_cos = tl.where(b_theta == NO_TURN, float("nan"), b_cos)
        b_kc = b_kc.to(tl.float32) + b_bias_c
        b_x0, b_x1 = tl.split(tl.reshape(b_kc, [BT, BS, 2]))
        b_kc = tl.reshape(tl.join(b_x0 * b_cos - b_x1 * b_sin, b_x1 * b_cos + b_x0 * b_sin), [BT, 2 * BS])
        b_kc = b_kc.to(tl.bfloat16)
        b_kr = b_kr.to(tl.float32) + b_bias_r
        b_kr = b_kr.to(tl.bfloat16)

        b_weight = sigmoid(b_trap) * b_dt + sigmoid(-b_trap_after) * b_dt_after
        b_log_decay = tl.maximum(b_adt * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
        b_tail = tl.exp2(tl.cumsum(b_log_decay, 0, reverse=True) - b_log_decay) * b_weight
        b_gamma = tl.exp2(tl.sum(b_log_decay, 0))
        b_vs = (b_v.to(tl.float32) * b_tail[None, :]).to(tl.bfloat16)
        p_h = ((i_begin + i) * H + i_h).to(tl.int64) * P * N + o_v[:, None] * N
        tl.store(h + p_h + o_c[None, :], b_Sc.to(tl.bfloat16))
        b_Sc = tl.dot(b_vs, b_kc, b_Sc * b_gamma)
        tl.store(h + p_h + o_r[None, :], b_Sr.to(tl.bfloat16))
        b_Sr = tl.dot(b_vs, b_kr, b_Sr * b_gamma)

    tl.store(final_ssm + p_state + o_c[None, :], b_Sc)
    tl.store(final_ssm + p_state + o_r[None, :], b_Sr)


def launch(
    K, V, ADT, DT, Trap, K_bias, theta, turns, h, final_ssm, *, T, H, G, n_sequences
):
    """States of B rows on the current stream."""
    mamba3_states_kernel[(n_sequences * H * 1,)](
        K, V, ADT, DT, Trap, K_bias, theta, turns, h, final_ssm, T, H, G,
        N=N, P=P, S=S, BT=BT, BV=BV, BN=BN, BS=BS,
        num_warps=1, num_stages=1,
    )  # fmt: skip
