"""Gradients of RMSNorm of rows, times an activated gate.

    rstd = 1 / sqrt(mean(x^2) + eps),   xhat = x rstd,   a = silu(gate)
    dxhat = dy weight a
    dx = rstd (dxhat - xhat mean(dxhat xhat))
    dgate = dy weight xhat silu'(gate)
    dweight = sum over rows of dy xhat a

A program takes BT tiles of BR rows. What it adds up of dweight is a row of `partial`, and sum_kernel adds
these rows in their order.

    x        [M, D]   bf16  tokens
    gate     [M, D]   bf16  output gate, before its activation
    weight   [D]      bf16  factor of each channel, or of its taps, the oldest first
    dy       [M, D]   bf16  gradient of y
    dx       [M, D]   bf16  gradient of x
    dgate    [M, D]   bf16  gradient of gate
    dweight  [D]      bf16  gradient of weight
    partial  [P, DS]  fp32  scratch: sums of programs for gradients of parameters

Problem: gated_rms_norm bf16, size=96, activation=silu
Config:  BR=16 BT=31 early=1 language=triton num_stages=1 num_warps=1 overlap=1 read_once=0 spread=1 words=1
Template digest 0a7fb6c19c642844; made by
    gdn2gen generate --dtype bf16 --with=size:96,activation:silu --stage gated_norm_backward \
      --config \
      BR=16,BT=31,early=1,language=triton,num_stages=1,num_warps=1,overlap=1,read_once=0,spread=1,words=1
"""

import triton
import triton.language as tl


BR, BT = 16, 31
D, BD = 96, 128
BP, BC = 1024, 8  # rows of partial sums that are added at once, and channels of a program that adds
# Launched before the kernel before has ended; for that it waits first of all.
EARLY = ("sum_kernel",)


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
def unpack(b_words, BR: tl.constexpr, BD: tl.constexpr):
    """Both channels of each word of 32 bits, the first in its low half, in fp32."""
    b_first = (b_words << 16).to(tl.float32, bitcast=True)
    b_second = (b_words & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(b_first, b_second), [BR, BD])


@triton.jit(do_not_specialize=["eps", "M"])
def gated_norm_backward_kernel(
    x,
    gate,
    weight,
    dy,
    dx,
    dgate,
    partial,
    eps,
    M,
    D: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    # sum_kernel may begin, and wait there
    tl.extra.cuda.gdc_launch_dependents()
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    # words of two channels
    o_w = tl.arange(0, BD // 2)
    m_w = (o_w < D // 2)[None, :]
    i_row = tl.program_id(0).to(tl.int64) * BR
    n_turn = tl.num_programs(0).to(tl.int64) * BR  # rows of all programs at a turn

    b_sum = tl.zeros([BR, BD], tl.float32)
    o_m = i_row + tl.arange(0, BR)
    p_in = o_m[:, None] * (D // 2) + o_w[None, :]
    m_in = (o_m < M)[:, None] & m_w
    b_x_in = tl.load(x.to(tl.pointer_type(tl.int32)) + p_in, mask=m_in, other=0)
    b_gate_in = tl.load(gate.to(tl.pointer_type(tl.int32)) + p_in, mask=m_in, other=0)
    b_dy_in = tl.load(dy.to(tl.pointer_type(tl.int32)) + p_in, mask=m_in, other=0)

    for i_t in range(BT):
        b_x = unpack(b_x_in, BR, BD)
        b_gate = unpack(b_gate_in, BR, BD)
        b_dy = unpack(b_dy_in, BR, BD)
        o_m = i_row + (i_t + 1) * n_turn + tl.arange(0, BR)
        p_in = o_m[:, None] * (D // 2) + o_w[None, :]
        m_in = (o_m < M)[:, None] & m_w
        b_x_in = tl.load(x.to(tl.pointer_type(tl.int32)) + p_in, mask=m_in, other=0)
        b_gate_in = tl.load(gate.to(tl.pointer_type(tl.int32)) + p_in, mask=m_in, other=0)
        b_dy_in = tl.load(dy.to(tl.pointer_type(tl.int32)) + p_in, mask=m_in, other=0)

        o_m = i_row + i_t * n_turn + tl.arange(0, BR)
        p_x = o_m[:, None] * D + o_d[None, :]
        m_x = (o_m < M)[:, None] & m_d
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
        b_sigmoid = sigmoid(b_gate)

        b_xhat = b_x * b_rstd
        b_part = b_dy * b_sigmoid
        b_dxhat = b_part * b_gate
        b_sum += b_dxhat * b_xhat
        b_dxhat *= b_w
        b_both = b_dxhat * b_xhat
        b_dgate = b_part * b_w * b_xhat + b_both - b_both * b_sigmoid
        # before the sum over channels, beside which fewer numbers then wait
        tl.store(dgate + p_x, b_dgate.to(tl.bfloat16), mask=m_x)
        b_mean = (tl.sum(b_both, 1) / D)[:, None]
        tl.store(dx + p_x, (b_dxhat * b_rstd - b_xhat * (b_rstd * b_mean)).to(tl.bfloat16), mask=m_x)

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
    # all partial sums are there from here on
    tl.extra.cuda.gdc_wait()
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
    x, gate, weight, dy, dx, dgate, dweight, partial, *, eps, M
):
    """Gradients of M rows on the current stream."""
    n_programs = triton.cdiv(M, BR * BT)
    gated_norm_backward_kernel[(n_programs,)](
        x, gate, weight, dy, dx, dgate, partial, eps, M,
        D=D, BR=BR, BT=BT, BD=BD,
        num_warps=1, num_stages=1,
    )
    units = D // 8
    n_blocks = triton.cdiv(units * 8, BC)
    sum_kernel[(n_blocks,)](
        partial, dweight, n_programs, units,
        BP=BP, BC=BC, num_warps=8, num_stages=1, launch_pdl=True,
    )  # fmt: skip
