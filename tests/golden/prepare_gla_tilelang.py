"""Score the pairs of a chunk and make the decayed factors for the scan.

    Aqk   = lower triangle of  scale (gamma q) (k / gamma)^T
    Qg    = scale gamma q      Ktail = (gamma_C / gamma) k
                                                                gamma = exp(cumulative decay)

One program per CHUNKS chunks and value head. A thread has two channels and a part of the tokens, so
that the decay is summed over the tokens in registers. The compiler gives the loads to a warp group of its own.

Rows in which no channel has lost more than 2^-64 since the chunk's start are exact;
later_frames_kernel, in Triton, writes the others.

    q        [B, T, H, K]      bf16  queries
    k        [B, T, H, K]      bf16  keys
    g        [B, T, HG, K]     fp32  log decay
    Aqk      [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    Qg       [NT, HV, BT, K]   bf16  queries, scaled and decayed from the chunk's start
    Ktail    [NT, HV, BT, K]   bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk

Problem: gla K=128 V=128 bf16, g fp32
Config:  BK=128 BT=32 chunks=4 decay=anchored language=tilelang maxnreg=80 num_stages=1 num_warps=4 solve=ieee
Template digest 9f33dffe18a00345; made by
    gdn2gen generate --op gla --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage prepare --config \
      BK=128,BT=32,chunks=4,decay=anchored,language=tilelang,maxnreg=80,num_stages=1,num_warps=4,solve=ieee
"""

from functools import cache

import triton
import triton.language as tl


K = 128
BT, CHUNKS = 32, 4
THREADS = 128
# two channels a thread, and an equal part of the tokens: shared memory is read 4 bytes at a time
PARTS = 128 // (K // 2)
PART = BT // PARTS
IO, GATE = "bfloat16", "float32"
LEAST_GAMMA = tl.constexpr(2.0**-64)
LOOKED_AT = 8  # chunks a program of later_frames_kernel
# Run by few programs, it waits for its own instructions: small slices make fewer of them.
BK = 32
LOG2E = tl.constexpr(1.4426950408889634)
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
SMALLEST_LOG2 = tl.constexpr(-150.0)

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
            s_self = tile.alloc_shared([BT], "float32")
            s_total = tile.alloc_shared([PARTS, K], "float32")
            s_Aqk = tile.alloc_shared([BT, BT], IO)

            b_norms = tile.alloc_fragment([2 * BT, 2 * BT], "float32")
            b_scores = tile.alloc_fragment([BT, BT], "float32")
            x_G = tile.alloc_local([PART, 2], "float32")
            x_k = tile.alloc_local([PART, 2], "float32")
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

                # a token with itself, where no decay lies between from one product of
                # all of k and q with themselves
                tile.clear(b_norms)
                tile.gemm(s_kq, s_kq, b_norms, transpose_B=True)
                for i, j in tile.Parallel(2 * BT, 2 * BT):
                    if i + BT == j:
                        s_self[i] = b_norms[i, j] * scale

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

                for i in tile.unroll(PART):
                    for c in tile.unroll(2):
                        x_G[i, c] += x_before[c]
                    for c in tile.vectorized(2):
                        x_k[i, c] = tile.cast(s_kq[i_token + i, i_channel + c], "float32")
                    for c in tile.vectorized(2):
                        s_rows[i_token + i, i_channel + c] = (
                            tile.cast(s_kq[BT + i_token + i, i_channel + c], "float32")
                            * (scale)
                            * tile.exp2(x_G[i, c])
                        )
                    for c in tile.vectorized(2):
                        s_keys[i_token + i, i_channel + c] = x_k[i, c] * tile.exp2(-x_G[i, c])
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
                for i, j in tile.Parallel(BT, BT):
                    s_Aqk[i, j] = tile.if_then_else(i > j, b_scores[i, j], 0.0)
                tile.sync_threads()

                if i_thread >= THREADS - BT:
                    i_own = i_thread - (THREADS - BT)
                    s_Aqk[i_own, i_own] = s_self[i_own]
                for i in tile.unroll(PART):
                    for c in tile.vectorized(2):
                        s_keys[i_token + i, i_channel + c] = x_k[i, c] * tile.exp2(x_C[c] - x_G[i, c])
                tile.copy(s_rows, Qg[i_c, i_h, :, :], disable_tma=True)
                tile.sync_threads()
                tile.tma_copy(s_keys, Ktail[i_c, i_h, :, :])
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
def score(b_Aqk, b_q_row, b_k_column):
    """Add what one slice of channels contributes to the scores of all pairs."""
    return tl.dot(b_q_row, tl.trans(b_k_column), b_Aqk)


@triton.jit(do_not_specialize=["scale", "lower_bound", "T", "H", "HV", "HG", "NT"])
def later_frames_kernel(
    q,
    k,
    g,
    Aqk,
    Qg,
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
    """Write the rows of Aqk in which some channel is out of the first frame.

    Other rows are left as they are, bit for bit: a later token's decay must not move them.
    """
    i_first, i_h = tl.program_id(0) // HV * LOOKED_AT, tl.program_id(0) % HV
    i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
    o_t = tl.arange(0, BT)
    # one look at all chunks: where none is left to do, which is the rule, this is all
    i_all = tl.minimum(i_first + tl.arange(0, LOOKED_AT), NT - 1).to(tl.int64)
    o_all = tl.arange(0, K)
    b_all = tl.load(gamma_C + (i_all * HV + i_h)[:, None] * K + o_all[None, :])
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
        b_least = tl.min(tl.load(gamma_C + i_tile * K + o_all))
        if tl.where(b_least < LEAST_GAMMA, n_rows, 0) > 0:
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
                b_q *= scale
                b_g = tl.load(g + p_g, mask=m_tk, other=0.0).to(tl.float32)
                b_decay = tl.maximum(b_g * LOG2E, SMALLEST_LOG2, propagate_nan=tl.PropagateNan.ALL)
                b_G = tl.cumsum(b_decay, 0)
                b_self += tl.sum(b_q * b_k, 1)
                b_lowest = tl.minimum(b_lowest, tl.min(b_G, 1))
                b_G_C = tl.min(b_G, 0)
                b_anchor = tl.full([BK], 2.0 * RANGE, tl.float32)
                while tl.max(b_anchor - b_G_C) > RANGE:
                    b_anchor, b_row, b_column = next_frame(b_G, b_anchor)
                    b_q_row = (b_q * b_row).to(tl.bfloat16)
                    b_k_column = (b_k * b_column).to(tl.bfloat16)
                    b_Aqk = score(b_Aqk, b_q_row, b_k_column)
            o_i, o_j = o_t[:, None], o_t[None, :]
            p_score = i_tile * BT * BT + o_i * BT + o_j
            m_later = (b_lowest < -RANGE)[:, None] & (o_j < BT)
            b_Aqk = tl.where(o_i > o_j, b_Aqk, tl.where(o_i == o_j, b_self[:, None], 0.0))
            tl.store(Aqk + p_score, b_Aqk.to(tl.bfloat16), mask=m_later)


def launch(
    q, k, g, Aqk, Qg, Ktail, gamma_C, *, scale, lower_bound, n_chunks, T, H, HV, HG
):
    """Launch both kernels on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, Aqk, Qg, Ktail, gamma_C, scale, lower_bound
    )
    later_frames_kernel[(-(-n_chunks // LOOKED_AT) * HV,)](
        q, k, g, Aqk, Qg, Ktail, gamma_C, scale, lower_bound, T, H, HV, HG,
        NT=n_chunks, K=K, BT=BT, BK=BK, LOOKED_AT=LOOKED_AT,
        num_warps=4, num_stages=1, maxnreg=128,
    )
