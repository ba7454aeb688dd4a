"""Gradients of Mamba-3's states: after each chunk of a sequence, and before the first.

    q_t   = R(Theta_t) (Q_t + Q_bias)
    dy_t  = dout_t silu(z_t)
    dS^T <- dS^T gamma_C + (dy^T head) q

head is the decay from the chunk's start to a token, gamma_C over all of it. One program per sequence, head and
slice of values: it goes from the last chunk to the first, turns queries as it reads them, and holds the gradient
transposed, [BV, channels], in registers.

    Q             [B, T, G, N]  bf16   queries, without biases
    ADT           [B, H, T]     fp32   log decay
    Q_bias        [H, N]        fp32   added to queries
    theta         [B, T, H, S]  int32  Theta of each token within its tile, in units of 2^-32 turns
    turns         [M, H, S]     int32  Theta before each tile, in units of 2^-32 turns
    Z             [B, T, H, P]  bf16   output gate, before SiLU
    dout          [B, T, H, P]  bf16   gradient of out
    dfinal_ssm    [n, H, P, N]  fp32   gradient of final_ssm
    tiles         [M, 4]        int32  sequence and first token of each tile, tokens before it and from it on
    tile_starts   [n+1]         int32  first tile of each sequence
    dh            [M, H, P, N]  bf16   gradient of the state at the chunk's end, transposed
    dinitial_ssm  [n, H, P, N]  fp32   gradient of initial_ssm

Problem: mamba3 bf16, skip, gate, carried, packed
Config:  BT=32 BV=64 language=triton num_stages=1 num_warps=1
Template digest d801ed2f4fd75b84; made by
    gdn2gen generate --dtype bf16 --with=skip,gate,carried,packed --stage mamba3_reverse_states \
      --config BT=32,BV=64,language=triton,num_stages=1,num_warps=1
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
def mamba3_reverse_states_kernel(
    Q,
    ADT,
    Q_bias,
    theta,
    turns,
    Z,
    dout,
    dfinal_ssm,
    tiles,
    tile_starts,
    dh,
    dinitial_ssm,
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
    i_begin, i_end = tl.load(tile_starts + i_n), tl.load(tile_starts + i_n + 1)

    # of one without tokens there is no tile
    i_t = tl.load(tiles + i_begin * 4 + 1, mask=i_begin < i_end, other=0)
    n_tokens = tl.load(tiles + i_begin * 4 + 3, mask=i_begin < i_end, other=0)
    p_numbers, i_rows = i_h.to(tl.int64) * T + i_t, i_t.to(tl.int64)
    o_t = tl.arange(0, BT)
    o_s, o_c = tl.arange(0, BS), tl.arange(0, 2 * BS)
    o_r = 2 * S + tl.arange(0, BN)

    b_bias_c = tl.load(Q_bias + i_h * N + o_c).to(tl.float32)[None, :]
    b_bias_r = tl.load(Q_bias + i_h * N + o_r).to(tl.float32)[None, :]
    p_state = i_nh.to(tl.int64) * P * N + o_v[:, None] * N
    b_dSc = tl.load(dfinal_ssm + p_state + o_c[None, :])
    b_dSr = tl.load(dfinal_ssm + p_state + o_r[None, :])

    # of the last chunk; then each is read while the one after it is worked on
    n_chunks = i_end - i_begin
    i_next = n_chunks - 1
    o_next = i_next * BT + o_t
    m_next = (o_next >= 0) & (o_next < n_tokens)
    p_next = ((i_rows + o_next) * G + i_h // (H // G))[:, None] * N
    b_qc_next = tl.load(Q + p_next + o_c[None, :], mask=m_next[:, None], other=0.0)
    b_qr_next = tl.load(Q + p_next + o_r[None, :], mask=m_next[:, None], other=0.0)
    p_next = ((i_rows + o_next) * H + i_h)[:, None] * S + o_s[None, :]
    b_theta_next = tl.load(theta + p_next, mask=m_next[:, None], other=0)
    i_next += i_begin
    p_next = turns + (i_next * H + i_h).to(tl.int64) * S + o_s
    n_turns = tl.where((i_next >= i_begin) & (i_next < i_end), S, 0)
    b_before_next = tl.load(p_next, mask=o_s < n_turns, other=0)
    b_adt_next = tl.load(ADT + p_numbers + o_next, mask=m_next, other=0.0)
    p_next = ((i_rows + o_next) * H + i_h)[None, :] * P + o_v[:, None]
    b_dout_next = tl.load(dout + p_next, mask=m_next[None, :], other=0.0)
    b_z_next = tl.load(Z + p_next, mask=m_next[None, :], other=0.0)

    for i_back in range(n_chunks):
        i = n_chunks - 1 - i_back
        b_qc = b_qc_next
        b_qr = b_qr_next
        b_theta = b_theta_next
        b_before = b_before_next
        b_adt = b_adt_next
        b_dout = b_dout_next
        b_z = b_z_next

        i_next = i - 1
        o_next = i_next * BT + o_t
        m_next = (o_next >= 0) & (o_next < n_tokens)
        p_next = ((i_rows + o_next) * G + i_h // (H // G))[:, None] * N
        b_qc_next = tl.load(Q + p_next + o_c[None, :], mask=m_next[:, None], other=0.0)
        b_qr_next = tl.load(Q + p_next + o_r[None, :], mask=m_next[:, None], other=0.0)
        p_next = ((i_rows + o_next) * H + i_h)[:, None] * S + o_s[None, :]
        b_theta_next = tl.load(theta + p_next, mask=m_next[:, None], other=0)
        i_next += i_begin
        p_next = turns + (i_next * H + i_h).to(tl.int64) * S + o_s
        n_turns = tl.where((i_next >= i_begin) & (i_next < i_end), S, 0)
        b_before_next = tl.load(p_next, mask=o_s < n_turns, other=0)
        b_adt_next = tl.load(ADT + p_numbers + o_next, mask=m_next, other=0.0)
        p_next = ((i_rows + o_next) * H + i_h)[None, :] * P + o_v[:, None]
        b_dout_next = tl.load(dout + p_next, mask=m_next[None, :], other=0.0)
        b_z_next = tl.load(Z + p_next, mask=m_next[None, :], other=0.0)

        b_cos, b_sin = cosine_and_sine(b_theta + b_before[None, :])
        b_cos = tl.where(b_theta == NO_TURN, float("nan"), b_cos)
        b_qc = b_qc.to(tl.float32) + b_bias_c
        b_x0, b_x1 = tl.split(tl.reshape(b_qc, [BT, BS, 2]))
        b_qc = tl.reshape(tl.join(b_x0 * b_cos - b_x1 * b_sin, b_x1 * b_cos + b_x0 * b_sin), [BT, 2 * BS])
        b_qc = b_qc.to(tl.bfloat16)
        b_qr = b_qr.to(tl.float32) + b_bias_r
        b_qr = b_qr.to(tl.bfloat16)

        b_log_decay = tl.maximum(b_adt * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
        b_head = tl.exp2(tl.cumsum(b_log_decay, 0))
        b_gamma = tl.exp2(tl.sum(b_log_decay, 0))
        b_dy = b_dout.to(tl.float32) * b_head[None, :]
        b_zf = b_z.to(tl.float32)
        b_dy *= b_zf * sigmoid(b_zf)
        b_dyd = b_dy.to(tl.bfloat16)
        p_h = ((i_begin + i) * H + i_h).to(tl.int64) * P * N + o_v[:, None] * N
        tl.store(dh + p_h + o_c[None, :], b_dSc.to(tl.bfloat16))
        b_dSc = tl.dot(b_dyd, b_qc, b_dSc * b_gamma)
        tl.store(dh + p_h + o_r[None, :], b_dSr.to(tl.bfloat16))
        b_dSr = tl.dot(b_dyd, b_qr, b_dSr * b_gamma)

    tl.store(dinitial_ssm + p_state + o_c[None, :], b_dSc)
    tl.store(dinitial_ssm + p_state + o_r[None, :], b_dSr)


def launch(
    Q, ADT, Q_bias, theta, turns, Z, dout, dfinal_ssm, tiles, tile_starts, dh, dinitial_ssm, *,
    T, H, G, n_sequences
):
    """Gradients of states of sequences that are packed in one row on the current stream."""
    mamba3_reverse_states_kernel[(n_sequences * H * 1,)](
        Q, ADT, Q_bias, theta, turns, Z, dout, dfinal_ssm, tiles, tile_starts, dh, dinitial_ssm,
        T, H, G,
        N=N, P=P, S=S, BT=BT, BV=BV, BN=BN, BS=BS,
        num_warps=1, num_stages=1,
    )  # fmt: skip
