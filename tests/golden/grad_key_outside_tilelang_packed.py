"""The key side of the gradients, the decay outside of the products: dq, dk, dg and dbeta.

Through the state first,

    dQg = dO S^T       dE = -dX S^T       dKtail = R dS^T       dgamma_C = <S, dS>

then through the scores, of which D_ij is what the state keeps from token j to token i:

    dq_i += scale sum_j D_ij dAqk_ij c_j
    de_i +=       sum_j D_ij dT_ij c_j
    dc_j +=       sum_i D_ij (dT_ij k_i + scale dAqk_ij q_i)
    dg_t +=       sum over j < t <= i of D_ij (dT_ij <k_i, c_j> + scale dAqk_ij <q_i, c_j>)

where e = k is the key that erases and c = beta k the one that is written, so that dk = de + beta dc.
fold_beta_kernel, a program per chunk and BH heads, makes dbeta: the mean of three times <R, dX> / beta and
<k, dc>, of which a program here has the part of its channels.
No term of dg is taken from another, so that it is exact however strong the decay is.
fold_decay_kernel adds up the parts that slices of channels have in it.

grad_key: one program per CHUNKS chunks, value head and slice of K. Tiles of channels are held
transposed, [BK, BT]: a channel is a row, so that each result is the next product's left operand and
stays in registers. The compiler gives the loads to a warp group of its own, and every tile a barrier of
its own. What folds is in Triton.

    q              [B, T, H, K]      bf16   queries; normalised in the kernel
    k              [B, T, H, K]      bf16   keys; normalised in the kernel
    g              [B, T, HG]        fp32   pre-activation of the log decay
    A_log          [HG]              fp32   log of the decay's rate
    dt_bias        [HG]              fp32   added to g before its activation
    q_rstd         [NT, HV, BT]      fp32   1 / norm of q
    k_rstd         [NT, HV, BT]      fp32   1 / norm of k
    k_beta         [NT, HV, BT]      fp32   beta, after its activation
    log_decay      [NT, HV, BT]      fp32   decay of each token, log2
    gamma_C        [NT, HV]          fp32   decay of the whole chunk
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
    dg_part        [NT, HV, NK, BT]  fp32   gradient of the log decay: sums over a slice of channels
    dg             [B, T, HV]        fp32   gradient of g, per value head
    dbeta_part     [NT, HV, NK, BT]  fp32   gradient of k_beta: sums over a slice of channels
    dbeta          [B, T, HV]        bf16   gradient of beta
    dA_log         [NT, HV]          fp32   gradient of A_log: sums over the chunk's tokens
    ddt_bias       [NT, HV]          fp32   gradient of dt_bias: sums over the chunk's tokens

Problem: gated_delta_rule K=128 V=128 bf16, g fp32, l2norm, softplus gate, packed sequences
Config:  BK=64 BT=32 BV=128 chunks=4 decay=outside language=tilelang maxnreg=128 num_stages=1 num_warps=4
Template digest e1e8776c8b490078; made by
    gdn2gen generate --op gated_delta_rule --head-dim 128,128 --dtype bf16 --gate-dtype fp32 \
      --gate softplus --with=A_log,dt_bias,varlen --stage grad_key --config \
      BK=64,BT=32,BV=128,chunks=4,decay=outside,language=tilelang,maxnreg=128,num_stages=1,num_warps=4
"""

from functools import cache

import triton
import triton.language as tl


K, V = 128, 128
BT, BK, CHUNKS = 32, 64, 4
IO = "bfloat16"
BH = 16  # heads of a program of fold_beta_kernel
# Of a smaller beta, what is left of dX, which has it as a factor, may be 0.
LEAST_BETA = tl.constexpr(2.0**-60)
LOG2E = tl.constexpr(1.4426950408889634)
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
SMALLEST_LOG2 = tl.constexpr(-150.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + y), y = exp(-|x|), with every digit where x < -10.

    log(1 + y) / y by Chebyshev's polynomial of degree 7 on [0, 1], off by 3e-7 in fp32.
    """
    y = tl.exp(-tl.abs(x))
    ratio = -0.10685003 + y * (0.0434939 - y * 0.008371153)
    ratio = -0.49997175 + y * (0.33271928 + y * (-0.24474774 + y * (0.17687477 + y * ratio)))
    return tl.maximum(x, 0.0) + y * (0.99999978 + y * ratio)

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

    @tile.prim_func
    def grad_key(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG], "float32"),
        A_log: tile.Tensor([HG], "float32"),
        dt_bias: tile.Tensor([HG], "float32"),
        q_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_beta: tile.Tensor([NT, HV, BT], "float32"),
        log_decay: tile.Tensor([NT, HV, BT], "float32"),
        gamma_C: tile.Tensor([NT, HV], "float32"),
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
        dg_part: tile.Tensor([NT, HV, K // BK, BT], "float32"),
        dg: tile.Tensor([B, T, HV], "float32"),
        dbeta_part: tile.Tensor([NT, HV, K // BK, BT], "float32"),
        dbeta: tile.Tensor([B, T, HV], "bfloat16"),
        dA_log: tile.Tensor([NT, HV], "float32"),
        ddt_bias: tile.Tensor([NT, HV], "float32"),
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
            # held in a variable: the compiler would divide again for every load
            i_hq = tile.alloc_var("int32")
            i_hq = i_h // (HV // H)
            o_k = i_k * BK
            i_thread = tile.get_thread_binding()

            s_q = tile.alloc_shared([BT, BK], IO)
            s_k = tile.alloc_shared([BT, BK], IO)
            s_dX = tile.alloc_shared([BT, V], IO)
            s_R = tile.alloc_shared([BT, V], IO)
            s_do = tile.alloc_shared([BT, V], IO)
            s_h = tile.alloc_shared([V, BK], IO)
            s_dh = tile.alloc_shared([V, BK], IO)
            s_dT = tile.alloc_shared([BT, BT], IO)
            s_dAqk = tile.alloc_shared([BT, BT], IO)
            s_diagonal = tile.alloc_shared([BT], "float32")
            s_q_rstd = tile.alloc_shared([BT], "float32")
            s_k_rstd = tile.alloc_shared([BT], "float32")
            s_q_dot = tile.alloc_shared([BT], "float32")
            s_k_dot = tile.alloc_shared([BT], "float32")
            s_k_beta = tile.alloc_shared([BT], "float32")
            s_log_decay = tile.alloc_shared([BT], "float32")
            # gradients of pairs, of scores without their decay
            s_dA = tile.alloc_shared([BT, BT], IO)
            s_dT_own = tile.alloc_shared([BT, BT], IO)
            s_dq = tile.alloc_shared([BT, BK], IO)
            s_dk = tile.alloc_shared([BT, BK], IO)
            # rows so long that what a warp writes of their transpose lies in banks of its own
            s_products = tile.alloc_shared([BT, BK + 4], "float32")
            s_written = tile.alloc_shared([BT, BK + 4], "float32")
            s_sums = tile.alloc_shared([2, BT], "float32")
            s_later = tile.alloc_shared([BT, BT], "bfloat16")
            s_pairs = tile.alloc_shared([BT, BT], "bfloat16")
            s_pairs_rest = tile.alloc_shared([BT, BT], "bfloat16")
            # decay since the chunk's start; its exponential, and that of the decay to the chunk's end
            s_G = tile.alloc_shared([BT], "float32")
            s_head = tile.alloc_shared([BT], "float32")
            s_tail = tile.alloc_shared([BT], "float32")
            x_G = tile.alloc_local([2], "float32")

            b_dq = tile.alloc_fragment([BK, BT], "float32")
            b_de = tile.alloc_fragment([BK, BT], "float32")
            b_dk = tile.alloc_fragment([BK, BT], "float32")
            b_q = tile.alloc_fragment([BK, BT], "float32")
            b_k = tile.alloc_fragment([BK, BT], "float32")
            b_first = tile.alloc_fragment([BK, BT], IO)
            b_next = tile.alloc_fragment([BK, BT], IO)
            b_dAqk = tile.alloc_fragment([BT, BT], "float32")
            b_dT = tile.alloc_fragment([BT, BT], "float32")
            b_kk = tile.alloc_fragment([BT, BT], "float32")
            b_qk = tile.alloc_fragment([BT, BT], "float32")
            b_D = tile.alloc_fragment([BT, BT], "float32")
            b_later = tile.alloc_fragment([BT, BT], "float32")
            b_SdS = tile.alloc_fragment([BK, BK], "float32")
            b_dgamma = tile.alloc_fragment([BK], "float32")
            b_dg = tile.alloc_fragment([BT], "float32")
            x_gamma = tile.alloc_local([1], "float32")
            b_products = tile.alloc_fragment([BT, BK], "float32")
            b_sum = tile.alloc_fragment([BT], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            for i, j in tile.Parallel(BT, BT):
                s_later[i, j] = tile.if_then_else(i >= j, tile.cast(1, "bfloat16"), tile.cast(0, "bfloat16"))
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
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, o_k : o_k + BK], s_k)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, o_k : o_k + BK], s_q)
                tile.copy(q_rstd[i_c, i_h, :], s_q_rstd)
                tile.copy(k_rstd[i_c, i_h, :], s_k_rstd)
                tile.copy(q_dot[i_c, i_h, :], s_q_dot)
                tile.copy(k_dot[i_c, i_h, :], s_k_dot)
                tile.copy(k_beta[i_c, i_h, :], s_k_beta)
                tile.copy(log_decay[i_c, i_h, :], s_log_decay)
                tile.copy(dAqk[i_c, i_h, :, :], s_dAqk)
                tile.copy(dT[i_c, i_h, :, :], s_dT)
                tile.copy(dAqk_diagonal[i_c, i_h, :], s_diagonal)

                x_gamma[0] = gamma_C[i_c, i_h]
                # a token a thread, which reads all of the chunk
                if i_thread < BT:
                    x_G[0] = 0.0
                    x_G[1] = 0.0
                    for m in tile.unroll(BT):
                        x_G[0] += tile.if_then_else(m <= i_thread, s_log_decay[m], 0.0)
                        x_G[1] += tile.if_then_else(m > i_thread, s_log_decay[m], 0.0)
                    s_G[i_thread] = x_G[0]
                    s_head[i_thread] = tile.exp2(x_G[0])
                    s_tail[i_thread] = tile.exp2(x_G[1])
                tile.sync_threads()
                hold[0] = tile.cast(s_log_decay[0], "float32")

                # pairs of queries and keys as they are: products of inputs are exact, and norms are factors of them
                tile.clear(b_qk)
                tile.gemm(s_q, s_k, b_qk, transpose_B=True)
                tile.clear(b_kk)
                tile.gemm(s_k, s_k, b_kk, transpose_B=True)
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

                # gradients of pairs, and what of dg they are
                for i, j in tile.Parallel(BT, BT):
                    b_D[i, j] = tile.if_then_else(i >= j, tile.exp2(s_G[i] - s_G[j]), 0.0)
                for i, j in tile.Parallel(BT, BT):
                    b_dAqk[i, j] = tile.cast(s_dAqk[i, j], "float32") * b_D[i, j] + tile.if_then_else(
                        i == j, s_diagonal[i], 0.0
                    )
                    s_dA[i, j] = b_dAqk[i, j]
                for i, j in tile.Parallel(BT, BT):
                    b_dT[i, j] = tile.cast(s_dT[i, j], "float32") * b_D[i, j]
                    s_dT_own[i, j] = b_dT[i, j]
                # a pair counts for those tokens that are behind the first of both, and not behind the other: summed over
                # it and all later ones by a product with ones, of the first 8 bits and of the next 8
                for i, j in tile.Parallel(BT, BT):
                    b_D[i, j] = b_dAqk[i, j] * b_qk[i, j] * (s_q_rstd[i] * s_k_rstd[j] * scale)
                    b_D[i, j] += b_dT[i, j] * b_kk[i, j] * (s_k_rstd[i] * s_k_rstd[j])
                    b_D[i, j] = tile.if_then_else(i < n_rows and i > j, b_D[i, j] * s_k_beta[j], 0.0)
                    s_pairs[i, j] = tile.cast(b_D[i, j], "bfloat16")
                    s_pairs_rest[i, j] = tile.cast(
                        b_D[i, j] - tile.cast(tile.cast(b_D[i, j], "bfloat16"), "float32"), "bfloat16"
                    )
                tile.clear(b_later)
                tile.gemm(s_later, s_pairs_rest, b_later, transpose_A=True)
                tile.gemm(s_later, s_pairs, b_later, transpose_A=True)
                hold[0] = tile.cast(s_dAqk[0, 0], "float32")
                hold[0] = tile.cast(s_dT[0, 0], "float32")
                hold[0] = tile.cast(s_diagonal[0], "float32")

                for i, j in tile.Parallel(BK, BT):
                    b_k[i, j] = tile.if_then_else(j < n_rows, tile.cast(s_k[j, i], "float32"), 0.0) * s_k_rstd[j]
                    b_q[i, j] = tile.if_then_else(j < n_rows, tile.cast(s_q[j, i], "float32"), 0.0) * (s_q_rstd[j] * scale)
                    b_first[i, j] = b_k[i, j] * s_k_beta[j]
                    b_dq[i, j] *= s_head[j]
                    b_de[i, j] *= -s_head[j]
                    b_dk[i, j] *= s_tail[j]
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_q[0, 0], "float32")

                # What a token takes from the state decays by its own and all earlier tokens of the chunk, and what it
                # writes by all later ones; what the chunk starts from by all, as what the last one takes.
                for i, j in tile.Parallel(BK, BT):
                    s_products[j, i] = tile.if_then_else(j < n_rows, b_q[i, j] * b_dq[i, j] + b_k[i, j] * b_de[i, j], 0.0) + (
                        tile.if_then_else(j == BT - 1, x_gamma[0] * b_dgamma[i], 0.0)
                    )
                    s_written[j, i] = tile.if_then_else(j < n_rows, b_k[i, j] * b_dk[i, j] * s_k_beta[j], 0.0)
                # Summed where a token is a row: channels are spread over all warps, which would wait for each other.
                for i, j in tile.Parallel(BT, BK):
                    b_products[i, j] = s_products[i, j]
                tile.reduce_sum(b_products, b_sum, dim=1)
                for i in tile.Parallel(BT):
                    s_sums[0, i] = b_sum[i]
                for i, j in tile.Parallel(BT, BK):
                    b_products[i, j] = s_written[i, j]
                tile.reduce_sum(b_products, b_sum, dim=1)
                for i in tile.Parallel(BT):
                    s_sums[1, i] = b_sum[i]
                for i, j in tile.Parallel(BT, BT):
                    b_later[i, j] = tile.if_then_else(i > j, b_later[i, j] + s_sums[1, j], s_sums[0, j])
                tile.reduce_sum(b_later, b_dg, dim=1)
                for i in tile.Parallel(BT):
                    dg_part[i_c, i_h, i_k, i] = b_dg[i]

                # through the scores
                tile.gemm(b_first, s_dA, b_dq, transpose_B=True, policy=ROWS)
                tile.gemm(b_first, s_dT_own, b_de, transpose_B=True, policy=ROWS)
                for i, j in tile.Parallel(BK, BT):
                    b_first[i, j] = b_q[i, j]
                    b_next[i, j] = b_k[i, j]
                tile.gemm(b_first, s_dA, b_dk, policy=ROWS)
                tile.gemm(b_next, s_dT_own, b_dk, policy=ROWS)
                # b_q holds scale q, and b_dq the gradient of q over scale
                for i, j in tile.Parallel(BK, BT):
                    s_products[j, i] = b_dk[i, j] * b_k[i, j]
                    b_dk[i, j] = b_dk[i, j] * s_k_beta[j] + b_de[i, j]
                    s_dq[j, i] = s_q_rstd[j] * (scale * b_dq[i, j] - b_q[i, j] * (s_q_dot[j] / scale))
                    s_dk[j, i] = s_k_rstd[j] * (b_dk[i, j] - b_k[i, j] * s_k_dot[j])
                for i, j in tile.Parallel(BT, BK):
                    b_products[i, j] = s_products[i, j]
                tile.reduce_sum(b_products, b_sum, dim=1)
                for i in tile.Parallel(BT):
                    dbeta_part[i_c, i_h, i_k, i] = b_sum[i]
                hold[0] = tile.cast(s_q_rstd[0], "float32")
                hold[0] = tile.cast(s_k_rstd[0], "float32")
                hold[0] = tile.cast(s_q_dot[0], "float32")
                hold[0] = tile.cast(s_k_dot[0], "float32")
                hold[0] = tile.cast(s_k_beta[0], "float32")

                for i, j in tile.Parallel(BT, BK):
                    if i < n_rows:
                        dq[i_b, i_row + i, i_h, o_k + j] = s_dq[i, j]
                for i, j in tile.Parallel(BT, BK):
                    if i < n_rows:
                        dk[i_b, i_row + i, i_h, o_k + j] = s_dk[i, j]

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
    """dbeta of a chunk, BH heads at a time: the mean of <k, dc> and three times <R, dX> / beta.

    Both are the gradient. The sum over channels is nearer to it, but of keys that have much in
    common, where it is a difference of large terms. Half of what rounding adds to one is not in
    the other, so the mean is off by less than the sum, wherever that is far off. It is <k, dc> alone where beta is so small
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
    b_mean = 0.25 * b_dbeta + 0.75 * b_dot / tl.where(m_small, 1.0, b_beta)
    b_dbeta = tl.where(m_small, b_dbeta, b_mean)
    tl.store(dbeta + p_beta, b_dbeta.to(tl.bfloat16), mask=m_th)


@triton.jit(do_not_specialize=["T", "H", "HV", "HG"])
def fold_decay_kernel(
    dg_part,
    dg,
    g,
    A_log,
    dt_bias,
    dA_log,
    ddt_bias,
    chunk_table,
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
    i_start = tl.load(chunk_table + i_c * 2).to(tl.int64)
    n_rows = tl.load(chunk_table + i_c * 2 + 1)
    m_h = o_h < HV
    m_th = (o_t < n_rows)[:, None] & m_h[None, :]
    i_tile = i_c.to(tl.int64) * HV + o_h
    b_dg = tl.zeros([BT, BH], tl.float32)
    for i_k in range(0, K // BK):
        p_part = (i_tile * (K // BK) + i_k)[None, :] * BT + o_t[:, None]
        b_dg += tl.load(dg_part + p_part, mask=m_th, other=0.0)

    # through the gate's activation
    o_hg = o_h // (HV // HG)
    b_rate = tl.exp(tl.load(A_log + o_hg, mask=m_h, other=0.0))[None, :]
    b_x = tl.load(g + (i_start + o_t)[:, None] * HG + o_hg[None, :], mask=m_th, other=0.0).to(tl.float32)
    b_x += tl.load(dt_bias + o_hg, mask=m_h, other=0.0)[None, :]
    b_dA = tl.where(m_th, -b_dg * b_rate * softplus(b_x), 0.0)
    b_dg *= -b_rate / (1.0 + tl.exp(-b_x))
    tl.store(dA_log + i_tile, tl.sum(b_dA, 0), mask=o_h < HV * tl.minimum(n_rows, 1))
    tl.store(ddt_bias + i_tile, tl.sum(tl.where(m_th, b_dg, 0.0), 0), mask=o_h < HV * tl.minimum(n_rows, 1))
    p_dg = (i_start + o_t)[:, None] * HV + o_h[None, :]
    tl.store(dg + p_dg, b_dg.to(tl.float32), mask=m_th)


def launch(
    q, k, g, A_log, dt_bias, q_rstd, k_rstd, k_beta, log_decay, gamma_C, h, R, dh, dX, dT, dAqk,
    dAqk_diagonal, do, beta_dot, q_dot, k_dot, chunk_table, dq, dk, dg_part, dg, dbeta_part,
    dbeta, dA_log, ddt_bias, *, scale, lower_bound, n_chunks, T, H, HV, HG
):
    """Launch all kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, A_log, dt_bias, q_rstd, k_rstd, k_beta, log_decay, gamma_C, h, R, dh, dX, dT,
        dAqk, dAqk_diagonal, do, beta_dot, q_dot, k_dot, chunk_table, dq, dk, dg_part, dg,
        dbeta_part, dbeta, dA_log, ddt_bias, scale, lower_bound
    )
    fold_beta_kernel[(n_chunks, -(-HV // BH))](
        beta_dot, k_beta, dbeta_part, dbeta, chunk_table, T, HV,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
    fold_decay_kernel[(n_chunks, -(-HV // BH))](
        dg_part, dg, g, A_log, dt_bias, dA_log, ddt_bias, chunk_table, T, H, HV, HG,
        K=K, BT=BT, BK=BK, BH=BH, num_warps=1,
    )
