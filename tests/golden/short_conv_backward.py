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
Config:  BD=64 BR=4 BT=32 ahead=2 early=1 language=triton maxnreg=0 num_stages=1 num_warps=1 overlap=0 prefetch=0 read_once=0 words=0
Template digest f20a0be398b59015; made by
    gdn2gen generate --dtype bf16 --with=weight_dtype:fp32,tensors:1,width:3,bias --stage \
      short_conv_backward --config \
      BD=64,BR=4,BT=32,ahead=2,early=1,language=triton,maxnreg=0,num_stages=1,num_warps=1,overlap=0,prefetch=0,read_once=0,words=0
"""

import triton
import triton.language as tl


BR, BT, BD = 4, 32, 64
BP, BC = 32, 64  # rows of partial sums that are added at once, and channels of a program that adds
W = 3  # taps


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
    p_x = x + i_row[:, None] * (x_row * 8) + o_d[None, :]
    p_dy = dy + i_row[:, None] * n_d + o_d[None, :]
    p_dx = dx + i_row[:, None] * (dx_row * 8) + o_d[None, :]
    b_place = i_first
    m_run = (n_rows > 0)[:, None] & m_d
    m_earlier = (b_place >= 2)[:, None]
    b_x0 = tl.load(p_x - 2 * x_row * 8, mask=m_run & m_earlier, other=0.0).to(tl.float32)
    m_earlier = (b_place >= 1)[:, None]
    b_x1 = tl.load(p_x - 1 * x_row * 8, mask=m_run & m_earlier, other=0.0).to(tl.float32)

    # of the tokens after the run, those that hand something back to it
    n_after = tl.where(i_n < B, tl.minimum(T - i_first, BT + 2), 0)
    m_t = (0 < n_after)[:, None] & m_d
    b_row0 = tl.load(p_x + 0 * x_row * 8, mask=m_t, other=0.0)
    b_dy0 = tl.load(p_dy + 0 * n_d, mask=m_t, other=0.0)
    m_t = (1 < n_after)[:, None] & m_d
    b_row1 = tl.load(p_x + 1 * x_row * 8, mask=m_t, other=0.0)
    b_dy1 = tl.load(p_dy + 1 * n_d, mask=m_t, other=0.0)
    b_w0 = tl.load(weight + o_d * 3, mask=o_d < n_d, other=0.0).to(tl.float32)[None, :]
    b_w1 = tl.load(weight + o_d * 3 + 1, mask=o_d < n_d, other=0.0).to(tl.float32)[None, :]
    b_w2 = tl.load(weight + o_d * 3 + 2, mask=o_d < n_d, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(bias + o_d, mask=o_d < n_d, other=0.0).to(tl.float32)[None, :]

    # dx of the last tokens, the nearest first, as far as it is known
    b_dx1 = tl.zeros([BR, BD], tl.float32)
    b_dx2 = tl.zeros([BR, BD], tl.float32)
    b_sum0 = tl.zeros([BR, BD], tl.float32)
    b_sum1 = tl.zeros([BR, BD], tl.float32)
    b_sum2 = tl.zeros([BR, BD], tl.float32)
    b_sum3 = tl.zeros([BR, BD], tl.float32)

    for i_t in range(0, BT, 2):
        b_x2 = b_row0.to(tl.float32)
        b_d = b_dy0.to(tl.float32)
        m_t = (i_t + 2 < n_after)[:, None] & m_d
        b_row0 = tl.load(p_x + (i_t + 2) * x_row * 8, mask=m_t, other=0.0)
        b_dy0 = tl.load(p_dy + (i_t + 2) * n_d, mask=m_t, other=0.0)
        b_pre = b_x0 * b_w0
        b_pre = b_pre + b_x1 * b_w1
        b_pre = b_pre + b_x2 * b_w2
        b_pre = b_pre + b_bias
        b_sigmoid = sigmoid(b_pre)
        b_dpre = b_d * b_sigmoid * (1.0 + b_pre * (1.0 - b_sigmoid))
        b_sum0 += b_dpre * b_x0
        b_sum1 += b_dpre * b_x1
        b_sum2 += b_dpre * b_x2
        b_sum3 += b_dpre
        b_dx = b_dx2 + b_dpre * b_w0
        b_dx2 = b_dx1 + b_dpre * b_w1
        b_dx1 = b_dpre * b_w2
        m_dx = (i_t - 2 >= 0) & (i_t - 2 < n_rows)[:, None] & m_d
        tl.store(p_dx + (i_t - 2) * dx_row * 8, b_dx.to(tl.bfloat16), mask=m_dx)
        b_x3 = b_row1.to(tl.float32)
        b_d = b_dy1.to(tl.float32)
        m_t = (i_t + 3 < n_after)[:, None] & m_d
        b_row1 = tl.load(p_x + (i_t + 3) * x_row * 8, mask=m_t, other=0.0)
        b_dy1 = tl.load(p_dy + (i_t + 3) * n_d, mask=m_t, other=0.0)
        b_pre = b_x1 * b_w0
        b_pre = b_pre + b_x2 * b_w1
        b_pre = b_pre + b_x3 * b_w2
        b_pre = b_pre + b_bias
        b_sigmoid = sigmoid(b_pre)
        b_dpre = b_d * b_sigmoid * (1.0 + b_pre * (1.0 - b_sigmoid))
        b_sum0 += b_dpre * b_x1
        b_sum1 += b_dpre * b_x2
        b_sum2 += b_dpre * b_x3
        b_sum3 += b_dpre
        b_dx = b_dx2 + b_dpre * b_w0
        b_dx2 = b_dx1 + b_dpre * b_w1
        b_dx1 = b_dpre * b_w2
        m_dx = (i_t - 1 >= 0) & (i_t - 1 < n_rows)[:, None] & m_d
        tl.store(p_dx + (i_t - 1) * dx_row * 8, b_dx.to(tl.bfloat16), mask=m_dx)
        b_x0 = b_x2
        b_x1 = b_x3

    # what the tokens after the run hand back to its last ones
    i_t = BT
    b_x2 = b_row0.to(tl.float32)
    b_d = b_dy0.to(tl.float32)
    b_pre = b_x0 * b_w0
    b_pre = b_pre + b_x1 * b_w1
    b_pre = b_pre + b_x2 * b_w2
    b_pre = b_pre + b_bias
    b_sigmoid = sigmoid(b_pre)
    b_dpre = b_d * b_sigmoid * (1.0 + b_pre * (1.0 - b_sigmoid))
    b_dx = b_dx2 + b_dpre * b_w0
    b_dx2 = b_dx1 + b_dpre * b_w1
    b_dx1 = b_dpre * b_w2
    m_dx = (i_t - 2 < n_rows)[:, None] & m_d
    tl.store(p_dx + (i_t - 2) * dx_row * 8, b_dx.to(tl.bfloat16), mask=m_dx)
    b_x3 = b_row1.to(tl.float32)
    b_d = b_dy1.to(tl.float32)
    b_pre = b_x1 * b_w0
    b_pre = b_pre + b_x2 * b_w1
    b_pre = b_pre + b_x3 * b_w2
    b_pre = b_pre + b_bias
    b_sigmoid = sigmoid(b_pre)
    b_dpre = b_d * b_sigmoid * (1.0 + b_pre * (1.0 - b_sigmoid))
    b_dx = b_dx2 + b_dpre * b_w0
    b_dx2 = b_dx1 + b_dpre * b_w1
    b_dx1 = b_dpre * b_w2
    m_dx = (i_t - 1 < n_rows)[:, None] & m_d
    tl.store(p_dx + (i_t - 1) * dx_row * 8, b_dx.to(tl.bfloat16), mask=m_dx)

    n_all = n_d
    p_partial = partial + i_p.to(tl.int64) * (4 * n_all) + o_d
    tl.store(p_partial, tl.sum(b_sum0, 0), mask=o_d < n_d)
    tl.store(p_partial + 1 * n_all, tl.sum(b_sum1, 0), mask=o_d < n_d)
    tl.store(p_partial + 2 * n_all, tl.sum(b_sum2, 0), mask=o_d < n_d)
    tl.store(p_partial + 3 * n_all, tl.sum(b_sum3, 0), mask=o_d < n_d)


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
        W=W, BP=BP, BC=BC, num_warps=4, num_stages=1,
    )  # fmt: skip
