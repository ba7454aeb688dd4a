"""Short convolutions with SiLU, causal and depthwise.

    y_t = silu(sum_j weight_j x_(t - 3 + j)),   j = 0 .. 3

A program takes BR runs of BT tokens and BD channels. A run is a warp's: it goes from token to token and
holds the last inputs in registers, so that each is read once.

    x0             [B, T, D]    bf16   tokens
    x1             [B, T, D]    bf16   tokens
    x2             [B, T, D]    bf16   tokens
    weight0        [D, W]       bf16   factor of each channel, or of its taps, the oldest first
    weight1        [D, W]       bf16   factor of each channel, or of its taps, the oldest first
    weight2        [D, W]       bf16   factor of each channel, or of its taps, the oldest first
    initial_tail0  [N, W-1, D]  bf16   the last inputs before x
    initial_tail1  [N, W-1, D]  bf16   the last inputs before x
    initial_tail2  [N, W-1, D]  bf16   the last inputs before x
    cu_seqlens     [N+1]        int32  first token of each sequence
    y0             [B, T, D]    bf16   output
    y1             [B, T, D]    bf16   output
    y2             [B, T, D]    bf16   output
    final_tail0    [N, W-1, D]  bf16   the last inputs
    final_tail1    [N, W-1, D]  bf16   the last inputs
    final_tail2    [N, W-1, D]  bf16   the last inputs
    place          [T]          int32  tokens of its sequence before each token
    sequence       [T]          int32  number of the sequence that each token is of

Problem: short_convolution bf16, packed, initial_tail, final_tail
Config:  BD=64 BR=4 BT=32 ahead=2 early=1 language=triton num_stages=1 num_warps=1 read_once=0
Template digest 1b0e9201ea426966; made by
    gdn2gen generate --dtype bf16 --with=packed,initial_tail,final_tail --stage short_conv \
      --config \
      BD=64,BR=4,BT=32,ahead=2,early=1,language=triton,num_stages=1,num_warps=1,read_once=0
"""

import triton
import triton.language as tl


BR, BT, BD = 4, 32, 64
BN = 128  # tokens that a program of place_kernel looks up


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


@triton.jit(do_not_specialize=["B", "T", "units0", "units1", "units2", "x_row0", "x_row1", "x_row2"])
def short_conv_kernel(
    x0,
    x1,
    x2,
    weight0,
    weight1,
    weight2,
    initial_tail0,
    initial_tail1,
    initial_tail2,
    y0,
    y1,
    y2,
    place,
    sequence,
    B,
    T,
    units0,
    units1,
    units2,
    x_row0,
    x_row1,
    x_row2,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    n_blocks = tl.cdiv(units0 * 8, BD) + tl.cdiv(units1 * 8, BD) + tl.cdiv(units2 * 8, BD)
    i_d, i_p = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    # the tensor that the block of channels is of
    if i_d < tl.cdiv(units0 * 8, BD):
        x, weight, initial_tail, y, units, x_row = x0, weight0, initial_tail0, y0, units0, x_row0
    elif i_d < tl.cdiv(units0 * 8, BD) + tl.cdiv(units1 * 8, BD):
        x, weight, initial_tail, y, units, x_row = x1, weight1, initial_tail1, y1, units1, x_row1
        i_d -= tl.cdiv(units0 * 8, BD)
    else:
        x, weight, initial_tail, y, units, x_row = x2, weight2, initial_tail2, y2, units2, x_row2
        i_d -= tl.cdiv(units0 * 8, BD) + tl.cdiv(units1 * 8, BD)

    n_d = units * 8
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = (o_d < n_d)[None, :]
    i_first = i_p * BT * BR + tl.arange(0, BR) * BT
    i_row = i_first.to(tl.int64)
    n_rows = tl.minimum(T - i_first, BT)
    p_x = x + i_row[:, None] * (x_row * 8) + o_d[None, :]
    p_y = y + i_row[:, None] * n_d + o_d[None, :]
    b_place = tl.load(place + i_first, mask=n_rows > 0, other=0)
    i_n = tl.load(sequence + i_first, mask=n_rows > 0, other=0)
    m_run = (n_rows > 0)[:, None] & m_d
    p_tail = (i_n.to(tl.int64) * 3 + b_place)[:, None] * n_d + o_d[None, :]
    m_earlier = (b_place >= 3)[:, None]
    b_x0 = tl.load(p_x - 3 * x_row * 8, mask=m_run & m_earlier, other=0.0).to(tl.float32)
    m_earlier = (b_place < 3)[:, None]
    b_x0 += tl.load(initial_tail + p_tail, mask=m_run & m_earlier, other=0.0).to(tl.float32)
    m_earlier = (b_place >= 2)[:, None]
    b_x1 = tl.load(p_x - 2 * x_row * 8, mask=m_run & m_earlier, other=0.0).to(tl.float32)
    m_earlier = (b_place < 2)[:, None]
    b_x1 += tl.load(initial_tail + p_tail + 1 * n_d, mask=m_run & m_earlier, other=0.0).to(tl.float32)
    m_earlier = (b_place >= 1)[:, None]
    b_x2 = tl.load(p_x - 1 * x_row * 8, mask=m_run & m_earlier, other=0.0).to(tl.float32)
    m_earlier = (b_place < 1)[:, None]
    b_x2 += tl.load(initial_tail + p_tail + 2 * n_d, mask=m_run & m_earlier, other=0.0).to(tl.float32)

    m_t = (0 < n_rows)[:, None] & m_d
    b_row0 = tl.load(p_x + 0 * x_row * 8, mask=m_t, other=0.0)
    b_place0 = tl.load(place + i_first + 0, mask=0 < n_rows, other=3)
    m_t = (1 < n_rows)[:, None] & m_d
    b_row1 = tl.load(p_x + 1 * x_row * 8, mask=m_t, other=0.0)
    b_place1 = tl.load(place + i_first + 1, mask=1 < n_rows, other=3)
    b_taps = tl.load(weight.to(tl.pointer_type(tl.int64)) + o_d, mask=o_d < n_d, other=0)
    b_w0 = b_taps.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]
    b_w1 = (b_taps >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]
    b_w2 = (b_taps >> 32).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]
    b_w3 = (b_taps >> 48).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)[None, :]

    for i_t in range(0, BT, 2):
        b_next0 = tl.load(place + i_first + i_t + 2, mask=i_t + 2 < n_rows, other=3)
        b_next1 = tl.load(place + i_first + i_t + 3, mask=i_t + 3 < n_rows, other=3)
        b_x3 = b_row0.to(tl.float32)
        m_t = (i_t + 2 < n_rows)[:, None] & m_d
        b_row0 = tl.load(p_x + (i_t + 2) * x_row * 8, mask=m_t, other=0.0)
        m_begins = (b_place0 == 0)[:, None]
        b_n = tl.load(sequence + i_first + i_t, mask=b_place0 == 0, other=0)
        p_tail = (b_n.to(tl.int64) * 3)[:, None] * n_d + o_d[None, :]
        b_tail = tl.load(initial_tail + p_tail, mask=m_begins & m_d, other=0.0).to(tl.float32)
        b_x0 = tl.where(m_begins, b_tail, b_x0)
        b_tail = tl.load(initial_tail + p_tail + 1 * n_d, mask=m_begins & m_d, other=0.0).to(tl.float32)
        b_x1 = tl.where(m_begins, b_tail, b_x1)
        b_tail = tl.load(initial_tail + p_tail + 2 * n_d, mask=m_begins & m_d, other=0.0).to(tl.float32)
        b_x2 = tl.where(m_begins, b_tail, b_x2)
        b_pre = b_x0 * b_w0
        b_pre = b_pre + b_x1 * b_w1
        b_pre = b_pre + b_x2 * b_w2
        b_pre = b_pre + b_x3 * b_w3
        b_sigmoid = sigmoid(b_pre)
        m_t = (i_t < n_rows)[:, None] & m_d
        tl.store(p_y + i_t * n_d, (b_pre * b_sigmoid).to(tl.bfloat16), mask=m_t)
        b_x4 = b_row1.to(tl.float32)
        m_t = (i_t + 3 < n_rows)[:, None] & m_d
        b_row1 = tl.load(p_x + (i_t + 3) * x_row * 8, mask=m_t, other=0.0)
        m_begins = (b_place1 == 0)[:, None]
        b_n = tl.load(sequence + i_first + i_t + 1, mask=b_place1 == 0, other=0)
        p_tail = (b_n.to(tl.int64) * 3)[:, None] * n_d + o_d[None, :]
        b_tail = tl.load(initial_tail + p_tail, mask=m_begins & m_d, other=0.0).to(tl.float32)
        b_x1 = tl.where(m_begins, b_tail, b_x1)
        b_tail = tl.load(initial_tail + p_tail + 1 * n_d, mask=m_begins & m_d, other=0.0).to(tl.float32)
        b_x2 = tl.where(m_begins, b_tail, b_x2)
        b_tail = tl.load(initial_tail + p_tail + 2 * n_d, mask=m_begins & m_d, other=0.0).to(tl.float32)
        b_x3 = tl.where(m_begins, b_tail, b_x3)
        b_pre = b_x1 * b_w0
        b_pre = b_pre + b_x2 * b_w1
        b_pre = b_pre + b_x3 * b_w2
        b_pre = b_pre + b_x4 * b_w3
        b_sigmoid = sigmoid(b_pre)
        m_t = (i_t + 1 < n_rows)[:, None] & m_d
        tl.store(p_y + (i_t + 1) * n_d, (b_pre * b_sigmoid).to(tl.bfloat16), mask=m_t)
        b_x0 = b_x2
        b_x1 = b_x3
        b_x2 = b_x4
        b_place0 = b_next0
        b_place1 = b_next1


@triton.jit(do_not_specialize=["T", "N", "bits"])
def place_kernel(
    cu_seqlens,
    place,
    sequence,
    T,
    N,
    bits,
    BN: tl.constexpr,
):
    """Which sequence each token is of, the last that begins at or before it, and its place there."""
    o_t = tl.program_id(0) * BN + tl.arange(0, BN)
    i_n = tl.zeros([BN], tl.int32)
    for i_bit in range(bits):
        i_later = i_n + (1 << (bits - 1 - i_bit))
        b_start = tl.load(cu_seqlens + i_later, mask=i_later < N, other=T)
        i_n = tl.where((i_later < N) & (b_start <= o_t), i_later, i_n)
    # whatever cu_seqlens holds: tokens before the first sequence stand at its start, and none starts
    # before the batch
    b_place = tl.minimum(tl.maximum(o_t - tl.load(cu_seqlens + i_n), 0), o_t)
    tl.store(place + o_t, b_place, mask=o_t < T)
    tl.store(sequence + o_t, i_n, mask=o_t < T)


@triton.jit(do_not_specialize=["T", "N", "units0", "units1", "units2", "x_row0", "x_row1", "x_row2"])
def tail_kernel(
    x0,
    x1,
    x2,
    initial_tail0,
    initial_tail1,
    initial_tail2,
    cu_seqlens,
    final_tail0,
    final_tail1,
    final_tail2,
    T,
    N,
    units0,
    units1,
    units2,
    x_row0,
    x_row1,
    x_row2,
    BD: tl.constexpr,
):
    """The last 3 inputs of each sequence; of a shorter one what its tail ended with before."""
    n_blocks = tl.cdiv(units0 * 8, BD) + tl.cdiv(units1 * 8, BD) + tl.cdiv(units2 * 8, BD)
    i_d, i_n = tl.program_id(0) % n_blocks, (tl.program_id(0) // n_blocks).to(tl.int64)
    # the tensor that the block of channels is of
    if i_d < tl.cdiv(units0 * 8, BD):
        x, initial_tail, final_tail, units, x_row = x0, initial_tail0, final_tail0, units0, x_row0
    elif i_d < tl.cdiv(units0 * 8, BD) + tl.cdiv(units1 * 8, BD):
        x, initial_tail, final_tail, units, x_row = x1, initial_tail1, final_tail1, units1, x_row1
        i_d -= tl.cdiv(units0 * 8, BD)
    else:
        x, initial_tail, final_tail, units, x_row = x2, initial_tail2, final_tail2, units2, x_row2
        i_d -= tl.cdiv(units0 * 8, BD) + tl.cdiv(units1 * 8, BD)

    n_d = units * 8
    o_d = i_d * BD + tl.arange(0, BD)
    # whatever cu_seqlens holds, tokens are those of the batch
    i_start = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n), 0), T).to(tl.int64)
    i_end = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n + 1), i_start), T)
    n_tokens = i_end - i_start
    b_x = tl.load(x + (i_end - 3) * x_row * 8 + o_d, mask=o_d < tl.where(n_tokens >= 3, n_d, 0), other=0.0)
    m_before = o_d < tl.where(n_tokens < 3, n_d, 0)
    b_x += tl.load(initial_tail + (i_n * 3 + n_tokens) * n_d + o_d, mask=m_before, other=0.0)
    tl.store(final_tail + (i_n * 3) * n_d + o_d, b_x, mask=o_d < n_d)
    b_x = tl.load(x + (i_end - 2) * x_row * 8 + o_d, mask=o_d < tl.where(n_tokens >= 2, n_d, 0), other=0.0)
    m_before = o_d < tl.where(n_tokens < 2, n_d, 0)
    b_x += tl.load(initial_tail + (i_n * 3 + 1 + n_tokens) * n_d + o_d, mask=m_before, other=0.0)
    tl.store(final_tail + (i_n * 3 + 1) * n_d + o_d, b_x, mask=o_d < n_d)
    b_x = tl.load(x + (i_end - 1) * x_row * 8 + o_d, mask=o_d < tl.where(n_tokens >= 1, n_d, 0), other=0.0)
    m_before = o_d < tl.where(n_tokens < 1, n_d, 0)
    b_x += tl.load(initial_tail + (i_n * 3 + 2 + n_tokens) * n_d + o_d, mask=m_before, other=0.0)
    tl.store(final_tail + (i_n * 3 + 2) * n_d + o_d, b_x, mask=o_d < n_d)


def launch(
    x0, x1, x2, weight0, weight1, weight2, initial_tail0, initial_tail1, initial_tail2,
    cu_seqlens, y0, y1, y2, final_tail0, final_tail1, final_tail2, place, sequence, *, B, T, N,
    bits, units0, units1, units2, x_row0, x_row1, x_row2
):
    """Convolve the tokens of B rows on the current stream, packed in one row."""
    n_blocks = triton.cdiv(units0 * 8, BD) + triton.cdiv(units1 * 8, BD) + triton.cdiv(units2 * 8, BD)
    place_kernel[(triton.cdiv(T, BN),)](
        cu_seqlens, place, sequence, T, N, bits,
        BN=BN, num_warps=4, num_stages=1,
    )  # fmt: skip
    n_programs = triton.cdiv(B * triton.cdiv(T, BT), BR)
    short_conv_kernel[(n_programs * n_blocks,)](
        x0, x1, x2, weight0, weight1, weight2, initial_tail0, initial_tail1, initial_tail2, y0,
        y1, y2, place, sequence, B, T, units0, units1, units2, x_row0, x_row1, x_row2,
        BR=BR, BT=BT, BD=BD,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    tail_kernel[(N * n_blocks,)](
        x0, x1, x2, initial_tail0, initial_tail1, initial_tail2, cu_seqlens, final_tail0,
        final_tail1, final_tail2, T, N, units0, units1, units2, x_row0, x_row1, x_row2,
        BD=BD, num_warps=1, num_stages=1,
    )  # fmt: skip
