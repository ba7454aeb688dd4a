"""Numbers of each token and head, of Mamba-3's scan that turns queries and keys itself.

    s_t = lambda_t dt_t + (1 - lambda_(t + 1)) dt_(t + 1),   lambda = sigmoid(trap)

Of the last token of a sequence s is lambda dt. Beside it log2 of the decay from the chunk's start, the decay to its end,
and lambda dt, as weights_kernel of `mamba3_rotate` makes them; and by how many turns a dt of 1 turns a pair, half of tanh of its
angle: of the one head that all share, or of each.

    ADT         [B, H, T]      fp32  log decay
    DT          [B, H, T]      fp32  steps
    Trap        [B, H, T]      fp32  trapezoidal factor, before its sigmoid
    Angles      [B, T, H, S]   fp32  rates of rotation, before tanh
    within      [B, H, T]      fp32  scratch: log2 of the decay from the chunk's start to each token
    tail_decay  [B, H, T]      fp32  scratch: decay from each token to the chunk's end
    weight_s    [B, H, T]      fp32  scratch: s
    own_dt      [B, H, T]      fp32  scratch: lambda dt
    rates       [B, HA, T, S]  fp32  scratch: half of tanh of each angle, of the head that all share or of each

Problem: mamba3 bf16
Config:  BH=4 BT=32 language=triton num_stages=1 num_warps=1
Template digest f3f37a588b202ad0; made by
    gdn2gen generate --dtype bf16 --with= --stage mamba3_weights --config \
      BH=4,BT=32,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BH = 32, 4
S, BS = 32, 32  # pairs of channels that are rotated, and the tile that covers them
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
def mamba3_weights_kernel(
    ADT,
    DT,
    Trap,
    within,
    tail_decay,
    weight_s,
    own_dt,
    T,
    H,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_before, n_left = i_t, T - i_t
    i_b = i_n
    i_row = i_b.to(tl.int64) * T + i_t
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


@triton.jit(do_not_specialize=["T", "HA", "angle_row", "angle_head"])
def rates_kernel(
    Angles,
    rates,
    T,
    HA,
    angle_row,
    angle_head,
    S: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
):
    """Half of tanh of the angles of a tile and head."""
    i_tile, i_ha = tl.program_id(0) // HA, tl.program_id(0) % HA
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_before, n_left = i_t, T - i_t
    i_b = i_n
    i_row = i_b.to(tl.int64) * T + i_t
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    o_s = tl.arange(0, BS)
    p_angle = (i_row + o_t) * angle_row + i_ha * angle_head
    b_rate = 0.5 * tanh(tl.load(Angles + p_angle[:, None] + o_s[None, :], mask=m_t[:, None], other=0.0).to(tl.float32))
    p_rate = ((i_b * HA + i_ha).to(tl.int64) * T + i_t + o_t) * S
    tl.store(rates + p_rate[:, None] + o_s[None, :], b_rate, mask=m_t[:, None])


def launch(
    ADT, DT, Trap, Angles, within, tail_decay, weight_s, own_dt, rates, *, T, H, HA, n_tiles,
    angle_row, angle_head
):
    """Numbers of B rows on the current stream."""
    mamba3_weights_kernel[(n_tiles * (H // BH),)](
        ADT, DT, Trap, within, tail_decay, weight_s, own_dt, T, H,
        BT=BT, BH=BH, num_warps=1, num_stages=1,
    )  # fmt: skip
    rates_kernel[(n_tiles * HA,)](
        Angles, rates, T, HA, angle_row, angle_head,
        S=S, BT=BT, BS=BS, num_warps=4, num_stages=1,
    )  # fmt: skip
