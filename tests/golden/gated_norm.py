"""RMSNorm of rows, times an activated gate.

    y = x / sqrt(mean(x^2) + eps) weight sigmoid(gate)

A program takes BT tiles of BR rows.

    x       [M, D]  bf16  tokens
    gate    [M, D]  bf16  output gate, before its activation
    weight  [D]     bf16  factor of each channel, or of its taps, the oldest first
    y       [M, D]  bf16  output

Problem: gated_rms_norm bf16
Config:  BR=32 BT=32 early=0 language=triton num_stages=1 num_warps=1 read_once=0
Template digest fbbf466239c8ff92; made by
    gdn2gen generate --dtype bf16 --with= --stage gated_norm --config \
      BR=32,BT=32,early=0,language=triton,num_stages=1,num_warps=1,read_once=0
"""

import triton
import triton.language as tl


BR, BT = 32, 32
D, BD = 128, 128


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


@triton.jit(do_not_specialize=["eps", "M"])
def gated_norm_kernel(
    x,
    gate,
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
        b_gate = tl.load(gate + p_x, mask=m_x, other=0.0)
        b_x = b_x.to(tl.float32)
        b_gate = b_gate.to(tl.float32)

        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
        b_sigmoid = sigmoid(b_gate)
        b_active = b_sigmoid
        tl.store(y + p_x, (b_x * b_rstd * b_w * b_active).to(tl.bfloat16), mask=m_x)


def launch(
    x, gate, weight, y, *, eps, M
):
    """Norm M rows on the current stream."""
    gated_norm_kernel[(triton.cdiv(M, BR * BT),)](
        x, gate, weight, y, eps, M,
        D=D, BR=BR, BT=BT, BD=BD,
        num_warps=1, num_stages=1,
    )
