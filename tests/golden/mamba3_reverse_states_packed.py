"""Gradients of Mamba-3's states: after each chunk of a sequence, and before the first.

    dS^T <- dS^T gamma_C + (dy^T head) q

head is the decay from the chunk's start to a token, gamma_C over all of it. One program per sequence, head and slice of
values: it goes from the last chunk to the first and holds the gradient transposed, [BV, channels], in registers.

    q             [B, T, H, N]  bf16   queries
    within        [B, H, T]     fp32   scratch: log2 of the decay from the chunk's start to each token
    dy            [B, T, H, P]  bf16   gradient of y
    dfinal_ssm    [n, H, P, N]  fp32   gradient of final_ssm
    tiles         [M, 4]        int32  sequence and first token of each tile, tokens before it and from it on
    tile_starts   [n+1]         int32  first tile of each sequence
    dh            [M, H, P, N]  bf16   gradient of the state at the chunk's end, transposed
    dinitial_ssm  [n, H, P, N]  fp32   gradient of initial_ssm

Problem: mamba3 bf16, angles=0, skip, gate, carried, packed
Config:  BT=32 BV=64 language=triton maxnreg=128 num_stages=1 num_warps=1
Template digest b059574e77365339; made by
    gdn2gen generate --dtype bf16 --with=angles:0,skip,gate,carried,packed --stage \
      mamba3_reverse_states --config \
      BT=32,BV=64,language=triton,maxnreg=128,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BV = 32, 64
N, P = 128, 64  # channels of keys and values
BN = 128  # the tile that covers N


@triton.jit(do_not_specialize=["T", "H"])
def mamba3_reverse_states_kernel(
    q,
    within,
    dy,
    dfinal_ssm,
    tiles,
    tile_starts,
    dh,
    dinitial_ssm,
    T,
    H,
    N: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    o_v = (tl.program_id(0) % 1) * BV + tl.arange(0, BV)
    i_nh = tl.program_id(0) // 1
    i_n, i_h = i_nh // H, i_nh % H
    i_begin, i_end = tl.load(tile_starts + i_n), tl.load(tile_starts + i_n + 1)

    # of one without tokens there is no tile
    i_t = tl.load(tiles + i_begin * 4 + 1, mask=i_begin < i_end, other=0)
    n_tokens = tl.load(tiles + i_begin * 4 + 3, mask=i_begin < i_end, other=0)
    p_numbers, i_rows = i_h.to(tl.int64) * T + i_t, i_t.to(tl.int64)
    o_t = tl.arange(0, BT)
    o_r = tl.arange(0, BN)

    p_state = i_nh.to(tl.int64) * P * N + o_v[:, None] * N
    b_dSr = tl.load(dfinal_ssm + p_state + o_r[None, :])

    # of the last chunk; then each is read while the one after it is worked on
    n_chunks = i_end - i_begin
    o_next = (n_chunks - 1) * BT + o_t
    m_next = (o_next >= 0) & (o_next < n_tokens)
    # what is of all of a tile is added to the pointer first, so that threads add 32 bits
    i_first = (i_rows + (n_chunks - 1) * BT) * H + i_h
    b_qr_next = tl.load(q + i_first * N + ((o_t * (H * N))[:, None] + o_r[None, :]), mask=m_next[:, None], other=0.0)
    # log2 of the decay over all of it
    o_last = tl.minimum((n_chunks - 1) * BT + BT, n_tokens) - 1
    m_last = (o_last >= 0) & ((n_chunks - 1) * BT < n_tokens)
    b_whole_next = tl.load(within + p_numbers + o_last, mask=m_last, other=0.0)
    b_within_next = tl.load(within + p_numbers + o_next, mask=m_next, other=0.0)
    p_next = (o_t * (H * P))[None, :] + o_v[:, None]
    b_dy_next = tl.load(dy + i_first * P + p_next, mask=m_next[None, :], other=0.0)

    for i_back in range(n_chunks):
        i = n_chunks - 1 - i_back
        b_qr = b_qr_next
        b_whole = b_whole_next
        b_dy = b_dy_next
        b_within = b_within_next

        o_next = (i - 1) * BT + o_t
        m_next = (o_next >= 0) & (o_next < n_tokens)
        # what is of all of a tile is added to the pointer first, so that threads add 32 bits
        i_first = (i_rows + (i - 1) * BT) * H + i_h
        b_qr_next = tl.load(q + i_first * N + ((o_t * (H * N))[:, None] + o_r[None, :]), mask=m_next[:, None], other=0.0)
        # log2 of the decay over all of it
        o_last = tl.minimum((i - 1) * BT + BT, n_tokens) - 1
        m_last = (o_last >= 0) & ((i - 1) * BT < n_tokens)
        b_whole_next = tl.load(within + p_numbers + o_last, mask=m_last, other=0.0)
        b_within_next = tl.load(within + p_numbers + o_next, mask=m_next, other=0.0)
        p_next = (o_t * (H * P))[None, :] + o_v[:, None]
        b_dy_next = tl.load(dy + i_first * P + p_next, mask=m_next[None, :], other=0.0)
        b_gamma = tl.exp2(b_whole)
        b_dyd = (b_dy.to(tl.float32) * tl.exp2(b_within)[None, :]).to(tl.bfloat16)
        i_state = ((i_begin + i) * H + i_h).to(tl.int64) * P * N
        tl.store(dh + i_state + (o_v[:, None] * N + o_r[None, :]), b_dSr.to(tl.bfloat16))
        b_dSr = tl.dot(b_dyd, b_qr, b_dSr * b_gamma)

    tl.store(dinitial_ssm + p_state + o_r[None, :], b_dSr)


def launch(
    q, within, dy, dfinal_ssm, tiles, tile_starts, dh, dinitial_ssm, *, T, H, n_sequences
):
    """Gradients of states of sequences that are packed in one row on the current stream."""
    mamba3_reverse_states_kernel[(n_sequences * H * 1,)](
        q, within, dy, dfinal_ssm, tiles, tile_starts, dh, dinitial_ssm, T, H,
        N=N, P=P, BT=BT, BV=BV, BN=BN,
        num_warps=1, num_stages=1, maxnreg=128,
    )  # fmt: skip
