"""Gradients of short convolution with SiLU.

    pre_t  = sum_j weight_j x_(t - 3 + j),   j = 0 .. 3
    dpre_t = dy_t silu'(pre_t)
    dx_t   = sum_j weight_j dpre_(t + 3 - j)
    dweight_j = sum_t dpre_t x_(t - 3 + j)

A program takes a run of BT tokens and BD channels from token to token; x and dy come through shared memory, 3 turns
of 4 tokens ahead. A token's dx is complete 3 tokens later: so a run begins with those before it, whose dx it writes, and
leaves its own last 3 to the next one.
What a program adds up of dweight is a row of `partial`, and sum_kernel adds these rows in their order.

    x        [B, T, D]     bf16  tokens
    weight   [D, W]        bf16  factor of each channel, or of its taps, the oldest first
    dy       [B, T, D]     bf16  gradient of y
    dx       [B, T, D]     bf16  gradient of x
    dweight  [D, W]        bf16  gradient of weight
    partial  [P, W+1, DS]  fp32  scratch: sums of programs for gradients of parameters

Problem: short_convolution bf16, tensors=1
Config:  BD=64 BR=1 BT=32 ahead=4 early=0 language=triton maxnreg=96 num_stages=4 num_warps=1 overlap=0 prefetch=0 read_once=0 words=1
Template digest f20a0be398b59015; made by
    gdn2gen generate --dtype bf16 --with=tensors:1 --stage short_conv_backward --config \
      BD=64,BR=1,BT=32,ahead=4,early=0,language=triton,maxnreg=96,num_stages=4,num_warps=1,overlap=0,prefetch=0,read_once=0,words=1
"""

import triton
import triton.language as tl


BR, BT, BD = 1, 32, 64
BP, BC = 32, 64  # rows of partial sums that are added at once, and channels of a program that adds
W = 4  # taps


# exp(-x) = 2^(x MINUS_LOG2E); b_pre is in units of 1 / MINUS_LOG2E
MINUS_LOG2E = tl.constexpr(-1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    """1 / (1 + 2^x), fp32."""
    # approximate to 2 units in the last place; 1.0
    asm: tl.constexpr = """{
        .reg .f32 t;
        ex2.approx.ftz.f32 t, $1;
        add.ftz.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
    }"""
    return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def unpack(b_words, BR: tl.constexpr, BD: tl.constexpr):
    """Both channels of each word of 32 bits, the first in its low half, in fp32."""
    b_first = (b_words << 16).to(tl.float32, bitcast=True)
    b_second = (b_words & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(b_first, b_second), [BR, BD])


@triton.jit
def rows_of(b_turn, BD: tl.constexpr):
    """The rows of a turn's tile [4, BD // 2], each [1, BD // 2]."""
    b_0_0 = tl.permute(tl.reshape(b_turn, [2, 2, BD // 2]), [2, 1, 0])
    b_1_0, b_1_1 = tl.split(b_0_0)
    b_2_0, b_2_1 = tl.split(b_1_0)
    b_2_2, b_2_3 = tl.split(b_1_1)
    return b_2_0[None, :], b_2_1[None, :], b_2_2[None, :], b_2_3[None, :]


@triton.jit(do_not_specialize=["B", "T", "units", "x_row", "dx_row"])
def short_conv_backward_kernel(
    x,
    weight,
    dy,
    dx,
    partial,
    B,
    T,
    units,
    x_row,
    dx_row,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    n_blocks = tl.cdiv(units * 8, BD)
    i_d, i_p = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks

    n_d = units * 8
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = (o_d < n_d)[None, :]
    n_runs = tl.cdiv(T, BT)
    i_run = i_p * BR + tl.arange(0, BR)
    i_n = i_run // n_runs
    i_first = (i_run % n_runs) * BT
    i_row = i_n.to(tl.int64) * T + i_first
    n_rows = tl.where(i_n < B, tl.minimum(T - i_first, BT), 0)
    # words of two channels
    o_w = i_d * (BD // 2) + tl.arange(0, BD // 2)
    m_w = (o_w < units * 4)[None, :]
    x_step = x_row * 4
    p_x = x.to(tl.pointer_type(tl.int32)) + i_row[:, None] * x_step
    o_x = o_w[None, :]
    dy_step = units * 4
    p_dy = dy.to(tl.pointer_type(tl.int32)) + i_row[:, None] * dy_step
    o_dy = o_w[None, :]
    dx_step = dx_row * 8
    p_dx = dx + i_row[:, None] * dx_step
    o_dx = o_d[None, :] - 3 * dx_step
    b_place = i_first
    m_earlier = (b_place >= 3)[:, None]
    b_x0 = unpack(tl.load(p_x + (o_x - 3 * x_step), mask=(n_rows > 0)[:, None] & m_earlier & m_w, other=0), BR, BD)
    m_earlier = (b_place >= 2)[:, None]
    b_x1 = unpack(tl.load(p_x + (o_x - 2 * x_step), mask=(n_rows > 0)[:, None] & m_earlier & m_w, other=0), BR, BD)
    m_earlier = (b_place >= 1)[:, None]
    b_x2 = unpack(tl.load(p_x + (o_x - 1 * x_step), mask=(n_rows > 0)[:, None] & m_earlier & m_w, other=0), BR, BD)

    b_taps = tl.load(weight.to(tl.pointer_type(tl.int64)) + o_d, mask=o_d < n_d, other=0)
    b_w0 = b_taps.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]
    b_w1 = (b_taps >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]
    b_w2 = (b_taps >> 32).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]
    b_w3 = (b_taps >> 48).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]
    b_w0 *= MINUS_LOG2E
    b_w1 *= MINUS_LOG2E
    b_w2 *= MINUS_LOG2E
    b_w3 *= MINUS_LOG2E

    # dx of the last tokens, the nearest first, as far as it is known
    b_dx1 = tl.zeros([BR, BD], tl.float32)
    b_dx2 = tl.zeros([BR, BD], tl.float32)
    b_dx3 = tl.zeros([BR, BD], tl.float32)
    b_sum0 = tl.zeros([BR, BD], tl.float32)
    b_sum1 = tl.zeros([BR, BD], tl.float32)
    b_sum2 = tl.zeros([BR, BD], tl.float32)
    b_sum3 = tl.zeros([BR, BD], tl.float32)

    # the tokens before the run hand back, too: their own inputs, and their dy
    m_before = ((i_first > 0) & (n_rows > 0))[:, None] & m_w
    b_x3 = b_x0
    b_x4 = b_x1
    b_x5 = b_x2
    b_x0 = unpack(tl.load(p_x + (o_x - 6 * x_step), mask=m_before, other=0), BR, BD)
    b_d0 = unpack(tl.load(p_dy + (o_dy - 3 * dy_step), mask=m_before, other=0), BR, BD)
    b_x1 = unpack(tl.load(p_x + (o_x - 5 * x_step), mask=m_before, other=0), BR, BD)
    b_d1 = unpack(tl.load(p_dy + (o_dy - 2 * dy_step), mask=m_before, other=0), BR, BD)
    b_x2 = unpack(tl.load(p_x + (o_x - 4 * x_step), mask=m_before, other=0), BR, BD)
    b_d2 = unpack(tl.load(p_dy + (o_dy - 1 * dy_step), mask=m_before, other=0), BR, BD)
    b_pre = b_x0 * b_w0
    b_pre = b_pre + b_x1 * b_w1
    b_pre = b_pre + b_x2 * b_w2
    b_pre = b_pre + b_x3 * b_w3
    b_sigmoid = sigmoid(b_pre)
    b_dpre = b_d0 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
    b_dx = b_dx3 + b_dpre * b_w0
    b_dx3 = b_dx2 + b_dpre * b_w1
    b_dx2 = b_dx1 + b_dpre * b_w2
    b_dx1 = b_dpre * b_w3
    b_pre = b_x1 * b_w0
    b_pre = b_pre + b_x2 * b_w1
    b_pre = b_pre + b_x3 * b_w2
    b_pre = b_pre + b_x4 * b_w3
    b_sigmoid = sigmoid(b_pre)
    b_dpre = b_d1 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
    b_dx = b_dx3 + b_dpre * b_w0
    b_dx3 = b_dx2 + b_dpre * b_w1
    b_dx2 = b_dx1 + b_dpre * b_w2
    b_dx1 = b_dpre * b_w3
    b_pre = b_x2 * b_w0
    b_pre = b_pre + b_x3 * b_w1
    b_pre = b_pre + b_x4 * b_w2
    b_pre = b_pre + b_x5 * b_w3
    b_sigmoid = sigmoid(b_pre)
    b_dpre = b_d2 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
    b_dx = b_dx3 + b_dpre * b_w0
    b_dx3 = b_dx2 + b_dpre * b_w1
    b_dx2 = b_dx1 + b_dpre * b_w2
    b_dx1 = b_dpre * b_w3
    b_x0 = b_x3
    b_x1 = b_x4
    b_x2 = b_x5
    # a turn's tile: its tokens, and their words
    i_turn = tl.arange(0, 4)[:, None]
    o_x = i_turn * x_step + o_w[None, :]
    o_dy = i_turn * dy_step + o_w[None, :]
    for i_t in tl.range(0, BT, 4, num_stages=4):
        m_turn = (i_t + i_turn < n_rows[:, None]) & m_w
        b_turn_x = tl.load(p_x + o_x, mask=m_turn, other=0)
        b_turn_dy = tl.load(p_dy + o_dy, mask=m_turn, other=0)
        o_x += 4 * x_step
        o_dy += 4 * dy_step
        b_row0, b_row1, b_row2, b_row3 = rows_of(b_turn_x, BD)
        b_dy0, b_dy1, b_dy2, b_dy3 = rows_of(b_turn_dy, BD)
        b_x3 = unpack(b_row0, BR, BD)
        b_d0 = unpack(b_dy0, BR, BD)
        b_x4 = unpack(b_row1, BR, BD)
        b_d1 = unpack(b_dy1, BR, BD)
        b_x5 = unpack(b_row2, BR, BD)
        b_d2 = unpack(b_dy2, BR, BD)
        b_x6 = unpack(b_row3, BR, BD)
        b_d3 = unpack(b_dy3, BR, BD)
        b_pre = b_x0 * b_w0
        b_pre = b_pre + b_x1 * b_w1
        b_pre = b_pre + b_x2 * b_w2
        b_pre = b_pre + b_x3 * b_w3
        b_sigmoid = sigmoid(b_pre)
        b_dpre = b_d0 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
        b_sum0 += b_dpre * b_x0
        b_sum1 += b_dpre * b_x1
        b_sum2 += b_dpre * b_x2
        b_sum3 += b_dpre * b_x3
        b_dx = b_dx3 + b_dpre * b_w0
        b_dx3 = b_dx2 + b_dpre * b_w1
        b_dx2 = b_dx1 + b_dpre * b_w2
        b_dx1 = b_dpre * b_w3
        m_dx = (i_first + i_t >= 3)[:, None] & (i_t - 3 < n_rows)[:, None] & m_d
        tl.store(p_dx + o_dx, b_dx.to(tl.bfloat16), mask=m_dx)
        o_dx += dx_step
        b_pre = b_x1 * b_w0
        b_pre = b_pre + b_x2 * b_w1
        b_pre = b_pre + b_x3 * b_w2
        b_pre = b_pre + b_x4 * b_w3
        b_sigmoid = sigmoid(b_pre)
        b_dpre = b_d1 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
        b_sum0 += b_dpre * b_x1
        b_sum1 += b_dpre * b_x2
        b_sum2 += b_dpre * b_x3
        b_sum3 += b_dpre * b_x4
        b_dx = b_dx3 + b_dpre * b_w0
        b_dx3 = b_dx2 + b_dpre * b_w1
        b_dx2 = b_dx1 + b_dpre * b_w2
        b_dx1 = b_dpre * b_w3
        m_dx = (i_first + i_t >= 2)[:, None] & (i_t - 2 < n_rows)[:, None] & m_d
        tl.store(p_dx + o_dx, b_dx.to(tl.bfloat16), mask=m_dx)
        o_dx += dx_step
        b_pre = b_x2 * b_w0
        b_pre = b_pre + b_x3 * b_w1
        b_pre = b_pre + b_x4 * b_w2
        b_pre = b_pre + b_x5 * b_w3
        b_sigmoid = sigmoid(b_pre)
        b_dpre = b_d2 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
        b_sum0 += b_dpre * b_x2
        b_sum1 += b_dpre * b_x3
        b_sum2 += b_dpre * b_x4
        b_sum3 += b_dpre * b_x5
        b_dx = b_dx3 + b_dpre * b_w0
        b_dx3 = b_dx2 + b_dpre * b_w1
        b_dx2 = b_dx1 + b_dpre * b_w2
        b_dx1 = b_dpre * b_w3
        m_dx = (i_first + i_t >= 1)[:, None] & (i_t - 1 < n_rows)[:, None] & m_d
        tl.store(p_dx + o_dx, b_dx.to(tl.bfloat16), mask=m_dx)
        o_dx += dx_step
        b_pre = b_x3 * b_w0
        b_pre = b_pre + b_x4 * b_w1
        b_pre = b_pre + b_x5 * b_w2
        b_pre = b_pre + b_x6 * b_w3
        b_sigmoid = sigmoid(b_pre)
        b_dpre = b_d3 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
        b_sum0 += b_dpre * b_x3
        b_sum1 += b_dpre * b_x4
        b_sum2 += b_dpre * b_x5
        b_sum3 += b_dpre * b_x6
        b_dx = b_dx3 + b_dpre * b_w0
        b_dx3 = b_dx2 + b_dpre * b_w1
        b_dx2 = b_dx1 + b_dpre * b_w2
        b_dx1 = b_dpre * b_w3
        m_dx = (i_t < n_rows)[:, None] & m_d
        tl.store(p_dx + o_dx, b_dx.to(tl.bfloat16), mask=m_dx)
        o_dx += dx_step
        b_x0 = b_x4
        b_x1 = b_x5
        b_x2 = b_x6

    # nothing comes after the last run of a sequence
    m_last = (i_first + BT >= T)[:, None] & m_d
    tl.store(p_dx + o_dx, b_dx3.to(tl.bfloat16), mask=(BT - 3 < n_rows)[:, None] & m_last)
    o_dx += dx_step
    tl.store(p_dx + o_dx, b_dx2.to(tl.bfloat16), mask=(BT - 2 < n_rows)[:, None] & m_last)
    o_dx += dx_step
    tl.store(p_dx + o_dx, b_dx1.to(tl.bfloat16), mask=(BT - 1 < n_rows)[:, None] & m_last)

    n_all = n_d
    p_partial = partial + i_p.to(tl.int64) * (4 * n_all) + o_d
    tl.store(p_partial, tl.sum(b_sum0, 0) * MINUS_LOG2E, mask=o_d < n_d)
    tl.store(p_partial + 1 * n_all, tl.sum(b_sum1, 0) * MINUS_LOG2E, mask=o_d < n_d)
    tl.store(p_partial + 2 * n_all, tl.sum(b_sum2, 0) * MINUS_LOG2E, mask=o_d < n_d)
    tl.store(p_partial + 3 * n_all, tl.sum(b_sum3, 0) * MINUS_LOG2E, mask=o_d < n_d)


@triton.jit(do_not_specialize=["n_programs", "units"])
def sum_kernel(
    partial,
    dweight,
    n_programs,
    units,
    W: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    i_w, i_d = tl.program_id(0) % 4, tl.program_id(0) // 4
    n_d = units * 8
    o_d = i_d * BC + tl.arange(0, BC)
    p_partial = partial + i_w * n_d + o_d[None, :]
    b_sum = tl.zeros([BP, BC], tl.float32)
    for i_p in range(0, n_programs, BP):
        o_p = i_p + tl.arange(0, BP)
        m_p = (o_p < n_programs)[:, None] & (o_d < n_d)[None, :]
        b_sum += tl.load(p_partial + o_p.to(tl.int64)[:, None] * (4 * n_d), mask=m_p, other=0.0)
    b_total = tl.sum(b_sum, 0).to(tl.bfloat16)
    tl.store(dweight + o_d * W + i_w, b_total, mask=o_d < n_d)


def launch(
    x, weight, dy, dx, dweight, partial, *, B, T, units, x_row, dx_row
):
    """Gradients of B rows of tokens on the current stream."""
    n_blocks = triton.cdiv(units * 8, BD)
    n_programs = triton.cdiv(B * triton.cdiv(T, BT), BR)
    short_conv_backward_kernel[(n_programs * n_blocks,)](
        x, weight, dy, dx, partial, B, T, units, x_row, dx_row,
        BR=BR, BT=BT, BD=BD,
        num_warps=1, num_stages=4, maxnreg=96,
    )  # fmt: skip
    n_blocks = triton.cdiv(units * 8, BC)
    sum_kernel[(n_blocks * 4,)](
        partial, dweight, n_programs, units,
        W=W, BP=BP, BC=BC, num_warps=4, num_stages=1,
    )  # fmt: skip
