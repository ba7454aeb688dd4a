"""Mamba-3's outputs, chunk by chunk, from the states before them.

    q_t   = R(Theta_t) (Q_t + Q_bias),   k_t likewise
    P_ji  = decay_ji s_j <k_j, q_i>, i > j
    y_i   = head_i S^T q_i + sum of P_ji v_j + c_i v_i,   out_i = y_i silu(z_i)
    s_t   = lambda_t dt_t + (1 - lambda_(t + 1)) dt_(t + 1),   lambda = sigmoid(trap)
    c_t   = lambda_t dt_t <q_t, k_t> + D

head is the decay from the chunk's start to a token, decay_ji from token j to token i. Of the last token of a
sequence s is lambda dt. A program takes a chunk, for BH heads one after another: it reads queries and keys of their
group, and turns them. y is left for the backward where `keep` is not 0.

    Q        [B, T, G, N]  bf16   queries, without biases
    K        [B, T, G, N]  bf16   keys, without biases
    V        [B, T, H, P]  bf16   values
    ADT      [B, H, T]     fp32   log decay
    DT       [B, H, T]     fp32   steps
    Trap     [B, H, T]     fp32   trapezoidal factor, before its sigmoid
    Q_bias   [H, N]        fp32   added to queries
    K_bias   [H, N]        fp32   added to keys
    theta    [B, T, H, S]  int32  Theta of each token within its tile, in units of 2^-32 turns
    turns    [M, H, S]     int32  Theta before each tile, in units of 2^-32 turns
    D        [H]           fp32   factor of a token's own value, added to o
    Z        [B, T, H, P]  bf16   output gate, before SiLU
    h        [M, H, P, N]  bf16   state at the chunk's start, transposed
    tiles    [M, 4]        int32  sequence and first token of each tile, tokens before it and from it on
    out      [B, T, H, P]  bf16   output
    ungated  [B, T, H, P]  bf16   output before its gate, y

Problem: mamba3 bf16, skip, gate, carried, packed
Config:  BH=8 BT=32 BV=64 language=triton maxnreg=0 num_stages=1 num_warps=1
Template digest 8adb26724943e18f; made by
    gdn2gen generate --dtype bf16 --with=skip,gate,carried,packed --stage mamba3_output --config \
      BH=8,BT=32,BV=64,language=triton,maxnreg=0,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BH, BV = 32, 8, 64
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


@triton.jit(do_not_specialize=["T", "H", "G", "keep"])
def mamba3_output_kernel(
    Q,
    K,
    V,
    ADT,
    DT,
    Trap,
    Q_bias,
    K_bias,
    theta,
    turns,
    D,
    Z,
    h,
    tiles,
    out,
    ungated,
    T,
    H,
    G,
    keep,
    N: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BV: tl.constexpr,
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

    # rows are tokens j that write, columns tokens i that read
    o_j, o_i = o_t[:, None], o_t[None, :]
    n_kept = tl.minimum(n_left, keep * BT)
    for i in range(BH):
        i_h = (tl.program_id(0) % n_blocks) * BH + i
        p_group = ((i_row + o_t) * G + i_h // (H // G))[:, None] * N
        p_theta = ((i_row + o_t) * H + i_h)[:, None] * S + o_s[None, :]
        b_theta = tl.load(theta + p_theta, mask=m_t[:, None], other=0)
        p_turns = turns + (i_tile * H + i_h).to(tl.int64) * S + o_s
        b_before = tl.load(p_turns)
        b_cos, b_sin = cosine_and_sine(b_theta + b_before[None, :])
        b_cos = tl.where(b_theta == NO_TURN, float("nan"), b_cos)
        b_qc = tl.load(Q + p_group + o_c[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_kc = tl.load(K + p_group + o_c[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_qc += tl.load(Q_bias + i_h * N + o_c).to(tl.float32)[None, :]
        b_kc += tl.load(K_bias + i_h * N + o_c).to(tl.float32)[None, :]
        b_x0, b_x1 = tl.split(tl.reshape(b_qc, [BT, BS, 2]))
        b_qc = tl.reshape(tl.join(b_x0 * b_cos - b_x1 * b_sin, b_x1 * b_cos + b_x0 * b_sin), [BT, 2 * BS])
        b_qc = b_qc.to(tl.bfloat16)
        b_x0, b_x1 = tl.split(tl.reshape(b_kc, [BT, BS, 2]))
        b_kc = tl.reshape(tl.join(b_x0 * b_cos - b_x1 * b_sin, b_x1 * b_cos + b_x0 * b_sin), [BT, 2 * BS])
        b_kc = b_kc.to(tl.bfloat16)
        b_qr = tl.load(Q + p_group + o_r[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_kr = tl.load(K + p_group + o_r[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_qr += tl.load(Q_bias + i_h * N + o_r).to(tl.float32)[None, :]
        b_kr += tl.load(K_bias + i_h * N + o_r).to(tl.float32)[None, :]
        b_qr = b_qr.to(tl.bfloat16)
        b_kr = b_kr.to(tl.bfloat16)

        b_P = tl.dot(b_kc, tl.trans(b_qc))
        b_P = tl.dot(b_kr, tl.trans(b_qr), b_P)

        p_number = (i_b * H + i_h).to(tl.int64) * T + i_t + o_t
        b_dt = tl.load(DT + p_number, mask=m_t, other=0.0)
        b_share = sigmoid(tl.load(Trap + p_number, mask=m_t, other=0.0).to(tl.float32))
        b_own = b_share * b_dt
        m_next = o_t < n_left - 1
        b_dt_next = tl.load(DT + p_number + 1, mask=m_next, other=0.0)
        b_trap_next = tl.load(Trap + p_number + 1, mask=m_next, other=0.0).to(tl.float32)
        b_weight = b_own + sigmoid(-b_trap_next) * b_dt_next
        b_adt = tl.load(ADT + p_number, mask=m_t, other=0.0)
        b_log_decay = tl.maximum(b_adt * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
        b_G = tl.cumsum(b_log_decay, 0)
        b_head = tl.exp2(b_G)
        b_L = b_G[None, :] - b_G[:, None]
        b_L = tl.exp2(tl.where(o_i > o_j, b_L, float("-inf")))
        b_c = b_own * tl.sum(tl.where(o_j == o_i, b_P, 0.0), 0)
        b_P = (b_P * b_L * b_weight[:, None]).to(tl.bfloat16)
        b_c += tl.load(D + i_h)
        for i_v in range(0, P, BV):
            # transposed: what is computed of q is then the right operand of every product
            o_v = i_v + tl.arange(0, BV)
            p_v = ((i_row + o_t) * H + i_h)[None, :] * P + o_v[:, None]
            p_h = (i_tile * H + i_h).to(tl.int64) * P * N + o_v[:, None] * N
            b_v = tl.load(V + p_v, mask=m_t[None, :], other=0.0)
            b_z = tl.load(Z + p_v, mask=m_t[None, :], other=0.0)
            b_hc = tl.load(h + p_h + o_c[None, :], mask=(o_v < n_left * P)[:, None], other=0.0)
            b_hr = tl.load(h + p_h + o_r[None, :], mask=(o_v < n_left * P)[:, None], other=0.0)

            b_y = tl.dot(b_hc, tl.trans(b_qc))
            b_y = tl.dot(b_hr, tl.trans(b_qr), b_y)

            b_y *= b_head[None, :]
            b_y = tl.dot(b_v, b_P, b_y)
            b_y += b_c[None, :] * b_v.to(tl.float32)
            # for the backward, if there is to be one
            tl.store(ungated + p_v, b_y.to(tl.bfloat16), mask=(o_t < n_kept)[None, :])
            b_zf = b_z.to(tl.float32)
            b_y *= b_zf * sigmoid(b_zf)
            tl.store(out + p_v, b_y.to(tl.bfloat16), mask=m_t[None, :])


def launch(
    Q, K, V, ADT, DT, Trap, Q_bias, K_bias, theta, turns, D, Z, h, tiles, out, ungated, *, T, H,
    G, n_tiles, keep
):
    """The output of sequences that are packed in one row on the current stream."""
    mamba3_output_kernel[(n_tiles * (H // BH),)](
        Q, K, V, ADT, DT, Trap, Q_bias, K_bias, theta, turns, D, Z, h, tiles, out, ungated, T,
        H, G, keep,
        N=N, P=P, S=S, BT=BT, BH=BH, BV=BV, BN=BN, BS=BS,
        num_warps=1, num_stages=1,
    )  # fmt: skip
