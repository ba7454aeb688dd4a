"""Score the pairs of a chunk, invert, and leave what scans need beside q and k.

One program per CHUNKS chunks and value head. The decay is one number a token, so that it stays outside of the
products: D_ij is what the state keeps from token j to token i, a sum of log decays that is never
positive, and one matrix of it serves all channels.

    T_ij   = D_ij <k_i, k_j> beta_j of normalised keys, i > j                 A = (I + T)^-1
    Aqk_ij = D_ij <q_i, k_j> beta_j scale of normalised queries, i >= j
    q_head = gamma scale / |q|      k_head = gamma / |k|      k_tail = (gamma_C / gamma) beta / |k|
                                                                gamma = exp(cumulative decay)

k and q lie one above the other in shared memory, so that one product gives all scores and norms. A warp
inverts the halves of I + T by substitution in fp32, a column a thread. The compiler gives the loads to a
warp group of its own.
Before it activate_beta_kernel, a program per chunk and BH heads, makes k_beta of beta.

    q            [B, T, H, K]      bf16   queries; normalised in the kernel
    k            [B, T, H, K]      bf16   keys; normalised in the kernel
    g            [B, T, HG]        fp32   pre-activation of the log decay
    beta         [B, T, HV]        bf16   factor of what a token erases and writes
    A_log        [HG]              fp32   log of the decay's rate
    dt_bias      [HG]              fp32   added to g before its activation
    chunk_table  [NT, 2]           int32  first token and number of tokens of each chunk
    q_rstd       [NT, HV, BT]      fp32   1 / norm of q
    k_rstd       [NT, HV, BT]      fp32   1 / norm of k
    k_beta       [NT, HV, BT]      fp32   beta, after its activation
    A            [NT, HV, BT, BT]  bf16   inverse of I + T, lower triangle
    Aqk          [NT, HV, BT, BT]  bf16   decayed scores, lower triangle
    q_head       [NT, HV, BT]      fp32   scale / norm of q, decayed from the chunk's start
    k_head       [NT, HV, BT]      fp32   1 / norm of k, decayed from the chunk's start
    k_tail       [NT, HV, BT]      fp32   beta / norm of k, decayed to the chunk's end
    gamma_C      [NT, HV]          fp32   decay of the whole chunk
    log_decay    [NT, HV, BT]      fp32   decay of each token, log2

Problem: gated_delta_rule K=128 V=128 bf16, g fp32, l2norm, softplus gate, packed sequences
Config:  BK=128 BT=32 chunks=4 decay=outside language=tilelang maxnreg=80 num_stages=1 num_warps=4 solve=halves
Template digest d242b10dc991acd9; made by
    gdn2gen generate --op gated_delta_rule --head-dim 128,128 --dtype bf16 --gate-dtype fp32 \
      --gate softplus --with=A_log,dt_bias,varlen --stage prepare --config \
      BK=128,BT=32,chunks=4,decay=outside,language=tilelang,maxnreg=80,num_stages=1,num_warps=4,solve=halves
"""

from functools import cache

import triton
import triton.language as tl


K = 128
BT, CHUNKS = 32, 4
HALF = BT // 2  # the inverse is made of those of the chunk's halves
IO = "bfloat16"
BH = 16  # heads of a program of activate_beta_kernel
log2e = 1.4426950408889634
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
smallest_log2 = -150.0
# exp2 and division by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, HG, HV, NT = (
        tile.dynamic(name) for name in ("B", "T", "H", "HG", "HV", "NT")
    )

    def exp_below(x):
        """exp(-|x|)."""
        return tile.exp2(-1.4426950408889634 * tile.abs(x))

    def softplus_by(x, y):
        """log(1 + exp(x)) by y = exp(-|x|); log(1 + y) / y by Chebyshev's polynomial, off by 3e-7."""
        ratio = -0.10685003 + y * (0.0434939 - y * 0.008371153)
        ratio = -0.49997175 + y * (0.33271928 + y * (-0.24474774 + y * (0.17687477 + y * ratio)))
        return tile.max(x, 0.0) + y * (0.99999978 + y * ratio)

    @tile.prim_func
    def prepare(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG], "float32"),
        beta: tile.Tensor([B, T, HV], "bfloat16"),
        A_log: tile.Tensor([HG], "float32"),
        dt_bias: tile.Tensor([HG], "float32"),
        chunk_table: tile.Tensor([NT, 2], "int32"),
        q_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_beta: tile.Tensor([NT, HV, BT], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        q_head: tile.Tensor([NT, HV, BT], "float32"),
        k_head: tile.Tensor([NT, HV, BT], "float32"),
        k_tail: tile.Tensor([NT, HV, BT], "float32"),
        gamma_C: tile.Tensor([NT, HV], "float32"),
        log_decay: tile.Tensor([NT, HV, BT], "float32"),
        scale: tile.float32,
        lower_bound: tile.float32,
    ):
        with tile.Kernel(
            tile.ceildiv(NT, CHUNKS), HV, threads=128
        ) as (i_x, i_h):
            i_b = 0
            n_chunks = NT

            # 3 programs to a multiprocessor: 80 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(3)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(136)

            i_first = i_x * CHUNKS
            n_own = tile.if_then_else(chunk_table[i_first, 1] > 0, CHUNKS, 0)
            # held in variables: the compiler would divide again for every load
            i_hq, i_hg = tile.alloc_var("int32"), tile.alloc_var("int32")
            i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
            i_thread = tile.get_thread_binding()

            s_kq = tile.alloc_shared([2 * BT, K], IO)
            s_k_beta = tile.alloc_shared([BT], "float32")
            s_log_decay = tile.alloc_shared([BT], "float32")
            # decay since the chunk's start; its exponential, and that of the decay to the chunk's end
            s_G = tile.alloc_shared([BT], "float32")
            s_head = tile.alloc_shared([BT], "float32")
            s_tail = tile.alloc_shared([BT], "float32")
            x_G = tile.alloc_local([2], "float32")
            x_g = tile.alloc_local([2], "float32")
            s_rstd = tile.alloc_shared([2 * BT], "float32")
            # what belongs to rows, of keys and then of queries, and to columns of keys that are written
            s_row = tile.alloc_shared([2 * BT], "float32")
            s_column = tile.alloc_shared([BT], "float32")
            # rows so long that what a warp writes of the scores lies in banks of its own
            s_T = tile.alloc_shared([BT, BT + 4], "float32")
            s_total = tile.alloc_shared([-(-HALF * HALF // K), K], "float32")
            x_A21 = tile.alloc_local([2], "float32")
            x_A = tile.alloc_local([HALF], "float32")
            s_A = tile.alloc_shared([BT, BT], IO)
            s_Aqk = tile.alloc_shared([BT, BT], IO)
            b_scores = tile.alloc_fragment([2 * BT, 2 * BT], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            for i_n in tile.Pipelined(
                tile.min(n_own, n_chunks - i_first), num_stages=1
            ):
                i_c = i_first + i_n
                i_row = chunk_table[i_c, 0]
                n_rows = chunk_table[i_c, 1]

                # 64 channels at a time: those of half a tile lie together in shared memory
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, 0:64], s_kq[0:BT, 0:64])
                tile.copy(
                    q[i_b, i_row : i_row + BT, i_hq, 0:64], s_kq[BT : 2 * BT, 0:64]
                )
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, 64:128], s_kq[0:BT, 64:128])
                tile.copy(
                    q[i_b, i_row : i_row + BT, i_hq, 64:128], s_kq[BT : 2 * BT, 64:128]
                )
                tile.copy(k_beta[i_c, i_h, :], s_k_beta)

                # on its way during the product: a token a thread, which TMA would not load a number at a time
                x_g[0] = 0.0
                if i_thread < n_rows:
                    x_g[0] = tile.cast(g[i_b, i_row + i_thread, i_hg], "float32")

                # of keys and queries as they are: products of inputs are exact, and norms are factors of them
                tile.clear(b_scores)
                tile.gemm(s_kq, s_kq, b_scores, transpose_B=True)
                if i_thread < BT:
                    if i_thread < n_rows:
                        x_g[0] += dt_bias[i_hg]
                        x_g[1] = exp_below(x_g[0])
                        x_g[0] = -tile.exp(A_log[i_hg]) * softplus_by(x_g[0], x_g[1])
                        x_g[0] = x_g[0] * log2e
                        x_g[0] = tile.if_then_else(x_g[0] < smallest_log2, smallest_log2, x_g[0])
                    s_log_decay[i_thread] = x_g[0]
                tile.sync_threads()
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
                for i, j in tile.Parallel(2 * BT, 2 * BT):
                    if i == j:
                        s_rstd[i] = tile.rsqrt(tile.if_then_else(i % BT < n_rows, b_scores[i, j], 0.0) + 1e-6)
                tile.sync_threads()
                if i_thread < BT:
                    s_row[i_thread] = s_rstd[i_thread]
                    s_row[BT + i_thread] = scale * s_rstd[BT + i_thread]
                    s_column[i_thread] = s_rstd[i_thread] * s_k_beta[i_thread]
                    k_rstd[i_c, i_h, i_thread] = s_rstd[i_thread]
                    q_rstd[i_c, i_h, i_thread] = s_rstd[BT + i_thread]
                    q_head[i_c, i_h, i_thread] = scale * s_rstd[BT + i_thread] * s_head[i_thread]
                    k_head[i_c, i_h, i_thread] = s_rstd[i_thread] * s_head[i_thread]
                    k_tail[i_c, i_h, i_thread] = s_rstd[i_thread] * s_k_beta[i_thread] * s_tail[i_thread]
                    log_decay[i_c, i_h, i_thread] = s_log_decay[i_thread]
                    if i_thread == BT - 1:
                        gamma_C[i_c, i_h] = s_head[i_thread]
                tile.sync_threads()
                hold[0] = tile.cast(s_k_beta[0], "float32")

                for i, j in tile.Parallel(2 * BT, 2 * BT):
                    if j < BT:
                        if i < BT:
                            s_T[j, i] = tile.if_then_else(
                                i < n_rows and i > j,
                                b_scores[i, j] * (s_row[i] * s_column[j]) * tile.exp2(s_G[i] - s_G[j]),
                                0.0,
                            )
                        else:
                            s_Aqk[i - BT, j] = tile.if_then_else(
                                i - BT < n_rows and i - BT >= j,
                                b_scores[i, j] * (s_row[i] * s_column[j]) * tile.exp2(s_G[i - BT] - s_G[j]),
                                0.0,
                            )
                tile.sync_threads()
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
                # the threads store these sooner than one that waits for TMA would
                tile.copy(s_Aqk, Aqk[i_c, i_h, :, :], disable_tma=True)
                tile.copy(s_A, A[i_c, i_h, :, :], disable_tma=True)

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


@triton.jit(do_not_specialize=["T", "HV"])
def activate_beta_kernel(
    beta,
    k_beta,
    chunk_table,
    T,
    HV,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """k_beta of a chunk, BH heads at a time."""
    i_c = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_t = tl.arange(0, BT)
    i_start = tl.load(chunk_table + i_c * 2).to(tl.int64)
    n_rows = tl.load(chunk_table + i_c * 2 + 1)
    m_th = (o_t < n_rows)[:, None] & (o_h < HV)[None, :]
    p_beta = (i_start + o_t)[:, None] * HV + o_h[None, :]
    i_tile = i_c.to(tl.int64) * HV + o_h
    b_beta = tl.load(beta + p_beta, mask=m_th, other=0.0).to(tl.float32)

    p_tile = i_tile[None, :] * BT + o_t[:, None]
    tl.store(k_beta + p_tile, b_beta, mask=(o_h < HV)[None, :])


def launch(
    q, k, g, beta, A_log, dt_bias, chunk_table, q_rstd, k_rstd, k_beta, A, Aqk, q_head, k_head,
    k_tail, gamma_C, log_decay, *, scale, lower_bound, n_chunks, T, H, HV, HG
):
    """Launch both kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    activate_beta_kernel[(n_chunks, -(-HV // BH))](
        beta, k_beta, chunk_table, T, HV, BT=BT, BH=BH, num_warps=1,
    )
    compiled()(
        q, k, g, beta, A_log, dt_bias, chunk_table, q_rstd, k_rstd, k_beta, A, Aqk, q_head,
        k_head, k_tail, gamma_C, log_decay, scale, lower_bound
    )
