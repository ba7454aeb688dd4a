"""Gradients of Mamba-3, chunk by chunk, from the states before each chunk and their gradients after it.

Rows of pairs are tokens j that write, columns tokens i > j that read; q and k are biased and turned, dy is before
the gate, dc_i = <dy_i, v_i>, dS is the gradient of the state after the chunk, and P_ji = L_ji s_j <k_j, q_i> with L_ji
the decay from j to i:

    dP_ji    = <v_j, dy_i>,   dscores_ji = L_ji s_j dP_ji,   dscores_ii = lambda_i dt_i dc_i
    dv_j     = sum of P_ji dy_i + tail_j s_j dS^T k_j + c_j dy_j
    dq_i     = head_i S dy_i + sum of dscores_ji k_j
    dk_j     = tail_j s_j dS v_j + sum of dscores_ji q_i
    ds_j     = sum of L_ji dP_ji <k_j, q_i> + tail_j <k_j, dS v_j>
    dADT_t   = sum over j < t <= i of P_ji dP_ji + sum over i >= t of head_i <q_i, S dy_i>
               + sum over j < t of tail_j s_j <k_j, dS v_j> + gamma_C <S, dS>
    dTheta_t = dq_t x q_t + dk_t x k_t,   a x b = a1 b0 - a0 b1 of each pair
    dturn_t  = sum of dTheta from t to the end of the chunk, less dS x S there and more by dS x S
               of the last state, and dlast_angle
    d(lambda_t dt_t) = ds_t + dc_t <q_t, k_t>,   d((1 - lambda_t) dt_t) = ds_(t - 1)

dturn is the sum of dTheta over all later tokens, in which pairs of these cancel: what is left is of pairs across
the token. So those across the end of the chunk come from the state there, and its gradient, and no sum goes further; and
dTheta is made of dq and dk in fp32, and of q and k as products read them.

Programs take a chunk and a head, and lie next to each other: one has what is of values of tokens that write (pairs, dv),
one dk, one what is of tokens that read (dq, <S, dS>); dq and dk are turned back. heads_kernel takes a chunk, a group
and a slice of channels: it adds dq and dk of heads up, and leaves what the chunk has of each head's biases in
`dQ_bias_part` and `dK_bias_part`. angles_kernel goes from a chunk's last token to its first, for 8 heads at once. tokens_kernel takes a chunk for BH heads one
after another: with X_ji = P_ji dP_ji the pairs that span t are all X_j. of j < t less all X_.i of i < t (`dread`).

    q             [B, T, H, N]  bf16   queries
    k             [B, T, H, N]  bf16   keys
    V             [B, T, H, P]  bf16   values
    ADT           [B, H, T]     fp32   log decay
    DT            [B, H, T]     fp32   steps
    Trap          [B, H, T]     fp32   trapezoidal factor, before its sigmoid
    within        [B, H, T]     fp32   scratch: log2 of the decay from the chunk's start to each token
    tail_decay    [B, H, T]     fp32   scratch: decay from each token to the chunk's end
    weight_s      [B, H, T]     fp32   scratch: s
    own_dt        [B, H, T]     fp32   scratch: lambda dt
    Angles        [B, T, H, S]  fp32   rates of rotation, before tanh
    theta         [B, T, H, S]  int32  Theta of each token within its tile, in units of 2^-32 turns
    turns         [M, H, S]     int32  Theta before each tile, in units of 2^-32 turns
    D             [H]           fp32   factor of a token's own value, added to o
    dy            [B, T, H, P]  bf16   gradient of y
    down          [B, T, H]     fp32   gradient of the factor of a token's own value
    h             [M, H, P, N]  bf16   state at the chunk's start, transposed
    dh            [M, H, P, N]  bf16   gradient of the state at the chunk's end, transposed
    dlast_angle   [n, H, S]     fp32   gradient of last_angle
    dlast_turn    [n, H, S]     fp32   what a turn of the last state's keys changes
    dQ            [B, T, G, N]  bf16   gradient of Q
    dK            [B, T, G, N]  bf16   gradient of K
    dv            [B, T, H, P]  bf16   gradient of v
    dQ_bias_part  [M, H, N]     fp32   gradient of Q_bias from each tile
    dK_bias_part  [M, H, N]     fp32   gradient of K_bias from each tile
    dADT          [B, H, T]     fp32   gradient of ADT
    dDT           [B, H, T]     fp32   gradient of DT
    dTrap         [B, H, T]     fp32   gradient of Trap
    dAngles       [B, T, H, S]  fp32   gradient of Angles
    dQ_head       [B, T, H, N]  bf16   scratch: gradient of each head's queries, biased and turned
    dK_head       [B, T, H, N]  bf16   scratch: gradient of each head's keys, biased and turned
    dweight_s     [B, H, T]     fp32   scratch: gradient of s
    down_dt       [B, H, T]     fp32   scratch: gradient of lambda dt
    dread         [B, H, T]     fp32   scratch: gradient of what pairs leave of each token that reads
    read_q        [B, H, T]     fp32   scratch: q's product with its gradient by the state, before decay
    written_k     [B, H, T]     fp32   scratch: k's product with its gradient by the state, before decay
    kept_state    [M, H]        fp32   scratch: <S, dS> of each tile
    dtheta        [B, T, H, S]  fp32   scratch: gradient of each token's Theta
    dtheta_k      [B, T, H, S]  fp32   scratch: what keys have of it
    dtheta_sums   [M, H, S]     fp32   scratch: sums of it over tiles, then over what comes after each

Problem: mamba3 bf16, skip
Config:  BH=8 BT=32 BV=64 language=triton maxnreg=168 num_stages=1 num_warps=1 parts=3
Template digest 5230f48acb0a7356; made by
    gdn2gen generate --dtype bf16 --with=skip --stage mamba3_gradient --config \
      BH=8,BT=32,BV=64,language=triton,maxnreg=168,num_stages=1,num_warps=1,parts=3
"""

import triton
import triton.language as tl


BT, BH, BV = 32, 8, 64
N, P, S = 128, 64, 32  # channels of keys and values, and pairs that are rotated
BN, BS = 64, 32  # tiles of what is not rotated, and of pairs
PARTS = tl.constexpr(3)  # programs of a chunk and head that have products
BC = 64  # channels of a slice that heads_kernel takes
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


@triton.jit(do_not_specialize=["T", "H"])
def mamba3_gradient_kernel(
    q,
    k,
    V,
    theta,
    turns,
    within,
    tail_decay,
    weight_s,
    own_dt,
    D,
    dy,
    down,
    h,
    dh,
    dv,
    dQ_head,
    dK_head,
    dweight_s,
    down_dt,
    dread,
    read_q,
    written_k,
    kept_state,
    dtheta,
    dtheta_k,
    dtheta_sums,
    T,
    H,
    N: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
):
    """Of a chunk and head what is of tokens that write, or of tokens that read."""
    # of the same inputs, side by side: the memory reads them once
    i_part, i_h = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS % H
    i_tile = tl.program_id(0) // PARTS // H
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_before, n_left = i_t, T - i_t
    i_b = i_n
    i_row = i_b.to(tl.int64) * T + i_t
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    o_s, o_c = tl.arange(0, BS), tl.arange(0, 2 * BS)
    o_r = 2 * S + tl.arange(0, BN)

    if i_part == 0:
        # rows are tokens j that write, columns tokens i that read
        o_j, o_i = o_t[:, None], o_t[None, :]
        i_token = i_row * H + i_h
        o_head = (o_t * (H * N))[:, None]
        p_number = (i_b * H + i_h).to(tl.int64) * T + i_t + o_t
        i_v = 0
        o_v = i_v + tl.arange(0, BV)
        p_v = (o_t * (H * P))[:, None] + o_v[None, :]
        i_state, p_h = (i_tile * H + i_h).to(tl.int64) * P * N, o_v[:, None] * N
        b_v = tl.load(V + i_token * P + p_v, mask=m_t[:, None], other=0.0)
        b_dy = tl.load(dy + i_token * P + p_v, mask=m_t[:, None], other=0.0)
        b_qc = tl.load(q + i_token * N + (o_head + o_c[None, :]), mask=m_t[:, None], other=0.0)
        b_qr = tl.load(q + i_token * N + (o_head + o_r[None, :]), mask=m_t[:, None], other=0.0)
        b_kc = tl.load(k + i_token * N + (o_head + o_c[None, :]), mask=m_t[:, None], other=0.0)
        b_kr = tl.load(k + i_token * N + (o_head + o_r[None, :]), mask=m_t[:, None], other=0.0)

        b_dP = tl.dot(b_v, tl.trans(b_dy))

        b_scores = tl.dot(b_kc, tl.trans(b_qc))
        b_scores = tl.dot(b_kr, tl.trans(b_qr), b_scores)

        b_weight = tl.load(weight_s + p_number, mask=m_t, other=0.0)
        b_own = tl.load(own_dt + p_number, mask=m_t, other=0.0)
        # of no token nothing is kept: nothing else masks those after the last one
        b_G = tl.load(within + p_number, mask=m_t, other=float("-inf"))
        b_L = b_G[None, :] - tl.load(within + p_number, mask=m_t, other=0.0)[:, None]
        b_L = tl.exp2(tl.where(o_i > o_j, b_L, float("-inf")))
        b_tail = tl.load(tail_decay + p_number, mask=m_t, other=0.0) * b_weight
        b_dot = tl.sum(tl.where(o_j == o_i, b_scores, 0.0), 1)
        b_scores *= b_L
        b_dP *= b_scores
        b_Pd = (b_scores * b_weight[:, None]).to(tl.bfloat16)
        b_ds = tl.sum(b_dP, 1)
        tl.store(dweight_s + p_number, b_ds, mask=m_t)
        b_down = tl.load(down + (i_row + o_t) * H + i_h, mask=m_t, other=0.0)
        tl.store(down_dt + p_number, b_ds + b_down * b_dot, mask=m_t)
        tl.store(dread + p_number, tl.sum(b_dP * b_weight[:, None], 0), mask=m_t)
        b_c = b_own * b_dot
        b_c += tl.load(D + i_h)

        b_dhc = tl.load(dh + i_state + (p_h + o_c[None, :]))
        b_dhr = tl.load(dh + i_state + (p_h + o_r[None, :]))

        b_dv = tl.dot(b_kc, tl.trans(b_dhc))
        b_dv = tl.dot(b_kr, tl.trans(b_dhr), b_dv)

        b_dv *= b_tail[:, None]
        b_dv = tl.dot(b_Pd, b_dy, b_dv)
        b_dv += b_c[:, None] * b_dy.to(tl.float32)
        tl.store(dv + i_token * P + p_v, b_dv.to(tl.bfloat16), mask=m_t[:, None])

    if i_part == 1:
        # rows are tokens i that read: what is made of pairs is then an operand as it lies
        o_j, o_i = o_t[None, :], o_t[:, None]
        i_token = i_row * H + i_h
        o_head = (o_t * (H * N))[:, None]
        p_number = (i_b * H + i_h).to(tl.int64) * T + i_t + o_t
        i_v = 0
        o_v = i_v + tl.arange(0, BV)
        p_v = (o_t * (H * P))[:, None] + o_v[None, :]
        i_state, p_h = (i_tile * H + i_h).to(tl.int64) * P * N, o_v[:, None] * N
        b_v = tl.load(V + i_token * P + p_v, mask=m_t[:, None], other=0.0)
        b_dy = tl.load(dy + i_token * P + p_v, mask=m_t[:, None], other=0.0)
        b_kc = tl.load(k + i_token * N + (o_head + o_c[None, :]), mask=m_t[:, None], other=0.0)
        b_kr = tl.load(k + i_token * N + (o_head + o_r[None, :]), mask=m_t[:, None], other=0.0)

        b_hc = tl.load(h + i_state + (p_h + o_c[None, :]))
        b_hr = tl.load(h + i_state + (p_h + o_r[None, :]))

        b_dP = tl.dot(b_dy, tl.trans(b_v))

        b_weight = tl.load(weight_s + p_number, mask=m_t, other=0.0)
        b_own = tl.load(own_dt + p_number, mask=m_t, other=0.0)
        # of no token nothing is kept: nothing else masks those after the last one
        b_G = tl.load(within + p_number, mask=m_t, other=float("-inf"))
        b_L = b_G[:, None] - tl.load(within + p_number, mask=m_t, other=0.0)[None, :]
        b_L = tl.exp2(tl.where(o_i > o_j, b_L, float("-inf")))
        b_L = tl.where(o_j == o_i, b_own[:, None], b_L * b_weight[None, :])
        b_dscores = (b_dP * b_L).to(tl.bfloat16)
        b_head = tl.exp2(tl.load(within + p_number, mask=m_t, other=0.0))
        # read anew, so that it lies as the product leaves what it meets
        b_x = tl.load(q + i_token * N + (o_head + o_r[None, :]), mask=m_t[:, None], other=0.0)
        b_d = tl.dot(b_dy, b_hr)
        b_x = b_x.to(tl.float32)
        b_met = tl.sum(b_x * b_d, 1)
        b_d = tl.dot(b_dscores, b_kr, b_d * b_head[:, None])
        tl.store(dQ_head + i_token * N + (o_head + o_r[None, :]), b_d.to(tl.bfloat16), mask=m_t[:, None])
        # read anew, so that it lies as the product leaves what it meets
        b_x = tl.load(q + i_token * N + (o_head + o_c[None, :]), mask=m_t[:, None], other=0.0)
        b_d = tl.dot(b_dy, b_hc)
        b_x = b_x.to(tl.float32)
        b_met += tl.sum(b_x * b_d, 1)
        b_d = tl.dot(b_dscores, b_kc, b_d * b_head[:, None])
        p_theta = (o_t * (H * S))[:, None] + o_s[None, :]
        b_theta = tl.load(theta + i_token * S + p_theta, mask=m_t[:, None], other=0)
        p_turns = turns + (i_tile * H + i_h).to(tl.int64) * S + o_s
        b_before = tl.load(p_turns)
        b_cos, b_sin = cosine_and_sine(b_theta + b_before[None, :])
        b_cos = tl.where(b_theta == NO_TURN, float("nan"), b_cos)
        b_x0, b_x1 = tl.split(tl.reshape(b_x, [BT, BS, 2]))
        b_d0, b_d1 = tl.split(tl.reshape(b_d, [BT, BS, 2]))
        tl.store(dtheta + i_token * S + p_theta, b_d1 * b_x0 - b_d0 * b_x1, mask=m_t[:, None])
        b_d = tl.reshape(tl.join(b_d0 * b_cos + b_d1 * b_sin, b_d1 * b_cos - b_d0 * b_sin), [BT, 2 * BS])
        tl.store(dQ_head + i_token * N + (o_head + o_c[None, :]), b_d.to(tl.bfloat16), mask=m_t[:, None])

        tl.store(read_q + p_number, b_met, mask=m_t)
        # <S, dS> as the diagonal of a product
        b_kept = 0.0

        b_dhc = tl.load(dh + i_state + (p_h + o_c[None, :]))
        b_dhr = tl.load(dh + i_state + (p_h + o_r[None, :]))

        b_SdS = tl.dot(b_dhc, tl.trans(b_hc))
        b_SdS = tl.dot(b_dhr, tl.trans(b_hr), b_SdS)

        b_kept += tl.sum(tl.sum(tl.where(o_v[:, None] == o_v[None, :], b_SdS, 0.0), 1), 0)
        tl.store(kept_state + i_tile * H + i_h, b_kept)
        if n_left > BT:
            # of pairs across the chunk's end, what the sum of dTheta from there on has
            b_across = tl.zeros([BS], tl.float32)
            for i_v in range(0, P, BV):
                o_v = i_v + tl.arange(0, BV)
                p_v = (o_t * (H * P))[:, None] + o_v[None, :]
                i_state, p_h = (i_tile * H + i_h).to(tl.int64) * P * N, o_v[:, None] * N
                b_h0, b_h1 = tl.split(tl.reshape(tl.load(h + i_state + H * P * N + (p_h + o_c[None, :])).to(tl.float32), [BV, BS, 2]))
                b_dh0, b_dh1 = tl.split(tl.reshape(tl.load(dh + i_state + (p_h + o_c[None, :])).to(tl.float32), [BV, BS, 2]))
                b_across += tl.sum(b_dh0 * b_h1 - b_dh1 * b_h0, 0)
            p_sums = dtheta_sums + (i_tile * H + i_h).to(tl.int64) * S + o_s
            tl.store(p_sums, b_across)

    if i_part == 2:
        # rows are tokens j that write, columns tokens i that read
        o_j, o_i = o_t[:, None], o_t[None, :]
        i_token = i_row * H + i_h
        o_head = (o_t * (H * N))[:, None]
        p_number = (i_b * H + i_h).to(tl.int64) * T + i_t + o_t
        i_v = 0
        o_v = i_v + tl.arange(0, BV)
        p_v = (o_t * (H * P))[:, None] + o_v[None, :]
        i_state, p_h = (i_tile * H + i_h).to(tl.int64) * P * N, o_v[:, None] * N
        b_v = tl.load(V + i_token * P + p_v, mask=m_t[:, None], other=0.0)
        b_dy = tl.load(dy + i_token * P + p_v, mask=m_t[:, None], other=0.0)
        b_qc = tl.load(q + i_token * N + (o_head + o_c[None, :]), mask=m_t[:, None], other=0.0)
        b_qr = tl.load(q + i_token * N + (o_head + o_r[None, :]), mask=m_t[:, None], other=0.0)

        b_dhc = tl.load(dh + i_state + (p_h + o_c[None, :]))
        b_dhr = tl.load(dh + i_state + (p_h + o_r[None, :]))

        b_dP = tl.dot(b_v, tl.trans(b_dy))

        b_weight = tl.load(weight_s + p_number, mask=m_t, other=0.0)
        b_own = tl.load(own_dt + p_number, mask=m_t, other=0.0)
        # of no token nothing is kept: nothing else masks those after the last one
        b_G = tl.load(within + p_number, mask=m_t, other=float("-inf"))
        b_L = b_G[None, :] - tl.load(within + p_number, mask=m_t, other=0.0)[:, None]
        b_L = tl.exp2(tl.where(o_i > o_j, b_L, float("-inf")))
        b_tail = tl.load(tail_decay + p_number, mask=m_t, other=0.0) * b_weight
        b_L *= b_weight[:, None]
        b_dscores = (b_dP * tl.where(o_j == o_i, b_own[:, None], b_L)).to(tl.bfloat16)
        # read anew, so that it lies as the product leaves what it meets
        b_x = tl.load(k + i_token * N + (o_head + o_r[None, :]), mask=m_t[:, None], other=0.0)
        b_d = tl.dot(b_v, b_dhr)
        b_x = b_x.to(tl.float32)
        b_met = tl.sum(b_x * b_d, 1)
        b_d = tl.dot(b_dscores, b_qr, b_d * b_tail[:, None])
        tl.store(dK_head + i_token * N + (o_head + o_r[None, :]), b_d.to(tl.bfloat16), mask=m_t[:, None])
        # read anew, so that it lies as the product leaves what it meets
        b_x = tl.load(k + i_token * N + (o_head + o_c[None, :]), mask=m_t[:, None], other=0.0)
        b_d = tl.dot(b_v, b_dhc)
        b_x = b_x.to(tl.float32)
        b_met += tl.sum(b_x * b_d, 1)
        b_d = tl.dot(b_dscores, b_qc, b_d * b_tail[:, None])
        p_theta = (o_t * (H * S))[:, None] + o_s[None, :]
        b_theta = tl.load(theta + i_token * S + p_theta, mask=m_t[:, None], other=0)
        p_turns = turns + (i_tile * H + i_h).to(tl.int64) * S + o_s
        b_before = tl.load(p_turns)
        b_cos, b_sin = cosine_and_sine(b_theta + b_before[None, :])
        b_cos = tl.where(b_theta == NO_TURN, float("nan"), b_cos)
        b_x0, b_x1 = tl.split(tl.reshape(b_x, [BT, BS, 2]))
        b_d0, b_d1 = tl.split(tl.reshape(b_d, [BT, BS, 2]))
        tl.store(dtheta_k + i_token * S + p_theta, b_d1 * b_x0 - b_d0 * b_x1, mask=m_t[:, None])
        b_d = tl.reshape(tl.join(b_d0 * b_cos + b_d1 * b_sin, b_d1 * b_cos - b_d0 * b_sin), [BT, 2 * BS])
        tl.store(dK_head + i_token * N + (o_head + o_c[None, :]), b_d.to(tl.bfloat16), mask=m_t[:, None])

        tl.store(written_k + p_number, b_met, mask=m_t)


@triton.jit(do_not_specialize=["T", "H", "G"])
def heads_kernel(
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
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """dQ or dK of a chunk, group and slice of channels: sums over heads; and what biases have of each."""
    i_part = tl.program_id(0) % 4
    i_g = tl.program_id(0) // 4 % G
    i_tile = tl.program_id(0) // 4 // G
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_before, n_left = i_t, T - i_t
    i_b = i_n
    i_row = i_b.to(tl.int64) * T + i_t
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    o_n = i_part // 2 * BC + tl.arange(0, BC)
    p_head = ((i_row + o_t) * H + i_g * (H // G))[:, None] * N + o_n[None, :]
    p_bias = (i_tile * H + i_g * (H // G)).to(tl.int64) * N + o_n
    p_group = ((i_row + o_t) * G + i_g)[:, None] * N + o_n[None, :]
    b_sum = tl.zeros([BT, BC], tl.float32)
    if i_part % 2 == 0:
        # of the first head; then each is read while the one before it is added up
        b_next = tl.load(dQ_head + p_head, mask=m_t[:, None], other=0.0)
        for i in range(H // G):
            b_d = b_next.to(tl.float32)
            # as a block, which is what the interpreter takes for a mask
            m_next = m_t & (o_t * 0 + i + 1 < H // G)
            b_next = tl.load(dQ_head + p_head + (i + 1) * N, mask=m_next[:, None], other=0.0)
            b_sum += b_d
            tl.store(dQ_bias_part + p_bias + i * N, tl.sum(b_d, 0))
        tl.store(dQ + p_group, b_sum.to(tl.bfloat16), mask=m_t[:, None])
    if i_part % 2 == 1:
        # of the first head; then each is read while the one before it is added up
        b_next = tl.load(dK_head + p_head, mask=m_t[:, None], other=0.0)
        for i in range(H // G):
            b_d = b_next.to(tl.float32)
            # as a block, which is what the interpreter takes for a mask
            m_next = m_t & (o_t * 0 + i + 1 < H // G)
            b_next = tl.load(dK_head + p_head + (i + 1) * N, mask=m_next[:, None], other=0.0)
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
    dtheta_k,
    dtheta_sums,
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
    p_sums = dtheta_sums + (i_tile * H + i_h).to(tl.int64) * S + o_s
    p_last = (i_n * H + i_h).to(tl.int64) * S + o_s
    # nothing comes after the last tile
    m_after = o_s < tl.where(n_left > BT, S, 0)
    b_dturn0 = tl.load(dlast_angle + p_last + 0 * S)
    b_dturn0 += tl.load(dlast_turn + p_last + 0 * S, mask=m_after, other=0.0)
    b_dturn0 += tl.load(p_sums + 0 * S, mask=m_after, other=0.0)
    b_dturn1 = tl.load(dlast_angle + p_last + 1 * S)
    b_dturn1 += tl.load(dlast_turn + p_last + 1 * S, mask=m_after, other=0.0)
    b_dturn1 += tl.load(p_sums + 1 * S, mask=m_after, other=0.0)
    b_dturn2 = tl.load(dlast_angle + p_last + 2 * S)
    b_dturn2 += tl.load(dlast_turn + p_last + 2 * S, mask=m_after, other=0.0)
    b_dturn2 += tl.load(p_sums + 2 * S, mask=m_after, other=0.0)
    b_dturn3 = tl.load(dlast_angle + p_last + 3 * S)
    b_dturn3 += tl.load(dlast_turn + p_last + 3 * S, mask=m_after, other=0.0)
    b_dturn3 += tl.load(p_sums + 3 * S, mask=m_after, other=0.0)
    b_dturn4 = tl.load(dlast_angle + p_last + 4 * S)
    b_dturn4 += tl.load(dlast_turn + p_last + 4 * S, mask=m_after, other=0.0)
    b_dturn4 += tl.load(p_sums + 4 * S, mask=m_after, other=0.0)
    b_dturn5 = tl.load(dlast_angle + p_last + 5 * S)
    b_dturn5 += tl.load(dlast_turn + p_last + 5 * S, mask=m_after, other=0.0)
    b_dturn5 += tl.load(p_sums + 5 * S, mask=m_after, other=0.0)
    b_dturn6 = tl.load(dlast_angle + p_last + 6 * S)
    b_dturn6 += tl.load(dlast_turn + p_last + 6 * S, mask=m_after, other=0.0)
    b_dturn6 += tl.load(p_sums + 6 * S, mask=m_after, other=0.0)
    b_dturn7 = tl.load(dlast_angle + p_last + 7 * S)
    b_dturn7 += tl.load(dlast_turn + p_last + 7 * S, mask=m_after, other=0.0)
    b_dturn7 += tl.load(p_sums + 7 * S, mask=m_after, other=0.0)
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
        b_dtheta_k0_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 0 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta1_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k1_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta2_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k2_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta3_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k3_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta4_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k4_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta5_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k5_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta6_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k6_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta7_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k7_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)

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
            b_dturn0 += b_dtheta0_next + b_dtheta_k0_next
            b_dturn1 += b_dtheta1_next + b_dtheta_k1_next
            b_dturn2 += b_dtheta2_next + b_dtheta_k2_next
            b_dturn3 += b_dtheta3_next + b_dtheta_k3_next
            b_dturn4 += b_dtheta4_next + b_dtheta_k4_next
            b_dturn5 += b_dtheta5_next + b_dtheta_k5_next
            b_dturn6 += b_dtheta6_next + b_dtheta_k6_next
            b_dturn7 += b_dtheta7_next + b_dtheta_k7_next
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
            b_dtheta_k0_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 0 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta1_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k1_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta2_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k2_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta3_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k3_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta4_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k4_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta5_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k5_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta6_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k6_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta7_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k7_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)

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
        b_dtheta_k0_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 0 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta1_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k1_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta2_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k2_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta3_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k3_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta4_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k4_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta5_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k5_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta6_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k6_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta7_next = tl.load(dtheta + i_pair + ((BT - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dtheta_k7_next = tl.load(dtheta_k + i_pair + ((BT - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)

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
            b_dturn0 += b_dtheta0_next + b_dtheta_k0_next
            b_dturn1 += b_dtheta1_next + b_dtheta_k1_next
            b_dturn2 += b_dtheta2_next + b_dtheta_k2_next
            b_dturn3 += b_dtheta3_next + b_dtheta_k3_next
            b_dturn4 += b_dtheta4_next + b_dtheta_k4_next
            b_dturn5 += b_dtheta5_next + b_dtheta_k5_next
            b_dturn6 += b_dtheta6_next + b_dtheta_k6_next
            b_dturn7 += b_dtheta7_next + b_dtheta_k7_next
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
            b_dtheta_k0_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 0 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta1_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k1_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 1 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta2_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k2_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 2 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta3_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k3_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 3 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta4_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k4_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 4 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta5_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k5_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 5 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta6_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k6_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 6 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta7_next = tl.load(dtheta + i_pair + ((t - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dtheta_k7_next = tl.load(dtheta_k + i_pair + ((t - 1) * (H * S) + 7 * S + o_s), mask=o_s < tl.where(m_next, S, 0), other=0.0)

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
    dweight_s,
    down_dt,
    dread,
    read_q,
    written_k,
    kept_state,
    dADT,
    dDT,
    dTrap,
    T,
    H,
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
        b_dt = tl.load(DT + p_number, mask=m_t, other=0.0)
        b_share = sigmoid(tl.load(Trap + p_number, mask=m_t, other=0.0).to(tl.float32))
        b_written = tl.load(written_k + p_number, mask=m_t, other=0.0)
        b_written *= tl.load(tail_decay + p_number, mask=m_t, other=0.0)
        b_down = tl.load(down_dt + p_number, mask=m_t, other=0.0) + b_written
        b_dbefore = tl.load(dweight_s + p_number - 1, mask=m_later, other=0.0)
        # in another tile it has another tail
        b_tail_before = tl.load(tail_decay + p_number - 1, mask=m_later, other=0.0)
        b_dbefore += b_tail_before * tl.load(written_k + p_number - 1, mask=m_later, other=0.0)
        b_ddt = b_share * b_down + (1.0 - b_share) * b_dbefore
        b_dtrap = (b_down - b_dbefore) * b_dt * b_share * (1.0 - b_share)
        tl.store(dTrap + p_number, b_dtrap.to(tl.float32), mask=m_t)
        # what earlier tokens of the chunk write, less what they read: the sum of all less that of later ones
        # would be rounded where the last token writes much and all before it is forgotten
        m_inner = m_t & (o_t > 0)
        b_new = tl.where(m_inner, b_dbefore, 0.0) * tl.load(weight_s + p_number - 1, mask=m_inner, other=0.0)
        b_new -= tl.load(dread + p_number - 1, mask=m_inner, other=0.0)
        # and what it and later ones read of the state
        b_head = tl.exp2(tl.load(within + p_number, mask=m_t, other=0.0))
        b_read = b_head * tl.load(read_q + p_number, mask=m_t, other=0.0)
        # the chunk's decay, of its last token
        b_whole = tl.sum(tl.where(o_t == tl.minimum(n_left, BT) - 1, b_head, 0.0), 0)
        b_whole *= tl.load(kept_state + i_tile * H + i_h)
        b_dadt = tl.cumsum(b_new, 0, reverse=True) + b_whole + tl.cumsum(b_read, 0)
        tl.store(dADT + p_number, b_dadt, mask=m_t)
        b_ddt += tl.load(dDT + p_number, mask=m_t, other=0.0)
        tl.store(dDT + p_number, b_ddt, mask=m_t)


def launch(
    q, k, V, ADT, DT, Trap, within, tail_decay, weight_s, own_dt, Angles, theta, turns, D, dy,
    down, h, dh, dlast_angle, dlast_turn, dQ, dK, dv, dQ_bias_part, dK_bias_part, dADT, dDT,
    dTrap, dAngles, dQ_head, dK_head, dweight_s, down_dt, dread, read_q, written_k, kept_state,
    dtheta, dtheta_k, dtheta_sums, *, T, H, G, n_tiles, angle_row, angle_head
):
    """Gradients of B rows on the current stream."""
    mamba3_gradient_kernel[(3 * n_tiles * H,)](
        q, k, V, theta, turns, within, tail_decay, weight_s, own_dt, D, dy, down, h, dh, dv,
        dQ_head, dK_head, dweight_s, down_dt, dread, read_q, written_k, kept_state, dtheta,
        dtheta_k, dtheta_sums, T, H,
        N=N, P=P, S=S, BT=BT, BV=BV, BN=BN, BS=BS,
        num_warps=1, num_stages=1, maxnreg=168,
    )  # fmt: skip
    heads_kernel[(n_tiles * G * 4,)](
        dQ_head, dK_head, dQ, dK, dQ_bias_part, dK_bias_part, T, H, G,
        N=N, BT=BT, BC=BC, num_warps=4, num_stages=1,
    )  # fmt: skip
    angles_kernel[(n_tiles * (H // 8),)](
        DT, Angles, dlast_angle, dlast_turn, dtheta, dtheta_k, dtheta_sums, dDT, dAngles, T, H,
        angle_row, angle_head,
        S=S, BT=BT, BH=8, BS=BS, num_warps=1, num_stages=1,
    )  # fmt: skip
    tokens_kernel[(n_tiles * (H // BH),)](
        DT, Trap, within, tail_decay, weight_s, dweight_s, down_dt, dread, read_q, written_k,
        kept_state, dADT, dDT, dTrap, T, H,
        BT=BT, BH=BH, num_warps=1, num_stages=1,
    )  # fmt: skip
