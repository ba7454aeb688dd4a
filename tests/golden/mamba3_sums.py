"""What gradients of Mamba-3's inputs are sums of, of what `mamba3_reverse_scan` leaves of each token and head.

    dADT_t   = sum over j < t <= i of P_ji dP_ji + sum over i >= t of head_i <q_i, S dy_i>
               + sum over j < t of tail_j s_j <k_j, dS v_j> + gamma_C <S, dS>
    dturn_t  = sum of dTheta from t to the end of the chunk, less dS x S there and more by dS x S
               of the last state, and dlast_angle
    d(lambda_t dt_t) = ds_t + dc_t <q_t, k_t>,   d((1 - lambda_t) dt_t) = ds_(t - 1)

as in `mamba3_gradient`. The stage's own kernel takes a chunk, a group, a slice of channels and queries or keys: it turns
dq or dk of each head back, adds them up, and leaves what the chunk has of each head's biases in `dQ_bias_part` and
`dK_bias_part`. angles_kernel goes from a chunk's last token to its first, for 8 heads at once. tokens_kernel takes a chunk for BH heads one
after another: with X_ji = P_ji dP_ji the pairs that span t are all X_j. of j < t less all X_.i of i < t.

    DT            [B, H, T]     fp32   steps
    Trap          [B, H, T]     fp32   trapezoidal factor, before its sigmoid
    within        [B, H, T]     fp32   scratch: log2 of the decay from the chunk's start to each token
    tail_decay    [B, H, T]     fp32   scratch: decay from each token to the chunk's end
    weight_s      [B, H, T]     fp32   scratch: s
    Angles        [B, T, H, S]  fp32   rates of rotation, before tanh
    theta         [B, T, H, S]  int32  Theta of each token within its tile, in units of 2^-32 turns
    turns         [M, H, S]     int32  Theta before each tile, in units of 2^-32 turns
    dQ_head       [B, T, H, N]  bf16   scratch: gradient of each head's queries, biased and turned
    dK_head       [B, T, H, N]  bf16   scratch: gradient of each head's keys, biased and turned
    dtheta        [B, T, H, S]  fp32   scratch: gradient of each token's Theta
    sums          [B, H, 5, T]  fp32   scratch: rows of five sums of each token, by which its numbers have their gradients
    kept_part     [M, H, P]     fp32   scratch: <S, dS> of each tile and value
    dtheta_part   [M, H, 4, S]  fp32   scratch: sums of it after each tile, by quarters of the values
    dlast_angle   [n, H, S]     fp32   gradient of last_angle
    dlast_turn    [n, H, S]     fp32   what a turn of the last state's keys changes
    dQ            [B, T, G, N]  bf16   gradient of Q
    dK            [B, T, G, N]  bf16   gradient of K
    dQ_bias_part  [M, H, N]     fp32   gradient of Q_bias from each tile
    dK_bias_part  [M, H, N]     fp32   gradient of K_bias from each tile
    dADT          [B, H, T]     fp32   gradient of ADT
    dDT           [B, H, T]     fp32   gradient of DT
    dTrap         [B, H, T]     fp32   gradient of Trap
    dAngles       [B, T, H, S]  fp32   gradient of Angles

Problem: mamba3 bf16
Config:  BG=1 BH=8 BT=32 language=triton num_stages=1 num_warps=4 order=heads
Template digest a47c0e404f42da47; made by
    gdn2gen generate --dtype bf16 --with= --stage mamba3_sums --config \
      BG=1,BH=8,BT=32,language=triton,num_stages=1,num_warps=4,order=heads
"""

import triton
import triton.language as tl


BT, BH = 32, 8
N, P, S = 128, 64, 32  # channels of keys and values, and pairs that are rotated
BS = 32  # a tile of pairs
BC = 32  # channels of a slice
NO_TURN = tl.constexpr(-2147483648)  # what stands for a Theta that is no number


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
def mamba3_sums_kernel(
    turns,
    theta,
    dQ_head,
    dK_head,
    dQ,
    dK,
    dQ_bias_part,
    dK_bias_part,
    T,
    H,
    G,
    N: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """dQ or dK of a chunk, group and slice of channels: sums over heads; and what biases have of each."""
    i_part = tl.program_id(0) % 8
    i_g = tl.program_id(0) // 8 % G
    i_tile = tl.program_id(0) // 8 // G
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_before, n_left = i_t, T - i_t
    i_b = i_n
    i_row = i_b.to(tl.int64) * T + i_t
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    o_n = i_part // 2 * BC + tl.arange(0, BC)
    i_h = i_g * (H // G)
    p_head = ((i_row + o_t) * H + i_h)[:, None] * N + o_n[None, :]
    p_bias = (i_tile * H + i_h).to(tl.int64) * N + o_n
    p_group = ((i_row + o_t) * G + i_g)[:, None] * N + o_n[None, :]
    o_s = i_part // 2 * (BC // 2) + tl.arange(0, BC // 2)
    p_theta = ((i_row + o_t) * H + i_h)[:, None] * S + o_s[None, :]
    p_turns = (i_tile * H + i_h).to(tl.int64) * S + o_s
    b_sum = tl.zeros([BT, BC], tl.float32)
    if i_part % 2 == 0:
        # of the first head; then each is read while the one before it is added up
        b_next = tl.load(dQ_head + p_head, mask=m_t[:, None], other=0.0)
        b_theta_next = tl.load(theta + p_theta, mask=m_t[:, None] & (o_s < S)[None, :], other=0)
        b_before_next = tl.load(turns + p_turns, mask=(o_s < S), other=0)
        for i in range(H // G):
            b_d = b_next.to(tl.float32)
            b_theta, b_before = b_theta_next, b_before_next
            # as a block, which is what the interpreter takes for a mask
            m_next = m_t & (o_t * 0 + i + 1 < H // G)
            b_next = tl.load(dQ_head + p_head + (i + 1) * N, mask=m_next[:, None], other=0.0)
            b_theta_next = tl.load(theta + p_theta + (i + 1) * S, mask=m_next[:, None] & (o_s < S)[None, :], other=0)
            b_before_next = tl.load(turns + p_turns + (i + 1) * S, mask=(o_s < S) & (o_s * 0 + i + 1 < H // G), other=0)
            if i_part // 2 * BC < 2 * S:
                # of channels that are not rotated Theta is zero
                b_cos, b_sin = cosine_and_sine(b_theta + b_before[None, :])
                b_cos = tl.where(b_theta == NO_TURN, float("nan"), b_cos)
                b_d0, b_d1 = tl.split(tl.reshape(b_d, [BT, BC // 2, 2]))
                b_d = tl.reshape(tl.join(b_d0 * b_cos + b_d1 * b_sin, b_d1 * b_cos - b_d0 * b_sin), [BT, BC])
            b_sum += b_d
            tl.store(dQ_bias_part + p_bias + i * N, tl.sum(b_d, 0))
        tl.store(dQ + p_group, b_sum.to(tl.bfloat16), mask=m_t[:, None])
    if i_part % 2 == 1:
        # of the first head; then each is read while the one before it is added up
        b_next = tl.load(dK_head + p_head, mask=m_t[:, None], other=0.0)
        b_theta_next = tl.load(theta + p_theta, mask=m_t[:, None] & (o_s < S)[None, :], other=0)
        b_before_next = tl.load(turns + p_turns, mask=(o_s < S), other=0)
        for i in range(H // G):
            b_d = b_next.to(tl.float32)
            b_theta, b_before = b_theta_next, b_before_next
            # as a block, which is what the interpreter takes for a mask
            m_next = m_t & (o_t * 0 + i + 1 < H // G)
            b_next = tl.load(dK_head + p_head + (i + 1) * N, mask=m_next[:, None], other=0.0)
            b_theta_next = tl.load(theta + p_theta + (i + 1) * S, mask=m_next[:, None] & (o_s < S)[None, :], other=0)
            b_before_next = tl.load(turns + p_turns + (i + 1) * S, mask=(o_s < S) & (o_s * 0 + i + 1 < H // G), other=0)
            if i_part // 2 * BC < 2 * S:
                # of channels that are not rotated Theta is zero
                b_cos, b_sin = cosine_and_sine(b_theta + b_before[None, :])
                b_cos = tl.where(b_theta == NO_TURN, float("nan"), b_cos)
                b_d0, b_d1 = tl.split(tl.reshape(b_d, [BT, BC // 2, 2]))
                b_d = tl.reshape(tl.join(b_d0 * b_cos + b_d1 * b_sin, b_d1 * b_cos - b_d0 * b_sin), [BT, BC])
            b_sum += b_d
            tl.store(dK_bias_part + p_bias + i * N, tl.sum(b_d, 0))
        tl.store(dK + p_group, b_sum.to(tl.bfloat16), mask=m_t[:, None])


@triton.jit(do_not_specialize=["T", "H", "angle_row", "angle_head"])
def angles_kernel(
    DT,
    Angles,
    dlast_angle,
    dlast_turn,
    dtheta,
    dtheta_part,
    dDT,
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
    """Gradients of angles, and what dt has of its turns: from a chunk's last token to its first, a lane a pair."""
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    i_h = (tl.program_id(0) % n_blocks) * BH
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_before, n_left = i_t, T - i_t
    i_b = i_n
    i_row = i_b.to(tl.int64) * T + i_t
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    o_s = tl.arange(0, BS)
    p_dt = DT + (i_b * H + i_h).to(tl.int64) * T + i_t
    p_angle = Angles + (i_row * angle_row + i_h * angle_head) + o_s
    i_pair = (i_row * H + i_h) * S
    p_ddt = dDT + (i_b * H + i_h).to(tl.int64) * T + i_t
    p_part = dtheta_part + (i_tile * H + i_h).to(tl.int64) * (4 * S) + o_s
    p_last = (i_n * H + i_h).to(tl.int64) * S + o_s
    # nothing comes after the last tile
    m_after = o_s < tl.where(n_left > BT, S, 0)
    b_dturn0 = tl.load(dlast_angle + p_last + 0 * S)
    b_dturn0 += tl.load(dlast_turn + p_last + 0 * S, mask=m_after, other=0.0)
    b_dturn0 += tl.load(p_part + 0 * S, mask=m_after, other=0.0)
    b_dturn0 += tl.load(p_part + 1 * S, mask=m_after, other=0.0)
    b_dturn0 += tl.load(p_part + 2 * S, mask=m_after, other=0.0)
    b_dturn0 += tl.load(p_part + 3 * S, mask=m_after, other=0.0)
    b_dturn1 = tl.load(dlast_angle + p_last + 1 * S)
    b_dturn1 += tl.load(dlast_turn + p_last + 1 * S, mask=m_after, other=0.0)
    b_dturn1 += tl.load(p_part + 4 * S, mask=m_after, other=0.0)
    b_dturn1 += tl.load(p_part + 5 * S, mask=m_after, other=0.0)
    b_dturn1 += tl.load(p_part + 6 * S, mask=m_after, other=0.0)
    b_dturn1 += tl.load(p_part + 7 * S, mask=m_after, other=0.0)
    b_dturn2 = tl.load(dlast_angle + p_last + 2 * S)
    b_dturn2 += tl.load(dlast_turn + p_last + 2 * S, mask=m_after, other=0.0)
    b_dturn2 += tl.load(p_part + 8 * S, mask=m_after, other=0.0)
    b_dturn2 += tl.load(p_part + 9 * S, mask=m_after, other=0.0)
    b_dturn2 += tl.load(p_part + 10 * S, mask=m_after, other=0.0)
    b_dturn2 += tl.load(p_part + 11 * S, mask=m_after, other=0.0)
    b_dturn3 = tl.load(dlast_angle + p_last + 3 * S)
    b_dturn3 += tl.load(dlast_turn + p_last + 3 * S, mask=m_after, other=0.0)
    b_dturn3 += tl.load(p_part + 12 * S, mask=m_after, other=0.0)
    b_dturn3 += tl.load(p_part + 13 * S, mask=m_after, other=0.0)
    b_dturn3 += tl.load(p_part + 14 * S, mask=m_after, other=0.0)
    b_dturn3 += tl.load(p_part + 15 * S, mask=m_after, other=0.0)
    b_dturn4 = tl.load(dlast_angle + p_last + 4 * S)
    b_dturn4 += tl.load(dlast_turn + p_last + 4 * S, mask=m_after, other=0.0)
    b_dturn4 += tl.load(p_part + 16 * S, mask=m_after, other=0.0)
    b_dturn4 += tl.load(p_part + 17 * S, mask=m_after, other=0.0)
    b_dturn4 += tl.load(p_part + 18 * S, mask=m_after, other=0.0)
    b_dturn4 += tl.load(p_part + 19 * S, mask=m_after, other=0.0)
    b_dturn5 = tl.load(dlast_angle + p_last + 5 * S)
    b_dturn5 += tl.load(dlast_turn + p_last + 5 * S, mask=m_after, other=0.0)
    b_dturn5 += tl.load(p_part + 20 * S, mask=m_after, other=0.0)
    b_dturn5 += tl.load(p_part + 21 * S, mask=m_after, other=0.0)
    b_dturn5 += tl.load(p_part + 22 * S, mask=m_after, other=0.0)
    b_dturn5 += tl.load(p_part + 23 * S, mask=m_after, other=0.0)
    b_dturn6 = tl.load(dlast_angle + p_last + 6 * S)
    b_dturn6 += tl.load(dlast_turn + p_last + 6 * S, mask=m_after, other=0.0)
    b_dturn6 += tl.load(p_part + 24 * S, mask=m_after, other=0.0)
    b_dturn6 += tl.load(p_part + 25 * S, mask=m_after, other=0.0)
    b_dturn6 += tl.load(p_part + 26 * S, mask=m_after, other=0.0)
    b_dturn6 += tl.load(p_part + 27 * S, mask=m_after, other=0.0)
    b_dturn7 = tl.load(dlast_angle + p_last + 7 * S)
    b_dturn7 += tl.load(dlast_turn + p_last + 7 * S, mask=m_after, other=0.0)
    b_dturn7 += tl.load(p_part + 28 * S, mask=m_after, other=0.0)
    b_dturn7 += tl.load(p_part + 29 * S, mask=m_after, other=0.0)
    b_dturn7 += tl.load(p_part + 30 * S, mask=m_after, other=0.0)
    b_dturn7 += tl.load(p_part + 31 * S, mask=m_after, other=0.0)
    if angle_head == 0:
        # of the last token; then each is read while the one before it is worked on
        m_next = (BT - 1) < n_left
        b_dt0_next = tl.load(p_dt + ((BT - 1)), mask=m_next, other=0.0)
        b_angle0_next = tl.load(p_angle + ((BT - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt1_next = tl.load(p_dt + (1 * T + (BT - 1)), mask=m_next, other=0.0)
        b_dt2_next = tl.load(p_dt + (2 * T + (BT - 1)), mask=m_next, other=0.0)
        b_dt3_next = tl.load(p_dt + (3 * T + (BT - 1)), mask=m_next, other=0.0)
        b_dt4_next = tl.load(p_dt + (4 * T + (BT - 1)), mask=m_next, other=0.0)
        b_dt5_next = tl.load(p_dt + (5 * T + (BT - 1)), mask=m_next, other=0.0)
        b_dt6_next = tl.load(p_dt + (6 * T + (BT - 1)), mask=m_next, other=0.0)
        b_dt7_next = tl.load(p_dt + (7 * T + (BT - 1)), mask=m_next, other=0.0)
        b_dtheta0_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 0 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta1_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta2_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta3_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta4_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta5_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta6_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta7_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)

        for i_back in range(BT):
            t = BT - 1 - i_back
            b_dt0 = b_dt0_next
            b_rate0 = 0.5 * tanh(b_angle0_next.to(tl.float32))
            b_dt1 = b_dt1_next
            b_rate1 = b_rate0
            b_dt2 = b_dt2_next
            b_rate2 = b_rate0
            b_dt3 = b_dt3_next
            b_rate3 = b_rate0
            b_dt4 = b_dt4_next
            b_rate4 = b_rate0
            b_dt5 = b_dt5_next
            b_rate5 = b_rate0
            b_dt6 = b_dt6_next
            b_rate6 = b_rate0
            b_dt7 = b_dt7_next
            b_rate7 = b_rate0
            b_dturn0 += b_dtheta0_next
            b_dturn1 += b_dtheta1_next
            b_dturn2 += b_dtheta2_next
            b_dturn3 += b_dtheta3_next
            b_dturn4 += b_dtheta4_next
            b_dturn5 += b_dtheta5_next
            b_dturn6 += b_dtheta6_next
            b_dturn7 += b_dtheta7_next
            m_next = (t - 1 < n_left) & (t >= 1)
            b_dt0_next = tl.load(p_dt + ((t - 1)), mask=m_next, other=0.0)
            b_angle0_next = tl.load(p_angle + ((t - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt1_next = tl.load(p_dt + (1 * T + (t - 1)), mask=m_next, other=0.0)
            b_dt2_next = tl.load(p_dt + (2 * T + (t - 1)), mask=m_next, other=0.0)
            b_dt3_next = tl.load(p_dt + (3 * T + (t - 1)), mask=m_next, other=0.0)
            b_dt4_next = tl.load(p_dt + (4 * T + (t - 1)), mask=m_next, other=0.0)
            b_dt5_next = tl.load(p_dt + (5 * T + (t - 1)), mask=m_next, other=0.0)
            b_dt6_next = tl.load(p_dt + (6 * T + (t - 1)), mask=m_next, other=0.0)
            b_dt7_next = tl.load(p_dt + (7 * T + (t - 1)), mask=m_next, other=0.0)
            b_dtheta0_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 0 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta1_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta2_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta3_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta4_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta5_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta6_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta7_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)

            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (0 * T + t), 6.283185307179586 * tl.sum(b_dturn0 * b_rate0, 0), mask=t < n_left)
            b_dangle = b_dturn0 * b_dt0 * (3.141592653589793 * (1.0 - 4.0 * b_rate0 * b_rate0))
            tl.store(dAngles + i_pair + (t * (H * S) + 0 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (1 * T + t), 6.283185307179586 * tl.sum(b_dturn1 * b_rate1, 0), mask=t < n_left)
            b_dangle = b_dturn1 * b_dt1 * (3.141592653589793 * (1.0 - 4.0 * b_rate1 * b_rate1))
            tl.store(dAngles + i_pair + (t * (H * S) + 1 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (2 * T + t), 6.283185307179586 * tl.sum(b_dturn2 * b_rate2, 0), mask=t < n_left)
            b_dangle = b_dturn2 * b_dt2 * (3.141592653589793 * (1.0 - 4.0 * b_rate2 * b_rate2))
            tl.store(dAngles + i_pair + (t * (H * S) + 2 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (3 * T + t), 6.283185307179586 * tl.sum(b_dturn3 * b_rate3, 0), mask=t < n_left)
            b_dangle = b_dturn3 * b_dt3 * (3.141592653589793 * (1.0 - 4.0 * b_rate3 * b_rate3))
            tl.store(dAngles + i_pair + (t * (H * S) + 3 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (4 * T + t), 6.283185307179586 * tl.sum(b_dturn4 * b_rate4, 0), mask=t < n_left)
            b_dangle = b_dturn4 * b_dt4 * (3.141592653589793 * (1.0 - 4.0 * b_rate4 * b_rate4))
            tl.store(dAngles + i_pair + (t * (H * S) + 4 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (5 * T + t), 6.283185307179586 * tl.sum(b_dturn5 * b_rate5, 0), mask=t < n_left)
            b_dangle = b_dturn5 * b_dt5 * (3.141592653589793 * (1.0 - 4.0 * b_rate5 * b_rate5))
            tl.store(dAngles + i_pair + (t * (H * S) + 5 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (6 * T + t), 6.283185307179586 * tl.sum(b_dturn6 * b_rate6, 0), mask=t < n_left)
            b_dangle = b_dturn6 * b_dt6 * (3.141592653589793 * (1.0 - 4.0 * b_rate6 * b_rate6))
            tl.store(dAngles + i_pair + (t * (H * S) + 6 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (7 * T + t), 6.283185307179586 * tl.sum(b_dturn7 * b_rate7, 0), mask=t < n_left)
            b_dangle = b_dturn7 * b_dt7 * (3.141592653589793 * (1.0 - 4.0 * b_rate7 * b_rate7))
            tl.store(dAngles + i_pair + (t * (H * S) + 7 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))

    else:
        # of the last token; then each is read while the one before it is worked on
        m_next = (BT - 1) < n_left
        b_dt0_next = tl.load(p_dt + ((BT - 1)), mask=m_next, other=0.0)
        b_angle0_next = tl.load(p_angle + ((BT - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt1_next = tl.load(p_dt + (1 * T + (BT - 1)), mask=m_next, other=0.0)
        b_angle1_next = tl.load(p_angle + (1 * angle_head + (BT - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt2_next = tl.load(p_dt + (2 * T + (BT - 1)), mask=m_next, other=0.0)
        b_angle2_next = tl.load(p_angle + (2 * angle_head + (BT - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt3_next = tl.load(p_dt + (3 * T + (BT - 1)), mask=m_next, other=0.0)
        b_angle3_next = tl.load(p_angle + (3 * angle_head + (BT - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt4_next = tl.load(p_dt + (4 * T + (BT - 1)), mask=m_next, other=0.0)
        b_angle4_next = tl.load(p_angle + (4 * angle_head + (BT - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt5_next = tl.load(p_dt + (5 * T + (BT - 1)), mask=m_next, other=0.0)
        b_angle5_next = tl.load(p_angle + (5 * angle_head + (BT - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt6_next = tl.load(p_dt + (6 * T + (BT - 1)), mask=m_next, other=0.0)
        b_angle6_next = tl.load(p_angle + (6 * angle_head + (BT - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt7_next = tl.load(p_dt + (7 * T + (BT - 1)), mask=m_next, other=0.0)
        b_angle7_next = tl.load(p_angle + (7 * angle_head + (BT - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta0_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 0 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta1_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta2_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta3_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta4_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta5_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta6_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta7_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)

        for i_back in range(BT):
            t = BT - 1 - i_back
            b_dt0 = b_dt0_next
            b_rate0 = 0.5 * tanh(b_angle0_next.to(tl.float32))
            b_dt1 = b_dt1_next
            b_rate1 = 0.5 * tanh(b_angle1_next.to(tl.float32))
            b_dt2 = b_dt2_next
            b_rate2 = 0.5 * tanh(b_angle2_next.to(tl.float32))
            b_dt3 = b_dt3_next
            b_rate3 = 0.5 * tanh(b_angle3_next.to(tl.float32))
            b_dt4 = b_dt4_next
            b_rate4 = 0.5 * tanh(b_angle4_next.to(tl.float32))
            b_dt5 = b_dt5_next
            b_rate5 = 0.5 * tanh(b_angle5_next.to(tl.float32))
            b_dt6 = b_dt6_next
            b_rate6 = 0.5 * tanh(b_angle6_next.to(tl.float32))
            b_dt7 = b_dt7_next
            b_rate7 = 0.5 * tanh(b_angle7_next.to(tl.float32))
            b_dturn0 += b_dtheta0_next
            b_dturn1 += b_dtheta1_next
            b_dturn2 += b_dtheta2_next
            b_dturn3 += b_dtheta3_next
            b_dturn4 += b_dtheta4_next
            b_dturn5 += b_dtheta5_next
            b_dturn6 += b_dtheta6_next
            b_dturn7 += b_dtheta7_next
            m_next = (t - 1 < n_left) & (t >= 1)
            b_dt0_next = tl.load(p_dt + ((t - 1)), mask=m_next, other=0.0)
            b_angle0_next = tl.load(p_angle + ((t - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt1_next = tl.load(p_dt + (1 * T + (t - 1)), mask=m_next, other=0.0)
            b_angle1_next = tl.load(p_angle + (1 * angle_head + (t - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt2_next = tl.load(p_dt + (2 * T + (t - 1)), mask=m_next, other=0.0)
            b_angle2_next = tl.load(p_angle + (2 * angle_head + (t - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt3_next = tl.load(p_dt + (3 * T + (t - 1)), mask=m_next, other=0.0)
            b_angle3_next = tl.load(p_angle + (3 * angle_head + (t - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt4_next = tl.load(p_dt + (4 * T + (t - 1)), mask=m_next, other=0.0)
            b_angle4_next = tl.load(p_angle + (4 * angle_head + (t - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt5_next = tl.load(p_dt + (5 * T + (t - 1)), mask=m_next, other=0.0)
            b_angle5_next = tl.load(p_angle + (5 * angle_head + (t - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt6_next = tl.load(p_dt + (6 * T + (t - 1)), mask=m_next, other=0.0)
            b_angle6_next = tl.load(p_angle + (6 * angle_head + (t - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt7_next = tl.load(p_dt + (7 * T + (t - 1)), mask=m_next, other=0.0)
            b_angle7_next = tl.load(p_angle + (7 * angle_head + (t - 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta0_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 0 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta1_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta2_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta3_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta4_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta5_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta6_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta7_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)

            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (0 * T + t), 6.283185307179586 * tl.sum(b_dturn0 * b_rate0, 0), mask=t < n_left)
            b_dangle = b_dturn0 * b_dt0 * (3.141592653589793 * (1.0 - 4.0 * b_rate0 * b_rate0))
            tl.store(dAngles + i_pair + (t * (H * S) + 0 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (1 * T + t), 6.283185307179586 * tl.sum(b_dturn1 * b_rate1, 0), mask=t < n_left)
            b_dangle = b_dturn1 * b_dt1 * (3.141592653589793 * (1.0 - 4.0 * b_rate1 * b_rate1))
            tl.store(dAngles + i_pair + (t * (H * S) + 1 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (2 * T + t), 6.283185307179586 * tl.sum(b_dturn2 * b_rate2, 0), mask=t < n_left)
            b_dangle = b_dturn2 * b_dt2 * (3.141592653589793 * (1.0 - 4.0 * b_rate2 * b_rate2))
            tl.store(dAngles + i_pair + (t * (H * S) + 2 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (3 * T + t), 6.283185307179586 * tl.sum(b_dturn3 * b_rate3, 0), mask=t < n_left)
            b_dangle = b_dturn3 * b_dt3 * (3.141592653589793 * (1.0 - 4.0 * b_rate3 * b_rate3))
            tl.store(dAngles + i_pair + (t * (H * S) + 3 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (4 * T + t), 6.283185307179586 * tl.sum(b_dturn4 * b_rate4, 0), mask=t < n_left)
            b_dangle = b_dturn4 * b_dt4 * (3.141592653589793 * (1.0 - 4.0 * b_rate4 * b_rate4))
            tl.store(dAngles + i_pair + (t * (H * S) + 4 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (5 * T + t), 6.283185307179586 * tl.sum(b_dturn5 * b_rate5, 0), mask=t < n_left)
            b_dangle = b_dturn5 * b_dt5 * (3.141592653589793 * (1.0 - 4.0 * b_rate5 * b_rate5))
            tl.store(dAngles + i_pair + (t * (H * S) + 5 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (6 * T + t), 6.283185307179586 * tl.sum(b_dturn6 * b_rate6, 0), mask=t < n_left)
            b_dangle = b_dturn6 * b_dt6 * (3.141592653589793 * (1.0 - 4.0 * b_rate6 * b_rate6))
            tl.store(dAngles + i_pair + (t * (H * S) + 6 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + (7 * T + t), 6.283185307179586 * tl.sum(b_dturn7 * b_rate7, 0), mask=t < n_left)
            b_dangle = b_dturn7 * b_dt7 * (3.141592653589793 * (1.0 - 4.0 * b_rate7 * b_rate7))
            tl.store(dAngles + i_pair + (t * (H * S) + 7 * S + o_s), b_dangle.to(tl.float32), mask=o_s < tl.where(t < n_left, S, 0))


@triton.jit(do_not_specialize=["T", "H"])
def tokens_kernel(
    DT,
    Trap,
    within,
    tail_decay,
    weight_s,
    sums,
    kept_part,
    dADT,
    dDT,
    dTrap,
    T,
    H,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """Gradients of decays, dt and trap; of dt on top of what its turns have."""
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_before, n_left = i_t, T - i_t
    i_b = i_n
    i_row = i_b.to(tl.int64) * T + i_t
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    # the last token first, so that sums over all later ones go with the order
    o_t = BT - 1 - o_t
    m_t = o_t < n_left
    m_later = m_t & (o_t + n_before > 0)
    for i in range(BH):
        i_h = (tl.program_id(0) % n_blocks) * BH + i
        p_number = (i_b * H + i_h).to(tl.int64) * T + i_t + o_t
        p_sums = (i_b * H + i_h).to(tl.int64) * (5 * T) + i_t + o_t
        b_dt = tl.load(DT + p_number, mask=m_t, other=0.0)
        b_share = sigmoid(tl.load(Trap + p_number, mask=m_t, other=0.0).to(tl.float32))
        b_written = tl.load(sums + p_sums + 4 * T, mask=m_t, other=0.0)
        b_written *= tl.load(tail_decay + p_number, mask=m_t, other=0.0)
        b_down = tl.load(sums + p_sums + 1 * T, mask=m_t, other=0.0) + b_written
        b_dbefore = tl.load(sums + p_sums - 1, mask=m_later, other=0.0)
        # in another tile it has another tail
        b_tail_before = tl.load(tail_decay + p_number - 1, mask=m_later, other=0.0)
        b_dbefore += b_tail_before * tl.load(sums + p_sums + 4 * T - 1, mask=m_later, other=0.0)
        b_ddt = b_share * b_down + (1.0 - b_share) * b_dbefore
        b_dtrap = (b_down - b_dbefore) * b_dt * b_share * (1.0 - b_share)
        tl.store(dTrap + p_number, b_dtrap.to(tl.float32), mask=m_t)
        # what earlier tokens of the chunk write, less what they read: the sum of all less that of later ones
        # would be rounded where the last token writes much and all before it is forgotten
        m_inner = m_t & (o_t > 0)
        b_new = tl.where(m_inner, b_dbefore, 0.0) * tl.load(weight_s + p_number - 1, mask=m_inner, other=0.0)
        b_new -= tl.load(sums + p_sums + 2 * T - 1, mask=m_inner, other=0.0)
        # and what it and later ones read of the state
        b_head = tl.exp2(tl.load(within + p_number, mask=m_t, other=0.0))
        b_read = b_head * tl.load(sums + p_sums + 3 * T, mask=m_t, other=0.0)
        # the chunk's decay, of its last token
        b_whole = tl.sum(tl.where(o_t == tl.minimum(n_left, BT) - 1, b_head, 0.0), 0)
        b_whole *= tl.sum(tl.load(kept_part + (i_tile * H + i_h).to(tl.int64) * P + tl.arange(0, P)), 0)
        b_dadt = tl.cumsum(b_new, 0, reverse=True) + b_whole + tl.cumsum(b_read, 0)
        tl.store(dADT + p_number, b_dadt, mask=m_t)
        b_ddt += tl.load(dDT + p_number, mask=m_t, other=0.0)
        tl.store(dDT + p_number, b_ddt, mask=m_t)


def launch(
    DT, Trap, within, tail_decay, weight_s, Angles, theta, turns, dQ_head, dK_head, dtheta,
    sums, kept_part, dtheta_part, dlast_angle, dlast_turn, dQ, dK, dQ_bias_part, dK_bias_part,
    dADT, dDT, dTrap, dAngles, *, T, H, G, n_tiles, angle_row, angle_head
):
    """Gradients of B rows on the current stream."""
    mamba3_sums_kernel[(n_tiles * G * 8,)](
        turns, theta, dQ_head, dK_head, dQ, dK, dQ_bias_part, dK_bias_part, T, H, G,
        N=N, S=S, BT=BT, BC=BC, num_warps=4, num_stages=1,
    )  # fmt: skip
    angles_kernel[(n_tiles * (H // 8),)](
        DT, Angles, dlast_angle, dlast_turn, dtheta, dtheta_part, dDT, dAngles, T, H, angle_row,
        angle_head,
        S=S, BT=BT, BH=8, BS=BS, num_warps=1, num_stages=1,
    )  # fmt: skip
    tokens_kernel[(n_tiles * (H // BH),)](
        DT, Trap, within, tail_decay, weight_s, sums, kept_part, dADT, dDT, dTrap, T, H,
        P=P, BT=BT, BH=BH, num_warps=1, num_stages=1,
    )  # fmt: skip
