"""Mamba-3 before its scan: biases, rotation, weights.

    Theta_t  = Theta_(t - 1) + dt_t pi tanh(angle_t)           mod 2 pi
    q_t      = R(Theta_t) (Q_t + Q_bias),   k_t likewise
    s_t      = lambda_t dt_t + (1 - lambda_(t + 1)) dt_(t + 1),   lambda = sigmoid(trap)

and of row t, for the scan: exp(ADT_(t + 1)) q_(t + 1), s_t k_t, ADT_t, and beside it c_t = lambda_t dt_t (q_t . k_t) + D.
In the last row of a sequence the query is 0, and s lambda dt.

A program takes a tile of BT tokens of one sequence, for BH heads one after another. Angles are added up in turns,
in units of 2^-32 as int32: sums of tiles first, then what comes before each.

    Q            [B, T, G, N]  bf16   queries, without biases
    K            [B, T, G, N]  bf16   keys, without biases
    ADT          [B, H, T]     fp32   log decay
    DT           [B, H, T]     fp32   steps
    Trap         [B, H, T]     fp32   trapezoidal factor, before its sigmoid
    Q_bias       [H, N]        fp32   added to queries
    K_bias       [H, N]        fp32   added to keys
    Angles       [B, T, H, S]  fp32   rates of rotation, before tanh
    D            [H]           fp32   factor of a token's own value, added to o
    angle_state  [n, H, S]     fp32   Theta before the first token, radians
    tiles        [M, 4]        int32  sequence and first token of each tile, tokens before it and from it on
    tile_starts  [n+1]         int32  first tile of each sequence
    q            [B, T, H, N]  bf16   queries
    k            [B, T, H, N]  bf16   keys
    decay        [B, T, H]     fp32   log decay of each token
    own          [B, T, H]     fp32   factor of a token's own value in its output
    turns        [M, H, S]     int32  Theta before each tile, in units of 2^-32 turns
    last_angle   [n, H, S]     fp32   Theta after the last token, radians

Problem: mamba3 bf16, skip, gate, carried, packed
Config:  BH=8 BT=32 language=triton num_stages=1 num_warps=1
Template digest 62e0dba1081798d2; made by
    gdn2gen generate --dtype bf16 --with=skip,gate,carried,packed --stage mamba3_prologue \
      --config BH=8,BT=32,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BH = 32, 8
N, S = 128, 32  # channels of a head, and pairs of them that are rotated
BN, BS = 64, 32  # tiles of what is not rotated, and of pairs
AHEAD = 16  # tiles whose angles are added up at once


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


@triton.jit(do_not_specialize=["T", "H", "angle_row", "angle_head"])
def turns_kernel(
    DT,
    Angles,
    tiles,
    turns,
    T,
    H,
    angle_row,
    angle_head,
    S: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
):
    """By how much each tile turns."""
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    # of each tile: its sequence, first token, tokens of the sequence before that, and from that on
    i_n, i_t = tl.load(tiles + i_tile * 4), tl.load(tiles + i_tile * 4 + 1)
    n_before, n_left = tl.load(tiles + i_tile * 4 + 2), tl.load(tiles + i_tile * 4 + 3)
    i_b = 0
    i_row = i_t.to(tl.int64)
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    m_begins = (o_t + n_before == 0) & m_t
    m_ends = o_t == n_left - 1
    m_later = m_t & (o_t + n_before > 0)
    o_s = tl.arange(0, BS)
    for i in range(BH):
        i_h = (tl.program_id(0) % n_blocks) * BH + i
        p_number = (i_b * H + i_h).to(tl.int64) * T + i_t + o_t
        b_dt = tl.load(DT + p_number, mask=m_t, other=0.0)
        p_angle = (i_row + o_t) * angle_row + i_h * angle_head
        b_rate = 0.5 * tanh(tl.load(Angles + p_angle[:, None] + o_s[None, :], mask=m_t[:, None], other=0.0).to(tl.float32))
        b_x = b_dt[:, None] * b_rate
        p_turns = turns + (i_tile * H + i_h).to(tl.int64) * S + o_s
        tl.store(p_turns, tl.sum(in_int32(b_x), 0))


@triton.jit(do_not_specialize=["T", "H"])
def prefix_kernel(
    angle_state,
    tile_starts,
    turns,
    last_angle,
    T,
    H,
    S: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """In place of how much a tile turns, Theta before it; and Theta after the last one."""
    i_n, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    o_s = tl.arange(0, BS)
    i_begin, i_end = tl.load(tile_starts + i_n), tl.load(tile_starts + i_n + 1)

    p_state = angle_state + (i_n * H + i_h).to(tl.int64) * S + o_s
    b_angle = tl.load(p_state)
    b_sum = in_int32(b_angle * 0.15915494309189535)  # 1 / 2 pi
    for i_0 in range(i_begin, i_end, AHEAD):
        o_i = i_0 + tl.arange(0, AHEAD)
        p_turns = turns + (o_i * H + i_h).to(tl.int64)[:, None] * S + o_s[None, :]
        m_turns = (o_i < i_end)[:, None]
        b_tiles = tl.load(p_turns, mask=m_turns, other=0)
        tl.store(p_turns, b_sum[None, :] + tl.cumsum(b_tiles, 0) - b_tiles, mask=m_turns)
        b_sum += tl.sum(b_tiles, 0)
    b_last = b_sum.to(tl.float32)
    b_last = tl.where(b_last < 0.0, b_last + 4294967296.0, b_last) * 1.4629180792671596e-09  # pi / 2^31
    b_last = tl.where(i_begin < i_end, b_last, b_angle)
    tl.store(last_angle + (i_n * H + i_h).to(tl.int64) * S + o_s, b_last)


@triton.jit(do_not_specialize=["T", "H", "G", "angle_row", "angle_head"])
def mamba3_prologue_kernel(
    Q,
    K,
    ADT,
    DT,
    Trap,
    Q_bias,
    K_bias,
    Angles,
    D,
    tiles,
    q,
    k,
    decay,
    own,
    turns,
    T,
    H,
    G,
    angle_row,
    angle_head,
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
    m_begins = (o_t + n_before == 0) & m_t
    m_ends = o_t == n_left - 1
    m_later = m_t & (o_t + n_before > 0)
    o_s, o_c = tl.arange(0, BS), tl.arange(0, 2 * BS)
    o_r = 2 * S + tl.arange(0, BN)

    for i in range(BH):
        i_h = (tl.program_id(0) % n_blocks) * BH + i
        p_number = (i_b * H + i_h).to(tl.int64) * T + i_t + o_t
        p_group = ((i_row + o_t) * G + i_h // (H // G))[:, None] * N
        p_head = ((i_row + o_t) * H + i_h)[:, None] * N
        b_dt = tl.load(DT + p_number, mask=m_t, other=0.0)
        b_share = sigmoid(tl.load(Trap + p_number, mask=m_t, other=0.0).to(tl.float32))
        b_own = b_share * b_dt
        m_next = o_t < n_left - 1
        b_dt_next = tl.load(DT + p_number + 1, mask=m_next, other=0.0)
        b_trap_next = tl.load(Trap + p_number + 1, mask=m_next, other=0.0).to(tl.float32)
        b_weight = b_own + sigmoid(-b_trap_next) * b_dt_next
        b_adt = tl.load(ADT + p_number, mask=m_t, other=0.0)
        b_alpha = tl.exp(b_adt)[:, None]
        b_scale = b_weight[:, None]
        b_dot = tl.zeros([BT], tl.float32)
        b_qr = tl.load(Q + p_group + o_r[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_kr = tl.load(K + p_group + o_r[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_qr += tl.load(Q_bias + i_h * N + o_r).to(tl.float32)[None, :]
        b_kr += tl.load(K_bias + i_h * N + o_r).to(tl.float32)[None, :]
        b_dot += tl.sum(b_qr * b_kr, 1)
        # the query goes to the row before
        tl.store(q + p_head - H * N + o_r[None, :], (b_alpha * b_qr).to(tl.bfloat16), mask=m_later[:, None])
        tl.store(k + p_head + o_r[None, :], (b_scale * b_kr).to(tl.bfloat16), mask=m_t[:, None])
        b_qc = tl.load(Q + p_group + o_c[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_kc = tl.load(K + p_group + o_c[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_qc += tl.load(Q_bias + i_h * N + o_c).to(tl.float32)[None, :]
        b_kc += tl.load(K_bias + i_h * N + o_c).to(tl.float32)[None, :]
        b_dot += tl.sum(b_qc * b_kc, 1)
        p_angle = (i_row + o_t) * angle_row + i_h * angle_head
        b_rate = 0.5 * tanh(tl.load(Angles + p_angle[:, None] + o_s[None, :], mask=m_t[:, None], other=0.0).to(tl.float32))
        b_x = b_dt[:, None] * b_rate
        b_before = tl.load(turns + (i_tile * H + i_h).to(tl.int64) * S + o_s)
        b_turns = b_before[None, :] + tl.cumsum(in_int32(b_x), 0)
        b_cos, b_sin = cosine_and_sine(b_turns)
        b_cos += 0.0 * b_x  # a NaN, which is no integer
        b_q0, b_q1 = tl.split(tl.reshape(b_alpha * b_qc, [BT, BS, 2]))
        b_qc = tl.reshape(tl.join(b_q0 * b_cos - b_q1 * b_sin, b_q0 * b_sin + b_q1 * b_cos), [BT, 2 * BS])
        tl.store(q + p_head - H * N + o_c[None, :], b_qc.to(tl.bfloat16), mask=m_later[:, None])
        b_k0, b_k1 = tl.split(tl.reshape(b_scale * b_kc, [BT, BS, 2]))
        b_kc = tl.reshape(tl.join(b_k0 * b_cos - b_k1 * b_sin, b_k0 * b_sin + b_k1 * b_cos), [BT, 2 * BS])
        tl.store(k + p_head + o_c[None, :], b_kc.to(tl.bfloat16), mask=m_t[:, None])
        if n_left <= BT:
            # nothing comes after the last token
            b_none = tl.zeros([BT, 2 * BS], tl.bfloat16)
            tl.store(q + p_head + o_c[None, :], b_none, mask=m_ends[:, None])
            b_none = tl.zeros([BT, BN], tl.bfloat16)
            tl.store(q + p_head + o_r[None, :], b_none, mask=m_ends[:, None])
        p_row = (i_row + o_t) * H + i_h
        tl.store(decay + p_row, b_adt, mask=m_t)
        b_dot *= b_own
        b_dot += tl.load(D + i_h).to(tl.float32)
        tl.store(own + p_row, b_dot, mask=m_t)


def launch(
    Q, K, ADT, DT, Trap, Q_bias, K_bias, Angles, D, angle_state, tiles, tile_starts, q, k,
    decay, own, turns, last_angle, *, B, T, H, G, n_tiles, n_sequences, angle_row, angle_head
):
    """Prepare the scan of sequences that are packed in one row on the current stream."""
    n_programs = n_tiles * (H // BH)
    turns_kernel[(n_programs,)](
        DT, Angles, tiles, turns, T, H, angle_row, angle_head,
        S=S, BT=BT, BH=BH, BS=BS, num_warps=1, num_stages=1,
    )  # fmt: skip
    prefix_kernel[(n_sequences * H,)](
        angle_state, tile_starts, turns, last_angle, T, H,
        S=S, BT=BT, BS=BS, AHEAD=AHEAD, num_warps=1, num_stages=1,
    )  # fmt: skip
    mamba3_prologue_kernel[(n_programs,)](
        Q, K, ADT, DT, Trap, Q_bias, K_bias, Angles, D, tiles, q, k, decay, own, turns, T, H, G,
        angle_row, angle_head,
        N=N, S=S, BT=BT, BH=BH, BN=BN, BS=BS,
        num_warps=1, num_stages=1,
    )  # fmt: skip
