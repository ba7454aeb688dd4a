"""Heads of M tokens, turned in pairs (i, i + D/2).

    y_i = x_i cos_i - x_(i + D/2) sin_i,   y_(i + D/2) = x_(i + D/2) cos_i + x_i sin_i

Cosines and sines are of R tokens, again and again. A program takes BR heads.

    x    [M, H, D]  bf16  tokens
    cos  [R, D/2]   fp32  cosines of the angles that q and k are turned by
    sin  [R, D/2]   fp32  their sines
    y    [M, H, D]  bf16  output

Problem: rotary bf16
Config:  BR=32 BT=1 language=triton num_stages=1 num_warps=1
Template digest b0e5b639b0442491; made by
    gdn2gen generate --dtype bf16 --with= --stage rotary --config \
      BR=32,BT=1,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BR = 32
D, BD = 128, 64


@triton.jit(do_not_specialize=["M", "H", "R"])
def rotary_kernel(
    x,
    cos,
    sin,
    y,
    M,
    H,
    R,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_r = (o_r < M * H)[:, None]
    p_x = o_r[:, None] * D + o_d[None, :]
    p_turn = (o_r // H % R)[:, None] * (D // 2) + o_d[None, :]
    b_cos = tl.load(cos + p_turn, mask=m_r, other=0.0)
    b_sin = tl.load(sin + p_turn, mask=m_r, other=0.0)
    b_0 = tl.load(x + p_x, mask=m_r, other=0.0).to(tl.float32)
    b_1 = tl.load(x + D // 2 + p_x, mask=m_r, other=0.0).to(tl.float32)
    tl.store(y + p_x, (b_0 * b_cos - b_1 * b_sin).to(tl.bfloat16), mask=m_r)
    tl.store(y + D // 2 + p_x, (b_1 * b_cos + b_0 * b_sin).to(tl.bfloat16), mask=m_r)


def launch(
    x, cos, sin, y, *, M, H, R
):
    """H heads of M tokens on the current stream."""
    rotary_kernel[(triton.cdiv(M * H, BR),)](
        x, cos, sin, y, M, H, R,
        D=D, BR=BR, BD=BD,
        num_warps=1, num_stages=1,
    )
