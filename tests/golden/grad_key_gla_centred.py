"""The key side of the gradients, the decay's factors centred: dq, dk and dg.

Through the state first,

    dQg = dO S^T       dKtail = v dS^T       dgamma_C = rows of S dS

then through the scores, where a pair (i, j) met at an anchor a:

    dq_i += scale exp(G_i - a) sum_j dAqk_ij k_j exp(a - G_j)
    dk_j += scale exp(a - G_j) sum_i dAqk_ij q_i exp(G_i - a)

and dg is the reverse cumulative sum of dG = q dq - k dk within the chunk.

One program per CHUNKS chunks, value head and slice of K. All tiles are held transposed, [BK, BT]: a
channel is a row, so that each result is the next product's left operand and stays in registers. The
compiler gives the loads to a warp group of its own, and every tile a barrier of its own: those that
only the state's products read are filled again while the rest of a chunk is worked on. Where every
channel of the slice keeps at least 2^-120 over the chunk, one anchor serves all pairs: 2^-60 below its
start. In other slices a pair meets in the middle of its dyadic block, in 5 products that any decay
takes alike.

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
Config:  BK=64 BT=32 BV=128 chunks=4 decay=centred language=tilelang maxnreg=128 num_stages=1 num_warps=4
Template digest bb906e624a0df45e; made by
    gdn2gen generate --op gla --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with=varlen --stage grad_key --config \
      BK=64,BT=32,BV=128,chunks=4,decay=centred,language=tilelang,maxnreg=128,num_stages=1,num_warps=4
"""

from functools import cache


K, V = 128, 128
BT, BK, CHUNKS = 32, 64, 4
IO, GATE = "bfloat16", "float32"
# one anchor serves a chunk in which every channel keeps at least LEAST: factors lie within 2^60
LEAST, SHIFT = 2.0**-120, 60.0
LEVELS = 5  # log2(BT)
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

            s_pairs = tile.alloc_shared([BT, BT], IO)
            n_levels = tile.alloc_var("int32")

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

                i_last = tile.max(n_rows, 1) - 1
                for i, j in tile.Parallel(BK, BT):
                    # rows past the end of the sequence have no decay of their own
                    b_row[i, j] = s_G[tile.min(j, i_last), i]
                    b_k[i, j] = tile.if_then_else(j < n_rows, tile.cast(s_k[j, i], "float32"), 0.0)
                    b_q[i, j] = tile.if_then_else(j < n_rows, tile.cast(s_q[j, i], "float32"), 0.0) * scale
                for i in tile.Parallel(BK):
                    b_gamma[i] = s_gamma[i]
                tile.reduce_min(b_gamma, b_least, dim=0)
                n_levels = tile.if_then_else(b_least[0] >= LEAST, 0, LEVELS)

                # through the scores: at one anchor where that is enough
                for _ in tile.serial(tile.if_then_else(n_levels == 0, 1, 0)):
                    for i, j in tile.Parallel(BK, BT):
                        b_column[i, j] = tile.exp2(-SHIFT - b_row[i, j])
                        b_row[i, j] = tile.exp2(SHIFT + b_row[i, j])
                        b_dq[i, j] *= 2.0**-SHIFT
                        b_dk[i, j] *= s_gamma[i] * 2.0**SHIFT
                    # The chunk's last token reaches the end undecayed: it would add to dG_C what it
                    # takes from its own dG. Left out of both: under strong decay only that
                    # cancellation remains.
                    for i, j in tile.Parallel(BK, BT):
                        b_first[i, j] = b_k[i, j] * b_column[i, j]
                        b_dG[i, j] = tile.if_then_else(
                            j < n_rows - 1, b_dk[i, j] * tile.cast(b_first[i, j], "float32"), 0.0
                        )
                    tile.reduce_sum(b_dG, b_dG_C, dim=1)
                    tile.gemm(b_first, s_dAqk, b_dq, transpose_B=True, policy=ROWS)
                    for i, j in tile.Parallel(BK, BT):
                        b_first[i, j] = b_q[i, j] * b_row[i, j]
                    tile.gemm(b_first, s_dAqk, b_dk, policy=ROWS)
                    # A pair adds to dG_i what it takes from dG_j: both ends take the factors as the
                    # products did, rounded, so that it cancels.
                    for i, j in tile.Parallel(BK, BT):
                        b_dG[i, j] = tile.cast(b_first[i, j], "float32") * b_dq[i, j]
                        b_first[i, j] = b_k[i, j] * b_column[i, j]
                        b_dG[i, j] -= tile.if_then_else(
                            j < n_rows - 1, tile.cast(b_first[i, j], "float32") * b_dk[i, j], 0.0
                        )
                        b_dq[i, j] *= b_row[i, j]
                        b_dk[i, j] *= b_column[i, j]
                # or in the middle of dyadic blocks
                for _ in tile.serial(tile.if_then_else(n_levels == 0, 0, 1)):
                    for i, j in tile.Parallel(BK, BT):
                        b_dq[i, j] *= tile.exp2(b_row[i, j])
                        b_dk[i, j] *= tile.exp2(s_G[i_last, i] - b_row[i, j])
                        b_column[i, j] = tile.if_then_else(
                            j < n_rows - 1, b_k[i, j] * b_dk[i, j], 0.0
                        )
                        b_dG[i, j] = b_q[i, j] * b_dq[i, j] - b_column[i, j]
                    tile.reduce_sum(b_column, b_dG_C, dim=1)
                    for i_level in tile.unroll(LEVELS):
                        # A token is in the upper half of its block, or in the lower: it has one factor,
                        # at most 1, and is a row or a column. So one product with a symmetric matrix
                        # gives the upper tokens' dq and the lower ones' dk.
                        for i, j in tile.Parallel(BT, BT):
                            s_pairs[i, j] = tile.if_then_else(
                                (i ^ j) >> i_level == 1,
                                s_dAqk[tile.max(i, j), tile.min(i, j)],
                                tile.cast(0, IO),
                            )
                        tile.fence_proxy_async()
                        for i, j in tile.Parallel(BK, BT):
                            b_column[i, j] = b_row[i, j] - s_G[tile.min((((j >> i_level) | 1) << i_level) - 1, i_last), i]
                            b_column[i, j] = tile.exp2(
                                tile.if_then_else((j >> i_level) % 2 == 1, b_column[i, j], -b_column[i, j])
                            )
                            b_first[i, j] = b_column[i, j] * tile.if_then_else(
                                (j >> i_level) % 2 == 1, b_q[i, j], b_k[i, j]
                            )
                        tile.clear(b_dg)
                        tile.gemm(b_first, s_pairs, b_dg, policy=ROWS)
                        for i, j in tile.Parallel(BK, BT):
                            b_column[i, j] *= b_dg[i, j]
                            b_dg[i, j] *= tile.cast(b_first[i, j], "float32")
                            b_dq[i, j] += tile.if_then_else((j >> i_level) % 2 == 1, b_column[i, j], 0.0)
                            b_dk[i, j] += tile.if_then_else((j >> i_level) % 2 == 1, 0.0, b_column[i, j])
                            b_dG[i, j] += tile.if_then_else((j >> i_level) % 2 == 1, b_dg[i, j], -b_dg[i, j])
                for i in tile.Parallel(BK):
                    b_dG_C[i] += b_gamma[i] * b_dgamma[i]
                hold[0] = tile.cast(s_G[0, 0], "float32")
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_q[0, 0], "float32")
                hold[0] = tile.cast(s_gamma[0], "float32")

                # b_q holds scale q, and b_dq the gradient of q over scale
                for i, j in tile.Parallel(BK, BT):
                    b_dG[i, j] = tile.if_then_else(j < n_rows, b_dG[i, j], 0.0)
                    b_first[i, j] = b_dG[i, j]
                    b_next[i, j] = b_dG[i, j] - tile.cast(b_first[i, j], "float32")
                    s_dq[j, i] = (b_dq[i, j] + s_diagonal[j] * b_k[i, j]) * scale
                    s_dk[j, i] = b_dk[i, j] + s_diagonal[j] * b_q[i, j]

                # the sum over each token and all later ones as a product with ones, of the first 8
                # bits and of the next 8
                tile.clear(b_dg)
                tile.gemm(b_next, s_later, b_dg, policy=ROWS)
                tile.gemm(b_first, s_later, b_dg, policy=ROWS)

                for i, j in tile.Parallel(BK, BT):
                    s_dg[j, i] = b_dg[i, j] + b_dG_C[i]

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


def launch(
    q, k, g, G, gamma_C, h, v, dh, do, chunk_table, dq, dk, dg, *, scale, lower_bound, n_chunks,
    T, H, HV, HG
):
    """Launch one program per CHUNKS chunks, value head and slice of K on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, G, gamma_C, h, v, dh, do, chunk_table, dq, dk, dg, scale, lower_bound
    )
