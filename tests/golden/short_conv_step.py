"""Short convolutions with SiLU of one token a sequence; tails are moved on in place.

    y = silu(sum_j weight_j (tail, x)_j),   j = 0 .. 3

A program takes BR sequences and BD channels.

    x0       [B, T, D]    bf16  tokens
    x1       [B, T, D]    bf16  tokens
    x2       [B, T, D]    bf16  tokens
    weight0  [D, W]       bf16  factor of each channel, or of its taps, the oldest first
    weight1  [D, W]       bf16  factor of each channel, or of its taps, the oldest first
    weight2  [D, W]       bf16  factor of each channel, or of its taps, the oldest first
    tail0    [N, W-1, D]  bf16  the last inputs, before and after x: in place
    tail1    [N, W-1, D]  bf16  the last inputs, before and after x: in place
    tail2    [N, W-1, D]  bf16  the last inputs, before and after x: in place
    y0       [B, T, D]    bf16  output
    y1       [B, T, D]    bf16  output
    y2       [B, T, D]    bf16  output

Problem: short_convolution bf16
Config:  BD=64 BR=1 BT=1 ahead=1 early=0 language=triton num_stages=1 num_warps=1
Template digest 27fac5547f976f1e; made by
    gdn2gen generate --dtype bf16 --with= --stage short_conv_step --config \
      BD=64,BR=1,BT=1,ahead=1,early=0,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BR, BD = 1, 64


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


@triton.jit(do_not_specialize=["N", "units0", "units1", "units2", "x_row0", "x_row1", "x_row2"])
def short_conv_step_kernel(
    x0,
    x1,
    x2,
    weight0,
    weight1,
    weight2,
    tail0,
    tail1,
    tail2,
    y0,
    y1,
    y2,
    N,
    units0,
    units1,
    units2,
    x_row0,
    x_row1,
    x_row2,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    n_blocks = tl.cdiv(units0 * 8, BD) + tl.cdiv(units1 * 8, BD) + tl.cdiv(units2 * 8, BD)
    i_d, i_p = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    # the tensor that the block of channels is of
    if i_d < tl.cdiv(units0 * 8, BD):
        x, weight, tail, y, units, x_row = x0, weight0, tail0, y0, units0, x_row0
    elif i_d < tl.cdiv(units0 * 8, BD) + tl.cdiv(units1 * 8, BD):
        x, weight, tail, y, units, x_row = x1, weight1, tail1, y1, units1, x_row1
        i_d -= tl.cdiv(units0 * 8, BD)
    else:
        x, weight, tail, y, units, x_row = x2, weight2, tail2, y2, units2, x_row2
        i_d -= tl.cdiv(units0 * 8, BD) + tl.cdiv(units1 * 8, BD)

    n_d = units * 8
    o_d = i_d * BD + tl.arange(0, BD)
    o_n = (i_p * BR + tl.arange(0, BR)).to(tl.int64)
    m_x = (o_n < N)[:, None] & (o_d < n_d)[None, :]
    b_taps = tl.load(weight.to(tl.pointer_type(tl.int64)) + o_d, mask=o_d < n_d, other=0)
    b_w0 = b_taps.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]
    b_w1 = (b_taps >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]
    b_w2 = (b_taps >> 32).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]
    b_w3 = (b_taps >> 48).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]

    p_tail = tail + o_n[:, None] * (3 * n_d) + o_d[None, :]
    b_x0 = tl.load(p_tail, mask=m_x, other=0.0).to(tl.float32)
    b_x1 = tl.load(p_tail + 1 * n_d, mask=m_x, other=0.0).to(tl.float32)
    b_x2 = tl.load(p_tail + 2 * n_d, mask=m_x, other=0.0).to(tl.float32)
    b_x3 = tl.load(x + o_n[:, None] * (x_row * 8) + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_pre = b_x0 * b_w0
    b_pre = b_pre + b_x1 * b_w1
    b_pre = b_pre + b_x2 * b_w2
    b_pre = b_pre + b_x3 * b_w3
    b_sigmoid = sigmoid(b_pre)
    p_y = y + o_n[:, None] * n_d + o_d[None, :]
    tl.store(p_y, (b_pre * b_sigmoid).to(tl.bfloat16), mask=m_x)
    tl.store(p_tail, b_x1.to(tl.bfloat16), mask=m_x)
    tl.store(p_tail + 1 * n_d, b_x2.to(tl.bfloat16), mask=m_x)
    tl.store(p_tail + 2 * n_d, b_x3.to(tl.bfloat16), mask=m_x)


def launch(
    x0, x1, x2, weight0, weight1, weight2, tail0, tail1, tail2, y0, y1, y2, *, N, units0,
    units1, units2, x_row0, x_row1, x_row2
):
    """Convolve one token of N sequences on the current stream."""
    n_blocks = triton.cdiv(units0 * 8, BD) + triton.cdiv(units1 * 8, BD) + triton.cdiv(units2 * 8, BD)
    short_conv_step_kernel[(triton.cdiv(N, BR) * n_blocks,)](
        x0, x1, x2, weight0, weight1, weight2, tail0, tail1, tail2, y0, y1, y2, N, units0,
        units1, units2, x_row0, x_row1, x_row2,
        BR=BR, BD=BD,
        num_warps=1, num_stages=1,
    )  # fmt: skip
