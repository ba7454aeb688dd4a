"""Gradients of the log decay of each channel.

    z = x + dt_bias,   s = sigmoid(exp(A_log) z)
    dx = dg lower_bound exp(A_log) s (1 - s)
    dA_log = sum over tokens and channels of dx z
    ddt_bias = sum over tokens of dx

A program takes `turns` times 1 tiles of BR tokens and BD channels. What it adds up for dA_log, channel
by channel, and of ddt_bias are two rows of `partial`, and sum_kernel adds these in their order.

    x         [M, D]      bf16  pre-activation of the log decay
    A_log     [HG]        fp32  log of the decay's rate
    dt_bias   [D]         fp32  added to x
    dg        [M, D]      fp32  gradient of g
    dx        [M, D]      bf16  gradient of x
    dA_log    [HG]        fp32  gradient of A_log
    ddt_bias  [D]         fp32  gradient of dt_bias
    partial   [P, 2, DS]  fp32  scratch: sums of programs for gradients of parameters

Problem: decay_gate bf16, size=96, gate=sigmoid
Config:  BD=128 BR=8 BT=1 ahead=1 language=triton num_stages=1 num_warps=4
Template digest b9b000647b1cd5c5; made by
    gdn2gen generate --dtype bf16 --with=size:96,gate:sigmoid --stage decay_gate_backward \
      --config BD=128,BR=8,BT=1,ahead=1,language=triton,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


BR, BD = 8, 128
K, BK = 96, 128
BP = 32  # rows of partial sums that are added at once


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


@triton.jit(do_not_specialize=["lower_bound", "M", "units", "turns"])
def decay_gate_backward_kernel(
    x,
    A_log,
    dt_bias,
    dg,
    dx,
    partial,
    lower_bound,
    M,
    units,
    turns,
    K: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    n_d = units * 8
    n_blocks = tl.cdiv(n_d, BD)
    i_d, i_p = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < n_d
    b_bias = tl.load(dt_bias + o_d, mask=m_d, other=0.0)[None, :]
    b_rate = tl.exp(tl.load(A_log + o_d // K, mask=m_d, other=0.0))[None, :]
    b_dA = tl.zeros([BR, BD], tl.float32)
    b_dbias = tl.zeros([BR, BD], tl.float32)
    i_row = i_p.to(tl.int64) * turns * (1 * BR)
    for _ in range(turns):
        o_m = i_row + tl.arange(0, BR)
        p_x0 = o_m[:, None] * n_d + o_d[None, :]
        m_x0 = (o_m < M)[:, None] & m_d[None, :]
        b_x0 = tl.load(x + p_x0, mask=m_x0, other=0.0)
        b_dg0 = tl.load(dg + p_x0, mask=m_x0, other=0.0)
        b_x = b_x0.to(tl.float32) + b_bias
        b_s = sigmoid(b_rate * b_x)
        b_dx = b_dg0 * (lower_bound * b_rate) * (b_s * (1.0 - b_s))
        b_dA += b_dx * b_x
        b_dbias += b_dx
        tl.store(dx + p_x0, b_dx.to(tl.bfloat16), mask=m_x0)
        i_row += 1 * BR
    p_partial = partial + i_p.to(tl.int64) * (2 * n_d) + o_d
    tl.store(p_partial, tl.sum(b_dA, 0), mask=m_d)
    tl.store(p_partial + n_d, tl.sum(b_dbias, 0), mask=m_d)


@triton.jit(do_not_specialize=["n_programs", "units"])
def sum_kernel(
    partial,
    dA_log,
    ddt_bias,
    n_programs,
    units,
    K: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
):
    n_d = units * 8
    i_h = tl.program_id(0)
    o_k = tl.arange(0, BK)
    b_dA = tl.zeros([BP, BK], tl.float32)
    b_dbias = tl.zeros([BP, BK], tl.float32)
    for i_p in range(0, n_programs, BP):
        o_p = i_p + tl.arange(0, BP)
        m_p = (o_p < n_programs)[:, None] & (o_k < K)[None, :]
        p_p = o_p.to(tl.int64)[:, None] * (2 * n_d) + (i_h * K + o_k)[None, :]
        b_dA += tl.load(partial + p_p, mask=m_p, other=0.0)
        b_dbias += tl.load(partial + p_p + n_d, mask=m_p, other=0.0)
    tl.store(dA_log + i_h, tl.sum(tl.sum(b_dA, 0), 0))
    tl.store(ddt_bias + i_h * K + o_k, tl.sum(b_dbias, 0), mask=o_k < K)


def launch(
    x, A_log, dt_bias, dg, dx, dA_log, ddt_bias, partial, *, lower_bound, M, units, turns
):
    """Gradients of M tokens of 8 * units channels on the current stream."""
    n_blocks = triton.cdiv(units * 8, BD)
    n_programs = triton.cdiv(M, turns * 1 * BR)
    decay_gate_backward_kernel[(n_blocks * n_programs,)](
        x, A_log, dt_bias, dg, dx, partial, lower_bound, M, units, turns,
        K=K, BR=BR, BD=BD,
        num_warps=4, num_stages=1,
    )
    sum_kernel[(units * 8 // K,)](
        partial, dA_log, ddt_bias, n_programs, units,
        K=K, BK=BK, BP=BP, num_warps=8, num_stages=1,
    )
