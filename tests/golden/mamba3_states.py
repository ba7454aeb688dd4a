"""Mamba-3's states: before each chunk of a sequence, and after the last.

    S^T <- S^T gamma_C + (v^T tail s) k

tail is the decay from a token to the chunk's end, gamma_C over all of it. One program per sequence, head and slice of
values: it goes from chunk to chunk and holds the state transposed, [BV, channels], in registers.

    k           [B, T, H, N]  bf16  keys
    V           [B, T, H, P]  bf16  values
    within      [B, H, T]     fp32  scratch: log2 of the decay from the chunk's start to each token
    tail_decay  [B, H, T]     fp32  scratch: decay from each token to the chunk's end
    weight_s    [B, H, T]     fp32  scratch: s
    h           [M, H, P, N]  bf16  state at the chunk's start, transposed
    final_ssm   [n, H, P, N]  fp32  state after the last token

Problem: mamba3 bf16, angles=0
Config:  BT=32 BV=64 language=triton maxnreg=0 num_stages=1 num_warps=1
Template digest 0f3e7f23eead5535; made by
    gdn2gen generate --dtype bf16 --with=angles:0 --stage mamba3_states --config \
      BT=32,BV=64,language=triton,maxnreg=0,num_stages=1,num_warps=1
"""

import triton
import triton.language as tl


BT, BV = 32, 64
N, P = 128, 64  # channels of keys and values
BN = 128  # the tile that covers N


@triton.jit(do_not_specialize=["T", "H"])
def mamba3_states_kernel(
    k,
    V,
    within,
    tail_decay,
    weight_s,
    h,
    final_ssm,
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
    NT = tl.cdiv(T, BT)
    i_begin, i_end = i_n * NT, (i_n + 1) * NT

    n_tokens = T
    p_numbers, i_rows = i_nh.to(tl.int64) * T, i_n.to(tl.int64) * T
    o_t = tl.arange(0, BT)
    o_r = tl.arange(0, BN)

    p_state = i_nh.to(tl.int64) * P * N + o_v[:, None] * N
    b_Sr = tl.zeros([BV, BN], tl.float32)

    # of the first chunk; then each is read while the one before it is worked on
    o_next = (tl.cast(0, tl.int32)) * BT + o_t
    m_next = (o_next >= 0) & (o_next < n_tokens)
    # what is of all of a tile is added to the pointer first, so that threads add 32 bits
    i_first = (i_rows + (tl.cast(0, tl.int32)) * BT) * H + i_h
    b_kr_next = tl.load(k + i_first * N + ((o_t * (H * N))[:, None] + o_r[None, :]), mask=m_next[:, None], other=0.0)
    # log2 of the decay over all of it
    o_last = tl.minimum((tl.cast(0, tl.int32)) * BT + BT, n_tokens) - 1
    m_last = (o_last >= 0) & ((tl.cast(0, tl.int32)) * BT < n_tokens)
    b_whole_next = tl.load(within + p_numbers + o_last, mask=m_last, other=0.0)
    p_next = p_numbers + o_next
    b_tail_next = tl.load(tail_decay + p_next, mask=m_next, other=0.0)
    b_tail_next *= tl.load(weight_s + p_next, mask=m_next, other=0.0)
    p_next = (o_t * (H * P))[None, :] + o_v[:, None]
    b_v_next = tl.load(V + i_first * P + p_next, mask=m_next[None, :], other=0.0)

    for i in range(i_end - i_begin):
        b_kr = b_kr_next
        b_whole = b_whole_next
        b_v = b_v_next
        b_tail = b_tail_next

        o_next = (i + 1) * BT + o_t
        m_next = (o_next >= 0) & (o_next < n_tokens)
        # what is of all of a tile is added to the pointer first, so that threads add 32 bits
        i_first = (i_rows + (i + 1) * BT) * H + i_h
        b_kr_next = tl.load(k + i_first * N + ((o_t * (H * N))[:, None] + o_r[None, :]), mask=m_next[:, None], other=0.0)
        # log2 of the decay over all of it
        o_last = tl.minimum((i + 1) * BT + BT, n_tokens) - 1
        m_last = (o_last >= 0) & ((i + 1) * BT < n_tokens)
        b_whole_next = tl.load(within + p_numbers + o_last, mask=m_last, other=0.0)
        p_next = p_numbers + o_next
        b_tail_next = tl.load(tail_decay + p_next, mask=m_next, other=0.0)
        b_tail_next *= tl.load(weight_s + p_next, mask=m_next, other=0.0)
        p_next = (o_t * (H * P))[None, :] + o_v[:, None]
        b_v_next = tl.load(V + i_first * P + p_next, mask=m_next[None, :], other=0.0)
        b_gamma = tl.exp2(b_whole)
        b_vs = (b_v.to(tl.float32) * b_tail[None, :]).to(tl.bfloat16)
        i_state = ((i_begin + i) * H + i_h).to(tl.int64) * P * N
        tl.store(h + i_state + (o_v[:, None] * N + o_r[None, :]), b_Sr.to(tl.bfloat16))
        b_Sr = tl.dot(b_vs, b_kr, b_Sr * b_gamma)

    tl.store(final_ssm + p_state + o_r[None, :], b_Sr)


def launch(
    k, V, within, tail_decay, weight_s, h, final_ssm, *, T, H, n_sequences
):
    """States of B rows on the current stream."""
    mamba3_states_kernel[(n_sequences * H * 1,)](
        k, V, within, tail_decay, weight_s, h, final_ssm, T, H,
        N=N, P=P, BT=BT, BV=BV, BN=BN,
        num_warps=1, num_stages=1,
    )  # fmt: skip
