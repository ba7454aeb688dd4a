"""Mamba-3 after its scan: what a token sees of itself, and the gate.

    y_t = o_(t - 1) + c_t v_t,   out_t = y_t silu(z_t)

In the first token of a sequence there is no o. A program takes a tile of BT tokens of one
sequence, for BH heads one after another.

    o    [B, T, H, P]  bf16  output
    V    [B, T, H, P]  bf16  values
    own  [B, T, H]     fp32  factor of a token's own value in its output
    Z    [B, T, H, P]  bf16  output gate, before SiLU
    out  [B, T, H, P]  bf16  output

Problem: mamba3 bf16, gate
Config:  BH=8 BT=32 language=triton num_stages=1 num_warps=1
Template digest d58178785692fd77; made by
    gdn2gen generate --dtype bf16 --with=gate --stage mamba3_epilogue --config \
      BH=8,BT=32,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BH = 32, 8
P, BP = 64, 64  # channels of a value, and the tile that covers them


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


@triton.jit(do_not_specialize=["T", "H"])
def mamba3_epilogue_kernel(
    o,
    V,
    own,
    Z,
    out,
    T,
    H,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
):
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    NT = tl.cdiv(T, BT)
    i_n, i_t = i_tile // NT, (i_tile % NT) * BT
    n_before, n_left = i_t, T - i_t
    i_b = i_n
    i_row = i_b.to(tl.int64) * T + i_t
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    m_begins = (o_t + n_before == 0) & m_t
    m_ends = o_t == n_left - 1
    m_later = m_t & (o_t + n_before > 0)
    o_p = tl.arange(0, BP)
    for i in range(BH):
        i_h = (tl.program_id(0) % n_blocks) * BH + i
        p_row = (i_row + o_t) * H + i_h
        p_value = p_row[:, None] * P
        b_v = tl.load(V + p_value + o_p[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_c = tl.load(own + p_row, mask=m_t, other=0.0)[:, None]
        b_y = tl.load(o + p_value - H * P + o_p[None, :], mask=m_later[:, None], other=0.0).to(tl.float32) + b_c * b_v

        b_z = tl.load(Z + p_value + o_p[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_y *= b_z * sigmoid(b_z)
        tl.store(out + p_value + o_p[None, :], b_y.to(tl.bfloat16), mask=m_t[:, None])


def launch(
    o, V, own, Z, out, *, T, H, n_tiles
):
    """The output of B rows on the current stream."""
    mamba3_epilogue_kernel[(n_tiles * (H // BH),)](
        o, V, own, Z, out, T, H,
        P=P, BT=BT, BH=BH, BP=BP,
        num_warps=1, num_stages=1,
    )  # fmt: skip
