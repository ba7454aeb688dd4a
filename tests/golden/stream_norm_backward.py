"""Gradients of RMSNorm of rows of a residual stream, and of the stream that goes on beside it.

    rstd = 1 / sqrt(mean(x^2) + eps),   xhat = x rstd,   dxhat = dy weight
    dx = dtotal + rstd (dxhat - xhat mean(dxhat xhat))
    dadded = dx
    dweight = sum over rows of dy xhat

A program takes BT tiles of BR rows. What it adds up of dweight is a row of `partial`, and sum_kernel adds
these rows in their order.

    x        [M, D]   fp32  tokens
    weight   [D]      bf16  factor of each channel, or of its taps, the oldest first
    dy       [M, D]   bf16  gradient of y
    dtotal   [M, D]   fp32  gradient of the stream after it
    dx       [M, D]   fp32  gradient of x
    dadded   [M, D]   bf16  gradient of added
    dweight  [D]      bf16  gradient of weight
    partial  [P, DS]  fp32  scratch: sums of programs for gradients of parameters

Problem: stream_norm bf16, size=96, added
Config:  BR=1 BT=32 early=1 language=triton num_stages=1 num_warps=1
Template digest 58e902faed3368a8; made by
    gdn2gen generate --dtype bf16 --with=size:96,added --stage stream_norm_backward --config \
      BR=1,BT=32,early=1,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BR, BT = 1, 32
D, BD = 96, 128
BP, BC = 1024, 8  # rows of partial sums that are added at once, and channels of a program that adds


@triton.jit(do_not_specialize=["eps", "M"])
def stream_norm_backward_kernel(
    x,
    weight,
    dy,
    dtotal,
    dx,
    dadded,
    partial,
    eps,
    M,
    D: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    i_row = tl.program_id(0).to(tl.int64) * (BR * BT)
    b_sum = tl.zeros([BR, BD], tl.float32)
    o_m = i_row + tl.arange(0, BR)
    p_x = o_m[:, None] * D + o_d[None, :]
    m_x = (o_m < M)[:, None] & m_d
    b_x = tl.load(x + p_x, mask=m_x, other=0.0)
    b_dy = tl.load(dy + p_x, mask=m_x, other=0.0)
    b_dtotal = tl.load(dtotal + p_x, mask=m_x, other=0.0)

    for i_t in range(BT):
        o_m = i_row + (i_t + 1) * BR + tl.arange(0, BR)
        p_x = o_m[:, None] * D + o_d[None, :]
        m_x = ((o_m < M) & (i_t + 1 < BT))[:, None] & m_d
        b_next_x = tl.load(x + p_x, mask=m_x, other=0.0)
        b_next_dy = tl.load(dy + p_x, mask=m_x, other=0.0)
        b_next_dtotal = tl.load(dtotal + p_x, mask=m_x, other=0.0)
        o_m = i_row + i_t * BR + tl.arange(0, BR)
        p_x = o_m[:, None] * D + o_d[None, :]
        m_x = (o_m < M)[:, None] & m_d
        b_x = b_x.to(tl.float32)
        b_dy = b_dy.to(tl.float32)
        b_dtotal = b_dtotal.to(tl.float32)

        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
        b_xhat = b_x * b_rstd
        b_sum += b_dy * b_xhat
        b_dxhat = b_dy * b_w
        b_mean = (tl.sum(b_dxhat * b_xhat, 1) / D)[:, None]
        b_dx = b_dtotal + b_rstd * (b_dxhat - b_xhat * b_mean)
        tl.store(dx + p_x, b_dx.to(tl.float32), mask=m_x)
        tl.store(dadded + p_x, b_dx.to(tl.bfloat16), mask=m_x)
        b_x = b_next_x
        b_dy = b_next_dy
        b_dtotal = b_next_dtotal

    p_partial = partial + tl.program_id(0).to(tl.int64) * D + o_d
    tl.store(p_partial, tl.sum(b_sum, 0), mask=o_d < D)


@triton.jit(do_not_specialize=["n_programs", "units"])
def sum_kernel(
    partial,
    dweight,
    n_programs,
    units,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    i_d = tl.program_id(0)
    n_d = units * 8
    o_d = i_d * BC + tl.arange(0, BC)
    p_partial = partial + o_d[None, :]
    b_sum = tl.zeros([BP, BC], tl.float32)
    for i_p in range(0, n_programs, BP):
        o_p = i_p + tl.arange(0, BP)
        m_p = (o_p < n_programs)[:, None] & (o_d < n_d)[None, :]
        b_sum += tl.load(p_partial + o_p.to(tl.int64)[:, None] * n_d, mask=m_p, other=0.0)
    b_total = tl.sum(b_sum, 0).to(tl.bfloat16)
    tl.store(dweight + o_d, b_total, mask=o_d < n_d)


def launch(
    x, weight, dy, dtotal, dx, dadded, dweight, partial, *, eps, M
):
    """Gradients of M rows on the current stream."""
    n_programs = triton.cdiv(M, BR * BT)
    stream_norm_backward_kernel[(n_programs,)](
        x, weight, dy, dtotal, dx, dadded, partial, eps, M,
        D=D, BR=BR, BT=BT, BD=BD,
        num_warps=1, num_stages=1,
    )
    units = D // 8
    n_blocks = triton.cdiv(units * 8, BC)
    sum_kernel[(n_blocks,)](
        partial, dweight, n_programs, units,
        BP=BP, BC=BC, num_warps=8, num_stages=1,
    )  # fmt: skip
