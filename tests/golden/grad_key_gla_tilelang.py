"""The key side of the gradients, decay anchored at the chunk's start: dq, dk and dg.

Through the state first,

    dQg = dO S^T       dKtail = v dS^T       dgamma_C = rows of S dS

then through the scores, where every pair (i, j) met at the chunk's start:

    dq_i += scale exp(G_i) sum_j dAqk_ij k_j exp(-G_j)
    dk_j +=       exp(-G_j) sum_i scale dAqk_ij q_i exp(G_i)

and dg is the reverse cumulative sum of dG = q dq - k dk within the chunk.

One program per CHUNKS chunks, value head and slice of K. All tiles are held transposed, [BK, BT]: a
channel is a row, so that each result is the next product's left operand and stays in registers. The
compiler gives the loads to a warp group of its own, and every tile a barrier of its own: those that
only the state's products read are filled again while the rest of a chunk is worked on. Exact where
every channel of the slice keeps at least 2^-64 over the chunk; what does not is left to
strong_decay_kernel, in Triton.

    q            [B, T, H, K]    bf16   queries
    k            [B, T, H, K]    bf16   keys
    g            [B, T, HG, K]   fp32   log decay
    G            [B, T, HV, K]   fp32   decay since the chunk's start, log2; dg takes its place
    gamma_C      [NT, HV, K]     fp32   decay of the whole chunk
    h            [NT, HV, V, K]  bf16   state at the chunk's start, transposed
    v            [B, T, HV, V]   bf16   values
    dh           [NT, HV, V, K]  bf16   gradient of the state at the chunk's end, transposed
    do           [B, T, HV, V]   bf16   gradient of o
    chunk_table  [NT, 2]         int32  first token and number of tokens of each chunk
    dq           [B, T, HV, K]   bf16   gradient of q, per value head
    dk           [B, T, HV, K]   bf16   gradient of k, per value head
    dg           [B, T, HV, K]   fp32   gradient of g, per value head

Problem: gla K=128 V=128 bf16, g fp32, packed sequences
Config:  BK=64 BT=32 BV=128 chunks=4 decay=anchored language=tilelang maxnreg=128 num_stages=1 num_warps=4
Template digest 4a3c8e1fba912db5; made by
    gdn2gen generate --op gla --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with=varlen --stage grad_key --config \
      BK=64,BT=32,BV=128,chunks=4,decay=anchored,language=tilelang,maxnreg=128,num_stages=1,num_warps=4
"""

from functools import cache

import triton
import triton.language as tl


K, V = 128, 128
BT, BK, CHUNKS = 32, 64, 4
IO, GATE = "bfloat16", "float32"
LOOKED_AT = 4  # chunks a program of strong_decay_kernel
LEAST = 2.0**-64
LEAST_GAMMA = tl.constexpr(LEAST)
# exp2 and division by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, HG, HV, NT = (
        tile.dynamic(name) for name in ("B", "T", "H", "HG", "HV", "NT")
    )
    # a warp keeps whole channels, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def grad_key(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG, K], "float32"),
        G: tile.Tensor([B, T, HV, K], "float32"),
        gamma_C: tile.Tensor([NT, HV, K], "float32"),
        h: tile.Tensor([NT, HV, V, K], "bfloat16"),
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        dh: tile.Tensor([NT, HV, V, K], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        chunk_table: tile.Tensor([NT, 2], "int32"),
        dq: tile.Tensor([B, T, HV, K], "bfloat16"),
        dk: tile.Tensor([B, T, HV, K], "bfloat16"),
        dg: tile.Tensor([B, T, HV, K], "float32"),
        scale: tile.float32,
        lower_bound: tile.float32,
    ):
        with tile.Kernel(
            tile.ceildiv(NT, CHUNKS) * (K // BK), HV, threads=128
        ) as (i_x, i_h):
            i_b = 0
            n_chunks = NT

            # 2 programs to a multiprocessor: 128 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(2)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(232)

            i_k = i_x % (K // BK)
            i_first = i_x // (K // BK) * CHUNKS
            n_own = tile.if_then_else(chunk_table[i_first, 1] > 0, CHUNKS, 0)
            i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
            o_k = i_k * BK

            s_h = tile.alloc_shared([V, BK], IO)
            s_dh = tile.alloc_shared([V, BK], IO)
            s_do = tile.alloc_shared([BT, V], IO)
            s_v = tile.alloc_shared([BT, V], IO)
            s_dAqk = tile.alloc_shared([BT, BT], IO)
            s_q = tile.alloc_shared([BT, BK], IO)
            s_k = tile.alloc_shared([BT, BK], IO)
            s_G = tile.alloc_shared([BT, BK], "float32")
            s_gamma = tile.alloc_shared([BK], "float32")
            s_diagonal = tile.alloc_shared([BT], "float32")
            s_later = tile.alloc_shared([BT, BT], IO)
            s_dq = tile.alloc_shared([BT, BK], IO)
            s_dk = tile.alloc_shared([BT, BK], IO)
            s_dg = tile.alloc_shared([BT, BK], GATE)

            b_dq = tile.alloc_fragment([BK, BT], "float32")
            b_dAqk = tile.alloc_fragment([BT, BT], "float32")
            b_dk = tile.alloc_fragment([BK, BT], "float32")
            b_SdS = tile.alloc_fragment([BK, BK], "float32")
            b_dgamma = tile.alloc_fragment([BK], "float32")
            b_dG_C = tile.alloc_fragment([BK], "float32")
            b_gamma = tile.alloc_fragment([BK], "float32")
            b_least = tile.alloc_fragment([1], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")
            b_row = tile.alloc_fragment([BK, BT], "float32")
            b_column = tile.alloc_fragment([BK, BT], "float32")
            b_k = tile.alloc_fragment([BK, BT], "float32")
            b_q = tile.alloc_fragment([BK, BT], "float32")
            # in turn the decay G, products to be summed, dG, and what dA_log is the sum of
            b_dG = tile.alloc_fragment([BK, BT], "float32")
            b_dg = tile.alloc_fragment([BK, BT], "float32")
            # factors of pairs, rounded as products take them, then the first bits of dG and the next
            b_first = tile.alloc_fragment([BK, BT], IO)
            b_next = tile.alloc_fragment([BK, BT], IO)

            for i, j in tile.Parallel(BT, BT):
                s_later[i, j] = tile.if_then_else(i >= j, tile.cast(1, IO), tile.cast(0, IO))
            for i_n in tile.Pipelined(
                tile.min(n_own, n_chunks - i_first), num_stages=1
            ):
                i_c = i_first + i_n
                i_row = chunk_table[i_c, 0]
                n_rows = chunk_table[i_c, 1]

                tile.copy(h[i_c, i_h, :, o_k : o_k + BK], s_h)
                tile.copy(do[i_b, i_row : i_row + BT, i_h, :], s_do)
                tile.copy(dh[i_c, i_h, :, o_k : o_k + BK], s_dh)
                tile.copy(v[i_b, i_row : i_row + BT, i_h, :], s_v)
                tile.copy(G[i_b, i_row : i_row + BT, i_h, o_k : o_k + BK], s_G)
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, o_k : o_k + BK], s_k)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, o_k : o_k + BK], s_q)
                tile.copy(gamma_C[i_c, i_h, o_k : o_k + BK], s_gamma)

                # dO v^T, which another stage would have to read both for
                tile.clear(b_dAqk)
                tile.gemm(s_do, s_v, b_dAqk, transpose_B=True)
                for i, j in tile.Parallel(BT, BT):
                    s_dAqk[i, j] = tile.if_then_else(i < n_rows and i > j, b_dAqk[i, j], 0.0)
                    if i == j:
                        s_diagonal[i] = tile.if_then_else(i < n_rows, b_dAqk[i, j], 0.0)
                # through the state
                tile.clear(b_dq)
                tile.gemm(s_h, s_do, b_dq, transpose_A=True, transpose_B=True, policy=ROWS)
                tile.clear(b_dk)
                tile.gemm(s_dh, s_v, b_dk, transpose_A=True, transpose_B=True, policy=ROWS)
                # rows of S dS as the diagonal of a product: cheaper than reading both tiles again
                tile.clear(b_SdS)
                tile.gemm(s_dh, s_h, b_SdS, transpose_A=True, policy=ROWS)
                for i, j in tile.Parallel(BK, BK):
                    b_SdS[i, j] = tile.if_then_else(i == j, b_SdS[i, j], 0.0)
                tile.reduce_sum(b_SdS, b_dgamma, dim=1)

                for i, j in tile.Parallel(BK, BT):
                    # rows past the end of the sequence are another one's, perhaps with a NaN
                    b_dG[i, j] = tile.if_then_else(j < n_rows, s_G[j, i], 0.0)
                    b_row[i, j] = tile.exp2(b_dG[i, j])
                    b_column[i, j] = tile.exp2(-b_dG[i, j])
                    b_k[i, j] = tile.if_then_else(j < n_rows, tile.cast(s_k[j, i], "float32"), 0.0)
                    b_q[i, j] = tile.if_then_else(j < n_rows, tile.cast(s_q[j, i], "float32"), 0.0) * scale
                    b_dk[i, j] *= s_gamma[i]
                # The chunk's last token reaches the end undecayed: it would add to dG_C what it takes
                # from its own dG. Left out of both, as in strong_decay_kernel.
                for i, j in tile.Parallel(BK, BT):
                    b_first[i, j] = b_k[i, j] * b_column[i, j]
                    b_dG[i, j] = tile.if_then_else(
                        j < n_rows - 1, b_dk[i, j] * tile.cast(b_first[i, j], "float32"), 0.0
                    )
                tile.reduce_sum(b_dG, b_dG_C, dim=1)
                for i in tile.Parallel(BK):
                    b_gamma[i] = s_gamma[i]
                    b_dG_C[i] += b_gamma[i] * b_dgamma[i]
                tile.reduce_min(b_gamma, b_least, dim=0)

                # through the scores
                tile.gemm(b_first, s_dAqk, b_dq, transpose_B=True, policy=ROWS)
                for i, j in tile.Parallel(BK, BT):
                    b_first[i, j] = b_q[i, j] * b_row[i, j]
                tile.gemm(b_first, s_dAqk, b_dk, policy=ROWS)
                hold[0] = tile.cast(s_G[0, 0], "float32")
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_q[0, 0], "float32")
                hold[0] = tile.cast(s_gamma[0], "float32")

                # A pair adds to dG_i what it takes from dG_j, and under strong decay little else
                # remains: both ends take the factors as the products did, rounded, so that it cancels.
                for i, j in tile.Parallel(BK, BT):
                    b_dG[i, j] = tile.cast(b_first[i, j], "float32") * b_dq[i, j]
                    b_first[i, j] = b_k[i, j] * b_column[i, j]
                    b_dG[i, j] -= tile.if_then_else(
                        j < n_rows - 1, tile.cast(b_first[i, j], "float32") * b_dk[i, j], 0.0
                    )
                # b_q holds scale q, and b_dq the gradient of q over scale
                for i, j in tile.Parallel(BK, BT):
                    b_dq[i, j] *= b_row[i, j]
                    b_dk[i, j] *= b_column[i, j]
                    b_dG[i, j] = tile.if_then_else(j < n_rows, b_dG[i, j], 0.0)
                    b_first[i, j] = b_dG[i, j]
                    b_next[i, j] = b_dG[i, j] - tile.cast(b_first[i, j], "float32")
                    b_dq[i, j] += s_diagonal[j] * b_k[i, j]
                    b_dk[i, j] += s_diagonal[j] * b_q[i, j]
                    s_dq[j, i] = b_dq[i, j] * scale
                    s_dk[j, i] = b_dk[i, j]

                # the sum over each token and all later ones as a product with ones, of the first 8
                # bits and of the next 8
                tile.clear(b_dg)
                tile.gemm(b_next, s_later, b_dg, policy=ROWS)
                tile.gemm(b_first, s_later, b_dg, policy=ROWS)

                for i, j in tile.Parallel(BK, BT):
                    s_dg[j, i] = b_dg[i, j] + b_dG_C[i]

                if b_least[0] >= LEAST:
                    for i, j in tile.Parallel(BT, BK):
                        if i < n_rows:
                            dq[i_b, i_row + i, i_h, o_k + j] = s_dq[i, j]
                    for i, j in tile.Parallel(BT, BK):
                        if i < n_rows:
                            dk[i_b, i_row + i, i_h, o_k + j] = s_dk[i, j]
                    for i, j in tile.Parallel(BT, BK):
                        if i < n_rows:
                            dg[i_b, i_row + i, i_h, o_k + j] = s_dg[i, j]

    return grad_key


# a mark on programs for `one_warp_loads`, and for whoever keeps what was compiled
LOADS = {"tl.device_compile_flags": ["-DONE_WARP_LOADS"]}


def one_warp_loads():
    """Of the four warps to which TileLang gives the loads, let only the one that loads go on.

    One thread loads, and waits until a tile was read before it fills it again. All four warps wait
    with it, and a wait tells the phases of its barrier by one bit: a warp that is held up while two
    of them pass waits for the next, and at the end for one that never comes.
    """
    import re

    from tilelang.contrib import nvcc

    compile_cuda = nvcc.compile_cuda
    if compile_cuda.__name__ == "compile_loads":
        return
    begin = re.compile(
        r"^  if \(\(\(int\)threadIdx\.x\) < 128\) \{\n"
        r"(    tl::warpgroup_reg_dealloc<\d+>\(\);\n)?",
        re.MULTILINE,
    )
    end = "    if (((int)threadIdx.x) >= 32) return;\n"

    def compile_loads(source, *arguments, options=None, **named):
        if "-DONE_WARP_LOADS" in (options or ()):
            # whoever loads waits for the phase before the one that others wait for
            loads = re.search(r"\.wait\(.*\^ 1\)", source) is not None
            source, found = begin.subn(lambda x: x[0] + end, source)
            if found != loads or found != source.count("threadIdx.x) < 128) {"):
                raise RuntimeError(
                    "TileLang's text has loads in a place that is not known: install tilelang 0.1.15"
                )
        return compile_cuda(source, *arguments, options=options, **named)

    nvcc.compile_cuda = compile_loads


@cache
def compiled():
    """The program, compiled for the present GPU (10 s where no cache has it)."""
    import tilelang

    one_warp_loads()
    return tilelang.compile(program(), pass_configs=PASSES | LOADS)


# Factors stay within this range in log2 of their anchor: fp32 and bf16 end at 2^127, and the rest is
# room for keys of any norm, gradients and sums.
RANGE = tl.constexpr(64.0)


@triton.jit
def next_frame(b_G, b_anchor):
    """Move each channel's anchor to its first token that lies more than RANGE below the last one.

    Rows of the new frame are the tokens up to RANGE below the anchor, with exp2(G_i - anchor);
    columns are these and all earlier tokens, with exp2(anchor - G_j). Other factors are zero, and
    all of them in a channel that has no token left (its anchor becomes -inf). NaN stays NaN.
    """
    b_left = tl.where(b_G < (b_anchor - RANGE)[None, :], b_G, float("-inf"))
    b_anchor = tl.max(b_left, 0)
    m_below = b_G < (b_anchor - RANGE)[None, :]
    m_other = m_below | (b_G > b_anchor[None, :])
    b_row = tl.where(m_other, 0.0, tl.exp2(b_G - b_anchor[None, :]))
    b_column = tl.where(m_below, 0.0, tl.exp2(b_anchor[None, :] - b_G))
    return b_anchor, b_row, b_column


@triton.jit
def sum_of_later(b_x, BT: tl.constexpr):
    """Sum over each token and all later ones."""
    # a product with ones, of the first 8 bits and of the next 8: 0.3 ms less than a scan at train4k
    o_t = tl.arange(0, BT)
    b_ones = tl.where(o_t[:, None] <= o_t[None, :], 1.0, 0.0).to(tl.bfloat16)
    b_first = b_x.to(tl.bfloat16)
    b_next = (b_x - b_first.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(b_ones, b_first, tl.dot(b_ones, b_next))


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG", "NT"])
def strong_decay_kernel(
    q,
    k,
    g,
    G,
    gamma_C,
    h,
    v,
    dh,
    do,
    chunk_table,
    dq,
    dk,
    dg,
    scale,
    lower_bound,
    T,
    H,
    HV,
    HG,
    NT,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    LOOKED_AT: tl.constexpr,
):
    i_k = tl.program_id(0) % (K // BK)
    i_gh = tl.program_id(0) // (K // BK)
    i_first, i_h = i_gh // HV * LOOKED_AT, i_gh % HV
    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    # one look at all chunks: where none is left to do, which is the rule, this is all
    i_all = tl.minimum(i_first + tl.arange(0, LOOKED_AT), NT - 1).to(tl.int64)
    b_all = tl.load(gamma_C + (i_all * HV + i_h)[:, None] * K + o_k[None, :])
    # nothing was written of chunks without tokens, at the end of the table
    b_rows = tl.load(chunk_table + i_all * 2 + 1)
    b_all = tl.where(b_rows[:, None] > 0, b_all, 1.0)
    b_least = tl.min(b_all)
    n_left = tl.where(b_least < LEAST_GAMMA, tl.minimum(LOOKED_AT, NT - i_first), 0)
    for i_n in range(n_left):
        i_c = i_first + i_n
        i_start = tl.load(chunk_table + i_c * 2).to(tl.int64)
        n_rows = tl.load(chunk_table + i_c * 2 + 1)
        m_t = o_t < n_rows
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        i_tile = i_c.to(tl.int64) * HV + i_h
        p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
        p_g = (i_start * HG + i_hg) * K + o_t[:, None] * (HG * K) + o_k[None, :]
        p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]

        b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
        if tl.where(tl.min(b_gamma_C) < LEAST_GAMMA, n_rows, 0) > 0:
            o_v = tl.arange(0, V)
            p_h = i_tile * K * V + o_v[:, None] * K + o_k[None, :]
            p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
            b_h = tl.load(h + p_h)
            b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
            b_dq = tl.dot(b_do, b_h)
            b_dh = tl.load(dh + p_h)
            b_v = tl.load(v + p_o, mask=m_t[:, None], other=0.0)
            b_dk = tl.dot(b_v, b_dh)
            b_dAqk = tl.dot(b_do, tl.trans(b_v))
            # rows of S dS as the diagonal of a product: tiles that only products read are laid out
            # without bank conflicts, which is worth 0.08 ms at train4k
            b_SdS = tl.dot(tl.trans(b_dh), b_h)
            b_dgamma_C = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1)
            b_G = tl.load(G + p_out, mask=m_tk, other=0.0)
            b_G_C = tl.min(b_G, 0)
            b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_q *= scale

            b_gamma = tl.exp2(b_G)
            b_dq *= b_gamma
            b_dk *= tl.exp2(b_G_C[None, :] - b_G)
            # The chunk's last token reaches the end undecayed: it would add to dG_C what it takes
            # from its own dG. Left out of both, since under strong decay that cancellation is all
            # that remains.
            m_inner = (o_t < n_rows - 1)[:, None]
            b_dG_C = tl.sum(tl.where(m_inner, b_dk * b_k, 0.0), 0) + b_gamma_C * b_dgamma_C
            b_dG = b_q * b_dq - tl.where(m_inner, b_k * b_dk, 0.0)
            # dO v^T, which another stage would have to read both for
            o_i, o_j = o_t[:, None], o_t[None, :]
            b_diagonal = tl.sum(tl.where(o_i == o_j, b_dAqk, 0.0), 1)[:, None]
            b_dAqk = tl.where(o_i > o_j, b_dAqk, 0.0).to(tl.bfloat16)
            b_anchor = tl.full([BK], 2.0 * RANGE, tl.float32)
            while tl.max(b_anchor - b_G_C) > RANGE:
                b_anchor, b_row, b_column = next_frame(b_G, b_anchor)
                b_kc = (b_k * b_column).to(tl.bfloat16)
                b_qr = (b_q * b_row).to(tl.bfloat16)
                b_pairs = tl.dot(b_dAqk, b_kc)
                b_dq += b_row * b_pairs
                # the same rounded factors at both ends of a pair, so that it cancels out of dG
                b_dG += b_qr * b_pairs
                b_pairs = tl.dot(tl.trans(b_dAqk), b_qr)
                b_dk += b_column * b_pairs
                b_dG -= b_kc * b_pairs
            # b_q holds scale q, and b_dq the gradient of q over scale
            b_dq += b_diagonal * b_k
            b_dk += b_diagonal * b_q
            b_dq *= scale
            tl.store(dq + p_out, b_dq.to(tl.bfloat16), mask=m_tk)
            tl.store(dk + p_out, b_dk.to(tl.bfloat16), mask=m_tk)
            b_dg = sum_of_later(b_dG, BT) + b_dG_C[None, :]
            tl.store(dg + p_out, b_dg.to(tl.float32), mask=m_tk)


def launch(
    q, k, g, G, gamma_C, h, v, dh, do, chunk_table, dq, dk, dg, *, scale, lower_bound, n_chunks,
    T, H, HV, HG
):
    """Launch both kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, G, gamma_C, h, v, dh, do, chunk_table, dq, dk, dg, scale, lower_bound
    )
    strong_decay_kernel[(-(-n_chunks // LOOKED_AT) * HV * (K // BK),)](
        q, k, g, G, gamma_C, h, v, dh, do, chunk_table, dq, dk, dg, scale, lower_bound, T, H,
        HV, HG,
        NT=n_chunks, K=K, V=V, BT=BT, BK=BK, LOOKED_AT=LOOKED_AT,
        num_warps=4, num_stages=1,
    )
