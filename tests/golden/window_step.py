"""Attention of one token over the last W, whose keys and values are in a ring.

    o = sum_s softmax_s(q . k_s / sqrt(D)) v_s,   q and k turned in pairs (i, i + D/2)

A program takes a run of BT rows of a head, BW at once, and leaves what they add up to; the one whose run has
the token's row writes it. combine_kernel adds up the runs of a head, and counts the token.

    q       [B, H, D]     bf16   queries
    k       [B, H, D]     bf16   keys
    v       [B, H, D]     bf16   values
    k_ring  [B, W, H, D]  bf16   keys of the last tokens, turned, p's in row p % W: in place
    v_ring  [B, W, H, D]  bf16   their values: in place
    seen    [B]           int64  tokens before, of each sequence: in place
    cos     [B, D/2]      fp32   cosines of the angles that q and k are turned by
    sin     [B, D/2]      fp32   their sines
    o       [B, H, D]     bf16   output
    part_o  [B, H, S, D]  fp32   scratch: sums of runs of rows
    part_m  [B, H, S]     fp32   scratch: the largest score of each
    part_l  [B, H, S]     fp32   scratch: what each adds up to

Problem: window_step bf16
Config:  BT=128 BW=64 language=triton num_stages=1 num_warps=1
Template digest 71b51cef9a3d7256; made by
    gdn2gen generate --dtype bf16 --with= --stage window_step --config \
      BT=128,BW=64,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BW = 128, 64
D, BD = 128, 64
SCALE = 0.127517431  # 1 / (sqrt(D) log 2): scores are of powers of two


@triton.jit
def turned(p_x, o_d, b_cos, b_sin, D: tl.constexpr):
    """Both halves of a head, turned and rounded, in fp32."""
    b_a = tl.load(p_x + o_d).to(tl.float32)
    b_b = tl.load(p_x + D // 2 + o_d).to(tl.float32)
    b_c = (b_a * b_cos - b_b * b_sin).to(tl.bfloat16)
    b_d = (b_b * b_cos + b_a * b_sin).to(tl.bfloat16)
    return b_c.to(tl.float32), b_d.to(tl.float32)


@triton.jit(do_not_specialize=["H", "W", "S"])
def window_step_kernel(
    q,
    k,
    v,
    k_ring,
    v_ring,
    seen,
    cos,
    sin,
    part_o,
    part_m,
    part_l,
    H,
    W,
    S,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
    BD: tl.constexpr,
):
    i_s, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    n_seen = tl.load(seen + i_b)
    i_row = n_seen % W
    o_d = tl.arange(0, BD)
    b_cos = tl.load(cos + i_b * (D // 2) + o_d)
    b_sin = tl.load(sin + i_b * (D // 2) + o_d)
    b_q0, b_q1 = turned(q + i_bh * D, o_d, b_cos, b_sin, D)
    b_k0, b_k1 = turned(k + i_bh * D, o_d, b_cos, b_sin, D)
    b_v0 = tl.load(v + i_bh * D + o_d).to(tl.float32)
    b_v1 = tl.load(v + i_bh * D + D // 2 + o_d).to(tl.float32)

    b_o0 = tl.zeros([BD], tl.float32)
    b_o1 = tl.zeros([BD], tl.float32)
    b_m = -float("inf")
    b_l = 0.0
    for i_w in range(0, BT, BW):
        o_w = i_s * BT + i_w + tl.arange(0, BW)
        m_w = (o_w < W) & (o_w <= n_seen)
        # the token's own row is not there yet
        m_new = (o_w == i_row)[:, None]
        m_old = (m_w[:, None] & (o_w != i_row)[:, None])
        p_row = ((i_b * W + o_w) * H + i_h)[:, None] * D + o_d[None, :]
        b_0 = tl.load(k_ring + p_row, mask=m_old, other=0.0).to(tl.float32)
        b_1 = tl.load(k_ring + D // 2 + p_row, mask=m_old, other=0.0).to(tl.float32)
        b_2 = tl.load(v_ring + p_row, mask=m_old, other=0.0).to(tl.float32)
        b_3 = tl.load(v_ring + D // 2 + p_row, mask=m_old, other=0.0).to(tl.float32)
        b_0 = tl.where(m_new, b_k0[None, :], b_0)
        b_1 = tl.where(m_new, b_k1[None, :], b_1)
        b_2 = tl.where(m_new, b_v0[None, :], b_2)
        b_3 = tl.where(m_new, b_v1[None, :], b_3)

        b_s = tl.sum(b_0 * b_q0[None, :] + b_1 * b_q1[None, :], 1) * SCALE
        b_s = tl.where(m_w, b_s, -float("inf"))
        b_top = tl.maximum(b_m, tl.max(b_s, 0))
        # where there is no row yet, nothing is added
        b_base = tl.where(b_top == -float("inf"), 0.0, b_top)
        b_p = tl.exp2(b_s - b_base)
        b_fade = tl.exp2(b_m - b_base)
        b_l = b_l * b_fade + tl.sum(b_p, 0)
        b_o0 = b_o0 * b_fade + tl.sum(b_p[:, None] * b_2, 0)
        b_o1 = b_o1 * b_fade + tl.sum(b_p[:, None] * b_3, 0)
        b_m = b_top

    i_part = i_bh * S + i_s
    tl.store(part_o + i_part * D + o_d, b_o0)
    tl.store(part_o + i_part * D + D // 2 + o_d, b_o1)
    tl.store(part_m + i_part, b_m)
    tl.store(part_l + i_part, b_l)
    m_own = (i_row // BT + 0 * o_d == i_s) & (o_d < D // 2)
    p_own = ((i_b * W + i_row) * H + i_h) * D + o_d
    tl.store(k_ring + p_own, b_k0.to(tl.bfloat16), mask=m_own)
    tl.store(k_ring + D // 2 + p_own, b_k1.to(tl.bfloat16), mask=m_own)
    tl.store(v_ring + p_own, b_v0.to(tl.bfloat16), mask=m_own)
    tl.store(v_ring + D // 2 + p_own, b_v1.to(tl.bfloat16), mask=m_own)


@triton.jit(do_not_specialize=["H", "S"])
def combine_kernel(
    part_o,
    part_m,
    part_l,
    o,
    seen,
    H,
    S,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    i_bh = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, 2 * BD)
    b_m = -float("inf")
    for i_s in range(S):
        b_m = tl.maximum(b_m, tl.load(part_m + i_bh * S + i_s))
    b_o = tl.zeros([2 * BD], tl.float32)
    b_l = 0.0
    for i_s in range(S):
        b_fade = tl.exp2(tl.load(part_m + i_bh * S + i_s) - b_m)
        b_l += b_fade * tl.load(part_l + i_bh * S + i_s)
        b_o += b_fade * tl.load(part_o + (i_bh * S + i_s) * D + o_d)
    tl.store(o + i_bh * D + o_d, (b_o / b_l).to(tl.bfloat16))
    if i_bh % H == 0:
        tl.store(seen + i_bh // H, tl.load(seen + i_bh // H) + 1)


def launch(
    q, k, v, k_ring, v_ring, seen, cos, sin, o, part_o, part_m, part_l, *, B, H, W, S
):
    """A token of each of B sequences, in S runs of rows, on the current stream."""
    window_step_kernel[(S, B * H)](
        q, k, v, k_ring, v_ring, seen, cos, sin, part_o, part_m, part_l, H, W, S,
        SCALE=SCALE, D=D, BT=BT, BW=BW, BD=BD,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    combine_kernel[(B * H,)](
        part_o, part_m, part_l, o, seen, H, S,
        D=D, BD=BD, num_warps=4, num_stages=1,
    )  # fmt: skip
