"""Score the pairs of a chunk, invert, and make the decayed factors for the scan.

    T     = strict lower triangle of  (gamma b k) (k / gamma)^T        A = (I + T)^-1
    Aqk   = lower triangle of  scale (gamma q) (k / gamma)^T
    Qg    = scale gamma q      E = gamma b k      Y = -A E      Ktail = (gamma_C / gamma) k
                                                                gamma = exp(cumulative decay)

One program per CHUNKS chunks and value head. A thread has two channels and a part of the tokens, so
that the decay is summed over the tokens in registers. The compiler gives the loads to a warp group of
its own. k and q lie one above the other in shared memory, so that one product gives all norms, and so
do E and Qg: one product with k / gamma gives T and Aqk. A warp inverts the halves of I + T by substitution in
fp32, a column a thread; Y takes the place of E.

Rows in which no channel has lost more than 2^-120 since the chunk's start meet their columns 2^-60
below it, so that factors lie within 2^60 of 1. Rows in which one has meet them in the middle of dyadic
blocks, in 5 more products that any decay takes alike.

    q        [B, T, H, K]      bf16  queries; normalised in the kernel
    k        [B, T, H, K]      bf16  keys; normalised in the kernel
    g        [B, T, HG, K]     fp32  log decay
    b        [B, T, HG, K]     bf16  erase gate
    q_rstd   [NT, HV, BT]      fp32  1 / norm of q
    k_rstd   [NT, HV, BT]      fp32  1 / norm of k
    A        [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    Aqk      [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    Qg       [NT, HV, BT, K]   bf16  queries, scaled and decayed from the chunk's start
    Y        [NT, HV, BT, K]   bf16  erasing keys through the inverse, -A E
    Ktail    [NT, HV, BT, K]   bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BK=128 BT=32 chunks=4 decay=centred language=tilelang maxnreg=80 num_stages=1 num_warps=4 solve=halves
Template digest 7c15d43ab6db0a74; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage prepare --config \
      BK=128,BT=32,chunks=4,decay=centred,language=tilelang,maxnreg=80,num_stages=1,num_warps=4,solve=halves
"""

from functools import cache


K = 128
BT, CHUNKS = 32, 4
THREADS = 128
# two channels a thread, and an equal part of the tokens: shared memory is read 4 bytes at a time
PARTS = 128 // (K // 2)
PART = BT // PARTS
HALF = BT // 2  # the inverse is made of those of the chunk's halves
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
        b: tile.Tensor([B, T, HG, K], "bfloat16"),
        q_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_rstd: tile.Tensor([NT, HV, BT], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Qg: tile.Tensor([NT, HV, BT, K], "bfloat16"),
        Y: tile.Tensor([NT, HV, BT, K], "bfloat16"),
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
            s_b = tile.alloc_shared([BT, K], IO)
            s_g = tile.alloc_shared([BT, K], GATE)
            s_rows = tile.alloc_shared([2 * BT, K], IO)
            s_keys = tile.alloc_shared([BT, K], IO)
            s_self = tile.alloc_shared([BT], "float32")
            # not 0 for tokens in which some channel has lost more than 120 bits; that of the last
            # token tells whether there are any, and the others are written then alone
            s_below = tile.alloc_shared([BT], "float32")
            s_total = tile.alloc_shared([PARTS, K], "float32")
            s_rstd = tile.alloc_shared([2 * BT], "float32")
            # rows so long that what a warp writes of the scores lies in banks of its own
            s_T = tile.alloc_shared([BT, BT + 4], "float32")
            x_A21 = tile.alloc_local([2], "float32")
            s_A = tile.alloc_shared([BT, BT], IO)
            s_Aqk = tile.alloc_shared([BT, BT], IO)

            b_norms = tile.alloc_fragment([2 * BT, 2 * BT], "float32")
            b_scores = tile.alloc_fragment([2 * BT, BT], "float32")
            b_level = tile.alloc_fragment([2 * BT, BT], "float32")
            b_Y = tile.alloc_fragment([BT, K], "float32")
            n_strong = tile.alloc_var("int32")
            x_G = tile.alloc_local([PART, 2], "float32")
            x_k = tile.alloc_local([PART, 2], "float32")
            x_before = tile.alloc_local([2], "float32")
            x_C = tile.alloc_local([2], "float32")
            x_A = tile.alloc_local([HALF], "float32")
            x_kept = tile.alloc_local([PART, 2], IO)
            x_key = tile.alloc_local([2], "float32")
            x_factor = tile.alloc_local([2], "float32")
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
                tile.copy(b[i_b, i_row : i_row + BT, i_hg, :], s_b)

                # a token with itself, where no decay lies between, and the norms, from one product of
                # all of k and q with themselves
                tile.clear(b_norms)
                tile.gemm(s_kq, s_kq, b_norms, transpose_B=True)
                for i, j in tile.Parallel(2 * BT, 2 * BT):
                    if i == j:
                        s_rstd[i] = tile.rsqrt(b_norms[i, j] + 1e-6)
                    if i + BT == j:
                        s_self[i] = b_norms[i, j] * scale
                if i_thread < BT:
                    s_below[i_thread] = 0.0

                # what the last chunk stores from s_keys is on its way meanwhile
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

                if i_thread < BT:
                    k_rstd[i_c, i_h, i_thread] = s_rstd[i_thread]
                    q_rstd[i_c, i_h, i_thread] = s_rstd[BT + i_thread]
                if x_C[0] < -2.0 * SHIFT or x_C[1] < -2.0 * SHIFT:
                    s_below[BT - 1] = 1.0
                for i in tile.unroll(PART):
                    for c in tile.unroll(2):
                        x_G[i, c] += x_before[c]
                    for c in tile.vectorized(2):
                        x_k[i, c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32") * s_rstd[i_token + i]
                    for c in tile.vectorized(2):
                        s_rows[i_token + i, i_channel + c] = (
                            x_k[i, c] * tile.cast(s_b[i_token + i, i_channel + c], "float32")
                            * tile.exp2(SHIFT + x_G[i, c])
                        )
                    for c in tile.vectorized(2):
                        s_rows[BT + i_token + i, i_channel + c] = (
                            tile.cast(s_kq[BT + i_token + i, i_channel + c], "float32")
                            * (s_rstd[BT + i_token + i] * scale)
                            * tile.exp2(SHIFT + x_G[i, c])
                        )
                    for c in tile.vectorized(2):
                        s_keys[i_token + i, i_channel + c] = x_k[i, c] * tile.exp2(-SHIFT - x_G[i, c])
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
                    for i in tile.unroll(PART):
                        if x_G[i, 0] < -2.0 * SHIFT or x_G[i, 1] < -2.0 * SHIFT:
                            s_below[i_token + i] = 1.0
                    # what is stored of keys and queries is made first, for registers
                    for i in tile.unroll(PART):
                        for c in tile.vectorized(2):
                            Ktail[i_c, i_h, i_token + i, i_channel + c] = x_k[i, c] * tile.exp2(x_C[c] - x_G[i, c])
                    for i, j in tile.Parallel(BT, K):
                        Qg[i_c, i_h, i, j] = s_rows[BT + i, j] * tile.cast(2.0**-SHIFT, IO)

                    for i, j in tile.Parallel(2 * BT, BT):
                        if i < BT:
                            s_T[j, i] = b_scores[i, j]
                        else:
                            s_Aqk[i - BT, j] = tile.if_then_else(i - BT > j, b_scores[i, j], 0.0)
                    # E, which Y is made of
                    for i in tile.unroll(PART):
                        for c in tile.vectorized(2):
                            x_kept[i, c] = s_rows[i_token + i, i_channel + c]
                    tile.sync_threads()
                    # A token is in the upper half of its block of a level, two rows, or in the lower, a
                    # column, and has one factor, at most 1. Two levels fill the tiles of one product.
                    for c in tile.unroll(2):
                        x_before[c] = 0.0
                    for m in tile.unroll(PARTS):
                        for c in tile.unroll(2):
                            x_before[c] += tile.if_then_else(
                                m < 1, s_total[m, i_channel + c], 0.0
                            )
                    if i_part % 2 == 1:
                        for i in tile.unroll(PART):
                            for c in tile.vectorized(2):
                                x_key[c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                            for c in tile.vectorized(2):
                                x_factor[c] = tile.exp2(x_G[i, c] - x_before[c])
                            for c in tile.vectorized(2):
                                s_rows[i, i_channel + c] = (
                                    x_key[c] * tile.cast(s_b[i_token + i, i_channel + c], "float32") * x_factor[c]
                                )
                            for c in tile.vectorized(2):
                                s_rows[BT // 2 + i, i_channel + c] = (
                                    tile.cast(s_kq[BT + i_token + i, i_channel + c], "float32") * x_factor[c]
                                )
                    else:
                        for i in tile.unroll(PART):
                            for c in tile.vectorized(2):
                                x_key[c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                            for c in tile.vectorized(2):
                                x_factor[c] = tile.exp2(x_before[c] - x_G[i, c])
                            for c in tile.vectorized(2):
                                s_keys[i, i_channel + c] = x_key[c] * x_factor[c]
                    for j in tile.unroll(PART // 2):
                        i = j + 8
                        for c in tile.vectorized(2):
                            x_key[c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                        for c in tile.vectorized(2):
                            x_factor[c] = tile.exp2(x_G[i, c] - x_G[i - j % 8 - 1, c])
                        for c in tile.vectorized(2):
                            s_rows[BT + i_part * (PART // 2) + j, i_channel + c] = (
                                x_key[c] * tile.cast(s_b[i_token + i, i_channel + c], "float32") * x_factor[c]
                            )
                        for c in tile.vectorized(2):
                            s_rows[BT + BT // 2 + i_part * (PART // 2) + j, i_channel + c] = (
                                tile.cast(s_kq[BT + i_token + i, i_channel + c], "float32") * x_factor[c]
                            )
                    for j in tile.unroll(PART // 2):
                        i = j
                        for c in tile.vectorized(2):
                            x_key[c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                        for c in tile.vectorized(2):
                            x_factor[c] = tile.if_then_else(
                                j % 8 == 7, 1.0, tile.exp2(x_G[i - j % 8 + 7, c] - x_G[i, c])
                            )
                        for c in tile.vectorized(2):
                            s_keys[BT // 2 + i_part * (PART // 2) + j, i_channel + c] = x_key[c] * x_factor[c]
                    tile.sync_threads()
                    tile.clear(b_level)
                    tile.gemm(s_rows, s_keys, b_level, transpose_B=True)
                    tile.sync_threads()
                    for r, j in tile.Parallel(2 * BT, BT):
                        if r // BT == 0 and j // 16 == 0:
                            if s_below[r % 16 + 16] != 0.0:
                                if r % BT < 16:
                                    s_T[j % 16, r % 16 + 16] = (
                                        b_level[r, j]
                                        * (s_rstd[r % 16 + 16] * s_rstd[j % 16])
                                    )
                                else:
                                    s_Aqk[r % 16 + 16, j % 16] = (
                                        b_level[r, j] * scale
                                        * (s_rstd[BT + r % 16 + 16] * s_rstd[j % 16])
                                    )
                        if r // BT == 1 and j // 16 == 1:
                            if r % 16 // 8 == j % 16 // 8 and s_below[r % 16 // 8 * 16 + r % 8 + 8] != 0.0:
                                if r % BT < 16:
                                    s_T[j % 16 // 8 * 16 + j % 8, r % 16 // 8 * 16 + r % 8 + 8] = (
                                        b_level[r, j]
                                        * (s_rstd[r % 16 // 8 * 16 + r % 8 + 8] * s_rstd[j % 16 // 8 * 16 + j % 8])
                                    )
                                else:
                                    s_Aqk[r % 16 // 8 * 16 + r % 8 + 8, j % 16 // 8 * 16 + j % 8] = (
                                        b_level[r, j] * scale
                                        * (s_rstd[BT + r % 16 // 8 * 16 + r % 8 + 8] * s_rstd[j % 16 // 8 * 16 + j % 8])
                                    )
                    for j in tile.unroll(PART // 2):
                        i = j // 4 * 8 + j % 4 + 4
                        for c in tile.vectorized(2):
                            x_key[c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                        for c in tile.vectorized(2):
                            x_factor[c] = tile.exp2(x_G[i, c] - x_G[i - j % 4 - 1, c])
                        for c in tile.vectorized(2):
                            s_rows[i_part * (PART // 2) + j, i_channel + c] = (
                                x_key[c] * tile.cast(s_b[i_token + i, i_channel + c], "float32") * x_factor[c]
                            )
                        for c in tile.vectorized(2):
                            s_rows[BT // 2 + i_part * (PART // 2) + j, i_channel + c] = (
                                tile.cast(s_kq[BT + i_token + i, i_channel + c], "float32") * x_factor[c]
                            )
                    for j in tile.unroll(PART // 2):
                        i = j // 4 * 8 + j % 4
                        for c in tile.vectorized(2):
                            x_key[c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                        for c in tile.vectorized(2):
                            x_factor[c] = tile.if_then_else(
                                j % 4 == 3, 1.0, tile.exp2(x_G[i - j % 4 + 3, c] - x_G[i, c])
                            )
                        for c in tile.vectorized(2):
                            s_keys[i_part * (PART // 2) + j, i_channel + c] = x_key[c] * x_factor[c]
                    for j in tile.unroll(PART // 2):
                        i = j // 2 * 4 + j % 2 + 2
                        for c in tile.vectorized(2):
                            x_key[c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                        for c in tile.vectorized(2):
                            x_factor[c] = tile.exp2(x_G[i, c] - x_G[i - j % 2 - 1, c])
                        for c in tile.vectorized(2):
                            s_rows[BT + i_part * (PART // 2) + j, i_channel + c] = (
                                x_key[c] * tile.cast(s_b[i_token + i, i_channel + c], "float32") * x_factor[c]
                            )
                        for c in tile.vectorized(2):
                            s_rows[BT + BT // 2 + i_part * (PART // 2) + j, i_channel + c] = (
                                tile.cast(s_kq[BT + i_token + i, i_channel + c], "float32") * x_factor[c]
                            )
                    for j in tile.unroll(PART // 2):
                        i = j // 2 * 4 + j % 2
                        for c in tile.vectorized(2):
                            x_key[c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                        for c in tile.vectorized(2):
                            x_factor[c] = tile.if_then_else(
                                j % 2 == 1, 1.0, tile.exp2(x_G[i - j % 2 + 1, c] - x_G[i, c])
                            )
                        for c in tile.vectorized(2):
                            s_keys[BT // 2 + i_part * (PART // 2) + j, i_channel + c] = x_key[c] * x_factor[c]
                    tile.sync_threads()
                    tile.clear(b_level)
                    tile.gemm(s_rows, s_keys, b_level, transpose_B=True)
                    tile.sync_threads()
                    for r, j in tile.Parallel(2 * BT, BT):
                        if r // BT == 0 and j // 16 == 0:
                            if r % 16 // 4 == j % 16 // 4 and s_below[r % 16 // 4 * 8 + r % 4 + 4] != 0.0:
                                if r % BT < 16:
                                    s_T[j % 16 // 4 * 8 + j % 4, r % 16 // 4 * 8 + r % 4 + 4] = (
                                        b_level[r, j]
                                        * (s_rstd[r % 16 // 4 * 8 + r % 4 + 4] * s_rstd[j % 16 // 4 * 8 + j % 4])
                                    )
                                else:
                                    s_Aqk[r % 16 // 4 * 8 + r % 4 + 4, j % 16 // 4 * 8 + j % 4] = (
                                        b_level[r, j] * scale
                                        * (s_rstd[BT + r % 16 // 4 * 8 + r % 4 + 4] * s_rstd[j % 16 // 4 * 8 + j % 4])
                                    )
                        if r // BT == 1 and j // 16 == 1:
                            if r % 16 // 2 == j % 16 // 2 and s_below[r % 16 // 2 * 4 + r % 2 + 2] != 0.0:
                                if r % BT < 16:
                                    s_T[j % 16 // 2 * 4 + j % 2, r % 16 // 2 * 4 + r % 2 + 2] = (
                                        b_level[r, j]
                                        * (s_rstd[r % 16 // 2 * 4 + r % 2 + 2] * s_rstd[j % 16 // 2 * 4 + j % 2])
                                    )
                                else:
                                    s_Aqk[r % 16 // 2 * 4 + r % 2 + 2, j % 16 // 2 * 4 + j % 2] = (
                                        b_level[r, j] * scale
                                        * (s_rstd[BT + r % 16 // 2 * 4 + r % 2 + 2] * s_rstd[j % 16 // 2 * 4 + j % 2])
                                    )
                    for j in tile.unroll(PART // 2):
                        i = j * 2 + 1
                        for c in tile.vectorized(2):
                            x_key[c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                        for c in tile.vectorized(2):
                            x_factor[c] = tile.exp2(x_G[i, c] - x_G[i - 1, c])
                        for c in tile.vectorized(2):
                            s_rows[i_part * (PART // 2) + j, i_channel + c] = (
                                x_key[c] * tile.cast(s_b[i_token + i, i_channel + c], "float32") * x_factor[c]
                            )
                        for c in tile.vectorized(2):
                            s_rows[BT // 2 + i_part * (PART // 2) + j, i_channel + c] = (
                                tile.cast(s_kq[BT + i_token + i, i_channel + c], "float32") * x_factor[c]
                            )
                    for j in tile.unroll(PART // 2):
                        i = j * 2
                        for c in tile.vectorized(2):
                            x_key[c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                        for c in tile.vectorized(2):
                            s_keys[i_part * (PART // 2) + j, i_channel + c] = x_key[c]
                    tile.sync_threads()
                    tile.clear(b_level)
                    tile.gemm(s_rows, s_keys, b_level, transpose_B=True)
                    tile.sync_threads()
                    for r, j in tile.Parallel(2 * BT, BT):
                        if r // BT == 0 and j // 16 == 0:
                            if r % 16 // 1 == j % 16 // 1 and s_below[r % 16 * 2 + 1] != 0.0:
                                if r % BT < 16:
                                    s_T[j % 16 * 2, r % 16 * 2 + 1] = (
                                        b_level[r, j]
                                        * (s_rstd[r % 16 * 2 + 1] * s_rstd[j % 16 * 2])
                                    )
                                else:
                                    s_Aqk[r % 16 * 2 + 1, j % 16 * 2] = (
                                        b_level[r, j] * scale
                                        * (s_rstd[BT + r % 16 * 2 + 1] * s_rstd[j % 16 * 2])
                                    )
                    for i in tile.unroll(PART):
                        for c in tile.vectorized(2):
                            s_rows[i_token + i, i_channel + c] = x_kept[i, c]
                    # or the compiler would keep what they were, for the usual path that is not taken
                    tile.clear(b_scores)
                    for i in tile.unroll(PART):
                        for c in tile.unroll(2):
                            x_k[i, c] = 0.0
                # a value of each load of k and q, and of b: only blocks read them so late
                hold[0] = tile.cast(s_kq[0, 0], "float32")
                hold[0] = tile.cast(s_kq[BT, 0], "float32")
                hold[0] = tile.cast(s_kq[0, 64], "float32")
                hold[0] = tile.cast(s_kq[BT, 64], "float32")
                hold[0] = tile.cast(s_b[0, 0], "float32")

                for _ in tile.serial(1 - n_strong):
                    for i, j in tile.Parallel(2 * BT, BT):
                        if i < BT:
                            s_T[j, i] = b_scores[i, j]
                        else:
                            s_Aqk[i - BT, j] = tile.if_then_else(i - BT > j, b_scores[i, j], 0.0)
                tile.sync_threads()

                if i_thread >= THREADS - BT:
                    i_own = i_thread - (THREADS - BT)
                    s_Aqk[i_own, i_own] = s_self[i_own] * s_rstd[i_own] * s_rstd[BT + i_own]
                for _ in tile.serial(1 - n_strong):
                    for i in tile.unroll(PART):
                        for c in tile.vectorized(2):
                            s_keys[i_token + i, i_channel + c] = x_k[i, c] * tile.exp2(x_C[c] - x_G[i, c])
                    for i, j in tile.Parallel(BT, K):
                        Qg[i_c, i_h, i, j] = s_rows[BT + i, j] * tile.cast(2.0**-SHIFT, IO)

                # a column of the inverse of either half a thread, by substitution; T lies transposed,
                # so that what one step takes of it is read at once. A11 goes where T is not looked at,
                # A22, transposed too, where the totals of the decay were
                if i_thread < BT:
                    i_half = i_thread // HALF * HALF
                    for i in tile.unroll(HALF):
                        x_A[i] = tile.if_then_else(i_half + i == i_thread, 1.0, 0.0)
                    for m in tile.unroll(HALF - 1):
                        for i in tile.unroll(m + 1, HALF):
                            x_A[i] -= s_T[i_half + m, i_half + i] * x_A[m]
                    if i_thread < HALF:
                        for i in tile.unroll(HALF):
                            s_T[HALF + i, i_thread] = x_A[i]
                    else:
                        for i in tile.unroll(HALF // 4):
                            for c in tile.vectorized(4):
                                s_total[(i_thread - HALF) * HALF // K, (i_thread - HALF) * HALF % K + i * 4 + c] = x_A[i * 4 + c]
                tile.sync_threads()
                # A21 = -A22 (T21 A11); of each quarter of A two columns of a row a thread
                i_i, i_j = i_thread * 2 // HALF, i_thread * 2 % HALF
                for c in tile.vectorized(2):
                    s_A[i_i, i_j + c] = s_T[HALF + i_i, i_j + c]
                for c in tile.vectorized(2):
                    s_A[i_i, HALF + i_j + c] = 0.0
                for c in tile.unroll(2):
                    x_A21[c] = s_total[(i_j + c) * HALF // K, (i_j + c) * HALF % K + i_i]
                for c in tile.vectorized(2):
                    s_A[HALF + i_i, HALF + i_j + c] = x_A21[c]
                for c in tile.vectorized(2):
                    x_A21[c] = 0.0
                for m in tile.unroll(HALF):
                    for c in tile.vectorized(2):
                        x_A21[c] += s_T[m, HALF + i_i] * s_T[HALF + m, i_j + c]
                # where T11 was
                for c in tile.vectorized(2):
                    s_T[i_i, i_j + c] = x_A21[c]
                tile.sync_threads()
                for c in tile.vectorized(2):
                    x_A21[c] = 0.0
                for m in tile.unroll(HALF):
                    for c in tile.vectorized(2):
                        x_A21[c] -= s_total[m * HALF // K, m * HALF % K + i_i] * s_T[m, i_j + c]
                for c in tile.vectorized(2):
                    s_A[HALF + i_i, i_j + c] = x_A21[c]
                tile.sync_threads()
                tile.clear(b_Y)
                tile.gemm(s_A, s_rows[0:BT, :], b_Y)
                for i, j in tile.Parallel(BT, K):
                    b_Y[i, j] *= -(2.0**-SHIFT)
                tile.sync_threads()
                tile.copy(b_Y, s_rows[0:BT, :])
                tile.sync_threads()
                tile.copy(s_rows[0:BT, :], Y[i_c, i_h, :, :], disable_tma=True)
                for _ in tile.serial(1 - n_strong):
                    tile.tma_copy(s_keys, Ktail[i_c, i_h, :, :])
                # the threads store these sooner than one that waits for TMA would
                tile.copy(s_Aqk, Aqk[i_c, i_h, :, :], disable_tma=True)
                tile.copy(s_A, A[i_c, i_h, :, :], disable_tma=True)
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
    q, k, g, b, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, *, scale, lower_bound, n_chunks,
    T, H, HV, HG
):
    """Launch one program per CHUNKS chunks and value head on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, b, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, scale, lower_bound
    )
