"""The key side of the gradients, the decay's factors centred: dq, dk, dg and dbeta.

Through the state first,

    dQg = dO S^T       dE = -dX S^T       dKtail = R dS^T       dgamma_C = rows of S dS

then through the scores, where a pair (i, j) met at an anchor a:

    dq_i += scale exp(G_i - a) sum_j dAqk_ij c_j exp(a - G_j)
    de_i +=       exp(G_i - a) sum_j dT_ij   c_j exp(a - G_j)
    dc_j +=       exp(a - G_j) sum_i (dT_ij e_i + scale dAqk_ij q_i) exp(G_i - a)

where e = k is the key that erases and c = beta k the one that is written, so that dk = de + beta dc.
dg is the reverse cumulative sum of dG = q dq + e de - c dc within the chunk. fold_beta_kernel, a
program per chunk and BH heads, makes dbeta: the mean of <R, dX> / beta and <k, dc>, of which a program
here has the part of its channels.

One program per CHUNKS chunks, value head and slice of K. All tiles are held transposed, [BK, BT]: a
channel is a row, so that each result is the next product's left operand and stays in registers. The
compiler gives the loads to a warp group of its own, and every tile a barrier of its own: those that
only the state's products read are filled again while the rest of a chunk is worked on. Where every
channel of the slice keeps at least 2^-120 over the chunk, one anchor serves all pairs: 2^-60 below its
start. In other slices a pair meets in the middle of its dyadic block, in 10 products that any decay
takes alike.

    q              [B, T, H, K]      bf16   queries; normalised in the kernel
    k              [B, T, H, K]      bf16   keys; normalised in the kernel
    g              [B, T, HG, K]     fp32   pre-activation of the log decay
    A_log          [HG]              fp32   log of the decay's rate
    dt_bias        [HG, K]           fp32   added to g before its activation
    q_rstd         [NT, HV, BT]      fp32   1 / norm of q
    k_rstd         [NT, HV, BT]      fp32   1 / norm of k
    k_beta         [NT, HV, BT]      fp32   beta, after its activation
    G              [B, T, HV, K]     fp32   decay since the chunk's start, log2; dg takes its place
    gamma_C        [NT, HV, K]       fp32   decay of the whole chunk
    h              [NT, HV, V, K]    bf16   state at the chunk's start, transposed
    R              [NT, HV, BT, V]   bf16   u: a token adds (beta k) u^T to the state
    dh             [NT, HV, V, K]    bf16   gradient of the state at the chunk's end, transposed
    dX             [NT, HV, BT, V]   bf16   gradient of X = v - E S, where R = A X
    dT             [NT, HV, BT, BT]  bf16   gradient of T, strict lower triangle
    dAqk           [NT, HV, BT, BT]  bf16   gradient of Aqk, strict lower triangle
    dAqk_diagonal  [NT, HV, BT]      fp32   gradient of Aqk's diagonal: <do, R>
    do             [B, T, HV, V]     bf16   gradient of o
    beta_dot       [NT, HV, BT]      fp32   <R, dX>, which is k_beta times its gradient
    q_dot          [NT, HV, BT]      fp32   <q, dq> of the normalised q
    k_dot          [NT, HV, BT]      fp32   <k, dk> of the normalised k
    chunk_table    [NT, 2]           int32  first token and number of tokens of each chunk
    dq             [B, T, HV, K]     bf16   gradient of q, per value head
    dk             [B, T, HV, K]     bf16   gradient of k, per value head
    dg             [B, T, HV, K]     fp32   gradient of g, per value head
    dbeta_part     [NT, HV, NK, BT]  fp32   gradient of k_beta: sums over a slice of channels
    dbeta          [B, T, HV]        bf16   gradient of beta
    dA_log         [NT, HV, K]       fp32   gradient of A_log: sums over the chunk's tokens
    ddt_bias       [NT, HV, K]       fp32   gradient of dt_bias: sums over the chunk's tokens

Problem: kda K=64 V=64 bf16, g fp32, l2norm, softplus gate, packed sequences
Config:  BK=64 BT=32 BV=64 chunks=4 decay=centred language=tilelang maxnreg=128 num_stages=1 num_warps=4
Template digest bb906e624a0df45e; made by
    gdn2gen generate --op kda --head-dim 64,64 --dtype bf16 --gate-dtype fp32 --gate softplus \
      --with=A_log,dt_bias,varlen --stage grad_key --config \
      BK=64,BT=32,BV=64,chunks=4,decay=centred,language=tilelang,maxnreg=128,num_stages=1,num_warps=4
"""

from functools import cache

import triton
import triton.language as tl


K, V = 64, 64
BT, BK, CHUNKS = 32, 64, 4
IO, GATE = "bfloat16", "float32"
# one anchor serves a chunk in which every channel keeps at least LEAST: factors lie within 2^60
LEAST, SHIFT = 2.0**-120, 60.0
LEVELS = 5  # log2(BT)
BH = 16  # heads of a program of fold_beta_kernel
# Of a smaller beta, what is left of dX, which has it as a factor, may be 0.
LEAST_BETA = tl.constexpr(2.0**-60)
# exp2 and division by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, HG, NT, HV = (
        tile.dynamic(name) for name in ("B", "T", "H", "HG", "NT", "HV")
    )
    # a warp keeps whole channels, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    def exp_below(x):
        """exp(-|x|)."""
        return tile.exp2(-1.4426950408889634 * tile.abs(x))

    def softplus_by(x, y):
        """log(1 + exp(x)) by y = exp(-|x|); log(1 + y) / y by Chebyshev's polynomial, off by 3e-7."""
        ratio = -0.10685003 + y * (0.0434939 - y * 0.008371153)
        ratio = -0.49997175 + y * (0.33271928 + y * (-0.24474774 + y * (0.17687477 + y * ratio)))
        return tile.max(x, 0.0) + y * (0.99999978 + y * ratio)

    @tile.prim_func
    def grad_key(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG, K], "float32"),
        A_log: tile.Tensor([HG], "float32"),
        dt_bias: tile.Tensor([HG, K], "float32"),
        q_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_beta: tile.Tensor([NT, HV, BT], "float32"),
        G: tile.Tensor([B, T, HV, K], "float32"),
        gamma_C: tile.Tensor([NT, HV, K], "float32"),
        h: tile.Tensor([NT, HV, V, K], "bfloat16"),
        R: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        dh: tile.Tensor([NT, HV, V, K], "bfloat16"),
        dX: tile.Tensor([NT, HV, BT, V], "bfloat16"),
        dT: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        dAqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        dAqk_diagonal: tile.Tensor([NT, HV, BT], "float32"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        beta_dot: tile.Tensor([NT, HV, BT], "float32"),
        q_dot: tile.Tensor([NT, HV, BT], "float32"),
        k_dot: tile.Tensor([NT, HV, BT], "float32"),
        chunk_table: tile.Tensor([NT, 2], "int32"),
        dq: tile.Tensor([B, T, HV, K], "bfloat16"),
        dk: tile.Tensor([B, T, HV, K], "bfloat16"),
        dg: tile.Tensor([B, T, HV, K], "float32"),
        dbeta_part: tile.Tensor([NT, HV, K // BK, BT], "float32"),
        dbeta: tile.Tensor([B, T, HV], "bfloat16"),
        dA_log: tile.Tensor([NT, HV, K], "float32"),
        ddt_bias: tile.Tensor([NT, HV, K], "float32"),
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
            s_dX = tile.alloc_shared([BT, V], IO)
            s_R = tile.alloc_shared([BT, V], IO)
            s_dT = tile.alloc_shared([BT, BT], IO)
            s_dAqk = tile.alloc_shared([BT, BT], IO)
            s_q = tile.alloc_shared([BT, BK], IO)
            s_k = tile.alloc_shared([BT, BK], IO)
            s_G = tile.alloc_shared([BT, BK], "float32")
            s_gamma = tile.alloc_shared([BK], "float32")
            s_diagonal = tile.alloc_shared([BT], "float32")
            s_k_beta = tile.alloc_shared([BT], "float32")
            s_q_rstd = tile.alloc_shared([BT], "float32")
            s_k_rstd = tile.alloc_shared([BT], "float32")
            s_q_dot = tile.alloc_shared([BT], "float32")
            s_k_dot = tile.alloc_shared([BT], "float32")
            s_later = tile.alloc_shared([BT, BT], IO)
            s_dq = tile.alloc_shared([BT, BK], IO)
            s_dk = tile.alloc_shared([BT, BK], IO)
            # rows so long that what a warp writes of their transpose lies in banks of its own
            s_products = tile.alloc_shared([BT, BK + 4], "float32")
            s_dg = tile.alloc_shared([BT, BK], GATE)
            s_g = tile.alloc_shared([BT, BK], GATE)

            b_dq = tile.alloc_fragment([BK, BT], "float32")
            b_de = tile.alloc_fragment([BK, BT], "float32")
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
            b_c = tile.alloc_fragment([BK, BT], "float32")
            b_products = tile.alloc_fragment([BT, BK], "float32")
            b_dbeta = tile.alloc_fragment([BT], "float32")
            # in turn the decay G, products to be summed, dG, and what dA_log is the sum of
            b_dG = tile.alloc_fragment([BK, BT], "float32")
            b_dg = tile.alloc_fragment([BK, BT], "float32")
            # factors of pairs, rounded as products take them, then the first bits of dG and the next
            b_first = tile.alloc_fragment([BK, BT], IO)
            b_next = tile.alloc_fragment([BK, BT], IO)
            b_dA_sum = tile.alloc_fragment([BK], "float32")
            b_dg_sum = tile.alloc_fragment([BK], "float32")

            s_pairs = tile.alloc_shared([BT, BT], IO)
            b_pairs = tile.alloc_fragment([BT, BT], IO)
            b_pairs_T = tile.alloc_fragment([BT, BT], IO)
            b_rounded = tile.alloc_fragment([BK, BT], "float32")
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
                tile.copy(dX[i_c, i_h, :, :], s_dX)
                tile.copy(dh[i_c, i_h, :, o_k : o_k + BK], s_dh)
                tile.copy(R[i_c, i_h, :, :], s_R)
                tile.copy(G[i_b, i_row : i_row + BT, i_h, o_k : o_k + BK], s_G)
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, o_k : o_k + BK], s_k)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, o_k : o_k + BK], s_q)
                tile.copy(gamma_C[i_c, i_h, o_k : o_k + BK], s_gamma)
                tile.copy(k_rstd[i_c, i_h, :], s_k_rstd)
                tile.copy(q_rstd[i_c, i_h, :], s_q_rstd)
                tile.copy(k_beta[i_c, i_h, :], s_k_beta)
                tile.copy(dAqk[i_c, i_h, :, :], s_dAqk)
                tile.copy(dT[i_c, i_h, :, :], s_dT)
                tile.copy(dAqk_diagonal[i_c, i_h, :], s_diagonal)
                tile.copy(q_dot[i_c, i_h, :], s_q_dot)
                tile.copy(k_dot[i_c, i_h, :], s_k_dot)
                tile.copy(g[i_b, i_row : i_row + BT, i_hg, o_k : o_k + BK], s_g)

                # through the state
                tile.clear(b_dq)
                tile.gemm(s_h, s_do, b_dq, transpose_A=True, transpose_B=True, policy=ROWS)
                tile.clear(b_de)
                tile.gemm(s_h, s_dX, b_de, transpose_A=True, transpose_B=True, policy=ROWS)
                tile.clear(b_dk)
                tile.gemm(s_dh, s_R, b_dk, transpose_A=True, transpose_B=True, policy=ROWS)
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
                    b_k[i, j] = tile.if_then_else(j < n_rows, tile.cast(s_k[j, i], "float32"), 0.0) * s_k_rstd[j]
                    b_q[i, j] = tile.if_then_else(j < n_rows, tile.cast(s_q[j, i], "float32"), 0.0) * (s_q_rstd[j] * scale)
                    b_c[i, j] = b_k[i, j] * s_k_beta[j]
                    b_de[i, j] = -b_de[i, j]
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
                        b_de[i, j] *= 2.0**-SHIFT
                        b_dk[i, j] *= s_gamma[i] * 2.0**SHIFT
                    # The chunk's last token reaches the end undecayed: it would add to dG_C what it
                    # takes from its own dG. Left out of both: under strong decay only that
                    # cancellation remains.
                    for i, j in tile.Parallel(BK, BT):
                        b_first[i, j] = b_c[i, j] * b_column[i, j]
                        b_dG[i, j] = tile.if_then_else(
                            j < n_rows - 1, b_dk[i, j] * tile.cast(b_first[i, j], "float32"), 0.0
                        )
                    tile.reduce_sum(b_dG, b_dG_C, dim=1)
                    tile.gemm(b_first, s_dAqk, b_dq, transpose_B=True, policy=ROWS)
                    tile.gemm(b_first, s_dT, b_de, transpose_B=True, policy=ROWS)
                    for i, j in tile.Parallel(BK, BT):
                        b_first[i, j] = b_q[i, j] * b_row[i, j]
                        b_next[i, j] = b_k[i, j] * b_row[i, j]
                    tile.gemm(b_first, s_dAqk, b_dk, policy=ROWS)
                    tile.gemm(b_next, s_dT, b_dk, policy=ROWS)
                    # A pair adds to dG_i what it takes from dG_j: both ends take the factors as the
                    # products did, rounded, so that it cancels.
                    for i, j in tile.Parallel(BK, BT):
                        b_dG[i, j] = (
                            tile.cast(b_first[i, j], "float32") * b_dq[i, j]
                            + tile.cast(b_next[i, j], "float32") * b_de[i, j]
                        )
                        b_first[i, j] = b_c[i, j] * b_column[i, j]
                        b_dG[i, j] -= tile.if_then_else(
                            j < n_rows - 1, tile.cast(b_first[i, j], "float32") * b_dk[i, j], 0.0
                        )
                        b_dq[i, j] *= b_row[i, j]
                        b_de[i, j] *= b_row[i, j]
                        b_dk[i, j] *= b_column[i, j]
                # or in the middle of dyadic blocks
                for _ in tile.serial(tile.if_then_else(n_levels == 0, 0, 1)):
                    for i, j in tile.Parallel(BK, BT):
                        b_column[i, j] = tile.exp2(b_row[i, j])
                        b_dq[i, j] *= b_column[i, j]
                        b_de[i, j] *= b_column[i, j]
                        b_dk[i, j] *= tile.exp2(s_G[i_last, i] - b_row[i, j])
                        b_column[i, j] = tile.if_then_else(
                            j < n_rows - 1, b_c[i, j] * b_dk[i, j], 0.0
                        )
                        b_dG[i, j] = b_q[i, j] * b_dq[i, j] + b_k[i, j] * b_de[i, j] - b_column[i, j]
                    tile.reduce_sum(b_column, b_dG_C, dim=1)
                    for i, j in tile.Parallel(BT, BT):
                        b_pairs[i, j] = s_dAqk[tile.max(i, j), tile.min(i, j)]
                        b_pairs_T[i, j] = s_dT[tile.max(i, j), tile.min(i, j)]
                    for i_level in tile.unroll(LEVELS):
                        # A token is in the upper half of its block, or in the lower: it has one factor,
                        # at most 1, and is a row or a column. So one product with a symmetric matrix
                        # gives the upper tokens' dq and the lower ones' part of dc.
                        for i, j in tile.Parallel(BT, BT):
                            s_pairs[i, j] = tile.if_then_else(
                                (i ^ j) >> i_level == 1, b_pairs[i, j], tile.cast(0, IO)
                            )
                        tile.fence_proxy_async()
                        for i, j in tile.Parallel(BK, BT):
                            b_column[i, j] = b_row[i, j] - s_G[tile.min((((j >> i_level) | 1) << i_level) - 1, i_last), i]
                            b_column[i, j] = tile.exp2(-tile.abs(b_column[i, j]))
                        for i, j in tile.Parallel(BK, BT):
                            b_dg[i, j] = b_column[i, j] * tile.if_then_else(
                                (j >> i_level) % 2 == 1, b_q[i, j], b_c[i, j]
                            )
                        for i, j in tile.Parallel(BK, BT):
                            b_first[i, j] = b_dg[i, j]
                        tile.clear(b_dg)
                        tile.gemm(b_first, s_pairs, b_dg, policy=ROWS)
                        for i, j in tile.Parallel(BK, BT):
                            b_rounded[i, j] = b_first[i, j]
                        for i, j in tile.Parallel(BK, BT):
                            b_dG[i, j] += tile.if_then_else((j >> i_level) % 2 == 1, 1.0, -1.0) * (
                                b_rounded[i, j] * b_dg[i, j]
                            )
                            b_dg[i, j] *= b_column[i, j]
                            b_dq[i, j] += tile.if_then_else((j >> i_level) % 2 == 1, b_dg[i, j], 0.0)
                            b_dk[i, j] += tile.if_then_else((j >> i_level) % 2 == 1, 0.0, b_dg[i, j])
                        # and another the upper tokens' de and the rest of the lower ones'
                        for i, j in tile.Parallel(BT, BT):
                            s_pairs[i, j] = tile.if_then_else(
                                (i ^ j) >> i_level == 1, b_pairs_T[i, j], tile.cast(0, IO)
                            )
                        tile.fence_proxy_async()
                        for i, j in tile.Parallel(BK, BT):
                            b_dg[i, j] = b_column[i, j] * tile.if_then_else(
                                (j >> i_level) % 2 == 1, b_k[i, j], b_c[i, j]
                            )
                        for i, j in tile.Parallel(BK, BT):
                            b_first[i, j] = b_dg[i, j]
                        tile.clear(b_dg)
                        tile.gemm(b_first, s_pairs, b_dg, policy=ROWS)
                        for i, j in tile.Parallel(BK, BT):
                            b_rounded[i, j] = b_first[i, j]
                        for i, j in tile.Parallel(BK, BT):
                            b_dG[i, j] += tile.if_then_else((j >> i_level) % 2 == 1, 1.0, -1.0) * (
                                b_rounded[i, j] * b_dg[i, j]
                            )
                            b_dg[i, j] *= b_column[i, j]
                            b_de[i, j] += tile.if_then_else((j >> i_level) % 2 == 1, b_dg[i, j], 0.0)
                            b_dk[i, j] += tile.if_then_else((j >> i_level) % 2 == 1, 0.0, b_dg[i, j])
                for i in tile.Parallel(BK):
                    b_dG_C[i] += b_gamma[i] * b_dgamma[i]
                hold[0] = tile.cast(s_dAqk[0, 0], "float32")
                hold[0] = tile.cast(s_dT[0, 0], "float32")
                hold[0] = tile.cast(s_G[0, 0], "float32")
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_q[0, 0], "float32")
                hold[0] = tile.cast(s_gamma[0], "float32")

                # b_q holds scale q, and b_dq the gradient of q over scale
                for i, j in tile.Parallel(BK, BT):
                    b_dG[i, j] = tile.if_then_else(j < n_rows, b_dG[i, j], 0.0)
                    b_first[i, j] = b_dG[i, j]
                    b_next[i, j] = b_dG[i, j] - tile.cast(b_first[i, j], "float32")
                    b_dq[i, j] += s_diagonal[j] * b_c[i, j]
                    b_dk[i, j] += s_diagonal[j] * b_q[i, j]
                    s_products[j, i] = b_dk[i, j] * b_k[i, j]
                    b_dk[i, j] = b_dk[i, j] * s_k_beta[j] + b_de[i, j]
                    s_dq[j, i] = s_q_rstd[j] * (scale * b_dq[i, j] - b_q[i, j] * (s_q_dot[j] / scale))
                    s_dk[j, i] = s_k_rstd[j] * (b_dk[i, j] - b_k[i, j] * s_k_dot[j])

                # the sum over each token and all later ones as a product with ones, of the first 8
                # bits and of the next 8
                tile.clear(b_dg)
                tile.gemm(b_next, s_later, b_dg, policy=ROWS)
                tile.gemm(b_first, s_later, b_dg, policy=ROWS)
                hold[0] = tile.cast(s_diagonal[0], "float32")
                hold[0] = tile.cast(s_k_beta[0], "float32")
                hold[0] = tile.cast(s_q_rstd[0], "float32")
                hold[0] = tile.cast(s_k_rstd[0], "float32")
                hold[0] = tile.cast(s_q_dot[0], "float32")
                hold[0] = tile.cast(s_k_dot[0], "float32")

                # through the gate's activation
                rate = tile.exp(A_log[i_hg])
                for i, j in tile.Parallel(BK, BT):
                    b_dg[i, j] = tile.if_then_else(j < n_rows, b_dg[i, j] + b_dG_C[i], 0.0)
                    b_row[i, j] = tile.cast(s_g[j, i], "float32") + dt_bias[i_hg, o_k + i]
                    b_column[i, j] = exp_below(b_row[i, j])
                    b_dG[i, j] = -b_dg[i, j] * rate * softplus_by(b_row[i, j], b_column[i, j])
                    # the slope is the sigmoid, 1 / (1 + y) or y / (1 + y); by a root, for a quotient is ten instructions
                    b_dg[i, j] *= -rate * tile.if_then_else(b_row[i, j] < 0.0, b_column[i, j], 1.0)
                    b_column[i, j] = tile.rsqrt(1.0 + b_column[i, j])
                    b_dg[i, j] *= b_column[i, j] * b_column[i, j]
                    s_dg[j, i] = b_dg[i, j]

                # Summed where a token is a row: channels are spread over all warps, which would wait
                # for each other 8 times (0.04 ms of 0.45 at train4k, H200).
                for i, j in tile.Parallel(BT, BK):
                    b_products[i, j] = s_products[i, j]
                tile.reduce_sum(b_products, b_dbeta, dim=1)
                tile.reduce_sum(b_dG, b_dA_sum, dim=1)
                tile.reduce_sum(b_dg, b_dg_sum, dim=1)

                for i, j in tile.Parallel(BT, BK):
                    if i < n_rows:
                        dq[i_b, i_row + i, i_h, o_k + j] = s_dq[i, j]
                for i, j in tile.Parallel(BT, BK):
                    if i < n_rows:
                        dk[i_b, i_row + i, i_h, o_k + j] = s_dk[i, j]
                for i, j in tile.Parallel(BT, BK):
                    if i < n_rows:
                        dg[i_b, i_row + i, i_h, o_k + j] = s_dg[i, j]
                for j in tile.Parallel(BT):
                    dbeta_part[i_c, i_h, i_k, j] = b_dbeta[j]
                for i in tile.Parallel(BK):
                    if n_rows > 0:
                        dA_log[i_c, i_h, o_k + i] = b_dA_sum[i]
                for i in tile.Parallel(BK):
                    if n_rows > 0:
                        ddt_bias[i_c, i_h, o_k + i] = b_dg_sum[i]

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


@triton.jit(do_not_specialize=["T", "HV"])
def fold_beta_kernel(
    beta_dot,
    k_beta,
    dbeta_part,
    dbeta,
    chunk_table,
    T,
    HV,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
):
    """dbeta of a chunk, BH heads at a time: the mean of <k, dc> and <R, dX> / beta.

    Both are the gradient. The sum over channels is nearer to it, but of keys that have much in
    common, where it is a difference of large terms. Half of what rounding adds to one is not in
    the other, so the mean is off by less than either. It is <k, dc> alone where beta is so small
    that <R, dX> / beta has no digits left.
    """
    i_c = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    i_start = tl.load(chunk_table + i_c * 2).to(tl.int64)
    n_rows = tl.load(chunk_table + i_c * 2 + 1)
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
    b_dbeta = tl.where(m_small, b_dbeta, 0.5 * (b_dbeta + b_dot / tl.where(m_small, 1.0, b_beta)))
    tl.store(dbeta + p_beta, b_dbeta.to(tl.bfloat16), mask=m_th)


def launch(
    q, k, g, A_log, dt_bias, q_rstd, k_rstd, k_beta, G, gamma_C, h, R, dh, dX, dT, dAqk,
    dAqk_diagonal, do, beta_dot, q_dot, k_dot, chunk_table, dq, dk, dg, dbeta_part, dbeta,
    dA_log, ddt_bias, *, scale, lower_bound, n_chunks, T, H, HV, HG
):
    """Launch both kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, A_log, dt_bias, q_rstd, k_rstd, k_beta, G, gamma_C, h, R, dh, dX, dT, dAqk,
        dAqk_diagonal, do, beta_dot, q_dot, k_dot, chunk_table, dq, dk, dg, dbeta_part, dbeta,
        dA_log, ddt_bias, scale, lower_bound
    )
    fold_beta_kernel[(n_chunks, -(-HV // BH))](
        beta_dot, k_beta, dbeta_part, dbeta, chunk_table, T, HV,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
