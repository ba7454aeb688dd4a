"""The decay of H heads in natural log, from what was projected.

    y = -exp(A_log) softplus(x + dt_bias)

A program takes BT tiles of BR tokens of a head.

    x        [M, H, D]  bf16  tokens
    A_log    [H]        fp32  log of the decay's rate
    dt_bias  [H, D]     fp32  added to g before its activation
    y        [M, H, D]  fp32  output

Problem: gate bf16
Config:  BR=16 BT=16 language=triton num_stages=1 num_warps=4
Template digest c9b28501206ac973; made by
    gdn2gen generate --dtype bf16 --with= --stage gate --config \
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

@triton.jit(do_not_specialize=["M", "H"])
def gate_kernel(
    x,
    A_log,
    dt_bias,
    y,
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
    for i_t in range(BT):
        o_m = (i_p * BT + i_t) * BR + tl.arange(0, BR)
        m_x = (o_m < M)[:, None]
        p_x = (o_m[:, None] * H + i_h) * D + o_d[None, :]
        b_x = tl.load(x + p_x, mask=m_x, other=0.0).to(tl.float32) + b_bias
        tl.store(y + p_x, -b_rate * softplus(b_x), mask=m_x)


def launch(
    x, A_log, dt_bias, y, *, M, H
):
    """Decays of M tokens on the current stream."""
    gate_kernel[(triton.cdiv(M, BR * BT), H)](
        x, A_log, dt_bias, y, M, H,
        D=D, BR=BR, BT=BT, BD=BD,
        num_warps=4, num_stages=1,
    )
