"""Mamba-3's gradients before its gate, which all of the backward reads.

    dy_t = dout_t silu(z_t),   dz_t = dout_t y_t silu'(z_t)
    dc_t = <dy_t, v_t>, of dy in fp32

A program takes BR rows, each of a token and head.

    V        [B, T, H, P]  bf16  values
    Z        [B, T, H, P]  bf16  output gate, before SiLU
    ungated  [B, T, H, P]  bf16  output before its gate, y
    dout     [B, T, H, P]  bf16  gradient of out
    dy       [B, T, H, P]  bf16  gradient of y
    dZ       [B, T, H, P]  bf16  gradient of Z
    down     [B, T, H]     fp32  gradient of the factor of a token's own value

Problem: mamba3 bf16, gate
Config:  BR=16 BT=32 language=triton num_stages=1 num_warps=1
Template digest b3361f96701685e0; made by
    gdn2gen generate --dtype bf16 --with=gate --stage mamba3_gate --config \
      BR=16,BT=32,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


P = 64
BR, BP = 16, 64  # rows of a program, and the tile that covers P


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


@triton.jit(do_not_specialize=["B", "T", "H"])
def mamba3_gate_kernel(
    V,
    Z,
    ungated,
    dout,
    dy,
    dZ,
    down,
    B,
    T,
    H,
    P: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    # what is of all rows is added to the pointers first, so that threads add 32 bits
    i_row = tl.program_id(0).to(tl.int64) * BR
    o_row, o_p = tl.arange(0, BR), tl.arange(0, BP)
    p_row = o_row[:, None] * P + o_p[None, :]
    m_row = o_row < B.to(tl.int64) * T * H - i_row
    b_v = tl.load(V + i_row * P + p_row, mask=m_row[:, None], other=0.0).to(tl.float32)
    b_dy = tl.load(dout + i_row * P + p_row, mask=m_row[:, None], other=0.0).to(tl.float32)
    b_z = tl.load(Z + i_row * P + p_row, mask=m_row[:, None], other=0.0).to(tl.float32)
    b_y = tl.load(ungated + i_row * P + p_row, mask=m_row[:, None], other=0.0).to(tl.float32)
    b_sigmoid = sigmoid(b_z)
    b_dz = b_dy * b_y * b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
    b_dy *= b_z * b_sigmoid
    tl.store(dy + i_row * P + p_row, b_dy.to(tl.bfloat16), mask=m_row[:, None])
    tl.store(dZ + i_row * P + p_row, b_dz.to(tl.bfloat16), mask=m_row[:, None])
    tl.store(down + i_row + o_row, tl.sum(b_dy * b_v, 1), mask=m_row)


def launch(
    V, Z, ungated, dout, dy, dZ, down, *, B, T, H
):
    """Gradients before the gate of all rows, on the current stream."""
    mamba3_gate_kernel[(triton.cdiv(B * T * H, BR),)](
        V, Z, ungated, dout, dy, dZ, down, B, T, H,
        P=P, BR=BR, BP=BP,
        num_warps=1, num_stages=1,
    )  # fmt: skip
