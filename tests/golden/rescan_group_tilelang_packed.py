"""Scan the chunks of each segment in order, keeping what the backward needs, heads by the q and k of a group.

One program per segment, value head and slice of V: the forward left the state at every segment's
start, so that segments run side by side. The state is held transposed, S^T [BV, K], in registers.

    S^T <- S^T gamma_C + (v^T tail step) k

where what the state keeps is
tail from a token to the chunk's end, and gamma_C over all of it: factors of no channel.

The compiler gives the loads to a warp group of its own, and every tile a barrier: two programs share a multiprocessor.

    v              [B, T, HV, V]      bf16   values
    k              [B, T, H, K]       bf16   keys
    log_decay      [NT, HV, BT]       fp32   decay of each token, log2
    step           [NT, HV, BT]       fp32   step of each token, after its activation
    S_seg          [N, HV, NS, V, K]  fp32   state at the segment's start, transposed
    cu_seqlens     [N+1]              int32  first token of each sequence
    chunk_offsets  [N+1]              int32  first chunk of each sequence
    h              [NT, HV, V, K]     bf16   state at the chunk's start, transposed

Problem: mamba2 K=128 V=64 bf16, g bf16, softplus gate, packed sequences
Config:  BT=64 BV=64 gating=inside heads=1 language=tilelang num_stages=1 num_warps=4
Template digest 1252bf6599366bfc; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,varlen,rate,D --stage rescan_group --config \
      BT=64,BV=64,gating=inside,heads=1,language=tilelang,num_stages=1,num_warps=4
"""

from functools import cache


K, V = 128, 64
BT, BV = 64, 64
IO = "bfloat16"
# exp2 and rsqrt by the hardware, flushing what is below 2^-126 to zero
PASSES = {"tl.enable_fast_math": True}


def program():
    """The program, for any number of sequences, tokens and heads."""
    import tilelang.language as tile
    from tilelang.layout import make_swizzled_layout

    B, T, HV, H, NT, N, NS, N1 = (
        tile.dynamic(name) for name in ("B", "T", "HV", "H", "NT", "N", "NS", "N1")
    )
    # a warp keeps whole rows, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def rescan_group(
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        log_decay: tile.Tensor([NT, HV, BT], "float32"),
        step: tile.Tensor([NT, HV, BT], "float32"),
        S_seg: tile.Tensor([N, HV, NS, V, K], "float32"),
        cu_seqlens: tile.Tensor([N1], "int32"),
        chunk_offsets: tile.Tensor([N1], "int32"),
        h: tile.Tensor([NT, HV, V, K], "bfloat16"),
    ):
        # three dims: divisions in every address would be a third of all instructions, or 5 of 6
        with tile.Kernel(
            V // BV * NS, HV, (N1 - 1), threads=128
        ) as (i_x, i_h, i_n):
            # 2 programs to a multiprocessor: 128 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(2)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(232)

            i_v = i_x % (V // BV)
            i_s = i_x // (V // BV)
            i_first = chunk_offsets[i_n]
            n_chunks = chunk_offsets[i_n + 1] - i_first
            i_b = 0
            i_start = cu_seqlens[i_n]
            n_tokens = cu_seqlens[i_n + 1] - i_start

            # held in a variable: the compiler would divide again for every load
            i_hq = tile.alloc_var("int32")
            i_hq = i_h // (HV // H)
            i_thread = tile.get_thread_binding()
            s_k = tile.alloc_shared([BT, K], IO)
            s_v = tile.alloc_shared([BT, BV], IO)
            s_own_k = tile.alloc_shared([BT, K], IO)
            s_own_v = tile.alloc_shared([BT, BV], IO)
            # the state as products read it, and as it is kept
            s_h = tile.alloc_shared([BV, K], IO)
            b_h = tile.alloc_fragment([BV, K], IO)
            b_S = tile.alloc_fragment([BV, K], "float32")
            b_added = tile.alloc_fragment([BV, BT], "float32")
            b_outer = tile.alloc_fragment([BV, BT], IO)
            s_log_decay = tile.alloc_shared([BT], "float32")
            s_step = tile.alloc_shared([BT], "float32")
            # decay since the chunk's start, its exponential, and that of the decay to its end, times the step
            s_G = tile.alloc_shared([BT], "float32")
            s_steps = tile.alloc_shared([BT], "float32")
            s_head = tile.alloc_shared([BT], "float32")
            s_tail = tile.alloc_shared([BT], "float32")
            x_sum = tile.alloc_local([4], "float32")
            tile.annotate_layout({s_own_v: make_swizzled_layout(s_own_v)})
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")

            for i, j in tile.Parallel(BV, K):
                b_S[i, j] = S_seg[i_n, i_h, i_s, i_v * BV + i, j]
            for i_t in tile.Pipelined(n_chunks, num_stages=1):
                i_c = i_first + i_t
                i_row = i_start + i_t * BT
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, :], s_k)
                tile.copy(log_decay[i_c, i_h, :], s_log_decay)
                tile.copy(step[i_c, i_h, :], s_step)
                tile.copy(v[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_v)

                for i, j in tile.Parallel(BT, K):
                    s_own_k[i, j] = tile.if_then_else(i_t * BT + i < n_tokens, s_k[i, j], tile.cast(0, IO))
                for i, j in tile.Parallel(BT, BV):
                    s_own_v[i, j] = tile.if_then_else(i_t * BT + i < n_tokens, s_v[i, j], tile.cast(0, IO))
                for i, j in tile.Parallel(BV, BT):
                    b_outer[i, j] = s_own_v[j, i]
                tile.copy(b_S, b_h)
                tile.tma_store_wait(0)
                if i_thread < 32:
                    x_sum[0] = s_log_decay[2 * i_thread]
                    x_sum[1] = x_sum[0] + s_log_decay[2 * i_thread + 1]
                    x_sum[2] = tile.shfl_up(x_sum[1], 1)
                    x_sum[1] += tile.if_then_else(i_thread >= 1, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_up(x_sum[1], 2)
                    x_sum[1] += tile.if_then_else(i_thread >= 2, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_up(x_sum[1], 4)
                    x_sum[1] += tile.if_then_else(i_thread >= 4, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_up(x_sum[1], 8)
                    x_sum[1] += tile.if_then_else(i_thread >= 8, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_up(x_sum[1], 16)
                    x_sum[1] += tile.if_then_else(i_thread >= 16, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_up(x_sum[1], 1)
                    x_sum[0] += tile.if_then_else(i_thread >= 1, x_sum[2], 0.0)
                    for n in tile.unroll(2):
                        s_G[2 * i_thread + n] = x_sum[n]
                        s_head[2 * i_thread + n] = tile.exp2(x_sum[n])
                elif i_thread < 64:
                    x_sum[0] = s_log_decay[2 * i_thread - 63]
                    x_sum[1] = x_sum[0] + s_log_decay[2 * i_thread - 64]
                    x_sum[2] = tile.shfl_down(x_sum[1], 1)
                    x_sum[1] += tile.if_then_else(i_thread < 63, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_down(x_sum[1], 2)
                    x_sum[1] += tile.if_then_else(i_thread < 62, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_down(x_sum[1], 4)
                    x_sum[1] += tile.if_then_else(i_thread < 60, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_down(x_sum[1], 8)
                    x_sum[1] += tile.if_then_else(i_thread < 56, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_down(x_sum[1], 16)
                    x_sum[1] += tile.if_then_else(i_thread < 48, x_sum[2], 0.0)
                    x_sum[2] = tile.shfl_down(x_sum[1], 1)
                    x_sum[2] = tile.if_then_else(i_thread < 63, x_sum[2], 0.0)
                    x_sum[0] += x_sum[2]
                    x_sum[3] = s_step[2 * i_thread - 63]
                    s_tail[2 * i_thread - 63] = tile.exp2(x_sum[2]) * x_sum[3]
                    s_steps[2 * i_thread - 63] = x_sum[3]
                    x_sum[3] = s_step[2 * i_thread - 64]
                    s_tail[2 * i_thread - 64] = tile.exp2(x_sum[0]) * x_sum[3]
                    s_steps[2 * i_thread - 64] = x_sum[3]
                tile.copy(b_h, s_h)
                tile.tma_copy(s_h, h[i_c, i_h, i_v * BV : (i_v + 1) * BV, :])
                for i, j in tile.Parallel(BV, BT):
                    b_added[i, j] = tile.cast(b_outer[i, j], "float32") * s_tail[j]
                tile.copy(b_added, b_outer)
                hold[0] = s_log_decay[0]
                hold[0] = s_step[0]
                for i, j in tile.Parallel(BV, K):
                    b_S[i, j] *= s_head[BT - 1]
                tile.wgmma_gemm(b_outer, s_own_k, b_S, policy=ROWS)

                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_k[0, 0], "float32")
                hold[0] = tile.cast(s_v[0, 0], "float32")

            tile.tma_store_wait(0)

    return rescan_group


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
    v, k, log_decay, step, S_seg, cu_seqlens, chunk_offsets, h, *, n_sequences, T, H, HV, NS,
    segment
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(v, k, log_decay, step, S_seg, cu_seqlens, chunk_offsets, h)
