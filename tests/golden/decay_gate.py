"""The log decay of each channel, of its pre-activation.

    g = -exp(A_log) softplus(x + dt_bias)

A program takes 4 tiles of BR tokens and BD channels.

    x        [M, D]  bf16  pre-activation of the log decay
    A_log    [HG]    fp32  log of the decay's rate
    dt_bias  [D]     fp32  added to x
    g        [M, D]  fp32  log decay

Problem: decay_gate bf16
Config:  BD=128 BR=4 BT=1 ahead=4 language=triton num_stages=1 num_warps=4
Template digest be4746c8fd58d558; made by
    gdn2gen generate --dtype bf16 --with= --stage decay_gate --config \
      BD=128,BR=4,BT=1,ahead=4,language=triton,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


BR, BD = 4, 128
K = 128


@triton.jit
def log1p(y):
    """log(1 + y) for y in [0, 1], with every digit of a small y.

    log(1 + y) / y by Chebyshev's polynomial of degree 7, off by 3e-7 in fp32.
    """
    ratio = -0.10685003 + y * (0.0434939 - y * 0.008371153)
    ratio = -0.49997175 + y * (0.33271928 + y * (-0.24474774 + y * (0.17687477 + y * ratio)))
    return y * (0.99999978 + y * ratio)


@triton.jit(do_not_specialize=["M", "units"])
def decay_gate_kernel(
    x,
    A_log,
    dt_bias,
    g,
    M,
    units,
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
    i_row = i_p.to(tl.int64) * (4 * BR)
    o_m = i_row + tl.arange(0, BR)
    p_x0 = o_m[:, None] * n_d + o_d[None, :]
    m_x0 = (o_m < M)[:, None] & m_d[None, :]
    b_x0 = tl.load(x + p_x0, mask=m_x0, other=0.0)
    o_m = i_row + 1 * BR + tl.arange(0, BR)
    p_x1 = o_m[:, None] * n_d + o_d[None, :]
    m_x1 = (o_m < M)[:, None] & m_d[None, :]
    b_x1 = tl.load(x + p_x1, mask=m_x1, other=0.0)
    o_m = i_row + 2 * BR + tl.arange(0, BR)
    p_x2 = o_m[:, None] * n_d + o_d[None, :]
    m_x2 = (o_m < M)[:, None] & m_d[None, :]
    b_x2 = tl.load(x + p_x2, mask=m_x2, other=0.0)
    o_m = i_row + 3 * BR + tl.arange(0, BR)
    p_x3 = o_m[:, None] * n_d + o_d[None, :]
    m_x3 = (o_m < M)[:, None] & m_d[None, :]
    b_x3 = tl.load(x + p_x3, mask=m_x3, other=0.0)
    b_x = b_x0.to(tl.float32) + b_bias
    b_g = -b_rate * (tl.maximum(b_x, 0.0) + log1p(tl.exp(-tl.abs(b_x))))
    tl.store(g + p_x0, b_g, mask=m_x0)
    b_x = b_x1.to(tl.float32) + b_bias
    b_g = -b_rate * (tl.maximum(b_x, 0.0) + log1p(tl.exp(-tl.abs(b_x))))
    tl.store(g + p_x1, b_g, mask=m_x1)
    b_x = b_x2.to(tl.float32) + b_bias
    b_g = -b_rate * (tl.maximum(b_x, 0.0) + log1p(tl.exp(-tl.abs(b_x))))
    tl.store(g + p_x2, b_g, mask=m_x2)
    b_x = b_x3.to(tl.float32) + b_bias
    b_g = -b_rate * (tl.maximum(b_x, 0.0) + log1p(tl.exp(-tl.abs(b_x))))
    tl.store(g + p_x3, b_g, mask=m_x3)


def launch(
    x, A_log, dt_bias, g, *, M, units
):
    """The log decay of M tokens of 8 * units channels on the current stream."""
    n_blocks = triton.cdiv(units * 8, BD)
    decay_gate_kernel[(n_blocks * triton.cdiv(M, 4 * BR),)](
        x, A_log, dt_bias, g, M, units,
        K=K, BR=BR, BD=BD,
        num_warps=4, num_stages=1,
    )
