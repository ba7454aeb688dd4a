"""Where the chunks of a packed batch lie, found on the device; and zeros for tokens of no sequence.

`launch` makes the tables of a forward and its backward, and zeros in `o` for tokens that no
sequence covers; `clear` does that in the gradients. Whatever cu_seqlens holds, the tables stay
within the batch: a value outside of 0 .. T counts as 0 or T, one that falls as the largest so far.

    given            [N+1]            cu_seqlens as the caller gave it, int32 or int64
    cu_seqlens       [N+1] int32      the same, rising within 0 .. T
    chunk_offsets    [N+1] int32      the first chunk of each sequence
    chunk_table      [NT, 2] int32    first token and tokens of each chunk; 0 tokens past the last
    ddt              [1, T, HV]       a gradient
    o, dv, dz        [1, T, HV, V]    the output, and gradients

Problem: mamba2 K=128 V=64 bf16, g bf16, chunks of 32 tokens

Template digest f162680710b25696; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,varlen,rate,D,z --out DIR
"""

import triton
import triton.language as tl


K, V = 128, 64
BT = 32
BC, BN = 16, 32  # chunks of a program, and sequences that it looks at together
BW = 1024  # elements of a row that are cleared together
# Programs at least: where a batch is mostly empty, a handful would clear it alone.
SPREAD = 264


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def clear_rows(x, start, end, T, width, BW: tl.constexpr):
    """Zeros in rows 0 .. start - 1 and end .. T - 1 of x [T, width], shared out to all programs."""
    for i in range(tl.program_id(0), start + T - end, tl.num_programs(0)):
        i_row = tl.where(i < start, i, i - start + end)
        for i_x in range(0, width, BW):
            o_x = i_x + tl.arange(0, BW)
            p_x = i_row.to(tl.int64) * width + o_x
            tl.store(x + p_x, tl.zeros([BW], x.dtype.element_ty), mask=o_x < width)


@triton.jit(do_not_specialize=["N", "NT", "T", "HV"])
def chunk_tables_kernel(
    given,
    o,
    cu_seqlens,
    chunk_offsets,
    chunk_table,
    N,
    NT,
    T,
    HV,
    V: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    i_p = tl.program_id(0)
    o_c = i_p * BC + tl.arange(0, BC)
    start = tl.minimum(tl.maximum(tl.load(given), 0), T).to(tl.int32)
    end, n_chunks = start, 0
    # of each chunk's sequence: its first and last token, and its first chunk
    b_first = tl.zeros([BC], tl.int32)
    b_last = tl.zeros([BC], tl.int32)
    b_offset = tl.zeros([BC], tl.int32)
    if i_p == 0:
        tl.store(cu_seqlens, start)
        tl.store(chunk_offsets, 0)

    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < N
        b_start = tl.load(given + o_n, mask=m_n, other=0)
        b_end = tl.load(given + o_n + 1, mask=m_n, other=0)
        b_start = tl.minimum(tl.maximum(b_start, 0), T).to(tl.int32)
        b_end = tl.minimum(tl.maximum(b_end, 0), T).to(tl.int32)
        if i_p * BC < NT:
            b_start = tl.maximum(tl.associative_scan(b_start, 0, larger), end)
            b_end = tl.maximum(tl.associative_scan(b_end, 0, larger), b_start)
            b_chunks = tl.where(m_n, (b_end - b_start + BT - 1) // BT, 0)
            b_after = tl.cumsum(b_chunks, 0) + n_chunks
            b_before = b_after - b_chunks
            n_chunks = tl.max(b_after, 0)
            if i_p == 0:
                tl.store(cu_seqlens + 1 + o_n, b_end, mask=m_n)
                tl.store(chunk_offsets + 1 + o_n, b_after, mask=m_n)
            # the last sequence that begins at or before a chunk has the largest of all three
            m_cn = m_n[None, :] & (b_before[None, :] <= o_c[:, None])
            b_first = tl.maximum(b_first, tl.max(tl.where(m_cn, b_start[None, :], 0), 1))
            b_last = tl.maximum(b_last, tl.max(tl.where(m_cn, b_end[None, :], 0), 1))
            b_offset = tl.maximum(b_offset, tl.max(tl.where(m_cn, b_before[None, :], 0), 1))
        end = tl.maximum(end, tl.max(b_end, 0))

    b_token = tl.minimum(b_first + (o_c - b_offset) * BT, b_last)
    m_c = o_c < NT
    tl.store(chunk_table + o_c * 2, b_token, mask=m_c)
    tl.store(chunk_table + o_c * 2 + 1, tl.minimum(b_last - b_token, BT), mask=m_c)
    clear_rows(o, start, end, T, HV * V, BW)


@triton.jit(do_not_specialize=["N", "T", "HV"])
def clear_kernel(
    cu_seqlens,
    dv,
    ddt,
    dz,
    N,
    T,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BW: tl.constexpr,
):
    start = tl.load(cu_seqlens)
    end = tl.load(cu_seqlens + N)
    clear_rows(dv, start, end, T, HV * V, BW)
    clear_rows(ddt, start, end, T, HV, BW)
    clear_rows(dz, start, end, T, HV * V, BW)


def launch(given, o, cu_seqlens, chunk_offsets, chunk_table, *, n_sequences, n_chunks, T, HV):
    """Make the tables of a packed batch, and zeros in `o` where no sequence lies."""
    grid = (max(triton.cdiv(n_chunks, BC), SPREAD),)
    # one warp, whose sums over sequences need no barrier
    chunk_tables_kernel[grid](
        given, o, cu_seqlens, chunk_offsets, chunk_table, n_sequences, n_chunks, T, HV,
        V=V, BT=BT, BC=BC, BN=BN, BW=BW, num_warps=1,
    )  # fmt: skip


def clear(cu_seqlens, dv, ddt, dz, *, n_sequences, T, HV):
    """Zeros in the gradients of tokens of no sequence; `cu_seqlens` as `launch` made it."""
    clear_kernel[SPREAD,](
        cu_seqlens, dv, ddt, dz, n_sequences, T, HV,
        K=K, V=V, BW=BW, num_warps=4,
    )  # fmt: skip
