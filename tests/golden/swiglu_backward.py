"""Gradients of a gate's SiLU times what it gates.

    dgate = dy up silu'(gate),   dup = dy silu(gate)

A program takes BE elements of E.

    gate   [E]  bf16  output gate, before its activation
    up     [E]  bf16  what the activated gate multiplies
    dy     [E]  bf16  gradient of y
    dgate  [E]  bf16  gradient of gate
    dup    [E]  bf16  gradient of up

Problem: swiglu bf16
Config:  BE=1024 BT=1 language=triton num_stages=1 num_warps=4
Template digest 6a4957f8855ecf7b; made by
    gdn2gen generate --dtype bf16 --with= --stage swiglu_backward --config \
      BE=1024,BT=1,language=triton,num_stages=1,num_warps=4
"""

import triton
import triton.language as tl


BE = 1024


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


@triton.jit(do_not_specialize=["units"])
def swiglu_backward_kernel(
    gate,
    up,
    dy,
    dgate,
    dup,
    units,
    BE: tl.constexpr,
):
    o_e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    m_e = o_e < units * 8
    b_gate = tl.load(gate + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_up = tl.load(up + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + o_e, mask=m_e, other=0.0).to(tl.float32)

    b_sigmoid = sigmoid(b_gate)
    b_slope = b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    tl.store(dgate + o_e, (b_dy * b_up * b_slope).to(tl.bfloat16), mask=m_e)
    tl.store(dup + o_e, (b_dy * b_gate * b_sigmoid).to(tl.bfloat16), mask=m_e)


def launch(
    gate, up, dy, dgate, dup, *, units
):
    """Gradients of 8 * units elements on the current stream."""
    swiglu_backward_kernel[(triton.cdiv(units * 8, BE),)](
        gate, up, dy, dgate, dup, units,
        BE=BE, num_warps=4, num_stages=1,
    )
