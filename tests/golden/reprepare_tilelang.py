"""Sum the decay over each chunk, and make the factors for the scans again.

    Qg = scale gamma q      E = gamma b k      Y = -A E      Ktail = (gamma_C / gamma) k
                                                             gamma = exp(cumulative decay)

One program per CHUNKS chunks and value head. A thread has two channels and a part of the tokens, so
that the decay is summed over the tokens in registers. The compiler gives the loads to a warp group of
its own.

    q        [B, T, H, K]      bf16  queries; normalised in the kernel
    k        [B, T, H, K]      bf16  keys; normalised in the kernel
    g        [B, T, HG, K]     fp32  log decay
    b        [B, T, HG, K]     bf16  erase gate
    q_rstd   [NT, HV, BT]      fp32  1 / norm of q
    k_rstd   [NT, HV, BT]      fp32  1 / norm of k
    A        [NT, HV, BT, BT]  bf16  inverse of I + T, lower triangle
    G        [B, T, HV, K]     fp32  decay since the chunk's start, log2
    Qg       [NT, HV, BT, K]   bf16  queries, scaled and decayed from the chunk's start
    Y        [NT, HV, BT, K]   bf16  erasing keys through the inverse, -A E
    Ktail    [NT, HV, BT, K]   bf16  keys, decayed to the chunk's end
    gamma_C  [NT, HV, K]       fp32  decay of the whole chunk

Problem: gdn2 K=128 V=128 bf16, g fp32, l2norm
Config:  BK=128 BT=32 chunks=4 language=tilelang maxnreg=80 num_stages=1 num_warps=4
Template digest ba95b2e5af799f1b; made by
    gdn2gen generate --op gdn2 --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate none \
      --with= --stage reprepare --config \
      BK=128,BT=32,chunks=4,language=tilelang,maxnreg=80,num_stages=1,num_warps=4
"""

from functools import cache


K = 128
BT, CHUNKS = 32, 4
# two channels a thread, and an equal part of the tokens: shared memory is read 4 bytes at a time
PARTS = 128 // (K // 2)
PART = BT // PARTS
IO, GATE = "bfloat16", "float32"
log2e = 1.4426950408889634
smallest_log2 = -150.0  # exp2 of this is 0 in fp32; it keeps g = -inf out of differences
# exp2 and division by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile

    B, T, H, HG, NT, HV = (
        tile.dynamic(name) for name in ("B", "T", "H", "HG", "NT", "HV")
    )

    @tile.prim_func
    def reprepare(
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        g: tile.Tensor([B, T, HG, K], "float32"),
        b: tile.Tensor([B, T, HG, K], "bfloat16"),
        q_rstd: tile.Tensor([NT, HV, BT], "float32"),
        k_rstd: tile.Tensor([NT, HV, BT], "float32"),
        A: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        G: tile.Tensor([B, T, HV, K], "float32"),
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
            i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
            i_thread = tile.get_thread_binding()
            i_channel = i_thread % (K // 2) * 2
            i_part = i_thread // (K // 2)
            i_token = i_part * PART

            s_g = tile.alloc_shared([BT, K], GATE)
            s_total = tile.alloc_shared([PARTS, K], "float32")
            x_G = tile.alloc_local([PART, 2], "float32")
            x_k = tile.alloc_local([PART, 2], "float32")
            x_before = tile.alloc_local([2], "float32")
            x_C = tile.alloc_local([2], "float32")
            s_q = tile.alloc_shared([BT, K], IO)
            s_k = tile.alloc_shared([BT, K], IO)
            s_b = tile.alloc_shared([BT, K], IO)
            s_A = tile.alloc_shared([BT, BT], IO)
            s_q_rstd = tile.alloc_shared([BT], "float32")
            s_k_rstd = tile.alloc_shared([BT], "float32")
            s_E = tile.alloc_shared([BT, K], IO)
            s_Qg = tile.alloc_shared([BT, K], IO)
            s_Ktail = tile.alloc_shared([BT, K], IO)
            b_Y = tile.alloc_fragment([BT, K], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            for i_n in tile.Pipelined(
                tile.min(CHUNKS, n_chunks - i_first), num_stages=1
            ):
                i_c = i_b * n_chunks + i_first + i_n
                i_row = (i_first + i_n) * BT
                n_rows = tile.min(T - i_row, BT)

                tile.copy(g[i_b, i_row : i_row + BT, i_hg, :], s_g)
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, :], s_k)
                tile.copy(b[i_b, i_row : i_row + BT, i_hg, :], s_b)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, :], s_q)
                tile.copy(k_rstd[i_c, i_h, :], s_k_rstd)
                tile.copy(q_rstd[i_c, i_h, :], s_q_rstd)
                tile.copy(A[i_c, i_h, :, :], s_A)

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
                for i in tile.unroll(PART):
                    for c in tile.unroll(2):
                        x_G[i, c] += x_before[c]
                    if i_token + i < n_rows:
                        for c in tile.vectorized(2):
                            G[i_b, i_row + i_token + i, i_h, i_channel + c] = x_G[i, c]
                for i in tile.unroll(PART):
                    for c in tile.vectorized(2):
                        x_k[i, c] = tile.cast(s_k[i_token + i, i_channel + c], "float32") * s_k_rstd[i_token + i]
                    for c in tile.vectorized(2):
                        s_E[i_token + i, i_channel + c] = (
                            x_k[i, c]
                            * tile.cast(s_b[i_token + i, i_channel + c], "float32")
                            * tile.exp2(x_G[i, c])
                        )
                    for c in tile.vectorized(2):
                        s_Qg[i_token + i, i_channel + c] = (
                            tile.cast(s_q[i_token + i, i_channel + c], "float32")
                            * (s_q_rstd[i_token + i] * scale)
                            * tile.exp2(x_G[i, c])
                        )
                    for c in tile.vectorized(2):
                        s_Ktail[i_token + i, i_channel + c] = x_k[i, c] * tile.exp2(x_C[c] - x_G[i, c])
                if i_part == 0:
                    for c in tile.vectorized(2):
                        gamma_C[i_c, i_h, i_channel + c] = tile.exp2(x_C[c])
                tile.sync_threads()
                tile.clear(b_Y)
                tile.gemm(s_A, s_E, b_Y)
                hold[0] = tile.cast(s_q[0, 0], "float32")
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_g[0, 0], "float32")
                hold[0] = tile.cast(s_b[0, 0], "float32")
                hold[0] = tile.cast(s_A[0, 0], "float32")
                hold[0] = tile.cast(s_q_rstd[0], "float32")
                hold[0] = tile.cast(s_k_rstd[0], "float32")

                tile.copy(s_Qg, Qg[i_c, i_h, :, :], disable_tma=True)
                for i, j in tile.Parallel(BT, K):
                    b_Y[i, j] = -b_Y[i, j]
                tile.sync_threads()
                tile.copy(b_Y, s_E)
                tile.sync_threads()
                tile.copy(s_E, Y[i_c, i_h, :, :], disable_tma=True)
                tile.copy(s_Ktail, Ktail[i_c, i_h, :, :])

    return reprepare


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
    q, k, g, b, q_rstd, k_rstd, A, G, Qg, Y, Ktail, gamma_C, *, scale, lower_bound, n_chunks, T,
    H, HV, HG
):
    """Launch one program per CHUNKS chunks and value head on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, b, q_rstd, k_rstd, A, G, Qg, Y, Ktail, gamma_C, scale, lower_bound
    )
