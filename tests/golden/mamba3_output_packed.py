"""Mamba-3's outputs, chunk by chunk, from the states before them.

    P_ji  = decay_ji s_j <k_j, q_i>, i > j
    y_i   = head_i S^T q_i + sum of P_ji v_j + c_i v_i,   out_i = y_i silu(z_i)
    c_t   = lambda_t dt_t <q_t, k_t> + D

head is the decay from the chunk's start to a token, decay_ji from token j to token i. A program takes a chunk, for BH
heads one after another. y is left for the backward where `keep` is not 0.

    q         [B, T, H, N]  bf16   queries
    k         [B, T, H, N]  bf16   keys
    V         [B, T, H, P]  bf16   values
    ADT       [B, H, T]     fp32   log decay
    within    [B, H, T]     fp32   scratch: log2 of the decay from the chunk's start to each token
    weight_s  [B, H, T]     fp32   scratch: s
    own_dt    [B, H, T]     fp32   scratch: lambda dt
    D         [H]           fp32   factor of a token's own value, added to o
    Z         [B, T, H, P]  bf16   output gate, before SiLU
    h         [M, H, P, N]  bf16   state at the chunk's start, transposed
    tiles     [M, 4]        int32  sequence and first token of each tile, tokens before it and from it on
    out       [B, T, H, P]  bf16   output
    ungated   [B, T, H, P]  bf16   output before its gate, y

Problem: mamba3 bf16, angles=0, skip, gate, carried, packed
Config:  BH=1 BT=32 BV=64 language=triton maxnreg=128 num_stages=1 num_warps=1
Template digest d92efaef55869179; made by
    gdn2gen generate --dtype bf16 --with=angles:0,skip,gate,carried,packed --stage mamba3_output \
      --config BH=1,BT=32,BV=64,language=triton,maxnreg=128,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BH, BV = 32, 1, 64
N, P = 128, 64  # channels of keys and values
BN = 128  # the tile that covers N


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


@triton.jit(do_not_specialize=["T", "H", "keep"])
def mamba3_output_kernel(
    q,
    k,
    V,
    within,
    weight_s,
    own_dt,
    D,
    Z,
    h,
    tiles,
    out,
    ungated,
    T,
    H,
    keep,
    N: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
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
    o_r = tl.arange(0, BN)

    # rows are tokens i that read, columns tokens j that write
    o_i, o_j = o_t[:, None], o_t[None, :]
    n_kept = tl.minimum(n_left, keep * BT)
    for i in range(BH):
        i_h = (tl.program_id(0) % n_blocks) * BH + i
        i_token = i_row * H + i_h
        o_head = (o_t * (H * N))[:, None]
        b_kr = tl.load(k + i_token * N + (o_head + o_r[None, :]), mask=m_t[:, None], other=0.0)
        b_qr = tl.load(q + i_token * N + (o_head + o_r[None, :]), mask=m_t[:, None], other=0.0)
        # all that is multiplied is asked for before the first product waits
        i_v = 0
        o_v = i_v + tl.arange(0, BV)
        p_v = (o_t * (H * P))[:, None] + o_v[None, :]
        i_state, p_h = (i_tile * H + i_h).to(tl.int64) * P * N, o_v[:, None] * N
        b_hr = tl.load(h + i_state + (p_h + o_r[None, :]), mask=(o_v < n_left * P)[:, None], other=0.0)

        b_v = tl.load(V + i_token * P + p_v, mask=m_t[:, None], other=0.0)
        b_P = tl.dot(b_qr, tl.trans(b_kr))

        p_number = (i_b * H + i_h).to(tl.int64) * T + i_t + o_t
        b_weight = tl.load(weight_s + p_number, mask=m_t, other=0.0)
        b_own = tl.load(own_dt + p_number, mask=m_t, other=0.0)
        # of no token nothing is kept: nothing else masks those after the last one
        b_G = tl.load(within + p_number, mask=m_t, other=float("-inf"))
        b_L = b_G[:, None] - tl.load(within + p_number, mask=m_t, other=0.0)[None, :]
        b_L = tl.exp2(tl.where(o_i > o_j, b_L, float("-inf")))
        b_head = tl.exp2(tl.load(within + p_number, mask=m_t, other=0.0))
        b_c = b_own * tl.sum(tl.where(o_j == o_i, b_P, 0.0), 1)
        b_P = (b_P * b_L * b_weight[None, :]).to(tl.bfloat16)
        b_c += tl.load(D + i_h)
        b_z = tl.load(Z + i_token * P + p_v, mask=m_t[:, None], other=0.0)
        b_y = tl.dot(b_qr, tl.trans(b_hr))

        b_y *= b_head[:, None]
        b_y = tl.dot(b_P, b_v, b_y)
        b_y += b_c[:, None] * b_v.to(tl.float32)
        # for the backward, if there is to be one
        tl.store(ungated + i_token * P + p_v, b_y.to(tl.bfloat16), mask=(o_t < n_kept)[:, None])
        b_zf = b_z.to(tl.float32)
        b_y *= b_zf * sigmoid(b_zf)
        tl.store(out + i_token * P + p_v, b_y.to(tl.bfloat16), mask=m_t[:, None])


def launch(
    q, k, V, ADT, within, weight_s, own_dt, D, Z, h, tiles, out, ungated, *, T, H, n_tiles, keep
):
    """The output of sequences that are packed in one row on the current stream."""
    mamba3_output_kernel[(n_tiles * (H // BH),)](
        q, k, V, within, weight_s, own_dt, D, Z, h, tiles, out, ungated, T, H, keep,
        N=N, P=P, BT=BT, BH=BH, BV=BV, BN=BN,
        num_warps=1, num_stages=1, maxnreg=128,
    )  # fmt: skip
