"""Score the pairs of a chunk and make the decayed factors for the scan.

    Aqk   = lower triangle of  scale (gamma q) (k / gamma)^T
    Qg    = scale gamma q      Ktail = (gamma_C / gamma) k
                                                                gamma = exp(cumulative decay)

One program per CHUNKS chunks and value head. A thread has two channels and a part of the tokens, so
that the decay is summed over the tokens in registers. The compiler gives the loads to a warp group of
its own.

Rows in which no channel has lost more than 2^-120 since the chunk's start meet their columns 2^-60
below it, so that factors lie within 2^60 of 1. Rows in which one has meet them in the middle of dyadic
blocks, in 5 more products that any decay takes alike.

    q        [B, T, H, K]      bf16  queries
    k        [B, T, H, K]      bf16  keys
    g        [B, T, HG, K]     fp32  log decay
    Aqk      [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    Qg       [NT, HV, BT, K]   bf16  queries, scaled and decayed from the chunk's start
    Ktail    [NT, HV, BT, K]   bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk

Problem: gla K=128 V=128 bf16, g fp32
Config:  BK=128 BT=32 chunks=4 decay=centred language=tilelang maxnreg=80 num_stages=1 num_warps=4 solve=ieee
Template digest 7c15d43ab6db0a74; made by
    gdn2gen generate --op gla --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage prepare --config \
      BK=128,BT=32,chunks=4,decay=centred,language=tilelang,maxnreg=80,num_stages=1,num_warps=4,solve=ieee
"""

from functools import cache


K = 128
BT, CHUNKS = 32, 4
THREADS = 128
# two channels a thread, and an equal part of the tokens: shared memory is read 4 bytes at a time
PARTS = 128 // (K // 2)
PART = BT // PARTS
IO, GATE = "bfloat16", "float32"
# one anchor serves a chunk in which every channel keeps at least LEAST: factors lie within 2^60
LEAST, SHIFT = 2.0**-120, 60.0
LEVELS = 5  # log2(BT)
# 2^smallest_log2 is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences
log2e, smallest_log2 = 1.4426950408889634, -150.0
# exp2 and division by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, HG, NT, HV = (
        tile.dynamic(name) for name in ("B", "T", "H", "HG", "NT", "HV")
    )

    @tile.prim_func
    def prepare(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG, K], "float32"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Qg: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Ktail: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        gamma_C: tile.Tensor([NT, HV, K], "float32"),
        scale: tile.float32,
        lower_bound: tile.float32,
    ):
        with tile.Kernel(
            tile.ceildiv(tile.ceildiv(T, BT), CHUNKS), HV, B, threads=128
        ) as (i_x, i_h, i_b):
            n_chunks = tile.ceildiv(T, BT)

            # 3 programs to a multiprocessor: 80 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(3)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(136)

            i_first = i_x * CHUNKS
            # Held in variables: the compiler would divide again for every load, and loads that begin
            # later cost 7% of all (0.188 ms instead of 0.175 at train4k on an H200).
            i_hq, i_hg = tile.alloc_var("int32"), tile.alloc_var("int32")
            i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
            i_thread = tile.get_thread_binding()
            i_channel = i_thread % (K // 2) * 2
            i_part = i_thread // (K // 2)
            i_token = i_part * PART

            s_kq = tile.alloc_shared([2 * BT, K], IO)
            s_g = tile.alloc_shared([BT, K], GATE)
            s_rows = tile.alloc_shared([BT, K], IO)
            s_keys = tile.alloc_shared([BT, K], IO)
            s_query = tile.alloc_shared([BT, K], IO)
            s_tail = tile.alloc_shared([BT, K], IO)
            s_self = tile.alloc_shared([BT], "float32")
            # not 0 for tokens in which some channel has lost more than 120 bits; that of the last
            # token tells whether there are any, and the others are written then alone
            s_below = tile.alloc_shared([BT], "float32")
            s_total = tile.alloc_shared([PARTS, K], "float32")
            s_Aqk = tile.alloc_shared([BT, BT], IO)

            b_norms = tile.alloc_fragment([2 * BT, 2 * BT], "float32")
            b_scores = tile.alloc_fragment([BT, BT], "float32")
            b_blocks = tile.alloc_fragment([BT, BT], "float32")
            b_level = tile.alloc_fragment([BT, BT], "float32")
            n_strong = tile.alloc_var("int32")
            x_G = tile.alloc_local([PART, 2], "float32")
            x_before = tile.alloc_local([2], "float32")
            x_C = tile.alloc_local([2], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            for i_n in tile.Pipelined(
                tile.min(CHUNKS, n_chunks - i_first), num_stages=1
            ):
                i_c = i_b * n_chunks + i_first + i_n
                i_row = (i_first + i_n) * BT
                n_rows = tile.min(T - i_row, BT)

                # 64 channels at a time: those of half a tile lie together in shared memory
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, 0:64], s_kq[0:BT, 0:64])
                tile.copy(
                    q[i_b, i_row : i_row + BT, i_hq, 0:64], s_kq[BT : 2 * BT, 0:64]
                )
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, 64:128], s_kq[0:BT, 64:128])
                tile.copy(
                    q[i_b, i_row : i_row + BT, i_hq, 64:128], s_kq[BT : 2 * BT, 64:128]
                )
                tile.copy(g[i_b, i_row : i_row + BT, i_hg, :], s_g)

                # a token with itself, where no decay lies between
                tile.clear(b_norms)
                tile.gemm(s_kq, s_kq, b_norms, transpose_B=True)
                for i, j in tile.Parallel(2 * BT, 2 * BT):
                    if i + BT == j:
                        s_self[i] = b_norms[i, j] * scale
                if i_thread < BT:
                    s_below[i_thread] = 0.0

                # what the last chunk stores from s_tail is on its way meanwhile
                tile.tma_store_wait(0)
                # two channels and PART tokens a thread
                for i in tile.unroll(PART):
                    for c in tile.vectorized(2):
                        x_G[i, c] = tile.cast(s_g[i_token + i, i_channel + c], "float32") * log2e
                for i, c in tile.grid(PART, 2):
                    x_G[i, c] = tile.if_then_else(x_G[i, c] < smallest_log2, smallest_log2, x_G[i, c])
                # sums over the thread's own tokens, and what lies before them
                for i in tile.unroll(1, PART):
                    for c in tile.unroll(2):
                        x_G[i, c] += x_G[i - 1, c]
                for c in tile.vectorized(2):
                    s_total[i_part, i_channel + c] = x_G[PART - 1, c]
                tile.sync_threads()
                for c in tile.unroll(2):
                    x_before[c] = 0.0
                    x_C[c] = 0.0
                for m in tile.unroll(PARTS):
                    for c in tile.unroll(2):
                        x_before[c] += tile.if_then_else(m < i_part, s_total[m, i_channel + c], 0.0)
                        x_C[c] += s_total[m, i_channel + c]
                hold[0] = tile.cast(s_g[0, 0], "float32")

                if x_C[0] < -2.0 * SHIFT or x_C[1] < -2.0 * SHIFT:
                    s_below[BT - 1] = 1.0
                for i in tile.unroll(PART):
                    for c in tile.unroll(2):
                        x_G[i, c] += x_before[c]
                    for c in tile.vectorized(2):
                        s_rows[i_token + i, i_channel + c] = tile.cast(s_kq[BT + i_token + i, i_channel + c], "float32") * scale * tile.exp2(SHIFT + x_G[i, c])
                    for c in tile.vectorized(2):
                        s_query[i_token + i, i_channel + c] = tile.cast(s_kq[BT + i_token + i, i_channel + c], "float32") * scale * tile.exp2(x_G[i, c])
                    for c in tile.vectorized(2):
                        s_keys[i_token + i, i_channel + c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32") * tile.exp2(-SHIFT - x_G[i, c])
                    for c in tile.vectorized(2):
                        s_tail[i_token + i, i_channel + c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32") * tile.exp2(x_C[c] - x_G[i, c])
                # a value of each load of k and q
                hold[0] = tile.cast(s_kq[0, 0], "float32")
                hold[0] = tile.cast(s_kq[BT, 0], "float32")
                hold[0] = tile.cast(s_kq[0, 64], "float32")
                hold[0] = tile.cast(s_kq[BT, 64], "float32")
                if i_part == 0:
                    for c in tile.vectorized(2):
                        gamma_C[i_c, i_h, i_channel + c] = tile.exp2(x_C[c])
                tile.sync_threads()

                tile.clear(b_scores)
                tile.gemm(s_rows, s_keys, b_scores, transpose_B=True)
                # Some channel lost more than 2^-120: pairs meet in the middle of dyadic blocks, and
                # rows from there on are those. Earlier ones stay: a later token's decay must not move
                # them.
                n_strong = tile.if_then_else(s_below[BT - 1] != 0.0, 1, 0)
                for _ in tile.serial(n_strong):
                    tile.clear(b_blocks)
                    # All is read once more: the tiles that it was in wait for the next chunk's, and in
                    # registers it would spill where nothing of this is needed.
                    for i in tile.unroll(PART):
                        for c in tile.vectorized(2):
                            x_G[i, c] = tile.if_then_else(
                                i_token + i < n_rows, tile.cast(g[i_b, i_row + i_token + i, i_hg, i_channel + c], "float32"), 0.0
                            )
                    for i, c in tile.grid(PART, 2):
                        x_G[i, c] *= log2e
                        x_G[i, c] = tile.if_then_else(x_G[i, c] < smallest_log2, smallest_log2, x_G[i, c])
                    # in the same order as above: for the same bits
                    for i in tile.unroll(1, PART):
                        for c in tile.unroll(2):
                            x_G[i, c] += x_G[i - 1, c]
                    for c in tile.unroll(2):
                        x_before[c] = 0.0
                        x_C[c] = 0.0
                    for m in tile.unroll(PARTS):
                        for c in tile.unroll(2):
                            x_before[c] += tile.if_then_else(m < i_part, s_total[m, i_channel + c], 0.0)
                            x_C[c] += s_total[m, i_channel + c]
                    for i in tile.unroll(PART):
                        for c in tile.unroll(2):
                            x_G[i, c] += x_before[c]
                        if x_G[i, 0] < -2.0 * SHIFT or x_G[i, 1] < -2.0 * SHIFT:
                            s_below[i_token + i] = 1.0
                    for i in tile.unroll(PART):
                        for c in tile.vectorized(2):
                            s_query[i_token + i, i_channel + c] = tile.if_then_else(
                                i_token + i < n_rows,
                                q[i_b, i_row + i_token + i, i_hq, i_channel + c],
                                tile.cast(0, IO),
                            )
                        for c in tile.vectorized(2):
                            s_tail[i_token + i, i_channel + c] = tile.if_then_else(
                                i_token + i < n_rows,
                                k[i_b, i_row + i_token + i, i_hq, i_channel + c],
                                tile.cast(0, IO),
                            )
                    # A token is in the upper half of its block, a row, or in the lower, a column. With
                    # the decay up to the middle in a variable, this takes few registers.
                    for i_level in tile.serial(LEVELS):
                        # of blocks of several parts, the end of one
                        i_parts = tile.max(i_level - 4, 0)
                        for c in tile.unroll(2):
                            x_before[c] = 0.0
                        for m in tile.unroll(PARTS):
                            for c in tile.unroll(2):
                                x_before[c] += tile.if_then_else(
                                    m < ((i_part >> i_parts) | 1) << i_parts, s_total[m, i_channel + c], 0.0
                                )
                        tile.sync_threads()
                        for i in tile.unroll(PART):
                            if ((i_token + i) >> i_level) % 2 == 1:
                                if i > 0 and (i_token + i) % (1 << i_level) == 0:
                                    for c in tile.unroll(2):
                                        x_before[c] = x_G[tile.max(i - 1, 0), c]
                                for c in tile.vectorized(2):
                                    s_rows[i_token + i, i_channel + c] = tile.cast(s_query[i_token + i, i_channel + c], "float32") * scale * tile.exp2(x_G[i, c] - x_before[c])
                        for i_back in tile.unroll(PART):
                            i = PART - 1 - i_back
                            if ((i_token + i) >> i_level) % 2 == 0:
                                if i_back > 0 and (i_token + i + 1) % (1 << i_level) == 0:
                                    for c in tile.unroll(2):
                                        x_before[c] = x_G[i, c]
                                for c in tile.vectorized(2):
                                    s_keys[i_token + i, i_channel + c] = tile.cast(s_tail[i_token + i, i_channel + c], "float32") * tile.exp2(x_before[c] - x_G[i, c])
                        tile.sync_threads()
                        tile.clear(b_level)
                        tile.gemm(s_rows, s_keys, b_level, transpose_B=True)
                        for i, j in tile.Parallel(BT, BT):
                            b_blocks[i, j] += tile.if_then_else(
                                (i ^ j) >> i_level == 1, b_level[i, j], 0.0
                            )
                    for i in tile.unroll(PART):
                        for c in tile.vectorized(2):
                            s_query[i_token + i, i_channel + c] = tile.cast(s_query[i_token + i, i_channel + c], "float32") * scale * tile.exp2(x_G[i, c])
                        for c in tile.vectorized(2):
                            s_tail[i_token + i, i_channel + c] = tile.cast(s_tail[i_token + i, i_channel + c], "float32") * tile.exp2(x_C[c] - x_G[i, c])
                    for i, j in tile.Parallel(BT, BT):
                        b_scores[i, j] = tile.if_then_else(s_below[i] != 0.0, b_blocks[i, j], b_scores[i, j])
                for i, j in tile.Parallel(BT, BT):
                    s_Aqk[i, j] = tile.if_then_else(i > j, b_scores[i, j], 0.0)
                tile.sync_threads()

                if i_thread >= THREADS - BT:
                    i_own = i_thread - (THREADS - BT)
                    s_Aqk[i_own, i_own] = s_self[i_own]
                tile.sync_threads()
                tile.copy(s_query, Qg[i_c, i_h, :, :], disable_tma=True)
                tile.tma_copy(s_tail, Ktail[i_c, i_h, :, :])
                # the threads store these sooner than one that waits for TMA would
                tile.copy(s_Aqk, Aqk[i_c, i_h, :, :], disable_tma=True)
            tile.tma_store_wait(0)

    return prepare


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
    q, k, g, Aqk, Qg, Ktail, gamma_C, *, scale, lower_bound, n_chunks, T, H, HV, HG
):
    """Launch one program per CHUNKS chunks and value head on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, Aqk, Qg, Ktail, gamma_C, scale, lower_bound
    )
