"""RMSNorm of each head, times an activated gate that is projected from a few channels of its token.

    gate = proj low + gate_bias
    y = x / sqrt(mean(x^2) + eps) * weight * sigmoid(gate)

A program takes a tile of BM tokens of a head, whose rows of proj it holds. A gate is rounded as where it is
written, and is not written.

    x          [M, H, D]  bf16  tokens
    low        [M, R]     bf16  what the gate is projected from
    proj       [HD, R]    bf16  projection to the gate, of all heads
    gate_bias  [HD]       bf16  added to the gate
    weight     [D]        bf16  factor of each channel, or of its taps, the oldest first
    y          [M, H, D]  bf16  output

Problem: projected_norm bf16, rank=64, bias
Config:  BM=64 BT=1 language=triton maxnreg=0 num_stages=1 num_warps=4 turns=1
Template digest 7c9f8492e714619b; made by
    gdn2gen generate --dtype bf16 --with=rank:64,bias --stage projected_norm --config \
      BM=64,BT=1,language=triton,maxnreg=0,num_stages=1,num_warps=4,turns=1
"""

import triton
import triton.language as tl


BM = 64
D, R = 128, 64


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


@triton.jit(do_not_specialize=["eps", "M", "H", "low_row"])
def projected_norm_kernel(
    x,
    low,
    proj,
    gate_bias,
    weight,
    y,
    eps,
    M,
    H,
    low_row,
    D: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
):
    # programs of the same tokens are side by side, so that `low` is in the L2
    i_h, i_m = tl.program_id(0) % H, tl.program_id(0) // H * BM
    o_d, o_r = tl.arange(0, D), tl.arange(0, R)
    b_proj = tl.load(proj + (i_h * D + o_d)[:, None] * R + o_r[None, :])
    b_bias = tl.load(gate_bias + i_h * D + o_d).to(tl.float32)[None, :]
    b_w = tl.load(weight + o_d).to(tl.float32)[None, :]

    o_m = i_m + tl.arange(0, BM)
    m_x = (o_m < M)[:, None]
    i_row = o_m.to(tl.int64)[:, None]
    p_x = (i_row * H + i_h) * D + o_d[None, :]
    b_low = tl.load(low + i_row * (low_row * 8) + o_r[None, :], mask=m_x, other=0.0)
    b_x = tl.load(x + p_x, mask=m_x, other=0.0).to(tl.float32)
    b_gate = (tl.dot(b_low, tl.trans(b_proj)) + b_bias).to(tl.bfloat16).to(tl.float32)
    b_active = sigmoid(b_gate)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
    tl.store(y + p_x, (b_x * b_rstd * b_w * b_active).to(tl.bfloat16), mask=m_x)


def launch(
    x, low, proj, gate_bias, weight, y, *, eps, M, H, low_row
):
    """The gated norm of M tokens of H heads on the current stream."""
    projected_norm_kernel[(triton.cdiv(M, BM) * H,)](
        x, low, proj, gate_bias, weight, y, eps, M, H, low_row,
        D=D, R=R, BM=BM, num_warps=4, num_stages=1,
    )
