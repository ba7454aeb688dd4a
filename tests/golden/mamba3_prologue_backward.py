"""Gradients of Mamba-3 before its scan.

Of token t and a head, with u = R(-Theta_t) dq of row t - 1, w = R(-Theta_t) dk, and q_t, k_t biased but not rotated:

    dalpha_t = u . q_t            ds_t = w . k_t            dADT_t = ddecay_t + alpha_t dalpha_t
    dq_t     = alpha_t u + lambda_t dt_t dc_t k_t           dk_t   = s_t w + lambda_t dt_t dc_t q_t
    dTheta_t = alpha_t (u x q_t) + s_t (w x k_t),           a x b = a1 b0 - a0 b1 of each pair
    dturn_t  = sum of dTheta from t to the end of the sequence
    d(lambda_t dt_t) = ds_t + dc_t (q_t . k_t),             d((1 - lambda_t) dt_t) = ds_(t - 1)

A program takes a tile of BT tokens of one sequence, for BH heads one after another: their sum for Q and K is one
of `dQ_part` and `dK_part`, and what it adds up of each head's biases one of `dQ_bias_part` and `dK_bias_part`. Sums
of dTheta are made of sums of tiles first.

    Q             [B, T, G, N]     bf16   queries, without biases
    K             [B, T, G, N]     bf16   keys, without biases
    ADT           [B, H, T]        fp32   log decay
    DT            [B, H, T]        fp32   steps
    Trap          [B, H, T]        fp32   trapezoidal factor, before its sigmoid
    Q_bias        [H, N]           fp32   added to queries
    K_bias        [H, N]           fp32   added to keys
    Angles        [B, T, H, S]     fp32   rates of rotation, before tanh
    turns         [M, H, S]        int32  Theta before each tile, in units of 2^-32 turns
    dq            [B, T, H, N]     bf16   gradient of q, per value head
    dk            [B, T, H, N]     bf16   gradient of k, per value head
    ddecay        [B, T, H]        fp32   gradient of decay
    down          [B, T, H]        fp32   gradient of the factor of a token's own value
    dlast_angle   [n, H, S]        fp32   gradient of last_angle
    dQ_part       [R, B, T, G, N]  fp32   gradient of Q from some heads of a group
    dK_part       [R, B, T, G, N]  fp32   gradient of K from some heads of a group
    dQ_bias_part  [M, H, N]        fp32   gradient of Q_bias from each tile
    dK_bias_part  [M, H, N]        fp32   gradient of K_bias from each tile
    dADT          [B, H, T]        fp32   gradient of ADT
    dDT           [B, H, T]        fp32   gradient of DT
    dTrap         [B, H, T]        fp32   gradient of Trap
    dAngles       [B, T, H, S]     fp32   gradient of Angles
    dangle_state  [n, H, S]        fp32   gradient of angle_state
    dweight_s     [B, H, T]        fp32   scratch: gradient of s
    down_dt       [B, H, T]        fp32   scratch: gradient of lambda dt
    dtheta        [B, T, H, S]     fp32   scratch: gradient of each token's Theta
    dtheta_sums   [M, H, S]        fp32   scratch: sums of it over tiles, then over what comes after each

Problem: mamba3 bf16, skip, gate, carried
Config:  BH=8 BT=32 language=triton num_stages=1 num_warps=1
Template digest b880343f73e9fd10; made by
    gdn2gen generate --dtype bf16 --with=skip,gate,carried --stage mamba3_prologue_backward \
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


@triton.jit(do_not_specialize=["B", "T", "H", "G", "angle_row", "angle_head"])
def mamba3_prologue_backward_kernel(
    Q,
    K,
    ADT,
    DT,
    Trap,
    Q_bias,
    K_bias,
    Angles,
    turns,
    dq,
    dk,
    ddecay,
    down,
    dQ_part,
    dK_part,
    dQ_bias_part,
    dK_bias_part,
    dADT,
    dweight_s,
    down_dt,
    dtheta,
    dtheta_sums,
    B,
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
    # blocks of heads, of all groups and of one
    n_blocks, n_parts = H // BH, H // G // BH
    i_tile, i_block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_before, n_left = i_t, T - i_t
    i_b = i_n
    i_row = i_b.to(tl.int64) * T + i_t
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    m_begins = (o_t + n_before == 0) & m_t
    m_ends = o_t == n_left - 1
    m_later = m_t & (o_t + n_before > 0)
    o_s, o_c = tl.arange(0, BS), tl.arange(0, 2 * BS)
    o_r = 2 * S + tl.arange(0, BN)

    b_sum_qc = tl.zeros([BT, 2 * BS], tl.float32)
    b_sum_kc = tl.zeros([BT, 2 * BS], tl.float32)
    b_sum_qr = tl.zeros([BT, BN], tl.float32)
    b_sum_kr = tl.zeros([BT, BN], tl.float32)
    for i in range(BH):
        i_h = i_block * BH + i
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
        p_row = (i_row + o_t) * H + i_h
        p_bias = (i_tile * H + i_h).to(tl.int64) * N
        b_alpha = tl.exp(tl.load(ADT + p_number, mask=m_t, other=0.0))
        b_dc = tl.load(down + p_row, mask=m_t, other=0.0)
        b_cross, b_scale, b_factor = (b_own * b_dc)[:, None], b_weight[:, None], b_alpha[:, None]
        # sums of u q, w k and q k
        b_uq, b_wk, b_qk = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
        b_qc = tl.load(Q + p_group + o_c[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_kc = tl.load(K + p_group + o_c[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_qc += tl.load(Q_bias + i_h * N + o_c).to(tl.float32)[None, :]
        b_kc += tl.load(K_bias + i_h * N + o_c).to(tl.float32)[None, :]
        b_uc = tl.load(dq + p_head - H * N + o_c[None, :], mask=m_later[:, None], other=0.0).to(tl.float32)
        b_wc = tl.load(dk + p_head + o_c[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        p_angle = (i_row + o_t) * angle_row + i_h * angle_head
        b_rate = 0.5 * tanh(tl.load(Angles + p_angle[:, None] + o_s[None, :], mask=m_t[:, None], other=0.0).to(tl.float32))
        b_x = b_dt[:, None] * b_rate
        b_before = tl.load(turns + (i_tile * H + i_h).to(tl.int64) * S + o_s)
        b_turns = b_before[None, :] + tl.cumsum(in_int32(b_x), 0)
        b_cos, b_sin = cosine_and_sine(b_turns)
        b_cos += 0.0 * b_x  # a NaN, which is no integer
        b_u0, b_u1 = tl.split(tl.reshape(b_uc, [BT, BS, 2]))
        b_w0, b_w1 = tl.split(tl.reshape(b_wc, [BT, BS, 2]))
        b_u0, b_u1 = b_u0 * b_cos + b_u1 * b_sin, b_u1 * b_cos - b_u0 * b_sin
        b_w0, b_w1 = b_w0 * b_cos + b_w1 * b_sin, b_w1 * b_cos - b_w0 * b_sin
        b_q0, b_q1 = tl.split(tl.reshape(b_qc, [BT, BS, 2]))
        b_k0, b_k1 = tl.split(tl.reshape(b_kc, [BT, BS, 2]))
        b_dtheta = b_factor * (b_u1 * b_q0 - b_u0 * b_q1) + b_scale * (b_w1 * b_k0 - b_w0 * b_k1)
        tl.store(dtheta + p_row[:, None] * S + o_s[None, :], b_dtheta, mask=m_t[:, None])
        p_sums = dtheta_sums + (i_tile * H + i_h).to(tl.int64) * S + o_s
        tl.store(p_sums, tl.sum(b_dtheta, 0))
        b_uc, b_wc = tl.reshape(tl.join(b_u0, b_u1), [BT, 2 * BS]), tl.reshape(tl.join(b_w0, b_w1), [BT, 2 * BS])
        b_uq += tl.sum(b_uc * b_qc, 1)
        b_wk += tl.sum(b_wc * b_kc, 1)
        b_qk += tl.sum(b_qc * b_kc, 1)
        b_dqc = b_factor * b_uc + b_cross * b_kc
        b_dkc = b_scale * b_wc + b_cross * b_qc
        b_sum_qc += b_dqc
        b_sum_kc += b_dkc
        tl.store(dQ_bias_part + p_bias + o_c, tl.sum(b_dqc, 0))
        tl.store(dK_bias_part + p_bias + o_c, tl.sum(b_dkc, 0))
        b_qr = tl.load(Q + p_group + o_r[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_kr = tl.load(K + p_group + o_r[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_qr += tl.load(Q_bias + i_h * N + o_r).to(tl.float32)[None, :]
        b_kr += tl.load(K_bias + i_h * N + o_r).to(tl.float32)[None, :]
        b_ur = tl.load(dq + p_head - H * N + o_r[None, :], mask=m_later[:, None], other=0.0).to(tl.float32)
        b_wr = tl.load(dk + p_head + o_r[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_uq += tl.sum(b_ur * b_qr, 1)
        b_wk += tl.sum(b_wr * b_kr, 1)
        b_qk += tl.sum(b_qr * b_kr, 1)
        b_dqr = b_factor * b_ur + b_cross * b_kr
        b_dkr = b_scale * b_wr + b_cross * b_qr
        b_sum_qr += b_dqr
        b_sum_kr += b_dkr
        tl.store(dQ_bias_part + p_bias + o_r, tl.sum(b_dqr, 0))
        tl.store(dK_bias_part + p_bias + o_r, tl.sum(b_dkr, 0))
        b_ddecay = tl.load(ddecay + p_row, mask=m_t, other=0.0)
        tl.store(dADT + p_number, b_ddecay + b_alpha * b_uq, mask=m_t)
        tl.store(dweight_s + p_number, b_wk, mask=m_t)
        tl.store(down_dt + p_number, b_wk + b_dc * b_qk, mask=m_t)
    # blocks of a group follow each other
    i_g, i_part = i_block // n_parts, i_block % n_parts
    p_part = (((i_part * B).to(tl.int64) * T + i_row + o_t) * G + i_g)[:, None] * N
    tl.store(dQ_part + p_part + o_c[None, :], b_sum_qc, mask=m_t[:, None])
    tl.store(dK_part + p_part + o_c[None, :], b_sum_kc, mask=m_t[:, None])
    tl.store(dQ_part + p_part + o_r[None, :], b_sum_qr, mask=m_t[:, None])
    tl.store(dK_part + p_part + o_r[None, :], b_sum_kr, mask=m_t[:, None])


@triton.jit(do_not_specialize=["T", "H"])
def suffix_kernel(
    dlast_angle,
    dtheta_sums,
    dangle_state,
    T,
    H,
    S: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """In place of a tile's sum, that of what comes after the tile."""
    i_n, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    o_s = tl.arange(0, BS)
    NT = tl.cdiv(T, BT)
    i_begin, i_end = i_n * NT, (i_n + 1) * NT

    p_state = (i_n * H + i_h).to(tl.int64) * S + o_s
    b_sum = tl.load(dlast_angle + p_state)
    for i_0 in range(0, i_end - i_begin, AHEAD):
        o_i = i_end - 1 - i_0 - tl.arange(0, AHEAD)
        p_sums = dtheta_sums + (o_i * H + i_h).to(tl.int64)[:, None] * S + o_s[None, :]
        m_sums = (o_i >= i_begin)[:, None]
        b_tiles = tl.load(p_sums, mask=m_sums, other=0.0)
        b_until = tl.cumsum(b_tiles, 0)
        tl.store(p_sums, b_sum[None, :] + (b_until - b_tiles), mask=m_sums)
        b_sum += tl.sum(b_tiles, 0)
    tl.store(dangle_state + p_state, b_sum)


@triton.jit(do_not_specialize=["T", "H", "angle_row", "angle_head"])
def numbers_kernel(
    DT,
    Trap,
    Angles,
    dweight_s,
    down_dt,
    dtheta,
    dtheta_sums,
    dDT,
    dTrap,
    dAngles,
    T,
    H,
    angle_row,
    angle_head,
    S: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
):
    """Gradients of dt, trap and angles."""
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_before, n_left = i_t, T - i_t
    i_b = i_n
    i_row = i_b.to(tl.int64) * T + i_t
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
        b_share = sigmoid(tl.load(Trap + p_number, mask=m_t, other=0.0).to(tl.float32))
        b_down = tl.load(down_dt + p_number, mask=m_t, other=0.0)
        b_dbefore = tl.load(dweight_s + p_number - 1, mask=m_later, other=0.0)
        b_ddt = b_share * b_down + (1.0 - b_share) * b_dbefore
        b_dtrap = (b_down - b_dbefore) * b_dt * b_share * (1.0 - b_share)
        tl.store(dTrap + p_number, b_dtrap.to(tl.float32), mask=m_t)
        p_angle = (i_row + o_t) * angle_row + i_h * angle_head
        b_rate = 0.5 * tanh(tl.load(Angles + p_angle[:, None] + o_s[None, :], mask=m_t[:, None], other=0.0).to(tl.float32))
        b_x = b_dt[:, None] * b_rate
        p_dangle = ((i_row + o_t) * H + i_h)[:, None] * S + o_s[None, :]
        b_dtheta = tl.load(dtheta + p_dangle, mask=m_t[:, None], other=0.0)
        p_sums = dtheta_sums + (i_tile * H + i_h).to(tl.int64) * S + o_s
        b_after = tl.load(p_sums)
        b_dturn = b_after[None, :] + tl.cumsum(b_dtheta, 0, reverse=True)
        b_ddt += 6.283185307179586 * tl.sum(b_dturn * b_rate, 1)
        # rate is half of tanh
        b_slope = 3.141592653589793 * (1.0 - 4.0 * b_rate * b_rate)
        b_dangle = b_dturn * b_dt[:, None] * b_slope
        tl.store(dAngles + p_dangle, b_dangle.to(tl.float32), mask=m_t[:, None])
        tl.store(dDT + p_number, b_ddt, mask=m_t)


def launch(
    Q, K, ADT, DT, Trap, Q_bias, K_bias, Angles, turns, dq, dk, ddecay, down, dlast_angle,
    dQ_part, dK_part, dQ_bias_part, dK_bias_part, dADT, dDT, dTrap, dAngles, dangle_state,
    dweight_s, down_dt, dtheta, dtheta_sums, *, B, T, H, G, n_tiles, n_sequences, angle_row,
    angle_head
):
    """Gradients of B rows on the current stream."""
    n_programs = n_tiles * (H // BH)
    mamba3_prologue_backward_kernel[(n_programs,)](
        Q, K, ADT, DT, Trap, Q_bias, K_bias, Angles, turns, dq, dk, ddecay, down, dQ_part,
        dK_part, dQ_bias_part, dK_bias_part, dADT, dweight_s, down_dt, dtheta, dtheta_sums, B,
        T, H, G, angle_row, angle_head,
        N=N, S=S, BT=BT, BH=BH, BN=BN, BS=BS,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    suffix_kernel[(n_sequences * H,)](
        dlast_angle, dtheta_sums, dangle_state, T, H,
        S=S, BT=BT, BS=BS, AHEAD=AHEAD, num_warps=1, num_stages=1,
    )  # fmt: skip
    numbers_kernel[(n_programs,)](
        DT, Trap, Angles, dweight_s, down_dt, dtheta, dtheta_sums, dDT, dTrap, dAngles, T, H,
        angle_row, angle_head,
        S=S, BT=BT, BH=BH, BS=BS, num_warps=4, num_stages=1,
    )  # fmt: skip
