"""Scan the chunks of each segment in order, keeping what the backward needs, heads by the q and k of a group.

One program per segment, value head and slice of V: the forward left the state at every segment's
start, so that segments run side by side. The state is held transposed, S^T [BV, K], in registers.

    Y = (q S) head + P v + D v          P_ij = decay_ij step_j <q_i, k_j>
    dY = dO silu(z)          dz = dO Y silu'(z)
    S^T <- S^T gamma_C + (v^T tail step) k

where decay_ij is what the state keeps from token j to token i, head from the chunk's start to a token,
tail from a token to the chunk's end, and gamma_C over all of it: factors of no channel. Scores are made
here of the q and k that the state needs anyway: they are the left operand of the next product as
they lie in registers, which tiles that are loaded would have to be brought to.

The compiler gives the loads to a warp group of its own, and every tile a barrier: two programs share a multiprocessor.

    v          [B, T, HV, V]      bf16  values
    q          [B, T, H, K]       bf16  queries
    k          [B, T, H, K]       bf16  keys
    log_decay  [NT, HV, BT]       fp32  decay of each token, log2
    step       [NT, HV, BT]       fp32  step of each token, after its activation
    scores     [NT, H, BT, BT]    bf16  <q_i, k_j> of a group, as they are
    D          [HV, V]            fp32  factor of a token's own value, added to o
    z          [B, T, HV, V]      bf16  output gate, before silu
    do         [B, T, HV, V]      bf16  gradient of o
    S_seg      [N, HV, NS, V, K]  fp32  state at the segment's start, transposed
    h          [NT, HV, V, K]     bf16  state at the chunk's start, transposed
    dz         [B, T, HV, V]      bf16  gradient of z
    dy         [B, T, HV, V]      bf16  gradient of o before its gate
    dD         [NT, HV, V]        fp32  gradient of D: sums over the chunk's tokens

Problem: mamba2 K=128 V=64 bf16, g bf16, softplus gate
Config:  BT=64 BV=64 gating=inside heads=1 language=tilelang num_stages=1 num_warps=4
Template digest 1252bf6599366bfc; made by
    gdn2gen generate --op mamba2 --head-dim 128,64 --dtype bf16 --gate-dtype bf16 --gate \
      softplus --with=dt_bias,rate,D,z --stage rescan_group --config \
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

    B, T, HV, H, NT, NS = (
        tile.dynamic(name) for name in ("B", "T", "HV", "H", "NT", "NS")
    )
    # how far rows of z lie apart, and sequences of them
    z_token, z_batch = (tile.dynamic(name, "int64") for name in ("z_token", "z_batch"))
    # a warp keeps whole rows, so that one product's result is the next one's operand
    ROWS = tile.GemmWarpPolicy.FullRow

    @tile.prim_func
    def rescan_group(
        v: tile.Tensor([B, T, HV, V], "bfloat16"),
        q: tile.Tensor([B, T, H, K], "bfloat16"),
        k: tile.Tensor([B, T, H, K], "bfloat16"),
        log_decay: tile.Tensor([NT, HV, BT], "float32"),
        step: tile.Tensor([NT, HV, BT], "float32"),
        scores: tile.Tensor([NT, H, BT, BT], "bfloat16"),
        D: tile.Tensor([HV, V], "float32"),
        z: tile.StridedTensor([B, T, HV, V], [z_batch, z_token, V, 1], "bfloat16"),
        do: tile.Tensor([B, T, HV, V], "bfloat16"),
        S_seg: tile.Tensor([B, HV, NS, V, K], "float32"),
        h: tile.Tensor([NT, HV, V, K], "bfloat16"),
        dz: tile.Tensor([B, T, HV, V], "bfloat16"),
        dy: tile.Tensor([B, T, HV, V], "bfloat16"),
        dD: tile.Tensor([NT, HV, V], "float32"),
        segment: tile.int32,
    ):
        # three dims: divisions in every address would be a third of all instructions, or 5 of 6
        with tile.Kernel(
            V // BV * NS, HV, B, threads=128
        ) as (i_x, i_h, i_n):
            # 2 programs to a multiprocessor: 128 registers a thread, of which the loads need few
            tile.annotate_min_blocks_per_sm(2)
            tile.annotate_producer_reg_dealloc(24)
            tile.annotate_consumer_reg_alloc(232)

            i_v = i_x % (V // BV)
            i_s = i_x // (V // BV)
            n_chunks = tile.ceildiv(T, BT)
            i_first = i_n * n_chunks
            i_b = i_n
            i_start = 0
            n_tokens = T

            # held in a variable: the compiler would divide again for every load
            i_hq = tile.alloc_var("int32")
            i_hq = i_h // (HV // H)
            i_thread = tile.get_thread_binding()
            s_q = tile.alloc_shared([BT, K], IO)
            s_k = tile.alloc_shared([BT, K], IO)
            s_v = tile.alloc_shared([BT, BV], IO)
            # the state as products read it, and as it is kept
            s_h = tile.alloc_shared([BV, K], IO)
            b_h = tile.alloc_fragment([BV, K], IO)
            b_S = tile.alloc_fragment([BV, K], "float32")
            b_added = tile.alloc_fragment([BV, BT], "float32")
            b_outer = tile.alloc_fragment([BV, BT], IO)
            b_P = tile.alloc_fragment([BT, BT], "float32")
            b_Pd = tile.alloc_fragment([BT, BT], IO)
            b_o = tile.alloc_fragment([BT, BV], "float32")
            b_od = tile.alloc_fragment([BT, BV], IO)
            s_skip = tile.alloc_shared([BV], "float32")
            s_log_decay = tile.alloc_shared([BT], "float32")
            s_step = tile.alloc_shared([BT], "float32")
            # decay since the chunk's start, its exponential, and that of the decay to its end, times the step
            s_G = tile.alloc_shared([BT], "float32")
            s_steps = tile.alloc_shared([BT], "float32")
            s_head = tile.alloc_shared([BT], "float32")
            s_tail = tile.alloc_shared([BT], "float32")
            x_sum = tile.alloc_local([4], "float32")
            s_z = tile.alloc_shared([BT, BV], IO)
            s_do = tile.alloc_shared([BT, BV], IO)
            s_dy = tile.alloc_shared([BT, BV], IO)
            s_dz = tile.alloc_shared([BT, BV], IO)
            b_z = tile.alloc_fragment([BT, BV], "float32")
            b_sigmoid = tile.alloc_fragment([BT, BV], "float32")
            b_dy = tile.alloc_fragment([BT, BV], "float32")
            # of all the program's chunks, as none is asked for by itself: the others have zeros
            b_dD = tile.alloc_fragment([BT, BV], "float32")
            s_dD = tile.alloc_shared([BT, BV], "float32")
            tile.annotate_layout({s_z: make_swizzled_layout(s_z), s_do: make_swizzled_layout(s_do)})
            # A tile is given back for the next load after the last line that reads it. Values that
            # were read must have been used by then, so that line is one of its own, into `hold`.
            hold = tile.alloc_local([1], "float32")
            for j in tile.Parallel(BV):
                s_skip[j] = D[i_h, i_v * BV + j]

            for i, j in tile.Parallel(BV, K):
                b_S[i, j] = S_seg[i_n, i_h, i_s, i_v * BV + i, j]
            tile.clear(b_dD)
            for i_chunk in tile.Pipelined(
                tile.min(segment, n_chunks - i_s * segment), num_stages=1
            ):
                i_t = i_s * segment + i_chunk
                i_c = i_first + i_t
                i_row = i_start + i_t * BT
                tile.copy(q[i_b, i_row : i_row + BT, i_hq, :], s_q)
                tile.copy(k[i_b, i_row : i_row + BT, i_hq, :], s_k)
                tile.copy(log_decay[i_c, i_h, :], s_log_decay)
                tile.copy(step[i_c, i_h, :], s_step)
                tile.copy(v[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_v)
                tile.copy(z[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_z)
                tile.copy(do[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV], s_do)

                for i, j in tile.Parallel(BV, BT):
                    b_outer[i, j] = s_v[j, i]
                tile.copy(b_S, b_h)
                tile.tma_store_wait(2)
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
                tile.wgmma_gemm(s_q, s_k, b_P, transpose_B=True, clear_accum=True, policy=ROWS)
                tile.wgmma_gemm(s_q, s_h, b_o, transpose_B=True, clear_accum=True, policy=ROWS)
                for i, j in tile.Parallel(BV, BT):
                    b_added[i, j] = tile.cast(b_outer[i, j], "float32") * s_tail[j]
                tile.copy(b_added, b_outer)
                hold[0] = s_log_decay[0]
                hold[0] = s_step[0]
                for i, j in tile.Parallel(BV, K):
                    b_S[i, j] *= s_head[BT - 1]
                tile.wgmma_gemm(b_outer, s_k, b_S, policy=ROWS)
                tile.wait_wgmma(2)

                for i, j in tile.Parallel(BT, BT):
                    b_P[i, j] = tile.if_then_else(i >= j, b_P[i, j] * tile.exp2(s_G[i] - s_G[j]) * s_steps[j], 0.0)
                tile.copy(b_P, b_Pd)
                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_q[0, 0], "float32")

                for i, j in tile.Parallel(BT, BV):
                    b_o[i, j] = b_o[i, j] * s_head[i] + tile.cast(s_v[i, j], "float32") * s_skip[j]

                tile.copy(s_z, b_z)
                tile.copy(s_do, b_dy)
                tile.wgmma_gemm(b_Pd, s_v, b_o, policy=ROWS)
                tile.wait_wgmma(1)
                hold[0] = tile.cast(s_k[0, 0], "float32")

                # meanwhile
                for i, j in tile.Parallel(BT, BV):
                    b_sigmoid[i, j] = tile.rsqrt(1.0 + tile.exp2(b_z[i, j] * -1.4426950408889634))
                    b_sigmoid[i, j] *= b_sigmoid[i, j]
                    # what is of z and dO alone
                    b_dy[i, j] *= b_sigmoid[i, j]
                    b_sigmoid[i, j] = b_dy[i, j] * (1.0 + b_z[i, j] * (1.0 - b_sigmoid[i, j]))
                    b_dy[i, j] *= b_z[i, j]
                # before dy is rounded: a sum over all tokens shows what each of them lost
                for i, j in tile.Parallel(BT, BV):
                    b_dD[i, j] += b_dy[i, j] * tile.cast(s_v[i, j], "float32")
                hold[0] = tile.cast(s_z[0, 0], "float32")
                hold[0] = tile.cast(s_do[0, 0], "float32")

                tile.copy(b_dy, b_od)
                tile.tma_store_wait(2)
                tile.copy(b_od, s_dy)
                tile.tma_copy(s_dy, dy[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])

                tile.wait_wgmma(0)
                hold[0] = tile.cast(s_v[0, 0], "float32")

                for i, j in tile.Parallel(BT, BV):
                    b_o[i, j] *= b_sigmoid[i, j]
                tile.copy(b_o, b_od)
                tile.tma_store_wait(2)
                tile.copy(b_od, s_dz)
                tile.tma_copy(s_dz, dz[i_b, i_row : i_row + BT, i_h, i_v * BV : (i_v + 1) * BV])

                for j in tile.Parallel(BV):
                    dD[i_c, i_h, i_v * BV + j] = 0.0
            tile.tma_store_wait(0)

            tile.copy(b_dD, s_dD)
            tile.sync_threads()
            i_last = i_first + tile.min((i_s + 1) * segment, n_chunks) - 1
            if i_thread < BV:
                x_sum[0] = 0.0
                for i in tile.serial(BT):
                    x_sum[0] += s_dD[i, i_thread]
                dD[i_last, i_h, i_v * BV + i_thread] = x_sum[0]

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
    v, q, k, log_decay, step, scores, D, z, do, S_seg, h, dz, dy, dD, *, n_sequences, T, H, HV,
    NS, segment, z_row
):
    """Launch one program per sequence, value head and slice of V on the current stream."""
    if T == 0:  # no tile that TMA could load
        return
    compiled()(v, q, k, log_decay, step, scores, D, z, do, S_seg, h, dz, dy, dD, segment)
