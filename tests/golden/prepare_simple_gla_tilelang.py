"""Score the pairs of a chunk and leave what scans need beside q and k.

One program per CHUNKS chunks and value head. The decay is one number a token, so that it stays outside of the
products: D_ij is what the state keeps from token j to token i, a sum of log decays that is never
positive, and one matrix of it serves all channels.

    Aqk_ij = D_ij <q_i, k_j> scale, i >= j
    q_head = gamma scale      k_tail = (gamma_C / gamma)
                                                                gamma = exp(cumulative decay)

The compiler gives the loads to a
warp group of its own.

    q          [B, T, H, K]      bf16  queries
    k          [B, T, H, K]      bf16  keys
    g          [B, T, HG]        fp32  log decay
    Aqk        [NT, HV, BT, BT]  bf16  decayed scores, lower triangle
    q_head     [NT, HV, BT]      fp32  scale, decayed from the chunk's start
    k_tail     [NT, HV, BT]      fp32  decay to the chunk's end
    gamma_C    [NT, HV]          fp32  decay of the whole chunk
    log_decay  [NT, HV, BT]      fp32  decay of each token, log2

Problem: simple_gla K=128 V=128 bf16, g fp32
Config:  BK=128 BT=32 chunks=4 decay=outside language=tilelang maxnreg=80 num_stages=1 num_warps=4 solve=ieee
Template digest d242b10dc991acd9; made by
    gdn2gen generate --op simple_gla --head-dim 128,128 --dtype bf16 --gate-dtype fp32 --gate \
      none --with= --stage prepare --config \
      BK=128,BT=32,chunks=4,decay=outside,language=tilelang,maxnreg=80,num_stages=1,num_warps=4,solve=ieee
"""

from functools import cache


K = 128
BT, CHUNKS = 32, 4
IO = "bfloat16"
log2e = 1.4426950408889634
# exp2 of this is 0 in fp32: a clamp that changes no result, and keeps g = -inf out of differences.
smallest_log2 = -150.0
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
        g: tile.Tensor([B, T, HG], "float32"),
        Aqk: tile.Tensor([NT, HV, BT, BT], "bfloat16"),
        q_head: tile.Tensor([NT, HV, BT], "float32"),
        k_tail: tile.Tensor([NT, HV, BT], "float32"),
        gamma_C: tile.Tensor([NT, HV], "float32"),
        log_decay: tile.Tensor([NT, HV, BT], "float32"),
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
            # held in variables: the compiler would divide again for every load
            i_hq, i_hg = tile.alloc_var("int32"), tile.alloc_var("int32")
            i_hq, i_hg = i_h // (HV // H), i_h // (HV // HG)
            i_thread = tile.get_thread_binding()

            s_k = tile.alloc_shared([BT, K], IO)
            s_q = tile.alloc_shared([BT, K], IO)
            s_log_decay = tile.alloc_shared([BT], "float32")
            # decay since the chunk's start; its exponential, and that of the decay to the chunk's end
            s_G = tile.alloc_shared([BT], "float32")
            s_head = tile.alloc_shared([BT], "float32")
            s_tail = tile.alloc_shared([BT], "float32")
            x_G = tile.alloc_local([2], "float32")
            x_g = tile.alloc_local([2], "float32")
            # what belongs to rows and to columns of keys that are written
            s_row = tile.alloc_shared([BT], "float32")
            s_column = tile.alloc_shared([BT], "float32")
            s_Aqk = tile.alloc_shared([BT, BT], IO)
            b_scores = tile.alloc_fragment([BT, BT], "float32")
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            for i_n in tile.Pipelined(
                tile.min(CHUNKS, n_chunks - i_first), num_stages=1
            ):
                i_c = i_b * n_chunks + i_first + i_n
                i_row = (i_first + i_n) * BT
                n_rows = tile.min(T - i_row, BT)

                tile.copy(k[i_b, i_row : i_row + BT, i_hq, :], s_k)
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, :], s_q)

                # on its way during the product: a token a thread, which TMA would not load a number at a time
                x_g[0] = 0.0
                if i_thread < n_rows:
                    x_g[0] = tile.cast(g[i_b, i_row + i_thread, i_hg], "float32")

                # of keys and queries as they are: products of inputs are exact, and norms are factors of them
                tile.clear(b_scores)
                tile.gemm(s_q, s_k, b_scores, transpose_B=True)
                if i_thread < BT:
                    if i_thread < n_rows:
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
                if i_thread < BT:
                    s_row[i_thread] = scale
                    s_column[i_thread] = 1.0
                    q_head[i_c, i_h, i_thread] = scale * s_head[i_thread]
                    k_tail[i_c, i_h, i_thread] = s_tail[i_thread]
                    log_decay[i_c, i_h, i_thread] = s_log_decay[i_thread]
                    if i_thread == BT - 1:
                        gamma_C[i_c, i_h] = s_head[i_thread]
                tile.sync_threads()

                for i, j in tile.Parallel(BT, BT):
                    s_Aqk[i, j] = tile.if_then_else(
                        i >= j,
                        b_scores[i, j] * (s_row[i] * s_column[j]) * tile.exp2(s_G[i] - s_G[j]),
                        0.0,
                    )
                tile.sync_threads()
                # the threads store these sooner than one that waits for TMA would
                tile.copy(s_Aqk, Aqk[i_c, i_h, :, :], disable_tma=True)

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
    q, k, g, Aqk, q_head, k_tail, gamma_C, log_decay, *, scale, lower_bound, n_chunks, T, H, HV,
    HG
):
    """Launch one program per CHUNKS chunks and value head on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(
        q, k, g, Aqk, q_head, k_tail, gamma_C, log_decay, scale, lower_bound
    )
