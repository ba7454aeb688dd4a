"""Mamba-3's rotations before each tile: by how much queries and keys were turned until then.

    Theta_t  = Theta_(t - 1) + dt_t pi tanh(angle_t)           mod 2 pi

Angles are added up in turns, in units of 2^-32 as int32, so that sums are exact in any order and begin anew where
a turn does.

A program takes a tile of BT tokens of one sequence, for BH heads at once: a token after the other, and a lane a pair of
channels, so that no sum crosses lanes.

    DT           [B, H, T]     fp32   steps
    Angles       [B, T, H, S]  fp32   rates of rotation, before tanh
    angle_state  [n, H, S]     fp32   Theta before the first token, radians
    tiles        [M, 4]        int32  sequence and first token of each tile, tokens before it and from it on
    tile_starts  [n+1]         int32  first tile of each sequence
    turns        [M, H, S]     int32  Theta before each tile, in units of 2^-32 turns
    last_angle   [n, H, S]     fp32   Theta after the last token, radians

Problem: mamba3 bf16, skip, gate, carried, packed
Config:  BH=2 BT=32 language=triton num_stages=1 num_warps=1
Template digest 61b4d180edd2d89d; made by
    gdn2gen generate --dtype bf16 --with=skip,gate,carried,packed --stage mamba3_turns --config \
      BH=2,BT=32,language=triton,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BH = 32, 2
S, BS = 32, 32  # pairs of channels that are rotated, and the tile that covers them
AHEAD = 16  # tiles whose angles are added up at once


@triton.jit
def tanh(x):
    """fp32, to 2e-7 of its value."""
    a = tl.abs(x)
    t = tl.exp(-2.0 * a)
    x2 = x * x
    # by its series where 1 - t would lose digits
    s = -0.053968253968 + x2 * 0.021869488536
    s = a * (1.0 + x2 * (-0.333333333333 + x2 * (0.133333333333 + x2 * s)))
    y = tl.where(a < 0.3, s, (1.0 - t) / (1.0 + t))
    return tl.where(x < 0.0, -y, y)


@triton.jit
def in_int32(x):
    """x turns in units of 2^-32."""
    x -= tl.floor(x + 0.5)
    return tl.floor(tl.minimum(x * 4294967296.0, 2147483520.0) + 0.5).to(tl.int32)


@triton.jit
def cosine_and_sine(n):
    """Of n turns in units of 2^-32; off by 5e-7."""
    x = n.to(tl.float32) * 1.4629180792671596e-09  # pi / 2^31
    cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return cos, sin


@triton.jit(do_not_specialize=["T", "H", "angle_row", "angle_head"])
def mamba3_turns_kernel(
    DT,
    Angles,
    tiles,
    turns,
    T,
    H,
    angle_row,
    angle_head,
    S: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
):
    """By how much each tile turns."""
    n_blocks = H // BH
    i_tile = tl.program_id(0) // n_blocks
    i_h = (tl.program_id(0) % n_blocks) * BH
    # of each tile: its sequence, first token, tokens of the sequence before that, and from that on
    i_n, i_t = tl.load(tiles + i_tile * 4), tl.load(tiles + i_tile * 4 + 1)
    n_before, n_left = tl.load(tiles + i_tile * 4 + 2), tl.load(tiles + i_tile * 4 + 3)
    i_b = 0
    i_row = i_t.to(tl.int64)
    o_t = tl.arange(0, BT)
    m_t = o_t < n_left
    o_s = tl.arange(0, BS)
    p_dt = DT + (i_b * H + i_h).to(tl.int64) * T + i_t
    p_angle = Angles + (i_row * angle_row + i_h * angle_head) + o_s
    b_sum0 = tl.zeros([BS], tl.int32)
    b_sum1 = tl.zeros([BS], tl.int32)
    if angle_head == 0:
        # of the first token; then each is read while the one before it is worked on
        m_next = tl.cast(0, tl.int32) < n_left
        b_dt0_next = tl.load(p_dt + (tl.cast(0, tl.int32)), mask=m_next, other=0.0)
        b_angle0_next = tl.load(p_angle + (tl.cast(0, tl.int32) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt1_next = tl.load(p_dt + (1 * T + tl.cast(0, tl.int32)), mask=m_next, other=0.0)

        for t in range(BT):
            b_dt0 = b_dt0_next
            b_rate0 = 0.5 * tanh(b_angle0_next.to(tl.float32))
            b_dt1 = b_dt1_next
            b_rate1 = b_rate0
            m_next = (t + 1) < n_left
            b_dt0_next = tl.load(p_dt + ((t + 1)), mask=m_next, other=0.0)
            b_angle0_next = tl.load(p_angle + ((t + 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt1_next = tl.load(p_dt + (1 * T + (t + 1)), mask=m_next, other=0.0)

            b_sum0 += in_int32(b_dt0 * b_rate0)
            b_sum1 += in_int32(b_dt1 * b_rate1)

    else:
        # of the first token; then each is read while the one before it is worked on
        m_next = tl.cast(0, tl.int32) < n_left
        b_dt0_next = tl.load(p_dt + (tl.cast(0, tl.int32)), mask=m_next, other=0.0)
        b_angle0_next = tl.load(p_angle + (tl.cast(0, tl.int32) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
        b_dt1_next = tl.load(p_dt + (1 * T + tl.cast(0, tl.int32)), mask=m_next, other=0.0)
        b_angle1_next = tl.load(p_angle + (1 * angle_head + tl.cast(0, tl.int32) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)

        for t in range(BT):
            b_dt0 = b_dt0_next
            b_rate0 = 0.5 * tanh(b_angle0_next.to(tl.float32))
            b_dt1 = b_dt1_next
            b_rate1 = 0.5 * tanh(b_angle1_next.to(tl.float32))
            m_next = (t + 1) < n_left
            b_dt0_next = tl.load(p_dt + ((t + 1)), mask=m_next, other=0.0)
            b_angle0_next = tl.load(p_angle + ((t + 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)
            b_dt1_next = tl.load(p_dt + (1 * T + (t + 1)), mask=m_next, other=0.0)
            b_angle1_next = tl.load(p_angle + (1 * angle_head + (t + 1) * angle_row), mask=o_s < tl.where(m_next, S, 0), other=0.0)

            b_sum0 += in_int32(b_dt0 * b_rate0)
            b_sum1 += in_int32(b_dt1 * b_rate1)
    p_turns = turns + (i_tile * H + i_h).to(tl.int64) * S + o_s
    tl.store(p_turns + 0 * S, b_sum0)
    tl.store(p_turns + 1 * S, b_sum1)


@triton.jit(do_not_specialize=["T", "H"])
def prefix_kernel(
    angle_state,
    tile_starts,
    turns,
    last_angle,
    T,
    H,
    S: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """In place of how much a tile turns, Theta before it; and Theta after the last one."""
    i_n, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    o_s = tl.arange(0, BS)
    i_begin, i_end = tl.load(tile_starts + i_n), tl.load(tile_starts + i_n + 1)

    p_state = angle_state + (i_n * H + i_h).to(tl.int64) * S + o_s
    b_angle = tl.load(p_state)
    b_sum = in_int32(b_angle * 0.15915494309189535)  # 1 / 2 pi
    for i_0 in range(i_begin, i_end, AHEAD):
        o_i = i_0 + tl.arange(0, AHEAD)
        p_turns = turns + (o_i * H + i_h).to(tl.int64)[:, None] * S + o_s[None, :]
        m_turns = (o_i < i_end)[:, None]
        b_tiles = tl.load(p_turns, mask=m_turns, other=0)
        tl.store(p_turns, b_sum[None, :] + tl.cumsum(b_tiles, 0) - b_tiles, mask=m_turns)
        b_sum += tl.sum(b_tiles, 0)
    b_last = b_sum.to(tl.float32)
    b_last = tl.where(b_last < 0.0, b_last + 4294967296.0, b_last) * 1.4629180792671596e-09  # pi / 2^31
    b_last = tl.where(i_begin < i_end, b_last, b_angle)
    tl.store(last_angle + (i_n * H + i_h).to(tl.int64) * S + o_s, b_last)


def launch(
    DT, Angles, angle_state, tiles, tile_starts, turns, last_angle, *, T, H, n_tiles,
    n_sequences, angle_row, angle_head
):
    """Theta before tiles of sequences that are packed in one row on the current stream."""
    mamba3_turns_kernel[(n_tiles * (H // BH),)](
        DT, Angles, tiles, turns, T, H, angle_row, angle_head,
        S=S, BT=BT, BH=BH, BS=BS,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    prefix_kernel[(n_sequences * H,)](
        angle_state, tile_starts, turns, last_angle, T, H,
        S=S, BT=BT, BS=BS, AHEAD=AHEAD, num_warps=1, num_stages=1,
    )  # fmt: skip
