"""Gradients of the log decay of each channel.

    g = -exp(A_log) softplus(x + dt_bias)
    dx = -dg exp(A_log) sigmoid(x + dt_bias)
    dA_log = sum over tokens and channels of dg g
    ddt_bias = sum over tokens of dx

A program takes `turns` times 2 tiles of BR tokens and BD channels. What it adds up for dA_log, channel
by channel, and of ddt_bias are two rows of `partial`, and sum_kernel adds these in their order.

    x         [M, D]      bf16  pre-activation of the log decay
    A_log     [HG]        fp32  log of the decay's rate
    dt_bias   [D]         fp32  added to x
    dg        [M, D]      fp32  gradient of g
    dx        [M, D]      bf16  gradient of x
    dA_log    [HG]        fp32  gradient of A_log
    ddt_bias  [D]         fp32  gradient of dt_bias
    partial   [P, 2, DS]  fp32  scratch: sums of programs for gradients of parameters

Problem: decay_gate bf16
Config:  BD=128 BR=4 BT=1 ahead=2 language=triton num_stages=1 num_warps=4
Template digest b9b000647b1cd5c5; made by
    gdn2gen generate --dtype bf16 --with= --stage decay_gate_backward --config \
      BD=128,BR=4,BT=1,ahead=2,language=triton,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


BR, BD = 4, 128
K, BK = 128, 128
BP = 32  # rows of partial sums that are added at once


@triton.jit
def log1p(y):
    """log(1 + y) for y in [0, 1], with every digit of a small y.

    log(1 + y) / y by Chebyshev's polynomial of degree 7, off by 3e-7 in fp32.
    """
    ratio = -0.10685003 + y * (0.0434939 - y * 0.008371153)
    ratio = -0.49997175 + y * (0.33271928 + y * (-0.24474774 + y * (0.17687477 + y * ratio)))
    return y * (0.99999978 + y * ratio)


@triton.jit(do_not_specialize=["M", "units", "turns"])
def decay_gate_backward_kernel(
    x,
    A_log,
    dt_bias,
    dg,
    dx,
    partial,
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
    i_row = i_p.to(tl.int64) * turns * (2 * BR)
    for _ in range(turns):
        o_m = i_row + tl.arange(0, BR)
        p_x0 = o_m[:, None] * n_d + o_d[None, :]
        m_x0 = (o_m < M)[:, None] & m_d[None, :]
        b_x0 = tl.load(x + p_x0, mask=m_x0, other=0.0)
        b_dg0 = tl.load(dg + p_x0, mask=m_x0, other=0.0)
        o_m = i_row + 1 * BR + tl.arange(0, BR)
        p_x1 = o_m[:, None] * n_d + o_d[None, :]
        m_x1 = (o_m < M)[:, None] & m_d[None, :]
        b_x1 = tl.load(x + p_x1, mask=m_x1, other=0.0)
        b_dg1 = tl.load(dg + p_x1, mask=m_x1, other=0.0)
        b_x = b_x0.to(tl.float32) + b_bias
        b_y = tl.exp(-tl.abs(b_x))
        b_dx = -b_dg0 * b_rate
        b_dA += b_dx * (tl.maximum(b_x, 0.0) + log1p(b_y))
        b_dx *= tl.where(b_x >= 0.0, 1.0, b_y) / (1.0 + b_y)
        b_dbias += b_dx
        tl.store(dx + p_x0, b_dx.to(tl.bfloat16), mask=m_x0)
        b_x = b_x1.to(tl.float32) + b_bias
        b_y = tl.exp(-tl.abs(b_x))
        b_dx = -b_dg1 * b_rate
        b_dA += b_dx * (tl.maximum(b_x, 0.0) + log1p(b_y))
        b_dx *= tl.where(b_x >= 0.0, 1.0, b_y) / (1.0 + b_y)
        b_dbias += b_dx
        tl.store(dx + p_x1, b_dx.to(tl.bfloat16), mask=m_x1)
        i_row += 2 * BR
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
    x, A_log, dt_bias, dg, dx, dA_log, ddt_bias, partial, *, M, units, turns
):
    """Gradients of M tokens of 8 * units channels on the current stream."""
    n_blocks = triton.cdiv(units * 8, BD)
    n_programs = triton.cdiv(M, turns * 2 * BR)
    decay_gate_backward_kernel[(n_blocks * n_programs,)](
        x, A_log, dt_bias, dg, dx, partial, M, units, turns,
        K=K, BR=BR, BD=BD,
        num_warps=4, num_stages=1,
    )
    sum_kernel[(units * 8 // K,)](
        partial, dA_log, ddt_bias, n_programs, units,
        K=K, BK=BK, BP=BP, num_warps=8, num_stages=1,
    )
