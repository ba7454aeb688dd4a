"""The gradients of queries, keys and gates, decay anchored at the chunk's start: dq, dk, dg and db.

Through the state first,

    dQg = dO S^T       dE = -dX S^T       dKtail = R dS^T       dgamma_C = rows of S dS
    dT = -strict lower triangle of dX R^T         dAqk = lower triangle of dO R^T

then through the scores, where every pair (i, j) met at the chunk's start:

    dq_i += scale exp(G_i) sum_j dAqk_ij k_j exp(-G_j)
    de_i +=       exp(G_i) sum_j dT_ij   k_j exp(-G_j)                   e = b k
    dk_j +=       exp(-G_j) sum_i (dT_ij e_i + scale dAqk_ij q_i) exp(G_i)

and dg is the reverse cumulative sum of dG = q dq + e de - k dk within the chunk.

One program per CHUNKS chunks, value head and slice of K. Tiles of channels are held transposed,
[BK, BT]: a channel is a row, so that each result is the next product's left operand and stays in
registers; G is summed there, by a product with ones. The compiler gives the loads to a warp group of
its own, and every tile a barrier of its own. Exact where every channel of the slice keeps at least
2^-96 over the chunk; what does not is left to strong_decay_kernel, in Triton.

    q        [B, T, H, K]      bf16  queries; normalised in the kernel
    k        [B, T, H, K]      bf16  keys; normalised in the kernel
    g        [B, T, HG, K]     fp32  log decay
    b        [B, T, HG, K]     bf16  erase gate
    q_rstd   [NT, HV, BT]      fp32  1 / norm of q
    k_rstd   [NT, HV, BT]      fp32  1 / norm of k
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk
    h        [NT, HV, V, K]    bf16  state at the block's start, transposed
    R        [NT, HV, BT, V]   bf16  what each token adds to the state
    dh       [NT, HV, V, K]    bf16  gradient of the state at the block's end, transposed
    dX       [NT, HV, BT, V]   bf16  gradient of X = w v - E S, where R = A X
    do       [B, T, HV, V]     bf16  gradient of o
    o        [B, T, HV, V]     bf16  output
    z_dot    [NT, HV, BT, NZ]  fp32  <dX, w v>, by 16 values
    dq       [B, T, HV, K]     bf16  gradient of q, per value head
    dk       [B, T, HV, K]     bf16  gradient of k, per value head
    dg       [B, T, HV, K]     fp32  gradient of g, per value head
    db       [B, T, HV, K]     bf16  gradient of b, per value head

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BK=64 BT=32 chunks=4 decay=anchored language=tilelang maxnreg=128 num_stages=1 num_warps=4
Template digest 4200b1ce65c91925; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage grad_blocks1 --config \
      BK=64,BT=32,chunks=4,decay=anchored,language=tilelang,maxnreg=128,num_stages=1,num_warps=4
"""

from functools import cache

import triton
import triton.language as tl


K, V = 128, 128
BT, BK, CHUNKS = 32, 64, 4
IO, GATE = "bfloat16", "float32"
LOOKED_AT = 4  # chunks a program of strong_decay_kernel
STRONG_WARPS = 4
LEAST = 2.0**-96
LEAST_GAMMA = tl.constexpr(LEAST)
LOG2E = tl.constexpr(1.4426950408889634)
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
SMALLEST_LOG2 = tl.constexpr(-150.0)

# exp2 and division by the hardware, flushing what is below 2^-126 to zero; threads meet where the
# program says, and nowhere else
PASSES = {"tl.enable_fast_math": True, "tl.disable_thread_storage_sync": True}
MEETING = 3  # the barrier of the threads that compute


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, HG, NT, HV, NZ = (
        tile.dynamic(name) for name in ("B", "T", "H", "HG", "NT", "HV", "NZ")
    )
    from tilelang.layout import make_swizzled_layout

    # a warp keeps whole channels, so that one product's result is the next one's operand
    ROWS, COLUMNS = tile.GemmWarpPolicy.FullRow, tile.GemmWarpPolicy.FullCol
    log2e, smallest_log2 = LOG2E.value, SMALLEST_LOG2.value

    @tile.prim_func
    def grad_blocks1(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG, K], "float32"),
        b: tile.Tensor([B, T, HG, K], "bfloat16"),
        q_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_rstd: tile.Tensor([NT, HV, BT], "float32"),
        gamma_C: tile.Tensor([NT, HV, K], "float32"),
        h: tile.Tensor([NT, HV, V, K], "bfloat16"),
        R: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        dh: tile.Tensor([NT, HV, V, K], "bfloat16"),
        dX: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        o: tile.Tensor([B, T, HV, V], "bfloat16"),
        z_dot: tile.Tensor([NT, HV, BT, NZ], "float32"),
        dq: tile.Tensor([B, T, HV, K], "bfloat16"),
        dk: tile.Tensor([B, T, HV, K], "bfloat16"),
        dg: tile.Tensor([B, T, HV, K], "float32"),
        db: tile.Tensor([B, T, HV, K], "bfloat16"),
        scale: tile.float32,
        lower_bound: tile.float32,
    ):
        with tile.Kernel(
            tile.ceildiv(tile.ceildiv(T, BT), CHUNKS) * (K // BK), HV, B, threads=128
        ) as (i_x, i_h, i_b):
            n_chunks = tile.ceildiv(T, BT)
            # 2 programs to a multiprocessor: 128 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(2)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(232)
            i_k = i_x % (K // BK)
            i_first = i_x // (K // BK) * CHUNKS
            i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
            o_k = i_k * BK

            s_h = tile.alloc_shared([V, BK], IO)
            s_dh = tile.alloc_shared([V, BK], IO)
            # one above the other, so that one product is of both
            s_dO_dX = tile.alloc_shared([2 * BT, V], IO)
            s_R = tile.alloc_shared([BT, V], IO)
            # dAqk above -dT
            s_scores = tile.alloc_shared([2 * BT, BT], IO)
            s_q = tile.alloc_shared([BT, BK], IO)
            s_k = tile.alloc_shared([BT, BK], IO)
            s_b = tile.alloc_shared([BT, BK], IO)
            s_G = tile.alloc_shared([BT, BK], GATE)
            s_gamma = tile.alloc_shared([BK], "float32")
            s_diagonal = tile.alloc_shared([BT], "float32")
            s_o = tile.alloc_shared([BT, V], IO)
            s_q_rstd = tile.alloc_shared([BT], "float32")
            s_k_rstd = tile.alloc_shared([BT], "float32")
            s_q_dot = tile.alloc_shared([BT], "float32")
            s_k_dot = tile.alloc_shared([BT], "float32")
            s_z_dot = tile.alloc_shared([BT], "float32")
            s_later = tile.alloc_shared([BT, BT], IO)
            # results side by side: dq, dk, db
            s_results = tile.alloc_shared([BT, 3 * BK], IO)
            s_dg = tile.alloc_shared([BT, BK], GATE)

            # dq and -de, side by side; dk
            b_outer = tile.alloc_fragment([BK, 2 * BT], "float32")
            b_inner = tile.alloc_fragment([BK, BT], "float32")
            b_scores = tile.alloc_fragment([2 * BT, BT], "float32")
            b_rounded = tile.alloc_fragment([2 * BT, BT], IO)
            b_dq = tile.alloc_fragment([BK, BT], "float32")
            b_de = tile.alloc_fragment([BK, BT], "float32")
            b_dO_O = tile.alloc_fragment([BT, V], "float32")
            b_dot = tile.alloc_fragment([BT], "float32")
            b_z = tile.alloc_fragment([BT, 8], "float32")
            b_z_dot = tile.alloc_fragment([BT], "float32")
            b_dk = tile.alloc_fragment([BK, BT], "float32")
            b_SdS = tile.alloc_fragment([BK, 64], "float32")
            b_dgamma = tile.alloc_fragment([BK], "float32")
            b_dG_C = tile.alloc_fragment([BK], "float32")
            i_lane = tile.get_lane_idx()
            b_least = tile.alloc_local([1], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")
            b_row = tile.alloc_fragment([BK, BT], "float32")
            b_column = tile.alloc_fragment([BK, BT], "float32")
            b_k = tile.alloc_fragment([BK, BT], "float32")
            b_q = tile.alloc_fragment([BK, BT], "float32")
            b_b = tile.alloc_fragment([BK, BT], "float32")
            # in turn what is left of the decay, products to be summed, and dG
            b_dG = tile.alloc_fragment([BK, BT], "float32")
            b_dg = tile.alloc_fragment([BK, BT], "float32")
            # factors of pairs, rounded as products take them: k / gamma; gamma q and -gamma e
            b_column_k = tile.alloc_fragment([BK, BT], IO)
            b_row_qe = tile.alloc_fragment([BK, 2 * BT], IO)
            # of the decay and of dG the first bits and the next
            b_head = tile.alloc_fragment([BK, BT], "float32")
            b_first = tile.alloc_fragment([BK, BT], IO)
            b_next = tile.alloc_fragment([BK, BT], IO)
            b_last = tile.alloc_fragment([BK, BT], IO)
            # tiles of tokens as they lie in shared memory, on their way there or from there
            b_k_rows = tile.alloc_fragment([BT, BK], IO)
            b_q_rows = tile.alloc_fragment([BT, BK], IO)
            b_b_rows = tile.alloc_fragment([BT, BK], IO)
            b_results = tile.alloc_fragment([BT, 3 * BK], IO)
            # a thread's part of a result, in the order in which loads and stores transpose it
            by_channels, all_by_channels = (
                tile.Fragment(
                    [BT, n * BK],
                    forward_thread_fn=lambda i, j: j % BK // 16 * 32 + j % 8 * 4 + i % 8 // 2,
                    forward_index_fn=lambda i, j: j // BK * (BT // 2) + i // 8 * 4 + j % 16 // 8 * 2 + i % 2,
                )
                for n in (1, 3)
            )
            tile.annotate_layout({
                s_k: make_swizzled_layout(s_k),
                s_q: make_swizzled_layout(s_q),
                s_b: make_swizzled_layout(s_b),
                s_G: make_swizzled_layout(s_G),
                b_k_rows: by_channels,
                b_q_rows: by_channels,
                b_b_rows: by_channels,
                b_results: all_by_channels,
            })

            for i, j in tile.Parallel(BT, BT):
                s_later[i, j] = tile.if_then_else(i >= j, tile.cast(1, IO), tile.cast(0, IO))
            tile.fence_proxy_async()
            tile.sync_threads()
            n_own = tile.min(CHUNKS, n_chunks - i_first)
            for i_n in tile.Pipelined(n_own, num_stages=1):
                i_c = i_b * n_chunks + i_first + i_n
                i_row = (i_first + i_n) * BT
                n_rows = tile.min(T - i_row, BT)

                # by 64 columns, whose rows lie one after the other
                tile.copy(do[i_b, i_row : i_row + BT, i_h, 0:64], s_dO_dX[0:BT, 0:64])
                tile.copy(dX[i_c, i_h, :, 0:64], s_dO_dX[BT : 2 * BT, 0:64])
                tile.copy(do[i_b, i_row : i_row + BT, i_h, 64:128], s_dO_dX[0:BT, 64:128])
                tile.copy(dX[i_c, i_h, :, 64:128], s_dO_dX[BT : 2 * BT, 64:128])
                tile.copy(R[i_c, i_h, :, :], s_R)
                tile.copy(h[i_c, i_h, :, o_k : o_k + BK], s_h)
                tile.copy(dh[i_c, i_h, :, o_k : o_k + BK], s_dh)
                tile.copy(o[i_b, i_row : i_row + BT, i_h, :], s_o)
                tile.copy(g[i_b, i_row : i_row + BT, i_hg, o_k : o_k + BK], s_G)
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, o_k : o_k + BK], s_k)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, o_k : o_k + BK], s_q)
                tile.copy(b[i_b, i_row : i_row + BT, i_hg, o_k : o_k + BK], s_b)
                tile.copy(gamma_C[i_c, i_h, o_k : o_k + BK], s_gamma)
                tile.copy(k_rstd[i_c, i_h, :], s_k_rstd)
                tile.copy(q_rstd[i_c, i_h, :], s_q_rstd)

                # fetched beside the products, straight into registers: shared memory is full
                for i, j in tile.Parallel(BT, 8):
                    b_z[i, j] = z_dot[i_c, i_h, i, j]
                # no product waits for another, or for what follows
                tile.wgmma_gemm(s_dO_dX, s_R, b_scores, transpose_B=True, clear_accum=True, policy=COLUMNS)
                tile.wgmma_gemm(s_h, s_dO_dX, b_outer, transpose_A=True, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_dh, s_R, b_inner, transpose_A=True, transpose_B=True, clear_accum=True, policy=ROWS)
                # rows of S dS as the diagonal of a product: cheaper than reading both tiles again.
                tile.wgmma_gemm(s_dh, s_h, b_SdS, transpose_A=True, clear_accum=True, policy=ROWS)

                tile.wait_wgmma(3)

                for i, j in tile.Parallel(2 * BT, BT):
                    b_rounded[i, j] = tile.if_then_else(i % BT > j, b_scores[i, j], 0.0)
                    if i == j:
                        s_diagonal[j] = b_scores[i, j]
                    if i == j + BT:
                        s_k_dot[j] = 2.0 * b_scores[i, j]
                tile.copy(b_rounded, s_scores)
                for i, j in tile.Parallel(BT, V):
                    b_dO_O[i, j] = tile.cast(s_dO_dX[i, j], "float32") * tile.cast(s_o[i, j], "float32")
                tile.reduce_sum(b_dO_O, b_dot, dim=1)
                for i in tile.Parallel(BT):
                    s_q_dot[i] = b_dot[i] / (scale * scale)
                # <k, dk> = <dX, 2 R - w v>
                tile.reduce_sum(b_z, b_z_dot, dim=1)
                for i in tile.Parallel(BT):
                    s_z_dot[i] = b_z_dot[i]

                # what was stored, for the products and all threads
                tile.fence_proxy_async()
                tile.sync_threads(MEETING, 128)
                # as a product with ones, of the first 8 bits, the next 8 and the last: all that fp32
                # has. Cut off and not rounded, which takes half the instructions
                for i, j in tile.Parallel(BK, BT):
                    b_dG[i, j] = tile.cast(s_G[j, i], "float32") * log2e
                    # not by a maximum, which would drop a NaN
                    b_dG[i, j] = tile.if_then_else(
                        b_dG[i, j] < smallest_log2, smallest_log2, b_dG[i, j]
                    )
                for i, j in tile.Parallel(BK, BT):
                    b_head[i, j] = tile.reinterpret(tile.reinterpret(b_dG[i, j], "uint32") & tile.uint32(0xFFFF0000), "float32")
                    b_first[i, j] = b_head[i, j]
                    b_dG[i, j] -= b_head[i, j]
                for i, j in tile.Parallel(BK, BT):
                    b_head[i, j] = tile.reinterpret(tile.reinterpret(b_dG[i, j], "uint32") & tile.uint32(0xFFFF0000), "float32")
                    b_next[i, j] = b_head[i, j]
                    b_last[i, j] = b_dG[i, j] - b_head[i, j]
                tile.wgmma_gemm(b_last, s_later, b_dg, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_next, s_later, b_dg, transpose_B=True, policy=ROWS)
                tile.wgmma_gemm(b_first, s_later, b_dg, transpose_B=True, policy=ROWS)
                hold[0] = tile.cast(s_G[0, 0], "float32")

                tile.wait_wgmma(3)
                hold[0] = tile.cast(s_dO_dX[0, 0], "float32")
                hold[0] = tile.cast(s_R[0, 0], "float32")
                hold[0] = tile.cast(s_h[0, 0], "float32")
                hold[0] = tile.cast(s_dh[0, 0], "float32")
                hold[0] = tile.cast(s_o[0, 0], "float32")

                for i, j in tile.Parallel(BK, 64):
                    b_SdS[i, j] = tile.if_then_else(i % 64 == j, b_SdS[i, j], 0.0)
                tile.reduce_sum(b_SdS, b_dgamma, dim=1)

                tile.copy(s_k, b_k_rows)
                tile.copy(s_q, b_q_rows)
                tile.copy(s_b, b_b_rows)
                for i, j in tile.Parallel(BK, BT):
                    b_k[i, j] = tile.cast(b_k_rows[j, i], "float32") * s_k_rstd[j]
                    b_q[i, j] = tile.cast(b_q_rows[j, i], "float32") * (s_q_rstd[j] * scale)
                    b_b[i, j] = tile.cast(b_b_rows[j, i], "float32")
                tile.wait_wgmma(0)

                for i, j in tile.Parallel(BK, BT):
                    b_row[i, j] = tile.exp2(b_dg[i, j])
                    b_column[i, j] = 1.0 / b_row[i, j]
                for i, j in tile.Parallel(BK, BT):
                    b_column_k[i, j] = b_k[i, j] * b_column[i, j]
                    b_row_qe[i, j] = b_q[i, j] * b_row[i, j]
                for i, j in tile.Parallel(BK, BT):
                    b_row_qe[i, j + BT] = -(b_k[i, j] * b_b[i, j] * b_row[i, j])
                # The chunk's last token reaches the end undecayed: it would add to dG_C what it takes
                # from its own dG. Left out of both, as in strong_decay_kernel.
                for i, j in tile.Parallel(BK, BT):
                    b_dk[i, j] = b_inner[i, j] * s_gamma[i]
                    b_dG[i, j] = tile.if_then_else(
                        j < n_rows - 1, b_dk[i, j] * tile.cast(b_column_k[i, j], "float32"), 0.0
                    )
                tile.reduce_sum(b_dG, b_dG_C, dim=1)
                for i in tile.Parallel(BK):
                    b_dG_C[i] += s_gamma[i] * b_dgamma[i]
                # by every warp for itself: none waits for another
                # a minimum passes over NaN, and is NaN of nothing else, which strong_decay_kernel takes
                # for kept, too: 1, so that it comes out here
                b_least[0] = tile.min(tile.warp_reduce_min(tile.min(s_gamma[i_lane], s_gamma[i_lane + 32])), 1.0)

                # through the scores
                tile.wgmma_gemm(b_column_k, s_scores, b_outer, transpose_B=True, policy=ROWS)
                tile.wgmma_gemm(b_row_qe, s_scores, b_dk, policy=ROWS)
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_q[0, 0], "float32")
                hold[0] = tile.cast(s_b[0, 0], "float32")

                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_gamma[0], "float32")

                # A pair adds to dG_i what it takes from dG_j, and under strong decay little else
                # remains: both ends take the factors as the products did, rounded, so that it cancels.
                for i, j in tile.Parallel(BK, BT):
                    b_dG[i, j] = tile.cast(b_row_qe[i, j], "float32") * b_outer[i, j]
                for i, j in tile.Parallel(BK, BT):
                    b_dG[i, j] += tile.cast(b_row_qe[i, j + BT], "float32") * b_outer[i, j + BT]
                    b_dG[i, j] -= tile.if_then_else(
                        j < n_rows - 1, tile.cast(b_column_k[i, j], "float32") * b_dk[i, j], 0.0
                    )
                for i, j in tile.Parallel(BK, BT):
                    b_first[i, j] = b_dG[i, j]
                for i, j in tile.Parallel(BK, BT):
                    b_next[i, j] = b_dG[i, j] - tile.cast(b_first[i, j], "float32")
                # the sum over each token and all later ones as a product with ones, of the first 8
                # bits and of the next 8
                tile.wgmma_gemm(b_next, s_later, b_dg, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_first, s_later, b_dg, policy=ROWS)
                # b_q holds scale q, and b_dq the gradient of q over scale
                for i, j in tile.Parallel(BK, BT):
                    b_de[i, j] = -(b_outer[i, j + BT] * b_row[i, j])
                for i, j in tile.Parallel(BK, BT):
                    b_dq[i, j] = b_outer[i, j] * b_row[i, j]
                    b_dk[i, j] *= b_column[i, j]
                    b_dq[i, j] += s_diagonal[j] * b_k[i, j]
                    b_dk[i, j] += s_diagonal[j] * b_q[i, j]
                    b_dk[i, j] += b_de[i, j] * tile.cast(b_b_rows[j, i], "float32")
                    b_dq[i, j] = (b_dq[i, j] - b_q[i, j] * s_q_dot[j]) * (s_q_rstd[j] * scale)
                    b_dk[i, j] = (b_dk[i, j] - b_k[i, j] * (s_k_dot[j] - s_z_dot[j])) * s_k_rstd[j]
                for i, j in tile.Parallel(BK, BT):
                    b_results[j, i + 2 * BK] = tile.cast(b_de[i, j] * b_k[i, j], IO)
                for i, j in tile.Parallel(BK, BT):
                    b_results[j, i] = tile.cast(b_dq[i, j], IO)
                for i, j in tile.Parallel(BK, BT):
                    b_results[j, i + BK] = tile.cast(b_dk[i, j], IO)
                # what the last chunk stores from these tiles is on its way meanwhile
                tile.tma_store_wait(0)
                tile.sync_threads(MEETING, 128)
                tile.copy(b_results, s_results)
                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_q_rstd[0], "float32")
                hold[0] = tile.cast(s_k_rstd[0], "float32")

                for i, j in tile.Parallel(BK, BT):
                    s_dg[j, i] = b_dg[i, j] + b_dG_C[i]
                tile.fence_proxy_async()
                tile.sync_threads(MEETING, 128)

                if b_least[0] >= LEAST:
                    tile.tma_copy(s_results[:, 0 * BK : 1 * BK], dq[i_b, i_row : i_row + BT, i_h, o_k : o_k + BK])
                    tile.tma_copy(s_results[:, 1 * BK : 2 * BK], dk[i_b, i_row : i_row + BT, i_h, o_k : o_k + BK])
                    tile.tma_copy(s_results[:, 2 * BK : 3 * BK], db[i_b, i_row : i_row + BT, i_h, o_k : o_k + BK])
                    tile.tma_copy(s_dg, dg[i_b, i_row : i_row + BT, i_h, o_k : o_k + BK])

            tile.tma_store_wait(0)

    return grad_blocks1


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
# room for gradients and sums.
RANGE = tl.constexpr(96.0)


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


@triton.jit
def sum_of_earlier(b_x, BT: tl.constexpr):
    """Sum over each token and all earlier ones."""
    # a product with ones, of the first 8 bits, the next 8 and the last: all that fp32 has
    o_t = tl.arange(0, BT)
    b_ones = tl.where(o_t[:, None] >= o_t[None, :], 1.0, 0.0).to(tl.bfloat16)
    b_first = b_x.to(tl.bfloat16)
    b_x -= b_first.to(tl.float32)
    b_next = b_x.to(tl.bfloat16)
    b_last = (b_x - b_next.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(b_ones, b_first, tl.dot(b_ones, b_next, tl.dot(b_ones, b_last)))


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG", "NT"])
def strong_decay_kernel(
    q,
    k,
    g,
    b,
    q_rstd,
    k_rstd,
    gamma_C,
    h,
    R,
    dh,
    dX,
    do,
    o,
    z_dot,
    dq,
    dk,
    dg,
    db,
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
    b_least = tl.min(b_all)
    n_left = tl.where(b_least < LEAST_GAMMA, tl.minimum(LOOKED_AT, NT - i_first), 0)
    for i_look in range(n_left):
        i_own = i_first + i_look
        i_c = i_own
        n_chunks = tl.cdiv(T, BT)
        i_t = (i_c % n_chunks) * BT
        i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
        n_rows = tl.minimum(T - i_t, BT)
        m_t = o_t < n_rows
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        i_tile = i_c.to(tl.int64) * HV + i_h
        p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
        p_g = (i_start * HG + i_hg) * K + o_t[:, None] * (HG * K) + o_k[None, :]
        p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
        p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
        p_token = i_tile * BT + o_t
        b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
        if tl.where(tl.min(b_gamma_C) < LEAST_GAMMA, n_rows, 0) > 0:
            o_v = tl.arange(0, V)
            p_kept = (i_own.to(tl.int64) * HV + i_h) * K * V + o_v[:, None] * K + o_k[None, :]
            b_Sd = tl.load(h + p_kept)
            b_dSd = tl.load(dh + p_kept)

            i_c = i_own
            n_chunks = tl.cdiv(T, BT)
            i_t = (i_c % n_chunks) * BT
            i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
            n_rows = tl.minimum(T - i_t, BT)
            m_t = o_t < n_rows
            m_tk = m_t[:, None] & (o_k < K)[None, :]
            i_tile = i_c.to(tl.int64) * HV + i_h
            p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
            p_g = (i_start * HG + i_hg) * K + o_t[:, None] * (HG * K) + o_k[None, :]
            p_out = (i_start * HV + i_h) * K + o_t[:, None] * (HV * K) + o_k[None, :]
            p_score = i_tile * BT * BT + o_t[:, None] * BT + o_t[None, :]
            p_token = i_tile * BT + o_t
            p_tile = i_tile * BT * V + o_t[:, None] * V + o_v[None, :]
            p_o = (i_start * HV + i_h) * V + o_t[:, None] * (HV * V) + o_v[None, :]
            b_do = tl.load(do + p_o, mask=m_t[:, None], other=0.0)
            b_dX = tl.load(dX + p_tile)
            b_R = tl.load(R + p_tile)
            # rows of S dS as the diagonal of a product: elementwise they take 16% more instructions in all
            b_SdS = tl.dot(tl.trans(b_dSd), b_Sd)
            b_dq = tl.dot(b_do, b_Sd)
            b_de = tl.dot(b_dX, b_Sd)
            b_dk = tl.dot(b_R, b_dSd)
            b_dAqk = tl.dot(b_do, tl.trans(b_R))
            b_dT = tl.dot(b_dX, tl.trans(b_R))
            b_o = tl.load(o + p_o, mask=m_t[:, None], other=0.0).to(tl.float32)
            b_q_dot = tl.sum(b_do.to(tl.float32) * b_o, 1)
            b_dgamma_C = tl.sum(tl.where(o_k[:, None] == o_k[None, :], b_SdS, 0.0), 1)
            o_i, o_j = o_t[:, None], o_t[None, :]
            b_diagonal = tl.sum(tl.where(o_i == o_j, b_dAqk, 0.0), 1)[:, None]
            b_RdX = tl.sum(tl.where(o_i == o_j, b_dT, 0.0), 1)
            # <k, dk> = <dX, 2 R - w v>
            o_z = tl.arange(0, 8)
            b_z = tl.load(z_dot + p_token[:, None] * 8 + o_z[None, :])
            b_k_dot = 2.0 * b_RdX - tl.sum(b_z, 1)
            b_dAqk = tl.where(o_i > o_j, b_dAqk, 0.0).to(tl.bfloat16)
            b_dT = tl.where(o_i > o_j, -b_dT, 0.0).to(tl.bfloat16)

            b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_b = tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)
            b_k_rstd = tl.load(k_rstd + p_token)
            b_q_rstd = tl.load(q_rstd + p_token)
            b_k *= b_k_rstd[:, None]
            b_q *= (b_q_rstd * scale)[:, None]
            b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
            b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
            b_G = sum_of_earlier(b_decay, BT)

            b_gamma_C = tl.load(gamma_C + i_tile * K + o_k)
            b_G_C = tl.min(b_G, 0)
            b_gamma = tl.exp2(b_G)
            b_dq *= b_gamma
            b_de *= -b_gamma
            b_dk *= tl.exp2(b_G_C[None, :] - b_G)
            # The chunk's last token reaches the end undecayed: it would add to dG_C what it takes
            # from its own dG. Left out of both, since under strong decay that cancellation is all
            # that remains.
            m_inner = (o_t < n_rows - 1)[:, None]
            b_dG_C = tl.sum(tl.where(m_inner, b_dk * b_k, 0.0), 0) + b_gamma_C * b_dgamma_C
            b_dG = b_q * b_dq + b_k * b_b * b_de - tl.where(m_inner, b_k * b_dk, 0.0)
            b_anchor = tl.full([BK], 2.0 * RANGE, tl.float32)
            while tl.max(b_anchor - b_G_C) > RANGE:
                b_anchor, b_row, b_column = next_frame(b_G, b_anchor)
                b_kc = (b_k * b_column).to(tl.bfloat16)
                b_qr = (b_q * b_row).to(tl.bfloat16)
                b_er = (b_k * b_b * b_row).to(tl.bfloat16)
                b_pairs = tl.dot(b_dAqk, b_kc)
                b_dq += b_row * b_pairs
                # the same rounded factors at both ends of a pair, so that it cancels out of dG
                b_dG += b_qr * b_pairs
                b_pairs = tl.dot(b_dT, b_kc)
                b_de += b_row * b_pairs
                b_dG += b_er * b_pairs
                b_pairs = tl.dot(tl.trans(b_dAqk), b_qr)
                b_pairs = tl.dot(tl.trans(b_dT), b_er, b_pairs)
                b_dk += b_column * b_pairs
                b_dG -= b_kc * b_pairs
            # b_q holds scale q, and b_dq the gradient of q over scale
            tl.store(db + p_out, (b_de * b_k).to(tl.bfloat16), mask=m_tk)
            b_dq += b_diagonal * b_k
            b_dk += b_diagonal * b_q + b_de * b_b
            b_dq = b_dq * (scale * b_q_rstd)[:, None] - b_q * (b_q_dot * b_q_rstd / scale)[:, None]
            b_dk = (b_dk - b_k * b_k_dot[:, None]) * b_k_rstd[:, None]
            tl.store(dq + p_out, b_dq.to(tl.bfloat16), mask=m_tk)
            tl.store(dk + p_out, b_dk.to(tl.bfloat16), mask=m_tk)
            b_dg = sum_of_later(b_dG, BT) + b_dG_C[None, :]
            tl.store(dg + p_out, b_dg.to(tl.float32), mask=m_tk)


def launch(
    q, k, g, b, q_rstd, k_rstd, gamma_C, h, R, dh, dX, do, o, z_dot, dq, dk, dg, db, *,
    n_chunks, scale, lower_bound, T, H, HV, HG, n_sequences
):
    """Launch all kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, b, q_rstd, k_rstd, gamma_C, h, R, dh, dX, do, o, z_dot, dq, dk, dg, db, scale,
        lower_bound
    )
    strong_decay_kernel[(-(-n_chunks // LOOKED_AT) * HV * (K // BK),)](
        q, k, g, b, q_rstd, k_rstd, gamma_C, h, R, dh, dX, do, o, z_dot, dq, dk, dg, db, scale,
        lower_bound, T, H, HV, HG,
        NT=n_chunks, K=K, V=V, BT=BT, BK=BK, LOOKED_AT=LOOKED_AT,
        num_warps=STRONG_WARPS, num_stages=1,
    )
