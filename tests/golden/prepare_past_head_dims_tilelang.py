"""Score the pairs of a chunk, invert, and make the decayed factors for the scan.

    T     = strict lower triangle of  (gamma b k) (k / gamma)^T        A = (I + T)^-1
    Aqk   = lower triangle of  scale (gamma q) (k / gamma)^T
    Qg    = scale gamma q      E = gamma b k      Y = -A E      Ktail = (gamma_C / gamma) k
                                                                gamma = exp(cumulative decay)

One program per CHUNKS chunks and value head. A thread has two channels and a part of the tokens, so
that the decay is summed over the tokens in registers. k and q lie one above the other in shared
memory, so that one product gives all norms, and so do E and Qg: one product with k / gamma gives T
and Aqk. A warp inverts the halves of I + T by substitution in fp32, a column a thread; Y takes the
place of E. The compiler gives the loads to a warp group of its own.

Rows in which no channel has lost more than 2^-104 since the chunk's start are exact;
later_frames_kernel, in Triton, writes the others.

    q        [B, T, H, K]      bf16  queries; normalised in the kernel
    k        [B, T, H, K]      bf16  keys; normalised in the kernel
    g        [B, T, HG, K]     fp32  pre-activation of the log decay
    b        [B, T, HG, K]     bf16  erase gate
    A_log    [HG]              fp32  log of the decay's rate
    dt_bias  [HG, K]           fp32  added to g before its activation
    q_rstd   [NT, HV, BT]      fp32  1 / norm of q
    k_rstd   [NT, HV, BT]      fp32  1 / norm of k
    A        [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    Aqk      [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    Qg       [NT, HV, BT, K]   bf16  queries, scaled and decayed from the chunk's start
    Y        [NT, HV, BT, K]   bf16  erasing keys through the inverse, -A E
    Ktail    [NT, HV, BT, K]   bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk

Problem: gdn2 K=72 V=40 bf16, g fp32, l2norm, softplus gate
Config:  BK=96 BT=32 chunks=4 decay=anchored language=tilelang maxnreg=80 num_stages=1 num_warps=4 solve=halves
Template digest 9f33dffe18a00345; made by
    gdn2gen generate --op gdn2 --head-dim 72,40 --dtype bf16 --gate-dtype fp32 --gate softplus \
      --with=A_log,dt_bias,initial_state,final_state --stage prepare --config \
      BK=96,BT=32,chunks=4,decay=anchored,language=tilelang,maxnreg=80,num_stages=1,num_warps=4,solve=halves
"""

from functools import cache

import triton
import triton.language as tl


K = 72
KT = 96  # K in tiles of 32 columns: loads past its end give zeros, and nothing is stored there
BT, CHUNKS = 32, 4
THREADS = 128
# two channels a thread, and an equal part of the tokens: shared memory is read 4 bytes at a time
PARTS = 2
PART = BT // PARTS
HALF = BT // 2  # the inverse is made of those of the chunk's halves
IO, GATE = "bfloat16", "float32"
LEAST_GAMMA = tl.constexpr(2.0**-104)
LOOKED_AT = 8  # chunks a program of later_frames_kernel
# Run by few programs, it waits for its own instructions: small slices make fewer of them.
BK = 32
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

# the same numbers for the program in TileLang
log2e, smallest_log2 = LOG2E.value, SMALLEST_LOG2.value
# exp2 and division by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, HG, NT, HV = (
        tile.dynamic(name) for name in ("B", "T", "H", "HG", "NT", "HV")
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
        g: tile.Tensor([B, T, HG, K], "float32"),
        b: tile.Tensor([B, T, HG, K], "bfloat16"),
        A_log: tile.Tensor([HG], "float32"),
        dt_bias: tile.Tensor([HG, K], "float32"),
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
            i_channel = i_thread % (KT // 2) * 2
            # threads that are left over do what the last part's do, and write what those write
            i_part = tile.min(i_thread // (KT // 2), PARTS - 1)
            i_token = i_part * PART

            s_kq = tile.alloc_shared([2 * BT, KT], IO)
            s_b = tile.alloc_shared([BT, KT], IO)
            s_g = tile.alloc_shared([BT, KT], GATE)
            s_rows = tile.alloc_shared([2 * BT, KT], IO)
            s_keys = tile.alloc_shared([BT, KT], IO)
            s_self = tile.alloc_shared([BT], "float32")
            # as large as the inverse of a half, which takes its place
            s_total = tile.alloc_shared([-(-HALF * HALF // KT), KT], "float32")
            s_rstd = tile.alloc_shared([2 * BT], "float32")
            # rows so long that what a warp writes of the scores lies in banks of its own
            s_T = tile.alloc_shared([BT, BT + 4], "float32")
            x_A21 = tile.alloc_local([2], "float32")
            s_A = tile.alloc_shared([BT, BT], IO)
            s_Aqk = tile.alloc_shared([BT, BT], IO)

            b_norms = tile.alloc_fragment([2 * BT, 2 * BT], "float32")
            b_scores = tile.alloc_fragment([2 * BT, BT], "float32")
            b_Y = tile.alloc_fragment([BT, KT], "float32")
            x_G = tile.alloc_local([PART, 2], "float32")
            x_k = tile.alloc_local([PART, 2], "float32")
            x_before = tile.alloc_local([2], "float32")
            x_C = tile.alloc_local([2], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")
            x_A = tile.alloc_local([HALF], "float32")

            for i_n in tile.Pipelined(
                tile.min(CHUNKS, n_chunks - i_first), num_stages=1
            ):
                i_c = i_b * n_chunks + i_first + i_n
                i_row = (i_first + i_n) * BT
                n_rows = tile.min(T - i_row, BT)

                # 32 channels at a time: those of a column of tiles lie together in shared memory
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, 0:32], s_kq[0:BT, 0:32])
                tile.copy(
                    q[i_b, i_row : i_row + BT, i_hq, 0:32], s_kq[BT : 2 * BT, 0:32]
                )
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, 32:64], s_kq[0:BT, 32:64])
                tile.copy(
                    q[i_b, i_row : i_row + BT, i_hq, 32:64], s_kq[BT : 2 * BT, 32:64]
                )
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, 64:96], s_kq[0:BT, 64:96])
                tile.copy(
                    q[i_b, i_row : i_row + BT, i_hq, 64:96], s_kq[BT : 2 * BT, 64:96]
                )
                tile.copy(g[i_b, i_row : i_row + BT, i_hg, 0:KT], s_g)
                tile.copy(b[i_b, i_row : i_row + BT, i_hg, 0:KT], s_b)

                # a token with itself, where no decay lies between, and the norms, from one product of
                # all of k and q with themselves
                tile.clear(b_norms)
                tile.gemm(s_kq, s_kq, b_norms, transpose_B=True)
                for i, j in tile.Parallel(2 * BT, 2 * BT):
                    if i == j:
                        s_rstd[i] = tile.rsqrt(b_norms[i, j] + 1e-6)
                    if i + BT == j:
                        s_self[i] = b_norms[i, j] * scale

                # what the last chunk stores from s_keys is on its way meanwhile
                tile.tma_store_wait(0)
                # two channels and PART tokens a thread
                rate = tile.exp(A_log[i_hg])
                for i in tile.unroll(PART):
                    for c in tile.vectorized(2):
                        x_G[i, c] = tile.cast(s_g[i_token + i, i_channel + c], "float32") + tile.if_then_else(i_channel < K, dt_bias[i_hg, i_channel + c], 0.0)
                for i, c in tile.grid(PART, 2):
                    x_k[i, c] = exp_below(x_G[i, c])
                    x_G[i, c] = -rate * softplus_by(x_G[i, c], x_k[i, c]) * log2e
                    x_G[i, c] = tile.if_then_else(x_G[i, c] < smallest_log2, smallest_log2, x_G[i, c])
                # rows past the end of the sequence are another one's, or have the bias
                for i, c in tile.grid(PART, 2):
                    x_G[i, c] = tile.if_then_else(i_token + i < n_rows and i_channel < K, x_G[i, c], 0.0)
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
                for i in tile.unroll(PART):
                    for c in tile.unroll(2):
                        x_G[i, c] += x_before[c]
                    for c in tile.vectorized(2):
                        x_k[i, c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32") * s_rstd[i_token + i]
                    for c in tile.vectorized(2):
                        s_rows[i_token + i, i_channel + c] = (
                            x_k[i, c]
                            * tile.cast(s_b[i_token + i, i_channel + c], "float32")
                            * tile.exp2(x_G[i, c])
                        )
                    for c in tile.vectorized(2):
                        s_rows[BT + i_token + i, i_channel + c] = (
                            tile.cast(s_kq[BT + i_token + i, i_channel + c], "float32")
                            * (s_rstd[BT + i_token + i] * scale)
                            * tile.exp2(x_G[i, c])
                        )
                    for c in tile.vectorized(2):
                        s_keys[i_token + i, i_channel + c] = x_k[i, c] * tile.exp2(-x_G[i, c])
                # a value of each load of k and q, and of b
                hold[0] = tile.cast(s_kq[0, 0], "float32")
                hold[0] = tile.cast(s_kq[BT, 0], "float32")
                hold[0] = tile.cast(s_kq[0, 32], "float32")
                hold[0] = tile.cast(s_kq[BT, 32], "float32")
                hold[0] = tile.cast(s_kq[0, 64], "float32")
                hold[0] = tile.cast(s_kq[BT, 64], "float32")
                hold[0] = tile.cast(s_b[0, 0], "float32")

                if i_part == 0 and i_channel < K:
                    for c in tile.vectorized(2):
                        gamma_C[i_c, i_h, i_channel + c] = tile.exp2(x_C[c])
                tile.sync_threads()

                tile.clear(b_scores)
                tile.gemm(s_rows, s_keys, b_scores, transpose_B=True)
                for i, j in tile.Parallel(2 * BT, BT):
                    if i < BT:
                        s_T[j, i] = b_scores[i, j]
                    else:
                        s_Aqk[i - BT, j] = tile.if_then_else(i - BT > j, b_scores[i, j], 0.0)
                tile.sync_threads()

                if i_thread >= THREADS - BT:
                    i_own = i_thread - (THREADS - BT)
                    s_Aqk[i_own, i_own] = s_self[i_own] * s_rstd[i_own] * s_rstd[BT + i_own]
                for i in tile.unroll(PART):
                    for c in tile.vectorized(2):
                        s_keys[i_token + i, i_channel + c] = x_k[i, c] * tile.exp2(x_C[c] - x_G[i, c])
                tile.copy(s_rows[BT : 2 * BT, :], Qg[i_c, i_h, :, 0:KT], disable_tma=True)
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
                                s_total[(i_thread - HALF) * HALF // KT, (i_thread - HALF) * HALF % KT + i * 4 + c] = x_A[i * 4 + c]
                tile.sync_threads()
                # A21 = -A22 (T21 A11); of each quarter of A two columns of a row a thread
                i_i, i_j = i_thread * 2 // HALF, i_thread * 2 % HALF
                for c in tile.vectorized(2):
                    s_A[i_i, i_j + c] = s_T[HALF + i_i, i_j + c]
                for c in tile.vectorized(2):
                    s_A[i_i, HALF + i_j + c] = 0.0
                for c in tile.unroll(2):
                    x_A21[c] = s_total[(i_j + c) * HALF // KT, (i_j + c) * HALF % KT + i_i]
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
                        x_A21[c] -= s_total[m * HALF // KT, m * HALF % KT + i_i] * s_T[m, i_j + c]
                for c in tile.vectorized(2):
                    s_A[HALF + i_i, i_j + c] = x_A21[c]
                tile.sync_threads()
                tile.clear(b_Y)
                tile.gemm(s_A, s_rows[0:BT, :], b_Y)
                for i, j in tile.Parallel(BT, KT):
                    b_Y[i, j] = -b_Y[i, j]
                tile.sync_threads()
                tile.copy(b_Y, s_rows[0:BT, :])
                tile.sync_threads()
                tile.copy(s_rows[0:BT, :], Y[i_c, i_h, :, 0:KT], disable_tma=True)
                tile.tma_copy(s_keys, Ktail[i_c, i_h, :, 0:KT])
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


# Factors stay within this range in log2 of their anchor: fp32 and bf16 end at 2^127, and the rest is
# room for gradients and sums.
RANGE = tl.constexpr(104.0)


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
def meet_at(i_level, i, j):
    """Whether row i is in the upper and column j in the lower half of a block of 2 << i_level.

    Halves are numbered, the upper ones odd: one comparison a pair, the rest per row or column.
    """
    i_half = i >> i_level
    return tl.where(i_half % 2 == 1, i_half - 1, -1) == (j >> i_level)


@triton.jit
def score(b_T, b_Aqk, b_q_row, b_e_row, b_k_column):
    """Add what one slice of channels contributes to the scores of all pairs."""
    b_column = tl.trans(b_k_column)
    b_T = tl.dot(b_e_row, b_column, b_T)
    return b_T, tl.dot(b_q_row, b_column, b_Aqk)


@triton.jit
def invert(b_T, BT: tl.constexpr):
    """(I + T)^-1 by merging inverted diagonal blocks: X <- X - X L X, L the part below them."""
    o_t = tl.arange(0, BT)
    b_X = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0)
    b_X -= tl.where(meet_at(0, o_t[:, None], o_t[None, :]), b_T, 0.0)
    for i_level in tl.static_range(1, 5):
        b_L = tl.where(meet_at(i_level, o_t[:, None], o_t[None, :]), b_T, 0.0)
        b_XL = tl.dot(b_X, b_L, input_precision="tf32")
        b_X -= tl.dot(b_XL, b_X, input_precision="tf32")
    return b_X


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG", "NT"])
def later_frames_kernel(
    q,
    k,
    g,
    b,
    A_log,
    dt_bias,
    q_rstd,
    k_rstd,
    A,
    Aqk,
    Qg,
    Y,
    Ktail,
    gamma_C,
    scale,
    lower_bound,
    T,
    H,
    HV,
    HG,
    NT,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    LOOKED_AT: tl.constexpr,
):
    """Write the rows of A, Aqk and Y in which some channel is out of the first frame.

    Other rows are left as they are, bit for bit: a later token's decay must not move them.
    """
    i_first, i_h = tl.program_id(0) // HV * LOOKED_AT, tl.program_id(0) % HV
    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    o_t = tl.arange(0, BT)
    # one look at all chunks: where none is left to do, which is the rule, this is all
    i_all = tl.minimum(i_first + tl.arange(0, LOOKED_AT), NT - 1).to(tl.int64)
    o_all = tl.arange(0, 128)
    b_all = tl.load(gamma_C + (i_all * HV + i_h)[:, None] * K + o_all[None, :], mask=(o_all < K)[None, :], other=1.0)
    b_least = tl.min(b_all)
    n_left = tl.where(b_least < LEAST_GAMMA, tl.minimum(LOOKED_AT, NT - i_first), 0)
    for i_n in range(n_left):
        i_c = i_first + i_n
        i_tile = i_c.to(tl.int64) * HV + i_h
        n_chunks = tl.cdiv(T, BT)
        i_t = (i_c % n_chunks) * BT
        i_start = (i_c // n_chunks).to(tl.int64) * T + i_t
        n_rows = tl.minimum(T - i_t, BT)
        m_t = o_t < n_rows
        b_least = tl.min(tl.load(gamma_C + i_tile * K + o_all, mask=o_all < K, other=1.0))
        if tl.where(b_least < LEAST_GAMMA, n_rows, 0) > 0:
            b_q_rstd = tl.load(q_rstd + i_tile * BT + o_t) * scale
            b_k_rstd = tl.load(k_rstd + i_tile * BT + o_t)
            b_T = tl.zeros([BT, BT], tl.float32)
            b_Aqk = tl.zeros([BT, BT], tl.float32)
            b_self = tl.zeros([BT], tl.float32)
            b_lowest = tl.zeros([BT], tl.float32)
            for i_k in range(0, K, BK):
                o_k = i_k + tl.arange(0, BK)
                m_tk = m_t[:, None] & (o_k < K)[None, :]
                p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
                p_g = (i_start * HG + i_hg) * K + o_t[:, None] * (HG * K) + o_k[None, :]
                b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
                b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
                b_q *= b_q_rstd[:, None]
                b_k *= b_k_rstd[:, None]
                b_e = b_k * tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)
                b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
                b_g += tl.load(dt_bias + i_hg * K + o_k, mask=o_k < K, other=0.0)[None, :]
                b_rate = tl.exp(tl.load(A_log + i_hg).to(tl.float32))
                b_g = -b_rate * softplus(b_g)
                b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
                b_decay = tl.where(m_tk, b_decay, 0.0)
                b_G = tl.cumsum(b_decay, 0)
                b_self += tl.sum(b_q * b_k, 1)
                b_lowest = tl.minimum(b_lowest, tl.min(b_G, 1))
                b_G_C = tl.min(b_G, 0)
                b_anchor = tl.full([BK], 2.0 * RANGE, tl.float32)
                while tl.max(b_anchor - b_G_C) > RANGE:
                    b_anchor, b_row, b_column = next_frame(b_G, b_anchor)
                    b_q_row = (b_q * b_row).to(tl.bfloat16)
                    b_e_row = (b_e * b_row).to(tl.bfloat16)
                    b_k_column = (b_k * b_column).to(tl.bfloat16)
                    b_T, b_Aqk = score(b_T, b_Aqk, b_q_row, b_e_row, b_k_column)
            o_i, o_j = o_t[:, None], o_t[None, :]
            p_score = i_tile * BT * BT + o_i * BT + o_j
            m_later = (b_lowest < -RANGE)[:, None] & (o_j < BT)
            b_Aqk = tl.where(o_i > o_j, b_Aqk, tl.where(o_i == o_j, b_self[:, None], 0.0))
            tl.store(Aqk + p_score, b_Aqk.to(tl.bfloat16), mask=m_later)
            b_A = invert(b_T, BT).to(tl.bfloat16)
            tl.store(A + p_score, b_A, mask=m_later)
            for i_k in range(0, K, BK):
                o_k = i_k + tl.arange(0, BK)
                m_tk = m_t[:, None] & (o_k < K)[None, :]
                p_q = (i_start * H + i_hq) * K + o_t[:, None] * (H * K) + o_k[None, :]
                p_g = (i_start * HG + i_hg) * K + o_t[:, None] * (HG * K) + o_k[None, :]
                b_q = tl.load(q + p_q, mask=m_tk, other=0.0).to(tl.float32)
                b_k = tl.load(k + p_q, mask=m_tk, other=0.0).to(tl.float32)
                b_q *= b_q_rstd[:, None]
                b_k *= b_k_rstd[:, None]
                b_e = b_k * tl.load(b + p_g, mask=m_tk, other=0.0).to(tl.float32)
                b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
                b_g += tl.load(dt_bias + i_hg * K + o_k, mask=o_k < K, other=0.0)[None, :]
                b_rate = tl.exp(tl.load(A_log + i_hg).to(tl.float32))
                b_g = -b_rate * softplus(b_g)
                b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
                b_decay = tl.where(m_tk, b_decay, 0.0)
                b_G = tl.cumsum(b_decay, 0)
                b_Y = -tl.dot(b_A, (b_e * tl.exp2(b_G)).to(tl.bfloat16))
                p_tile = i_tile * BT * K + o_t[:, None] * K + o_k[None, :]
                m_rows = (b_lowest < -RANGE)[:, None] & (o_k < K)[None, :]
                tl.store(Y + p_tile, b_Y.to(tl.bfloat16), mask=m_rows)


def launch(
    q, k, g, b, A_log, dt_bias, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, *, scale,
    lower_bound, n_chunks, T, H, HV, HG
):
    """Launch both kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, b, A_log, dt_bias, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, scale,
        lower_bound
    )
    later_frames_kernel[(-(-n_chunks // LOOKED_AT) * HV,)](
        q, k, g, b, A_log, dt_bias, q_rstd, k_rstd, A, Aqk, Qg, Y, Ktail, gamma_C, scale,
        lower_bound, T, H, HV, HG,
        NT=n_chunks, K=K, BT=BT, BK=BK, LOOKED_AT=LOOKED_AT,
        num_warps=4, num_stages=1, maxnreg=128,
    )
