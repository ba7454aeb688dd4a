"""Gradients of short convolution with SiLU.

    pre_t  = sum_j weight_j x_(t - 2 + j) + bias,   j = 0 .. 2
    dpre_t = dy_t silu'(pre_t)
    dx_t   = sum_j weight_j dpre_(t + 2 - j)
    dweight_j = sum_t dpre_t x_(t - 2 + j),   dbias = sum_t dpre_t

A program takes BR runs of BT tokens and BD channels, each run by a warp from token to token. A token's dx is
complete 2 tokens later: so a run begins with 2 inputs before it, and ends with 2 tokens after it.
What a program adds up of dweight is a row of `partial`, and sum_kernel adds these rows in their order.

    x        [B, T, D]     bf16  tokens
    weight   [D, W]        fp32  factor of each channel, or of its taps, the oldest first
    bias     [D]           fp32  added before SiLU
    dy       [B, T, D]     bf16  gradient of y
    dx       [B, T, D]     bf16  gradient of x
    dweight  [D, W]        fp32  gradient of weight
    dbias    [D]           fp32  gradient of bias
    partial  [P, W+1, DS]  fp32  scratch: sums of programs for gradients of parameters

Problem: short_convolution bf16, weight_dtype=fp32, tensors=1, width=3, bias
Config:  BD=64 BR=4 BT=32 ahead=4 early=1 language=triton maxnreg=0 num_stages=1 num_warps=1 overlap=1 prefetch=1 read_once=0 words=1
Template digest f20a0be398b59015; made by
    gdn2gen generate --dtype bf16 --with=weight_dtype:fp32,tensors:1,width:3,bias --stage \
      short_conv_backward --config \
      BD=64,BR=4,BT=32,ahead=4,early=1,language=triton,maxnreg=0,num_stages=1,num_warps=1,overlap=1,prefetch=1,read_once=0,words=1
"""

import triton
import triton.language as tl


BR, BT, BD = 4, 32, 64
BP, BC = 32, 64  # rows of partial sums that are added at once, and channels of a program that adds
W = 3  # taps
# Launched before the kernel before has ended; for that it waits first of all.
EARLY = ("sum_kernel",)


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
def prefetch(places, wanted):
    """Have the lines of these places in the L2, where they are wanted."""
    asm: tl.constexpr = """{
        .reg .pred p;
        setp.ne.s32 p, $2, 0;
        @p prefetch.global.L2 [$1];
        mov.b32 $0, 0;
    }"""
    tl.inline_asm_elementwise(asm, "=r,l,r", [places, wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["B", "T", "units", "x_row", "dx_row"])
def short_conv_backward_kernel(
    x,
    weight,
    bias,
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
    # sum_kernel may begin, and wait there
    tl.extra.cuda.gdc_launch_dependents()
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
    o_dx = o_d[None, :] - 2 * dx_step
    b_place = i_first
    m_earlier = (b_place >= 2)[:, None]
    b_x0 = unpack(tl.load(p_x + (o_x - 2 * x_step), mask=(n_rows > 0)[:, None] & m_earlier & m_w, other=0), BR, BD)
    m_earlier = (b_place >= 1)[:, None]
    b_x1 = unpack(tl.load(p_x + (o_x - 1 * x_step), mask=(n_rows > 0)[:, None] & m_earlier & m_w, other=0), BR, BD)

    # of the tokens after the run, those that hand something back to it
    n_after = tl.where(i_n < B, tl.minimum(T - i_first, BT + 2), 0)
    m_t = (0 < n_after)[:, None] & m_w
    b_row0 = tl.load(p_x + o_x, mask=m_t, other=0)
    o_x += x_step
    b_dy0 = tl.load(p_dy + o_dy, mask=m_t, other=0)
    o_dy += dy_step
    m_t = (1 < n_after)[:, None] & m_w
    b_row1 = tl.load(p_x + o_x, mask=m_t, other=0)
    o_x += x_step
    b_dy1 = tl.load(p_dy + o_dy, mask=m_t, other=0)
    o_dy += dy_step
    m_t = (2 < n_after)[:, None] & m_w
    b_row2 = tl.load(p_x + o_x, mask=m_t, other=0)
    o_x += x_step
    b_dy2 = tl.load(p_dy + o_dy, mask=m_t, other=0)
    o_dy += dy_step
    m_t = (3 < n_after)[:, None] & m_w
    b_row3 = tl.load(p_x + o_x, mask=m_t, other=0)
    o_x += x_step
    b_dy3 = tl.load(p_dy + o_dy, mask=m_t, other=0)
    o_dy += dy_step
    # a lane's sector of 32 bytes among those of a turn
    o_sector = tl.arange(0, 4 * (BD // 16))
    i_sector = i_d * (BD // 2) + o_sector % (BD // 16) * 8
    m_sector = (i_sector < units * 4)[None, :]
    o_after = (o_sector // (BD // 16))[None, :]
    o_next_x = o_after * x_step + i_sector[None, :] + 4 * x_step
    o_next_dy = o_after * dy_step + i_sector[None, :] + 4 * dy_step
    m_next = (4 + o_after < n_after[:, None]) & m_sector
    prefetch(p_x + o_next_x, m_next)
    prefetch(p_dy + o_next_dy, m_next)
    o_next_x += 4 * x_step
    o_next_dy += 4 * dy_step

    b_w0 = tl.load(weight + o_d * 3, mask=o_d < n_d, other=0.0).to(tl.float32)[None, :]
    b_w1 = tl.load(weight + o_d * 3 + 1, mask=o_d < n_d, other=0.0).to(tl.float32)[None, :]
    b_w2 = tl.load(weight + o_d * 3 + 2, mask=o_d < n_d, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(bias + o_d, mask=o_d < n_d, other=0.0).to(tl.float32)[None, :]
    b_w0 *= MINUS_LOG2E
    b_w1 *= MINUS_LOG2E
    b_w2 *= MINUS_LOG2E
    b_bias *= MINUS_LOG2E

    # dx of the last tokens, the nearest first, as far as it is known
    b_dx1 = tl.zeros([BR, BD], tl.float32)
    b_dx2 = tl.zeros([BR, BD], tl.float32)
    b_sum0 = tl.zeros([BR, BD], tl.float32)
    b_sum1 = tl.zeros([BR, BD], tl.float32)
    b_sum2 = tl.zeros([BR, BD], tl.float32)
    b_sum3 = tl.zeros([BR, BD], tl.float32)

    for i_t in range(0, BT, 4):
        m_next = (i_t + 8 + o_after < n_after[:, None]) & m_sector
        prefetch(p_x + o_next_x, m_next)
        prefetch(p_dy + o_next_dy, m_next)
        o_next_x += 4 * x_step
        o_next_dy += 4 * dy_step
        b_x2 = unpack(b_row0, BR, BD)
        b_d0 = unpack(b_dy0, BR, BD)
        b_x3 = unpack(b_row1, BR, BD)
        b_d1 = unpack(b_dy1, BR, BD)
        b_x4 = unpack(b_row2, BR, BD)
        b_d2 = unpack(b_dy2, BR, BD)
        b_x5 = unpack(b_row3, BR, BD)
        b_d3 = unpack(b_dy3, BR, BD)
        m_t = (i_t + 4 < n_after)[:, None] & m_w
        b_row0 = tl.load(p_x + o_x, mask=m_t, other=0)
        o_x += x_step
        b_dy0 = tl.load(p_dy + o_dy, mask=m_t, other=0)
        o_dy += dy_step
        m_t = (i_t + 5 < n_after)[:, None] & m_w
        b_row1 = tl.load(p_x + o_x, mask=m_t, other=0)
        o_x += x_step
        b_dy1 = tl.load(p_dy + o_dy, mask=m_t, other=0)
        o_dy += dy_step
        m_t = (i_t + 6 < n_after)[:, None] & m_w
        b_row2 = tl.load(p_x + o_x, mask=m_t, other=0)
        o_x += x_step
        b_dy2 = tl.load(p_dy + o_dy, mask=m_t, other=0)
        o_dy += dy_step
        m_t = (i_t + 7 < n_after)[:, None] & m_w
        b_row3 = tl.load(p_x + o_x, mask=m_t, other=0)
        o_x += x_step
        b_dy3 = tl.load(p_dy + o_dy, mask=m_t, other=0)
        o_dy += dy_step
        b_pre = b_x0 * b_w0
        b_pre = b_pre + b_x1 * b_w1
        b_pre = b_pre + b_x2 * b_w2
        b_pre = b_pre + b_bias
        b_sigmoid = sigmoid(b_pre)
        b_dpre = b_d0 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
        b_sum0 += b_dpre * b_x0
        b_sum1 += b_dpre * b_x1
        b_sum2 += b_dpre * b_x2
        b_sum3 += b_dpre
        b_dx = b_dx2 + b_dpre * b_w0
        b_dx2 = b_dx1 + b_dpre * b_w1
        b_dx1 = b_dpre * b_w2
        m_dx = (i_t > 0) & (i_t - 2 < n_rows)[:, None] & m_d
        tl.store(p_dx + o_dx, b_dx.to(tl.bfloat16), mask=m_dx)
        o_dx += dx_step
        b_pre = b_x1 * b_w0
        b_pre = b_pre + b_x2 * b_w1
        b_pre = b_pre + b_x3 * b_w2
        b_pre = b_pre + b_bias
        b_sigmoid = sigmoid(b_pre)
        b_dpre = b_d1 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
        b_sum0 += b_dpre * b_x1
        b_sum1 += b_dpre * b_x2
        b_sum2 += b_dpre * b_x3
        b_sum3 += b_dpre
        b_dx = b_dx2 + b_dpre * b_w0
        b_dx2 = b_dx1 + b_dpre * b_w1
        b_dx1 = b_dpre * b_w2
        m_dx = (i_t > 0) & (i_t - 1 < n_rows)[:, None] & m_d
        tl.store(p_dx + o_dx, b_dx.to(tl.bfloat16), mask=m_dx)
        o_dx += dx_step
        b_pre = b_x2 * b_w0
        b_pre = b_pre + b_x3 * b_w1
        b_pre = b_pre + b_x4 * b_w2
        b_pre = b_pre + b_bias
        b_sigmoid = sigmoid(b_pre)
        b_dpre = b_d2 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
        b_sum0 += b_dpre * b_x2
        b_sum1 += b_dpre * b_x3
        b_sum2 += b_dpre * b_x4
        b_sum3 += b_dpre
        b_dx = b_dx2 + b_dpre * b_w0
        b_dx2 = b_dx1 + b_dpre * b_w1
        b_dx1 = b_dpre * b_w2
        m_dx = (i_t < n_rows)[:, None] & m_d
        tl.store(p_dx + o_dx, b_dx.to(tl.bfloat16), mask=m_dx)
        o_dx += dx_step
        b_pre = b_x3 * b_w0
        b_pre = b_pre + b_x4 * b_w1
        b_pre = b_pre + b_x5 * b_w2
        b_pre = b_pre + b_bias
        b_sigmoid = sigmoid(b_pre)
        b_dpre = b_d3 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
        b_sum0 += b_dpre * b_x3
        b_sum1 += b_dpre * b_x4
        b_sum2 += b_dpre * b_x5
        b_sum3 += b_dpre
        b_dx = b_dx2 + b_dpre * b_w0
        b_dx2 = b_dx1 + b_dpre * b_w1
        b_dx1 = b_dpre * b_w2
        m_dx = (i_t + 1 < n_rows)[:, None] & m_d
        tl.store(p_dx + o_dx, b_dx.to(tl.bfloat16), mask=m_dx)
        o_dx += dx_step
        b_x0 = b_x4
        b_x1 = b_x5

    # what the tokens after the run hand back to its last ones
    i_t = BT
    b_x2 = unpack(b_row0, BR, BD)
    b_d0 = unpack(b_dy0, BR, BD)
    b_x3 = unpack(b_row1, BR, BD)
    b_d1 = unpack(b_dy1, BR, BD)
    b_pre = b_x0 * b_w0
    b_pre = b_pre + b_x1 * b_w1
    b_pre = b_pre + b_x2 * b_w2
    b_pre = b_pre + b_bias
    b_sigmoid = sigmoid(b_pre)
    b_dpre = b_d0 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
    b_dx = b_dx2 + b_dpre * b_w0
    b_dx2 = b_dx1 + b_dpre * b_w1
    b_dx1 = b_dpre * b_w2
    m_dx = (i_t - 2 < n_rows)[:, None] & m_d
    tl.store(p_dx + o_dx, b_dx.to(tl.bfloat16), mask=m_dx)
    o_dx += dx_step
    b_pre = b_x1 * b_w0
    b_pre = b_pre + b_x2 * b_w1
    b_pre = b_pre + b_x3 * b_w2
    b_pre = b_pre + b_bias
    b_sigmoid = sigmoid(b_pre)
    b_dpre = b_d1 * b_sigmoid * (b_pre * (LN2 * LN2 - LN2 * LN2 * b_sigmoid) - LN2)
    b_dx = b_dx2 + b_dpre * b_w0
    b_dx2 = b_dx1 + b_dpre * b_w1
    b_dx1 = b_dpre * b_w2
    m_dx = (i_t - 1 < n_rows)[:, None] & m_d
    tl.store(p_dx + o_dx, b_dx.to(tl.bfloat16), mask=m_dx)
    o_dx += dx_step

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
    dbias,
    n_programs,
    units,
    W: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    # all partial sums are there from here on
    tl.extra.cuda.gdc_wait()
    i_w, i_d = tl.program_id(0) % 4, tl.program_id(0) // 4
    n_d = units * 8
    o_d = i_d * BC + tl.arange(0, BC)
    p_partial = partial + i_w * n_d + o_d[None, :]
    b_sum = tl.zeros([BP, BC], tl.float32)
    for i_p in range(0, n_programs, BP):
        o_p = i_p + tl.arange(0, BP)
        m_p = (o_p < n_programs)[:, None] & (o_d < n_d)[None, :]
        b_sum += tl.load(p_partial + o_p.to(tl.int64)[:, None] * (4 * n_d), mask=m_p, other=0.0)
    b_total = tl.sum(b_sum, 0).to(tl.float32)
    if i_w < W:
        tl.store(dweight + o_d * W + i_w, b_total, mask=o_d < n_d)
    else:
        tl.store(dbias + o_d, b_total, mask=o_d < n_d)


def launch(
    x, weight, bias, dy, dx, dweight, dbias, partial, *, B, T, units, x_row, dx_row
):
    """Gradients of B rows of tokens on the current stream."""
    n_blocks = triton.cdiv(units * 8, BD)
    n_programs = triton.cdiv(B * triton.cdiv(T, BT), BR)
    short_conv_backward_kernel[(n_programs * n_blocks,)](
        x, weight, bias, dy, dx, partial, B, T, units, x_row, dx_row,
        BR=BR, BT=BT, BD=BD,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    n_blocks = triton.cdiv(units * 8, BC)
    sum_kernel[(n_blocks * 4,)](
        partial, dweight, dbias, n_programs, units,
        W=W, BP=BP, BC=BC, num_warps=4, num_stages=1, launch_pdl=True,
    )  # fmt: skip
