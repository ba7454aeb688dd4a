"""What all products of Mamba-3 read as it lies: queries and keys of each head, and numbers of each token and head.

    q_t = R(Theta_t) (Q_t + Q_bias),   k_t = R(Theta_t) (K_t + K_bias)
    s_t = lambda_t dt_t + (1 - lambda_(t + 1)) dt_(t + 1),   lambda = sigmoid(trap)

Of the last token of a sequence s is lambda dt. A program takes a chunk of BT tokens, for BH heads of a group one after
another. weights_kernel makes the numbers: log2 of the decay from the chunk's start, the decay to its end, s, lambda dt.

    Q           [B, T, G, N]  bf16   queries, without biases
    K           [B, T, G, N]  bf16   keys, without biases
    Q_bias      [H, N]        fp32   added to queries
    K_bias      [H, N]        fp32   added to keys
    ADT         [B, H, T]     fp32   log decay
    DT          [B, H, T]     fp32   steps
    Trap        [B, H, T]     fp32   trapezoidal factor, before its sigmoid
    theta       [B, T, H, S]  int32  Theta of each token within its tile, in units of 2^-32 turns
    turns       [M, H, S]     int32  Theta before each tile, in units of 2^-32 turns
    tiles       [M, 4]        int32  sequence and first token of each tile, tokens before it and from it on
    q           [B, T, H, N]  bf16   queries
    k           [B, T, H, N]  bf16   keys
    within      [B, H, T]     fp32   scratch: log2 of the decay from the chunk's start to each token
    tail_decay  [B, H, T]     fp32   scratch: decay from each token to the chunk's end
    weight_s    [B, H, T]     fp32   scratch: s
    own_dt      [B, H, T]     fp32   scratch: lambda dt

Problem: mamba3 bf16, skip, gate, carried, packed
Config:  BH=1 BT=32 language=triton num_stages=1 num_warps=1
Template digest e9d0d1f6b2133620; made by
    gdn2gen generate --dtype bf16 --with=skip,gate,carried,packed --stage mamba3_rotate --config \
      BH=1,BT=32,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BH = 32, 1
N, S = 128, 32  # channels, and pairs of them that are rotated
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


@triton.jit(do_not_specialize=["T", "H"])
def weights_kernel(
    ADT,
    DT,
    Trap,
    tiles,
    within,
    tail_decay,
    weight_s,
    own_dt,
    T,
    H,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """Of each token and head log2 of the decay from the chunk's start, the decay to its end, s, and lambda dt."""
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    # of each tile: its sequence, first token, tokens of the sequence before that, and from that on
    i_n, i_t = tl.load(tiles + i_tile * 4), tl.load(tiles + i_tile * 4 + 1)
    n_before, n_left = tl.load(tiles + i_tile * 4 + 2), tl.load(tiles + i_tile * 4 + 3)
    i_b = 0
    i_row = i_t.to(tl.int64)
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    o_h = (tl.program_id(0) % n_blocks) * BH + tl.arange(0, BH)
    p_number = (i_b * H + o_h)[:, None].to(tl.int64) * T + i_t + o_t[None, :]
    m_number = m_t[None, :] & (o_h < H)[:, None]
    m_next = (o_t < n_left - 1)[None, :] & (o_h < H)[:, None]
    b_own = sigmoid(tl.load(Trap + p_number, mask=m_number, other=0.0).to(tl.float32))
    b_own *= tl.load(DT + p_number, mask=m_number, other=0.0)
    b_trap = tl.load(Trap + p_number + 1, mask=m_next, other=0.0).to(tl.float32)
    b_next = sigmoid(-b_trap) * tl.load(DT + p_number + 1, mask=m_next, other=0.0)
    b_adt = tl.load(ADT + p_number, mask=m_number, other=0.0)
    b_log_decay = tl.maximum(b_adt * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
    tl.store(within + p_number, tl.cumsum(b_log_decay, 1), mask=m_number)
    b_tail = tl.exp2(tl.cumsum(b_log_decay, 1, reverse=True) - b_log_decay)
    tl.store(tail_decay + p_number, b_tail, mask=m_number)
    tl.store(weight_s + p_number, b_own + b_next, mask=m_number)
    tl.store(own_dt + p_number, b_own, mask=m_number)


@triton.jit(do_not_specialize=["T", "H", "G"])
def mamba3_rotate_kernel(
    Q,
    K,
    Q_bias,
    K_bias,
    theta,
    turns,
    tiles,
    q,
    k,
    T,
    H,
    G,
    N: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
):
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    # of each tile: its sequence, first token, tokens of the sequence before that, and from that on
    i_n, i_t = tl.load(tiles + i_tile * 4), tl.load(tiles + i_tile * 4 + 1)
    n_before, n_left = tl.load(tiles + i_tile * 4 + 2), tl.load(tiles + i_tile * 4 + 3)
    i_b = 0
    i_row = i_t.to(tl.int64)
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    o_s, o_c = tl.arange(0, BS), tl.arange(0, 2 * BS)
    o_r = 2 * S + tl.arange(0, BN)

    for i in range(BH):
        i_h = (tl.program_id(0) % n_blocks) * BH + i
        i_group = (i_row * G + i_h // (H // G)) * N
        i_token = i_row * H + i_h
        o_head = (o_t * (H * N))[:, None]
        p_theta = (o_t * (H * S))[:, None] + o_s[None, :]
        b_theta = tl.load(theta + i_token * S + p_theta, mask=m_t[:, None], other=0)
        p_turns = turns + (i_tile * H + i_h).to(tl.int64) * S + o_s
        b_before = tl.load(p_turns)
        b_cos, b_sin = cosine_and_sine(b_theta + b_before[None, :])
        b_cos = tl.where(b_theta == NO_TURN, float("nan"), b_cos)
        b_x = tl.load(Q + i_group + (o_t * (G * N))[:, None] + o_c[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_x += tl.load(Q_bias + i_h * N + o_c).to(tl.float32)[None, :]
        b_x0, b_x1 = tl.split(tl.reshape(b_x, [BT, BS, 2]))
        b_x = tl.reshape(tl.join(b_x0 * b_cos - b_x1 * b_sin, b_x1 * b_cos + b_x0 * b_sin), [BT, 2 * BS])
        tl.store(q + i_token * N + (o_head + o_c[None, :]), b_x.to(tl.bfloat16), mask=m_t[:, None])
        b_x = tl.load(K + i_group + (o_t * (G * N))[:, None] + o_c[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_x += tl.load(K_bias + i_h * N + o_c).to(tl.float32)[None, :]
        b_x0, b_x1 = tl.split(tl.reshape(b_x, [BT, BS, 2]))
        b_x = tl.reshape(tl.join(b_x0 * b_cos - b_x1 * b_sin, b_x1 * b_cos + b_x0 * b_sin), [BT, 2 * BS])
        tl.store(k + i_token * N + (o_head + o_c[None, :]), b_x.to(tl.bfloat16), mask=m_t[:, None])
        b_x = tl.load(Q + i_group + (o_t * (G * N))[:, None] + o_r[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_x += tl.load(Q_bias + i_h * N + o_r).to(tl.float32)[None, :]
        tl.store(q + i_token * N + (o_head + o_r[None, :]), b_x.to(tl.bfloat16), mask=m_t[:, None])
        b_x = tl.load(K + i_group + (o_t * (G * N))[:, None] + o_r[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_x += tl.load(K_bias + i_h * N + o_r).to(tl.float32)[None, :]
        tl.store(k + i_token * N + (o_head + o_r[None, :]), b_x.to(tl.bfloat16), mask=m_t[:, None])


def launch(
    Q, K, Q_bias, K_bias, ADT, DT, Trap, theta, turns, tiles, q, k, within, tail_decay,
    weight_s, own_dt, *, T, H, G, n_tiles
):
    """q and k of sequences that are packed in one row on the current stream."""
    weights_kernel[(n_tiles * (H // BH),)](
        ADT, DT, Trap, tiles, within, tail_decay, weight_s, own_dt, T, H,
        BT=BT, BH=BH, num_warps=1, num_stages=1,
    )  # fmt: skip
    mamba3_rotate_kernel[(n_tiles * (H // BH),)](
        Q, K, Q_bias, K_bias, theta, turns, tiles, q, k, T, H, G,
        N=N, S=S, BT=BT, BH=BH, BN=BN, BS=BS,
        num_warps=1, num_stages=1,
    )  # fmt: skip
