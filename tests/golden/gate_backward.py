"""Gradients of y = -exp(A_log) softplus(x + dt_bias).

    dx = -dy exp(A_log) sigmoid(x + dt_bias),   ddt_bias = sum over tokens of dx,   dA_log = sum of dy y

A program takes BT tiles of BR tokens of a head, and leaves its sums for each channel.

    x             [M, H, D]  bf16  tokens
    A_log         [H]        fp32  log of the decay's rate
    dt_bias       [H, D]     fp32  added to g before its activation
    dy            [M, H, D]  fp32  gradient of y
    dx            [M, H, D]  bf16  gradient of x
    part_A_log    [P, H, D]  fp32  scratch: sums of programs for the gradient of A_log
    part_dt_bias  [P, H, D]  fp32  scratch: the same for dt_bias

Problem: gate bf16
Config:  BR=16 BT=16 language=triton num_stages=1 num_warps=4
Template digest 833a3ba052d8fbe2; made by
    gdn2gen generate --dtype bf16 --with= --stage gate_backward --config \
      BR=16,BT=16,language=triton,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


BR, BT = 16, 16
D, BD = 128, 128


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + y), y = exp(-|x|), with every digit where x < -10.

    log(1 + y) / y by Chebyshev's polynomial of degree 7 on [0, 1], off by 3e-7 in fp32.
    """
    y = tl.exp(-tl.abs(x))
    ratio = -0.10685003 + y * (0.0434939 - y * 0.008371153)
    ratio = -0.49997175 + y * (0.33271928 + y * (-0.24474774 + y * (0.17687477 + y * ratio)))
    return tl.maximum(x, 0.0) + y * (0.99999978 + y * ratio)


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


@triton.jit(do_not_specialize=["M", "H"])
def gate_backward_kernel(
    x,
    A_log,
    dt_bias,
    dy,
    dx,
    part_A_log,
    part_dt_bias,
    M,
    H,
    D: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i_p, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, BD)
    b_rate = tl.exp(tl.load(A_log + i_h))
    b_bias = tl.load(dt_bias + i_h * D + o_d)[None, :]
    b_sum_A = tl.zeros([BR, BD], tl.float32)
    b_sum_bias = tl.zeros([BR, BD], tl.float32)
    for i_t in range(BT):
        o_m = (i_p * BT + i_t) * BR + tl.arange(0, BR)
        m_x = (o_m < M)[:, None]
        p_x = (o_m[:, None] * H + i_h) * D + o_d[None, :]
        b_x = tl.load(x + p_x, mask=m_x, other=0.0).to(tl.float32) + b_bias
        b_dy = tl.load(dy + p_x, mask=m_x, other=0.0) * -b_rate
        b_dx = b_dy * sigmoid(b_x)
        tl.store(dx + p_x, b_dx.to(tl.bfloat16), mask=m_x)
        b_sum_bias += b_dx
        b_sum_A += b_dy * softplus(b_x)

    p_part = (i_p * H + i_h) * D + o_d
    tl.store(part_A_log + p_part, tl.sum(b_sum_A, 0))
    tl.store(part_dt_bias + p_part, tl.sum(b_sum_bias, 0))


def launch(
    x, A_log, dt_bias, dy, dx, part_A_log, part_dt_bias, *, M, H
):
    """Gradients of M tokens on the current stream."""
    gate_backward_kernel[(triton.cdiv(M, BR * BT), H)](
        x, A_log, dt_bias, dy, dx, part_A_log, part_dt_bias, M, H,
        D=D, BR=BR, BT=BT, BD=BD,
        num_warps=4, num_stages=1,
    )
