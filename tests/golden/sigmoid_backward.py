"""The gradient of a sigmoid's argument, of its result.

    dx = dy y (1 - y)

A program takes BR rows of M, and BD channels. Rows of dx may lie apart: they are columns of a matrix that one
product takes with others.

    y   [M, D]  bf16  output
    dy  [M, D]  bf16  gradient of y
    dx  [M, D]  bf16  gradient of x

Problem: sigmoid bf16
Config:  BD=256 BR=8 BT=1 language=triton num_stages=1 num_warps=4
Template digest 7a2afc82023d1c48; made by
    gdn2gen generate --dtype bf16 --with= --stage sigmoid_backward --config \
      BD=256,BR=8,BT=1,language=triton,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


BR, BD = 8, 256


@triton.jit(do_not_specialize=["M", "units", "dx_row"])
def sigmoid_backward_kernel(
    y,
    dy,
    dx,
    M,
    units,
    dx_row,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    n_d = units * 8
    n_blocks = tl.cdiv(n_d, BD)
    o_d = tl.program_id(0) % n_blocks * BD + tl.arange(0, BD)
    o_m = tl.program_id(0) // n_blocks * BR + tl.arange(0, BR)
    m_x = (o_m < M)[:, None] & (o_d < n_d)[None, :]
    i_row = o_m.to(tl.int64)[:, None]
    b_y = tl.load(y + i_row * n_d + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + i_row * n_d + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_dx = b_dy * b_y * (1.0 - b_y)
    tl.store(dx + i_row * (dx_row * 8) + o_d[None, :], b_dx.to(tl.bfloat16), mask=m_x)


def launch(
    y, dy, dx, *, M, units, dx_row
):
    """Gradients of M rows of 8 * units channels on the current stream."""
    n_programs = triton.cdiv(M, BR) * triton.cdiv(units * 8, BD)
    sigmoid_backward_kernel[(n_programs,)](
        y, dy, dx, M, units, dx_row,
        BR=BR, BD=BD, num_warps=4, num_stages=1,
    )
