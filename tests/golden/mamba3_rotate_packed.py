


"""What all products of Mamba-3 read as it lies: queries and keys of each head, and numbers of each token and head.

    q_t = R(Theta_t) (Q_t + Q_bias),   k_t = R(Theta_t) (K_t + K_bias)
    s_t = lambda_t dt_t + (1 - lambda_(t + 1)) dt_(t + 1),   lambda = sigmoid(trap)

Of the last token of a sequence s is lambda dt. A program takes a chunk of BT tokens, for BH heads of a group at once: a
token after the other, and a lane a pair of channels, so that Theta is added up within lanes. It is left for the backward
where `keep` is not 0; one that is no number is the smallest int32, which no other is. weights_kernel makes the numbers: log2 of the decay from the chunk's start, the decay to its end, s, lambda dt.

    Q           [B, T, G, N]  bf16   queries, without biases
    K           [B, T, G, N]  bf16   keys, without biases
    Q_bias      [H, N]        fp32   added to queries
    K_bias      [H, N]        fp32   added to keys
    ADT         [B, H, T]     fp32   log decay
    DT          [B, H, T]     fp32   steps
    Trap        [B, H, T]     fp32   trapezoidal factor, before its sigmoid
    Angles      [B, T, H, S]  fp32   rates of rotation, before tanh
    turns       [M, H, S]     int32  Theta before each tile, in units of 2^-32 turns
    tiles       [M, 4]        int32  sequence and first token of each tile, tokens before it and from it on
    q           [B, T, H, N]  bf16   queries
    k           [B, T, H, N]  bf16   keys
    within      [B, H, T]     fp32   scratch: log2 of the decay from the chunk's start to each token
    tail_decay  [B, H, T]     fp32   scratch: decay from each token to the chunk's end
    weight_s    [B, H, T]     fp32   scratch: s
    own_dt      [B, H, T]     fp32   scratch: lambda dt
    theta       [B, T, H, S]  int32  Theta of each token within its tile, in units of 2^-32 turns

Problem: mamba3 bf16, skip, gate, carried, packed
Config:  BH=2 BT=32 language=triton num_stages=1 num_warps=1
Template digest 7609a81a24a89282; made by
    gdn2gen generate --dtype bf16 --with=skip,gate,carried,packed --stage mamba3_rotate --config \
      BH=2,BT=32,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BH = 32, 2
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


@triton.jit(do_not_specialize=["T", "H", "G", "angle_row", "angle_head", "keep"])
def mamba3_rotate_kernel(
    Q,
    K,
    Q_bias,
    K_bias,
    DT,
    Angles,
    turns,
    tiles,
    q,
    k,
    theta,
    T,
    H,
    G,
    angle_row,
    angle_head,
    keep,
    N: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
):
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    i_h = (tl.program_id(0) % n_blocks) * BH
    # of each tile: its sequence, first token, tokens of the sequence before that, and from that on
    i_n, i_t = tl.load(tiles + i_tile * 4), tl.load(tiles + i_tile * 4 + 1)
    n_before, n_left = tl.load(tiles + i_tile * 4 + 2), tl.load(tiles + i_tile * 4 + 3)
    i_b = 0
    i_row = i_t.to(tl.int64)
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    o_s, o_c = tl.arange(0, BS), tl.arange(0, 2 * BS)
    o_r = 2 * S + tl.arange(0, BN)

    # what is of the whole tile is added to the pointers first, so that threads add 32 bits
    i_group, i_token = (i_row * G + i_h // (H // G)) * N, i_row * H + i_h
    p_dt = DT + (i_b * H + i_h).to(tl.int64) * T + i_t
    p_angle = Angles + (i_row * angle_row + i_h * angle_head) + o_s
    p_turns = turns + (i_tile * H + i_h).to(tl.int64) * S + o_s
    p_theta = theta + i_token * S + o_s
    # for the backward, if there is to be one
    n_kept = tl.minimum(n_left, keep * BT)
    b_before0 = tl.load(p_turns + 0 * S)
    b_turned0 = tl.zeros([BS], tl.int32)
    b_Qbiasc0 = tl.load(Q_bias + (i_h + 0) * N + o_c).to(tl.float32)
    b_Qbiasr0 = tl.load(Q_bias + (i_h + 0) * N + o_r).to(tl.float32)
    b_Kbiasc0 = tl.load(K_bias + (i_h + 0) * N + o_c).to(tl.float32)
    b_Kbiasr0 = tl.load(K_bias + (i_h + 0) * N + o_r).to(tl.float32)
    b_before1 = tl.load(p_turns + 1 * S)
    b_turned1 = tl.zeros([BS], tl.int32)
    b_Qbiasc1 = tl.load(Q_bias + (i_h + 1) * N + o_c).to(tl.float32)
    b_Qbiasr1 = tl.load(Q_bias + (i_h + 1) * N + o_r).to(tl.float32)
    b_Kbiasc1 = tl.load(K_bias + (i_h + 1) * N + o_c).to(tl.float32)
    b_Kbiasr1 = tl.load(K_bias + (i_h + 1) * N + o_r).to(tl.float32)
    if angle_head == 0:
        # of the first token; then each is read while the one before it is worked on
        m_next = tl.cast(0, tl.int32) < n_left
        b_dt0_next = tl.load(p_dt + (tl.cast(0, tl.int32)), mask=m_next, other=0.0)
        b_angle0_next = tl.load(p_angle + (tl.cast(0, tl.int32) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt1_next = tl.load(p_dt + (1 * T + tl.cast(0, tl.int32)), mask=m_next, other=0.0)
        b_Qc_next = tl.load(Q + i_group + (tl.cast(0, tl.int32) * (G * N) + o_c), mask=o_c < tl.where(m_next, 2 * S, 0), other=0.0)
        b_Qr_next = tl.load(Q + i_group + (tl.cast(0, tl.int32) * (G * N) + o_r), mask=o_r < tl.where(m_next, N, 0), other=0.0)
        b_Kc_next = tl.load(K + i_group + (tl.cast(0, tl.int32) * (G * N) + o_c), mask=o_c < tl.where(m_next, 2 * S, 0), other=0.0)
        b_Kr_next = tl.load(K + i_group + (tl.cast(0, tl.int32) * (G * N) + o_r), mask=o_r < tl.where(m_next, N, 0), other=0.0)

        for t in range(BT):
            b_dt0 = b_dt0_next
            b_rate0 = 0.5 * tanh(b_angle0_next.to(tl.float32))
            b_dt1 = b_dt1_next
            b_rate1 = b_rate0
            b_Qc = b_Qc_next.to(tl.float32)
            b_Qr = b_Qr_next.to(tl.float32)
            b_Kc = b_Kc_next.to(tl.float32)
            b_Kr = b_Kr_next.to(tl.float32)

            m_next = (t + 1) < n_left
            b_dt0_next = tl.load(p_dt + ((t + 1)), mask=m_next, other=0.0)
            b_angle0_next = tl.load(p_angle + ((t + 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt1_next = tl.load(p_dt + (1 * T + (t + 1)), mask=m_next, other=0.0)
            b_Qc_next = tl.load(Q + i_group + ((t + 1) * (G * N) + o_c), mask=o_c < tl.where(m_next, 2 * S, 0), other=0.0)
            b_Qr_next = tl.load(Q + i_group + ((t + 1) * (G * N) + o_r), mask=o_r < tl.where(m_next, N, 0), other=0.0)
            b_Kc_next = tl.load(K + i_group + ((t + 1) * (G * N) + o_c), mask=o_c < tl.where(m_next, 2 * S, 0), other=0.0)
            b_Kr_next = tl.load(K + i_group + ((t + 1) * (G * N) + o_r), mask=o_r < tl.where(m_next, N, 0), other=0.0)

            b_x = b_dt0 * b_rate0
            b_turned0 += in_int32(b_x)
            b_theta = tl.maximum(b_turned0, NO_TURN + 1)
            b_cos0, b_sin0 = cosine_and_sine(b_theta + b_before0)
            b_x *= 0.0
            b_cos0 = tl.where(b_x == b_x, b_cos0, float("nan"))
            b_theta = tl.where(b_x == b_x, b_theta, NO_TURN)
            tl.store(p_theta + (t * (H * S) + 0 * S), b_theta, mask=o_s < tl.where(t < n_kept, S, 0))
            b_x = b_dt1 * b_rate1
            b_turned1 += in_int32(b_x)
            b_theta = tl.maximum(b_turned1, NO_TURN + 1)
            b_cos1, b_sin1 = cosine_and_sine(b_theta + b_before1)
            b_x *= 0.0
            b_cos1 = tl.where(b_x == b_x, b_cos1, float("nan"))
            b_theta = tl.where(b_x == b_x, b_theta, NO_TURN)
            tl.store(p_theta + (t * (H * S) + 1 * S), b_theta, mask=o_s < tl.where(t < n_kept, S, 0))

            b_x = b_Qc + b_Qbiasc0
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [BS, 2]))
            b_x = tl.reshape(tl.join(b_x0 * b_cos0 - b_x1 * b_sin0, b_x1 * b_cos0 + b_x0 * b_sin0), [2 * BS])
            tl.store(q + (i_token + 0) * N + (t * (H * N) + o_c), b_x.to(tl.bfloat16), mask=o_c < tl.where(t < n_left, 2 * S, 0))
            b_x = b_Qr + b_Qbiasr0
            tl.store(q + (i_token + 0) * N + (t * (H * N) + o_r), b_x.to(tl.bfloat16), mask=o_r < tl.where(t < n_left, N, 0))
            b_x = b_Kc + b_Kbiasc0
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [BS, 2]))
            b_x = tl.reshape(tl.join(b_x0 * b_cos0 - b_x1 * b_sin0, b_x1 * b_cos0 + b_x0 * b_sin0), [2 * BS])
            tl.store(k + (i_token + 0) * N + (t * (H * N) + o_c), b_x.to(tl.bfloat16), mask=o_c < tl.where(t < n_left, 2 * S, 0))
            b_x = b_Kr + b_Kbiasr0
            tl.store(k + (i_token + 0) * N + (t * (H * N) + o_r), b_x.to(tl.bfloat16), mask=o_r < tl.where(t < n_left, N, 0))
            b_x = b_Qc + b_Qbiasc1
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [BS, 2]))
            b_x = tl.reshape(tl.join(b_x0 * b_cos1 - b_x1 * b_sin1, b_x1 * b_cos1 + b_x0 * b_sin1), [2 * BS])
            tl.store(q + (i_token + 1) * N + (t * (H * N) + o_c), b_x.to(tl.bfloat16), mask=o_c < tl.where(t < n_left, 2 * S, 0))
            b_x = b_Qr + b_Qbiasr1
            tl.store(q + (i_token + 1) * N + (t * (H * N) + o_r), b_x.to(tl.bfloat16), mask=o_r < tl.where(t < n_left, N, 0))
            b_x = b_Kc + b_Kbiasc1
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [BS, 2]))
            b_x = tl.reshape(tl.join(b_x0 * b_cos1 - b_x1 * b_sin1, b_x1 * b_cos1 + b_x0 * b_sin1), [2 * BS])
            tl.store(k + (i_token + 1) * N + (t * (H * N) + o_c), b_x.to(tl.bfloat16), mask=o_c < tl.where(t < n_left, 2 * S, 0))
            b_x = b_Kr + b_Kbiasr1
            tl.store(k + (i_token + 1) * N + (t * (H * N) + o_r), b_x.to(tl.bfloat16), mask=o_r < tl.where(t < n_left, N, 0))

    else:
        # of the first token; then each is read while the one before it is worked on
        m_next = tl.cast(0, tl.int32) < n_left
        b_dt0_next = tl.load(p_dt + (tl.cast(0, tl.int32)), mask=m_next, other=0.0)
        b_angle0_next = tl.load(p_angle + (tl.cast(0, tl.int32) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt1_next = tl.load(p_dt + (1 * T + tl.cast(0, tl.int32)), mask=m_next, other=0.0)
        b_angle1_next = tl.load(p_angle + (1 * angle_head + tl.cast(0, tl.int32) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_Qc_next = tl.load(Q + i_group + (tl.cast(0, tl.int32) * (G * N) + o_c), mask=o_c < tl.where(m_next, 2 * S, 0), other=0.0)
        b_Qr_next = tl.load(Q + i_group + (tl.cast(0, tl.int32) * (G * N) + o_r), mask=o_r < tl.where(m_next, N, 0), other=0.0)
        b_Kc_next = tl.load(K + i_group + (tl.cast(0, tl.int32) * (G * N) + o_c), mask=o_c < tl.where(m_next, 2 * S, 0), other=0.0)
        b_Kr_next = tl.load(K + i_group + (tl.cast(0, tl.int32) * (G * N) + o_r), mask=o_r < tl.where(m_next, N, 0), other=0.0)

        for t in range(BT):
            b_dt0 = b_dt0_next
            b_rate0 = 0.5 * tanh(b_angle0_next.to(tl.float32))
            b_dt1 = b_dt1_next
            b_rate1 = 0.5 * tanh(b_angle1_next.to(tl.float32))
            b_Qc = b_Qc_next.to(tl.float32)
            b_Qr = b_Qr_next.to(tl.float32)
            b_Kc = b_Kc_next.to(tl.float32)
            b_Kr = b_Kr_next.to(tl.float32)

            m_next = (t + 1) < n_left
            b_dt0_next = tl.load(p_dt + ((t + 1)), mask=m_next, other=0.0)
            b_angle0_next = tl.load(p_angle + ((t + 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt1_next = tl.load(p_dt + (1 * T + (t + 1)), mask=m_next, other=0.0)
            b_angle1_next = tl.load(p_angle + (1 * angle_head + (t + 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_Qc_next = tl.load(Q + i_group + ((t + 1) * (G * N) + o_c), mask=o_c < tl.where(m_next, 2 * S, 0), other=0.0)
            b_Qr_next = tl.load(Q + i_group + ((t + 1) * (G * N) + o_r), mask=o_r < tl.where(m_next, N, 0), other=0.0)
            b_Kc_next = tl.load(K + i_group + ((t + 1) * (G * N) + o_c), mask=o_c < tl.where(m_next, 2 * S, 0), other=0.0)
            b_Kr_next = tl.load(K + i_group + ((t + 1) * (G * N) + o_r), mask=o_r < tl.where(m_next, N, 0), other=0.0)

            b_x = b_dt0 * b_rate0
            b_turned0 += in_int32(b_x)
            b_theta = tl.maximum(b_turned0, NO_TURN + 1)
            b_cos0, b_sin0 = cosine_and_sine(b_theta + b_before0)
            b_x *= 0.0
            b_cos0 = tl.where(b_x == b_x, b_cos0, float("nan"))
            b_theta = tl.where(b_x == b_x, b_theta, NO_TURN)
            tl.store(p_theta + (t * (H * S) + 0 * S), b_theta, mask=o_s < tl.where(t < n_kept, S, 0))
            b_x = b_dt1 * b_rate1
            b_turned1 += in_int32(b_x)
            b_theta = tl.maximum(b_turned1, NO_TURN + 1)
            b_cos1, b_sin1 = cosine_and_sine(b_theta + b_before1)
            b_x *= 0.0
            b_cos1 = tl.where(b_x == b_x, b_cos1, float("nan"))
            b_theta = tl.where(b_x == b_x, b_theta, NO_TURN)
            tl.store(p_theta + (t * (H * S) + 1 * S), b_theta, mask=o_s < tl.where(t < n_kept, S, 0))

            b_x = b_Qc + b_Qbiasc0
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [BS, 2]))
            b_x = tl.reshape(tl.join(b_x0 * b_cos0 - b_x1 * b_sin0, b_x1 * b_cos0 + b_x0 * b_sin0), [2 * BS])
            tl.store(q + (i_token + 0) * N + (t * (H * N) + o_c), b_x.to(tl.bfloat16), mask=o_c < tl.where(t < n_left, 2 * S, 0))
            b_x = b_Qr + b_Qbiasr0
            tl.store(q + (i_token + 0) * N + (t * (H * N) + o_r), b_x.to(tl.bfloat16), mask=o_r < tl.where(t < n_left, N, 0))
            b_x = b_Kc + b_Kbiasc0
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [BS, 2]))
            b_x = tl.reshape(tl.join(b_x0 * b_cos0 - b_x1 * b_sin0, b_x1 * b_cos0 + b_x0 * b_sin0), [2 * BS])
            tl.store(k + (i_token + 0) * N + (t * (H * N) + o_c), b_x.to(tl.bfloat16), mask=o_c < tl.where(t < n_left, 2 * S, 0))
            b_x = b_Kr + b_Kbiasr0
            tl.store(k + (i_token + 0) * N + (t * (H * N) + o_r), b_x.to(tl.bfloat16), mask=o_r < tl.where(t < n_left, N, 0))
            b_x = b_Qc + b_Qbiasc1
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [BS, 2]))
            b_x = tl.reshape(tl.join(b_x0 * b_cos1 - b_x1 * b_sin1, b_x1 * b_cos1 + b_x0 * b_sin1), [2 * BS])
            tl.store(q + (i_token + 1) * N + (t * (H * N) + o_c), b_x.to(tl.bfloat16), mask=o_c < tl.where(t < n_left, 2 * S, 0))
            b_x = b_Qr + b_Qbiasr1
            tl.store(q + (i_token + 1) * N + (t * (H * N) + o_r), b_x.to(tl.bfloat16), mask=o_r < tl.where(t < n_left, N, 0))
            b_x = b_Kc + b_Kbiasc1
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [BS, 2]))
            b_x = tl.reshape(tl.join(b_x0 * b_cos1 - b_x1 * b_sin1, b_x1 * b_cos1 + b_x0 * b_sin1), [2 * BS])
            tl.store(k + (i_token + 1) * N + (t * (H * N) + o_c), b_x.to(tl.bfloat16), mask=o_c < tl.where(t < n_left, 2 * S, 0))
            b_x = b_Kr + b_Kbiasr1
            tl.store(k + (i_token + 1) * N + (t * (H * N) + o_r), b_x.to(tl.bfloat16), mask=o_r < tl.where(t < n_left, N, 0))


def launch(
    Q, K, Q_bias, K_bias, ADT, DT, Trap, Angles, turns, tiles, q, k, within, tail_decay,
    weight_s, own_dt, theta, *, T, H, G, n_tiles, angle_row, angle_head, keep
):
    """q and k of sequences that are packed in one row on the current stream."""
    weights_kernel[(n_tiles * (H // BH),)](
        ADT, DT, Trap, tiles, within, tail_decay, weight_s, own_dt, T, H,
        BT=BT, BH=BH, num_warps=1, num_stages=1,
    )  # fmt: skip
    mamba3_rotate_kernel[(n_tiles * (H // BH),)](
        Q, K, Q_bias, K_bias, DT, Angles, turns, tiles, q, k, theta, T, H, G, angle_row,
        angle_head, keep,
        N=N, S=S, BT=BT, BH=BH, BN=BN, BS=BS,
        num_warps=1, num_stages=1,
    )  # fmt: skip
