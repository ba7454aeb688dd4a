"""What gradients of Mamba-3's inputs are sums of, of what `mamba3_reverse_scan` leaves of each token and head.

    dADT_t   = sum over j < t <= i of P_ji dP_ji + sum over i >= t of head_i <q_i, S dy_i>
               + sum over j < t of tail_j s_j <k_j, dS v_j> + gamma_C <S, dS>
    dturn_t  = sum of dTheta from t to the end of the chunk, less dS x S there and more by dS x S
               of the last state, and dlast_angle
    d(lambda_t dt_t) = ds_t + dc_t <q_t, k_t>,   d((1 - lambda_t) dt_t) = ds_(t - 1)

as in `mamba3_gradient`. The stage's own kernel takes a chunk, a group and a slice of channels, and goes from token to
token with all heads of the group at once: it turns dq and dk back, adds heads up, and leaves what the chunk has of each
head's biases in `dQ_bias_part` and `dK_bias_part`. angles_kernel goes back from token to token likewise. tokens_kernel has what is of tokens
alone: with X_ji = P_ji dP_ji the pairs that span t are all X_j. of j < t less all X_.i of i < t.

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
Config:  BG=64 BH=8 BT=32 language=triton num_stages=3 num_warps=8 order=tokens
Template digest 31fd2c40fe4a8e54; made by
    gdn2gen generate --dtype bf16 --with= --stage mamba3_sums --config \
      BG=64,BH=8,BT=32,language=triton,num_stages=3,num_warps=8,order=tokens
"""

import triton
import triton.language as tl


BT, BH, BG = 32, 8, 64
N, P, S = 128, 64, 32  # channels of keys and values, and pairs that are rotated
BR = 4  # heads of a program that has numbers of tokens
BP, BS = 64, 32  # tiles of values and of pairs
BC = 64  # channels of a slice
STAGES = 3  # tokens of which loads are under way, less one
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


@triton.jit
def added(a0, a1, a2, a3, b0, b1, b2, b3):
    """Four sums at once, for one barrier; as one of four numbers a lane a warp's would meet in one bank."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def packed(even, odd):
    """Two numbers of 16 bits in one of 32."""
    low, high = even.to(tl.bfloat16).to(tl.int16, bitcast=True), odd.to(tl.bfloat16).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 65535) | (high.to(tl.int32) << 16)


# of what is known to be aligned a lane would have four pairs, and sums over heads would go through lanes: 837
# instructions a token instead of 683
@triton.jit(
    do_not_specialize=["T", "H", "G"],
    do_not_specialize_on_alignment=["turns", "theta", "dQ_head", "dK_head"],
)
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
    BG: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ and dK of a chunk, group and slice of channels: sums over heads; and what biases have of each."""
    i_slice = tl.program_id(0) % 2
    i_g = tl.program_id(0) // 2 % G
    i_tile = tl.program_id(0) // 2 // G
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_tokens = tl.minimum(T - i_t, BT)
    i_row = i_n.to(tl.int64) * T + i_t
    i_h = i_g * (H // G)
    o_h, o_s = tl.arange(0, BG), i_slice * (BC // 2) + tl.arange(0, BC // 2)
    # what is of all of a row is added to the pointer, so that threads add 32 bits
    o_all = tl.arange(0, BG * (BC // 2))
    o_heads, o_pairs = o_all // (BC // 2), i_slice * (BC // 2) + o_all % (BC // 2)
    o_row = o_heads * (N // 2) + o_pairs
    p_q = dQ_head.to(tl.pointer_type(tl.int32)) + (i_row * H + i_h) * (N // 2)
    p_k = dK_head.to(tl.pointer_type(tl.int32)) + (i_row * H + i_h) * (N // 2)
    p_dq = dQ.to(tl.pointer_type(tl.int32)) + (i_row * G + i_g) * (N // 2) + o_s
    p_dk = dK.to(tl.pointer_type(tl.int32)) + (i_row * G + i_g) * (N // 2) + o_s
    b_q0_bias = tl.zeros([BG, BC // 2], tl.float32)
    b_q1_bias = tl.zeros([BG, BC // 2], tl.float32)
    b_k0_bias = tl.zeros([BG, BC // 2], tl.float32)
    b_k1_bias = tl.zeros([BG, BC // 2], tl.float32)
    if i_slice < 1:
        o_pair = o_heads * S + o_pairs
        p_theta = theta + (i_row * H + i_h) * S
        # Theta of channels that are not rotated is zero
        b_before = tl.reshape(tl.load(turns + (i_tile * H + i_h).to(tl.int64) * S + o_pair), [BG, BC // 2])
        for _ in tl.range(0, n_tokens, num_stages=STAGES):
            b_q = tl.reshape(tl.load(p_q + o_row), [BG, BC // 2])
            # two numbers of 16 bits, which are the upper halves of what they are in fp32
            b_q0 = (b_q << 16).to(tl.float32, bitcast=True)
            b_q1 = (b_q & -65536).to(tl.float32, bitcast=True)
            b_k = tl.reshape(tl.load(p_k + o_row), [BG, BC // 2])
            # two numbers of 16 bits, which are the upper halves of what they are in fp32
            b_k0 = (b_k << 16).to(tl.float32, bitcast=True)
            b_k1 = (b_k & -65536).to(tl.float32, bitcast=True)
            b_theta = tl.reshape(tl.load(p_theta + o_pair), [BG, BC // 2])
            b_cos, b_sin = cosine_and_sine(b_theta + b_before)
            b_cos = tl.where(b_theta == NO_TURN, float("nan"), b_cos)
            b_q0, b_q1 = b_q0 * b_cos + b_q1 * b_sin, b_q1 * b_cos - b_q0 * b_sin
            b_k0, b_k1 = b_k0 * b_cos + b_k1 * b_sin, b_k1 * b_cos - b_k0 * b_sin
            p_theta += H * S
            b_q0_bias += b_q0
            b_q1_bias += b_q1
            b_k0_bias += b_k0
            b_k1_bias += b_k1
            b_q0, b_q1, b_k0, b_k1 = tl.reduce((b_q0, b_q1, b_k0, b_k1), 0, added)
            tl.store(p_dq, packed(b_q0, b_q1))
            tl.store(p_dk, packed(b_k0, b_k1))
            p_q += H * (N // 2)
            p_k += H * (N // 2)
            p_dq += G * (N // 2)
            p_dk += G * (N // 2)
    if i_slice >= 1:
        for _ in tl.range(0, n_tokens, num_stages=STAGES):
            b_q = tl.reshape(tl.load(p_q + o_row), [BG, BC // 2])
            # two numbers of 16 bits, which are the upper halves of what they are in fp32
            b_q0 = (b_q << 16).to(tl.float32, bitcast=True)
            b_q1 = (b_q & -65536).to(tl.float32, bitcast=True)
            b_k = tl.reshape(tl.load(p_k + o_row), [BG, BC // 2])
            # two numbers of 16 bits, which are the upper halves of what they are in fp32
            b_k0 = (b_k << 16).to(tl.float32, bitcast=True)
            b_k1 = (b_k & -65536).to(tl.float32, bitcast=True)
            b_q0_bias += b_q0
            b_q1_bias += b_q1
            b_k0_bias += b_k0
            b_k1_bias += b_k1
            b_q0, b_q1, b_k0, b_k1 = tl.reduce((b_q0, b_q1, b_k0, b_k1), 0, added)
            tl.store(p_dq, packed(b_q0, b_q1))
            tl.store(p_dk, packed(b_k0, b_k1))
            p_q += H * (N // 2)
            p_k += H * (N // 2)
            p_dq += G * (N // 2)
            p_dk += G * (N // 2)
    # channel by channel as lanes have them
    p_bias = (i_tile * H + i_h).to(tl.int64) * N + 2 * (o_h[:, None] * (N // 2) + o_s[None, :])
    tl.store(dQ_bias_part + p_bias, b_q0_bias)
    tl.store(dQ_bias_part + p_bias + 1, b_q1_bias)
    tl.store(dK_bias_part + p_bias, b_k0_bias)
    tl.store(dK_bias_part + p_bias + 1, b_k1_bias)


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
    STAGES: tl.constexpr,
):
    """Gradients of angles, and what dt has of its turns: of BH heads from a chunk's last token to its first."""
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    i_h = (tl.program_id(0) % n_blocks) * BH
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_tokens = tl.minimum(T - i_t, BT)
    i_last = i_n.to(tl.int64) * T + i_t + n_tokens - 1
    o_h, o_s = tl.arange(0, BH), tl.arange(0, BS)
    o_pair = o_h[:, None] * S + o_s[None, :]
    p_last = (i_n * H + i_h).to(tl.int64) * S + o_pair
    p_part = dtheta_part + (i_tile * H + i_h).to(tl.int64) * (4 * S) + (o_h[:, None] * (4 * S) + o_s[None, :])
    # nothing comes after the last tile
    m_after = (o_h >= 0)[:, None] & (o_s < tl.where(i_t + BT < T, S, 0))[None, :]
    b_dturn = tl.load(dlast_angle + p_last)
    b_dturn += tl.load(dlast_turn + p_last, mask=m_after, other=0.0)
    for quarter in tl.static_range(4):
        b_dturn += tl.load(p_part + quarter * S, mask=m_after, other=0.0)
    i_number = (i_n * H + i_h).to(tl.int64) * T + i_t + n_tokens - 1
    p_dt, p_ddt = DT + i_number, dDT + i_number
    p_dtheta, p_dangle = dtheta + (i_last * H + i_h) * S, dAngles + (i_last * H + i_h) * S
    p_angle = Angles + (i_last * angle_row + i_h * angle_head)
    if angle_head == 0:
        for _ in tl.range(0, n_tokens, num_stages=STAGES):
            b_dturn += tl.load(p_dtheta + o_pair)
            b_angle = tl.load(p_angle + o_s)
            b_rate = 0.5 * tanh(b_angle.to(tl.float32))[None, :]
            b_dt = tl.load(p_dt + o_h * T)
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + o_h * T, 6.283185307179586 * tl.sum(b_dturn * b_rate, 1))
            b_dangle = b_dturn * b_dt[:, None] * (3.141592653589793 * (1.0 - 4.0 * b_rate * b_rate))
            tl.store(p_dangle + o_pair, b_dangle.to(tl.float32))
            p_dtheta -= H * S
            p_dangle -= H * S
            p_angle -= angle_row
            p_dt -= 1
            p_ddt -= 1
    else:
        for _ in tl.range(0, n_tokens, num_stages=STAGES):
            b_dturn += tl.load(p_dtheta + o_pair)
            b_angle = tl.load(p_angle + (o_h[:, None] * angle_head + o_s[None, :]))
            b_rate = 0.5 * tanh(b_angle.to(tl.float32))
            b_dt = tl.load(p_dt + o_h * T)
            # rate is half of tanh, a turn 2 pi
            tl.store(p_ddt + o_h * T, 6.283185307179586 * tl.sum(b_dturn * b_rate, 1))
            b_dangle = b_dturn * b_dt[:, None] * (3.141592653589793 * (1.0 - 4.0 * b_rate * b_rate))
            tl.store(p_dangle + o_pair, b_dangle.to(tl.float32))
            p_dtheta -= H * S
            p_dangle -= H * S
            p_angle -= angle_row
            p_dt -= 1
            p_ddt -= 1


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
    BP: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
):
    """Gradients of decays, dt and trap, of BR heads at once; of dt on top of what its turns have."""
    n_blocks = H // BR
    i_tile = tl.program_id(0) // n_blocks
    i_h = (tl.program_id(0) % n_blocks) * BR
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    o_h, o_t, o_v = tl.arange(0, BR)[:, None], tl.arange(0, BT)[None, :], tl.arange(0, BP)[None, :]
    m_t = (o_t < T - i_t) & (o_h >= 0)
    m_later, m_inner = m_t & (o_t + i_t > 0), m_t & (o_t > 0)
    p_number = (i_n * H + i_h).to(tl.int64) * T + i_t + (o_h * T + o_t)
    p_sums = (i_n * H + i_h).to(tl.int64) * (5 * T) + i_t + (o_h * (5 * T) + o_t)
    # all that is read before anything is written, so that no load waits for a store
    b_dt = tl.load(DT + p_number, mask=m_t, other=0.0)
    b_trap = tl.load(Trap + p_number, mask=m_t, other=0.0).to(tl.float32)
    b_within = tl.load(within + p_number, mask=m_t, other=0.0)
    b_tail = tl.load(tail_decay + p_number, mask=m_t, other=0.0)
    # in another tile it has another tail
    b_tail_before = tl.load(tail_decay + p_number - 1, mask=m_later, other=0.0)
    b_weight_before = tl.load(weight_s + p_number - 1, mask=m_inner, other=0.0)
    b_down = tl.load(sums + p_sums + 1 * T, mask=m_t, other=0.0)
    b_written = tl.load(sums + p_sums + 4 * T, mask=m_t, other=0.0)
    b_written_before = tl.load(sums + p_sums + 4 * T - 1, mask=m_later, other=0.0)
    b_dbefore = tl.load(sums + p_sums - 1, mask=m_later, other=0.0)
    b_dread_before = tl.load(sums + p_sums + 2 * T - 1, mask=m_inner, other=0.0)
    b_read = tl.load(sums + p_sums + 3 * T, mask=m_t, other=0.0)
    p_kept = kept_part + (i_tile * H + i_h).to(tl.int64) * P + (o_h * P + o_v)
    b_kept = tl.load(p_kept)
    b_ddt = tl.load(dDT + p_number, mask=m_t, other=0.0)
    b_share = sigmoid(b_trap)
    b_down += b_written * b_tail
    b_dbefore += b_tail_before * b_written_before
    b_dtrap = (b_down - b_dbefore) * b_dt * b_share * (1.0 - b_share)
    b_ddt += b_share * b_down + (1.0 - b_share) * b_dbefore
    # what earlier tokens of the chunk write, less what they read: the sum of all less that of later ones
    # would be rounded where the last token writes much and all before it is forgotten
    b_new = tl.where(m_inner, b_dbefore, 0.0) * b_weight_before - b_dread_before
    # and what it and later ones read of the state
    b_head = tl.exp2(b_within)
    b_read *= b_head
    # the chunk's decay, of its last token
    b_whole = tl.sum(tl.where(o_t == tl.minimum(T - i_t, BT) - 1, b_head, 0.0), 1) * tl.sum(b_kept, 1)
    b_dadt = tl.cumsum(b_new, 1) + b_whole[:, None] + tl.cumsum(b_read, 1, reverse=True)
    tl.store(dTrap + p_number, b_dtrap.to(tl.float32), mask=m_t)
    tl.store(dDT + p_number, b_ddt, mask=m_t)
    tl.store(dADT + p_number, b_dadt, mask=m_t)


def launch(
    DT, Trap, within, tail_decay, weight_s, Angles, theta, turns, dQ_head, dK_head, dtheta,
    sums, kept_part, dtheta_part, dlast_angle, dlast_turn, dQ, dK, dQ_bias_part, dK_bias_part,
    dADT, dDT, dTrap, dAngles, *, T, H, G, n_tiles, angle_row, angle_head
):
    """Gradients of B rows on the current stream."""
    mamba3_sums_kernel[(n_tiles * G * 2,)](
        turns, theta, dQ_head, dK_head, dQ, dK, dQ_bias_part, dK_bias_part, T, H, G,
        N=N, S=S, BT=BT, BC=BC, BG=BG, STAGES=STAGES, num_warps=8, num_stages=3,
    )  # fmt: skip
    angles_kernel[(n_tiles * (H // BH),)](
        DT, Angles, dlast_angle, dlast_turn, dtheta, dtheta_part, dDT, dAngles, T, H, angle_row,
        angle_head,
        S=S, BT=BT, BH=BH, BS=BS, STAGES=STAGES, num_warps=1, num_stages=1,
    )  # fmt: skip
    tokens_kernel[(n_tiles * (H // BR),)](
        DT, Trap, within, tail_decay, weight_s, sums, kept_part, dADT, dDT, dTrap, T, H,
        P=P, BP=BP, BT=BT, BR=BR, num_warps=1, num_stages=1,
    )  # fmt: skip
