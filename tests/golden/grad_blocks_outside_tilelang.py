"""The gradients of queries, keys, gates and beta, the decay outside of the products.

Of every 2 chunks, a block, the scans kept the state before the first, S, and its gradient after
the last, dS. Tokens of all its chunks meet as those of one do, so that no state between is made:

    dq_i = scale head_i dO_i S^T + scale sum_j dAqk_ij c_j         dAqk_ij = D_ij <dO_i, R_j>, i >= j
    de_i =        -head_i dX_i S^T +       sum_j dT_ij c_j           dT_ij = -D_ij <dX_i, R_j>, i > j
    dc_j =         tail_j R_j dS^T +       sum_i (dT_ij k_i + scale dAqk_ij q_i)
    dg_t = sum over j < t <= i of dT_ij <k_i, c_j> + scale dAqk_ij <q_i, c_j>
           + sum over i >= t of what i takes from S, over j < t of what j writes to dS
           + gamma <S, dS>

where D_ij is what the state keeps from token j to token i, head_i from the block's start to i, tail_j
from j to its end and gamma over all of it. No term of dg is taken from another, so that it is exact
however strong the decay is. fold_decay_kernel takes it from tiles to the caller's tensor.
e = k is the key that erases and c = beta k the one that is written, so that dk = de + beta dc; dX is
dv. fold_beta_kernel makes dbeta: the mean of three times <R, dX> / beta and <k, dc>.

One program per CHUNKS chunks and value head, a block after the other. A token is a row of every product, so
that what belongs to it alone, its norms, beta and decay, is a number a row. The compiler gives the loads to
a warp group of its own, and every tile a barrier of its own. What folds is in Triton.

    q           [B, T, H, K]      bf16  queries; normalised in the kernel
    k           [B, T, H, K]      bf16  keys; normalised in the kernel
    g           [B, T, HG]        fp32  log decay
    q_rstd      [NT, HV, BT]      fp32  1 / norm of q
    k_rstd      [NT, HV, BT]      fp32  1 / norm of k
    k_beta      [NT, HV, BT]      fp32  beta, after its activation
    log_decay   [NT, HV, BT]      fp32  decay of each token, log2
    h           [NT2, HV, V, K]   bf16  state at the block's start, transposed
    R           [NT, HV, BT, V]   bf16  u: a token adds (beta k) u^T to the state
    dh          [NT2, HV, V, K]   bf16  gradient of the state at the block's end, transposed
    dv          [B, T, HV, V]     bf16  gradient of v
    do          [B, T, HV, V]     bf16  gradient of o
    beta_dot    [NT, HV, BT]      fp32  <R, dX>, which is k_beta times its gradient
    dq          [B, T, HV, K]     bf16  gradient of q, per value head
    dk          [B, T, HV, K]     bf16  gradient of k, per value head
    dg_part     [NT, HV, NK, BT]  fp32  gradient of the log decay: sums over a slice of channels
    dg          [B, T, HV]        fp32  gradient of g, per value head
    dbeta_part  [NT, HV, NK, BT]  fp32  gradient of k_beta: sums over a slice of channels
    dbeta       [B, T, HV]        bf16  gradient of beta

Problem: gated_delta_rule K=128 V=128 bf16, g fp32, l2norm
Config:  BK=128 BT=32 chunks=4 decay=outside language=tilelang maxnreg=168 num_stages=1 num_warps=4
Template digest f6137e721ea86faf; made by
    gdn2gen generate --op gated_delta_rule --head-dim 128,128 --dtype bf16 --gate-dtype fp32 \
      --gate none --with= --stage grad_blocks2 --config \
      BK=128,BT=32,chunks=4,decay=outside,language=tilelang,maxnreg=168,num_stages=1,num_warps=4
"""

from functools import cache

import triton
import triton.language as tl


K, V = 128, 128
BT, BK, CHUNKS = 32, 128, 4
TOKENS = 2 * BT  # of a block
IO = "bfloat16"
BH = 16  # heads of a program of fold_beta_kernel
# Of a smaller beta, what is left of dX, which has it as a factor, may be 0.
LEAST_BETA = tl.constexpr(2.0**-60)
# exp2 by the hardware, flushing what is below 2^-126 to zero; threads meet where the program says, and
# nowhere else
PASSES = {"tl.enable_fast_math": True, "tl.disable_thread_storage_sync": True}
MEETING = 3  # the barrier of the threads that compute


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, HG, NT, HV, NT2 = (
        tile.dynamic(name) for name in ("B", "T", "H", "HG", "NT", "HV", "NT2")
    )
    # of scores a warp has whole rows; of gradients a warp group has 64 channels
    ROWS, COLUMNS = tile.GemmWarpPolicy.FullRow, tile.GemmWarpPolicy.FullCol

    @tile.prim_func
    def grad_blocks2(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG], "float32"),
        q_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_beta: tile.Tensor([NT, HV, BT], "float32"),
        log_decay: tile.Tensor([NT, HV, BT], "float32"),
        h: tile.Tensor([NT2, HV, V, K], "bfloat16"),
        R: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        dh: tile.Tensor([NT2, HV, V, K], "bfloat16"),
        dv: tile.Tensor([B, T, HV, V], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        beta_dot: tile.Tensor([NT, HV, BT], "float32"),
        dq: tile.Tensor([B, T, HV, K], "bfloat16"),
        dk: tile.Tensor([B, T, HV, K], "bfloat16"),
        dg_part: tile.Tensor([NT, HV, K // BK, BT], "float32"),
        dg: tile.Tensor([B, T, HV], "float32"),
        dbeta_part: tile.Tensor([NT, HV, K // BK, BT], "float32"),
        dbeta: tile.Tensor([B, T, HV], "bfloat16"),
        scale: tile.float32,
        lower_bound: tile.float32,
    ):
        with tile.Kernel(
            tile.ceildiv(tile.ceildiv(T, BT), CHUNKS), HV, B, threads=256
        ) as (i_x, i_h, i_b):
            n_chunks = tile.ceildiv(T, BT)
            # one program to a multiprocessor: 168 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(1)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(240)
            i_hq = i_h // (HV // H)

            s_dO_dX = tile.alloc_shared([2 * TOKENS, V], IO)
            s_R = tile.alloc_shared([TOKENS, V], IO)
            s_qk = tile.alloc_shared([2 * TOKENS, BK], IO)
            s_h = tile.alloc_shared([V, BK], IO)
            s_dh = tile.alloc_shared([V, BK], IO)
            # gradients of scores, with factors of columns and with factors of rows
            s_columns = tile.alloc_shared([2 * TOKENS, TOKENS], IO)
            s_rows = tile.alloc_shared([2 * TOKENS, TOKENS], IO)
            s_log_decay = tile.alloc_shared([TOKENS], "float32")
            s_k_beta = tile.alloc_shared([TOKENS], "float32")
            s_q_rstd = tile.alloc_shared([TOKENS], "float32")
            s_k_rstd = tile.alloc_shared([TOKENS], "float32")
            # factors that make of k the key that is written, and of q and k what reads; that of keys is
            # negative, as what erases is
            s_writes = tile.alloc_shared([TOKENS], "float32")
            s_reads = tile.alloc_shared([2 * TOKENS], "float32")
            s_sums = tile.alloc_shared([3, 2, TOKENS], "float32")
            # decay since the block's start; its exponential, and that of the decay to the block's end
            s_G = tile.alloc_shared([TOKENS], "float32")
            s_head = tile.alloc_shared([TOKENS], "float32")
            s_tail = tile.alloc_shared([TOKENS], "float32")
            s_before = tile.alloc_shared([TOKENS, TOKENS], IO)
            # of a row what counts for all tokens up to its own, and for those after it
            s_carried = tile.alloc_shared([2, 2, 2 * TOKENS], "float32")
            s_spanned = tile.alloc_shared([2 * TOKENS // 16, TOKENS], "float32")
            s_SdS = tile.alloc_shared([16], "float32")
            s_dq = tile.alloc_shared([TOKENS, BK], IO)
            # until there is dk, k: a warp group would not find its columns among some rows of s_qk
            s_dk = tile.alloc_shared([TOKENS, BK], IO)

            b_scores = tile.alloc_fragment([2 * TOKENS, TOKENS], "float32")
            b_RdX = tile.alloc_fragment([2 * TOKENS], "float32")
            b_diagonal = tile.alloc_fragment([2 * TOKENS, TOKENS], "float32")
            b_columns = tile.alloc_fragment([2 * TOKENS, TOKENS], IO)
            b_rows = tile.alloc_fragment([2 * TOKENS, TOKENS], IO)
            # of queries and keys as they are; then of dg what pairs are, and its first bits and the next
            b_pairs = tile.alloc_fragment([2 * TOKENS, TOKENS], "float32")
            b_first = tile.alloc_fragment([2 * TOKENS, TOKENS], IO)
            b_next = tile.alloc_fragment([2 * TOKENS, TOKENS], IO)
            b_spans = tile.alloc_fragment([2 * TOKENS, TOKENS], "float32")
            b_by_warps = tile.alloc_fragment([2 * TOKENS // 16, 16, TOKENS], "float32")
            b_spanned = tile.alloc_fragment([2 * TOKENS // 16, TOKENS], "float32")
            b_later = tile.alloc_fragment([2 * TOKENS, TOKENS], "float32")
            x_sums = tile.alloc_local([3], "float32")
            b_kept = tile.alloc_fragment([16, BK], "float32")
            b_SdS = tile.alloc_fragment([16], "float32")
            b_dq = tile.alloc_fragment([TOKENS, BK], "float32")
            b_de = tile.alloc_fragment([TOKENS, BK], "float32")
            b_dc = tile.alloc_fragment([TOKENS, BK], "float32")
            b_products = tile.alloc_fragment([TOKENS, 2, 64], "float32")
            b_sum = tile.alloc_fragment([TOKENS, 2], "float32")
            b_dqd = tile.alloc_fragment([TOKENS, BK], IO)
            b_dkd = tile.alloc_fragment([TOKENS, BK], IO)
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            for i, j in tile.Parallel(TOKENS, TOKENS):
                s_before[i, j] = tile.if_then_else(i < j, tile.cast(1, IO), tile.cast(0, IO))
            # of which what keys take, and what queries write, stays 0
            for m, i, j in tile.Parallel(2, 2, 2 * TOKENS):
                s_carried[m, i, j] = 0.0
            tile.fence_proxy_async()
            tile.sync_threads()
            n_own = tile.ceildiv(tile.min(CHUNKS, n_chunks - i_x * CHUNKS), 2)
            for i_n in tile.Pipelined(n_own, num_stages=1):
                i_t = i_x * CHUNKS + i_n * 2
                i_c = i_b * n_chunks + i_t
                i_row = i_t * BT
                n_rows = tile.min(T - i_row, TOKENS)
                i_kept = i_b * tile.ceildiv(n_chunks, 2) + i_t // 2
                # by 64 columns, whose rows lie one after the other
                tile.copy(do[i_b, i_row : i_row + TOKENS, i_h, 0:64], s_dO_dX[0:TOKENS, 0:64])
                tile.copy(dv[i_b, i_row : i_row + TOKENS, i_h, 0:64], s_dO_dX[TOKENS : 2 * TOKENS, 0:64])
                tile.copy(do[i_b, i_row : i_row + TOKENS, i_h, 64:128], s_dO_dX[0:TOKENS, 64:128])
                tile.copy(dv[i_b, i_row : i_row + TOKENS, i_h, 64:128], s_dO_dX[TOKENS : 2 * TOKENS, 64:128])
                # a chunk that the sequence has not is another's: no token meets it
                tile.copy(R[i_c, i_h, :, 0:64], s_R[0:BT, 0:64])
                tile.copy(R[i_c + 1, i_h, :, 0:64], s_R[BT : 2 * BT, 0:64])
                tile.copy(R[i_c, i_h, :, 64:128], s_R[0:BT, 64:128])
                tile.copy(R[i_c + 1, i_h, :, 64:128], s_R[BT : 2 * BT, 64:128])
                tile.copy(h[i_kept, i_h, :, :], s_h)
                tile.copy(dh[i_kept, i_h, :, :], s_dh)
                tile.copy(q[i_b, i_row : i_row + TOKENS, i_hq, 0:64], s_qk[0:TOKENS, 0:64])
                tile.copy(k[i_b, i_row : i_row + TOKENS, i_hq, 0:64], s_qk[TOKENS : 2 * TOKENS, 0:64])
                tile.copy(q[i_b, i_row : i_row + TOKENS, i_hq, 64:128], s_qk[0:TOKENS, 64:128])
                tile.copy(k[i_b, i_row : i_row + TOKENS, i_hq, 64:128], s_qk[TOKENS : 2 * TOKENS, 64:128])
                tile.copy(log_decay[i_c, i_h, :], s_log_decay[0:BT])
                tile.copy(log_decay[i_c + 1, i_h, :], s_log_decay[BT : 2 * BT])
                tile.copy(k_beta[i_c, i_h, :], s_k_beta[0:BT])
                tile.copy(k_beta[i_c + 1, i_h, :], s_k_beta[BT : 2 * BT])
                tile.copy(q_rstd[i_c, i_h, :], s_q_rstd[0:BT])
                tile.copy(q_rstd[i_c + 1, i_h, :], s_q_rstd[BT : 2 * BT])
                tile.copy(k_rstd[i_c, i_h, :], s_k_rstd[0:BT])
                tile.copy(k_rstd[i_c + 1, i_h, :], s_k_rstd[BT : 2 * BT])

                # no product waits for another, or for what follows: scores first, then what goes through the states
                tile.wgmma_gemm(s_dO_dX, s_R, b_scores, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_dO_dX[0:TOKENS, :], s_h, b_dq, clear_accum=True, policy=COLUMNS)
                tile.wgmma_gemm(s_dO_dX[TOKENS : 2 * TOKENS, :], s_h, b_de, clear_accum=True, policy=COLUMNS)
                tile.wgmma_gemm(s_R, s_dh, b_dc, clear_accum=True, policy=COLUMNS)
                tile.wgmma_gemm(s_qk, s_qk[TOKENS : 2 * TOKENS, :], b_pairs, transpose_B=True, clear_accum=True, policy=ROWS)

                # what tokens past the end have is another sequence's
                for i in tile.Parallel(TOKENS):
                    s_writes[i] = tile.if_then_else(i < n_rows, s_k_beta[i] * s_k_rstd[i], 0.0)
                    s_reads[i] = tile.if_then_else(i < n_rows, scale * s_q_rstd[i], 0.0)
                    s_reads[i + TOKENS] = tile.if_then_else(i < n_rows, -s_k_rstd[i], 0.0)
                # Neither sum is a difference of others: a strong decay would leave nothing of it.
                for i in tile.Parallel(TOKENS):
                    x_sums[0] = 0.0
                    x_sums[1] = 0.0
                    for m in tile.unroll(TOKENS):
                        x_sums[2] = s_log_decay[m]
                        x_sums[0] += tile.if_then_else(m <= i and m < n_rows, x_sums[2], 0.0)
                        x_sums[1] += tile.if_then_else(m > i and m < n_rows, x_sums[2], 0.0)
                    s_G[i] = x_sums[0]
                    s_head[i] = tile.exp2(x_sums[0])
                    s_tail[i] = tile.exp2(x_sums[1])
                hold[0] = tile.cast(s_log_decay[0], "float32")

                # dk of the last block, stored before dq
                tile.tma_store_wait(1)
                tile.sync_threads(MEETING, 256)
                for i, j in tile.Parallel(TOKENS, BK):
                    s_dk[i, j] = s_qk[TOKENS + i, j]

                tile.wait_wgmma(4)
                # <R, dX>
                for i, j in tile.Parallel(2 * TOKENS, TOKENS):
                    b_diagonal[i, j] = tile.if_then_else(i == j + TOKENS, b_scores[i, j], 0.0)
                tile.reduce_sum(b_diagonal, b_RdX, dim=1)
                for i in tile.Parallel(2 * TOKENS):
                    if i >= TOKENS and i - TOKENS < n_rows:
                        beta_dot[i_c + (i - TOKENS) // BT, i_h, i % BT] = b_RdX[i]
                # gradients of scores without their decay: dAqk above -dT
                for i, j in tile.Parallel(2 * TOKENS, TOKENS):
                    b_scores[i, j] *= tile.exp2(s_G[i % TOKENS] - s_G[j])
                for i, j in tile.Parallel(2 * TOKENS, TOKENS):
                    b_scores[i, j] = tile.if_then_else(
                        i % TOKENS < n_rows and (i % TOKENS > j or i == j), b_scores[i, j], 0.0
                    )
                for i, j in tile.Parallel(2 * TOKENS, TOKENS):
                    b_columns[i, j] = b_scores[i, j] * s_writes[j]
                for i, j in tile.Parallel(2 * TOKENS, TOKENS):
                    b_rows[i, j] = b_scores[i, j] * s_reads[i]
                tile.copy(b_columns, s_columns)
                tile.copy(b_rows, s_rows)
                tile.wait_wgmma(0)
                # A pair counts for those tokens that are behind the first of both, and not behind the other: summed over
                # all first ones by a product with ones, of the first 8 bits and of the next 8.
                for i, j in tile.Parallel(2 * TOKENS, TOKENS):
                    b_pairs[i, j] *= b_scores[i, j] * s_reads[i] * s_writes[j]
                for i, j in tile.Parallel(2 * TOKENS, TOKENS):
                    b_pairs[i, j] = tile.if_then_else(i % TOKENS > j, b_pairs[i, j], 0.0)
                    b_first[i, j] = b_pairs[i, j]
                for i, j in tile.Parallel(2 * TOKENS, TOKENS):
                    b_next[i, j] = b_pairs[i, j] - tile.cast(b_first[i, j], "float32")
                tile.wgmma_gemm(b_next, s_before, b_spans, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(b_first, s_before, b_spans, policy=ROWS)
                # <S, dS>
                tile.clear(b_kept)
                for m in tile.serial(V // 16):
                    for i, j in tile.Parallel(16, BK):
                        b_kept[i, j] += tile.cast(s_h[m * 16 + i, j], "float32") * tile.cast(s_dh[m * 16 + i, j], "float32")
                tile.reduce_sum(b_kept, b_SdS, dim=1)
                for i in tile.Parallel(16):
                    s_SdS[i] = b_SdS[i]
                hold[0] = tile.cast(s_dO_dX[0, 0], "float32")
                hold[0] = tile.cast(s_R[0, 0], "float32")
                hold[0] = tile.cast(s_h[0, 0], "float32")
                hold[0] = tile.cast(s_dh[0, 0], "float32")

                for i, j in tile.Parallel(TOKENS, BK):
                    b_dq[i, j] *= s_head[i]
                    b_de[i, j] *= s_head[i]
                    b_dc[i, j] *= s_tail[i]
                for i, j in tile.Parallel(TOKENS, BK):
                    b_products[i, j // 64, j % 64] = tile.cast(s_qk[i, j], "float32") * b_dq[i, j] * s_reads[i] + tile.cast(s_qk[i + TOKENS, j], "float32") * b_de[i, j] * s_reads[i + TOKENS]
                tile.reduce_sum(b_products, b_sum, dim=2)
                for i, j in tile.Parallel(TOKENS, 2):
                    s_carried[0, j, i] = b_sum[i, j]
                for i, j in tile.Parallel(TOKENS, BK):
                    b_products[i, j // 64, j % 64] = tile.cast(s_qk[i + TOKENS, j], "float32") * b_dc[i, j] * s_writes[i]
                tile.reduce_sum(b_products, b_sum, dim=2)
                for i, j in tile.Parallel(TOKENS, 2):
                    s_carried[1, j, i + TOKENS] = b_sum[i, j]
                tile.fence_proxy_async()
                tile.sync_threads(MEETING, 256)

                tile.wgmma_gemm(s_columns[0:TOKENS, :], s_dk, b_dq, policy=COLUMNS)
                tile.wgmma_gemm(s_columns[TOKENS : 2 * TOKENS, :], s_dk, b_de, policy=COLUMNS)
                tile.wgmma_gemm(s_rows, s_qk, b_dc, transpose_A=True, policy=COLUMNS)
                tile.wait_wgmma(3)
                # what a token takes from the state decays by its own and all earlier tokens of the block, and what it
                # writes by all later ones
                for i, j in tile.Parallel(2 * TOKENS, TOKENS):
                    b_spans[i, j] += s_carried[0, 0, i] + s_carried[0, 1, i]
                    b_later[i, j] = s_carried[1, 0, i] + s_carried[1, 1, i]
                for i, j in tile.Parallel(2 * TOKENS, TOKENS):
                    b_by_warps[i // 16, i % 16, j] = tile.if_then_else(
                        i % TOKENS >= j, b_spans[i, j], b_later[i, j]
                    )
                tile.reduce_sum(b_by_warps, b_spanned, dim=1)
                for i, j in tile.Parallel(2 * TOKENS // 16, TOKENS):
                    s_spanned[i, j] = b_spanned[i, j]
                tile.wait_wgmma(0)

                for i, j in tile.Parallel(TOKENS, BK):
                    b_products[i, j // 64, j % 64] = tile.cast(s_qk[i + TOKENS, j], "float32") * b_dc[i, j]
                tile.reduce_sum(b_products, b_sum, dim=2)
                for i, j in tile.Parallel(TOKENS, 2):
                    s_sums[1, j, i] = b_sum[i, j]
                for i, j in tile.Parallel(TOKENS, BK):
                    b_products[i, j // 64, j % 64] = tile.cast(s_qk[i, j], "float32") * b_dq[i, j]
                tile.reduce_sum(b_products, b_sum, dim=2)
                for i, j in tile.Parallel(TOKENS, 2):
                    s_sums[0, j, i] = b_sum[i, j]
                for i, j in tile.Parallel(TOKENS, BK):
                    b_products[i, j // 64, j % 64] = tile.cast(s_qk[i + TOKENS, j], "float32") * b_de[i, j]
                tile.reduce_sum(b_products, b_sum, dim=2)
                for i, j in tile.Parallel(TOKENS, 2):
                    s_sums[2, j, i] = b_sum[i, j]
                # what the last block stores from s_dq is on its way meanwhile
                tile.tma_store_wait(0)
                tile.sync_threads(MEETING, 256)
                for i in tile.Parallel(TOKENS):
                    x_sums[0] = 0.0
                    for m in tile.unroll(16):
                        x_sums[0] += s_SdS[m]
                    # what the block starts from decays by all of its tokens
                    x_sums[0] *= s_head[TOKENS - 1]
                    for m in tile.unroll(2 * TOKENS // 16):
                        x_sums[0] += s_spanned[m, i]
                    if i < n_rows:
                        dg_part[i_c + i // BT, i_h, 0, i % BT] = x_sums[0]
                for i in tile.Parallel(TOKENS):
                    if i < n_rows:
                        dbeta_part[i_c + i // BT, i_h, 0, i % BT] = s_k_rstd[i] * (s_sums[1, 0, i] + s_sums[1, 1, i])
                for i, j in tile.Parallel(TOKENS, BK):
                    # along q and k nothing stays, as rounding left it
                    b_dqd[i, j] = tile.cast(
                        s_q_rstd[i]
                        * scale
                        * (b_dq[i, j] - tile.cast(s_qk[i, j], "float32") * (s_q_rstd[i] * s_q_rstd[i] * (s_sums[0, 0, i] + s_sums[0, 1, i]))),
                        IO,
                    )
                for i, j in tile.Parallel(TOKENS, BK):
                    b_dkd[i, j] = tile.cast(
                        s_k_rstd[i]
                        * (
                            s_k_beta[i] * b_dc[i, j]
                            - b_de[i, j]
                            - tile.cast(s_qk[i + TOKENS, j], "float32")
                            * (s_k_rstd[i] * s_k_rstd[i] * (s_k_beta[i] * (s_sums[1, 0, i] + s_sums[1, 1, i]) - (s_sums[2, 0, i] + s_sums[2, 1, i])))
                        ),
                        IO,
                    )
                hold[0] = tile.cast(s_qk[0, 0], "float32")
                hold[0] = tile.cast(s_k_beta[0], "float32")
                hold[0] = tile.cast(s_q_rstd[0], "float32")
                hold[0] = tile.cast(s_k_rstd[0], "float32")

                tile.copy(b_dqd, s_dq)
                tile.copy(b_dkd, s_dk)
                tile.fence_proxy_async()
                tile.sync_threads(MEETING, 256)
                tile.tma_copy(s_dk, dk[i_b, i_row : i_row + TOKENS, i_h, :])
                tile.tma_copy(s_dq, dq[i_b, i_row : i_row + TOKENS, i_h, :])
            tile.tma_store_wait(0)

    return grad_blocks2


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


@triton.jit(do_not_specialize=["T", "HV"])
def fold_beta_kernel(
    beta_dot,
    k_beta,
    dbeta_part,
    dbeta,
    T,
    HV,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """dbeta of a chunk, BH heads at a time: the mean of <k, dc> and three times <R, dX> / beta.

    Both are the gradient. The sum over channels is nearer to it, but of keys that have much in
    common, where it is a difference of large terms. Half of what rounding adds to one is not in
    the other, so the mean is off by less than the sum, wherever that is far off. It is <k, dc> alone where beta is so small
    that <R, dX> / beta has no digits left.
    """
    i_c = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)
    m_th = (o_t < n_rows)[:, None] & (o_h < HV)[None, :]
    p_beta = (i_start + o_t)[:, None] * HV + o_h[None, :]
    i_tile = i_c.to(tl.int64) * HV + o_h
    p_tile = i_tile[None, :] * BT + o_t[:, None]
    b_beta = tl.load(k_beta + p_tile, mask=m_th, other=0.0)
    b_dot = tl.load(beta_dot + p_tile, mask=m_th, other=0.0)
    b_dbeta = tl.zeros([BT, BH], tl.float32)
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_dbeta += tl.load(dbeta_part + p_part, mask=m_th, other=0.0)
    m_small = tl.abs(b_beta) < LEAST_BETA
    b_mean = 0.25 * b_dbeta + 0.75 * b_dot / tl.where(m_small, 1.0, b_beta)
    b_dbeta = tl.where(m_small, b_dbeta, b_mean)
    tl.store(dbeta + p_beta, b_dbeta.to(tl.bfloat16), mask=m_th)


@triton.jit(do_not_specialize=["T", "H", "HV", "HG"])
def fold_decay_kernel(
    dg_part,
    dg,
    T,
    H,
    HV,
    HG,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """dg of a chunk, BH heads at a time: sums over the slices of channels."""
    i_c = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    n_chunks = tl.cdiv(T, BT)
    i_t = (i_c % n_chunks) * BT
    i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
    n_rows = tl.minimum(T - i_t, BT)
    m_h = o_h < HV
    m_th = (o_t < n_rows)[:, None] & m_h[None, :]
    i_tile = i_c.to(tl.int64) * HV + o_h
    b_dg = tl.zeros([BT, BH], tl.float32)
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_dg += tl.load(dg_part + p_part, mask=m_th, other=0.0)
    p_dg = (i_start + o_t)[:, None] * HV + o_h[None, :]
    tl.store(dg + p_dg, b_dg.to(tl.float32), mask=m_th)


def launch(
    q, k, g, q_rstd, k_rstd, k_beta, log_decay, h, R, dh, dv, do, beta_dot, dq, dk, dg_part, dg,
    dbeta_part, dbeta, *, n_chunks, scale, lower_bound, T, H, HV, HG, n_sequences
):
    """Launch all kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, q_rstd, k_rstd, k_beta, log_decay, h, R, dh, dv, do, beta_dot, dq, dk, dg_part,
        dg, dbeta_part, dbeta, scale, lower_bound
    )
    fold_beta_kernel[(n_chunks, -(-HV // BH))](
        beta_dot, k_beta, dbeta_part, dbeta, T, HV,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
    fold_decay_kernel[(n_chunks, -(-HV // BH))](
        dg_part, dg, T, H, HV, HG,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
