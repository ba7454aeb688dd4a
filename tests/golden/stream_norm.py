"""RMSNorm of rows of a residual stream.

    y = x / sqrt(mean(x^2) + eps) weight

A program takes BT tiles of BR rows.

    x       [M, D]  fp32  tokens
    weight  [D]     fp32  factor of each channel, or of its taps, the oldest first
    y       [M, D]  bf16  output

Problem: stream_norm bf16, weight_dtype=fp32
Config:  BR=1 BT=32 early=0 language=triton num_stages=1 num_warps=1
Template digest 6372a5281613039e; made by
    gdn2gen generate --dtype bf16 --with=weight_dtype:fp32 --stage stream_norm --config \
      BR=1,BT=32,early=0,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BR, BT = 1, 32
D, BD = 2048, 2048


@triton.jit(do_not_specialize=["eps", "M"])
def stream_norm_kernel(
    x,
    weight,
    y,
    eps,
    M,
    D: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    o_d = tl.arange(0, BD)
    b_w = tl.load(weight + o_d).to(tl.float32)[None, :]
    i_row = tl.program_id(0).to(tl.int64) * (BR * BT)

    for i_t in range(BT):
        o_m = i_row + i_t * BR + tl.arange(0, BR)
        p_x = o_m[:, None] * D + o_d[None, :]
        m_x = (o_m < M)[:, None]
        b_x = tl.load(x + p_x, mask=m_x, other=0.0)
        b_x = b_x.to(tl.float32)

        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
        tl.store(y + p_x, (b_x * b_rstd * b_w).to(tl.bfloat16), mask=m_x)


def launch(
    x, weight, y, *, eps, M
):
    """Norm M rows on the current stream."""
    stream_norm_kernel[(triton.cdiv(M, BR * BT),)](
        x, weight, y, eps, M,
        D=D, BR=BR, BT=BT, BD=BD,
        num_warps=1, num_stages=1,
    )
