"""Gradients of Mamba-3 after its scan.

    y_t  = o_(t - 1) + c_t v_t
    dy_t = dout_t silu(z_t)
    do_(t - 1) = dy_t,   dv_t = c_t dy_t,   dc_t = dy_t . v_t,   dz_t = dout_t y_t silu'(z_t)

In the last row of a sequence do is 0. A program takes a tile of BT tokens of one sequence, for BH heads one
after another.

    o       [B, T, H, P]  bf16   output
    V       [B, T, H, P]  bf16   values
    own     [B, T, H]     fp32   factor of a token's own value in its output
    Z       [B, T, H, P]  bf16   output gate, before SiLU
    first   [n, H, P]     fp32   what first tokens see of the state before them
    tiles   [M, 4]        int32  sequence and first token of each tile, tokens before it and from it on
    dout    [B, T, H, P]  bf16   gradient of out
    do      [B, T, H, P]  bf16   gradient of o
    dV      [B, T, H, P]  bf16   gradient of V, but for the scan's part
    down    [B, T, H]     fp32   gradient of the factor of a token's own value
    dZ      [B, T, H, P]  bf16   gradient of Z
    dfirst  [n, H, P]     fp32   gradient of first

Problem: mamba3 bf16, skip, gate, carried, packed
Config:  BH=1 BT=32 language=triton num_stages=1 num_warps=1
Template digest 9701656d091ff534; made by
    gdn2gen generate --dtype bf16 --with=skip,gate,carried,packed --stage \
      mamba3_epilogue_backward --config BH=1,BT=32,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BH = 32, 1
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
def mamba3_epilogue_backward_kernel(
    o,
    V,
    own,
    Z,
    first,
    tiles,
    dout,
    do,
    dV,
    down,
    dZ,
    dfirst,
    T,
    H,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
):
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    # of each tile: its sequence, first token, tokens of the sequence before that, and from that on
    i_n, i_t = tl.load(tiles + i_tile * 4), tl.load(tiles + i_tile * 4 + 1)
    n_before, n_left = tl.load(tiles + i_tile * 4 + 2), tl.load(tiles + i_tile * 4 + 3)
    i_b = 0
    i_row = i_t.to(tl.int64)
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
        if n_before == 0:
            p_first = first + (i_n * H + i_h).to(tl.int64) * P + o_p[None, :] + o_t[:, None] * 0
            b_y += tl.load(p_first, mask=m_begins[:, None], other=0.0)

        b_dout = tl.load(dout + p_value + o_p[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_z = tl.load(Z + p_value + o_p[None, :], mask=m_t[:, None], other=0.0).to(tl.float32)
        b_sigmoid = sigmoid(b_z)
        b_dz = b_dout * b_y * b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
        tl.store(dZ + p_value + o_p[None, :], b_dz.to(tl.bfloat16), mask=m_t[:, None])
        b_dy = b_dout * b_z * b_sigmoid
        tl.store(dV + p_value + o_p[None, :], (b_c * b_dy).to(tl.bfloat16), mask=m_t[:, None])
        tl.store(down + p_row, tl.sum(b_dy * b_v, 1), mask=m_t)
        # to the row before
        p_do = do + p_value + o_p[None, :]
        tl.store(p_do - H * P, b_dy.to(tl.bfloat16), mask=m_later[:, None])
        if n_left <= BT:
            tl.store(p_do, tl.zeros([BT, BP], tl.bfloat16), mask=m_ends[:, None])
        if n_before == 0:
            p_first = dfirst + (i_n * H + i_h).to(tl.int64) * P + o_p[None, :] + o_t[:, None] * 0
            tl.store(p_first, b_dy, mask=m_begins[:, None])


def launch(
    o, V, own, Z, first, tiles, dout, do, dV, down, dZ, dfirst, *, T, H, n_tiles
):
    """Gradients of sequences that are packed in one row on the current stream."""
    mamba3_epilogue_backward_kernel[(n_tiles * (H // BH),)](
        o, V, own, Z, first, tiles, dout, do, dV, down, dZ, dfirst, T, H,
        P=P, BT=BT, BH=BH, BP=BP,
        num_warps=1, num_stages=1,
    )  # fmt: skip
